"""Meshes: sizes, the rules, and that sharing the work changes no number."""

import contextlib
import ctypes
import dataclasses
import importlib.metadata
import importlib.util
import math
import os
import pathlib
import platform
import subprocess
import sys
import types

import jax
import numpy as np
import pytest

from mixln_jax import config as configs
from mixln_jax import trees
from mixln_jax.data.batches import marks as batch_marks
from mixln_jax.distributed import mesh as meshes
from mixln_jax.plan import hlo
from mixln_jax.program.program import Program
from mixln_jax.runs import checkpoint
from mixln_jax.system.errors import CheckpointError, UsageError
from mixln_jax.training import run as training

ROOT = pathlib.Path(__file__).parents[2]
SHAPES = [(8, 1, 1), (2, 4, 1), (2, 2, 2), (1, 1, 8)]
MODEL = configs.Model(
    vocab_size=101,
    hidden_size=32,
    intermediate_size=48,
    num_layers=4,
    num_heads=8,
    norm_position='mix',
    scan_unroll='1',
)
BIASED = dict(tie_word_embeddings=True, attention_bias=True, mlp_bias=True)
CONFIG = configs.Config(
    batch_size=16,
    seq_length=12,
    num_steps=20,
    accumulate=2,
    compute_dtype='float32',
    device='cpu',
    model=MODEL,
    optim=configs.Optim(learning_rate=3e-3, clip_norm=1.0),
)


def on(*shape):
    return meshes.make_mesh(configs.Mesh(*shape), jax.devices('cpu'))


def program(shape, config=CONFIG, **model):
    return Program(dataclasses.replace(config, model=dataclasses.replace(config.model, **model)), on(*shape))


def batches(config):
    """Text with something to learn, and padding."""
    rng = np.random.default_rng(0)
    for _ in range(config.num_steps):
        start, by = rng.integers(0, 100, (config.batch_size, 1)), rng.integers(1, 4, (config.batch_size, 1))
        tokens = (start + by * np.arange(config.seq_length + 1)) % config.model.vocab_size
        weights = np.arange(config.seq_length) < rng.integers(1, config.seq_length + 1, (config.batch_size, 1))
        marks = batch_marks(np.arange(config.batch_size), np.ones(config.batch_size, bool))
        yield marks | {
            'inputs': tokens[:, :-1].astype(np.int32),
            'targets': tokens[:, 1:].astype(np.int32),
            'loss_mask': weights.astype(np.float32),
        }


def run(built):
    """The losses and gradient norms of every step, and the last evaluation."""
    rows, seen = meshes.batch_sharding(built.mesh), []
    train_step, eval_step = built.compile()
    state = built.init(jax.random.key(0))
    for batch in batches(built.config):
        state, metrics = train_step(state, jax.device_put(batch, rows))
        seen.append([float(metrics['loss']), *np.asarray(metrics['layer_grad_norm'])])
    micro = {name: values[: len(values) // built.config.accumulate] for name, values in batch.items()}
    sums = eval_step(state.params, jax.device_put(micro, rows), None)
    return np.array(seen), float(sums['sum'] / sums['weight'])


def compare_first_weights():
    expected = program((1, 1, 1)).init(jax.random.key(3))
    for shape in SHAPES:
        made = program(shape).init(jax.random.key(3))
        for (name, one), other in zip(trees.named_leaves(expected), jax.tree.leaves(made), strict=True):
            np.testing.assert_array_equal(one, other, err_msg=f'{shape} {name}')


class TestNumbers:
    @pytest.mark.parametrize(
        'placement, shapes, kind',
        [
            ('mix', SHAPES[2:], {}),
            pytest.param('mix', SHAPES[:2], {}, marks=pytest.mark.slow),
            pytest.param('sandwich', [(2, 2, 2)], {}, marks=pytest.mark.slow),
            pytest.param('mix', [(2, 2, 2)], dict(BIASED, head_dim=6), marks=pytest.mark.slow),
        ],
    )
    def test_of_every_mesh_are_those_of_one_device(self, placement, shapes, kind):
        expected, evaluated = run(program((1, 1, 1), norm_position=placement, **kind))
        assert expected[-1, 0] < 0.95 * expected[0, 0]  # it learns
        for shape in shapes:
            seen, last = run(program(shape, norm_position=placement, **kind))
            np.testing.assert_allclose(seen[:, 0], expected[:, 0], rtol=1e-5, err_msg=str(shape))
            np.testing.assert_allclose(seen[:, 1:], expected[:, 1:], rtol=1e-4, err_msg=str(shape))
            np.testing.assert_allclose(last, evaluated, rtol=1e-5)

    @pytest.mark.slow  # with all of the compiler's optimisations
    def test_of_the_first_weights_do_not_depend_on_the_mesh(self):
        """As users' compiler makes them; the flag of conftest.py that saves time costs here and there the last bit."""
        paths = ':'.join(map(str, pathlib.Path(__file__).parents[:3]))  # this folder, the helpers, the package
        settings = os.environ | {'XLA_FLAGS': '', 'PYTHONPATH': paths}
        call = 'import test_mesh; test_mesh.compare_first_weights()'
        subprocess.run([sys.executable, '-c', call], env=settings, check=True)


class TestHeap:
    FAULTS = """
import resource, numpy as np
from mixln_jax.distributed import mesh
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(2**24, np.float32)  # 64 MB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults(), print(faults()), mesh.keep_heap('cpu'), faults(), print(faults())"""

    @pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='needs glibc')
    def test_freed_memory_is_used_again(self):
        given = {name: value for name, value in os.environ.items() if not name.startswith(('MALLOC_', 'GLIBC_'))}
        words = [sys.executable, '-c', self.FAULTS]
        ended = subprocess.run(words, env=given, cwd=ROOT, check=True, capture_output=True, text=True)
        before, kept = map(int, ended.stdout.split())
        assert before >= 20 > kept

    @pytest.mark.parametrize(
        'libc, given, kind, platforms, plugins, asked',
        [
            ('glibc', 'ANYTHING', 'cpu', None, True, True),
            ('glibc', 'ANYTHING', 'auto', 'cpu', True, True),
            ('glibc', 'ANYTHING', 'auto', None, False, True),
            ('glibc', 'ANYTHING', 'auto', None, True, False),
            ('glibc', 'ANYTHING', 'gpu', 'cuda', True, False),
            ('', 'ANYTHING', 'cpu', None, False, False),
            ('glibc', 'MALLOC_ARENA_MAX', 'cpu', None, False, False),
            ('glibc', 'GLIBC_TUNABLES', 'cpu', None, False, False),
        ],
    )
    def test_who_is_asked(self, monkeypatch, libc, given, kind, platforms, plugins, asked):
        calls = []
        for name in list(os.environ):
            if name.startswith(('MALLOC_', 'GLIBC_')):
                monkeypatch.delenv(name)
        monkeypatch.setenv(given, '1')
        monkeypatch.setattr(meshes.jax, 'config', types.SimpleNamespace(jax_platforms=platforms))
        monkeypatch.setattr(importlib.metadata, 'entry_points', lambda group: [])
        monkeypatch.setattr(importlib.util, 'find_spec', lambda name: plugins and name == 'jax_plugins')
        monkeypatch.setattr(platform, 'libc_ver', lambda: (libc, '1'))
        monkeypatch.setattr(ctypes, 'CDLL', lambda _: types.SimpleNamespace(mallopt=lambda *words: calls.append(words)))
        meshes.keep_heap(kind)
        assert calls == ([(-4, 0), (-1, 2**31 - 1), (-8, 1), (-2, 256 * 2**20)] if asked else [])

    def test_training_asks_before_jax_starts(self, monkeypatch):
        calls = []
        monkeypatch.setattr(meshes, 'keep_heap', calls.append)
        monkeypatch.setattr(meshes, 'devices', lambda kind: calls.append(f'devices {kind}'))
        monkeypatch.setattr(meshes, 'make_mesh', lambda *_: jax.sharding.Mesh(jax.devices('cpu')[:1], 'a'))
        training._start_jax(dataclasses.replace(CONFIG, device='cpu'))
        assert calls == ['cpu', 'devices cpu']


@pytest.mark.parametrize('shape', [(8, 1, 1), (2, 2, 2)])
def test_checkpoints_of_any_mesh_go_on_under_any_other_and_open_on_one_device(tmp_path, shape):
    made = program(shape)
    state = made.init(jax.random.key(1))
    with contextlib.closing(checkpoint.Checkpoints(tmp_path)) as checkpoints:
        checkpoints.save(3, state, {})
        checkpoints.wait()
        for other in SHAPES:
            like = program(other).state
            restored, _ = checkpoints.restore(like)
            for (name, one), two, wanted in zip(
                trees.named_leaves(restored), jax.tree.leaves(state), jax.tree.leaves(like), strict=True
            ):
                np.testing.assert_array_equal(one, two, err_msg=name)
                assert one.sharding == wanted.sharding
        params, about = checkpoint.read_params(tmp_path / '3')
        assert about['step'] == 3
        for one, two in zip(jax.tree.leaves(params), jax.tree.leaves(state.params), strict=True):
            assert len(one.sharding.device_set) == 1
            np.testing.assert_array_equal(one, two)
        with pytest.raises(CheckpointError, match=f'{tmp_path}/4: '):
            checkpoint.read_params(tmp_path / '4')
        [largest] = sorted((tmp_path / '3/state').rglob('d/*'), key=lambda path: path.stat().st_size)[-1:]
        content = bytearray(largest.read_bytes())
        content[len(content) // 3 : len(content) // 3 + 4000] = bytes(4000)
        largest.write_bytes(content)
        with pytest.raises(CheckpointError, match=f'{tmp_path}/3: '):
            checkpoint.read_params(tmp_path / '3')


class TestMemory:
    def test_no_device_holds_a_whole_matrix_under_fsdp(self):
        """Of the compiled step: what goes in and what it works with."""
        model = dict(hidden_size=128, intermediate_size=256, vocab_size=1000)
        config = dataclasses.replace(CONFIG, batch_size=8, accumulate=1)
        memory = {}
        for shape in ((1, 1, 1), (1, 8, 1), (1, 4, 2)):
            built = program(shape, config, **model)
            large = [leaf for leaf in jax.tree.leaves(built.state) if leaf.size > 2000]
            held = [math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in large]
            assert held == [leaf.size // math.prod(shape) for leaf in large]
            step = built.train_step.lower(built.state, built.batch(8)).compile()
            memory[shape] = step.memory_analysis().argument_size_in_bytes
            before = jax.tree.leaves(built.state)
            after = jax.tree.leaves(step.output_shardings[0])
            assert all(a.sharding.is_equivalent_to(b, a.ndim) for a, b in zip(before, after, strict=True))
        assert memory[1, 8, 1] < memory[1, 1, 1] / 7 and memory[1, 4, 2] < memory[1, 1, 1] / 7


def test_what_devices_say_to_each_other_is_the_least():
    """One alone nothing; copies of the model every gradient once."""
    config = dataclasses.replace(CONFIG, accumulate=1)
    for shape, share in (((1, 1, 1), 0), ((8, 1, 1), 1)):
        built = program(shape, config, scan_unroll='all')
        said = hlo.collectives(built.train_step.lower(built.state, built.batch(16)).compile().as_text())
        numbers = sum(leaf.size for leaf in jax.tree.leaves(built.state.params))
        assert sum(size for _, size in said.values()) == pytest.approx(share * 4 * numbers, rel=0.01)


class TestRules:
    def specs(self, **model):
        built = program((2, 2, 2), **model)
        return {name: tuple(leaf.sharding.spec) for name, leaf in trees.named_leaves(built.state)}

    def test_specs_of_every_leaf(self):
        found = self.specs(norm_position='sandwich*2,post*2')
        into, out, norm = (None, 'fsdp', 'tensor'), (None, 'tensor', 'fsdp'), ()
        layers = {
            **{f'attention/{name}/kernel': into for name in 'qkv'},
            **{f'mlp/{name}/kernel': into for name in ('gate', 'up')},
            **{f'{name}/kernel': out for name in ('attention/o', 'mlp/down')},
        }
        norms = [('in', 'out'), ('post',)]
        params = {'embed/embedding': ('tensor', 'fsdp'), 'head/kernel': ('fsdp', 'tensor'), 'norm/scale': norm}
        stack = {
            f'layers/segment_{i}/{name}': spec
            for i, places in enumerate(norms)
            for name, spec in {
                **layers,
                **{f'{sub}_norm_{place}/scale': norm for sub in ('attention', 'mlp') for place in places},
            }.items()
        }
        expected = {f'params/{name}': spec for name, spec in (params | stack).items()}
        expected |= {'step': (), 'bad_step': (), 'opt_state/rest/0/count': ()}
        expected |= {f'opt_state/layers/segment_{i}/0/count': () for i in range(2)}
        for moment in ('mu', 'nu'):
            expected |= {f'opt_state/rest/0/{moment}/{name}': spec for name, spec in params.items()}
            for name, spec in stack.items():
                layers, segment, leaf = name.split('/', 2)
                expected[f'opt_state/{layers}/{segment}/0/{moment}/{leaf}'] = spec
        assert found == expected

    def test_of_biases_and_a_tied_head(self):
        """Biases lie whole on every device, as gains; there is no head."""
        found, plain = self.specs(**BIASED), self.specs()
        more = {name: spec for name, spec in found.items() if name.endswith('/bias')}
        assert {*more.values()} == {()} and len(more) == 2 * 7 * 3  # segments, matrices, weights and two moments
        assert found == {name: spec for name, spec in plain.items() if 'head' not in name} | more

    def test_the_second_choice(self):
        found = self.specs(intermediate_size=49)
        assert found['params/layers/segment_0/mlp/up/kernel'] == (None, ('fsdp', 'tensor'), None)
        assert found['params/layers/segment_0/mlp/down/kernel'] == (None, None, ('fsdp', 'tensor'))

    def test_what_does_not_divide_is_refused(self):
        with pytest.raises(UsageError, match=r'embed/embedding \[128, 30\]: 30 \(dimension 1\).*config.mesh.fsdp=4$'):
            program((2, 4, 1), hidden_size=30, num_heads=15, intermediate_size=64)

    def test_a_leaf_without_a_rule(self):
        leaf = {'params': {'adapter': {'kernel': np.zeros((4, 4))}}}
        with pytest.raises(ValueError, match='no rule for /params/adapter/kernel'):
            meshes.state_shardings(on(1, 1, 1), leaf)


class TestSizes:
    @pytest.mark.parametrize(
        'asked, made',
        [((-1, 1, 1), (8, 1, 1)), ((-1, 2, 2), (2, 2, 2)), ((1, -1, 2), (1, 4, 2)), ((2, 1, 1), (2, 1, 1))],
    )
    def test_one_size_takes_what_is_left(self, asked, made):
        assert tuple(on(*asked).shape[axis] for axis in meshes.AXES) == made

    @pytest.mark.parametrize('asked', [(9, 1, 1), (-1, 3, 1), (4, 4, 1), (-1, 16, 1)])
    def test_sizes_that_do_not_fit(self, asked):
        with pytest.raises(UsageError, match=rf'config.mesh.fsdp={asked[1]}, .* does not fit the 8 cpu devices'):
            on(*asked)

    def test_of_a_run(self):
        with pytest.raises(UsageError, match='batch_size=16 .*accumulate=4 times 8 parts'):
            program((4, 2, 1), dataclasses.replace(CONFIG, accumulate=4))
        with pytest.raises(UsageError, match='2 key/value heads .*config.mesh.tensor=4'):
            program((1, 2, 4), num_kv_heads=2)

    def test_slices_are_joined_along_data(self):
        """Devices of one slice lie side by side in fsdp and tensor."""

        @dataclasses.dataclass(frozen=True)
        class Device:
            id: int
            slice_index: int
            platform: str = 'gpu'
            device_kind: str = 'none'
            process_index: int = 0

        devices = [Device(i, i % 2) for i in range(8)]
        made = meshes.make_mesh(configs.Mesh(-1, 2, 2), devices)
        for part in made.devices:
            assert len({device.slice_index for device in part.flat}) == 1
        with pytest.raises(UsageError, match='config.mesh.data=1 is not divisible by the 2 slices'):
            meshes.make_mesh(configs.Mesh(1, 8, 1), devices)
