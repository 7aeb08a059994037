"""Rewards of texts: a network that a run of config.task.name=reward has trained scores them."""

import dataclasses
import functools
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from mixln_jax.data import records
from mixln_jax.data.records import Prompt
from mixln_jax.data.tokenizers import Tokenizer
from mixln_jax.distributed import mesh as meshes
from mixln_jax.evaluation import prompts as prompting
from mixln_jax.evaluation.reward_functions import Reward, open_function
from mixln_jax.models.network import Network
from mixln_jax.runs import checksums, frozen, weights
from mixln_jax.runs import encoder as encoders
from mixln_jax.runs.weights import Weights
from mixln_jax.system import console, files
from mixln_jax.system.errors import CheckpointError, DataError, NumericsError, UsageError

KNOWN = (
    'a text is an object with `text`, `messages`, or a prompt and `completion` (or `output`), such as '
    '{"prompt": "2+2=", "completion": "4"}'
)
SHORTEST = 32  # tokens of a row; longer ones are of twice, four times ... as many, so that few lengths are compiled


@dataclasses.dataclass(frozen=True)
class Scored:
    """What is to be scored: a text alone, or the messages of a conversation that ends with an answer.

    `fields`: the whole record. `origin`: its file and line, for people.
    """

    content: str | list[dict[str, Any]]
    origin: str
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class Scorer:
    """Scores texts with a reward network, whose weights are once on the devices of a mesh."""

    def __init__(self, loaded: Weights, mesh: jax.sharding.Mesh, batch_size: int) -> None:
        """Puts the weights on the devices.

        Args:
            loaded: the reward network.
            mesh: the devices that share the rows.
            batch_size: texts at a time; it is rounded up to what the devices share evenly.

        Raises CheckpointError for a network without a head of size 1; UsageError as `encoders.of_weights`.
        """
        if loaded.model.num_outputs != 1:
            raise CheckpointError(f'{loaded.where} gives no reward: its task is not reward (config.task.name=reward)')
        self.where, self._window = loaded.where, loaded.max_length
        self._encoder = encoders.of_weights(loaded)
        self._template = prompting.open_template(
            prompting.AUTO, loaded.config, self._encoder.tokenizer, loaded.template
        )
        parts = meshes.row_parts(mesh)
        self._batch_size, self._rows = -(-batch_size // parts) * parts, meshes.batch_sharding(mesh)
        self._params = meshes.params_to_devices(loaded.params, mesh)
        self._apply = jax.jit(
            functools.partial(_rewards, model=loaded.model.clone(stream_sharding=self._rows)),
            out_shardings=meshes.replicated(mesh),
        )
        self._warned = False

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the network."""
        return self._encoder.tokenizer

    @functools.cached_property
    def fingerprint(self) -> str:
        """What two reward networks have in common if and only if their weights are equal."""
        return frozen.fingerprint(checksums.describe(self._params))

    def score(self, texts: Sequence[Scored]) -> np.ndarray:
        """Returns the reward of each text, [n] float64.

        Of a text that is longer than the rows that the network was trained on the end is scored; the first time this
        is warned about, with the number of such texts.

        Raises:
            DataError: a conversation that the template cannot render, or no template is known, naming the text.
            NumericsError: a reward that is not finite, naming the text.
        """
        ids = [self._ids(text) for text in texts]
        cut = sum(len(one) > self._window for one in ids)
        if cut and not self._warned:
            self._warned = True
            console.say(
                f'mixln_jax: warning: {cut:,} of {len(ids):,} texts are longer than the {self._window} tokens that '
                f'{self.where} reads and lose their beginning',
                file=sys.stderr,
            )
        ids = [one[-self._window :] for one in ids]
        found = np.zeros(len(ids), np.float64)
        order = sorted(range(len(ids)), key=lambda number: -len(ids[number]))
        for first in range(0, len(order), self._batch_size):
            numbers = order[first : first + self._batch_size]
            found[numbers] = self._batch([ids[number] for number in numbers])
        for number in np.flatnonzero(~np.isfinite(found)).tolist():
            raise NumericsError(f'{self.where}: the reward of {texts[number].origin} is not finite')
        return found

    def answers(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> np.ndarray:
        """Returns the reward of each prompt with its completion; see `score`."""
        turn = lambda text: {'role': 'assistant', 'content': text}  # noqa: E731
        return self.score(
            [
                Scored([*prompt.messages, turn(text)], prompt.origin, prompt.fields)
                for prompt, text in zip(prompts, completions, strict=True)
            ]
        )

    def _ids(self, text: Scored) -> np.ndarray:
        """Returns the ids of a text, as those that the network was trained on end: with the token that ends it."""
        if isinstance(text.content, str):
            ids = self.tokenizer.encode(text.content)  # none of an empty text, whose end alone is read
            return np.array([*self._encoder.start, *ids, self.tokenizer.eos_id], np.int32)
        if self._template is None:
            raise DataError(f'{text.origin}: a conversation needs a template, and {self.where} names none')
        try:
            tools = records.tools(text.fields)
            ids = self._template.tokens(text.content, tools=tools)[0]
            if not len(self._template.prompt(text.content[:-1], tools)):  # as in data/pairs.py
                ids = np.append(np.int32(self.tokenizer.eos_id), ids)
            return ids
        except DataError as error:
            raise DataError(f'{text.origin}: {error}') from None

    def _batch(self, ids: Sequence[np.ndarray]) -> np.ndarray:
        """Returns the rewards of at most `batch_size` texts, of which the first is the longest."""
        length = SHORTEST
        while length < len(ids[0]):
            length *= 2
        rows = np.zeros((self._batch_size, min(length, max(self._window, len(ids[0])))), np.int32)
        last = np.zeros(self._batch_size, np.int32)
        for row, one in enumerate(ids):
            rows[row, : len(one)], last[row] = one, len(one) - 1
        rewards = self._apply(self._params, *meshes.to_devices((rows, last), self._rows))
        return np.asarray(jax.device_get(rewards), np.float64)[: len(ids)]


def _rewards(params: Any, ids: jax.Array, last: jax.Array, *, model: Network) -> jax.Array:
    """Returns the rewards [B] of ids [B, T], read at the positions `last` [B]: no token sees those after it."""
    outputs, _ = model.apply({'params': params}, ids)
    return jax.numpy.take_along_axis(outputs[..., 0], last[:, None], 1)[:, 0]


def open_reward(
    name: str, key: str, mesh: jax.sharding.Mesh, batch_size: int, tokenizer: Tokenizer
) -> tuple[Reward, str | None]:
    """Returns what scores completions, and the fingerprint of its weights; None: it is a function.

    Args:
        name: `module:function`, or the folder of a reward network, as `weights.load` takes it.
        key: the setting that names it, for messages.
        mesh, batch_size: see Scorer.
        tokenizer: of the completions.

    Raises UsageError or CheckpointError, naming the key: as `open_function` and `weights.load`; a network that gives no
    reward, or has another tokenizer.
    """
    if ':' in name and not pathlib.Path(name).expanduser().is_dir():
        return open_function(name, key), None
    try:
        scorer = Scorer(weights.load(name), mesh, batch_size)
        if scorer.tokenizer.fingerprint != tokenizer.fingerprint:
            ours, theirs = tokenizer.kind, scorer.tokenizer.kind
            way = '; an export never has the tokenizer of a run with config.data.tokenizer=bytes: name the run itself'
            raise UsageError(
                f'{scorer.where} has another tokenizer than the network that answers'
                + (way if 'bytes' in (ours, theirs) and ours != theirs else '')
            )
    except (UsageError, CheckpointError) as error:
        raise type(error)(f'{key}={name}: {error}') from None
    return scorer.answers, scorer.fingerprint


def read(path: str) -> list[Scored]:
    """Returns the texts of a file: of JSON lines or one JSON array, plain or compressed.

    Raises DataError, naming file and line, for a record that is no text; see KNOWN.
    """
    file = files.local(path, '--texts')
    if not file.is_file():
        raise DataError(f'--texts: there is no file {path}')
    return list(records.parsed([str(file)], _scored))


def _scored(record: Any, origin: str) -> Scored:
    if not isinstance(record, dict):
        raise DataError(f'{KNOWN}, not {records.type_name(record)}')
    for name in ('text', 'completion', 'output'):
        if name in record and not isinstance(record[name], str):
            raise DataError(f'{name} is {records.type_name(record[name])}, not a string')
    answer = record.get('completion', record.get('output'))
    if 'text' in record:
        return Scored(record['text'], origin, record)
    if answer is not None:
        turn = {'role': 'assistant', 'content': answer}
        return Scored([*records.question(record), turn], origin, record)
    if 'messages' not in record:
        raise DataError(KNOWN)
    messages = records.messages_of(record)
    if messages[-1]['role'] != 'assistant':
        raise DataError('messages does not end with what the assistant says')
    return Scored(messages, origin, record)


def summary(rewards: np.ndarray) -> dict[str, Any]:
    """Returns the number, mean and standard deviation of rewards [n]."""
    return {'texts': len(rewards), 'reward': float(rewards.mean()), 'reward_std': float(rewards.std())}
