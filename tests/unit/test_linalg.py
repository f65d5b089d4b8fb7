"""Factorizations against NumPy's, their derivatives against differences, batches under jit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from bayes_simfluence.linalg import (
    cholesky,
    double_precision,
    solve_lower,
    spd_inverse,
    symmetric_eigen,
)

SIZE, BATCH = 6, 5


def spd(rng, *shape):
    root = rng.normal(size=(*shape, SIZE, SIZE))
    return root @ np.swapaxes(root, -1, -2) + 0.5 * np.eye(SIZE)


def test_factorizations_are_numpys(rng):
    matrix, right = spd(rng), rng.normal(size=(SIZE, 3))
    factor = np.linalg.cholesky(matrix)
    with double_precision():
        np.testing.assert_allclose(cholesky(jnp.asarray(matrix)), factor, rtol=1e-12, atol=1e-13)
        inverse, log_determinant = spd_inverse(jnp.asarray(matrix))
        np.testing.assert_allclose(inverse, np.linalg.inv(matrix), rtol=1e-9, atol=1e-11)
        np.testing.assert_allclose(log_determinant, np.linalg.slogdet(matrix)[1], rtol=1e-12)
        for transposed in (False, True):
            solved = solve_lower(jnp.asarray(factor), jnp.asarray(right), transposed=transposed)
            expected = np.linalg.solve(factor.T if transposed else factor, right)
            np.testing.assert_allclose(solved, expected, rtol=1e-9, atol=1e-11)
        values, vectors = map(np.asarray, symmetric_eigen(jnp.asarray(matrix)))
    np.testing.assert_allclose(values, np.linalg.eigvalsh(matrix), rtol=1e-10)
    np.testing.assert_allclose(vectors @ np.diag(values) @ vectors.T, matrix, atol=1e-10)
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(SIZE), atol=1e-12)


def test_a_batch_is_one_after_the_other(rng):
    matrices, right = spd(rng, BATCH), rng.normal(size=(BATCH, SIZE, 2))
    with double_precision():

        @jax.jit
        @jax.vmap
        def all_of_it(matrix, right):
            factor = cholesky(matrix)
            inverse, log_determinant = spd_inverse(matrix)
            solved = solve_lower(factor, solve_lower(factor, right), transposed=True)
            return factor, inverse, log_determinant, solved, *symmetric_eigen(matrix)

        found = all_of_it(jnp.asarray(matrices), jnp.asarray(right))
    factor, inverse, log_determinant, solved, values, vectors = map(np.asarray, found)
    assert factor.dtype == np.float64
    np.testing.assert_allclose(factor, np.linalg.cholesky(matrices), rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(inverse, np.linalg.inv(matrices), rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(log_determinant, np.linalg.slogdet(matrices)[1], rtol=1e-11)
    np.testing.assert_allclose(solved, np.linalg.solve(matrices, right), rtol=1e-8, atol=1e-10)
    again = np.einsum("bij,bj,bkj->bik", vectors, values, vectors)
    np.testing.assert_allclose(again, matrices, atol=1e-10)


@pytest.mark.parametrize(("platform", "in_turn"), [("cpu", True), ("tpu", False)])
def test_batches_are_taken_in_turn_on_cpus_alone(platform, in_turn):
    """A loop over the batch for CPUs; one operation on all of it for other platforms."""
    matrices = jnp.broadcast_to(jnp.eye(SIZE), (BATCH, SIZE, SIZE))
    traced = jax.jit(jax.vmap(cholesky)).trace(matrices)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert ("stablehlo.while" in text) == in_turn
    assert (
        f"tensor<{BATCH}x{SIZE}x{SIZE}xf32>) -> tensor<{BATCH}x{SIZE}x{SIZE}xf32>" in text
    ) or in_turn


def test_batches_of_batches_are_those_of_numpy(rng):
    matrices = spd(rng, 2, 3)
    with double_precision():
        factors = jax.jit(jax.vmap(jax.vmap(cholesky)))(jnp.asarray(matrices))
        shared = jax.vmap(solve_lower, (None, 0))(factors[0, 0], jnp.asarray(matrices[1]))
    np.testing.assert_allclose(factors, np.linalg.cholesky(matrices), rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(
        shared, np.linalg.solve(np.asarray(factors[0, 0]), matrices[1]), rtol=1e-8, atol=1e-10
    )


def test_double_precision_ends_with_its_block():
    with double_precision():
        assert jnp.asarray(1.0).dtype == jnp.float64
    assert jnp.asarray(1.0).dtype == jnp.float32


def test_a_matrix_that_has_no_factor_gives_nan():
    assert np.isnan(np.asarray(cholesky(jnp.asarray([[1.0, 2.0], [2.0, 1.0]])))).any()


FUNCTIONS = {
    "cholesky": cholesky,
    "inverse": lambda matrix: spd_inverse(matrix)[0],
    "log determinant": lambda matrix: spd_inverse(matrix)[1],
    "inverse and log determinant": spd_inverse,
}


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_derivatives_are_those_of_differences(rng, function):
    # Through a symmetric matrix of free numbers: only symmetric directions have a meaning.
    with double_precision():
        root = jnp.asarray(rng.normal(size=(SIZE, SIZE)))
        check_grads(
            jax.jit(lambda root: function(root @ root.T + 0.5 * jnp.eye(SIZE))),
            (root,),
            order=1,
            modes=["rev"],
            atol=1e-5,
            rtol=1e-5,
        )


def test_derivatives_of_a_batch_under_jit(rng):
    matrices, weight = spd(rng, BATCH), rng.normal(size=(SIZE, SIZE))

    def total(matrices):
        def one(matrix):
            inverse, log_determinant = spd_inverse(matrix)
            return (inverse * weight).sum() + log_determinant + (cholesky(matrix) * weight).sum()

        return jax.vmap(one)(matrices).sum()

    direction = rng.normal(size=matrices.shape)
    direction = direction + np.swapaxes(direction, 1, 2)
    with double_precision():
        total = jax.jit(total)
        gradient = np.asarray(jax.jit(jax.grad(total))(jnp.asarray(matrices)))
        step = 1e-6 * direction
        up, down = (float(total(jnp.asarray(matrices + sign * step))) for sign in (1, -1))
    np.testing.assert_allclose((gradient * direction).sum(), (up - down) / 2e-6, rtol=1e-6)


@pytest.mark.parametrize("transposed", [False, True])
def test_derivatives_of_a_solution_are_those_of_differences(rng, transposed):
    factor, right = np.linalg.cholesky(spd(rng)), rng.normal(size=(SIZE, 2))

    @jax.jit
    def solved(factor, right):
        return solve_lower(jnp.tril(factor), right, transposed=transposed)

    with double_precision():
        arguments = (jnp.asarray(factor), jnp.asarray(right))
        check_grads(solved, arguments, order=1, modes=["rev"], atol=1e-5, rtol=1e-5)
        batch = tuple(jnp.stack([one, 2.0 * one]) for one in arguments)
        weight = jnp.asarray(rng.normal(size=(SIZE, 2)))
        gradient = jax.grad(lambda *given: (jax.vmap(solved)(*given) * weight[None]).sum(), (0, 1))
        alone = jax.grad(lambda *given: (solved(*given) * weight).sum(), (0, 1))
        for found, expected in zip(gradient(*batch), alone(*arguments), strict=True):
            np.testing.assert_allclose(found[0], expected, rtol=1e-9, atol=1e-12)
