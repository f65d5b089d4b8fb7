"""Tables and arrays of runs: they come back exactly, and every flaw is named with its place."""

import csv
import json
from functools import partial

import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

from bayes_simfluence.checks import Misuse
from bayes_simfluence.conventions import COMPLETE, DIVERGED, OF_TRAINING
from bayes_simfluence.data.importers import export_runs, import_runs
from bayes_simfluence.data.runs import planned_runs, runs_from_arrays
from bayes_simfluence.data.tables import about_path

FORMATS = ["csv", "parquet", "npz"]
HEADER = "run,step,examples,query,loss,step_size"


def some_ids(draw, size):
    """Numbers, or text with all that troubles a table."""
    text = st.text(st.sampled_from("aZ0 ,;\"'\n\r\t[]#é-"), min_size=1, max_size=4)
    kind = draw(st.sampled_from([st.integers(-(10**9), 10**9), text.filter(str.strip)]))
    ids = draw(st.lists(kind, min_size=size, max_size=size, unique_by=str))
    return np.array(ids)


@st.composite
def recordings(draw):
    """A function that makes runs of small size with anything that a recording may hold.

    Not the runs themselves: the checker of annotations draws at random, which strategies may not.
    """
    runs, steps, slots, train, queries = (draw(st.integers(1, top)) for top in (3, 4, 3, 5, 3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    dtype = draw(st.sampled_from([np.float32, np.float64]))
    loss = np.exp(rng.normal(0.0, 20.0, (runs, steps + 1, queries))).astype(dtype)
    loss[:, 1:-1][rng.random((runs, steps - 1, queries)) < draw(st.floats(0, 1))] = np.nan
    status = np.where(rng.random(runs) < 0.3, DIVERGED, COMPLETE)
    loss[status == DIVERGED] = np.where(
        rng.random((steps + 1, queries)) < 0.5, draw(st.sampled_from([np.nan, np.inf, -np.inf])), 1
    )
    features = draw(st.booleans())
    sizes = rng.random((runs, steps)).astype(np.float32) if draw(st.booleans()) else None
    batch = rng.integers(-1, train, (runs, steps, slots))
    unknown = (batch < 0) | (rng.random((runs, 1, 1)) < 0.3)
    return partial(
        runs_from_arrays,
        batch=batch,
        train_loss=np.where(unknown, np.nan, rng.exponential(size=batch.shape))
        if draw(st.booleans())
        else None,
        train_residual=np.where(unknown, np.nan, rng.random(batch.shape))
        if draw(st.booleans())
        else None,
        loss=loss,
        step_size=sizes,
        weight=rng.uniform(0.1, 3.0, (runs, steps, slots)) if draw(st.booleans()) else None,
        train_ids=some_ids(draw, train),
        query_ids=some_ids(draw, queries),
        run_ids=some_ids(draw, runs),
        train_feature=rng.normal(size=(train, 2)) if features else None,
        query_feature=rng.normal(size=(queries, 2)) if features else None,
        curriculum=rng.choice(["random", "half"], runs) if draw(st.booleans()) else None,
        attrs={"model": "m", "versions": {"jax": "1"}, "labels": ["x", "y"], "seed": 3},
        missing=True,
        status=status,
    )


@settings(max_examples=60, deadline=None)
@given(made=recordings(), format=st.sampled_from(FORMATS))
def test_exported_runs_come_back_exactly(made, format, tmp_path_factory):
    runs = made()
    path = tmp_path_factory.mktemp("runs") / f"runs.{format}"
    assert export_runs(runs, path) == path
    back = import_runs(path)
    xr.testing.assert_identical(back, runs)
    for name in runs.data_vars:
        assert back[name].dtype == runs[name].dtype


@settings(max_examples=40, deadline=None)
@given(made=recordings(), format=st.sampled_from(FORMATS[:2]), seed=st.integers(0, 99))
def test_a_table_alone_in_any_order_has_the_same_numbers(made, format, seed, tmp_path_factory):
    runs = made()
    path = tmp_path_factory.mktemp("runs") / f"runs.{format}"
    export_runs(runs, path)
    about_path(path).unlink()
    if format == "csv":
        with path.open(newline="", encoding="utf-8") as file:
            header, *rows = csv.reader(file)
        np.random.default_rng(seed).shuffle(rows)
        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([header, *rows])
    back = import_runs(path, train_ids=runs["train"].values)
    text = [one.assign_coords({name: one[name].values.astype(str) for name in ("run", "query")})
            for one in (back, runs)]  # fmt: skip
    found = text[0].sel(run=text[1]["run"].values, query=text[1]["query"].values)
    for name in ("batch", "loss", "status", "step_size", "weight", *OF_TRAINING):
        if name in runs:
            np.testing.assert_array_equal(found[name], runs[name], err_msg=name)


@pytest.mark.parametrize("format", FORMATS)
def test_planned_runs_come_back(tmp_path, format):
    runs = runs_from_arrays(batch=[[[0, 1], [1, -1]]], loss=[[[0.7], [0.6], [0.5]]])
    planned = planned_runs(runs, [[1, -1], [0, -1]])
    xr.testing.assert_identical(
        import_runs(export_runs(planned, tmp_path / f"p.{format}")).drop_attrs(),
        planned.drop_attrs(),
    )


def written(tmp_path, *lines, name="runs.csv", header=HEADER):
    path = tmp_path / name
    path.write_text("\n".join([header, *lines]) + "\n", encoding="utf-8")
    return path


GOOD = [
    "r,0,,q,0.7,",
    "r,0,,p,0.8,",
    "r,2,[],q,,0.1",
    "r,2,,p,0.4,",
    "r,1,10 9 9,,,0.2",
    "s,0,,p,0.7,",
    's,1,"[10, null]",q,0.5,0.2',
    "s,2,9,p,0.3,0.1",
    "s,0,,q,0.6,",
]


def test_a_table_by_hand(tmp_path):
    runs = import_runs(written(tmp_path, *GOOD))
    assert runs["run"].values.tolist() == ["r", "s"] and runs["query"].values.tolist() == ["q", "p"]
    assert runs["train"].values.tolist() == [9, 10]
    nothing = [-1, -1, -1]
    assert runs["batch"].values.tolist() == [[[1, 0, 0], nothing], [[1, -1, -1], [0, -1, -1]]]
    nan = np.nan
    np.testing.assert_array_equal(
        runs["loss"],
        [[[0.7, 0.8], [nan, nan], [nan, 0.4]], [[0.6, 0.7], [0.5, nan], [nan, 0.3]]],
    )
    np.testing.assert_array_equal(runs["step_size"], np.float32([[0.2, 0.1], [0.2, 0.1]]))
    assert (runs["status"] == COMPLETE).all() and runs.attrs["imported_from"] == "csv"
    renamed = written(tmp_path, *GOOD, name="o.txt", header="seed,t,ids,test,nll,lr")
    names = {"run": "seed", "step": "t", "examples": "ids", "query": "test", "loss": "nll"}
    other = import_runs(renamed, "csv", columns={**names, "step_size": "lr"})
    xr.testing.assert_identical(other, runs)
    assert "step_size" not in import_runs(renamed, "csv", columns=names)


def test_lists_and_numbers_of_parquet_are_taken_as_they_are(tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = {
        "run": [1, 1, 1.0],
        "step": [0, 1, 2],
        "examples": [None, ["a", "b"], ["b"]],
        "query": [4, 4, 4],
        "loss": [0.7, None, 0.5],
    }
    parquet.write_table(pa.table(rows), tmp_path / "runs.parquet")
    runs = import_runs(tmp_path / "runs.parquet")
    assert runs["run"].values.tolist() == [1] and runs["query"].values.tolist() == [4]
    assert runs["batch"].values.tolist() == [[[0, 1], [1, -1]]]
    np.testing.assert_array_equal(runs["loss"].values.ravel(), [0.7, np.nan, 0.5])
    rows["loss"] = [0.7, 0.6, "low"]
    parquet.write_table(pa.table({**rows, "loss": list(map(str, rows["loss"]))}), tmp_path / "b.pq")
    with pytest.raises(Misuse, match=r"b.pq row 3, column 'loss': got 'low'; expected a number"):
        import_runs(tmp_path / "b.pq")


def changed(line, to):
    """The good table with one line put differently; lines count from the header's 1."""
    return [to if at == line else one for at, one in enumerate(GOOD, 2)]


TABLES = {
    "repeat": ([*GOOD, "r,0,,q,0.9,"], r"line 11, column 'query': got run, step 0 and query of an"),
    "no step": (changed(8, "r,x,9,,,0.2"), r"line 8, column 'step': got 'x'; expected a number"),
    "half a step": (
        changed(8, "r,1.5,9,,,0.2"),
        r"line 8, column 'step': got '1.5'; expected a wh",
    ),
    "blank step": (changed(8, "r,,9,,,0.2"), r"line 8, column 'step': got ''; expected a whole"),
    "no run": (changed(4, ",2,[],q,,0.1"), r"line 4, column 'run': got nothing; expected the run"),
    "no loss": (changed(5, "r,2,,p,low,"), r"line 5, column 'loss': got 'low'; expected a number"),
    "no query": (
        changed(6, "r,1,10,,0.3,0.2"),
        r"line 6, column 'query': got nothing beside a loss",
    ),
    "no list": (changed(6, "r,1,[9,,,0.2"), r"line 6, column 'examples': got '\[9'; expected ids"),
    "no ids": (changed(6, "r,1,[0.5],,,0.2"), r"line 6, column 'examples': got '\[0.5\]'"),
    "contradiction": (
        changed(5, "r,2,9,p,0.4,"),
        r"line 5, column 'examples': got '9'; expected '\[\]' as in line 4, of the same step",
    ),
    "two sizes": (changed(5, "r,2,,p,0.4,0.3"), r"line 5, column 'step_size': got '0.3'; expected"),
    "step 0 trains": (
        changed(2, "r,0,9,q,0.7,"),
        r"line 2, .*got '9' at step 0;.*count updates fr",
    ),
    "gap": (
        changed(6, "r,3,9,,,0.2"),
        r"column 'step': got steps up to 2 in run s; expected steps up to 3, as in run r; cut",
    ),
    "no examples": (
        changed(6, "r,1,,,,0.2"),
        r"column 'examples': got nothing at steps 1 of run r; expected a value in some row of each",
    ),
    "no size": (changed(6, "r,1,9,,,"), r"column 'step_size': got nothing at steps 1 of run r"),
    "late": ([*GOOD, "r,9,,q,0.1,"], r"line 11, column 'step': got 9; expected steps up to 2, the"),
    "no start": (changed(2, "r,0,,,,"), r"column 'loss': got nothing at step 0 of run r, query q;"),
    "blank start": (
        changed(2, "r,0,,q,,"),
        r"got nothing at step 0 of run r, query q; expected ev",
    ),
    "infinite": (changed(5, "r,2,,p,inf,"), r"got inf in run r, time 2, query p; expected finite"),
    "never": (changed(8, "s,1,10,,,0.2"), r"got nothing recorded after time 0 for queries q"),
    "long row": (
        changed(5, "r,2,,p,0.4,,,"),
        r"line 5: got 8 values; expected 6, one for each of run",
    ),
    "no quote": (
        changed(5, 'r,2,"["9"]",p,0.4,'),
        r"line 5: got a row that cannot be read .*expected comma-separated",
    ),
    "nothing": ([], r"runs.csv: got no rows; expected rows of runs"),
    "no training": (["r,0,,q,0.7,"], r"column 'examples': got no step with examples"),
    "no queries": (["r,0,,,,", "r,1,9,,,0.1"], r"column 'query': got only blank values"),
}


@pytest.mark.parametrize("case", TABLES)
def test_a_flaw_of_a_table_is_named_with_its_place(tmp_path, case):
    lines, message = TABLES[case]
    with pytest.raises(Misuse, match=message) as raised:
        import_runs(written(tmp_path, *lines))
    assert case in ("infinite", "never") or "runs.csv" in str(raised.value)


def test_a_flaw_of_a_header_or_its_names(tmp_path):
    for header, columns, message in (
        (
            "run,step,examples,query,nll,lr",
            None,
            r"got columns run, .*; expected also loss; rename",
        ),
        (
            "run,step,step,query,loss,lr",
            None,
            r"line 1: got the header run, step, step, .*different name",
        ),
        (HEADER, {"loss": "nll"}, r"expected also nll"),
        (HEADER, {"step_size": "lr"}, r"expected also lr"),
        (HEADER, {"rate": "step_size"}, r"columns: got names of rate; expected names of run, step"),
    ):
        with pytest.raises(Misuse, match=message):
            import_runs(written(tmp_path, *GOOD, header=header), columns=columns)
    (tmp_path / "empty.csv").write_text("")
    with pytest.raises(Misuse, match=r"empty.csv: got an empty file"):
        import_runs(tmp_path / "empty.csv")
    (tmp_path / "bytes.csv").write_bytes(b"run,step\n\xff\xfe,1\n")
    with pytest.raises(Misuse, match=r"bytes.csv: got .*byte 0xff.*UTF-8"):
        import_runs(tmp_path / "bytes.csv")
    (tmp_path / "no.parquet").write_text("no Parquet")
    with pytest.raises(
        Misuse, match=r"no.parquet: got a file that cannot be read .*a Parquet file"
    ):
        import_runs(tmp_path / "no.parquet")


def test_statuses_and_divergence(tmp_path):
    lines = [f"{one},{'diverged' if one[0] == 'r' else 'complete'}" for one in GOOD]
    lines[3] = "r,2,,p,inf,,diverged"
    runs = import_runs(written(tmp_path, *lines, header=f"{HEADER},status"))
    assert runs["status"].values.tolist() == [DIVERGED, COMPLETE]
    kept = import_runs(written(tmp_path, *changed(5, "r,2,,p,inf,")), keep_diverged=True)
    assert kept["status"].values.tolist() == [DIVERGED, COMPLETE]
    for wrong in ("fine", "complete"):
        lines[4] = f"{GOOD[4]},{wrong}"
        with pytest.raises(Misuse, match=rf"line 6, column 'status': got '{wrong}'; expected one"):
            import_runs(written(tmp_path, *lines, header=f"{HEADER},status"))


def test_what_lies_beside_a_table_must_be_ours_and_agree(tmp_path):
    path = written(tmp_path, *GOOD)
    about_path(path).write_text("{}")
    with pytest.raises(Misuse, match=r"runs.csv.about.json: got no description .*remove the file"):
        import_runs(path)
    with pytest.raises(Misuse, match=r"column 'examples': got unknown ids 10.*complete train_ids"):
        import_runs(written(tmp_path, *GOOD, name="a.csv"), train_ids=[9])
    runs = import_runs(written(tmp_path, *GOOD, name="a.csv"))
    other = export_runs(runs, tmp_path / "b.csv")
    other.write_text(other.read_text().replace("\ns,", "\nt,"))
    with pytest.raises(Misuse, match=r"b.csv, ids of run: got unknown ids t; expected ids among r"):
        import_runs(other)


def test_flaws_of_arrays(tmp_path):
    good = {"batch": np.array([[[0, 1]]]), "loss": np.array([[[0.7], [0.6]]])}
    for wrong, message in (
        ({"losses": good["loss"]}, r"got arrays batch, loss, losses; .*rename losses"),
        ({"train_ids": np.array(["a", 1], object)}, r"cannot be read .*no Python objects"),
        ({"attrs": np.array("[]")}, r"array 'attrs': got no JSON object"),
        ({"status": np.array([7])}, r"status: got 7 of shape \(1,\); expected one of 0, 1, 2 for"),
        ({"loss": np.array([[[0.7]]])}, r"loss: got shape"),
    ):
        np.savez(tmp_path / "runs.npz", **{**good, **wrong})
        with pytest.raises(Misuse, match=message):
            import_runs(tmp_path / "runs.npz")
    np.savez(tmp_path / "runs.npz", loss=good["loss"])
    with pytest.raises(Misuse, match=r"got arrays loss; expected batch, loss, .*add batch"):
        import_runs(tmp_path / "runs.npz")
    (tmp_path / "runs.npz").write_text("no archive")
    with pytest.raises(Misuse, match=r"cannot be read"):
        import_runs(tmp_path / "runs.npz")
    np.savez(tmp_path / "good.npz", **good)
    runs = import_runs(tmp_path / "good.npz", train_ids=["a", "b", "c"])
    assert runs.sizes["train"] == 3 and runs.attrs["imported_from"] == "npz"


def test_paths_and_formats(tmp_path):
    runs = runs_from_arrays(batch=[[[0, 1]]], loss=[[[0.7], [0.6]]])
    with pytest.raises(Misuse, match=r"nothing there; expected recorded runs; check the path"):
        import_runs(tmp_path / "none.csv")
    (tmp_path / "runs.zarr").mkdir()
    with pytest.raises(Misuse, match=r"got a store of this package.*use open_runs"):
        import_runs(tmp_path / "runs.zarr")
    (tmp_path / "folder").mkdir()
    with pytest.raises(Misuse, match=r"name and content of no known format.*csv, parquet, np"):
        import_runs(tmp_path / "folder")
    for format, message in (
        ("excel", r"'excel'; expected one of csv"),
        ("gptdynamics", r"of csv, pa"),
    ):
        with pytest.raises(Misuse, match=message):
            export_runs(runs, tmp_path / "runs.csv", format)
    path = export_runs(runs, tmp_path / "runs.txt", "csv")
    with pytest.raises(Misuse, match=r"columns: got format npz; expected a long table"):
        import_runs(path, "npz", columns={"loss": "nll"})
    with pytest.raises(Misuse, match=r"runs.txt: got something that exists"):
        export_runs(runs, path, "csv")
    path.unlink()
    with pytest.raises(Misuse, match=r"about.json: got something that exists"):
        export_runs(runs, path, "csv")
    export_runs(runs, path, "csv", overwrite=True)
    xr.testing.assert_identical(import_runs(path, "csv"), runs)


def test_runs_that_no_table_can_hold(tmp_path):
    runs = runs_from_arrays(batch=[[[0, 1]]], loss=[[[0.7], [0.6]]])
    with pytest.raises(Misuse, match=r"runs\['query'\]: got the id ' '; .*not blank; rename"):
        export_runs(runs.assign_coords(query=[" "]), tmp_path / "runs.csv")
    with pytest.raises(Misuse, match=r"runs.attrs: got a object; expected numbers, text"):
        export_runs(runs.assign_attrs(model=object()), tmp_path / "runs.csv")
    assert list(tmp_path.iterdir()) == []
    arrays = runs.assign_attrs(rates=np.float32([0.5]))
    assert import_runs(export_runs(arrays, tmp_path / "a.csv")).attrs["rates"] == [0.5]
    assert json.loads(about_path(tmp_path / "a.csv").read_text())["run_ids"] == [0]


def test_parquet_without_pyarrow_names_the_extra(tmp_path, monkeypatch):
    runs = runs_from_arrays(batch=[[[0, 1]]], loss=[[[0.7], [0.6]]])
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(Misuse, match=r"install the extra \[parquet\], or use CSV"):
        export_runs(runs, tmp_path / "runs.parquet")
    assert list(tmp_path.iterdir()) == []
