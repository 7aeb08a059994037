"""What "loss" means: every loss returns (sum, count, aux), sums over real tokens, divided once, by the caller."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from mixln_jax.distributed import mesh as meshes

CHUNK = 2048  # positions whose logits are alive at a time on a device
CHUNK_ON_CPU = 512  # faster there, with less memory: benchmarks/NOTES.md


def token_losses(x, head_kernel, labels, weights, vocab_size, chunk=None, mesh=None):
    """Cross-entropy of next tokens without ever holding the logits of the whole batch.

    Positions are taken in chunks along T; the gradient is made while a chunk's logits are there, so the backward pass
    only scales it. Logits, softmax and sums are float32.

    Args:
        x: [B,T,D] after the final norm, in the compute type.
        head_kernel: [D,Vp], Vp >= vocab_size; columns beyond vocab_size take no part.
        labels: [B,T] int.
        weights: [B,T], 1 for a real target, 0 elsewhere.
        vocab_size: V.
        chunk: positions in a chunk (the rows of a device times a stretch of T); None: what suits the devices.
        mesh: the devices that share the work: rows over `data` and `fsdp`, the vocabulary over `tensor`. The kernel is
            gathered once and its gradient summed once, whatever the number of chunks. None: one device.

    Returns:
        sum of weighted losses (nats), sum of weights, {'token_loss': [B,T] weighted losses}.
    """
    weights = weights.astype(jnp.float32)
    platform = mesh.devices.flat[0].platform if isinstance(mesh, Mesh) else jax.default_backend()
    chunk = chunk or (CHUNK_ON_CPU if platform == 'cpu' else CHUNK)
    with jax.named_scope('head'):
        total, losses = _losses(x, head_kernel, labels, weights, vocab_size, chunk, mesh)
    return total, weights.sum(), {'token_loss': jax.lax.stop_gradient(losses)}


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _losses(x, head_kernel, labels, weights, vocab_size, chunk, mesh):
    """Sum of losses and losses [B,T]; only the sum has a gradient."""
    return _shared(False, x, head_kernel, labels, weights, vocab_size, chunk, mesh)


def _forward(x, head_kernel, labels, weights, vocab_size, chunk, mesh):
    total, losses, d_x, d_kernel = _shared(True, x, head_kernel, labels, weights, vocab_size, chunk, mesh)
    return (total, losses), (d_x, d_kernel.astype(head_kernel.dtype))


def _backward(vocab_size, chunk, mesh, gradients, cotangents):
    del vocab_size, chunk, mesh
    by, _ = cotangents
    return *((gradient * by).astype(gradient.dtype) for gradient in gradients), None, None


_losses.defvjp(_forward, _backward)


def _shared(gradient, x, head_kernel, labels, weights, vocab_size, chunk, mesh):
    """What `_local` gives, on one device or on each of a mesh with the parts put together."""
    arguments = x, head_kernel.astype(x.dtype), labels, weights
    padded = vocab_size if vocab_size < head_kernel.shape[1] else None
    local = functools.partial(_local, gradient=gradient, padded_from=padded, chunk=chunk)
    if mesh is None or mesh.size == 1:
        return local(*arguments)
    rows = P(meshes.ROWS)

    def shared(*axes):  # of one device alone some compilers make copies
        return tuple(axis for axis in axes if mesh.shape[axis] > 1)

    def on_device(*parts):
        total, losses, *gradients = local(*parts, columns=shared('tensor'))
        total = jax.lax.psum(total, shared(*meshes.ROWS))
        if gradient:
            d_x, d_kernel = gradients
            d_kernel = jax.lax.psum(d_kernel, shared('data'))
            if shared('fsdp'):
                d_kernel = jax.lax.psum_scatter(d_kernel, 'fsdp', tiled=True)
            gradients = jax.lax.psum(d_x, shared('tensor')), d_kernel
        return total, losses, *gradients

    specs = rows, P(None, 'tensor'), rows, rows
    out = (P(), rows, rows, P('fsdp', 'tensor')) if gradient else (P(), rows)
    return jax.shard_map(on_device, mesh=mesh, in_specs=specs, out_specs=out, check_vma=False)(*arguments)


def _local(x, kernel, labels, weights, *, gradient, padded_from, chunk, columns=()):
    """Sum of losses, losses [B,T] and, with `gradient`, those of x [B,T,D] and of the kernel [D,Vp] (float32).

    `columns` names the mesh axis over which the kernel's columns lie; both gradients are then parts of a sum. Columns
    from `padded_from` on take no part; None: all do.
    """
    T = x.shape[1]
    stretch = max(1, min(T, chunk // x.shape[0]))
    pieces = -(-T // stretch)

    def cut(a):  # [B,T,...] -> [pieces, B, stretch, ...], weight 0 behind T
        a = jnp.pad(a, [(0, 0), (0, pieces * stretch - T)] + [(0, 0)] * (a.ndim - 2))
        return jnp.moveaxis(a.reshape(a.shape[0], pieces, stretch, *a.shape[2:]), 1, 0)

    def whole(a):  # the inverse
        return jnp.moveaxis(a, 0, 1).reshape(x.shape[0], pieces * stretch, *a.shape[3:])[:, :T]

    first = jax.lax.axis_index(columns) * kernel.shape[1] if columns else 0
    column = jnp.arange(kernel.shape[1])

    def piece(carry, of):
        total, d_kernel = carry
        x, labels, weights = of
        labels = labels - first
        logits = jnp.einsum('btd,dv->btv', x, kernel, preferred_element_type=jnp.float32)
        if padded_from:
            logits = jnp.where(column + first < padded_from, logits, -jnp.inf)
        largest = jax.lax.pmax(logits.max(axis=-1, keepdims=True), columns)
        normalizer = largest + jnp.log(jax.lax.psum(jnp.exp(logits - largest).sum(-1, keepdims=True), columns))
        here = (labels >= 0) & (labels < kernel.shape[1])
        chosen = jnp.take_along_axis(logits, jnp.where(here, labels, 0)[..., None], axis=-1)[..., 0]
        losses = (normalizer[..., 0] - jax.lax.psum(jnp.where(here, chosen, 0), columns)) * weights
        if not gradient:
            return (total + losses.sum(), d_kernel), (losses,)
        d_logits = jnp.exp(logits - normalizer) - (column == labels[..., None])
        d_logits = (d_logits * weights[..., None]).astype(x.dtype)
        d_kernel += jnp.einsum('btd,btv->dv', x, d_logits, preferred_element_type=jnp.float32)
        return (total + losses.sum(), d_kernel), (losses, jnp.einsum('btv,dv->btd', d_logits, kernel))

    with jax.default_matmul_precision('highest' if x.dtype == jnp.float32 else None):
        start = jnp.float32(0), jnp.zeros(kernel.shape, jnp.float32) if gradient else None
        (total, d_kernel), out = jax.lax.scan(piece, start, (cut(x), cut(labels), cut(weights)))
    losses, *d_x = map(whole, out)
    return (total, losses, *d_x, d_kernel) if gradient else (total, losses)
