"""What the steps computed of their batches: kept everywhere, and refused where it does not fit."""

import numpy as np
import pytest
import xarray as xr

from bayes_simfluence.checks import Misuse
from bayes_simfluence.conventions import COMPLETE, DIVERGED, OF_TRAINING, VARIABLES
from bayes_simfluence.counterfactual.edits import drop, edit_runs, reverse
from bayes_simfluence.data import store
from bayes_simfluence.data.importers import export_runs, import_runs
from bayes_simfluence.data.runs import planned_runs, runs_from_arrays
from bayes_simfluence.data.training import residuals_of, whole_or_nothing
from bayes_simfluence.data.validation import validate_runs

NAN = float("nan")
BATCH = [[[0, 1], [2, -1]], [[1, 2], [0, 0]]]
LOSS = [[[0.5, 1.0], [2.0, NAN]], [[0.1, 0.2], [0.3, 0.4]]]
RESIDUAL = [[[0.1, 0.2], [0.9, NAN]], [[0.3, 0.4], [0.0, 1.0]]]
UNKNOWN = np.full((2, 2, 2), NAN)


def recorded(train_loss=LOSS, train_residual=RESIDUAL, run_ids=("a", "b"), **more):
    loss = np.linspace(1.0, 0.5, 3)[None, :, None].repeat(2, axis=0)
    return runs_from_arrays(
        batch=BATCH,
        loss=loss,
        train_loss=train_loss,
        train_residual=train_residual,
        run_ids=run_ids,
        **more,
    )


def with_one(values, at, value):
    """A copy with another number at one slot."""
    array = np.array(values)
    array[at] = value
    return array


def test_they_follow_the_schema_and_are_absent_where_not_given():
    runs = recorded()
    for name, given in zip(OF_TRAINING, (LOSS, RESIDUAL), strict=True):
        dims, attrs = VARIABLES[name]
        assert runs[name].dims == dims and runs[name].dtype == np.float32
        assert attrs.items() <= runs[name].attrs.items()
        np.testing.assert_array_equal(runs[name], np.float32(given))
    assert not set(OF_TRAINING) & set(recorded(None, None).data_vars)


def test_residuals_are_the_recorded_ones_then_those_of_the_losses():
    expected = np.nan_to_num(1 - np.exp(-np.array(LOSS)))
    np.testing.assert_allclose(residuals_of(recorded(LOSS, None)), expected, rtol=1e-6)
    np.testing.assert_allclose(residuals_of(recorded()), np.nan_to_num(RESIDUAL), rtol=1e-6)
    np.testing.assert_allclose(residuals_of(recorded(None)), np.nan_to_num(RESIDUAL), rtol=1e-6)
    first_only = [RESIDUAL[0], UNKNOWN[1]]
    mixed = residuals_of(recorded(LOSS, first_only))
    np.testing.assert_allclose(mixed[0], np.nan_to_num(RESIDUAL[0]), rtol=1e-6)
    np.testing.assert_allclose(mixed[1], expected[1], rtol=1e-6)
    assert residuals_of(recorded(None, None)) is None


def test_a_run_of_which_nothing_is_known_is_nan_but_for_its_empty_slots():
    found = residuals_of(recorded([UNKNOWN[0], LOSS[1]], None))
    np.testing.assert_array_equal(np.isnan(found[0]), [[True, True], [True, False]])
    assert found[0, 1, 1] == 0.0 and np.isfinite(found[1]).all()


def test_negative_losses_are_no_cross_entropy_and_infinite_ones_lack_everything():
    found = residuals_of(recorded(with_one(LOSS, (0, 0, 1), -0.5), None))
    assert np.isnan(found[0, 0]).all() and np.isfinite(found[1]).all()
    assert residuals_of(recorded(with_one(LOSS, (0, 0, 1), np.inf), None))[0, 0, 1] == 1.0


def test_slots_without_weight_need_nothing():
    weight = [[[1.0, 0.0], [1.0, 0.0]], [[0.0, 2.0], [1.0, 1.0]]]
    some = with_one(with_one(LOSS, (0, 0, 1), NAN), (1, 0, 0), 9.0)
    found = residuals_of(recorded(some, None, weight=weight))
    assert found[0, 0].tolist() == pytest.approx([1 - np.exp(-0.5), 0.0])
    assert found[1, 0, 0] == 0.0


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"train_loss": np.ones((2, 2))}, r"train_loss: got shape \(2, 2\); expected the shape of"),
        ({"train_loss": [[1.0], [1.0, 2.0]]}, "train_loss: got shape that is not rectangular"),
        ({"train_residual": "much"}, "train_residual: got shape that is not rectangular"),
        (
            {"train_loss": with_one(LOSS, (0, 1, 1), 0.5)},
            r"'train_loss'\]: got 0.5 in run a, step 2, slot 1; expected NaN in slots without",
        ),
        (
            {"train_residual": with_one(RESIDUAL, (0, 1, 1), 0.5)},
            r"'train_residual'\]: got 0.5 in run a, step 2, slot 1; expected NaN in slots without",
        ),
        (
            {"train_loss": with_one(LOSS, (1, 0, 1), NAN)},
            r"'train_loss'\]: got nan in run b, step 1, slot 1; expected .* or at none; .*drop",
        ),
        (
            {"train_residual": with_one(RESIDUAL, (1, 0, 1), NAN)},
            r"'train_residual'\]: got nan in run b, step 1, slot 1",
        ),
        (
            {"train_residual": with_one(RESIDUAL, (0, 0, 0), 1.1)},
            r"got 1.1\S* in run a, step 1, slot 0; expected residuals in \[0, 1\]; .*1 - p",
        ),
        ({"train_residual": with_one(RESIDUAL, (1, 1, 0), -0.1)}, r"residuals in \[0, 1\]"),
        (
            {"train_loss": with_one(LOSS, (0, 0, 0), -0.5)},
            r"'train_loss'\]: got -0.5 in run a, step 1, slot 0; expected losses >= 0 where",
        ),
    ],
)
def test_what_does_not_fit_its_batches_is_refused(given, match):
    with pytest.raises(Misuse, match=match):
        recorded(**given)


def test_integers_and_other_dimensions_of_a_dataset_are_refused():
    runs, dims = recorded(None, None), VARIABLES["train_loss"][0]
    with pytest.raises(Misuse, match=r"'train_loss'\]: got int64; expected floats"):
        validate_runs(runs.assign(train_loss=(dims, np.ones((2, 2, 2), int))))
    with pytest.raises(Misuse, match=r"'train_residual'\]: got dimensions"):
        validate_runs(runs.assign(train_residual=(dims[:2], np.ones((2, 2)))))


def test_rounding_is_no_error_and_leaves_no_trace():
    runs = recorded(train_residual=with_one(RESIDUAL, (0, 0, 0), 1 + 5e-7))
    assert residuals_of(runs).max() == 1.0


def test_a_diverged_run_may_have_gaps():
    partial = with_one(LOSS, (1, 1, 0), NAN)
    runs = recorded(partial, None, status=[COMPLETE, DIVERGED])
    assert np.isnan(runs["train_loss"].values[1, 1, 0])


def test_a_run_with_a_gap_keeps_none():
    values, counted = np.float32([[0.1, 0.2], [0.3, NAN]]), np.ones((2, 2), bool)
    assert np.isnan(whole_or_nothing(values, counted)).all()
    counted[1, 1] = False
    np.testing.assert_array_equal(whole_or_nothing(values, counted), values)


@pytest.mark.parametrize("suffix", ["zarr", "nc"])
def test_they_survive_on_disk_and_select_with_their_runs(tmp_path, suffix):
    runs = recorded(LOSS, [RESIDUAL[0], UNKNOWN[1]])
    write = store.save_runs if suffix == "zarr" else store.export_netcdf
    back = store.open_runs(write(runs, tmp_path / f"runs.{suffix}"))
    xr.testing.assert_identical(back, runs)
    np.testing.assert_array_equal(residuals_of(back.isel(run=[1])), residuals_of(runs)[1:])


@pytest.mark.parametrize("format", ["csv", "parquet", "npz"])
def test_they_survive_in_tables_and_arrays(tmp_path, format):
    runs = recorded(with_one(LOSS, (0, 0, 0), np.inf), [RESIDUAL[0], UNKNOWN[1]])
    back = import_runs(export_runs(runs, tmp_path / f"runs.{format}"))
    xr.testing.assert_identical(back, runs)


@pytest.mark.parametrize("first", [None, LOSS])
@pytest.mark.parametrize("second", [None, LOSS])
def test_appending_writes_nan_where_only_one_side_has_them(tmp_path, first, second):
    path = store.save_runs(recorded(first, None), tmp_path / "runs.zarr")
    store.append_runs(recorded(second, second and RESIDUAL, run_ids=("c", "d")), path)
    both = store.open_runs(path)
    assert ("train_loss" in both) == (first is not None or second is not None)
    if "train_loss" in both:
        expected = [UNKNOWN if losses is None else losses for losses in (first, second)]
        np.testing.assert_array_equal(both["train_loss"], np.float32(np.concatenate(expected)))
    if second:
        np.testing.assert_array_equal(both["train_residual"][:2], UNKNOWN)


def test_plans_and_edits_have_none():
    runs = recorded()
    plans = (planned_runs(runs, BATCH), edit_runs(runs, drop, [1]), edit_runs(runs, reverse))
    for planned in plans:
        assert not set(OF_TRAINING) & set(planned.data_vars)
        assert residuals_of(planned) is None


def table(tmp_path, *rows):
    header = "run,step,examples,query,loss,train_loss,train_residual"
    path = tmp_path / "runs.csv"
    path.write_text("\n".join([header, "r,0,,q,0.9,,", *rows]) + "\n", encoding="utf-8")
    return path


def test_a_tables_numbers_are_listed_like_its_examples(tmp_path):
    rows = ("r,1,a b,q,0.8,2 0.5,", 'r,2,"[""b"", null]",q,0.7,"[3, null]",')
    runs = import_runs(table(tmp_path, *rows))
    np.testing.assert_array_equal(runs["train_loss"], [[[2.0, 0.5], [3.0, NAN]]])
    assert np.isnan(runs["train_residual"]).all()


@pytest.mark.parametrize(
    ("cells", "match"),
    [
        ("2,", r"'train_loss': got 1 numbers at step 1; expected 2, one for each"),
        ("2 x,", r"line 3, column 'train_loss': got '2 x'.*blank means not recorded"),
        (",0.5 2", r"'train_residual'\]: got 2.0 in run r, step 1, slot 1; expected residuals in"),
        ('"[2, null]",', r"'train_loss'\]: got nan in run r, step 1, slot 1; expected a number at"),
    ],
)
def test_a_tables_wrong_numbers_are_named(tmp_path, cells, match):
    with pytest.raises(Misuse, match=match):
        import_runs(table(tmp_path, f"r,1,a b,q,0.8,{cells}"))
