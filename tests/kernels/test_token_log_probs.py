"""Log-probabilities of tokens: values, gradients, memory, meshes.

The reference is float64 numpy; its gradients come from complex steps through the values, not from derived formulas.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from builders import equations

from mixln_jax import config as configs
from mixln_jax.distributed import mesh
from mixln_jax.kernels import cross_entropy
from mixln_jax.plan import hlo

OUTPUTS = cross_entropy.TokenLogProbs._fields
V = 13  # of the vocabulary, in kernels of up to 16 columns


def arrays(B=3, T=7, D=5, columns=16, seed=0):
    """x, kernel, labels, and cotangents [3,B,T] of the three outputs."""
    rng = np.random.default_rng(seed)
    x, kernel = rng.normal(size=(B, T, D)), rng.normal(size=(D, columns))
    cotangents = rng.normal(size=(3, B, T)).astype(np.float32)
    return x.astype(np.float32), kernel.astype(np.float32), rng.integers(0, V, (B, T)), cotangents


def outputs(logits, labels):
    """log_probs, entropy and log-normaliser [3,B,T] of logits [B,T,V]; analytic."""
    top = logits.real.max(-1, keepdims=True)
    normalizer = np.log(np.exp(logits - top).sum(-1, keepdims=True)) + top
    log_p = logits - normalizer
    known = (labels >= 0) & (labels < V)
    chosen = np.take_along_axis(log_p, np.where(known, labels, 0)[..., None], -1)[..., 0]
    return np.stack([np.where(known, chosen, 0), -(np.exp(log_p) * log_p).sum(-1), normalizer[..., 0]])


def reference(x, kernel, labels, cotangents):
    """The outputs [3,B,T] and the gradients of x and kernel, float64."""
    x, kernel = np.asarray(x, np.float64), np.asarray(kernel, np.float64)
    logits = x @ kernel[:, :V]
    size = 1e-30  # of a step; its square vanishes
    steps = (outputs(logits + 1j * size * step, labels).imag / size for step in np.eye(V))
    d_logits = np.stack([(derivatives * cotangents).sum(0) for derivatives in steps], -1)
    d_kernel = np.zeros_like(kernel)
    d_kernel[:, :V] = np.einsum('btd,btv->dv', x, d_logits)
    return outputs(logits, labels), d_logits @ kernel[:, :V].T, d_kernel


def ours(x, kernel, labels, cotangents, names=OUTPUTS, **options):
    """The outputs `names`, stacked, and the gradients of x and kernel; outputs not asked for are None."""
    chosen = [OUTPUTS.index(name) for name in names]
    asked = {name: name in names for name in OUTPUTS[1:]}

    def of(x, kernel):
        made = cross_entropy.token_log_probs(x, kernel, labels, V, **asked, **options)
        assert [value is None for value in made[1:]] == [not wanted for wanted in asked.values()]
        return jnp.stack([made[number] for number in chosen])

    @jax.jit
    def run(x, kernel):
        values, pull = jax.vjp(of, x, kernel)
        return values, *pull(cotangents[np.array(chosen)])

    return run(x, kernel)


def assert_close(found, expected, tolerance):
    """Asserts that each array differs by at most `tolerance` times its largest value."""
    for name, one, other in zip(('values', 'd_x', 'd_kernel'), found, expected, strict=True):
        one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
        np.testing.assert_allclose(one, other, rtol=0, atol=tolerance * np.abs(other).max(), err_msg=name)


class TestOneDevice:
    @pytest.mark.parametrize('chunk', [1, 3, 6, 12, 21, 1000, None])
    def test_chunks_change_nothing(self, chunk):
        given = arrays()
        assert_close(ours(*given, chunk=chunk), reference(*given), 2e-6)

    @pytest.mark.parametrize('B, T, D, columns', [(1, 1, 1, V), (1, 7, 5, V), (7, 1, 3, 14), (5, 11, 4, 16)])
    def test_sizes(self, B, T, D, columns):
        given = arrays(B, T, D, columns)
        assert_close(ours(*given, chunk=8), reference(*given), 2e-6)

    @pytest.mark.parametrize('name', OUTPUTS)
    def test_each_output_alone(self, name):
        *given, cotangents = arrays()
        names = ('log_probs',) if name == 'log_probs' else ('log_probs', name)
        alone = np.where(np.array(OUTPUTS)[:, None, None] == name, cotangents, 0)
        values, *gradients = reference(*given, alone)
        expected = values[[OUTPUTS.index(name) for name in names]], *gradients
        assert_close(ours(*given, alone, names, chunk=6), expected, 2e-6)

    def test_sharp_distributions(self):
        """Logits of hundreds: many probabilities are 0 in float32. The tolerance is the rounding of the logits."""
        x, kernel, *rest = arrays()
        given = 64 * x, kernel, *rest
        tolerance = np.abs(64 * x @ kernel).max() * 2**-24
        assert_close(ours(*given, chunk=6), reference(*given), tolerance)

    @pytest.mark.parametrize('shape', [None, (2, 2, 2)])
    def test_bfloat16(self, shape):
        """Values are those of the same rounded arrays; gradients are off by no more than one rounding to bfloat16."""
        x, kernel, *rest = arrays(B=8, D=32)
        x, kernel = jnp.asarray(x, jnp.bfloat16), jnp.asarray(kernel, jnp.bfloat16)
        values, d_x, d_kernel = ours(x, kernel, *rest, chunk=6, mesh=shape and on(*shape))
        assert values.dtype == jnp.float32 and d_x.dtype == d_kernel.dtype == jnp.bfloat16
        expected = reference(x, kernel, *rest)
        np.testing.assert_allclose(values, expected[0], rtol=0, atol=2e-6 * np.abs(expected[0]).max())
        assert_close((values, d_x, d_kernel), expected, 2**-8)

    def test_gradient_of_the_kernel_is_summed_in_float32(self):
        """Over 512 chunks a sum in bfloat16 would be off by 3 %."""
        x, kernel, labels, cotangents = arrays(1, 512, 4)
        x, cotangents = jnp.asarray(x, jnp.bfloat16), np.abs(cotangents)
        found = ours(x, kernel, labels, cotangents, chunk=1)
        assert found[2].dtype == jnp.float32
        expected = reference(x, kernel.astype(jnp.bfloat16), labels, cotangents)
        np.testing.assert_allclose(found[2], expected[2], rtol=0, atol=2**-9 * np.abs(expected[2]).max())

    @pytest.mark.parametrize('outside', [-100, -1, V, 15, 16, 10**6])
    def test_labels_outside_the_vocabulary(self, outside):
        """Their log-probabilities are 0 and have no gradient; entropy and log-normaliser do not change."""
        x, kernel, labels, cotangents = arrays()
        labels = np.where(np.random.default_rng(1).random(labels.shape) < 0.4, outside, labels)
        found = ours(x, kernel, labels, cotangents, chunk=6)
        assert_close(found, reference(x, kernel, labels, cotangents), 2e-6)
        assert (np.asarray(found[0][0])[labels == outside] == 0).all()
        _, d_x, _ = ours(x, kernel, labels, cotangents, OUTPUTS[:1], chunk=6)
        assert (np.asarray(d_x)[labels == outside] == 0).all()

    def test_nan_is_not_masked(self):
        x, *rest = arrays()
        x[1, 2] = np.nan
        values, *_ = ours(x, *rest, chunk=6)
        np.testing.assert_array_equal(np.isnan(values), np.broadcast_to(np.isnan(x[..., 0]), values.shape))


@pytest.mark.parametrize('shape', [None, (2, 2, 2)])
def test_loss_of_the_log_probabilities_is_the_cross_entropy(shape):
    x, kernel, labels, cotangents = arrays(4, 7, 6)
    weights = (cotangents[0] > 0).astype(np.float32)
    shared = dict(chunk=6, mesh=shape and on(*shape))

    @functools.partial(jax.value_and_grad, argnums=(0, 1))
    def loss(x, kernel):
        return (cross_entropy.token_log_probs(x, kernel, labels, V, **shared).log_probs * -weights).sum()

    @functools.partial(jax.value_and_grad, argnums=(0, 1))
    def other(x, kernel):
        return cross_entropy.token_losses(x, kernel, labels, weights, V, **shared)[0]

    (value, gradients), (expected, theirs) = jax.jit(loss)(x, kernel), jax.jit(other)(x, kernel)
    assert_close((value, *gradients), (expected, *theirs), 3e-7)


def test_no_array_of_all_logits():
    """Neither in the traced program nor in the temporary memory of the compiled one."""
    shapes = [jax.ShapeDtypeStruct(*of) for of in (((4, 64, 8), 'float32'), ((8, 512), 'float32'), ((4, 64), 'int32'))]

    @functools.partial(jax.grad, argnums=(0, 1))
    def gradient(x, kernel, labels):
        made = cross_entropy.token_log_probs(x, kernel, labels, 500, chunk=16, entropy=True, log_normalizer=True)
        return sum(value.sum() for value in made)

    jaxpr = jax.make_jaxpr(gradient)(*shapes)
    largest = max(np.prod(v.aval.shape) for e in jax.tree.leaves(list(equations(jaxpr.jaxpr))) for v in e.outvars)
    assert largest == 16 * 512  # the logits of a chunk
    compiled = jax.jit(gradient).lower(*shapes).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * 4 * 64 * 512


def on(*shape):
    return mesh.make_mesh(configs.Mesh(*shape), jax.devices('cpu'))


class TestMeshes:
    @pytest.mark.parametrize('shape', [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 4, 1), (2, 1, 4), (1, 2, 4), (2, 2, 2)])
    def test_results_are_those_of_one_device(self, shape):
        """With labels outside the vocabulary, in an odd number of positions."""
        x, kernel, labels, cotangents = arrays(8, 7, 8)
        labels[:, ::3] = -100
        found = ours(x, kernel, labels, cotangents, chunk=6, mesh=on(*shape))
        assert_close(found, ours(x, kernel, labels, cotangents, chunk=6), 1e-6)
        assert_close(found, reference(x, kernel, labels, cotangents), 2e-6)

    def test_kernel_is_gathered_once_a_pass_and_its_gradient_summed_once(self):
        """Whatever the number of chunks."""
        x, kernel, labels, _ = arrays(8, 64, 8)
        devices = on(2, 4, 1)
        kernel = jax.device_put(kernel, jax.NamedSharding(devices, jax.P('fsdp', 'tensor')))
        x, labels = jax.device_put((x, labels), mesh.batch_sharding(devices))

        @functools.partial(jax.grad, argnums=(0, 1))
        def gradient(x, kernel, chunk):
            return cross_entropy.token_log_probs(x, kernel, labels, V, chunk=chunk, mesh=devices).log_probs.sum()

        compiled = (jax.jit(gradient, static_argnums=2).lower(x, kernel, chunk).compile() for chunk in (1, 64))
        many, one = (hlo.collectives(program.as_text()) for program in compiled)
        assert many == one
        assert 1 <= one['all-gather'][0] <= 2 and one['reduce-scatter'][0] == one['all-reduce'][0] == 1, one
