"""Pre-train LLaMA-family models with a normalisation placement chosen layer by layer."""


def load(path: str, compute_dtype: str = 'float32', norm_position: str | None = None):
    """Opens trained weights: a run, one of its `checkpoints/<step>`, or a Hugging Face folder.

    Args:
        path: the folder; of a run the newest checkpoint is taken.
        compute_dtype: float32 or bfloat16, of the network; the weights keep their type.
        norm_position: placement of a Hugging Face folder that does not say it, as the Mix-LN authors' do not.

    Returns:
        A `weights.Weights` with `model`, `params`, `config` and `tokenizer` of a run, `step`, `where`:
        `logits, out = found.model.apply({'params': found.params}, ids, capture=True)`.

    Raises:
        exits.UsageError: nothing there, or a `norm_position` for what has its own.
        exits.CheckpointError: unreadable, damaged or of another structure.
    """
    from mixln_jax.runs import weights  # here, since it imports JAX, which takes seconds

    return weights.load(path, compute_dtype, norm_position)
