"""Batches on their way to the devices, watched while they are read."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from mixln_jax.data import batches
from mixln_jax.data.examples import Batch, Examples
from mixln_jax.distributed import mesh as meshes
from mixln_jax.distributed import processes
from mixln_jax.evaluation.loop import evaluate
from mixln_jax.evaluation.rollouts import Rollouts, completed
from mixln_jax.models import transformer
from mixln_jax.program.program import Program
from mixln_jax.program.step import State
from mixln_jax.system.signals import Stop


class Feed:
    """Reads batches of a run for as long as no signal stops it.

    Reading may hang, so a signal interrupts it, and the stacks of all threads are shown where no batch comes within
    `config.processes.stall` seconds.
    """

    def __init__(self, program: Program, stop: Stop, rollouts: Rollouts | None = None):
        """Keeps its arguments; `rollouts`: where batches are of prompts, which the network completes."""
        self._config, self._stop, self._program, self._rollouts = program.config, stop, program, rollouts
        self._sharding = meshes.batch_sharding(program.mesh)

    def watched(self, reader: Iterable[Batch]) -> Iterator[Batch]:
        """Yields what `reader` gives."""
        remaining = iter(reader)
        while True:
            processes.watch(self._config.processes.stall)
            with self._stop.interruptible():
                batch = next(remaining, None)
            if batch is None:
                return
            yield batch

    def checked(self, reader: Iterable[Batch]) -> Iterator[Batch]:
        """Yields what `reader` gives; raises Stopped between two batches where a signal has come."""
        for batch in self.watched(reader):
            self._stop.check()
            yield batch

    def training(self, examples: Examples) -> tuple[Any, Callable[[Batch], Any]]:
        """Returns the data set of this process's part of every batch, and the function that puts a batch on the
        devices. Of prompts every process has all, on the host; see `collecting`."""
        config, size = self._config, self._config.batch_size
        if self._rollouts:
            prompts = batches.training(examples, seed=config.data.seed, batch_size=config.examples_per_step)
            return prompts, lambda batch: batch
        part = meshes.local_rows(self._sharding, size)
        dataset = batches.training(examples, seed=config.data.seed, batch_size=size, part=part)
        return dataset, lambda batch: meshes.to_devices(batch, self._sharding, size)

    def collecting(self, examples: Any) -> Callable[[State, Batch], Any]:
        """Returns the function (state, batch of `training`) -> the batch on the devices that the state learns from."""
        if not (rollouts := self._rollouts):
            return lambda state, batch: batch
        return lambda state, batch: meshes.to_devices(
            rollouts.training(state.network, batch, examples, state.step), self._sharding
        )

    def evaluation(self, eval_step: Callable, examples: Examples) -> Callable[[State], dict[str, float | None]]:
        """Returns the function that evaluates the weights after a step on `examples`."""
        config = self._config

        def evaluate_state(state: State) -> dict[str, float | None]:
            params, step = state.averaged, transformer.needed_step(self._program.model, state.step)
            references = () if state.reference is None else (state.reference,)
            dataset = batches.mixed(examples, config.batch_size // config.accumulate)
            reader = batches.read(dataset, 0, workers=0)
            try:
                return evaluate(
                    lambda params, batch: eval_step(params, batch, step, *references),
                    params,
                    completed(self._rollouts, params, self.watched(reader), examples, state.step),
                    task=self._program.task,
                    at_a_time=config.accumulate,
                    num_tokens=config.eval.tokens,
                    sharding=self._sharding,
                    check=self._stop.check,
                )
            finally:
                reader.close()

        return evaluate_state
