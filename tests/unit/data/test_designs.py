"""Designs: each kind does what its name says, and all of them fit into one recording."""

from collections import Counter

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bayes_simfluence.checks import Misuse
from bayes_simfluence.conventions import EMPTY_SLOT
from bayes_simfluence.data import designs
from bayes_simfluence.data.curriculum import random_subset_epochs
from bayes_simfluence.data.designs import KINDS, checked_shares, diverse, random

EXAMPLES, CLASSES = 40, 3
SIZES = {"per_run": 18, "batch_size": 4, "epochs": 3}
LABELS = np.random.default_rng(0).integers(0, CLASSES, EXAMPLES)
FEATURES = np.random.default_rng(1).normal(size=(EXAMPLES, 5)) * [9.0, 3.0, 0.1, 0.1, 0.1]


def all_of(kind, runs=6, **given):
    """A design of one kind, and the random one that it rearranges."""
    given = {"labels": LABELS, "key": jax.random.key(4), **SIZES, **given}
    design = diverse(EXAMPLES, runs=runs, shares={kind: 1.0}, **given)
    plain = {name: given[name] for name in (*SIZES, "key")}
    return design, random(EXAMPLES, runs=runs, **plain)


def filled(batch):
    return batch[batch != EMPTY_SLOT]


def blocks_in(values):
    """How many stretches of one value there are."""
    return 1 + int((np.diff(values) != 0).sum())


def test_the_random_design_is_random_subsets_in_epochs(key):
    design = random(EXAMPLES, runs=3, **SIZES, key=key)
    expected = [
        random_subset_epochs(EXAMPLES, **SIZES, key=one) for one in jax.random.split(key, 3)
    ]
    np.testing.assert_array_equal(design.curricula, expected)
    assert design.kinds == ("random",) * 3


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_fits_into_the_recording_of_the_random_design(kind):
    design, plain = all_of(kind)
    assert design.kinds == (kind,) * 6
    assert design.curricula.dtype == plain.curricula.dtype
    np.testing.assert_array_equal(design.curricula == EMPTY_SLOT, plain.curricula == EMPTY_SLOT)
    assert (plain.curricula == EMPTY_SLOT).any()
    for run, like in zip(design.curricula, plain.curricula, strict=True):
        assert set(filled(run)) <= set(filled(like))
    again, _ = all_of(kind)
    np.testing.assert_array_equal(again.curricula, design.curricula)
    other, _ = all_of(kind, key=jax.random.key(5))
    assert not np.array_equal(other.curricula, design.curricula)


def test_sorted_runs_are_one_class_after_the_other():
    design, plain = all_of("sorted", runs=12)
    orders = set()
    for run, like in zip(design.curricula, plain.curricula, strict=True):
        classes = LABELS[filled(run)]
        assert blocks_in(classes) == CLASSES
        assert Counter(filled(run)) == Counter(filled(like))
        orders.add(tuple(dict.fromkeys(classes.tolist())))
        # Within a class, epoch after epoch: each example once before any comes again.
        for one in range(CLASSES):
            members = filled(run)[classes == one].reshape(SIZES["epochs"], -1)
            assert all(len(set(epoch)) == len(epoch) for epoch in members)
    assert len(orders) > 1, "the order of classes is drawn"


def test_blocked_runs_have_every_class_as_a_block_in_every_epoch():
    design, plain = all_of("blocked", runs=8)
    orders = set()
    for run, like in zip(design.curricula, plain.curricula, strict=True):
        epochs = filled(run).reshape(SIZES["epochs"], -1)
        for epoch in epochs:
            assert blocks_in(LABELS[epoch]) == CLASSES
            assert set(epoch) == set(filled(like)) and len(set(epoch)) == SIZES["per_run"]
            orders.add(tuple(dict.fromkeys(LABELS[epoch].tolist())))
    assert len(orders) > 1


def test_one_sided_runs_have_a_window_of_one_class():
    design, plain = all_of("one-sided", runs=20)
    steps, windows = design.curricula.shape[1], []
    for run, like in zip(design.curricula, plain.curricula, strict=True):
        other = np.flatnonzero((run != like).any(axis=1))
        # The window is what changed, but for steps that happen to be the same.
        first, end = other[0], other[-1] + 1
        classes = LABELS[filled(run[first:end])]
        assert len(set(classes)) == 1
        assert end - first <= steps // 2
        windows.append((first, end - first, classes[0]))
        members = set(filled(like)[LABELS[filled(like)] == classes[0]])
        assert set(filled(run[first:end])) <= members
        times = Counter(filled(run[first:end]).tolist())
        assert max(times.values()) - min(times[member] for member in members) <= 1
    firsts, lengths, classes = zip(*windows, strict=True)
    assert len(set(firsts)) > 3 and len(set(classes)) == CLASSES
    assert max(lengths) > steps // 4 >= min(lengths) - 2


@pytest.mark.parametrize(("kind", "left"), [("repeated", 4), ("half", 9)])
def test_fewer_examples_come_more_often(kind, left):
    design, plain = all_of(kind)
    for run, like in zip(design.curricula, plain.curricula, strict=True):
        times = Counter(filled(run).tolist())
        assert len(times) == left and sum(times.values()) == len(filled(like))
        assert max(times.values()) - min(times.values()) <= 1


def test_an_eighth_of_a_large_subset_is_repeated():
    sizes = {"per_run": 64, "batch_size": 4, "epochs": 2}
    design = diverse(64, runs=1, **sizes, shares={"repeated": 1}, key=jax.random.key(0))
    assert set(Counter(design.curricula.ravel().tolist()).values()) == {16}


def test_without_classes_examples_are_halved_along_leading_directions():
    design, plain = all_of("sorted", runs=24, labels=None, features=FEATURES)
    centred = FEATURES - FEATURES.mean(axis=0)
    along = centred @ np.linalg.svd(centred)[2].T
    told = Counter()
    for run, like in zip(design.curricula, plain.curricula, strict=True):
        assert Counter(filled(run)) == Counter(filled(like))
        first, second = np.split(filled(run), 2)
        halves = [along[list(set(part))] for part in (first, second)]
        low_1, low_2 = (part.min(axis=0) for part in halves)
        high_1, high_2 = (part.max(axis=0) for part in halves)
        (directions,) = np.nonzero((high_1 < low_2) | (high_2 < low_1))
        assert len(directions) == 1
        told[int(directions[0])] += 1
    # Of the variance nine tenths lie along the first direction and one along the second.
    assert told[0] > told[1] > 0 and set(told) == {0, 1}


def test_labels_count_before_features():
    both, _ = all_of("sorted", features=FEATURES)
    labels, _ = all_of("sorted")
    np.testing.assert_array_equal(both.curricula, labels.curricula)


def test_labels_belong_to_the_examples_that_are_given(key):
    """Texts as labels, examples in no order: those of class b are the even ones."""
    examples = np.random.default_rng(2).permutation(np.arange(10, 40))
    labels = ["b" if example % 2 == 0 else "a" for example in examples]
    sizes = {"per_run": 12, "batch_size": 3, "epochs": 2}
    design = diverse(examples, runs=4, **sizes, labels=labels, shares={"sorted": 1}, key=key)
    for run in design.curricula:
        assert blocks_in(filled(run) % 2) == 2 and filled(run).min() >= 10


@pytest.mark.parametrize(
    ("shares", "runs", "counts"),
    [
        (None, 32, dict.fromkeys(KINDS, 3) | {"random": 16, "sorted": 4}),
        (None, 10, dict.fromkeys(KINDS, 1) | {"random": 5}),
        ({"half": 0.25}, 8, {"random": 6, "half": 2}),
        ({"half": 0.25, "random": 0.75}, 8, {"random": 6, "half": 2}),
        ({"sorted": 0.5, "blocked": 0.5}, 3, {"sorted": 2, "blocked": 1}),
        ({"sorted": 0.3, "blocked": 0.1}, 4, {"random": 3, "sorted": 1}),
        ({}, 2, {"random": 2}),
    ],
)
def test_shares_are_counts(shares, runs, counts, key):
    design = diverse(EXAMPLES, runs=runs, **SIZES, labels=LABELS, shares=shares, key=key)
    assert Counter(design.kinds) == counts


@settings(max_examples=20, deadline=None)
@given(
    parts=st.lists(st.integers(0, 5), min_size=6, max_size=6).filter(any),
    runs=st.integers(1, 40),
)
def test_counts_are_within_one_of_the_shares(parts, runs):
    shares = checked_shares(dict(zip(KINDS, np.array(parts) / sum(parts), strict=True)))
    counts = designs._counts(shares, runs)
    assert sum(counts.values()) == runs
    assert all(abs(counts[kind] - shares[kind] * runs) < 1 for kind in KINDS)


def test_random_runs_of_a_diverse_design_are_those_of_the_random_one(key):
    design = diverse(EXAMPLES, runs=10, **SIZES, labels=LABELS, key=key)
    plain = random(EXAMPLES, runs=10, **SIZES, key=key)
    same = (design.curricula == plain.curricula).all(axis=(1, 2))
    assert tuple(same) == tuple(kind == "random" for kind in design.kinds)
    # Kinds are spread over the runs: a split by number has some of each.
    assert "random" not in design.kinds[:2] or set(design.kinds[:5]) != {"random"}


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"labels": None}, r"labels and features: got neither; .*sorted, blocked, one-sided runs"),
        ({"labels": LABELS[:-1]}, r"labels: .*\(39,\); .*each of 40 examples"),
        ({"labels": LABELS + 0.5}, r"labels: got float64"),
        ({"labels": np.zeros(EXAMPLES, int)}, r"labels: got one class"),
        ({"labels": None, "features": FEATURES[:5]}, r"features: .*\(5, 5\)"),
        ({"labels": None, "features": np.full((40, 2), np.nan)}, r"features: .*not finite"),
        ({"labels": None, "features": np.ones((40, 2))}, r"features: got the same for all"),
        ({"labels": None, "features": np.zeros((40, 0))}, r"features: got the same for all"),
        ({"shares": {"shuffled": 0.5}}, r"kind in shares: got 'shuffled'; .*one-sided"),
        ({"shares": {"half": -0.1}}, r"shares\['half'\]: got -0.1"),
        ({"shares": {"half": float("nan")}}, r"shares\['half'\]: got nan"),
        ({"shares": {"half": 0.7, "sorted": 0.7}}, r"shares: got a sum of 1.4"),
        ({"shares": {"half": 0.2, "random": 0.5}}, r"shares: got a sum of 0.7; .*leave out random"),
        ({"per_run": 4}, r"per_run: got 4; expected at least 5 for repeated runs"),
        ({"per_run": 1, "shares": {"half": 0.5}}, r"per_run: got 1; .*2 for half runs"),
        ({"per_run": 41}, r"per_run: got 41"),
        ({"runs": 0}, r"runs: got 0"),
        ({"batch_size": 0}, r"batch_size: got 0"),
        ({"epochs": 0}, r"epochs: got 0"),
    ],
)
def test_what_does_not_fit_is_refused(given, match, key):
    settings = {"runs": 4, "labels": LABELS, "key": key, **SIZES, **given}
    with pytest.raises(Misuse, match=match):
        diverse(EXAMPLES, **settings)


def test_kinds_that_tell_nothing_apart_need_no_labels(key):
    design = diverse(EXAMPLES, runs=4, **SIZES, shares={"half": 0.5, "repeated": 0.25}, key=key)
    assert Counter(design.kinds) == {"half": 2, "repeated": 1, "random": 1}
