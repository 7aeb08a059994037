"""How texts become token ids for some weights: their tokenizer, and what begins and ends a text."""

import dataclasses
import pathlib

import tokenizers as library

from mixln_jax import config as configs
from mixln_jax.data import tokenizers
from mixln_jax.runs.weights import Weights
from mixln_jax.system import files
from mixln_jax.system.errors import CheckpointError, UsageError


def open_tokenizer(folder: pathlib.Path) -> tuple[tokenizers.Tokenizer, list[int]]:
    """Returns the tokenizer of a Hugging Face folder, and the ids that begin a text: one or none.

    A tokenizer.json says itself whether it puts a bos before a text; a tokenizer.model is LLaMA's, which does.

    Raises UsageError where there is neither, DataError for one that is unreadable.
    """
    for kind in ('huggingface', 'sentencepiece'):
        path = folder / tokenizers.KINDS[kind].FILES[0]
        if path.is_file():
            tokenizer = tokenizers.open_tokenizer(configs.Data(tokenizer=kind, tokenizer_path=str(path)))
            if kind == 'sentencepiece':
                puts_bos = tokenizer.bos_id != tokenizer.eos_id
            else:
                puts_bos = library.Tokenizer.from_file(str(path)).encode('a').ids[0] == tokenizer.bos_id
            return tokenizer, [tokenizer.bos_id] if puts_bos else []
    raise UsageError(f'{folder} holds no tokenizer (tokenizer.json or tokenizer.model)')


@dataclasses.dataclass(frozen=True)
class TextEncoder:
    """How texts become rows of tokens for some weights.

    Attributes:
        tokenizer: of the weights.
        start: ids that begin a text, none or one.
        empty: the id that stands in place of an empty row.
        end_ids: ids that end a text.
    """

    tokenizer: tokenizers.Tokenizer
    start: list[int]
    empty: int
    end_ids: tuple[int, ...]

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text, at least one."""
        return [*self.start, *self.tokenizer.encode(text).tolist()] or [self.empty]


def of_run(config: configs.Config, tokenizer: tokenizers.Tokenizer) -> TextEncoder:
    """Returns the TextEncoder of a run: a text begins as a document does in the rows, after an eos in mode concat,
    otherwise with its own first token."""
    eos = tokenizer.eos_id
    return TextEncoder(tokenizer, [eos] if config.data.mode == 'concat' else [], eos, (eos,))


def of_weights(loaded: Weights) -> TextEncoder:
    """Returns the TextEncoder of weights. In a Hugging Face folder a text begins with one bos if its tokenizer adds it,
    and ends with an eos of the tokenizer or of generation_config.json.

    Raises:
        UsageError: a folder without tokenizer, or with one that has more ids than the network.
        DataError: the tokenizer cannot be read.
    """
    if loaded.config and loaded.tokenizer:
        encoder = of_run(loaded.config, loaded.tokenizer)
    else:
        tokenizer, start = open_tokenizer(pathlib.Path(loaded.where))
        ends = (tokenizer.eos_id, *_generation_ends(pathlib.Path(loaded.where)))
        encoder = TextEncoder(tokenizer, start, tokenizer.bos_id, tuple(dict.fromkeys(ends)))
    vocab_size = loaded.model.config.vocab_size
    tokenizers.check_fits(encoder.tokenizer, vocab_size, f'the {vocab_size} of the network {loaded.where}')
    return encoder


def _generation_ends(folder: pathlib.Path) -> list[int]:
    """Returns the end tokens that a folder's generation_config.json names, which may be more than the tokenizer's."""
    path = folder / 'generation_config.json'
    if not path.exists():
        return []
    ends = files.read_json(path, CheckpointError).get('eos_token_id')
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if not all(type(end) is int and 0 <= end < 2**31 for end in ends):
        raise CheckpointError(f'{path}: eos_token_id={ends!r} is no id of a token')
    return ends
