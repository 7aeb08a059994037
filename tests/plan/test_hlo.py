"""What is read off the text of compiled programs."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from mixln_jax import config as configs
from mixln_jax.distributed import mesh as meshes
from mixln_jax.plan import hlo
from mixln_jax.program.program import Program


def test_collectives_in_loops_count_as_often_as_they_run():
    on = meshes.make_mesh(configs.Mesh(8, 1, 1), jax.devices('cpu'))

    @functools.partial(jax.shard_map, mesh=on, in_specs=P('data'), out_specs=P(), check_vma=False)
    def of(x):
        inner = lambda x, _: (jnp.sin(jax.lax.psum(x, 'data')), None)  # noqa: E731
        outer = lambda x, _: (jnp.cos(jax.lax.scan(inner, x, None, length=5)[0]), None)  # noqa: E731
        x, _ = jax.lax.scan(outer, x, None, length=3)
        return jax.lax.all_gather(x, 'data', tiled=True)

    text = jax.jit(of).lower(jnp.zeros((8, 100))).compile().as_text()
    assert hlo.collectives(text) == {'all-reduce': (15, 15 * 400), 'all-gather': (1, 3200)}


def test_asynchronous_collectives():
    text = (
        'HloModule m\n\n'
        'ENTRY %main (p: f32[8,4]) -> f32[8,4] {\n'
        '  %a = (f32[1,4]{1,0:T(8,128)}, f32[8,4]{1,0}) all-gather-start(%p), dimensions={0}\n'
        '  %b = (bf16[8,4]{1,0}, bf16[8,4]{1,0}, u32[], u32[]) collective-permute-start(%p)\n'
        '  ROOT %c = f32[8,4]{1,0} all-gather-done(%a)\n'
        '}\n'
    )
    assert hlo.collectives(text) == {'all-gather': (1, 128), 'collective-permute': (1, 64)}


def test_all_branches_of_a_condition_count():
    branch = '%{0} (p: f32[8]) -> f32[8] {{\n  ROOT %r.{0} = f32[8] all-reduce(%p), replica_groups={{{{0,1}}}}\n}}\n\n'
    entry = (
        'ENTRY %main (p: f32[8]) -> f32[8] {\n'
        '  %x = f32[8] conditional(%i, %p, %p), branch_computations={%a, %b}\n'
        '  ROOT %y = f32[8] conditional(%i, %p, %p), true_computation=%a, false_computation=%c\n'
        '}\n'
    )
    assert hlo.collectives(''.join(map(branch.format, 'abc')) + entry) == {'all-reduce': (4, 4 * 32)}


def test_cycles_of_parts():
    """A loop of three rounds, a fusion whose inside must not count again, and what the compiler does not know."""
    text = (
        'HloModule m\n\n'
        '%inside (p: f32[8]) -> f32[8] {\n'
        '  ROOT %e = f32[8] exponential(%p), metadata={op_name="mlp/exp"}, backend_config={"estimated_cycles":"5"}\n'
        '}\n\n'
        '%body (t: (s32[], f32[8])) -> (s32[], f32[8]) {\n'
        '  %x = f32[8] fusion(%t), calls=%inside, metadata={op_name="jit(f)/jvp(layers)/mlp/exp"}, '
        'backend_config={"estimated_cycles":"70"}\n'
        '  %y = f32[8] add(%x), metadata={op_name="jit(f)/mlp/mlp_norm_in/add"}, '
        'backend_config={"estimated_cycles":"11"}\n'
        '}\n\n'
        '%until (t: (s32[], f32[8])) -> pred[] {\n'
        '  %n = s32[] constant(3)\n'
        '  ROOT %c = pred[] compare(%t, %n), direction=LT\n'
        '}\n\n'
        'ENTRY %main (p: f32[8]) -> f32[8] {\n'
        '  %w = (s32[], f32[8]) while(%p), condition=%until, body=%body\n'
        '  %z = f32[8] copy(%w), backend_config={"estimated_cycles":"9223372036854775807"}\n'
        '  ROOT %a = f32[8] copy(%z), metadata={op_name="jit(f)/transpose(jvp(head))/mul"}, '
        'backend_config={"estimated_cycles":"1000"}\n'
        '}\n'
    )
    assert hlo.expected_cycles(text) == {'head': 1000, 'mlp': 210, 'norms': 33}


def test_every_part_of_the_step_has_its_name():
    """The names that the parts go by are those in a compiled train step, and nothing large is without one."""
    config = configs.Config(
        batch_size=2,
        seq_length=16,
        model=configs.Model(vocab_size=128, hidden_size=16, intermediate_size=32, num_layers=2, num_heads=2),
    )
    built = Program(config, meshes.make_mesh(configs.Mesh(1, 1, 1), jax.devices('cpu')[:1]))
    text = built.train_step.lower(built.state, built.batch(2)).compile().as_text()
    found = {hlo.part(line) for line, _, _ in hlo.operations(text)}
    assert found == {*hlo.PARTS, 'norms', 'the rest'}
    products = [line for line, _, _ in hlo.operations(text) if ' dot(' in line or '"__ynn$' in line]
    assert products and 'the rest' not in {hlo.part(line) for line in products}
