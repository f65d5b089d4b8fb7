"""Gram coordinates keep every inner product, and solvers go through the same iterates in them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bayes_simfluence.attribution.gradients.per_example import gradient_products
from bayes_simfluence.attribution.influence.curvature import dense_curvature, mean_eigenvalue
from bayes_simfluence.attribution.influence.gram import gram_of
from bayes_simfluence.attribution.influence.influence_functions import (
    EKFAC,
    ConjugateGradient,
    Dense,
    InGram,
    LiSSA,
    influence,
)
from bayes_simfluence.checks import Misuse
from bayes_simfluence.tasks.task import Task

TRAIN, QUERY, INWARD, HIDDEN, OUTPUTS = 7, 3, 5, 8, 3


def outputs(weights, example):
    return weights["out"] @ jnp.tanh(weights["in"] @ example["x"])


def softmax_loss(output, example):
    return -jax.nn.log_softmax(output)[example["y"]]


def tilted_loss(output, example):
    """Curved in the first output alone, and sloping in the others too."""
    return (output[0] - example["y"]) ** 2 + 0.3 * output[1] - 0.2 * output[2]


def made(output_loss):
    rng = np.random.default_rng(3)
    data = {
        "x": jnp.asarray(rng.normal(size=(TRAIN + QUERY, INWARD)), jnp.float32),
        "y": jnp.asarray(rng.integers(OUTPUTS, size=TRAIN + QUERY)),
    }
    shapes = {"in": (HIDDEN, INWARD), "out": (OUTPUTS, HIDDEN)}
    return Task(
        params={
            name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()
        },
        loss=lambda weights, example: output_loss(outputs(weights, example), example),
        outputs=outputs,
        output_loss=output_loss,
        train=jax.tree.map(lambda leaf: leaf[:TRAIN], data),
        query=jax.tree.map(lambda leaf: leaf[TRAIN:], data),
        train_ids=[f"t{number}" for number in range(TRAIN)],
        query_ids=[f"q{number}" for number in range(QUERY)],
    )


@pytest.fixture(scope="module", params=[softmax_loss, tilted_loss])
def task(request):
    return made(request.param)


def test_inner_products_are_those_of_all_weights(task):
    whole = gradient_products(task, task.params)
    small = gram_of(task).task(task)
    products = gradient_products(small, small.params)
    for array, expected in zip(products, whole, strict=True):
        np.testing.assert_allclose(array, expected, atol=1e-4 * np.abs(expected).max())
    # Of few examples, few coordinates: all but one of their queries.
    assert small.params.size <= TRAIN * OUTPUTS + 1


def test_the_curvature_has_the_same_eigenvalues(task, key):
    gram = gram_of(task)
    small = gram.task(task)
    whole = np.linalg.eigvalsh(dense_curvature(task, task.params, "ggn"))[::-1]
    values = np.linalg.eigvalsh(dense_curvature(small, small.params, "ggn"))[::-1]
    size = min(len(whole), len(values))
    np.testing.assert_allclose(values[:size], whole[:size], atol=1e-4 * whole[0])
    expected = mean_eigenvalue(task, task.params, key, draws=None)
    np.testing.assert_allclose(gram.mean_eigenvalue, expected, rtol=1e-4)
    assert gram.largest >= whole[0]
    np.testing.assert_allclose(gram.mean_within, whole.sum() / (small.params.size - 1), rtol=1e-4)


@pytest.mark.parametrize(
    "solver",
    [ConjugateGradient(tolerance=1e-9, iterations=3), LiSSA(depth=5, scale=500.0, batch=2)],
    ids=["conjugate gradients", "LiSSA"],
)
def test_iterates_are_the_same(task, key, solver):
    """Long before they converge."""
    whole = influence(task, solver=solver, damping=0.1, key=key)
    scores = influence(task, solver=InGram(solver), damping=0.1, key=key)
    np.testing.assert_allclose(scores, whole, atol=1e-4 * float(np.abs(whole).max()))
    exact = influence(task, solver=Dense(), damping=0.1, key=key)
    assert float(np.abs(whole - exact).max()) > 1e-2 * float(np.abs(exact).max())


def test_default_damping_is_that_of_all_weights(task, key):
    scores = influence(task, solver=InGram(), key=key)
    whole = influence(task, solver=Dense(), damping=scores.attrs["damping"], key=key)
    expected = 0.1 * mean_eigenvalue(task, task.params, key, draws=None)
    np.testing.assert_allclose(scores.attrs["damping"], expected, rtol=1e-4)
    np.testing.assert_allclose(scores, whole, atol=1e-3 * float(np.abs(whole).max()))


def test_damping_that_is_small_beside_the_curvature(task, key):
    """Too small to invert the whole matrix in single precision."""
    gram = gram_of(task)
    damping = 1e-9 * gram.largest
    scores = influence(task, solver=InGram(gram=gram), damping=damping, key=key)
    rows, train = gram.rows, np.einsum("nk,nka->na", gram.slope, gram.rows)
    matrix = np.einsum("nk,nka,nkb->ab", gram.curved, rows, rows) / TRAIN
    expected = train @ np.linalg.inv(matrix + damping * np.eye(len(matrix))) @ gram.queries.T
    np.testing.assert_allclose(
        scores, -expected / TRAIN, rtol=1e-3, atol=1e-3 * np.abs(scores).max()
    )


def test_coordinates_computed_before(task, key):
    gram = gram_of(task, memory=4000)
    again = influence(task, solver=InGram(gram=gram), damping=0.1, key=key)
    np.testing.assert_allclose(
        again, influence(task, solver=InGram(), damping=0.1, key=key), rtol=1e-3, atol=1e-6
    )


def test_examples_without_gradient(key):
    """Equal logits and equal targets leave nothing: every gradient is 0."""
    task = made(lambda output, example: jnp.zeros(()) * output.sum())
    assert (gram_of(task).task(task).train["rows"] == 0).all()


def test_it_is_what_is_done_where_it_can_be(task, key):
    assert "Gram" in influence(task, damping=0.1, key=key).attrs["solver"]
    plain = influence(task, curvature="hessian", damping=50.0, key=key)
    assert plain.attrs["solver"] == "conjugate gradients"


class TestMisuse:
    def test_coordinates_of_another_task(self, task, key):
        few = dataclasses.replace(
            task, query=jax.tree.map(lambda leaf: leaf[:1], task.query), query_ids=["q"]
        )
        with pytest.raises(Misuse, match=r"gram: got 7 training examples and 3 queries"):
            influence(few, solver=InGram(gram=gram_of(task)), damping=0.1, key=key)

    def test_settings_that_have_no_coordinates(self, task, key):
        with pytest.raises(Misuse, match=r"'hessian' with InGram"):
            influence(task, solver=InGram(), curvature="hessian", damping=0.1, key=key)
        with pytest.raises(Misuse, match=r"EK-FAC where none of the 1 trained parameters"):
            influence(task, solver=InGram(EKFAC()), damping=0.1, key=key)

    def test_a_loss_in_one_part(self, task):
        with pytest.raises(Misuse, match=r"a task without outputs and output_loss"):
            gram_of(dataclasses.replace(task, outputs=None, output_loss=None))

    def test_too_many_outputs(self):
        def tiled(weights, example):
            return jnp.tile(outputs(weights, example), 30)

        wide = dataclasses.replace(
            made(softmax_loss),
            outputs=tiled,
            loss=lambda weights, example: softmax_loss(tiled(weights, example), example),
        )
        with pytest.raises(Misuse, match=r"7 training examples of 90 outputs.* take EKFAC"):
            gram_of(wide)

    def test_a_gradient_that_is_not_finite(self, task):
        query = {**task.query, "x": task.query["x"].at[1].set(np.nan)}
        with pytest.raises(Misuse, match=r"gradient of query example q1"):
            gram_of(dataclasses.replace(task, query=query))
