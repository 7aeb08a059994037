"""The folder of a saved tokenizer: its files, and fingerprint.json, which shows that they are whole."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from mixln_jax.system import outputs

FINGERPRINT = 'fingerprint.json'


def write(tokenizer: Any, folder: str | pathlib.Path, contents: Mapping[str, bytes]) -> None:
    """Writes a tokenizer's files, {name: content}, and its fingerprint into a folder, which is created if missing."""
    for name, body in contents.items():
        outputs.write(pathlib.Path(folder, name), body)
    # Last, so that a killed process leaves no fingerprint, or one that does not match.
    outputs.write(pathlib.Path(folder, FINGERPRINT), json.dumps(summary(tokenizer)).encode() + b'\n')


def summary(tokenizer: Any) -> dict[str, str]:
    """Returns the content of fingerprint.json."""
    return {'kind': tokenizer.kind, 'fingerprint': tokenizer.fingerprint}
