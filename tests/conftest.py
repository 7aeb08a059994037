"""Eight virtual CPU devices for every test; a cache folder of the tests' own."""

import os

os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['JAX_NUM_CPU_DEVICES'] = '8'
os.environ['JAX_DISABLE_MOST_OPTIMIZATIONS'] = '1'  # compiling is most of the tests' time

import pytest


@pytest.fixture(scope='session', autouse=True)
def cache_home(tmp_path_factory, worker_id):
    """The embedded corpus is gathered once for all test processes, never into the user's cache."""
    base = tmp_path_factory.getbasetemp()
    os.environ['XDG_CACHE_HOME'] = str((base if worker_id == 'master' else base.parent) / 'cache')
