"""Small LLaMA-type networks, their weights and batches, and how tests compare gradients and read jaxprs."""

import functools

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import reference

from mixln_jax import config as configs
from mixln_jax import trees
from mixln_jax.models import families, transformer
from mixln_jax.program import optim, step
from mixln_jax.tasks.language import Language

SIZES = dict(V=11, D=8, H=4, K=2, F=12)
MODEL = configs.Model(
    vocab_size=11,
    hidden_size=8,
    intermediate_size=12,
    num_layers=4,
    num_heads=2,
    norm_position='post,pre*3',
    init_std=0.3,
)


def make(norm_position, num_layers=3, **changes):
    """Returns a model of three layers and 11 words, of the sizes of `reference.init(**SIZES)`."""
    sizes = dict(vocab_size=11, hidden_size=8, intermediate_size=12, num_heads=4, num_kv_heads=2, scan_unroll='1')
    return families.from_config(
        configs.Model(num_layers=num_layers, norm_position=norm_position, **(sizes | changes)), 'float32'
    )


def to_jax(model, weights):
    """Returns the reference's weights as parameters of `model`; the padded rows stay zero."""
    like = model.shapes()['params']
    pad = lambda a, shape: np.pad(a, [(0, n - m) for n, m in zip(shape.shape, a.shape, strict=True)])  # noqa: E731

    def layer(of):
        ours = {}
        for name, value in of.items():
            sublayer, _, place = name.partition('_')
            if place == 'norm':
                ours.setdefault('attention', {})[name] = {'scale': value}
            elif place == 'bias':
                ours.setdefault('attention' if sublayer in 'qkvo' else 'mlp', {}).setdefault(sublayer, {})['bias'] = (
                    value
                )
            elif place in ('in', 'out', 'post'):
                ours[f'{sublayer}_norm_{place}'] = {'scale': value}
            elif place:
                ours[f'{name}_scale'] = value
            else:
                part = ours.setdefault('attention' if name in 'qkvo' else 'mlp', {})
                part.setdefault(name, {})['kernel'] = value
        return ours

    params = {
        'embed': {'embedding': pad(weights['embed'], like['embed']['embedding'])},
        'norm': {'scale': weights['norm']},
        'layers': transformer.stack_layers([layer(of) for of in weights['layers']], model.norm_position),
    }
    if 'head' in weights:
        params['head'] = {'kernel': pad(weights['head'], like['head']['kernel'])}
    if 'embed_norm' in weights:
        params['embed_norm'] = {'scale': weights['embed_norm']}
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)


def text(rng, B=2, T=5, V=11):
    """Returns a batch of random ids whose last row has two targets fewer."""
    ids = rng.integers(0, V, (B, T + 1))
    weights = np.ones((B, T))
    weights[-1, -2:] = 0
    return {'inputs': ids[:, :-1], 'targets': ids[:, 1:], 'loss_mask': weights}


def assert_gradients(got, expected, tolerance):
    """Raises AssertionError unless each tensor is within `tolerance` times its own largest entry."""
    expected = dict(trees.named_leaves(expected))
    for name, leaf in trees.named_leaves(got):
        np.testing.assert_allclose(
            leaf, expected[name], rtol=0, atol=tolerance * np.abs(expected[name]).max(), err_msg=name
        )


def batch_of(rng, B=8, T=6, V=11):
    """Returns rows with different numbers of real targets, one row with none."""
    lengths = rng.integers(1, T + 1, B)
    lengths[0] = 0
    return {
        'inputs': rng.integers(0, V, (B, T)).astype(np.int32),
        'targets': rng.integers(0, V, (B, T)).astype(np.int32),
        'loss_mask': (np.arange(T) < lengths[:, None]).astype(np.float32),
    }


def equations(jaxpr):
    """Yields the equations of a jaxpr, and those of the jaxprs inside them."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from equations(inner)


@functools.cache  # compiled once for all tests
def make_step(**changes):
    """Returns (state, jitted train step) of the network MODEL."""
    model = families.from_config(MODEL, 'float32')
    optimizer = optim.optimizer(configs.Optim())
    state = jax.jit(functools.partial(step.init_state, Language(model), optimizer))(jax.random.key(0))
    update = functools.partial(
        step.train_step, task=Language(model), optimizer=optimizer, schedule=lambda s: 1e-2, **changes
    )
    return state, jax.jit(update)


def branches(monkeypatch, weights, ids, names):
    """Returns (hidden, F of every sub-layer in turn) in float64, by the reference."""
    found = []

    def recording(of):
        def placement(x, w, attention, mlp, norm, l, L):
            def record(sublayer, h, w_of):
                found.append(sublayer(h) * w.get(w_of, 1))
                return found[-1] / w.get(w_of, 1)

            return of(
                x,
                w,
                lambda h: record(attention, h, 'attention_branch'),
                lambda h: record(mlp, h, 'mlp_branch'),
                norm,
                l,
                L,
            )

        return placement

    wrapped = {name: recording(of) for name, of in reference.PLACEMENTS.items()}
    monkeypatch.setattr(reference, 'PLACEMENTS', wrapped)
    hidden, _ = reference.forward(weights, ids, names, heads=4, kv_heads=2)
    return hidden, found
