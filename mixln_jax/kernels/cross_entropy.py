"""Losses and log-probabilities of tokens. The logits of the whole batch are never held in memory.

A loss returns (sum, count, aux), sums over real tokens; the caller divides once. The sequence is processed in chunks
along T. Logits, softmax and sums are float32.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from mixln_jax.distributed import mesh as meshes

CHUNK = 2048  # positions whose logits a device holds at a time
CHUNK_ON_CPU = 512  # faster there, with less memory: benchmarks/NOTES.md


class TokenLogProbs(NamedTuple):
    """The result of `token_log_probs`: arrays [B, T], float32, in nats."""

    log_probs: jax.Array
    entropy: jax.Array | None
    log_normalizer: jax.Array | None


def token_losses(
    x: jax.Array,
    head_kernel: jax.Array,
    labels: jax.Array,
    loss_mask: jax.Array,
    vocab_size: int,
    chunk: int | None = None,
    mesh: Mesh | None = None,
) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
    """Returns the cross-entropy of next tokens.

    The gradient is computed while the logits of a chunk are in memory; the backward pass only scales it. Only the sum
    of losses has a gradient.

    Args:
        x: [B, T, D] after the final norm, in the compute type.
        head_kernel: [D, Vp], Vp >= vocab_size; columns beyond vocab_size are ignored.
        labels: [B, T] int.
        loss_mask: [B, T], 1 for a real target, 0 elsewhere.
        vocab_size: V.
        chunk: positions in a chunk (rows of a device times a part of T); None: a size that suits the devices.
        mesh: the devices that share the work: rows over `data` and `fsdp`, the vocabulary over `tensor`. The kernel is
            gathered once and its gradient summed once, whatever the number of chunks. None: one device.

    Returns:
        The sum of masked losses (nats), the sum of the mask, {'token_loss': [B, T] masked losses}.
    """
    loss_mask = loss_mask.astype(jnp.float32)
    with jax.named_scope('head'):
        total, losses = _losses(x, head_kernel, labels, loss_mask, vocab_size, _chunk_size(chunk, mesh), mesh)
    return total, loss_mask.sum(), {'token_loss': jax.lax.stop_gradient(losses)}


def token_log_probs(
    x: jax.Array,
    head_kernel: jax.Array,
    labels: jax.Array,
    vocab_size: int,
    *,
    chunk: int | None = None,
    mesh: Mesh | None = None,
    entropy: bool = False,
    log_normalizer: bool = False,
) -> TokenLogProbs:
    """Returns the log-probability of each label and, on request, the entropy and log-normaliser of each position.

    It serves losses that need more than the sum of token losses. Every output is differentiable with respect to `x` and
    `head_kernel`. The backward pass computes the logits again, chunk by chunk, and sums the kernel's gradient in
    float32. With logits z = x W, p = softmax(z) and log Z = log sum exp(z):

        log_probs = z[label] - log Z    d log_probs / dz = onehot(label) - p
        entropy H = -sum p log p        dH / dz = -p (log p + H)
        log_normalizer = log Z          d log Z / dz = p

    Args:
        x: [B, T, D] after the final norm, in the compute type.
        head_kernel: [D, Vp], Vp >= vocab_size; columns beyond vocab_size are ignored.
        labels: [B, T] int. A label outside [0, vocab_size) has log-probability 0 and no gradient. Entropy and
            log-normaliser do not depend on labels.
        vocab_size: V.
        chunk: as in `token_losses`.
        mesh: as in `token_losses`; B is divisible by its row parts, D by `fsdp` and Vp by `tensor`.
        entropy: whether to return the entropies; otherwise they are None.
        log_normalizer: the same for the log-normalisers.
    """
    with jax.named_scope('head'):
        return _log_probs(x, head_kernel, labels, vocab_size, _chunk_size(chunk, mesh), mesh, entropy, log_normalizer)


# --- Losses


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _losses(
    x: jax.Array,
    head_kernel: jax.Array,
    labels: jax.Array,
    loss_mask: jax.Array,
    vocab_size: int,
    chunk: int,
    mesh: Mesh | None,
) -> tuple[jax.Array, jax.Array]:
    """Returns the sum of losses and the losses [B, T]; only the sum has a gradient."""
    local = functools.partial(_local_losses, gradient=False, chunk=chunk)
    total, losses, _ = _on_devices(local, x, head_kernel, (labels, loss_mask), vocab_size, mesh, gradient=False)
    return total, losses


def _losses_forward(
    x: jax.Array,
    head_kernel: jax.Array,
    labels: jax.Array,
    loss_mask: jax.Array,
    vocab_size: int,
    chunk: int,
    mesh: Mesh | None,
) -> tuple[Any, Any]:
    local = functools.partial(_local_losses, gradient=True, chunk=chunk)
    total, losses, gradients = _on_devices(local, x, head_kernel, (labels, loss_mask), vocab_size, mesh, gradient=True)
    d_x, d_kernel = gradients
    return (total, losses), (d_x, d_kernel.astype(head_kernel.dtype))


def _losses_backward(
    vocab_size: int, chunk: int, mesh: Mesh | None, gradients: Any, cotangents: Any
) -> tuple[Any, ...]:
    del vocab_size, chunk, mesh
    scale, _ = cotangents
    return *((gradient * scale).astype(gradient.dtype) for gradient in gradients), None, None


_losses.defvjp(_losses_forward, _losses_backward)


def _local_losses(head: '_Head', x: jax.Array, rows: Any, *, gradient: bool, chunk: int) -> tuple[Any, Any, Any]:
    """Returns the sum of losses, the losses [B, T] and, with `gradient`, the gradients of the sum."""

    def step(carry: Any, arrays: Any) -> tuple[Any, Any]:
        total, d_kernel = carry
        x, (labels, loss_mask) = arrays
        logits = head.logits(x)
        normalizer = head.log_normalizer(logits)
        losses = (normalizer[..., 0] - head.label_logits(logits, labels)) * loss_mask
        total += losses.sum()
        if not gradient:
            return (total, d_kernel), (losses, None)
        d_logits = (jnp.exp(logits - normalizer) - head.one_hot(labels)) * loss_mask[..., None]
        d_x, d_kernel = head.add_gradients(d_kernel, x, d_logits)
        return (total, d_kernel), (losses, d_x)

    start = jnp.float32(0), head.zeros() if gradient else None
    (total, d_kernel), (losses, d_x) = _scan(step, start, (x, rows), chunk)
    return total, losses, (d_x, d_kernel)


# --- Log-probabilities


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5, 6, 7))
def _log_probs(
    x: jax.Array,
    head_kernel: jax.Array,
    labels: jax.Array,
    vocab_size: int,
    chunk: int,
    mesh: Mesh | None,
    entropy: bool,
    log_normalizer: bool,
) -> TokenLogProbs:
    return _log_probs_forward(x, head_kernel, labels, vocab_size, chunk, mesh, entropy, log_normalizer)[0]


def _log_probs_forward(
    x: jax.Array,
    head_kernel: jax.Array,
    labels: jax.Array,
    vocab_size: int,
    chunk: int,
    mesh: Mesh | None,
    entropy: bool,
    log_normalizer: bool,
) -> tuple[TokenLogProbs, Any]:
    local = functools.partial(_local_log_probs, entropy=entropy, chunk=chunk)
    _, computed, _ = _on_devices(local, x, head_kernel, labels, vocab_size, mesh, gradient=False)
    computed = computed._replace(log_probs=jnp.where(_in_vocabulary(labels, vocab_size), computed.log_probs, 0))
    returned = computed if log_normalizer else computed._replace(log_normalizer=None)
    return returned, (x, head_kernel, labels, computed._replace(log_probs=None))


def _log_probs_backward(
    vocab_size: int, chunk: int, mesh: Mesh | None, entropy: bool, log_normalizer: bool, saved: Any, cotangents: Any
) -> tuple[Any, ...]:
    del entropy, log_normalizer
    x, head_kernel, labels, computed = saved
    cotangents = cotangents._replace(log_probs=jnp.where(_in_vocabulary(labels, vocab_size), cotangents.log_probs, 0))
    local = functools.partial(_local_log_probs_gradients, chunk=chunk)
    rows = labels, computed, cotangents
    with jax.named_scope('head'):
        *_, (d_x, d_kernel) = _on_devices(local, x, head_kernel, rows, vocab_size, mesh, gradient=True)
    return d_x, d_kernel.astype(head_kernel.dtype), None


_log_probs.defvjp(_log_probs_forward, _log_probs_backward)


def _in_vocabulary(labels: jax.Array, vocab_size: int) -> jax.Array:
    """Returns whether each label is inside the vocabulary."""
    return (labels >= 0) & (labels < vocab_size)


def _local_log_probs(
    head: '_Head', x: jax.Array, labels: jax.Array, *, entropy: bool, chunk: int
) -> tuple[Any, Any, Any]:
    """Returns TokenLogProbs with the log-normalisers, for labels inside the vocabulary; no sums and no gradients."""

    def step(carry: Any, arrays: Any) -> tuple[Any, Any]:
        x, labels = arrays
        logits = head.logits(x)
        normalizer = head.log_normalizer(logits)
        log_probs = head.label_logits(logits, labels) - normalizer[..., 0]
        entropies = head.entropy(logits - normalizer) if entropy else None
        return carry, TokenLogProbs(log_probs, entropies, normalizer[..., 0])

    _, computed = _scan(step, None, (x, labels), chunk)
    return (), computed, ()


def _local_log_probs_gradients(head: '_Head', x: jax.Array, rows: Any, *, chunk: int) -> tuple[Any, Any, Any]:
    """Returns the gradients; `rows` are labels, the result of `_local_log_probs`, cotangents of TokenLogProbs."""

    def step(d_kernel: Any, arrays: Any) -> tuple[Any, Any]:
        x, (labels, *per_position) = arrays
        computed, cotangents = jax.tree.map(lambda a: a[..., None], per_position)
        log_p = head.logits(x) - computed.log_normalizer
        p = jnp.exp(log_p)
        d_logits = cotangents.log_probs * (head.one_hot(labels) - p)
        if cotangents.log_normalizer is not None:
            d_logits += cotangents.log_normalizer * p
        if cotangents.entropy is not None:
            d_logits -= cotangents.entropy * p * (_finite(log_p) + computed.entropy)
        d_x, d_kernel = head.add_gradients(d_kernel, x, d_logits)
        return d_kernel, d_x

    d_kernel, d_x = _scan(step, head.zeros(), (x, rows), chunk)
    return (), (), (d_x, d_kernel)


def _finite(log_p: jax.Array) -> jax.Array:
    """Returns log_p with the least float32 in place of -inf, so that p log p is 0 where p = 0; NaN stays NaN."""
    return jnp.maximum(log_p, jnp.finfo(jnp.float32).min)


# --- Common parts


class _Head(NamedTuple):
    """The columns of the head's kernel on one device, and computations with them for a chunk x [B, t, D]."""

    kernel: jax.Array  # [D, V'], in the type of x
    padded_from: int | None  # of all columns, those from this one on are ignored; None: none are
    axes: tuple[
        str, ...
    ]  # the mesh axis over which the columns are divided, or (); gradients of x are then partial sums

    def first(self) -> jax.Array | int:
        """Returns the index of this device's first column among all columns."""
        return jax.lax.axis_index(self.axes) * self.kernel.shape[1] if self.axes else 0

    def logits(self, x: jax.Array) -> jax.Array:
        """Returns logits [B, t, V'] float32; those of ignored columns are -inf."""
        logits = jnp.einsum('btd,dv->btv', x, self.kernel, preferred_element_type=jnp.float32)
        if self.padded_from:
            column = jnp.arange(self.kernel.shape[1])
            logits = jnp.where(column + self.first() < self.padded_from, logits, -jnp.inf)
        return logits

    def log_normalizer(self, logits: jax.Array) -> jax.Array:
        """Returns log sum exp over the vocabulary, [B, t, 1]."""
        largest = jax.lax.pmax(logits.max(axis=-1, keepdims=True), self.axes)
        return largest + jnp.log(jax.lax.psum(jnp.exp(logits - largest).sum(-1, keepdims=True), self.axes))

    def label_logits(self, logits: jax.Array, labels: jax.Array) -> jax.Array:
        """Returns the logits of labels [B, t], 0 for labels that are on no device."""
        labels = labels - self.first()
        present = (labels >= 0) & (labels < self.kernel.shape[1])
        chosen = jnp.take_along_axis(logits, jnp.where(present, labels, 0)[..., None], axis=-1)[..., 0]
        return jax.lax.psum(jnp.where(present, chosen, 0), self.axes)

    def entropy(self, log_p: jax.Array) -> jax.Array:
        """Returns the entropy [B, t] of log-probabilities [B, t, V']."""
        return jax.lax.psum(-(jnp.exp(log_p) * _finite(log_p)).sum(-1), self.axes)

    def one_hot(self, labels: jax.Array) -> jax.Array:
        """Returns a bool array [B, t, V']: the column of each label [B, t]."""
        return jnp.arange(self.kernel.shape[1]) == (labels - self.first())[..., None]

    def zeros(self) -> jax.Array:
        """Returns the initial value of the kernel's gradient."""
        return jnp.zeros(self.kernel.shape, jnp.float32)

    def add_gradients(self, d_kernel: jax.Array, x: jax.Array, d_logits: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns the gradient of x [B, t, D], and d_kernel [D, V'] float32 plus the gradient of the kernel."""
        d_logits = d_logits.astype(x.dtype)
        d_kernel += jnp.einsum('btd,btv->dv', x, d_logits, preferred_element_type=jnp.float32)
        return jnp.einsum('btv,dv->btd', d_logits, self.kernel), d_kernel


def _chunk_size(chunk: int | None, mesh: Mesh | None) -> int:
    """Returns the size of a chunk: `chunk` if given, else a size that suits the devices."""
    platform = mesh.devices.flat[0].platform if isinstance(mesh, Mesh) else jax.default_backend()
    return chunk or (CHUNK_ON_CPU if platform == 'cpu' else CHUNK)


def _scan(step: Callable[[Any, Any], tuple[Any, Any]], start: Any, arrays: Any, chunk: int) -> tuple[Any, Any]:
    """Scans chunks [B, t, ...] of arrays [B, T, ...] along T; returns the last carry and the outputs [B, T, ...].

    A chunk has at most `chunk` positions (B times t), but t is at least 1. Beyond T the arrays are 0.
    """
    B, T = arrays[0].shape[:2]
    length = max(1, min(T, chunk // B))
    count = -(-T // length)

    def split(a: jax.Array) -> jax.Array:  # [B, T, ...] -> [count, B, length, ...]
        a = jnp.pad(a, [(0, 0), (0, count * length - T)] + [(0, 0)] * (a.ndim - 2))
        return jnp.moveaxis(a.reshape(B, count, length, *a.shape[2:]), 1, 0)

    def join(a: jax.Array) -> jax.Array:
        return jnp.moveaxis(a, 0, 1).reshape(B, count * length, *a.shape[3:])[:, :T]

    carry, outputs = jax.lax.scan(step, start, jax.tree.map(split, arrays))
    return carry, jax.tree.map(join, outputs)


def _on_devices(
    local: Callable[..., tuple[Any, Any, Any]],
    x: jax.Array,
    head_kernel: jax.Array,
    rows: Any,
    vocab_size: int,
    mesh: Mesh | None,
    gradient: bool,
) -> tuple[Any, Any, Any]:
    """Runs `local(head, x, rows)` on one device, or on each device of a mesh; returns the combined result.

    Args:
        local: returns sums over positions, arrays [B, T] and, with `gradient`, the gradients of x and of the kernel.
        x: [B, T, D].
        head_kernel: [D, Vp].
        rows: a tree of arrays [B, T].
        vocab_size: V.
        mesh: the devices; None: one device.
        gradient: whether `local` returns gradients.
    """
    kernel = head_kernel.astype(x.dtype)
    padded_from = vocab_size if vocab_size < head_kernel.shape[1] else None

    def present(*axes: str) -> tuple[str, ...]:  # some compilers copy arrays for an axis of size 1
        return tuple(axis for axis in axes if mesh is not None and mesh.shape[axis] > 1)

    def on_device(x: jax.Array, kernel: jax.Array, rows: Any) -> tuple[Any, Any, Any]:
        sums, outputs, gradients = local(_Head(kernel, padded_from, present('tensor')), x, rows)
        sums = jax.lax.psum(sums, present(*meshes.ROWS))
        if not gradient:
            return sums, outputs, ()
        d_x, d_kernel = gradients
        d_kernel = jax.lax.psum(d_kernel, present('data'))
        if present('fsdp'):
            d_kernel = jax.lax.psum_scatter(d_kernel, 'fsdp', tiled=True)
        return sums, outputs, (jax.lax.psum(d_x, present('tensor')), d_kernel)

    with jax.default_matmul_precision('highest' if x.dtype == jnp.float32 else None):
        if mesh is None or mesh.size == 1:
            return local(_Head(kernel, padded_from, ()), x, rows)
        split = P(meshes.ROWS)
        out = P(), split, (split, P('fsdp', 'tensor')) if gradient else ()
        specs = split, P(None, 'tensor'), split
        return jax.shard_map(on_device, mesh=mesh, in_specs=specs, out_specs=out, check_vma=False)(x, kernel, rows)
