"""What ``fit`` checks and says, whatever the method."""

import jax
import numpy as np
import pytest

import bayes_simfluence as bs
from bayes_simfluence.checks import Misuse, RunsWarning
from bayes_simfluence.evaluation.synthetic import linear_runs


@pytest.fixture
def runs():
    return linear_runs(key=jax.random.key(0), runs=4, train=6, per_run=4)[0]


def test_the_verdict_says_what_curricula_cannot_tell(runs, key):
    doubled = runs.isel(run=[0, 1, 2, 2]).assign_coords(run=list("abcd"))
    verdict = bs.fit(doubled, method=bs.Ridge(penalty=1.0), key=key).verdict
    assert any("same curriculum: c=d" in note for note in verdict.notes)
    assert str(verdict).splitlines()[0] == "Point estimate at penalty 1."
    assert str(verdict).splitlines()[1].startswith("- ")


def test_settings_are_those_of_model_and_method(runs, key):
    model = bs.Simfluence.additive()
    posterior = bs.fit(runs, model=model, method=bs.Ridge(penalty=2.0, folds=3), key=key)
    assert posterior.settings["model"] == model.as_dict()
    assert posterior.settings["method"] == "Ridge" and posterior.settings["penalty"] == 2.0
    default = bs.fit(runs, method=bs.Ridge(penalty=2.0), key=key)
    assert default.settings["model"] == bs.Simfluence.linear().as_dict()


def test_unusable_runs_are_left_out(runs, key):
    runs["loss"].values[1, 4], runs["status"].values[1] = np.nan, 2
    with pytest.warns(RunsWarning, match="1 runs left out, diverged"):
        posterior = bs.fit(runs, method=bs.Ridge(penalty=1.0), key=key)
    assert posterior.runs["run"].values.tolist() == [0, 2, 3]


def test_progress_is_told_and_changes_nothing(runs, key):
    from contextlib import contextmanager

    class Listener:
        done, total = 0, 0

        @contextmanager
        def work(self, label, total):
            assert label
            self.total += total
            yield self

        def advance(self, amount=1, note=""):
            assert note is not None
            self.done += amount

    listener = Listener()
    loud = bs.fit(runs, method=bs.Ridge(folds=2), key=key, progress=listener)
    silent = bs.fit(runs, method=bs.Ridge(folds=2), key=key)
    assert listener.done == listener.total > 0
    np.testing.assert_array_equal(loud.simulator.a, silent.simulator.a)


def unchecked():
    """``fit`` without the checker of types, which only tests have."""
    fit = bs.fit
    while hasattr(fit, "__wrapped__"):
        fit = fit.__wrapped__
    return fit


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"method": "ridge"}, r"method: got str.*not a class or a name"),
        ({"model": 3}, r"model: got int.*Simfluence"),
        ({"key": 0}, r"key: got int.*jax.random.key"),
    ],
)
def test_arguments_of_the_wrong_kind_are_refused(runs, key, settings, match):
    with pytest.raises(Misuse, match=match):
        unchecked()(runs, **{"key": key, **settings})


def test_a_class_is_no_method(runs, key):
    with pytest.raises(Misuse, match=r"not a class or a name"):
        unchecked()(runs, method=bs.Ridge, key=key)
