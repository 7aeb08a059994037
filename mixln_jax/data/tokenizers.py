"""Text to token ids and back: sentencepiece models, Hugging Face tokenizer.json files, bytes."""

import contextlib
import functools
import hashlib
import json
import pathlib
import re
import urllib.parse
from typing import Any, Protocol

import numpy as np
import sentencepiece
import tokenizers
from google.protobuf.empty_pb2 import Empty
from google.protobuf.unknown_fields import UnknownFieldSet

from mixln_jax import config
from mixln_jax.data import download, tokenizer_json
from mixln_jax.data.tokenizer_json import ALPHABET
from mixln_jax.system import console, files, outputs
from mixln_jax.system.errors import DataError, UsageError, reading

T5 = 'gs://t5-data/vocabs/cc_all.32000/sentencepiece.model'
LONGEST = 10_000  # characters that are encoded at once: memory, and the time up to a limit, stay bounded
NOTHING = b'\xff'  # what a token spells that stands for no text, or for any word: no UTF-8 has it
BLANKS = bytes.maketrans(b'\t\n\r\x0b\x0c', b'     ')
COMMON = {
    'eos': ('</s>', '<|endoftext|>', '<|end_of_text|>', '<eos>', '<|im_end|>', '<|eot_id|>', '[EOS]', '[SEP]'),
    'bos': ('<s>', '<|begin_of_text|>', '<bos>', '<|startoftext|>', '[BOS]', '[CLS]'),
    'pad': ('<pad>', '<|pad|>', '<|padding|>', '[PAD]'),
}


class Tokenizer(Protocol):
    """What every kind of tokenizer offers. `kind` is the value of `config.data.tokenizer` that opens it.

    Equal `fingerprint`s (hex), equal ids for every text. All ids, the three special ones too, are in 0..vocab_size - 1;
    a vocabulary without a token for padding or for the beginning uses `eos_id` there. `where` names what it was opened
    from, for people. Pickles are the files it was made of.
    """

    kind: str
    where: str
    vocab_size: int
    pad_id: int
    bos_id: int
    eos_id: int

    @property
    def fingerprint(self) -> str: ...

    def encode(self, text: str, limit: int | None = None) -> np.ndarray:
        """The ids of a text, [n] int32, without specials, perhaps read-only; with `limit` the first `limit` of them.

        A text that spells a special token gets the ids of its letters. Texts of more than 10,000 characters are
        encoded in pieces that end before a space or a line end. That gives the ids of the text as a whole, unless there
        is none to cut at, or two ways to read a word are equally likely and the sum over a long text rounds otherwise.
        """

    def spans(self, text: str, limit: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """The ids that `encode` gives, and where in the text each of them ends, in bytes: [n] int64, never falling.

        Takes longer than `encode`. Where several ids stand for one character its bytes may all be the first's or the
        last's.
        """

    def decode(self, ids) -> str:
        """The text of ids [n]; specials are dropped, broken characters become U+FFFD."""

    def can_yield(self, i: int) -> bool:
        """Whether some text may have this id, or nobody can be sure; only special tokens can be no text at all."""

    def save(self, folder):
        """Writes the tokenizer into `folder`, which is made if need be, for `load`."""

    def export(self, folder) -> bool:
        """Writes it as transformers opens it, where that gives the same ids; returns whether (tokenizer_json.py)."""


class Bytes:
    """UTF-8 bytes as ids 0..255."""

    kind = where = 'bytes'
    vocab_size, pad_id, bos_id, eos_id = 259, 256, 257, 258

    @property
    def fingerprint(self) -> str:
        return hashlib.blake2b(json.dumps(self._description()).encode(), digest_size=16).hexdigest()

    def encode(self, text: str, limit: int | None = None) -> np.ndarray:
        return np.frombuffer(text[:limit].encode()[:limit], np.uint8).astype(np.int32)

    def spans(self, text: str, limit: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        ids = self.encode(text, limit)
        return ids, np.arange(1, len(ids) + 1)

    def can_yield(self, i: int) -> bool:
        return i < 256

    def decode(self, ids) -> str:
        ids = np.asarray(ids)
        return ids[ids < 256].astype(np.uint8).tobytes().decode(errors='replace')

    def save(self, folder):
        _save(self, folder, {'tokenizer.json': json.dumps(self._description(), indent=2).encode() + b'\n'})

    def export(self, folder):
        return tokenizer_json.write(self, folder)

    def _description(self):
        names = ('vocab_size', 'pad_id', 'bos_id', 'eos_id')
        return {'kind': 'bytes'} | {name: getattr(self, name) for name in names}


class _Learned:
    """What vocabularies learned from text share. `contents` are those of the `FILES`, `where` names them in errors."""

    kind: str
    FORM: str
    FILES: tuple[str, ...]
    vocab_size: int
    pad_id: int
    bos_id: int
    eos_id: int

    def _open(self) -> None:
        raise NotImplementedError

    def _ids(self, text: str) -> Any:
        raise NotImplementedError

    def __init__(self, contents: dict[str, bytes], where: str):
        self.contents, self.where = contents, where
        with reading(where, DataError, f'not {self.FORM}, or not whole'), console.quiet():
            self._open()
            self._find_cuts()
            for text in tokenizer_json.PROBES:  # what fails on any text fails here
                self._ids(text)

    def _find_cuts(self):
        # Most tokens begin with their space, so a text is cut before one. Where encoding puts a space before every text
        # (LLaMA's sentencepiece model), that fails the trial, and the space at the cut has to go.
        trials = {space: [*self._ids('one'), *self._ids(f'{space}two')] for space in ' \n'}
        cuts = ''.join(space for space, ids in trials.items() if ids == [*self._ids(f'one{space}two')])
        self._dropped = 0 if cuts else 1
        self._cut = re.compile(rf'.*\w(?=[{cuts or " "}])', re.DOTALL)

    def __reduce__(self):
        return type(self), (self.contents, self.where)

    @property
    def fingerprint(self) -> str:
        digest = hashlib.blake2b(self.kind.encode(), digest_size=16)
        for body in self.contents.values():
            digest.update(hashlib.blake2b(body).digest())
        return digest.hexdigest()

    def encode(self, text: str, limit: int | None = None) -> np.ndarray:
        with reading(self.where, DataError, 'cannot encode a text'):
            return self._encode(text, limit)

    def spans(self, text: str, limit: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        with reading(self.where, DataError, 'cannot encode a text'):
            return self._all_spans(text, limit)

    def _encode(self, text, limit):
        if len(text) <= LONGEST:
            return self._ids(text)[:limit]
        parts, count = [], 0
        for _, piece in self._pieces(text):
            parts.append(self._ids(piece))
            count += len(parts[-1])
            if limit is not None and count >= limit:
                break
        return np.concatenate(parts)[:limit]

    def _all_spans(self, text, limit):
        ids, ends, count, before, seen = [], [], 0, 0, 0
        for start, piece in self._pieces(text):
            before, seen = before + len(text[seen:start].encode()), start
            of_piece, inside = self._spans(piece)
            ids.append(of_piece)
            ends.append(before + inside)
            count += len(of_piece)
            if limit is not None and count >= limit:
                break
        return np.concatenate(ids)[:limit], np.concatenate(ends)[:limit]

    def _spans(self, text):
        """`spans` of a text that is encoded at once. Offsets take the libraries several times as long as ids, and are
        asked for only where the tokens spell neither the text nor what is left of it when every run of blanks is one,
        perhaps after a blank: after a normaliser that changed letters, or unknown words."""
        ids, body = self._ids(text), text.encode()
        spelled, ends = self._spell(ids)
        for same in (body, blanks := body.translate(BLANKS)):
            if (before := _blanks_before(spelled, same)) is not None:
                return ids, ends - before
        single = b' '.join(body.split())
        if single and (before := _blanks_before(spelled, single)) is not None:
            kept = np.frombuffer(blanks, np.uint8) != 32
            kept[1:] |= kept[:-1]  # the first blank of a run too
            return ids, np.append(np.flatnonzero(kept), len(body.rstrip()))[ends - before]
        return ids, np.maximum.accumulate(self._offsets(text))

    def _spell(self, ids):
        """The bytes that ids [n] spell, and where in them each of them ends [n]."""
        flat, starts, sizes = self._table
        ends = sizes[ids].cumsum(dtype=np.int32)
        at = np.repeat(starts[ids] - np.append(np.int32(0), ends[:-1]), sizes[ids])
        at += np.arange(len(at), dtype=np.int32)
        return flat[at].tobytes(), ends.astype(np.int64)

    @functools.cached_property
    def _table(self):
        """All surfaces end to end, where each begins, and their sizes: small, for it shares the caches with encoding,
        which a list of them would slow down by a fifth."""
        sizes = np.array([len(surface) for surface in self._surfaces], np.int32)
        return np.frombuffer(b''.join(self._surfaces), np.uint8), sizes.cumsum(dtype=np.int32) - sizes, sizes

    def save(self, folder):
        _save(self, folder, self.contents)

    def export(self, folder):
        return tokenizer_json.write(self, folder)

    def _pieces(self, text):
        """Pairs (character at which a piece starts, piece)."""
        start = 0
        while len(text) - start > LONGEST:
            found = self._cut.match(text, start, start + LONGEST)
            end = found.end() if found else start + LONGEST
            yield start, text[start:end]
            start = end + (self._dropped if found else 0)
        yield start, text[start:]

    def _set_specials(self, pad, bos, eos, missing):
        """Special ids; -1 is none."""
        if eos < 0:
            raise DataError(f'{self.where}: no token for the end of a document: {missing}')
        self.pad_id, self.bos_id, self.eos_id = (eos if number < 0 else number for number in (pad, bos, eos))
        if self.vocab_size > config.LARGEST_VOCABULARY:
            raise DataError(f'{self.where}: {self.vocab_size} ids, more than {config.LARGEST_VOCABULARY}')
        if not max(self.pad_id, self.bos_id, self.eos_id) < self.vocab_size:
            raise DataError(f'{self.where}: a special id is not below the vocabulary size {self.vocab_size}')


class SentencePiece(_Learned):
    """A sentencepiece model, as T5, LLaMA 2 and Gemma have."""

    kind = 'sentencepiece'
    FORM, FILES = 'a sentencepiece model', ('tokenizer.model',)

    def _open(self):
        model = self.contents['tokenizer.model']
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        # Pieces, trainer, normaliser, in this order: what is cut off between two pieces loads without a word.
        if not {field.field_number for field in UnknownFieldSet(Empty.FromString(model))} >= {1, 2, 3}:
            raise ValueError('cut short')
        self.vocab_size = self._processor.vocab_size()
        pad, bos, eos = self._processor.pad_id(), self._processor.bos_id(), self._processor.eos_id()
        self._set_specials(pad, bos, eos, missing='the model has no eos piece')

    @functools.cached_property
    def _surfaces(self) -> list[bytes]:
        """The bytes of text that each id spells."""
        return [self._bytes(i) for i in range(self.vocab_size)]

    def decode(self, ids) -> str:
        ids = np.asarray(ids)
        return self._processor.decode(ids[ids < self.vocab_size].tolist())

    def can_yield(self, i: int) -> bool:
        return not (self._processor.is_control(i) or self._processor.is_unused(i))

    def _offsets(self, text):
        found = self._processor.encode(text, return_type='offset_mapping', return_bytes=True)
        return np.array([end for _, end in found['offsets']], np.int64)

    def _ids(self, text):
        return self._processor.encode(text, return_type='numpy')

    def _bytes(self, i):
        piece = self._processor.id_to_piece(i)
        if self._processor.is_unknown(i) or not self.can_yield(i):
            return NOTHING
        return bytes([int(piece[1:-1], 16)]) if self._processor.is_byte(i) else piece.replace('▁', ' ').encode()


class HuggingFace(_Learned):
    """A tokenizer.json of the package `tokenizers`.

    The special tokens are those of a tokenizer_config.json next to it, else those with a common name. A file that cuts
    or pads what it encodes does neither here.
    """

    kind = 'huggingface'
    FORM, FILES = 'a tokenizer.json', ('tokenizer.json', 'tokenizer_config.json')

    def _open(self):
        tokenizer = self._tokenizer = tokenizers.Tokenizer.from_buffer(self.contents['tokenizer.json'])
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True  # as ordinary text
        if isinstance(tokenizer.model, tokenizers.models.BPE):
            tokenizer.model.dropout = None  # equal texts, equal ids
        self.vocab_size = max(tokenizer.get_vocab().values(), default=-1) + 1
        names = self._names()
        ids = (tokenizer.token_to_id(names[role]) if role in names else -1 for role in ('pad', 'bos', 'eos'))
        common = ' '.join(COMMON['eos'])
        self._set_specials(*ids, f'none in a tokenizer_config.json next to it, none of {common} in the vocabulary')
        names = {'pad': names['eos'], 'bos': names['eos']} | names
        settings = {f'{role}_token': name for role, name in sorted(names.items())}
        self.contents = self.contents | {'tokenizer_config.json': json.dumps(settings, indent=2).encode() + b'\n'}
        tokenizer.add_special_tokens(list(names.values()))  # they may stand in the file as ordinary tokens
        self._guard()
        if self.eos_id in self._ids(eos := names['eos']):
            raise DataError(f'{self.where}: a text that spells {eos!r} cannot be told from the end of a document')

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

    def _bare(self, token):
        """A token without the marks that say where in a word it stands."""
        prefix, suffix = (
            self._spec['model'].get(key) or '' for key in ('continuing_subword_prefix', 'end_of_word_suffix')
        )
        return token.removeprefix(prefix).removesuffix(suffix)

    def decode(self, ids) -> str:
        kept = [i for i in np.asarray(ids).tolist() if i not in self._specials]
        return self._tokenizer.decode(kept, skip_special_tokens=False)

    def can_yield(self, i: int) -> bool:
        token = self._tokenizer.get_added_tokens_decoder().get(i)
        if token is None or not token.special or i == self._unknown:
            return self._tokenizer.id_to_token(i) is not None
        if (name := token.content) not in self._own:
            return False
        if len(name) == 1 or self._bare(name) != name or name[0] in '▁Ġ':  # a piece of words, which `_guard` leaves
            return True
        return any(i in self._ids(text) for text in (name, f'a{name}a'))

    @functools.cached_property
    def _own(self):
        """The tokens of the model itself: one that was only added is never made of text."""
        vocabulary = self._spec['model']['vocab']
        return {*vocabulary} if isinstance(vocabulary, dict) else {token for token, _ in vocabulary}

    @functools.cached_property
    def _spec(self):
        return json.loads(self.contents['tokenizer.json'])

    @functools.cached_property
    def _unknown(self):
        """The id of words that the vocabulary does not know, or None."""
        model = self._spec['model']
        if model.get('unk_token') is not None:
            return self._tokenizer.token_to_id(model['unk_token'])
        return model.get('unk_id')  # of Unigram; the others name the token

    @functools.cached_property
    def _specials(self):
        """Ids that are no text: special tokens, but for those that ordinary text yields too."""
        added = self._tokenizer.get_added_tokens_decoder()
        return {i for i, token in added.items() if token.special and (i == self._unknown or not self.can_yield(i))}

    def _offsets(self, text):
        [encoding] = self._tokenizer.encode_batch([text], add_special_tokens=False)
        points = np.frombuffer(text.encode('utf-32-le'), '<u4')  # offsets count characters
        sizes = 1 + (points > 0x7F).astype(np.int64) + (points > 0x7FF) + (points > 0xFFFF)
        ends = np.concatenate([[0], np.cumsum(sizes)])[[end for _, end in encoding.offsets]]
        if len(ends) and self._surfaces[encoding.ids[0]] == b' ' and not text[0].isspace():
            ends[0] = 0  # a blank that encoding has put there; the library counts the first letter as its own
        return ends

    def _ids(self, text):
        # The batch of one is a fifth faster than `encode`: it does not look for where in the text each token stands.
        [encoding] = self._tokenizer.encode_batch_fast([text], add_special_tokens=False)
        return np.array(encoding.ids, np.int32)

    def _names(self):
        """The special tokens by role."""
        with reading(self.where, DataError, 'the tokenizer_config.json next to it is not a JSON object'):
            settings = json.loads(self.contents['tokenizer_config.json'])
            names = {role: settings.get(f'{role}_token') for role in COMMON}
        for role, name in names.items():
            name = name.get('content') if isinstance(name, dict) else name
            if name is None:
                name = next((name for name in COMMON[role] if self._tokenizer.token_to_id(name) is not None), None)
            elif not isinstance(name, str) or self._tokenizer.token_to_id(name) is None:
                named = f'the tokenizer_config.json next to it names {role}_token {name!r}'
                raise DataError(f'{self.where}: {named}, which the vocabulary lacks')
            names[role] = name
        return {role: name for role, name in names.items() if name is not None}

    def _guard(self):
        """Cuts up in texts what the model, as T5's does, would read as a special token that is in its vocabulary."""
        added = self._tokenizer.get_added_tokens_decoder()
        tokens = [token.content for i, token in added.items() if token.special and i in self._ids(token.content)]
        pattern = '|'.join(f'{re.escape(token[0])}(?={re.escape(token[1:])})' for token in tokens if token[1:])
        if not pattern:
            return
        cut = tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), 'merged_with_previous')
        before = [self._tokenizer.pre_tokenizer] if self._tokenizer.pre_tokenizer else []
        self._tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([*before, cut])


KINDS: dict[str, type[SentencePiece] | type[HuggingFace]] = {kind.kind: kind for kind in (SentencePiece, HuggingFace)}


def _blanks_before(spelled, text):
    """1 where `spelled` is a text after a blank, 0 where it is the text, else None."""
    before = len(spelled) - len(text)
    return before if before in (0, 1) and spelled.endswith(text) and not spelled[:before].strip(b' ') else None


def open_tokenizer(data: config.Data) -> Tokenizer:
    """The tokenizer of `data.tokenizer` and `data.tokenizer_path`.

    What a URL (https, gs; http where it says so) names is fetched once into $XDG_CACHE_HOME/mixln_jax/tokenizers (or
    ~/.cache/...).

    Raises UsageError for a huggingface tokenizer without a path; DataError, naming file or URL, for what is missing,
    cannot be fetched or is not a whole tokenizer with a token for the end of a document.
    """
    if data.tokenizer == 'bytes':
        return Bytes()
    if data.tokenizer == 'huggingface' and not data.tokenizer_path:
        raise UsageError('config.data.tokenizer_path is empty; data.tokenizer=huggingface needs a tokenizer.json')
    kind, source = KINDS[data.tokenizer], data.tokenizer_path or T5
    if source.startswith('gs://'):
        source = f'https://storage.googleapis.com/{urllib.parse.quote(source.removeprefix("gs://"))}'
    if source.startswith(('http://', 'https://')):
        return _fetch(kind, source)
    path = files.local(source, 'config.data.tokenizer_path')
    first, *beside = kind.FILES
    try:
        contents = {first: files.read(path, DataError)}
    except FileNotFoundError as error:
        raise DataError(f'config.data.tokenizer_path: there is no file {path}') from error
    for name in beside:
        try:
            contents[name] = files.read(path.with_name(name), DataError)
        except FileNotFoundError:
            contents[name] = b'{}'
    return kind(contents, str(path))


def check_fits(tokenizer: Tokenizer, vocab_size: int, limit: str):
    """Raises UsageError, naming the tokenizer's file, where rows of its text may have ids beyond `vocab_size`, which
    `limit` names. Other ids beyond it, of special tokens that nothing uses, do no harm."""
    used = {tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id}
    beyond = (i for i in range(vocab_size, tokenizer.vocab_size) if i in used or tokenizer.can_yield(i))
    with reading(tokenizer.where, DataError):
        i = next(beyond, None)
    if i is not None:
        raise UsageError(
            f'the tokenizer {tokenizer.where} has {tokenizer.vocab_size} ids, more than {limit}: rows may have id {i}'
        )


def load(folder: str | pathlib.Path, fingerprint: str | None = None) -> Tokenizer:
    """The tokenizer that `save(folder)` wrote. Raises DataError, naming the folder, where that is not there, whole, or
    has another fingerprint than weights were trained with; None: nothing says which."""
    folder = pathlib.Path(folder)
    with reading(folder, DataError, 'no tokenizer is saved here, or not whole'):
        saved = files.read_json(folder / 'fingerprint.json', DataError)
        kind = KINDS.get(saved['kind'])
        contents = {name: files.read(folder / name, DataError) for name in kind.FILES} if kind else {}
    tokenizer = kind(contents, str(folder)) if kind else Bytes()
    if saved != _summary(tokenizer):
        raise DataError(f'{folder}: the saved tokenizer is damaged: its content has another fingerprint')
    if fingerprint not in (None, tokenizer.fingerprint):
        raise DataError(f'{folder} is not the tokenizer that the weights were trained with: put that one back')
    return tokenizer


def _save(tokenizer, folder, contents):
    for name, body in contents.items():
        outputs.write(pathlib.Path(folder, name), body)
    # Last, so that what a kill leaves behind has no fingerprint or not the right one.
    outputs.write(pathlib.Path(folder, 'fingerprint.json'), json.dumps(_summary(tokenizer)).encode() + b'\n')


def _summary(tokenizer):
    return {'kind': tokenizer.kind, 'fingerprint': tokenizer.fingerprint}


def _fetch(kind, url):
    """The tokenizer at a URL. Only what has been opened goes into the cache, so a login page sent for it never does."""
    digest = hashlib.blake2b(f'{kind.kind} {url}'.encode(), digest_size=16).hexdigest()
    cache = files.cache_folder() / 'tokenizers' / digest
    with contextlib.suppress(DataError):  # absent or damaged: fetched anew
        return load(cache)
    if url.startswith('http:'):
        console.say(f'mixln_jax: warning: {url} is not https: what comes may have been changed on the way')
    first, *beside = kind.FILES
    contents = {first: download.fetch(url)}
    contents |= {name: download.fetch(urllib.parse.urljoin(url, name), absent=b'{}') for name in beside}
    tokenizer = kind(contents, url)
    with contextlib.suppress(OSError):  # a home that cannot be written to: it is fetched again
        tokenizer.save(cache)
    return tokenizer
