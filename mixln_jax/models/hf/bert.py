"""Hugging Face folders of BERT (BertModel, BertForQuestionAnswering): their config.json and tensor names."""

import pathlib
import re
from typing import Any

import jax
import jax.numpy as jnp

from mixln_jax import config as configs
from mixln_jax.models import bert
from mixln_jax.models.hf import config as hf_config
from mixln_jax.models.hf import tensors
from mixln_jax.system.errors import CheckpointError

CONFIG_KEYS = {
    'vocab_size': 'vocab_size',
    'hidden_size': 'hidden_size',
    'intermediate_size': 'intermediate_size',
    'num_layers': 'num_hidden_layers',
    'num_heads': 'num_attention_heads',
    'norm_eps': 'layer_norm_eps',
}
TABLES = {'num_positions': 'max_position_embeddings', 'num_types': 'type_vocab_size'}
FIXED = {  # further keys that a config.json may have, and the only value with which `bert` computes
    'hidden_act': 'gelu',
    'position_embedding_type': 'absolute',
    'is_decoder': False,
    'add_cross_attention': False,
    'pruned_heads': {},
}
LAYER = {
    'attention/q': 'attention.self.query',
    'attention/k': 'attention.self.key',
    'attention/v': 'attention.self.value',
    'attention/o': 'attention.output.dense',
    'attention_norm_post': 'attention.output.LayerNorm',
    'mlp/up': 'intermediate.dense',
    'mlp/down': 'output.dense',
    'mlp_norm_post': 'output.LayerNorm',
}
WHOLE = {
    'words': 'embeddings.word_embeddings',
    'positions': 'embeddings.position_embeddings',
    'types': 'embeddings.token_type_embeddings',
    'embed_norm': 'embeddings.LayerNorm',
}
SPAN = 'qa_outputs'
# Not used here: the layer on [CLS] and the heads of pre-training.
UNUSED = re.compile(r'(bert\.)?pooler\..*|cls\.(predictions|seq_relationship)\..*')


def load(folder: str | pathlib.Path, compute_dtype: str = 'float32') -> tuple[bert.Bert, Any]:
    """Returns the network and the parameters of a BERT folder.

    Args:
        folder: holds config.json and model.safetensors, or shards with model.safetensors.index.json. Tensors may have
            the prefix `bert.`, and norms the old names gamma and beta; the pooler and pre-training heads are ignored.
        compute_dtype: of the network; weights are float32.

    Returns:
        (model, params): `start, end = model.apply({'params': params}, ids, types, mask)`. Without qa_outputs, as
        BertModel has none, the network is a backbone without a head.

    Raises:
        UsageError: no such folder or file, or a run of ours.
        CheckpointError: unreadable content, another network than BERT, tensors missing or left over, wrong shapes.
    """
    folder = pathlib.Path(folder)
    tensors.refuse_others(folder)
    path = folder / 'config.json'
    config, architectures = _read_config(path)
    arrays = {name: tensor for name, tensor in tensors.read(folder).items() if not UNUSED.fullmatch(name)}
    tensors.drop_buffers(folder, arrays, {})
    prefix = 'bert.' if any(name.startswith('bert.') for name in arrays) else ''
    old = any(name.endswith('LayerNorm.gamma') for name in arrays)
    L = config.num_layers
    model = bert.Bert(
        config,
        norm_position=('post',) * L,
        layer_index=tuple(range(1, L + 1)),
        depth=L,
        compute_dtype=compute_dtype,
        head=bert.SPANS if f'{SPAN}.weight' in arrays or 'BertForQuestionAnswering' in architectures else '',
    )
    shapes = jax.eval_shape(model.without_padding, model.shapes()['params'])
    named = 'BertForQuestionAnswering' if model.head else 'BertModel'
    params = tensors.fill(
        folder, arrays, shapes, model.norm_position, lambda leaf: tensor_name(leaf, prefix, old), named
    )
    return model, jax.tree.map(jnp.asarray, model.with_padding(params))


def tensor_name(path: str, prefix: str, old: bool) -> str:
    """Returns the name of the tensor of a leaf.

    Args:
        path: names joined by slashes; leaves of layer l (from 0) begin with `layers/<l>`.
        prefix: before the names of all tensors but the head's.
        old: whether norms have gamma and beta.
    """
    module, _, leaf = path.rpartition('/')
    norm = 'norm' in module
    value = {'bias': 'beta' if norm and old else 'bias'}.get(leaf, 'gamma' if norm and old else 'weight')
    if module == 'span':
        return f'{SPAN}.{value}'
    if module in WHOLE:
        return f'{prefix}{WHOLE[module]}.{value}'
    _, number, inside = module.split('/', 2)
    return f'{prefix}encoder.layer.{number}.{LAYER[inside]}.{value}'


def _read_config(path: pathlib.Path) -> tuple[configs.Model, list[str]]:
    """Returns config.Model and the names of the architectures of a config.json."""
    content = hf_config.read_json(path)
    if content.get('model_type') != 'bert':
        raise CheckpointError(f'{path}: model_type={content.get("model_type")!r} is not bert')
    values = hf_config.take(path, content, CONFIG_KEYS | TABLES, FIXED)
    for name, key in TABLES.items():
        if type(values[name]) is not int or values[name] < 1:
            raise CheckpointError(f'{path}: {key}={values[name]!r} is not a number of rows')
    model = hf_config.build(path, values | {'family': 'bert', 'norm_position': 'post'})
    return model, content.get('architectures') or []
