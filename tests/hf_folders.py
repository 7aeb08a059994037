"""Networks to write as Hugging Face folders, and changes of such folders."""

import functools
import json

import jax
import numpy as np
import safetensors.numpy

from mixln_jax import config as configs
from mixln_jax.models import families, placements

PLACEMENTS = [*placements.PLACEMENTS, 'mix', 'post,deepnorm,lns', 'sandwich*2,res_post']
LLAMA3 = dict(
    rope_type='llama3', rope_factor=3.0, rope_low_freq_factor=1.0, rope_high_freq_factor=4.0, rope_original_length=50,
)  # fmt: skip
KINDS = {  # what a LLaMA may be besides: keys of config.model
    'theta': {'rope_theta': 50.0},
    'tied': {'tie_word_embeddings': True},
    'attention_bias': {'attention_bias': True},
    'mlp_bias': {'mlp_bias': True},
    'head_dim': {'head_dim': 6},
    'llama3': {'head_dim': 6, 'rope_theta': 50.0, **LLAMA3},  # one pair stays, one is slowed by a half, one wholly
}
KINDS['all'] = {name: value for kind in KINDS.values() for name, value in kind.items()}


@functools.cache
def network(norm_position, num_outputs=0, **changes):
    """Returns (model, params) of three layers and 11 words, or of a ViT, no two numbers alike."""
    sizes = dict(vocab_size=11, hidden_size=8, intermediate_size=12, num_heads=4, num_kv_heads=2, num_layers=3)
    if changes.get('family') == 'vit':
        sizes = dict(num_layers=3)
    config = configs.Model(norm_position=norm_position, **(sizes | changes))
    model = families.from_config(config, 'float32', num_outputs=num_outputs)
    rng = np.random.default_rng(0)
    draw = lambda path, leaf: rng.normal('norm' in str(path), 0.4, leaf.shape).astype(np.float32)  # noqa: E731
    params = jax.tree_util.tree_map_with_path(draw, model.shapes()['params'])
    vocab = model.config.vocab_size
    if 'embed' in params:
        params['embed']['embedding'][vocab:] = 0
    if 'head' in params:
        params['head']['kernel'][:, vocab:] = 0
    return model, params


def smaller(params):
    """Returns the weights of a network, those of norms apart, divided by four.

    Norms of queries and keys magnify rounding: with the weights of `network` the gradients of one batch, in other
    shapes, differ by up to 8e-5 in float32, and by 1e-15 where every float32 of the package is made a float64.
    """
    change = lambda path, leaf: leaf if 'norm' in str(path) else leaf / 4  # noqa: E731
    return jax.tree_util.tree_map_with_path(change, params)


@functools.partial(jax.jit, static_argnums=0)
def logits(model, params):
    """Returns the logits [2, 5, V] of ten ids."""
    return model.apply({'params': params}, np.arange(10).reshape(2, 5))[0]


def edit(folder, name='config.json', **changes):
    """Changes keys of a JSON file; None removes a key."""
    found = json.loads((folder / name).read_text()) | changes
    (folder / name).write_text(json.dumps({key: value for key, value in found.items() if value is not None}))


def change(folder, name, how, file='model.safetensors'):
    """Changes a tensor of a file: `how` maps the old one to the new one, None removes it."""
    tensors = safetensors.numpy.load_file(folder / file)
    new = how(tensors.pop(name, None))
    safetensors.numpy.save_file(tensors if new is None else tensors | {name: np.ascontiguousarray(new)}, folder / file)


def save(folder, tensors):
    """Writes {name: array} in float32 as the weights of a folder."""
    whole = {name: np.asarray(tensor, np.float32) for name, tensor in tensors.items()}
    safetensors.numpy.save_file(whole, folder / 'model.safetensors')
