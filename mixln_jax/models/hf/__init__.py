"""Hugging Face folders, by the family of their network; `save` is that of LLaMA."""

import pathlib
from typing import Any

from mixln_jax.models.hf import bert, config, llama, vit
from mixln_jax.models.hf.llama import save as save
from mixln_jax.models.network import Network
from mixln_jax.system.errors import UsageError


def is_bert(folder: pathlib.Path) -> bool:
    """Returns whether a folder is a BERT's. Raises CheckpointError if its config.json cannot be read."""
    path = folder / 'config.json'
    return path.is_file() and config.read_json(path).get('model_type') == 'bert'


def load(folder: pathlib.Path, norm_position: str | None = None, compute_dtype: str = 'float32') -> tuple[Network, Any]:
    """Returns the network and the parameters of a Hugging Face folder: a BERT's, a ViT's, or one of LLaMA's family.

    Args:
        folder: holds config.json and safetensors.
        norm_position: placement of a LLaMA folder that does not state it; a ViT is Pre-LN if it does not.
        compute_dtype: of the network; weights are float32.

    Raises:
        UsageError: a `norm_position` for a BERT, which has its own; as `llama.load`.
        CheckpointError: unreadable, damaged, or of another kind of network.
    """
    if vit.is_vit(folder):
        return vit.load(folder, norm_position, compute_dtype)
    if not is_bert(folder):
        return llama.load(folder, norm_position, compute_dtype)
    if norm_position:
        raise UsageError(f'--norm_position: {folder} is a BERT, which has Post-LN')
    return bert.load(folder, compute_dtype)
