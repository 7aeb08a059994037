"""The environment of a run: command, commit, versions, devices."""

import importlib.metadata
import itertools
import os
import pathlib
import platform
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import jax

GIT_REPOSITORY = 'GIT_DIR', 'GIT_COMMON_DIR', 'GIT_OBJECT_DIRECTORY', 'GIT_WORK_TREE', 'GIT_INDEX_FILE', 'GIT_PREFIX'
PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'grain', 'ml_collections', 'numpy')


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that training depends on."""
    return {'python': platform.python_version()} | {name: importlib.metadata.version(name) for name in PACKAGES}


def _without_secret(before: str, word: str) -> str:
    """Returns a word of the command, `before` being the one before it, with the value of processes.secret hidden."""
    key = '--config.processes.secret'
    return '...' if before == key else f'{key}=...' if word.startswith(f'{key}=') else word


def environment(devices: Sequence[jax.Device]) -> dict[str, Any]:
    """Returns the content of environment.json: command, commit, versions, devices and host."""
    return {
        'command': [_without_secret(*words) for words in itertools.pairwise(['', *sys.argv])],
        'commit': _commit(),
        'versions': versions(),
        'devices': {'kind': devices[0].device_kind, 'platform': devices[0].platform, 'count': len(devices)},
        'host': {'name': platform.node(), 'system': platform.platform(), 'cpus': os.cpu_count()},
        'xla_flags': os.environ.get('XLA_FLAGS', ''),
    }


def _commit() -> str | None:
    """Returns the commit of this code, followed by '-dirty' if files differ from it. Returns None if no repository
    tracks this code; the repository of a project that it is installed in does not."""

    def git(*words: str) -> str:
        # Inside a git hook these variables select the repository of the hook.
        environment = {name: os.environ[name] for name in os.environ if name not in GIT_REPOSITORY}
        folder = pathlib.Path(__file__).resolve().parent
        done = subprocess.run(['git', *words], cwd=folder, env=environment, capture_output=True, check=True)
        return done.stdout.decode().strip()

    try:
        git('ls-files', '--error-unmatch', pathlib.Path(__file__).name)
        return git('describe', '--always', '--dirty', '--abbrev=40', '--exclude=*')
    except (OSError, subprocess.CalledProcessError):
        return None
