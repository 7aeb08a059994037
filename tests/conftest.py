"""Eight virtual CPU devices for every test; a cache folder of the tests' own."""

import os

os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['JAX_NUM_CPU_DEVICES'] = '8'
os.environ['JAX_DISABLE_MOST_OPTIMIZATIONS'] = '1'  # compiling is most of the tests' time

import jax
import pytest


@pytest.fixture(scope='session', autouse=True)
def caches(tmp_path_factory, worker_id):
    """All test processes share what is compiled and the embedded corpus, and never touch the user's cache."""
    base = tmp_path_factory.getbasetemp()
    cache = (base if worker_id == 'master' else base.parent) / 'cache'
    os.environ['XDG_CACHE_HOME'] = str(cache)
    os.environ['JAX_COMPILATION_CACHE_DIR'] = str(cache / 'xla')  # for processes that tests start
    os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0.1'
    jax.config.update('jax_compilation_cache_dir', str(cache / 'xla'))
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.1)
