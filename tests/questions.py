"""SQuAD in small: a context with a vocabulary for it, and the golden questions with what transformers makes of them."""

import json
import pathlib

from mixln_jax.data import squad

GOLDEN = pathlib.Path(__file__).parent / 'golden/squad'
WORDS = ('a', 'the', 'who', 'ran', 'red', 'cat', 'dog', 'sat', 'on', 'mat', 'then', 'slept', '.', ',', 'big')
VOCABULARY = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', *WORDS, '##s']
CONTEXT = 'The big cat, a red cat,\nsat on the mat.  Then the dog ran.'


def write_json(path, content):
    """Writes `content` as JSON; returns the path."""
    path.write_text(json.dumps(content))
    return path


def write_vocabulary(folder):
    """Writes a vocabulary as older folders have it; returns the folder."""
    (folder / 'vocab.txt').write_text('\n'.join(VOCABULARY) + '\n')
    write_json(folder / 'tokenizer_config.json', {'do_lower_case': True})
    return folder


def golden_features(version):
    """Returns (examples, features, what transformers makes of them)."""
    expected = json.loads((GOLDEN / 'expected.json').read_text())
    examples = squad.read(GOLDEN / f'{version}.json')
    sizes = [expected[name] for name in ('max_length', 'stride', 'max_query')]
    return examples, squad.make_features(examples, squad.open_tokenizer(GOLDEN), *sizes), expected[version]
