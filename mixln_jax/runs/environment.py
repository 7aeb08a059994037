"""Where and with what a run runs: command, commit, versions, devices."""

import importlib.metadata
import itertools
import os
import pathlib
import platform
import subprocess
import sys

GIT_REPOSITORY = 'GIT_DIR', 'GIT_COMMON_DIR', 'GIT_OBJECT_DIRECTORY', 'GIT_WORK_TREE', 'GIT_INDEX_FILE', 'GIT_PREFIX'
PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'grain', 'ml_collections', 'numpy')


def versions():
    """Versions of Python and of the packages that training rests on."""
    return {'python': platform.python_version()} | {name: importlib.metadata.version(name) for name in PACKAGES}


def _without_secret(before, word):
    """A word of the command, after another one, to be written: processes.secret has its value in one or the other."""
    key = '--config.processes.secret'
    return '...' if before == key else f'{key}=...' if word.startswith(f'{key}=') else word


def environment(devices):
    """Where and with what a run runs: command, commit, versions, devices."""
    return {
        'command': [_without_secret(*words) for words in itertools.pairwise(['', *sys.argv])],
        'commit': _commit(),
        'versions': versions(),
        'devices': {'kind': devices[0].device_kind, 'platform': devices[0].platform, 'count': len(devices)},
        'host': {'name': platform.node(), 'system': platform.platform(), 'cpus': os.cpu_count()},
        'xla_flags': os.environ.get('XLA_FLAGS', ''),
    }


def _commit():
    """The commit of this code, '-dirty' after it where files differ; None where no repository tracks it, such as that
    of a project in which it is installed."""

    def git(*words):
        # In a hook these say which repository the hook is of.
        environment = {name: os.environ[name] for name in os.environ if name not in GIT_REPOSITORY}
        folder = pathlib.Path(__file__).resolve().parent
        done = subprocess.run(['git', *words], cwd=folder, env=environment, capture_output=True, check=True)
        return done.stdout.decode().strip()

    try:
        git('ls-files', '--error-unmatch', pathlib.Path(__file__).name)
        return git('describe', '--always', '--dirty', '--abbrev=40', '--exclude=*')
    except (OSError, subprocess.CalledProcessError):
        return None
