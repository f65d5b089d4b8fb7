"""Products and norms of one matrix's gradients, which are kept as factors."""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class Factors(NamedTuple):
    """Gradients of several examples in one matrix: ``left^T right``, and ``slopes`` added to rows.

    The axis of examples is added outside.

    Attributes:
        left, right: of products: as long as the matrix has rows and columns.
        rows, slopes: of taken rows: their numbers, and the gradient of each.
    """

    left: Float[Array, "*example token row"] | None
    right: Float[Array, "*example token column"] | None
    rows: Int[Array, "*example taken"] | None
    slopes: Float[Array, "*example taken column"] | None


@dataclass(frozen=True)
class Way:
    """How the products of one matrix's gradients are formed.

    Attributes:
        kind: ``tokens``: of every two tokens; ``rows``: of every two taken rows; ``written``:
            gradients are written out; ``direct``: they are already.
        shape: of the matrix.
        needed: numbers that a pair of examples needs (``tokens``, ``rows``), or a single one.
    """

    kind: Literal["tokens", "rows", "written", "direct"]
    shape: tuple[int, int]
    needed: int

    def side(self, memory: int) -> int:
        """How many examples of each side fit in bytes of memory."""
        if self.kind in ("tokens", "rows"):
            return max(1, math.isqrt(memory // (4 * self.needed)))
        return max(1, memory // (8 * self.needed))

    def prepared(self, part: Any) -> Any:
        """What ``multiplied`` and ``norms`` take."""
        return written(part, self.shape) if self.kind == "written" else part

    def multiplied(self, train: Any, query: Any, scale: Any) -> Float[Array, "train query"]:
        """Products of prepared gradients, weighed by ``scale`` unless it is None."""
        if self.kind == "tokens":
            return _by_token(train, query)
        return (_by_row if self.kind == "rows" else _whole)(train, query, scale)

    def norms(self, part: Any, scale: Any) -> Float[Array, " example"]:
        """Squared norms of prepared gradients."""
        if self.kind == "tokens":
            return _token_norms(part)
        return (_row_norms if self.kind == "rows" else _whole_norms)(part, scale)


@partial(jax.jit, static_argnums=1)
def written(part: Factors, shape: tuple[int, int]) -> Float[Array, "example weight"]:
    """The gradients themselves, each as one row."""
    size = len(jax.tree.leaves(part)[0])
    total = jnp.zeros((size, *shape))
    if part.left is not None and part.right is not None:
        total = total + jnp.einsum("ptr,ptc->prc", part.left, part.right)
    if part.rows is not None and part.slopes is not None:
        total = jax.vmap(lambda matrix, rows, slopes: matrix.at[rows].add(slopes))(
            total, part.rows, part.slopes
        )
    return total.reshape(size, -1)


@jax.jit
def _whole(
    train: Float[Array, "train weight"], query: Float[Array, "query weight"], scale: Any
) -> Float[Array, "train query"]:
    return train @ _weighed(query, scale).T


@jax.jit
def _whole_norms(part: Float[Array, "example weight"], scale: Any) -> Float[Array, " example"]:
    return jnp.einsum("pw,pw->p", part, _weighed(part, scale))


def _weighed(part: Float[Array, "example weight"], scale: Any) -> Float[Array, "example weight"]:
    return part if scale is None else part * scale.reshape(1, -1)


@jax.jit
def _by_token(train: Factors, query: Factors) -> Float[Array, "train query"]:
    left = jnp.einsum("ptr,qsr->ptqs", train.left, query.left)
    right = jnp.einsum("ptc,qsc->ptqs", train.right, query.right)
    return (left * right).sum(axis=(1, 3))


@jax.jit
def _token_norms(part: Factors) -> Float[Array, " example"]:
    left = jnp.einsum("ptr,psr->pts", part.left, part.left)
    right = jnp.einsum("ptc,psc->pts", part.right, part.right)
    return (left * right).sum(axis=(1, 2))


@jax.jit
def _by_row(train: Any, query: Any, scale: Any) -> Float[Array, "train query"]:
    alike = train.rows[:, :, None, None] == query.rows[None, None]
    products = jnp.einsum("ptc,qsc->ptqs", train.slopes, _weighed_rows(query, scale))
    return jnp.where(alike, products, 0.0).sum(axis=(1, 3))


@jax.jit
def _row_norms(part: Any, scale: Any) -> Float[Array, " example"]:
    alike = part.rows[:, :, None] == part.rows[:, None]
    products = jnp.einsum("ptc,psc->pts", part.slopes, _weighed_rows(part, scale))
    return jnp.where(alike, products, 0.0).sum(axis=(1, 2))


def _weighed_rows(part: Any, scale: Any) -> Any:
    return part.slopes if scale is None else part.slopes * scale[part.rows]
