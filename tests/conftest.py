"""Eight virtual CPU devices for every test; a cache folder of the tests' own; fixtures of several files."""

import copy
import dataclasses
import gc
import os
import pathlib
import resource

os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['JAX_NUM_CPU_DEVICES'] = '8'
os.environ['JAX_DISABLE_MOST_OPTIMIZATIONS'] = '1'  # compiling is most of the tests' time

import jax
import pytest

MOST_MAPS = 40_000

pytest.register_assert_rewrite('killed_runs')  # its assertions show what differs
if jax.__version_info__ < (0, 11, 1):  # half of what is left; later XLAs have no such flag, and abort
    os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} --xla_cpu_use_fusion_emitters=false'


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


@pytest.fixture(scope='session', autouse=True)
def programs():
    """Runs whose configurations compile to the same share what is traced and compiled, which is most of a small run's
    time. Returns what is shared: whoever clears it traces anew."""
    from mixln_jax import config as configs
    from mixln_jax.program import program
    from mixln_jax.training import run

    made, default = {}, configs.Config()
    elsewhere = ('seed', 'log_every', 'init_from', 'resume_from', 'eval', 'checkpoint', 'processes', 'analysis')
    default_values = {name: getattr(default, name) for name in (*elsewhere, 'profile', 'expected')}

    def shared(config, mesh):
        data = dataclasses.replace(default.data, mode=config.data.mode)
        key = repr(dataclasses.replace(config, data=data, **default_values)), mesh
        if key not in made:
            made[key] = program.Program(config, mesh)
        found = copy.copy(made[key])
        found.config = config
        return found

    run.Program = shared
    return made


@pytest.fixture(scope='module', autouse=True)
def room_for_programs(programs):
    """Forgets compiled programs before they fill what Linux maps for a process (65,530 pieces of memory by default):
    beyond that XLA ends in a segmentation fault, and all tests together come to more."""
    yield
    maps = pathlib.Path('/proc/self/maps')
    if maps.exists() and maps.read_bytes().count(b'\n') > MOST_MAPS:
        programs.clear()
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def opened(tmp_path):
    """Opens the tokenizer of one of vocabularies.KINDS, or bytes."""
    import vocabularies  # not for those that need no tokenizer

    return lambda name: vocabularies.open_named(name, tmp_path)


@pytest.fixture
def open_files():
    """Lets this process hold few files open; a call gives the limit there is now and lowers it again."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)

    def lower():
        now, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
        return now

    lower()
    yield lower
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
