"""Fits of all queries at once against a loop over queries of scikit-learn's BayesianRidge.

50 queries, 200 examples, 2400 transitions (25 runs of 96 steps of the example recording). Times
are those of one machine; what is compared is their ratio. On a machine that is busy with other
work set OPENBLAS_NUM_THREADS=1: threads of BLAS that wait for one another make both ways slower
by any factor.
"""

import time

import jax
import numpy as np
import pytest
from sklearn.linear_model import BayesianRidge

import bayes_simfluence as bs
from bayes_simfluence.linalg import double_precision
from bayes_simfluence.posterior.arrays import recorded_arrays


@pytest.fixture(scope="module")
def runs():
    return bs.example_runs().isel(run=slice(0, 25))


@pytest.fixture(scope="module")
def loop_seconds(runs):
    """Seconds of one BayesianRidge a query on the dense design ``[e L_{t-1}, e]``: the median
    query's, times their number, so that a pause of the machine does not count."""
    with double_precision():
        shares = np.concatenate(recorded_arrays(runs).each(lambda run: run.exposures()))
    loss = np.asarray(runs["loss"].values, float)
    before, after = (one.reshape(len(shares), -1) for one in (loss[:, :-1], loss[:, 1:]))
    seconds = []
    for query in range(before.shape[1]):
        began = time.perf_counter()
        design = np.concatenate([shares * before[:, [query]], shares], axis=1)
        change = after[:, query] - before[:, query]
        BayesianRidge(fit_intercept=False).fit(design, change)
        seconds.append(time.perf_counter() - began)
    return len(seconds) * float(np.median(seconds))


def ratios(benchmark, name, goal, loop_seconds, run):
    """Time ``run`` cold (compilation included) and warm; tell loop seconds over its seconds."""
    jax.clear_caches()
    began = time.perf_counter()
    run()
    cold = time.perf_counter() - began
    benchmark.pedantic(run, rounds=3)
    warm = benchmark.stats.stats.median
    for when, seconds in (("cold", cold), ("warm", warm)):
        ratio = loop_seconds / seconds
        benchmark.extra_info[f"{when}_ratio"] = ratio
        benchmark.extra_info[f"{when}_seconds"] = seconds
        print(
            f"\n{name}, {when}: ratio {ratio:.2f} (goal {goal}), "
            f"{loop_seconds:.2f} s / {seconds:.3f} s",
            end="",
        )


def test_linear_exact_fit(benchmark, runs, loop_seconds):
    model, key = bs.Simfluence.linear(), jax.random.key(0)
    ratios(
        benchmark,
        "Simfluence.linear(), Exact() against BayesianRidge",
        ">= 20",
        loop_seconds,
        lambda: bs.fit(runs, model=model, method=bs.Exact(), key=key),
    )


def test_default_fit(benchmark, runs, loop_seconds):
    ratios(
        benchmark,
        "default model against BayesianRidge",
        ">= 1",
        loop_seconds,
        lambda: bs.fit(runs, key=jax.random.key(0)),
    )
