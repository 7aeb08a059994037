"""Matrix multiplication."""

import functools

import jax
import jax.numpy as jnp


def precision(a: jax.Array) -> str | None:
    """Returns the precision of matrix products with `a`: the highest for float32, the default otherwise.

    Backward passes that are written by hand need it: they are traced outside the network, where the precision that the
    network sets does not apply.
    """
    return 'highest' if a.dtype == jnp.float32 else None


@jax.custom_vjp
def matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Returns x @ kernel, with a gradient that is fast on CPUs.

    JAX would compute the kernel's gradient as (dy^T x)^T, for which XLA on CPU transposes dy and the operations that
    produce it. With x^T dy a whole train step takes a sixth less time (benchmarks/NOTES.md). Compilers for other
    devices choose the order themselves.

    Args:
        x: [..., D].
        kernel: [D, F].

    Returns:
        [..., F].
    """
    return x @ kernel


def _matmul_forward(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return x @ kernel, (x, kernel)


def _matmul_backward(saved: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    dot = functools.partial(jnp.einsum, precision=precision(x))
    dx = dot('...f,df->...d', dy, kernel)
    if kernel.shape[0] > kernel.shape[1]:  # the smaller of x and dy is transposed
        return dx, dot('...f,...d->fd', dy, x).T
    return dx, dot('...d,...f->df', x, dy)


matmul.defvjp(_matmul_forward, _matmul_backward)
