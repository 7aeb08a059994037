"""Pre-train LLaMA-family models with a normalisation placement chosen layer by layer."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mixln_jax.runs import weights


def load(path: str, compute_dtype: str = 'float32', norm_position: str | None = None) -> 'weights.Weights':
    """Loads trained weights from a run, one of its `checkpoints/<step>`, or a Hugging Face folder.

    Args:
        path: the folder. For a run its newest checkpoint is used.
        compute_dtype: type of the network's activations, float32 or bfloat16; the weights keep their type.
        norm_position: placement, for a Hugging Face folder that does not state it (the Mix-LN authors' do not).

    Returns:
        A `weights.Weights` with `model`, `params`, `step`, `where`, and for a run also `config` and `tokenizer`.

    Raises:
        errors.UsageError: there are no weights, or `norm_position` is given although the folder states it.
        errors.CheckpointError: the weights are unreadable, damaged or of another structure.
    """
    from mixln_jax.runs import weights  # not above: it imports JAX, which takes seconds

    return weights.load(path, compute_dtype, norm_position)
