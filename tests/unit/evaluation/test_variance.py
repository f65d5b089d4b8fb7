"""The split of variance: against a nested analysis of variance, and where a design is poor."""

from itertools import product

import numpy as np
import pytest

import bayes_simfluence as bs
from bayes_simfluence.checks import Misuse
from bayes_simfluence.evaluation.variance import PARTS, _kinds, _parts, variance_split

SIZES = (4, 3, 2, 2)
"""Sets of examples, orders of each, starts of each curriculum, runs of each start."""


def losses_of(rng, sizes, sds):
    """Losses of three queries in a balanced nested design, their parts normal with these sds."""
    loss = np.zeros((*sizes, 3))
    for axis, sd in enumerate(sds):
        shape = (*sizes[: axis + 1], *(1,) * (len(sizes) - axis - 1), 3)
        loss += rng.normal(0.0, sd, shape)
    return loss


def nested(rng, sizes=SIZES, sds=(0.4, 0.2, 0.3, 0.1), shared_starts=False):
    """A balanced design of losses with known parts, and its runs, of three queries."""
    loss = losses_of(rng, sizes, sds)
    loss -= loss.min() - 0.1
    batch, starts = [], []
    for number, (one, order, start, _) in enumerate(product(*map(range, sizes))):
        members = 3 * one + np.roll(np.arange(3), order)
        batch.append(members[:, None])
        starts.append(start if shared_starts else number // sizes[3])
    later = loss.reshape(-1, 1, 3).repeat(4, axis=1)
    later[:, :-1] = 1.0
    return loss, bs.runs_from_arrays(batch=np.array(batch), loss=later, start=starts)


def analysis(loss):
    """Components of variance from mean squares of a balanced nested design (Searle 1971)."""
    queries, components, within = loss.shape[-1], [], 0.0
    for depth in reversed(range(4)):
        below = int(np.prod(loss.shape[depth + 1 : 4]))
        means = loss.mean(axis=tuple(range(depth + 1, 4)))
        off = means - means.mean(axis=depth, keepdims=True)
        groups = int(np.prod(loss.shape[:depth])) * (loss.shape[depth] - 1)
        square = below * np.square(off).sum() / (groups * queries)
        components.append((square - within) / below)
        within = square
    return list(reversed(components))


def test_a_balanced_nested_design_gives_its_analysis_of_variance(rng):
    loss, runs = nested(rng)
    table = variance_split(runs)
    assert table.index.tolist() == [*PARTS, "total"]
    np.testing.assert_allclose(table["variance"].iloc[:4], analysis(loss), rtol=1e-5)
    np.testing.assert_allclose(table["variance"].iloc[4], table["variance"].iloc[:4].sum())
    np.testing.assert_allclose(table["share"], table["variance"] / table["variance"].iloc[4])
    assert (table["sd"] > 0).all()


def test_the_parts_are_unbiased_in_an_unbalanced_design(rng):
    sds = (0.4, 0.2, 0.3, 0.1)
    kept = rng.permutation(int(np.prod(SIZES)))[:36]
    kinds = _kinds(nested(rng)[1].isel(run=kept))
    drawn = [losses_of(rng, SIZES, sds).reshape(-1, 3)[kept] for _ in range(400)]
    found = np.stack([_parts(loss, kinds)[:4] for loss in drawn])
    error = found.mean(axis=0) - np.square(sds)
    # Four standard errors: one part in 16,000 is further off by chance.
    np.testing.assert_array_less(np.abs(error), 4 * found.std(axis=0) / np.sqrt(400))


def test_a_start_that_several_curricula_share_is_no_part_of_their_likeness(rng):
    loss = rng.normal(0.0, 0.3, 40)[:, None]  # of each start, whatever the curriculum
    ends = np.concatenate([2.0 + loss, 2.0 + loss])
    later = np.stack([np.ones_like(ends), ends, ends], axis=1)
    batch = np.repeat([[[0], [1]], [[2], [3]]], 40, axis=0)
    runs = bs.runs_from_arrays(batch=batch, loss=later, start=[*range(40), *range(40)])
    table = variance_split(runs)["variance"]
    assert table["start"] == pytest.approx(np.var(loss, ddof=1))
    assert abs(table["composition"]) < 1e-12


@pytest.mark.parametrize(
    ("sizes", "missing"),
    [((4, 3, 2, 1), ["rounding"]), ((4, 3, 1, 1), ["start", "rounding"])],
)
def test_what_a_design_does_not_tell_apart_is_in_the_part_above(rng, sizes, missing):
    loss, runs = nested(rng, sizes)
    table = variance_split(runs)
    assert table.index[table["variance"].isna()].tolist() == missing
    assert table["variance"].iloc[:4].sum() == pytest.approx(table["variance"]["total"])
    alone = variance_split(runs.isel(run=slice(0, None, int(np.prod(sizes[1:])))))
    assert alone["variance"].isna().tolist() == [False, True, True, True, False]
    first = loss[:, 0, 0, 0]
    assert alone["variance"]["total"] == pytest.approx(first.var(axis=0, ddof=1).mean())


def test_the_order_within_a_batch_and_the_slot_do_not_matter(rng):
    batch = [[[0, 1], [2, -1]], [[1, 0], [-1, 2]], [[3, 4], [5, -1]]]
    loss = 1.0 + rng.random((3, 3, 1))
    runs = bs.runs_from_arrays(batch=batch, loss=loss)
    assert variance_split(runs)["variance"]["rounding"] == pytest.approx(
        0.5 * float(loss[0, 2, 0] - loss[1, 2, 0]) ** 2
    )


def test_a_time_before_the_end(rng):
    _, runs = nested(rng)
    assert variance_split(runs, time=2)["variance"]["total"] == 0.0


def test_runs_that_say_nothing_are_refused(rng):
    _, runs = nested(rng)
    with pytest.raises(Misuse, match="one set of training examples"):
        variance_split(runs.isel(run=slice(0, 6)))
    for time in (0, 4):
        with pytest.raises(Misuse, match=f"time: got {time}"):
            variance_split(runs, time=time)
