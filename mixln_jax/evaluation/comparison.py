"""Two networks answer the same prompts, and a reward says which of them answers better."""

import dataclasses
import functools
import math
import sys
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from mixln_jax import config as configs
from mixln_jax.data.records import Prompt
from mixln_jax.distributed import mesh as meshes
from mixln_jax.evaluation import prompts as prompting
from mixln_jax.evaluation.generation import Continuation, Writer
from mixln_jax.evaluation.reward_functions import Reward
from mixln_jax.kernels import cross_entropy
from mixln_jax.models.network import Network
from mixln_jax.models.sampler import Sampler
from mixln_jax.models.sampling import Sampling
from mixln_jax.runs import encoder as encoders
from mixln_jax.runs.weights import Weights
from mixln_jax.system import console
from mixln_jax.system.errors import CheckpointError, UsageError


@dataclasses.dataclass(frozen=True)
class Answers:
    """What a network answers. `contexts`: ids of the prompts, as far as it sees them; `made`: what follows them."""

    contexts: list[list[int]]
    made: list[Continuation]

    @property
    def texts(self) -> list[str]:
        """The texts of the completions."""
        return [one.text for one in self.made]

    @property
    def ended(self) -> float:
        """The share of the completions that end."""
        return float(np.mean([one.tokens.finish == 'stop' for one in self.made]))


def answer(
    loaded: Weights, prompts: Sequence[Prompt], max_new: int, temperature: float, seed: int, batch_size: int
) -> Answers:
    """Returns the answers of a network, sampled at a temperature; 0: the likeliest tokens.

    Raises CheckpointError for a network that cannot generate; DataError and UsageError as `prompts.contexts`.
    """
    if loaded.model.obstacle:
        raise CheckpointError(f'{loaded.where} {loaded.model.obstacle}')
    encoder = encoders.of_weights(loaded)
    template = prompting.open_template(prompting.AUTO, loaded.config, encoder.tokenizer, loaded.template)
    contexts = prompting.contexts(prompts, encoder, template)
    sampler = Sampler(loaded.model, loaded.max_length, mesh_for(batch_size))
    writer = Writer(sampler, sampler.to_devices(loaded.params), prompting.with_turn_end(encoder, template))
    count = len(contexts)
    made = writer.complete(
        contexts, [()] * count, [max_new] * count, batch_size, seed=seed, sampling=Sampling(temperature)
    )
    if cut := sum(one.tokens.cut > 0 for one in made):
        shown = f'{cut:,} of {count:,} prompts fill the window of {loaded.max_length} tokens of {loaded.where}'
        console.say(f'mixln_jax: warning: {shown} and lose their beginning', file=sys.stderr)
    return Answers([context[one.tokens.cut :] for context, one in zip(contexts, made, strict=True)], made)


def divergences(start: Weights, answers: Answers, batch_size: int) -> np.ndarray:
    """Returns log p(completion) - log p_start(completion) of each answer in nats, [n] float64; where the answers were
    sampled at temperature 1, their mean is the KL divergence from `start`."""
    mesh = mesh_for(batch_size)
    rows = meshes.batch_sharding(mesh)
    model = start.model.clone(stream_sharding=rows)
    params = meshes.params_to_devices(start.params, mesh)
    score = jax.jit(functools.partial(_log_probs, model=model, mesh=mesh), out_shardings=meshes.replicated(mesh))
    pairs = [(context, one.tokens) for context, one in zip(answers.contexts, answers.made, strict=True)]
    longest = max(len(context) + len(tokens.ids) for context, tokens in pairs)
    found = []
    for first in range(0, len(pairs), batch_size):
        batch = pairs[first : first + batch_size]
        ids = np.zeros((batch_size, longest), np.int32)
        for row, (context, tokens) in zip(ids, batch, strict=False):
            row[: len(context) + len(tokens.ids)] = [*context, *tokens.ids]
        log_probs = jax.device_get(score(params, meshes.to_devices(ids, rows)))
        for row, (context, tokens) in zip(log_probs, batch, strict=False):
            own, count = np.array(tokens.log_probs, np.float64), len(tokens.ids)
            found.append((own - row[len(context) - 1 :][:count]).sum())
    return np.array(found)


def _log_probs(params: Any, ids: jax.Array, *, model: Network, mesh: jax.sharding.Mesh) -> jax.Array:
    """Returns the log-probability [B, T-1] of each token of ids [B, T] but the first."""
    x, _ = model.apply({'params': params}, {'inputs': ids[:, :-1]}, method='backbone')
    return cross_entropy.token_log_probs(
        x, model.head_kernel(params), ids[:, 1:], model.config.vocab_size, mesh=mesh
    ).log_probs


def compare(
    ours: Weights,
    theirs: Weights,
    prompts: Sequence[Prompt],
    reward: Reward,
    start: Weights | None = None,
    *,
    max_new: int,
    temperature: float,
    seed: int,
    batch_size: int,
) -> dict[str, Any]:
    """Returns how the answers of two networks compare, over prompts; `_stderr` is the standard error of a mean.

    A win counts 1 and a tie 1/2. KL divergences from `start` are in nats per completion.

    Args:
        ours, theirs: the networks.
        prompts: what they answer.
        reward: what scores the answers.
        start: the weights that both began with; None: no divergences.
        max_new: tokens of an answer, at most.
        temperature, seed: of the samples.
        batch_size: prompts at a time.

    Raises UsageError: `start` has another tokenizer, or divergences at another temperature than 1; as `answer`.
    """
    if start and temperature != 1:
        raise UsageError(f'--temperature {temperature:g}: --start needs answers sampled at temperature 1')
    if start:
        _check_tokenizers(start, ours, theirs)
    sides = [answer(one, prompts, max_new, temperature, seed, batch_size) for one in (ours, theirs)]
    rewards = [reward(prompts, side.texts) for side in sides]
    difference = rewards[0] - rewards[1]
    wins = (np.sign(difference) + 1) / 2
    result: dict[str, Any] = {'prompts': len(prompts), 'ties': int((difference == 0).sum())}
    result |= _mean('win_rate', wins) | _mean('reward_difference', difference)
    for suffix, side, scores in zip(('', '_against'), sides, rewards, strict=True):
        result |= _mean(f'reward{suffix}', scores) | {f'ended{suffix}': side.ended}
        if start:
            result |= _mean(f'kl{suffix}', divergences(start, side, batch_size))
    return result


def _check_tokenizers(start: Weights, *others: Weights) -> None:
    fingerprint = encoders.of_weights(start).tokenizer.fingerprint
    for other in others:
        if encoders.of_weights(other).tokenizer.fingerprint != fingerprint:
            raise UsageError(f'--start {start.where} has another tokenizer than {other.where}')


def _mean(name: str, values: np.ndarray) -> dict[str, float | None]:
    """Returns the mean of values [n] and its standard error; None of a single value."""
    error = float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else None
    return {name: float(values.mean()), f'{name}_stderr': error}


def mesh_for(batch_size: int) -> jax.sharding.Mesh:
    """Returns the devices that share `batch_size` rows evenly."""
    devices = meshes.devices('auto')
    return meshes.make_mesh(configs.Mesh(data=math.gcd(batch_size, len(devices))), devices)


def shown(result: dict[str, Any]) -> str:
    """Returns a result of `compare` as lines for people."""

    def number(name: str, form: str = '.3f') -> str:
        error = result[f'{name}_stderr']
        return f'{result[name]:{form}}' + ('' if error is None else f' ± {error:.3f}')

    lines = [
        f'win rate {number("win_rate")} over {result["prompts"]:,} prompts, {result["ties"]:,} of them ties',
        f'reward {number("reward")} against {number("reward_against")}, difference '
        f'{number("reward_difference", "+.3f")}',
        f'ended {result["ended"]:.1%} against {result["ended_against"]:.1%}',
    ]
    if 'kl' in result:
        lines.append(f'KL from the start {number("kl")} against {number("kl_against")} nats per completion')
    return '\n'.join(lines)
