"""Support: curricula like the recorded ones have it, those that leave them lose it and say why."""

import json
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import xarray as xr

import bayes_simfluence as bs
from bayes_simfluence.checks import Misuse, SupportWarning
from bayes_simfluence.counterfactual.edits import drop, edit_runs, keep, repeat, reverse, upweight
from bayes_simfluence.data.store import EXAMPLES
from bayes_simfluence.model.arrays import exposures
from bayes_simfluence.posterior.arrays import positions_with_new, recorded_arrays
from bayes_simfluence.posterior.courses import course_of, directions_of, features_of
from bayes_simfluence.posterior.departures import ELSEWHERE
from bayes_simfluence.posterior.support import ENOUGH, Recorded, support_of

KEY = jax.random.key(0)
BALANCE = "class balance over a window"
examples = cache(bs.example_runs)


def parts(name="sst2", fitted=16):
    runs = examples(name)
    return runs.isel(run=slice(0, fitted)), runs.isel(run=slice(fitted, None))


def found(fitted, runs):
    return support_of(Recorded.of(fitted), fitted, runs)


def planned(like, batch):
    """Runs with other batches and the recorded step sizes."""
    sizes = np.broadcast_to(like["step_size"].values[0], batch.shape[:2])
    return bs.planned_runs(like, batch.astype(np.int32), step_size=sizes)


def epochs(subset, count, rng):
    return np.concatenate([rng.permutation(subset) for _ in range(count)]).reshape(-1, 4)


def leading(fitted):
    directions = directions_of(recorded_arrays(fitted))
    return directions.coordinates(fitted["train_feature"].values.astype(float))[:, 0]


def by_class(held_out, rng):
    place, batch = leading(held_out), held_out["batch"].values
    return planned(
        held_out,
        np.stack([one[np.argsort(place[one])] for one in batch.reshape(len(batch), -1)]).reshape(
            batch.shape
        ),
    )


def one_class(held_out, rng):
    half = np.flatnonzero(leading(held_out) > np.median(leading(held_out)))[:96]
    return planned(held_out, np.stack([epochs(half, 4, rng) for _ in range(2)]))


FAR = {
    "ten times the step size": (
        lambda runs, rng: runs.assign(step_size=10 * runs["step_size"]),
        "step size",
    ),
    "a tenth of it": (
        lambda runs, rng: runs.assign(step_size=0.1 * runs["step_size"]),
        "step size",
    ),
    "batches of eight": (
        lambda runs, rng: planned(runs, runs["batch"].values.repeat(2, axis=2)),
        "batch size",
    ),
    "batches of two": (
        lambda runs, rng: planned(runs, runs["batch"].values[:, :, :2]),
        "batch size",
    ),
    "three times the steps": (
        lambda runs, rng: edit_runs(runs, repeat, 3, step_size=np.tile(runs["step_size"], (1, 3))),
        "length",
    ),
    "sorted by class": (by_class, BALANCE),
    "one class": (one_class, BALANCE),
    "half the subset twice as often": (
        lambda runs, rng: planned(
            runs, np.stack([epochs(rng.permutation(200)[:64], 6, rng) for _ in range(2)])
        ),
        "repetition",
    ),
    "sixteen examples": (
        lambda runs, rng: planned(
            runs, np.stack([epochs(rng.permutation(200)[:16], 24, rng) for _ in range(2)])
        ),
        "repetition",
    ),
}


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.parametrize("count", [16, 25])
def test_held_out_runs_have_it(name, count):
    fitted, held_out = parts(name, count)
    support = found(fitted, held_out)
    assert (support.value.min(axis=1) < ENOUGH).mean() <= 0.02
    assert support.value.mean() > 0.97 and (support.value[:, 0] == 1).all()
    assert not support.sentence and not any(support.reasons)
    np.testing.assert_array_equal(found(fitted, fitted).value, 1.0)


@pytest.mark.parametrize("name", EXAMPLES)
def test_small_edits_keep_it(name, rng):
    fitted, held_out = parts(name)
    for edit, *arguments in (
        (drop, rng.permutation(200)[:1]),
        (drop, rng.permutation(200)[:16]),
        (reverse,),
        (upweight, {int(rng.integers(200)): 1.5}),
    ):
        ids = arguments
        if edit is drop:
            ids = [held_out["train"].values[arguments[0]]]
        elif edit is upweight:
            ids = [{held_out["train"].values[at]: by for at, by in arguments[0].items()}]
        support = found(fitted, edit_runs(held_out, edit, *ids))
        assert (support.value >= ENOUGH).all(), (edit, support.sentence)


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.parametrize("kind", FAR)
def test_what_leaves_the_recorded_runs_loses_it(name, kind, rng):
    fitted, held_out = parts(name)
    make, reason = FAR[kind]
    support = found(fitted, make(held_out.isel(run=slice(0, 2)), rng))
    assert (support.value[:, -1] < ENOUGH).all()
    assert all(reason in why for why in support.reasons), support.reasons
    assert reason in support.sentence and support.sentence.startswith("2 of 2 runs leave")
    assert (np.diff(support.value, axis=1) <= 0).all() and (support.value > 0).all()


def test_words_name_the_sizes():
    fitted, held_out = parts()
    one = held_out.isel(run=[0])
    for runs, words in (
        (one.assign(step_size=10 * one["step_size"]), "(step size up to 10x)"),
        (one.assign(step_size=0.1 * one["step_size"]), "(step size down to 0.1x)"),
        (planned(one, one["batch"].values.repeat(2, axis=2)), "batch size 8 instead of 4"),
        (
            FAR["three times the steps"][0](one, None),
            "length 288 steps instead of 96; repetition",
        ),
    ):
        assert words in found(fitted, runs).sentence
    assert found(fitted, runs).sentence.startswith("the run leaves what was recorded (")


def test_a_run_keeps_its_support_until_it_leaves():
    fitted, held_out = parts()
    one = held_out.isel(run=[0])
    whole, longer = found(fitted, one).value, found(fitted, edit_runs(one, repeat, 2)).value
    np.testing.assert_array_equal(longer[:, :97], whole)
    assert longer[0, -1] == pytest.approx(0.2)  # Twice as long: four quarters.


def test_examples_that_no_fitted_run_trained_on_are_unseen(rng):
    fitted, held_out = parts()
    one = held_out.isel(run=[0])
    chosen = np.unique(one["batch"].values)[::2]
    names = one["train"].values.astype(object)
    names[chosen] = [f"new {at}" for at in chosen]
    support = found(fitted, one.assign_coords(train=names.astype(str)))
    # Half of all exposure, in units of a quarter.
    assert support.value[0, -1] == pytest.approx(1 / 3, abs=0.02)
    assert support.reasons == [["unseen examples"]] and "54% of" in support.sentence
    renamed, known = one.assign_coords(train=names.astype(str)), fitted["train"].values
    arrays, new = positions_with_new(renamed, known)
    np.testing.assert_array_equal(new, chosen)
    np.testing.assert_array_equal(np.unique(arrays.batch[arrays.batch >= 200]), 200 + np.arange(64))


def test_runs_recorded_in_many_ways_support_more(rng):
    """The same far curricula, once some like them are fitted."""
    fitted, held_out = parts()
    pair = held_out.isel(run=slice(0, 2))
    for kind in ("one class", "sixteen examples", "ten times the step size"):
        far = FAR[kind][0](pair, rng)
        far = far.assign_coords(run=[100, 101])[["batch", "step_size", "loss", "status"]]
        features = fitted[["train_feature", "query_feature"]]
        both = xr.concat([fitted.drop_vars(list(features)), far], "run").merge(features)
        again = FAR[kind][0](pair, rng)
        assert (found(both, again).value[:, -1] > 1.5 * found(fitted, again).value[:, -1]).all()


def test_courses_are_what_dense_exposures_say(rng):
    batch = rng.integers(-1, 6, (3, 9, 4))
    batch[..., 0] = 3
    runs = bs.runs_from_arrays(
        batch=batch,
        loss=np.ones((3, 10, 1)),
        weight=rng.uniform(0.1, 2.0, batch.shape),
        train_ids=range(6),
        train_feature=rng.normal(size=(6, 3)),
        query_feature=np.ones((1, 3)),
    )
    arrays = recorded_arrays(runs)
    directions, features = directions_of(arrays), features_of(arrays)
    course = course_of(arrays, directions, features)
    pairs = zip(jnp.asarray(arrays.batch), jnp.asarray(arrays.weight), strict=True)
    dense = np.stack([exposures(*one, 6) for one in pairs])
    summed = dense.cumsum(axis=1)
    places = {"atol": 1e-6}
    np.testing.assert_allclose(course.most, summed.max(axis=2), **places)
    np.testing.assert_allclose(
        course.repeated, (summed**2).sum(axis=2) / summed.sum(axis=2), **places
    )
    np.testing.assert_allclose(course.place, dense @ directions.coordinates(features), **places)
    np.testing.assert_array_equal(course.filled, (batch >= 0).sum(axis=2))
    assert course.step_size is None and (course.unknown == 0).all()
    coordinates = (features - directions.centre) @ directions.axes
    np.testing.assert_allclose(coordinates.std(axis=0), 1.0, **places)


def mixtures(rng, runs=12):
    """Groups as examples, without features and step sizes."""
    weight = rng.dirichlet(np.full(5, 20.0), runs)[:, None].repeat(16, axis=1)
    batch = np.broadcast_to(np.arange(5), (runs, 16, 5))
    return bs.runs_from_arrays(batch=batch, loss=np.ones((runs, 17, 1)), weight=weight)


def test_few_examples_are_told_apart_without_features(rng):
    fitted, other = mixtures(rng), mixtures(rng)
    assert not found(fitted, other).sentence
    lopsided = other.copy(deep=True)
    lopsided["weight"].values[..., 0] = 20.0
    assert all(BALANCE in why for why in found(fitted, lopsided).reasons)


def test_without_features_many_examples_have_no_balance(rng):
    fitted, held_out = parts()
    plain = fitted.drop_vars(["train_feature", "query_feature"])
    for bare in (plain, plain.drop_vars("step_size")):
        far = one_class(held_out.isel(run=slice(0, 2)), rng)
        quick = far.assign(step_size=10 * far["step_size"])
        names = {name for why in found(bare, quick).reasons for name in why}
        assert BALANCE not in names and ("step size" in names) == ("step_size" in bare)


def test_fitted_runs_with_empty_batches_support_them(rng):
    batch = rng.integers(0, 5, (6, 4, 2))
    batch[0, 2] = batch[1, 1] = -1
    fitted = bs.runs_from_arrays(batch=batch, loss=np.ones((6, 5, 1)))
    np.testing.assert_array_equal(found(fitted, fitted).value, 1.0)


def test_emptied_batches_and_one_fitted_run(rng):
    fitted, held_out = parts(fitted=1)
    few = edit_runs(held_out, keep, held_out["train"].values[:3])
    none = planned(held_out, np.full_like(held_out["batch"].values, -1))
    for runs in (few, none):
        support = found(fitted, runs)
        assert np.isfinite(support.value).all() and "batch size" in support.reasons[0]
    short = held_out.isel(step=slice(0, 3), time=slice(0, 4))
    assert np.isfinite(found(fitted, short).value).all()


@pytest.fixture(scope="module")
def mean():
    return bs.mean_trajectory(parts()[0].isel(query=slice(0, 2)))


@pytest.fixture(scope="module")
def new():
    return parts()[1].isel(query=slice(0, 2))


def quick(runs):
    return runs.assign(step_size=10 * runs["step_size"])


@pytest.mark.parametrize("band", [None, bs.Credible(), "conformal"])
def test_a_simulation_warns_once_and_says_where(mean, new, band):
    band = bs.Conformal(quick(new.isel(run=slice(0, 12)))) if band == "conformal" else band
    mixed = new.isel(run=slice(12, 16)).copy(deep=True)
    mixed["step_size"].values[:3] *= 10
    with pytest.warns(SupportWarning) as told:
        simulated = mean.simulate(mixed, key=KEY, draws=50, band=band)
    (one,) = told
    assert str(one.message) == (
        "3 of 4 runs leave what was recorded (step size up to 10x): bands may be too narrow there. "
        "See support in the result; strict=True refuses."
    )
    support = simulated["support"]
    assert support.dims == ("run", "time") and support.shape == (4, 97)
    assert json.loads(support.attrs["reasons"]) == [["step size"]] * 3 + [[]]
    np.testing.assert_array_equal((support < ENOUGH).any("time"), [True, True, True, False])
    np.testing.assert_array_equal(support["run"], mixed["run"])


def test_another_start_is_told_by_initial_losses(mean, new):
    """Against the definition; a fit to several starts is not surprised by one more."""
    runs, other = mean.runs, new.isel(run=slice(0, 2)).copy(deep=True)
    moved = np.sqrt(np.square(runs["loss"] - runs["loss"].isel(time=0)).mean(("run", "time")))
    size = float(np.sqrt(np.square(moved).mean()))
    other["loss"].values[1] += 2 * size
    support = support_of(Recorded.of(runs), runs, other)
    assert support.reasons == [[], ["initial losses"]]
    assert support.sentence.count(f"initial losses {2 * size:.2g} nats off") == 1
    np.testing.assert_allclose(support.distance[1, 1:], 2 / ELSEWHERE, rtol=1e-5)
    starts = size * np.random.default_rng(0).normal(size=(runs.sizes["run"], 1, 1))
    varied = runs.assign(loss=runs["loss"] + starts)
    assert support_of(Recorded.of(varied), varied, other).reasons == [[], []]
    renamed = other.assign_coords(query=[f"new {name}" for name in other["query"].values])
    assert support_of(Recorded.of(runs), runs, renamed).reasons == [[], []]


def test_strict_refuses_before_any_work(mean, new, monkeypatch):
    with monkeypatch.context() as idle:
        idle.setattr("bayes_simfluence.posterior.posterior.simulated_runs", None)
        refused = r"strict=True: got 16 of 16 runs leave .*step size up to 10x"
        with pytest.raises(Misuse, match=refused):
            mean.simulate(quick(new), key=KEY, strict=True)
    assert float(mean.simulate(new, key=KEY, draws=2, strict=True)["support"].min()) > ENOUGH


def test_a_loaded_posterior_says_the_same(mean, new, tmp_path):
    again = bs.load_posterior(mean.save(tmp_path / "mean.nc"))
    with pytest.warns(SupportWarning):
        expected, found = (one.simulate(quick(new), key=KEY, draws=2) for one in (mean, again))
    xr.testing.assert_identical(expected["support"], found["support"])


def test_a_comparison_warns_once_for_all_methods(mean, new):
    methods = {"mean": mean, "still": bs.persistence(mean.runs), "other": mean}
    with pytest.warns(SupportWarning, match=r"there \(mean, still, other\)\.$") as told:
        bs.compare(methods, quick(new), key=KEY, draws=5, resamples=10)
    assert len(told) == 1
    bs.compare(methods, new, key=KEY, draws=5, resamples=10)
