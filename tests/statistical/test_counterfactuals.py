"""Far curricula that were really trained: coupled beats additive, and only widened bands hold."""

import runpy
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

import bayes_simfluence as bs

pytestmark = pytest.mark.statistical
EXAMPLE = Path(__file__).parents[2] / "examples" / "09_counterfactuals.py"
FAR = ["sorted by class", "one class only", "sixteen repeated"]
DRAWS, KEY = 200, jax.random.key(0)


@pytest.fixture(scope="module")
def example():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLE.parent))
        return runpy.run_path(str(EXAMPLE))


@pytest.fixture(scope="module")
def made(example, tmp_path_factory):
    """The example's own recordings."""
    folder = tmp_path_factory.mktemp("counterfactuals")
    config = example["demo_settings"](folder, example["DEMO"], 0)
    return example["sorted_out"](example["trained"](folder, config))


@pytest.fixture(scope="module")
def coupled(made):
    return bs.fit(made.fitted["random"], key=KEY)


@pytest.fixture(scope="module")
def additive(made):
    return bs.fit(made.fitted["random"], model=bs.Simfluence(coupling="none"), key=KEY)


@pytest.fixture
def judged(example, made):
    """MSE of the median, cover of single queries over all steps, least support."""

    def judge(posterior, kind):
        runs = made.kinds[kind]
        found = example["simulated"](posterior, runs, KEY, DRAWS)
        truth = runs["loss"].values
        error = np.square(np.median(found.loss, axis=0) - truth)[:, 1:].mean()
        return error, example["covered"](found.loss, truth)[0], found.support.min()

    return judge


def test_examples_that_act_by_their_residuals_predict_better(example, judged, coupled, additive):
    """Measured (docs/counterfactuals.md): .58, .03 and .03 of the additive model's MSE.

    So it fails on runs like the fitted ones: it held with one fit (.23), before the additive model
    was pooled as well and before coupled models had a trend.
    """
    for kind, most in ((example["LIKE"], 0.5), (FAR[0], 0.2), (FAR[1], 0.2)):
        assert judged(coupled, kind)[0] < most * judged(additive, kind)[0], kind


def test_far_bands_hold_because_they_widen(example, judged, coupled):
    """Measured: .99, .98 and .73 with the error that distance adds; .81, .92 and .40 without.

    So bands without it cover more than is demanded here, and it fails: the pool's are wide.
    """
    narrow = replace(coupled, widening=None)
    wide = {kind: judged(coupled, kind) for kind in FAR}
    assert all(support < 0.5 for _, _, support in wide.values())
    covers = [cover for _, cover, _ in wide.values()]
    without = [judged(narrow, kind)[1] for kind in FAR]
    assert np.mean(covers) > 0.85, covers
    assert np.mean(without) < 0.6, without
    # Near the recorded runs nothing is widened.
    assert judged(coupled, example["LIKE"])[1] == judged(narrow, example["LIKE"])[1]
