"""Curvature by hand, solvers against the dense solve, influence against retraining."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bayes_simfluence.attribution.gradients.per_example import flat
from bayes_simfluence.attribution.influence.curvature import (
    CurvatureProduct,
    Operands,
    dense_curvature,
    mean_eigenvalue,
    output_slopes,
)
from bayes_simfluence.attribution.influence.influence_functions import (
    Arnoldi,
    ConjugateGradient,
    Dense,
    InGram,
    LiSSA,
    influence,
)
from bayes_simfluence.attribution.influence.problem import Problem
from bayes_simfluence.checks import Misuse, WorkFailed
from bayes_simfluence.networks.layers import dense
from bayes_simfluence.progress import Silent
from bayes_simfluence.tasks.task import Task

TRAIN, QUERY, INWARD, WIDTH, CLASSES = 21, 4, 3, 4, 3
DAMPING = 0.05
WEIGHTS = WIDTH * (INWARD + 1) + CLASSES * (WIDTH + 1)
FLAT = WIDTH + 1
"""Directions in which all logits grow alike."""


def outputs(weights, example):
    return dense(weights, "two", jnp.tanh(dense(weights, "one", example["x"])))


def output_loss(logits, example):
    return -jax.nn.log_softmax(logits)[example["y"]]


@pytest.fixture(scope="module")
def task():
    """A network of two layers with a softmax, 21 examples: the last piece of 16 is filled up."""
    rng = np.random.default_rng(0)
    data = {
        "x": jnp.asarray(rng.normal(size=(TRAIN + QUERY, INWARD)), jnp.float32),
        "y": jnp.asarray(rng.integers(CLASSES, size=TRAIN + QUERY)),
    }
    shapes = {"one.weight": (WIDTH, INWARD), "one.bias": (WIDTH,)}
    shapes |= {"two.weight": (CLASSES, WIDTH), "two.bias": (CLASSES,)}
    return Task(
        params={name: jnp.asarray(rng.normal(size=at), jnp.float32) for name, at in shapes.items()},
        loss=lambda weights, example: output_loss(outputs(weights, example), example),
        outputs=outputs,
        output_loss=output_loss,
        train=jax.tree.map(lambda leaf: leaf[:TRAIN], data),
        query=jax.tree.map(lambda leaf: leaf[TRAIN:], data),
        train_ids=[f"t{number}" for number in range(TRAIN)],
        query_ids=[f"q{number}" for number in range(QUERY)],
    )


@pytest.fixture(scope="module")
def exact(task):
    return influence(task, solver=Dense(), damping=DAMPING, key=jax.random.key(0))


def broken(task, **changes):
    return dataclasses.replace(task, **changes)


def test_gauss_newton_is_jacobians_around_the_hessian_of_the_softmax(task):
    """Written out with ``diag(p) - p p^T``, one example after another."""
    matrix = dense_curvature(task, task.params, "ggn")
    names = sorted(task.params)
    expected = np.zeros_like(matrix)
    for x in task.train["x"]:
        jacobian = jax.jacrev(lambda params, x=x: outputs(params, {"x": x}))(task.params)
        rows = np.concatenate(
            [np.asarray(jacobian[name]).reshape(CLASSES, -1) for name in names], 1
        )
        shares = np.asarray(jax.nn.softmax(outputs(task.params, {"x": x})))
        expected += rows.T @ (np.diag(shares) - np.outer(shares, shares)) @ rows / TRAIN
    np.testing.assert_allclose(matrix, expected, atol=1e-5)


@pytest.mark.parametrize("curvature", ["ggn", "hessian"])
def test_products_are_those_of_the_matrix_written_out(task, rng, curvature):
    matrix = dense_curvature(task, task.params, curvature)
    np.testing.assert_allclose(matrix, matrix.T, atol=1e-5)
    vectors = jnp.asarray(rng.normal(size=(2, WEIGHTS)), jnp.float32)
    product = CurvatureProduct(task.functions, curvature)
    whole = Operands(task.params, task.frozen, task.train)
    np.testing.assert_allclose(product(whole, vectors), vectors @ matrix, atol=1e-4)
    # A batch has the curvature of its own examples.
    places = jnp.asarray([3, 5])
    some = broken(task, train=jax.tree.map(lambda leaf: leaf[places], task.train), train_ids="ab")
    expected = vectors @ dense_curvature(some, task.params, curvature)
    batch = whole._replace(examples=some.train)
    np.testing.assert_allclose(product(batch, vectors), expected, atol=1e-4)


def test_the_trace_is_that_of_the_matrix(task, key):
    expected = np.trace(dense_curvature(task, task.params, "ggn")) / WEIGHTS
    exact = mean_eigenvalue(task, task.params, key, draws=None)
    np.testing.assert_allclose(exact, expected, rtol=1e-4)
    # 21 examples with 200 draws each: a standard error of about 1%.
    drawn = mean_eigenvalue(task, task.params, key, draws=200)
    np.testing.assert_allclose(drawn, expected, rtol=0.05)


def test_slopes_have_the_hessian_of_the_output_loss(task, key):
    logits, example = jnp.asarray([0.3, -1.0, 2.0]), {"y": jnp.asarray(1)}
    expected = jax.hessian(lambda at: output_loss(at, example))(logits)
    whole = output_slopes(task.functions, logits, example, key, None)
    np.testing.assert_allclose(whole.T @ whole, expected, atol=1e-6)
    drawn = output_slopes(task.functions, logits, example, key, 20_000)
    np.testing.assert_allclose(drawn.T @ drawn, expected, atol=0.01)
    # Two classes leave one direction: every single draw is exact.
    two = jnp.asarray([0.3, -1.0])
    drawn = output_slopes(task.functions, two, example, key, 1)
    expected = jax.hessian(lambda at: output_loss(at, example))(two)
    np.testing.assert_allclose(drawn.T @ drawn, expected, atol=1e-6)


def test_scores_are_the_formula(task, exact):
    matrix = dense_curvature(task, task.params, "ggn")
    train, query = (
        np.stack(
            [
                flat(jax.grad(task.loss)(task.params, {"x": x, "y": y}))
                for x, y in zip(some["x"], some["y"], strict=True)
            ]
        )
        for some in (task.train, task.query)
    )
    damped = matrix + DAMPING * np.eye(WEIGHTS)
    expected = -train @ np.linalg.solve(damped, query.T) / TRAIN
    np.testing.assert_allclose(exact, expected, rtol=1e-3, atol=1e-6)
    assert exact.attrs["damping"] == DAMPING
    assert exact.attrs["curvature"] == "ggn"
    assert exact.attrs["sign"].startswith("negative = helpful")


SOLVERS = {
    "exact, in Gram coordinates": InGram(),
    "dense in Gram coordinates": InGram(Dense()),
    "conjugate gradients in Gram coordinates": InGram(ConjugateGradient(tolerance=1e-6)),
    "LiSSA in Gram coordinates": InGram(LiSSA(depth=800, scale=2.0, batch=None)),
    "Arnoldi in Gram coordinates": InGram(Arnoldi(rank=WEIGHTS - FLAT, iterations=WEIGHTS)),
    "conjugate gradients": ConjugateGradient(tolerance=1e-6),
    "LiSSA": LiSSA(depth=800, scale=2.0, batch=None),
    "Arnoldi": Arnoldi(rank=WEIGHTS, iterations=WEIGHTS),
}


@pytest.mark.parametrize("name", SOLVERS)
def test_solvers_against_the_dense_solve(task, exact, key, name):
    memory = 4 * WEIGHTS * 60 if name != "Arnoldi" else 2**20
    scores = influence(task, solver=SOLVERS[name], damping=DAMPING, key=key, memory=memory)
    np.testing.assert_allclose(scores, exact, atol=2e-4 * float(np.abs(exact).max()))
    assert scores.attrs["damping"] == DAMPING
    assert name in scores.attrs["method"]


@pytest.mark.parametrize("solver", [ConjugateGradient(1e-6), LiSSA(800, 2.0, batch=None)])
def test_iterations_stay_on_the_device(task, key, solver):
    """However many there are, the product is traced a single time."""
    with Silent().work("", None) as meter:
        problem = Problem(task, task.params, "ggn", DAMPING, key, 2**20, meter)
    traced, product = [], problem.product
    vars(problem)["product"] = lambda *args: traced.append(args) or product(*args)
    solver.solve(problem)
    assert len(traced) == 1


def test_conjugate_gradients_say_whether_they_converged(task, exact, key):
    scores, stopped = (
        influence(task, solver=ConjugateGradient(1e-4, steps), damping=DAMPING, key=key)
        for steps in (200, 3)
    )
    assert scores.attrs["converged"] is True and scores.attrs["residual"] <= 1e-4
    assert stopped.attrs["converged"] is False and stopped.attrs["residual"] > 1e-4


@pytest.mark.parametrize(("tolerance", "converges"), [(1e-3, True), (1e-12, False)])
def test_convergence_is_that_of_the_solution(rng, tolerance, converges):
    """The recurrence alone would go on to 0, where rounding keeps the solution from that."""
    matrix = jnp.asarray(np.diag(np.logspace(-2, 2, 30)), jnp.float32)
    b = jnp.asarray(rng.normal(size=(1, 30)), jnp.float32)
    operands, solver = Operands(matrix, None, None), ConjugateGradient(tolerance, 500)
    done, reached = solver._descend(lambda some, v: v @ some.params, operands, b, 0.0)
    residual = np.linalg.norm(np.asarray(b, float) - np.asarray(done.x, float) @ matrix)
    np.testing.assert_allclose(np.sqrt(done.gamma[0]), residual, rtol=1e-4, atol=1e-6)
    assert bool(reached[0]) is converges and (int(done.steps) < 500) is converges
    assert residual < 1.1 * max(tolerance * np.linalg.norm(b), 1e-6)


@pytest.mark.parametrize("solver", [ConjugateGradient(1e-6), LiSSA(800, 2.0, batch=None)])
def test_solvers_of_the_hessian(task, key, solver):
    largest = np.linalg.eigvalsh(dense_curvature(task, task.params, "hessian"))[0]
    damping = 0.1 - float(largest)
    settings = {"curvature": "hessian", "damping": damping, "key": key}
    scores = influence(task, solver=solver, **settings)
    exact = influence(task, solver=Dense(), **settings)
    np.testing.assert_allclose(scores, exact, atol=5e-4 * float(np.abs(exact).max()))


def test_batches_of_lissa_average_to_the_dense_solve(task, exact, key):
    solver = LiSSA(depth=100, scale=2.0, repeats=10, batch=7)
    scores = influence(task, solver=solver, damping=DAMPING, key=key)
    assert np.corrcoef(scores.values.ravel(), exact.values.ravel())[0, 1] > 0.95
    assert {"scale": 2.0, "depth": 100, "repeats": 10, "batch": 7}.items() <= scores.attrs.items()


def test_a_few_eigenvectors_are_those_of_largest_eigenvalue(task, key):
    scores = influence(task, solver=Arnoldi(3, WEIGHTS), damping=DAMPING, key=key)
    values = np.linalg.eigvalsh(dense_curvature(task, task.params, "ggn"))[::-1]
    np.testing.assert_allclose(scores.attrs["largest"], values[0] + DAMPING, rtol=1e-3)
    np.testing.assert_allclose(scores.attrs["smallest"], values[2] + DAMPING, rtol=1e-3)


@pytest.fixture(scope="module")
def least_squares():
    """Linear regression at its optimum; half of the squared error, so the Hessian is X^T X / n."""
    rng = np.random.default_rng(1)
    x, noise = rng.normal(size=(TRAIN + QUERY, INWARD)), rng.normal(size=TRAIN + QUERY)
    y = x @ np.array([1.0, -2.0, 0.5]) + noise

    def outputs(weights, example):
        return (weights @ example["x"])[None]

    def output_loss(output, example):
        return 0.5 * (output[0] - example["y"]) ** 2

    data = {"x": jnp.asarray(x, jnp.float32), "y": jnp.asarray(y, jnp.float32)}
    task = Task(
        params=jnp.asarray(np.linalg.lstsq(x[:TRAIN], y[:TRAIN])[0], jnp.float32),
        loss=lambda weights, example: output_loss(outputs(weights, example), example),
        outputs=outputs,
        output_loss=output_loss,
        train=jax.tree.map(lambda leaf: leaf[:TRAIN], data),
        query=jax.tree.map(lambda leaf: leaf[TRAIN:], data),
        train_ids=range(TRAIN),
        query_ids=range(QUERY),
    )
    return task, x, y


@pytest.mark.parametrize("curvature", ["ggn", "hessian"])
def test_influence_is_the_slope_of_retraining(least_squares, key, curvature):
    """Least squares solved again with a little more and a little less weight on an example."""
    task, x, y = least_squares
    scores = influence(task, solver=Dense(), curvature=curvature, damping=0.0, key=key)

    def losses(weights):
        root = np.sqrt(weights)
        best = np.linalg.lstsq(x[:TRAIN] * root[:, None], y[:TRAIN] * root)[0]
        return 0.5 * (x[TRAIN:] @ best - y[TRAIN:]) ** 2

    step = 1e-3
    expected = np.stack(
        [(losses(1 + step * unit) - losses(1 - step * unit)) / (2 * step) for unit in np.eye(TRAIN)]
    )
    np.testing.assert_allclose(scores, expected, rtol=2e-3, atol=1e-5)


class TestMisuse:
    def test_gauss_newton_without_outputs(self, task, key):
        with pytest.raises(Misuse, match=r"without outputs .* take curvature='hessian'"):
            influence(broken(task, outputs=None, output_loss=None), damping=0.1, key=key)

    def test_parts_that_do_not_make_the_loss(self, task, key):
        wrong = broken(task, output_loss=lambda logits, example: -2 * jax.nn.log_softmax(logits)[0])
        with pytest.raises(Misuse, match=r"task.output_loss: got .* training example t0"):
            influence(wrong, damping=0.1, key=key)

    def test_one_part_alone(self, task):
        with pytest.raises(Misuse, match=r"got task.outputs alone"):
            broken(task, output_loss=None).validate()
        assert task.validate() is task

    def test_outputs_that_are_no_array(self, task):
        with pytest.raises(Misuse, match=r"expected one floating array"):
            broken(task, outputs=lambda weights, example: (0, 1)).validate()

    @pytest.mark.parametrize("damping", [-1.0, float("nan")])
    def test_impossible_damping(self, task, key, damping):
        with pytest.raises(Misuse, match=r"damping: got .* >= 0"):
            influence(task, damping=damping, key=key)

    def test_no_damping_of_a_curvature_of_low_rank(self, task, key):
        few = broken(task, train=jax.tree.map(lambda leaf: leaf[:5], task.train), train_ids="abcde")
        with pytest.raises(Misuse, match=r"damping: got 0 for a curvature of rank 15 at most"):
            influence(few, damping=0.0, key=key)
        with pytest.raises(Misuse, match=r"the Hessian's eigenvalues have either sign"):
            influence(few, curvature="hessian", key=key)

    @pytest.mark.parametrize("solver", [Dense(), Arnoldi(WEIGHTS, WEIGHTS)])
    def test_no_damping_of_a_singular_curvature(self, task, key, solver):
        """Adding the same to all logits changes nothing, so three directions are flat."""
        with pytest.raises(WorkFailed, match=r"cannot be inverted: raise damping by more than"):
            influence(task, solver=solver, damping=0.0, key=key)

    def test_negative_curvature(self, task, key):
        with pytest.raises(WorkFailed, match=r"not positive: raise damping by .* curvature='ggn'"):
            influence(task, curvature="hessian", damping=0.0, key=key)
        with pytest.raises(WorkFailed, match=r"or take curvature='ggn'"):
            influence(task, solver=Dense(), curvature="hessian", damping=0.0, key=key)

    def test_lissa_diverges(self, task, key):
        with pytest.raises(WorkFailed, match=r"diverged .* raise scale \(now 0.01\) above \d"):
            influence(task, solver=LiSSA(200, 0.01, batch=None), damping=DAMPING, key=key)
        with pytest.raises(WorkFailed, match=r"diverged .* raise damping"):
            influence(
                task, solver=LiSSA(3000, 1.0, batch=None), curvature="hessian", damping=0.0, key=key
            )

    @pytest.mark.parametrize(
        "solver", [Dense(), InGram(), ConjugateGradient(), LiSSA(), Arnoldi(3)]
    )
    def test_a_gradient_that_is_not_finite(self, task, key, solver):
        train = {**task.train, "x": task.train["x"].at[17].set(np.nan)}
        with pytest.raises(Misuse, match=r"gradient of train example t17"):
            influence(broken(task, train=train), solver=solver, damping=DAMPING, key=key)

    def test_a_querys_gradient_that_is_not_finite(self, task, key):
        query = {**task.query, "x": task.query["x"].at[2].set(np.inf)}
        with pytest.raises(Misuse, match=r"gradient of query example q2"):
            influence(broken(task, query=query), damping=DAMPING, key=key)

    def test_arnoldi_says_the_memory_that_it_needs(self, task, key):
        with pytest.raises(Misuse, match=r"memory: got 1000 bytes for 10 vectors .* pass memory="):
            influence(task, solver=Arnoldi(5), damping=DAMPING, key=key, memory=1000)
