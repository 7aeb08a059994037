"""Families of networks, by their name in `config.model.family`; a new one is a module with a Network and a line."""

import dataclasses
from typing import Any

from mixln_jax import config as configs
from mixln_jax.models import placements
from mixln_jax.models.bert import Bert
from mixln_jax.models.llama import Llama
from mixln_jax.models.network import Network
from mixln_jax.models.vit import ViT
from mixln_jax.system.errors import UsageError

FAMILIES: dict[str, type[Network]] = {'llama': Llama, 'bert': Bert, 'vit': ViT}


def from_config(
    config: configs.Model,
    compute_dtype: str = 'bfloat16',
    stream_sharding: Any = None,
    official: bool = False,
    kernel: str = 'blocks',
    num_outputs: int = 0,
) -> Network:
    """Returns the network of a config.

    Args:
        config: `family` selects the class.
        compute_dtype: of activations.
        stream_sharding: NamedSharding of the residual stream; None: one device.
        official: whether a placement computes what the Mix-LN authors' code does under its name.
        kernel: of attention; see kernels/attention.py.
        num_outputs: of the head, from `Task.num_outputs` of a configuration; see Network.

    Raises:
        UsageError: a `norm_position` that does not fit, or a key that has no meaning for the family.
    """
    network = FAMILIES[config.family]
    for field in dataclasses.fields(config):
        meant_for, value = field.metadata['families'], getattr(config, field.name)
        if meant_for and config.family not in meant_for and value != field.default:
            raise UsageError(
                f'config.model.{field.name}={value} has no meaning for config.model.family={config.family}: leave it '
                'out'
            )
    network.check(config)
    names = placements.resolve(config.norm_position, config.num_layers, config.post_ratio)
    if official:
        names = tuple(map(placements.official, names))
    if any(placements.PLACEMENTS[name].attention.grouped for name in names) and config.hidden_size % config.norm_groups:
        raise UsageError(
            f'config.model.hidden_size={config.hidden_size} is not divisible by '
            f'config.model.norm_groups={config.norm_groups}'
        )
    layer_index = tuple(range(1, config.num_layers + 1))
    return network(
        config,
        names,
        layer_index,
        config.num_layers,
        compute_dtype,
        stream_sharding,
        kernel,
        num_outputs=num_outputs,
    )
