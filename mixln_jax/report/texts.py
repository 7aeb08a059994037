"""Texts about several runs: their names, and in what their texts differ."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mixln_jax.report.inputs import Run

# The names of the parts of a text's description, for people.
PARTS = {
    'source': 'the documents',
    'mode': 'how rows are made',
    'seq_length': 'the length of rows',
    'amount': 'the number of tokens to evaluate on',
}


def listed(runs: Iterable[Run]) -> str:
    """Returns the names of runs, separated by commas."""
    return ', '.join(run.name for run in runs)


def differing(texts: Iterable[Mapping[str, Any] | None]) -> list[str]:
    """Returns the parts, such as the tokenizer, in which descriptions of texts differ; None is an unknown text."""
    known = [text or {} for text in texts]
    names = dict.fromkeys(name for text in known for name in text)
    return [name for name in names if len({f'{text.get(name)}' for text in known}) > 1]


def differences(names: Sequence[str], texts: Sequence[Mapping[str, Any] | None]) -> str:
    """Returns a phrase that tells in which parts texts differ, and whose; empty if they do not differ."""
    phrases = []
    for part in differing(texts):
        sides: dict[str, list[str]] = {}
        for name, text in zip(names, texts, strict=True):
            sides.setdefault(f'{(text or {}).get(part, "unknown")}', []).append(name)
        owners: list[str] = []
        for value, side in sorted(sides.items(), key=lambda pair: len(pair[1])):
            readable = f'{value}: ' if len(value) <= 12 else ''  # not a digest
            many = len(side) > 3 and len(owners) == len(sides) - 1
            owners.append(readable + ('all others' if many else ', '.join(side)))
        phrases.append(f'{PARTS.get(part, f"the {part}")} ({"; ".join(owners)})')
    return ', '.join(phrases[:-1]) + ' and ' * (len(phrases) > 1) + ''.join(phrases[-1:])
