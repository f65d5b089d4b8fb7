"""Factorizations in double precision, whatever JAX's global setting, and safe under ``vmap``.

LAPACK calls of a ``vmap`` become one batched call, and on CPUs jaxlib 0.10 runs its parts on the
pool of threads that the call itself occupies: two at once on two cores wait for each other for
ever. So on CPUs batches are taken one after the other here, elsewhere in the platform's batched
form, and nothing else in the package calls LAPACK through JAX.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Float


def double_precision() -> AbstractContextManager[Any]:
    """A context in which JAX computes in float64; outside of it nothing changes."""
    return jax.enable_x64(True)


def _in_turn_on_cpus(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, whose batches under ``vmap`` are taken one after the other on CPUs."""
    alone = custom_vmap(function)

    @alone.def_vmap
    def batches(axis_size: int, batched: Sequence[bool], *arguments: Array) -> tuple[Any, Any]:
        def in_turn(*arguments: Array) -> Any:
            def of_one(at: Array) -> Any:
                pairs = zip(arguments, batched, strict=True)
                return alone(*(whole[at] if has_batch else whole for whole, has_batch in pairs))

            return jax.lax.map(of_one, jnp.arange(axis_size))

        together = jax.vmap(function, [0 if has_batch else None for has_batch in batched])
        results = jax.lax.platform_dependent(*arguments, cpu=in_turn, default=together)
        return results, jax.tree.map(lambda _: True, results)

    return alone


@_in_turn_on_cpus
def _factor(matrix: Float[Array, "n n"]) -> Float[Array, "n n"]:
    return jnp.linalg.cholesky(matrix)


@_in_turn_on_cpus
def _solve(factor: Float[Array, "n n"], right: Float[Array, "n m"]) -> Float[Array, "n m"]:
    return jax.scipy.linalg.solve_triangular(factor, right, lower=True)


@_in_turn_on_cpus
def _solve_transposed(
    factor: Float[Array, "n n"], right: Float[Array, "n m"]
) -> Float[Array, "n m"]:
    return jax.scipy.linalg.solve_triangular(factor, right, lower=True, trans=1)


@_in_turn_on_cpus
def symmetric_eigen(matrix: Float[Array, "n n"]) -> tuple[Float[Array, " n"], Float[Array, "n n"]]:
    """Eigenvalues in rising order, and eigenvectors as columns, of a symmetric matrix."""
    values, vectors = jnp.linalg.eigh(matrix, symmetrize_input=False)
    return values, vectors


def solve_lower(
    factor: Float[Array, "n n"], right: Float[Array, "n m"], *, transposed: bool = False
) -> Float[Array, "n m"]:
    """``factor^-1 right`` (``factor^-T right`` when transposed) for a lower triangular factor.

    Differentiable.
    """
    solved: Array = _solved(transposed, factor, right)
    return solved


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _solved(transposed: bool, factor: Array, right: Array) -> Array:
    solve: Callable[[Array, Array], Array] = _solve_transposed if transposed else _solve
    return solve(factor, right)


def _solved_forward(transposed: bool, factor: Array, right: Array) -> tuple[Array, Any]:
    solved = _solved(transposed, factor, right)
    return solved, (factor, solved)


def _solved_backward(transposed: bool, kept: Any, cotangent: Array) -> tuple[Array, Array]:
    factor, solved = kept
    of_right = _solved(not transposed, factor, cotangent)
    outer = solved @ of_right.T if transposed else of_right @ solved.T
    return -jnp.tril(outer), of_right


_solved.defvjp(_solved_forward, _solved_backward)


@jax.custom_vjp
def cholesky(matrix: Float[Array, "n n"]) -> Float[Array, "n n"]:
    """Lower Cholesky factor, NaN where the matrix is not positive definite; differentiable."""
    return _factor(matrix)


def _cholesky_forward(matrix: Array) -> tuple[Array, Array]:
    factor = cholesky(matrix)
    return factor, factor


def _cholesky_backward(factor: Array, cotangent: Array) -> tuple[Array]:
    # Murray 2016 (arXiv 1602.07527), eq. 10.
    inner = jnp.tril(factor.T @ cotangent)
    inner = inner - 0.5 * jnp.diag(jnp.diagonal(inner))
    half = solve_lower(factor, inner, transposed=True)
    outer = solve_lower(factor, half.T, transposed=True)
    return (0.5 * (outer + outer.T),)


cholesky.defvjp(_cholesky_forward, _cholesky_backward)


@jax.custom_vjp
def spd_inverse(matrix: Float[Array, "n n"]) -> tuple[Float[Array, "n n"], Float[Array, ""]]:
    """Inverse and log determinant of a symmetric positive definite matrix, differentiable.

    The derivative needs two products of matrices, not the derivative of a factorization:
    d(M^-1) = -M^-1 dM M^-1 and d(log det M) = tr(M^-1 dM) (Petersen & Pedersen 2012, eqs. 40, 46).
    """
    factor = _factor(matrix)
    root = solve_lower(factor, jnp.eye(len(matrix), dtype=matrix.dtype))
    return root.T @ root, 2.0 * jnp.log(jnp.diagonal(factor)).sum()


def _inverse_forward(matrix: Array) -> tuple[tuple[Array, Array], Array]:
    inverse, log_determinant = spd_inverse(matrix)
    return (inverse, log_determinant), inverse


def _inverse_backward(inverse: Array, cotangents: tuple[Array, Array]) -> tuple[Array]:
    of_inverse, of_log_determinant = cotangents
    return (of_log_determinant * inverse - inverse @ of_inverse @ inverse,)


spd_inverse.defvjp(_inverse_forward, _inverse_backward)
