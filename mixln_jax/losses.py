"""What "loss" means: every loss returns (sum, count, aux), sums over real tokens, divided once, by the caller."""

import functools

import jax
import jax.numpy as jnp

CHUNK = 2048  # positions whose logits are alive at a time, over the whole batch


def token_losses(x, head_kernel, labels, weights, vocab_size, chunk=CHUNK):
    """Cross-entropy of next tokens without ever holding the logits of the whole batch.

    Positions are taken in chunks along T (a batch sharded over devices stays where it is); the gradient is made while a
    chunk's logits are there, so the backward pass only scales it. Logits, softmax and sums are float32.

    Args:
        x: [B,T,D] after the final norm, in the compute type.
        head_kernel: [D,Vp], Vp >= vocab_size; columns beyond vocab_size take no part.
        labels: [B,T] int.
        weights: [B,T], 1 for a real target, 0 elsewhere.
        vocab_size: V.
        chunk: positions in a chunk (B times a stretch of T).

    Returns:
        sum of weighted losses (nats), sum of weights, {'token_loss': [B,T] weighted losses}.
    """
    T = x.shape[1]
    stretch = max(1, min(T, chunk // x.shape[0]))
    pieces = -(-T // stretch)

    def cut(a):  # [B,T,...] -> [pieces, B, stretch, ...], weight 0 behind T
        a = jnp.pad(a, [(0, 0), (0, pieces * stretch - T)] + [(0, 0)] * (a.ndim - 2))
        return jnp.moveaxis(a.reshape(a.shape[0], pieces, stretch, *a.shape[2:]), 1, 0)

    weights = weights.astype(jnp.float32)
    with jax.default_matmul_precision('highest' if x.dtype == jnp.float32 else None):
        total, losses = _chunked(cut(x), head_kernel, cut(labels), cut(weights), vocab_size)
    losses = jnp.moveaxis(losses, 0, 1).reshape(x.shape[0], -1)[:, :T]
    return total, weights.sum(), {'token_loss': jax.lax.stop_gradient(losses)}


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _chunked(x, head_kernel, labels, weights, vocab_size):
    """Sum and losses of pieces [pieces,B,stretch,...]; only the sum has a gradient."""
    kernel = head_kernel.astype(x.dtype)

    def piece(total, of):
        losses, _ = _piece_losses(kernel, vocab_size, *of)
        return total + losses.sum(), losses

    return jax.lax.scan(piece, jnp.float32(0), (x, labels, weights))


def _chunked_forward(x, head_kernel, labels, weights, vocab_size):
    kernel = head_kernel.astype(x.dtype)

    def piece(carry, of):
        total, d_kernel = carry
        x, labels, weights = of
        losses, (logits, normalizer) = _piece_losses(kernel, vocab_size, x, labels, weights)
        target = jnp.arange(kernel.shape[1]) == labels[..., None]
        d_logits = ((jnp.exp(logits - normalizer) - target) * weights[..., None]).astype(x.dtype)
        d_x = jnp.einsum('btv,dv->btd', d_logits, kernel)
        d_kernel += jnp.einsum('btd,btv->dv', x, d_logits, preferred_element_type=jnp.float32)
        return (total + losses.sum(), d_kernel), (losses, d_x)

    start = jnp.float32(0), jnp.zeros(kernel.shape, jnp.float32)
    (total, d_kernel), (losses, d_x) = jax.lax.scan(piece, start, (x, labels, weights))
    return (total, losses), (d_x, d_kernel.astype(head_kernel.dtype))


def _chunked_backward(vocab_size, gradients, cotangents):
    del vocab_size
    by, _ = cotangents
    return *((gradient * by).astype(gradient.dtype) for gradient in gradients), None, None


_chunked.defvjp(_chunked_forward, _chunked_backward)


def _piece_losses(kernel, vocab_size, x, labels, weights):
    logits = jnp.einsum('btd,dv->btv', x, kernel, preferred_element_type=jnp.float32)
    logits = jnp.where(jnp.arange(kernel.shape[1]) < vocab_size, logits, -jnp.inf)
    normalizer = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    chosen = jnp.take_along_axis(logits, labels[..., None], axis=-1)
    return (normalizer - chosen)[..., 0] * weights, (logits, normalizer)
