"""Hugging Face folders: `read` and `save` are those of LLaMA."""

from mixln_jax.models.hf.llama import read as read
from mixln_jax.models.hf.llama import save as save
