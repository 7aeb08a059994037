"""Tokenizers that are Hugging Face tokenizer.json files."""

import functools
import json
import re
from typing import Any

import numpy as np
import tokenizers as library
from numpy.typing import ArrayLike

from mixln_jax.data.learned_tokenizer import NOTHING, Learned
from mixln_jax.data.tokenizer_json import ALPHABET
from mixln_jax.system.errors import DataError, reading

COMMON = {
    'eos': ('</s>', '<|endoftext|>', '<|end_of_text|>', '<eos>', '<|im_end|>', '<|eot_id|>', '[EOS]', '[SEP]'),
    'bos': ('<s>', '<|begin_of_text|>', '<bos>', '<|startoftext|>', '[BOS]', '[CLS]'),
    'pad': ('<pad>', '<|pad|>', '<|padding|>', '[PAD]'),
}


class HuggingFace(Learned):
    """A tokenizer.json of the package `tokenizers`.

    The special tokens are named in a tokenizer_config.json next to the file, else found by their common names.
    Truncation and padding that the file asks for are ignored.
    """

    kind = 'huggingface'
    FORM, FILES, EXTRA = 'a tokenizer.json', ('tokenizer.json', 'tokenizer_config.json'), ('chat_template.jinja',)

    def _open(self) -> None:
        tokenizer = self._tokenizer = library.Tokenizer.from_buffer(self.contents['tokenizer.json'])
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True  # a special token in a text is ordinary text
        if isinstance(tokenizer.model, library.models.BPE):
            tokenizer.model.dropout = None  # equal texts have to give equal ids
        self.vocab_size = max(tokenizer.get_vocab().values(), default=-1) + 1
        if template := self._template():
            self.contents = self.contents | {'chat_template.jinja': template.encode()}
        self.chat_template, names = template, self._names()
        self.special_names = {f'{role}_token': name for role, name in names.items()}
        pad, bos, eos = (tokenizer.token_to_id(names[role]) if role in names else -1 for role in ('pad', 'bos', 'eos'))
        common = ' '.join(COMMON['eos'])
        missing = f'none in a tokenizer_config.json next to it, none of {common} in the vocabulary'
        self._set_specials(pad, bos, eos, missing)
        names = {'pad': names['eos'], 'bos': names['eos']} | names
        settings = {f'{role}_token': name for role, name in sorted(names.items())}
        self.contents = self.contents | {'tokenizer_config.json': json.dumps(settings, indent=2).encode() + b'\n'}
        tokenizer.add_special_tokens(list(names.values()))  # the file may have them as ordinary tokens
        added = tokenizer.get_added_tokens_decoder().values()
        self.special_tokens = [token.content for token in added if token.special]
        self._guard()
        if self.eos_id in self._ids(end := names['eos']):
            raise DataError(f'{self.origin}: a text that spells {end!r} cannot be told from the end of a document')

    @functools.cached_property
    def _surfaces(self) -> list[bytes]:
        """The bytes of text that each id spells."""
        added = self._tokenizer.get_added_tokens_decoder()
        parts = [self._spec.get(part) for part in ('normalizer', 'pre_tokenizer', 'decoder')]
        byte_level = '"ByteLevel"' in json.dumps(parts)
        surfaces = [NOTHING] * self.vocab_size
        for token, i in self._tokenizer.get_vocab().items():
            if i in added:
                surfaces[i] = NOTHING if added[i].special else token.encode()
            elif re.fullmatch('<0x[0-9A-F]{2}>', token):
                surfaces[i] = bytes([int(token[1:-1], 16)])
            elif byte_level and ALPHABET.keys() >= {*token}:
                surfaces[i] = bytes(ALPHABET[letter] for letter in token)
            else:
                surfaces[i] = self._bare(token).replace('▁', ' ').encode()
        if self._unknown is not None:
            surfaces[self._unknown] = NOTHING
        return surfaces

    def _bare(self, token: str) -> str:
        """Returns a token without the marks of its place in a word."""
        prefix, suffix = (
            self._spec['model'].get(key) or '' for key in ('continuing_subword_prefix', 'end_of_word_suffix')
        )
        return token.removeprefix(prefix).removesuffix(suffix)

    def decode(self, ids: ArrayLike) -> str:
        kept = [i for i in np.asarray(ids).tolist() if i not in self._specials]
        return self._tokenizer.decode(kept, skip_special_tokens=False)

    def can_yield(self, i: int) -> bool:
        token = self._tokenizer.get_added_tokens_decoder().get(i)
        if token is None or not token.special or i == self._unknown:
            return self._tokenizer.id_to_token(i) is not None
        if (name := token.content) not in self._own:
            return False
        if len(name) == 1 or self._bare(name) != name or name[0] in '▁Ġ':  # part of a word; `_guard` does not split it
            return True
        return any(i in self._ids(text) for text in (name, f'a{name}a'))

    @functools.cached_property
    def _own(self) -> set[str]:
        """The tokens of the model itself. A token that was only added is never made of text."""
        vocabulary = self._spec['model']['vocab']
        return {*vocabulary} if isinstance(vocabulary, dict) else {token for token, _ in vocabulary}

    @functools.cached_property
    def _spec(self) -> dict[str, Any]:
        return json.loads(self.contents['tokenizer.json'])

    @functools.cached_property
    def _unknown(self) -> int | None:
        """The id of words that are not in the vocabulary, or None."""
        model = self._spec['model']
        if model.get('unk_token') is not None:
            return self._tokenizer.token_to_id(model['unk_token'])
        return model.get('unk_id')  # Unigram has the id; the other models name the token

    @functools.cached_property
    def _specials(self) -> set[int]:
        """Ids that are not text: special tokens, except those that ordinary text yields too."""
        added = self._tokenizer.get_added_tokens_decoder()
        return {i for i, token in added.items() if token.special and (i == self._unknown or not self.can_yield(i))}

    @functools.cached_property
    def _reading(self) -> library.Tokenizer:
        """The tokenizer that reads names of special tokens in a text as these tokens."""
        tokenizer = library.Tokenizer.from_str(self._tokenizer.to_str())
        tokenizer.encode_special_tokens = False
        return tokenizer

    def read_specials(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        with reading(self.origin, DataError, 'cannot encode a text'):
            [encoding] = self._reading.encode_batch([text], add_special_tokens=False)
            return np.array(encoding.ids, np.int32), np.maximum.accumulate(self._ends(encoding, text))

    def _offsets(self, text: str) -> np.ndarray:
        [encoding] = self._tokenizer.encode_batch([text], add_special_tokens=False)
        return self._ends(encoding, text)

    def _ends(self, encoding: library.Encoding, text: str) -> np.ndarray:
        """Returns the byte of the text at which each id ends, [n]."""
        points = np.frombuffer(text.encode('utf-32-le'), '<u4')  # offsets count characters
        sizes = 1 + (points > 0x7F).astype(np.int64) + (points > 0x7FF) + (points > 0xFFFF)
        ends = np.concatenate([[0], np.cumsum(sizes)])[[end for _, end in encoding.offsets]]
        if len(ends) and self._surfaces[encoding.ids[0]] == b' ' and not text[0].isspace():
            ends[0] = 0  # encoding has added this blank; the library counts the first letter as part of it
        return ends

    def _ids(self, text: str) -> np.ndarray:
        # A batch of one is a fifth faster than `encode`, because it does not compute offsets.
        [encoding] = self._tokenizer.encode_batch_fast([text], add_special_tokens=False)
        return np.array(encoding.ids, np.int32)

    def _settings(self) -> dict[str, Any]:
        """Returns the content of tokenizer_config.json. Raises DataError."""
        with reading(self.origin, DataError, 'the tokenizer_config.json next to it is not a JSON object'):
            return dict(json.loads(self.contents['tokenizer_config.json']).items())

    def _template(self) -> str:
        """Returns the chat template, of several the one named default; empty: there is none. Raises DataError."""
        if 'chat_template.jinja' in self.contents:
            with reading(self.origin, DataError, 'the chat_template.jinja next to it is not text'):
                return self.contents['chat_template.jinja'].decode()
        template = self._settings().get('chat_template') or ''
        with reading(self.origin, DataError, 'chat_template in the tokenizer_config.json next to it is not text'):
            if isinstance(template, list):
                template = {entry['name']: entry['template'] for entry in template}.get('default', '')
            template.encode()
        return template

    def _names(self) -> dict[str, str]:
        """Returns {role: special token}. Raises DataError."""
        settings = self._settings()
        names = {role: settings.get(f'{role}_token') for role in COMMON}
        for role, name in names.items():
            name = name.get('content') if isinstance(name, dict) else name
            if name is None:
                name = next((name for name in COMMON[role] if self._tokenizer.token_to_id(name) is not None), None)
            elif not isinstance(name, str) or self._tokenizer.token_to_id(name) is None:
                named = f'the tokenizer_config.json next to it names {role}_token {name!r}'
                raise DataError(f'{self.origin}: {named}, which the vocabulary lacks')
            names[role] = name
        return {role: name for role, name in names.items() if name is not None}

    def _guard(self) -> None:
        """Makes the tokenizer split the names of special tokens in texts if the model itself (T5's, for example) would
        read them as these tokens."""
        added = self._tokenizer.get_added_tokens_decoder()
        tokens = [token.content for i, token in added.items() if token.special and i in self._ids(token.content)]
        pattern = '|'.join(f'{re.escape(token[0])}(?={re.escape(token[1:])})' for token in tokens if token[1:])
        if not pattern:
            return
        cut = library.pre_tokenizers.Split(library.Regex(pattern), 'merged_with_previous')
        before = [self._tokenizer.pre_tokenizer] if self._tokenizer.pre_tokenizer else []
        self._tokenizer.pre_tokenizer = library.pre_tokenizers.Sequence([*before, cut])
