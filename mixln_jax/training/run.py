"""The whole job: from a configuration to trained weights, metrics and checkpoints in a work directory."""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from clu import parameter_overview

from mixln_jax import config as configs
from mixln_jax.analysis import during
from mixln_jax.data import batches
from mixln_jax.data import rows as data_rows
from mixln_jax.data.examples import Examples
from mixln_jax.data.tokenizers import Tokenizer
from mixln_jax.distributed import mesh as meshes
from mixln_jax.distributed import processes
from mixln_jax.evaluation import references
from mixln_jax.evaluation.rollouts import Rollouts, open_rollouts
from mixln_jax.models import placements
from mixln_jax.program.program import Program
from mixln_jax.program.step import State
from mixln_jax.runs import best, checkpoint, continuation, environment, frozen, log
from mixln_jax.runs.workdir import (
    check_folder,
    check_metrics,
    earlier_config,
    is_finished,
    open_workdir,
    resolved_config,
)
from mixln_jax.system import console, files, outputs, signals
from mixln_jax.system.errors import DataError
from mixln_jax.tasks.task import Task
from mixln_jax.training import hooks, loop, samples
from mixln_jax.training.feed import Feed
from mixln_jax.training.meter import Meter
from mixln_jax.training.signs import Signs
from mixln_jax.training.start import first_state, with_num_steps, with_ramp_offset


def run(values: Any, workdir: str | os.PathLike, stop: signals.Stop | None = None, verbose: bool = False) -> None:
    """Trains, evaluates and saves; continues the run that is in `workdir`.

    Args:
        values: a ConfigDict or nested dict; see config.py.
        workdir: folder of the run; it is made if it does not exist.
        stop: whose signal handlers are installed; None leaves signals alone, as in a notebook.
        verbose: whether to list the parameters.

    Raises:
        errors.Exit and its subclasses, errors.Stopped.
    """
    signals.end_if_imported()
    console.guard_files()
    config = configs.build(values)
    check_folder(workdir)  # before anything takes time
    with contextlib.ExitStack() as closing:
        stop = stop or signals.Stop()
        with stop.may_interrupt():
            stop = _join_processes(config, stop, closing)
            mesh = _start_jax(config)
            earlier = earlier_config(config, workdir)
            config = with_ramp_offset(configs.build(values, earlier))
            if jax.process_count() > 1:
                _print_in_one_process(mesh, closing)
            program = Program(config, mesh)
            open_data = functools.cache(functools.partial(_open_data, config, program.task))
            if config.num_epochs:
                config = with_num_steps(config, earlier, lambda: len(open_data().training))
                program = Program(config, mesh)
            best.check_metric(config.checkpoint.best, program.task)
            resolved = resolved_config(config, program.model)
            shared = closing.enter_context(open_workdir(workdir, resolved))
            processes.check_shared(shared)
            with stop.wait():
                checkpoints = _open_checkpoints(config, shared, resolved, closing)
            if is_finished(shared, checkpoints, config.num_steps):
                console.say(f'mixln_jax: {shared} is already finished ({config.num_steps} steps)')
                _say_other_start(config, earlier)
                return
            data = open_data()
            rollouts = open_rollouts(program, data.tokenizer)
            data.training.fingerprint.update(rollouts.fingerprint if rollouts else {})  # what a run learns from
            _describe(program, data.training, verbose)
            state, about = first_state(program, resolved, shared, checkpoints, data.training.fingerprint, stop)
            fixed, data = _with_reference(program, shared, state, about, data, stop)
            if checkpoints.latest() is not None:
                check_metrics(shared, about, config.num_steps)
            records = _Records(shared, resolved, about, data, mesh, closing, fixed)
            start = time.perf_counter()
            compiled = program.compile()
            compile_sec = time.perf_counter() - start
        job = _Job(program, compiled, data, rollouts, checkpoints, records, about, stop)
        state = job.train(state, compile_sec, closing)
        processes.watch(0)
        del state  # makes room for what is read back
        checkpoints.read_back(config.num_steps, program.state.own)
        console.say(log.summary_table(records.metrics.lines[-1], program.model.norm_position))
        console.say(
            f'weights, metrics and configuration are in {workdir}',
            f'next: python -m mixln_jax.report {shlex.quote(str(workdir))}',
        )


@dataclasses.dataclass(frozen=True)
class _Data:
    """The tokenizer, the examples to train on and those to evaluate on."""

    tokenizer: Tokenizer | None  # of texts
    training: Examples
    evaluation: Examples


class _Records:
    """What a run writes besides checkpoints. Of several processes one writes into the work directory, the others into
    temporary folders."""

    def __init__(
        self,
        shared: pathlib.Path,
        resolved: dict[str, Any],
        about: dict[str, Any],
        data: _Data,
        mesh: jax.sharding.Mesh,
        closing: contextlib.ExitStack,
        fixed: Mapping[str, str],
    ):
        self.shared, self.resolved, self.folder = shared, resolved, shared
        self.fixed: dict[str, str | None] = {**fixed}  # fingerprints of weights that are not trained
        if jax.process_index():
            self.folder = pathlib.Path(closing.enter_context(tempfile.TemporaryDirectory()))
        outputs.write_json(self.folder / 'config.json', resolved)
        seen: dict[str, Any] = {
            'data': data.training.fingerprint,
            'eval_data': {'split': resolved['eval']['split']} | data.evaluation.fingerprint,
        }
        if names := getattr(data.training, 'classes', None):
            seen['classes'] = list(names)
        devices = environment.environment(list(mesh.devices.flat))
        outputs.write_json(self.folder / 'environment.json', devices | seen)
        if data.tokenizer:
            data.tokenizer.save(self.folder / 'tokenizer')
        self.metrics = log.Metrics(self.folder, about['step'], about['open_line'], during.PICTURES)
        closing.callback(self.metrics.close)

    def save_debug(self, state: State) -> None:
        """Saves the state of a bad step in debug/; all processes call it."""
        folder = self.shared / 'debug/checkpoints'
        if not jax.process_index():
            shutil.rmtree(folder, ignore_errors=True)
        processes.barrier('debug')
        with contextlib.closing(checkpoint.Checkpoints(folder, keep=1)) as checkpoints:
            checkpoints.save(int(jax.device_get(state.step)), state.own, {'config': self.resolved} | self.fixed)


@dataclasses.dataclass(frozen=True)
class _Job:
    """A run that is ready to train."""

    program: Program
    compiled: tuple  # train step and evaluation step
    data: _Data
    rollouts: Rollouts | None  # where the task learns from them
    checkpoints: checkpoint.Checkpoints
    records: _Records
    about: dict
    stop: signals.Stop

    def train(self, state: State, compile_sec: float, closing: contextlib.ExitStack) -> State:
        """Returns the state after the last step, which is saved."""
        config, program, first = self.program.config, self.program, self.about['step'] + 1
        train_step, eval_step = self.compiled
        feed = Feed(program, self.stop, self.rollouts)
        dataset, to_devices = feed.training(self.data.training)
        reader = closing.enter_context(contextlib.closing(batches.read(dataset, first - 1, config.data.workers)))
        closing.callback(processes.watch, 0)
        if first == 1 and program.model.measured() and not config.init_from:  # given weights have factors already
            state = program.measure_factors(state, to_devices(dataset[0]))
        self.records.fixed[frozen.FOLDER] = frozen.keep(self.records.shared, state.fixed)
        probe = hooks.Probe(config.stability.every, program.probe, lambda: meter.last_batch, self.records.metrics)
        measuring = [probe, *self._measuring(feed, eval_step)]
        signs = self._signs()
        meter = self._meter(measuring, signs, compile_sec)
        saving = hooks.Saving(
            config.checkpoint.every,
            self.checkpoints,
            self.records.metrics,
            lambda: (
                {
                    'tokens': meter.tokens,
                    'signs': signs.record(),
                    'data': {'fingerprint': self.data.training.fingerprint},
                    'config': self.records.resolved,
                }
                | self.records.fixed
            ),
            config.checkpoint.minutes,
            config.log_every,
            signs.keep,
        )
        keeping = []
        if metric := config.checkpoint.best:
            keeping = [hooks.Best(config.eval.every, metric, program.task, saving)]
            keeping[0].choose()  # a run that continues has one
        stream = (to_devices(batch) for batch in feed.watched(reader))
        stream = hooks.profiled(stream, first, config.profile.start, config.profile.steps, self.records.folder)
        with jax.transfer_guard('disallow'), contextlib.closing(stream):
            if first == 1 and config.eval.first:
                with meter.paused():
                    self._evaluate_first(measuring, state)
            state = loop.fit(
                state,
                train_step,
                stream,
                [*measuring, *keeping, saving],
                first=first,
                last=config.num_steps,
                meter=meter,
                save=saving,
                stop=self.stop,
                resume_hooks=self.about['open_line'] is not None,
                collect=feed.collecting(self.data.training),
            )
            self.checkpoints.wait()
        return state

    def _evaluate_first(self, measuring: Sequence[hooks.Hook], state: State) -> None:
        """Evaluates the weights that the run begins with, and writes texts of them, as step 0."""
        self.records.metrics.add(0, {'tokens': 0})
        for hook in measuring:
            if not isinstance(hook, (hooks.Analysis, hooks.Probe)):
                hook(0, state)
        self.records.metrics.flush()

    def _measuring(self, feed: Feed, eval_step: Callable[..., Any]) -> list[hooks.Hook]:
        """Returns the hooks that add numbers to the metrics line of a step, or write texts at it."""
        config, program, metrics = self.program.config, self.program, self.records.metrics
        evaluate = feed.evaluation(eval_step, self.data.evaluation)
        measuring: list[hooks.Hook] = [hooks.Evaluation(config.eval.every, evaluate, program.task, metrics)]
        if config.eval.samples:
            if self.rollouts:
                write = samples.scored(program, self.data.evaluation, self.rollouts)
            else:
                assert self.data.tokenizer, 'only networks of texts have samples'
                write = samples.sampling(program, self.data.evaluation, self.data.tokenizer)
            measuring.append(hooks.Samples(config.eval.every, write, self.records.folder / 'samples'))
        if config.analysis.tokens:
            analyses = during.Analyses(config, program.task, self.data.evaluation, feed.checked)
            measuring.append(hooks.Analysis(config.analysis.every, analyses, program.task, metrics))
        return measuring

    def _signs(self) -> Signs:
        config, program = self.program.config, self.program
        training = batches.training(self.data.training, seed=config.data.seed, batch_size=config.examples_per_step)
        one_epoch = -(-len(self.data.training) // config.examples_per_step)
        seen = _readable(training, min(1000, one_epoch))
        entropy = functools.cache(functools.partial(program.task.baseline, seen))
        state, lines = program.state, self.records.metrics.lines
        return Signs(config, state.params, state.network, entropy, self.about, lines)

    def _meter(self, measuring: Sequence[hooks.Hook], signs: Signs, compile_sec: float) -> Meter:
        config, program = self.program.config, self.program
        return Meter(
            self.records.metrics,
            self.records.folder,
            task=program.task,
            num_steps=config.num_steps,
            log_every=config.log_every,
            log_also=lambda step: any(hook.due(step, config.num_steps) for hook in measuring),
            tokens=self.about['tokens'],
            positions_per_step=config.batch_size * program.row_length,
            flops_per_position=program.flops_per_position(),
            devices=list(program.mesh.devices.flat),
            first_line={'perf/compile_sec': compile_sec},
            signs=signs,
            save_debug=self.records.save_debug,
        )


def _readable(batches: Any, count: int) -> Iterator[Any]:
    """Yields up to `count` batches, as far as they can be read: training names what cannot when its step comes."""
    for number in range(count):
        try:
            yield batches[number]
        except DataError:
            return


def _join_processes(config: configs.Config, stop: signals.Stop, closing: contextlib.ExitStack) -> signals.Stop:
    """Waits for the other processes of the run; returns the Stop of all of them."""
    digest = hashlib.blake2b(json.dumps([configs.public(config), environment.versions()]).encode()).hexdigest()
    closing.enter_context(processes.joined(config.processes.timeout, digest, config.processes.secret))
    return processes.SharedStop() if jax.distributed.is_initialized() else stop


def _print_in_one_process(mesh: jax.sharding.Mesh, closing: contextlib.ExitStack) -> None:
    """Prints the number of this process; afterwards only process 0 prints."""
    who = f'process {jax.process_index()}/{jax.process_count()}'
    console.say(f'mixln_jax: {who}, {len(mesh.local_devices)} local of {mesh.size} devices')
    if jax.process_index():
        nowhere = open(os.devnull, 'w', encoding='utf-8')  # noqa: SIM115
        closing.enter_context(nowhere)
        closing.enter_context(contextlib.redirect_stdout(nowhere))


def _start_jax(config: configs.Config) -> jax.sharding.Mesh:
    """Returns the mesh of the run, after the settings that JAX reads when it starts."""
    if config.deterministic:
        os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} --xla_gpu_deterministic_ops=true'
    meshes.keep_heap(config.device)
    mesh = meshes.make_mesh(config.mesh, meshes.devices(config.device))
    # Compiled code is kept between runs, but not for CPUs: it may need instructions that the next host lacks.
    settings: Any = jax.config  # its stub does not list all settings
    if mesh.devices.flat[0].platform != 'cpu' and not settings.jax_compilation_cache_dir:
        with contextlib.suppress(OSError):  # a home that cannot be written to: each start compiles
            (cache := files.cache_folder() / 'xla').mkdir(parents=True, exist_ok=True)
            jax.config.update('jax_compilation_cache_dir', str(cache))
    return mesh


def _open_data(config: configs.Config, task: Task) -> _Data:
    """Returns the data of a run; warns if it evaluates on what it trains on."""
    tokenizer = data_rows.open_tokenizer(config.data) if task.reads == 'texts' else None
    if tokenizer:
        task.check_tokenizer(tokenizer)
    rows = [
        data_rows.open_examples(config, config.data, split, tokenizer)
        for split in (config.data.split, config.eval.split)
    ]
    if config.data.split == config.eval.split or 'all' in (config.data.split, config.eval.split):
        keys = f'config.eval.split={config.eval.split} and config.data.split={config.data.split}'
        console.say(f'mixln_jax: warning: evaluates on what it trains on ({keys})', file=sys.stderr)
    if tokenizer and (remark := data_rows.shared(config.data, config.task)):
        console.say(f'mixln_jax: warning: {remark}', file=sys.stderr)
    return _Data(tokenizer, *rows)


def _with_reference(
    program: Program,
    workdir: pathlib.Path,
    state: State,
    about: Mapping[str, Any],
    data: _Data,
    stop: signals.Stop,
) -> tuple[dict[str, str], _Data]:
    """Returns the fingerprint of the reference network and the data with what it says of them, where a task reads that
    in place of the network; see evaluation/references.py."""
    config = program.config
    if not program.task.precomputed:
        return {}, data
    splits: Any = {config.data.split: data.training, config.eval.split: data.evaluation}
    fingerprint, rows = references.of_training(program.task, config, workdir, state, about, splits, stop.check)
    data = _Data(data.tokenizer, rows[config.data.split], rows[config.eval.split])
    return {references.FOLDER: fingerprint}, data


def _open_checkpoints(
    config: configs.Config, shared: pathlib.Path, resolved: Mapping[str, Any], closing: contextlib.ExitStack
) -> checkpoint.Checkpoints:
    """Returns the checkpoints of a run; where it becomes longer, those of its decay are set aside."""
    kept = config.checkpoint
    checkpoints = checkpoint.Checkpoints(shared / 'checkpoints', kept.keep, keep_every=kept.keep_every)
    closing.callback(checkpoints.close)
    if step := continuation.restart(shared, resolved):
        checkpoints.go_back(step)
    return checkpoints


def _say_other_start(config: configs.Config, earlier: configs.Config | None) -> None:
    """Warns if a run is asked for that starts from elsewhere than the one in the work directory did."""
    for name in ('init_from', 'resume_from'):
        wanted, was = getattr(config, name), getattr(earlier or config, name)
        if wanted != was:
            console.say(
                f'mixln_jax: warning: it started with config.{name}={was or "(empty)"}, not with '
                f'{wanted or "(empty)"}, which has no effect here; give another --workdir',
                file=sys.stderr,
            )


def _describe(program: Program, rows: Examples, verbose: bool) -> None:
    """Prints the devices, sizes and warnings that follow from the keys; with `verbose` also all parameters."""
    config, mesh, model, params = program.config, program.mesh, program.model, program.state.network
    task = program.task
    kind = 'rows' if task.reads == 'texts' else task.unit
    if verbose:
        console.say(parameter_overview.get_parameter_overview(params, include_stats=False))
    per_step = config.batch_size * program.row_length
    numbers = {name: getattr(config.optim, name) for name in configs.PUBLISHED[config.optim.name]}
    frozen_ones = program.num_frozen()
    trained = f', {model.num_params(program.state.params):,} of them trained' if frozen_ones else ''
    attention = '; attention by cuDNN' if model.attention_kernel == 'cudnn' else ''
    console.say(
        f'{mesh.size} x {mesh.devices.flat[0].device_kind}{attention}'
        f'; placement {placements.spelled(model.norm_position)}\n'
        f'{model.num_params(params):,} parameters{trained}{"" if verbose else " (--verbose lists them)"}\n'
        f'{per_step:,} positions a step, {per_step * config.num_steps:,} in {config.num_steps:,} steps, '
        f'{config.examples_per_step * config.num_steps / len(rows):.2f} epochs of {len(rows):,} {kind}\n'
        f'optimiser {config.optim.name}: {", ".join(f"{name} {number:g}" for name, number in numbers.items()) or "-"}'
    )
    if config.examples_per_step > len(rows):
        console.say(
            f'mixln_jax: warning: a step takes {config.examples_per_step:,} rows and there are {len(rows):,}: it sees '
            f'each of them {config.examples_per_step / len(rows):.1f} times; lower config.batch_size',
            file=sys.stderr,
        )
    if analyses := config.analysis.tokens:
        share = during.share(config, program.flops_per_position(), program.row_length)
        console.say(f'analyses on {task.units(analyses):,.0f} {task.unit}: {share:.2%} of the FLOPs of training')
    sizes, steps = config.model, config.num_steps + config.model.ramp_start
    optim = config.optim
    warmup_ratio = optim.warmup_steps / config.num_steps if optim.warmup_steps else optim.warmup_ratio
    for warning in placements.warnings(model.norm_position, sizes.init, warmup_ratio, steps, sizes.ramp_steps):
        console.say(f'mixln_jax: warning: {warning}', file=sys.stderr)
