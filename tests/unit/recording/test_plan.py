"""When a recording does what, and which runs it was asked for."""

import numpy as np
import pytest

from bayes_simfluence.checks import Misuse
from bayes_simfluence.recording.plan import Plan, chosen_runs, units
from bayes_simfluence.recording.settings import Evaluation


def planned(steps, **settings):
    return Plan(steps, Evaluation(**settings))


def test_queries_are_measured_at_the_start_every_so_often_and_at_the_end():
    assert planned(5, evaluate_every=2).times == [0, 2, 4, 5]
    assert planned(4, evaluate_every=2).times == [0, 2, 4]
    assert planned(3, evaluate_every=9).times == [0, 3]
    assert Plan(2).times == [0, 1, 2]
    assert Plan(5).score_times == [0, 5]
    assert planned(5, scores_every=3).score_times == [0, 3, 5]


def test_checkpoints_stand_in_the_middle_of_equal_parts():
    assert planned(96, checkpoints=1).saved == {48: 49}
    assert planned(3, checkpoints=3).saved == {0: 1, 1: 2, 2: 3}
    assert Plan(7).saved == {}


@pytest.mark.parametrize("steps", [1, 15, 16, 17, 97])
def test_stretches_cover_all_steps_and_never_cross_a_stop(steps, rng):
    stops = rng.integers(0, steps + 1, 4).tolist()
    stretches = list(Plan(steps).stretches(stops))
    covered = [at for first, last in stretches for at in range(first, last)]
    assert covered == list(range(steps))
    assert {*stops} <= {0, *(last for _, last in stretches)}
    assert max(last - first for first, last in stretches) <= Plan(steps).longest


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"evaluate_every": 0}, "evaluate_every: got 0"),
        ({"scores_every": -1}, "scores_every: got -1"),
        ({"checkpoints": 5}, "at most the 4 steps"),
    ],
)
def test_impossible_plans_are_refused(settings, match):
    with pytest.raises(Misuse, match=match):
        planned(4, **settings).validate()


def test_units_hold_the_same_runs_whatever_is_recorded():
    assert units(4, 1) == [[0], [1], [2], [3]]
    assert units(5, 3) == [[0, 1, 2], [3, 4, 4]]


def test_runs_are_chosen_by_slice_or_number():
    assert np.flatnonzero(chosen_runs(None, 3)).tolist() == [0, 1, 2]
    assert np.flatnonzero(chosen_runs(slice(1, None), 3)).tolist() == [1, 2]
    assert np.flatnonzero(chosen_runs(np.array([2, 0]), 3)).tolist() == [0, 2]


@pytest.mark.parametrize("runs", [[], [3], [-1], slice(5, 9)])
def test_runs_that_are_not_there_are_refused(runs):
    with pytest.raises(Misuse, match=r"numbers among 0\.\.2"):
        chosen_runs(runs, 3)
