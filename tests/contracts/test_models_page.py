"""The page on models says which method takes which model; the code agrees, row by row."""

import re
from pathlib import Path

import jax
import numpy as np
import numpyro.distributions as dist
import pytest

import bayes_simfluence as bs
from bayes_simfluence.evaluation.synthetic import linear_runs
from bayes_simfluence.inference import collapsed, exact, nuts, ridge, stack
from bayes_simfluence.inference.svi import SVI
from bayes_simfluence.model.noise import ERRORS
from bayes_simfluence.model.priors import PRIORS

PAGE = (Path(__file__).parents[2] / "docs/models.md").read_text("utf-8")
TRAIN = 4
NAMES = {
    "Simfluence": bs.Simfluence,
    "Exposure": bs.Exposure,
    "Varying": bs.Varying,
    "priors": bs.priors,
    "noise": bs.noise,
    "EMBEDDINGS": np.eye(TRAIN),
    "MATRIX": np.ones((TRAIN, 1)),
    "NUMPYRO": dist.Normal(0.0, 0.1),
}
METHODS = {
    "Exact": [
        bs.Exact(),
        bs.Exact(hyperparameters="evidence"),
        bs.Exact(hyperparameters="nuts"),
        bs.Stack(),
    ],
    "NUTS": [bs.NUTS(warmup=1, draws=1, chains=1)],
    "SVI": [bs.SVI(steps=1)],
    "Ridge": [bs.Ridge()],
}


class Taken(Exception):
    """A method went to work."""


@pytest.fixture(autouse=True)
def nothing_is_fitted(monkeypatch):
    """Every method stops where its checks are over and the work would start."""

    def work(*args, **kwargs):
        raise Taken

    monkeypatch.setattr(exact, "fitted_gaussian", work)
    monkeypatch.setattr(stack, "fitted_gaussian", work)
    monkeypatch.setattr(exact, "_regression", work)
    monkeypatch.setattr(collapsed, "sample", work)
    monkeypatch.setattr(nuts, "sample", work)
    monkeypatch.setattr(SVI, "_descend", work)
    monkeypatch.setattr(ridge, "ridge_weights", work)


@pytest.fixture(scope="module")
def runs():
    return linear_runs(
        key=jax.random.key(0), runs=2, train=TRAIN, query=1, per_run=2, batch_size=1, epochs=2
    )[0]


def rows_after(heading):
    """Cells of the table whose header starts so."""
    lines = PAGE[PAGE.index(f"\n| {heading}") + 1 :].split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def claims():
    """(model's code, methods that take it) of both tables."""
    (_, *errors), _, *rows = rows_after("prior | `noise.Smooth()`")
    for prior, *cells in rows:
        for error, cell in zip(errors, cells, strict=True):
            yield f"Simfluence(prior={prior.strip('`')}, error={error.strip('`')})", cell
    for model, cell in rows_after("model | taken by")[2:]:
        yield model.strip("`"), cell


@pytest.mark.parametrize(("code", "cell"), list(claims()))
def test_a_method_takes_the_models_that_the_page_says(code, cell, runs):
    model = eval(code, dict(NAMES))
    methods = set() if cell == "none" else set(cell.split(", "))
    assert methods <= set(METHODS)
    for name, settings in METHODS.items():
        for method in settings:
            with pytest.raises(Taken if name in methods else bs.Misuse):
                bs.fit(runs, model=model, method=method, key=jax.random.key(0))


def test_the_table_has_every_prior_and_error():
    (_, *errors), _, *rows = rows_after("prior | `noise.Smooth()`")
    classes = set(re.findall(r"priors\.(\w+)", " ".join(row[0] for row in rows)))
    assert classes == {prior.__name__ for prior in PRIORS.values()}
    assert set(re.findall(r"noise\.(\w+)", " ".join(errors))) == {
        error.__name__ for error in ERRORS.values()
    }


def test_the_tails_that_the_page_gives_are_those_of_the_priors():
    """The share beyond is 1%, both sides together, in units of each law's own scale."""
    assert dist.Normal(0.0, 1.0).icdf(0.995) == pytest.approx(2.6, abs=0.05)
    from scipy.stats import laplace, t

    assert t.ppf(0.995, 4) == pytest.approx(4.6, abs=0.05)
    # Normal with an exponential variance of mean one: Laplace of unit sd.
    assert laplace.ppf(0.995, scale=1 / np.sqrt(2)) == pytest.approx(3.3, abs=0.05)
    half = laplace.ppf(0.75, scale=1 / np.sqrt(2)) / dist.Normal(0.0, 1.0).icdf(0.75)
    assert half == pytest.approx(0.73, abs=0.01)
