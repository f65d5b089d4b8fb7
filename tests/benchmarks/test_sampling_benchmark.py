"""Effective draws a second: coefficients integrated out against sampled with all the rest.

50 queries, 200 examples, 25 runs of the example recording, kind linear. The plain sampler moves in
20,100 dimensions; it is given few iterations, whose smallest effective sample size is a rough and,
as its warm-up is short, a kind or unkind guess of what a longer run would have a second.
"""

import time
import warnings

import jax
import pytest

import bayes_simfluence as bs
from bayes_simfluence.checks import FitWarning

GOAL = 20
PLAIN = bs.NUTS(warmup=20, draws=20, chains=1, max_tree_depth=6)
COLLAPSED = bs.NUTS(warmup=500, draws=500, chains=1)


@pytest.fixture(scope="module")
def runs():
    return bs.example_runs().isel(run=slice(0, 25))


def effective(runs, method):
    """Smallest bulk effective sample size of scales, noises and some coefficients; seconds."""
    began = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FitWarning)
        posterior = bs.fit(runs, model=bs.Simfluence.linear(), method=method, key=jax.random.key(0))
    seconds = time.perf_counter() - began
    return posterior.verdict.numbers["ess_bulk"], seconds


def test_collapsed_against_plain(benchmark, runs):
    plain, plain_seconds = effective(runs, PLAIN)
    method = bs.Exact(hyperparameters="nuts", sampler=COLLAPSED)
    found = benchmark.pedantic(effective, (runs, method), rounds=1)
    collapsed, seconds = found
    ratio = (collapsed / seconds) / (plain / plain_seconds)
    benchmark.extra_info["ratio"] = ratio
    print(
        f"\ncollapsed NUTS: {collapsed:.0f} effective draws in {seconds:.0f} s (500 + 500 "
        f"iterations); plain: {plain:.1f} in {plain_seconds:.0f} s (20 + 20); ratio {ratio:.0f} "
        f"(goal {GOAL})",
        end="",
    )
    assert ratio > 1
