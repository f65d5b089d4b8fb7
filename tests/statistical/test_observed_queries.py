"""Some losses of new runs are known: the others are known better, and their bands hold.

The table of ``docs/models.md`` is what ``-s`` prints. The rule by which observed losses are trusted
was settled on SST-2 and COPA, and looked at once more (its standard errors) after TREC and LoRA;
those with IA3 had no part in it.
"""

from dataclasses import replace

import jax
import numpy as np
import pytest

import bayes_simfluence as bs
from bayes_simfluence.gaussian.trust import AS_MODELLED

pytestmark = pytest.mark.statistical
NEW, EVERY = 6, 12
ENOUGH = 0.84
"""Of six runs: at a cover of .9 that varies by .05 from run to run, 3 sd below."""
RECORDINGS = [
    ("copa", 14),
    ("sst2", 14),
    ("sst2", 25),
    ("trec", 14),
    ("trec", 25),
    ("sst2-lora", 14),
    ("trec-ia3", 14),
    ("copa-ia3", 14),
]


def judged(posterior, held_out, observed, query, times):
    """MSE and width, cover of the 90% band of each query and of their mean."""
    simulated = posterior.simulate(held_out, key=jax.random.key(1), draws=100, observed=observed)
    drawn = simulated["loss"].values[0][:, :, times][..., query]
    truth = held_out["loss"].values[:, times][..., query]

    def inside(drawn, truth):
        low, high = np.quantile(drawn, [0.05, 0.95], axis=0)
        return ((truth >= low) & (truth <= high)).mean()

    low, middle, high = np.quantile(drawn, [0.05, 0.5, 0.95], axis=0)
    return {
        "mse": np.square(middle - truth).mean(),
        "width": (high - low).mean(),
        "single": inside(drawn, truth),
        "mean": inside(drawn.mean(axis=-1), truth.mean(axis=-1)),
    }


@pytest.mark.parametrize(("recording", "fitted"), RECORDINGS)
def test_bands_of_what_was_not_observed_hold(recording, fitted):
    runs = bs.example_runs(recording).isel(run=slice(0, fitted + NEW))
    held_out = runs.isel(run=slice(fitted, None))
    posterior = bs.fit(
        runs.isel(run=slice(0, fitted)), method=bs.Exact(times=8), key=jax.random.key(0)
    )
    trusting = replace(posterior, simulator=replace(posterior.simulator, trust=AS_MODELLED))
    half, queries = held_out.sizes["time"] // 2, np.arange(held_out.sizes["query"])
    loss = held_out["loss"]
    cases = {
        "half of the queries": (
            loss.isel(query=queries[::2], time=slice(None, None, EVERY)),
            queries[1::2],
            slice(1, None),
        ),
        "first half": (loss.isel(time=slice(0, half + 1, EVERY)), queries, slice(half + 1, None)),
    }
    narrowest = 1.0
    for name, (seen, *others) in cases.items():
        before = judged(posterior, held_out, None, *others)
        modelled = judged(trusting, held_out, seen, *others)
        given = judged(posterior, held_out, seen, *others)
        rows = (before, modelled, given)
        covers = (
            " -> ".join(f"{row[what]:.2f}" for row in rows).replace("0.", ".")
            for what in ("single", "mean")
        )
        ratio = given["mse"] / before["mse"]
        print(f"\n| {recording}, {fitted} | {name} | {ratio:.2f} | {' | '.join(covers)} |")
        assert ratio < 0.9
        assert given["width"] < 0.95 * before["width"]
        assert given["single"] > ENOUGH
        # The mean is one number a run: where it is missed before, six runs tell no more.
        assert given["mean"] > min(ENOUGH, before["mean"] - 0.1)
        assert modelled["width"] < 0.95 * given["width"]
        narrowest = min(narrowest, modelled["single"], modelled["mean"])
    # As the model says, bands are too narrow.
    assert narrowest < ENOUGH
