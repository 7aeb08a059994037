"""Matrix products."""

import functools

import jax
import jax.numpy as jnp

from mixln_jax.kernels import matmul


def precision(a):
    """Of matrix products with `a`: exact in float32. A backward pass written by hand is traced outside of the backbone,
    whose default it does not see."""
    return 'highest' if a.dtype == jnp.float32 else None


@jax.custom_vjp
def product(x, kernel):
    """[..., D] times [D, F], with a gradient in an order that suits CPUs.

    JAX would write that of the kernel as (dy^T x)^T, for which XLA on CPU transposes dy, and what made dy with it; with
    x^T dy a whole train step takes a sixth less (benchmarks/NOTES.md). Elsewhere compilers choose the order themselves.
    """
    return x @ kernel


def _product_forward(x, kernel):
    return x @ kernel, (x, kernel)


def _product_backward(saved, dy):
    x, kernel = saved
    dot = functools.partial(jnp.einsum, precision=matmul.precision(x))
    dx = dot('...f,df->...d', dy, kernel)
    if kernel.shape[0] > kernel.shape[1]:  # of x and dy the smaller one is transposed
        return dx, dot('...f,...d->fd', dy, x).T
    return dx, dot('...d,...f->df', x, dy)


product.defvjp(_product_forward, _product_backward)
