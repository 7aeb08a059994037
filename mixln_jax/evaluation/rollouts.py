"""Rollouts: completions of prompts, sampled and scored, as the batches of a task that learns from them."""

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from mixln_jax.data import chat, prompt_rows
from mixln_jax.data.examples import Batch
from mixln_jax.data.prompt_rows import Prompts
from mixln_jax.data.records import Prompt
from mixln_jax.data.tokenizers import Tokenizer
from mixln_jax.evaluation import prompts
from mixln_jax.evaluation.generation import Continuation, Writer
from mixln_jax.evaluation.reward_functions import Reward
from mixln_jax.evaluation.rewards import open_reward
from mixln_jax.models import transformer
from mixln_jax.models.sampler import Sampler
from mixln_jax.models.sampling import Sampling
from mixln_jax.program.program import Program
from mixln_jax.runs import encoder as encoders
from mixln_jax.system import console
from mixln_jax.tasks.online import Rollout

ROLLOUTS, EVALUATION = 0x524F4C4C, 0x4556414C  # apart from the other random choices of a seed
GREEDY = Sampling(temperature=0)


class Rollouts:
    """Samples and scores completions with the weights of a run, on its mesh.

    They are a function of the weights, `config.seed`, the step and the place of the prompt in the data: no restart
    changes them. In an evaluation each prompt has one completion, whose random numbers are the same at every step.
    """

    def __init__(
        self, program: Program, tokenizer: Tokenizer, reward: Reward, reward_network: str | None = None
    ) -> None:
        """Prepares to sample; nothing is compiled yet. `reward_network`: the fingerprint of its weights, if the reward
        is a network's."""
        assert isinstance(program.mesh, jax.sharding.Mesh), 'plans do not sample'
        self._program, self._reward = program, reward
        self.fingerprint = {} if reward_network is None else {'reward_network': reward_network}
        self._config, self._online = program.config, program.config.task.online
        template = chat.open_template(self._config.data.template, tokenizer)
        self._encoder = prompts.with_turn_end(encoders.of_run(self._config, tokenizer), template)
        self._sampler = Sampler(program.model, self._config.seq_length, program.mesh)
        self._warned = False

    def training(self, network: Any, batch: Mapping[str, np.ndarray], examples: Prompts, updates_done: Any) -> Batch:
        """Returns the batch of a step, on the host: `online.completions` rows for each prompt.

        Args:
            network: all its weights, on the devices.
            batch: the prompts of the step, all of them in every process; see `Prompts`.
            examples: that they are of.
            updates_done: the step before, on the devices; ramps stand there, and the random numbers depend on it.

        Raises UsageError: the reward function fails.
        """
        count = self._online.completions
        places = (batch['place'].astype(np.int64)[:, None] * count + np.arange(count)).reshape(-1)
        asked, contexts = self._repeated(batch, examples, count)
        seed = _seed(self._config.seed, ROLLOUTS, int(jax.device_get(updates_done)))
        made = self._complete(network, contexts, updates_done, places, seed, Sampling(self._online.temperature))
        rewards, baselines = self._reward(asked, [one.text for one in made]), np.zeros(len(made))
        if self._online.algorithm == 'remax':
            greedy = self._complete(network, contexts[::count], updates_done, places[::count], seed, GREEDY)
            baselines = np.repeat(self._reward(asked[::count], [one.text for one in greedy]), count)
        self._warn(made)
        return self._collected(contexts, made, rewards, baselines, places, len(made))

    def evaluation(
        self, network: Any, batch: Mapping[str, np.ndarray], examples: Prompts, updates_done: Any
    ) -> tuple[Batch, list[dict[str, Any]]]:
        """Returns a batch of an evaluation, on the host, and a record of each completion: the fields of the prompt,
        those of `generation.FIELDS` and `reward`. Arguments and errors as of `training`."""
        size = len(batch['place'])
        real = np.flatnonzero(batch['example_mask'])
        chosen = {name: values[real] for name, values in batch.items()}
        asked, contexts = self._repeated(chosen, examples, 1)
        places = chosen['place'].astype(np.int64)
        seed = _seed(self._config.seed, EVALUATION)
        made = self._complete(
            network, contexts, updates_done, places, seed, Sampling(self._online.temperature), fill=size
        )
        rewards = self._reward(asked, [one.text for one in made])
        records = [
            prompt.fields | one.record(prompt.last) | {'reward': float(reward)}
            for prompt, one, reward in zip(asked, made, rewards, strict=True)
        ]
        return self._collected(contexts, made, rewards, np.zeros(len(made)), places, size), records

    def _repeated(
        self, batch: Mapping[str, np.ndarray], examples: Prompts, count: int
    ) -> tuple[list[Prompt], list[list[int]]]:
        """Returns the prompts of a batch and their ids, each `count` times in a row."""
        rows = np.repeat(np.arange(len(batch['record'])), count)
        asked = [examples.prompts[record] for record in batch['record'][rows]]
        return asked, [prompt_rows.context(batch['inputs'][row], batch['loss_mask'][row]) for row in rows]

    def _complete(
        self,
        network: Any,
        contexts: Sequence[Sequence[int]],
        updates_done: Any,
        places: np.ndarray,
        seed: int,
        sampling: Sampling,
        fill: int = 0,
    ) -> list[Continuation]:
        """Returns the completion of each context, a micro-batch at a time."""
        step = transformer.needed_step(self._program.model, updates_done)
        writer = Writer(self._sampler, network, self._encoder, step=step)
        return writer.complete(
            contexts,
            [()] * len(contexts),
            [self._online.max_new_tokens] * len(contexts),
            fill or self._config.batch_size // self._config.accumulate,
            numbers=(places % 2**31).tolist(),
            seed=seed,
            sampling=sampling,
        )

    def _collected(
        self,
        contexts: Sequence[Sequence[int]],
        made: Sequence[Continuation],
        rewards: np.ndarray,
        baselines: np.ndarray,
        places: np.ndarray,
        size: int,
    ) -> Batch:
        values = zip(contexts, made, rewards.tolist(), baselines.tolist(), places.tolist(), strict=True)
        rollouts = [
            Rollout(context, one.tokens.ids, reward, baseline, one.tokens.finish == 'stop', place)
            for context, one, reward, baseline, place in values
        ]
        collect = self._program.task.collect
        assert collect is not None, 'the task learns from rollouts'
        return collect(rollouts, size)

    def _warn(self, made: Sequence[Continuation]) -> None:
        """Warns once of a step of which most completions do not end."""
        cut = sum(one.tokens.finish != 'stop' for one in made)
        if not self._warned and 2 * cut > len(made):
            self._warned = True
            console.say(
                f'mixln_jax: warning: {cut:,} of the {len(made):,} completions of a step did not end within '
                f'config.task.online.max_new_tokens={self._online.max_new_tokens}; train/ended tells how many do',
                file=sys.stderr,
            )


def open_rollouts(program: Program, tokenizer: Tokenizer | None) -> Rollouts | None:
    """Returns the rollouts of a run; None where its task does not learn from them.

    Raises UsageError, naming the key, for a reward that cannot be used.
    """
    if program.task.collect is None:
        return None
    assert isinstance(program.mesh, jax.sharding.Mesh), 'plans do not sample'
    assert tokenizer, 'what is sampled is text'
    config = program.config
    size = config.batch_size // config.accumulate
    opened = open_reward(config.task.online.reward, 'config.task.online.reward', program.mesh, size, tokenizer)
    return Rollouts(program, tokenizer, *opened)


def completed(
    rollouts: Rollouts | None, network: Any, reader: Iterable[Batch], examples: Any, updates_done: Any
) -> Iterable[Batch]:
    """Returns the batches of an evaluation: those that are read, with prompts completed where there are `rollouts`."""
    if rollouts is None:
        return reader
    return (rollouts.evaluation(network, batch, examples, updates_done)[0] for batch in reader)


def _seed(*parts: int) -> int:
    """Returns a seed of random numbers, below 2^32."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0])
