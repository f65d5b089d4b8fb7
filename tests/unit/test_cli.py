"""The command line: what each verb writes, its exit codes, its one-line errors, its speed."""

import subprocess
import sys
import time
from types import SimpleNamespace

import jax
import numpy as np
import pandas as pd
import pytest
import xarray as xr
import yaml

import bayes_simfluence as bs
from bayes_simfluence import cli
from bayes_simfluence.attribution.score_files import save_scores
from bayes_simfluence.attribution.scores import score_array
from bayes_simfluence.attribution.simulators import additive_simulator
from bayes_simfluence.commands.options import apart
from bayes_simfluence.evaluation.synthetic import linear_runs
from bayes_simfluence.posterior.config import FitConfig
from bayes_simfluence.recording.config import RecordConfig


@pytest.fixture
def command(monkeypatch, capsys):
    """Run ``bayes-simfluence`` in this process: exit code, output, errors."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["bayes-simfluence", *(str(word) for word in words)])
        monkeypatch.setattr(cli._State, "debug", False)
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        out, errors = capsys.readouterr()
        return stopped.value.code or 0, out, errors

    return run


@pytest.fixture
def runs(tmp_path):
    few = bs.example_runs().isel(query=slice(0, 3), run=slice(0, 8))
    return bs.export_netcdf(few, tmp_path / "runs.nc")


def test_fit_simulate_compare(command, runs, tmp_path):
    for method, kind in (("ridge", "linear"), ("exact", "additive")):
        code, out, errors = command(
            "fit", runs, "--select", "0:6", "--method", method, "--kind", kind, "--quiet",
            "--out", tmp_path / f"{method}.nc",
        )  # fmt: skip
        assert code == 0, errors
        assert f"{method}.nc" in out
    dropped = str(bs.open_runs(runs)["train"].values[0])
    code, out, errors = command(
        "simulate", tmp_path / "exact.nc", runs, "--select", "6,7", "--drop", dropped, "--quiet",
        "--draws", 10, "--out", tmp_path / "simulated.nc", "--figure", tmp_path / "curves.png",
    )  # fmt: skip
    assert code == 0, errors
    assert "support: " in out and "below 0.5 in 0 of 2 runs" in out
    saved = xr.open_dataset(tmp_path / "simulated.nc", engine="h5netcdf")
    assert saved.sizes["draw"] == 10 and saved["support"].attrs["meaning"]
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    code, out, errors = command(
        "compare", runs, "--select", "6:", "--posterior", f"bayes={tmp_path / 'exact.nc'}",
        "--posterior", tmp_path / "ridge.nc", "--draws", 20, "--quiet",
        "--out", tmp_path / "table.csv",
    )  # fmt: skip
    assert code == 0, errors
    table = pd.read_csv(tmp_path / "table.csv", index_col="method")
    assert list(table.index) == ["bayes", "ridge", "mean trajectory", "initial loss kept"]
    assert (table["mse"] > 0).all()


def test_scores_are_compared_as_simulators(command, tmp_path):
    recorded, _ = linear_runs(key=jax.random.key(0), runs=8, train=12, per_run=8, epochs=2)
    runs = bs.export_netcdf(recorded, tmp_path / "small.nc")
    values = np.random.default_rng(0).normal(size=(recorded.sizes["train"], 3))
    ids = (recorded[one].values.tolist() for one in ("train", "query"))
    made = score_array(values, *ids, method="chance", units="nat")
    save_scores(made, tmp_path / "chance.nc")
    save_scores(made.isel(train=slice(1, None)), tmp_path / "few.nc")
    words = [
        "compare", runs, "--select", "6:", "--fitted", runs, "--fitted-select", "0:6",
        "--scores", tmp_path / "chance.nc", "--scores", f"few={tmp_path / 'few.nc'}",
        "--draws", 10, "--quiet", "--out",
    ]  # fmt: skip
    code, out, errors = command(*words, tmp_path / "table.csv", "--ridge")
    assert code == 0, errors
    table = pd.read_csv(tmp_path / "table.csv", index_col="method", keep_default_na=False)
    assert table.index.tolist() == [
        "chance", "few", "ridge linear", "ridge additive", "ridge multiplicative",
        "mean trajectory", "initial loss kept",
    ]  # fmt: skip
    assert "unknown ids" in table.loc["few", "failed"] and table.loc["few", "mse"] == ""
    assert (table["failed"] == "").sum() == 6
    assert "few failed: scores of train ids" in out
    alone = additive_simulator(made, recorded.isel(run=slice(0, 6)))
    expected = bs.compare(
        {"chance": alone}, recorded.isel(run=slice(6, None)), key=jax.random.key(0), draws=10
    )
    assert float(table.loc["chance", "mse"]) == pytest.approx(expected.loc["chance", "mse"])
    assert command(*words, tmp_path / "table.tex")[0] == 0
    assert r"\textbf" in (tmp_path / "table.tex").read_text()
    assert command(*words, tmp_path / "table.tex")[0] == 2


def test_a_comparison_of_twins_shows_the_floor(command, tmp_path):
    recorded, _ = linear_runs(key=jax.random.key(0), runs=8, train=12, per_run=8, epochs=2)
    twice = recorded.isel(run=[*range(8), 6, 7]).assign_coords(run=np.arange(10))
    loss = twice["loss"] + np.float32(0.01) * (twice["run"] > 7) * (twice["time"] > 0)
    names = ("run", [*"01234567", "6", "7"])
    twice = twice.assign(loss=loss.astype(np.float32)).assign_coords(twin=names)
    runs = bs.export_netcdf(twice, tmp_path / "twice.nc")
    values = np.zeros((recorded.sizes["train"], recorded.sizes["query"]))
    ids = (recorded[one].values.tolist() for one in ("train", "query"))
    save_scores(score_array(values, *ids, method="none", units="nat"), tmp_path / "none.nc")
    words = [
        "compare", runs, "--fitted", runs, "--fitted-select", "0:6", "--scores",
        tmp_path / "none.nc", "--draws", 10, "--quiet", "--select",
    ]  # fmt: skip
    code, out, errors = command(*words, "6:", "--out", tmp_path / "table.md")
    assert code == 0, errors
    assert "Floor of any simulator's MSE, by 2 curricula" in out and "5e-05 [5e-05, 5e-05]" in out
    assert "MSE / floor" in (tmp_path / "table.md").read_text()
    code, out, errors = command(*words, "6:8")
    assert code == 0 and "loor" not in out, errors


def test_same_seed_same_simulation(command, runs, tmp_path):
    command("fit", runs, "--kind", "additive", "--quiet", "--out", tmp_path / "p.nc")
    for name, seed in (("one", 1), ("again", 1), ("other", 2)):
        command(
            "simulate", tmp_path / "p.nc", runs, "--seed", seed, "--draws", 5, "--quiet",
            "--out", tmp_path / f"{name}.nc",
        )  # fmt: skip
    one, again, other = (
        xr.open_dataset(tmp_path / f"{name}.nc", engine="h5netcdf")["loss"].values
        for name in ("one", "again", "other")
    )
    assert (one == again).all() and (one != other).any()


MISUSES = {
    "no such store": (["fit", "nothing.zarr", "--out", "p.nc"], "nothing there.*check the path"),
    "unknown method": (["fit", "RUNS", "--method", "magic", "--out", "p.nc"], "'magic'.*exact"),
    "unknown kind": (["fit", "RUNS", "--kind", "magic", "--out", "p.nc"], "'magic'"),
    "bad selection": (["fit", "RUNS", "--select", "3:x", "--out", "p.nc"], "--select.*0:25"),
    "out of range": (["fit", "RUNS", "--select", "99", "--out", "p.nc"], "--select.*8 runs"),
    "nothing overwritten": (["fit", "RUNS", "--out", "RUNS"], "something that exists"),
    "no posterior": (["simulate", "no.nc", "RUNS", "--out", "s.nc"], "a saved posterior"),
    "not a posterior": (["simulate", "RUNS", "RUNS", "--out", "s.nc"], "cannot be read"),
    "no config": (["record", "--config", "no.yaml", "--out", "r.zarr"], "no such file"),
    "no data": (["record", "--train", "no.jsonl", "--out", "r.zarr"], "no such file"),
    "no such run": (["record", "--only", "40:50", "--out", "r.zarr"], "among the 32 runs"),
    "no such job": (
        ["record", "--distributed", "here", "--out", "r.zarr"],
        "HOST:PORT,PROCESSES,NUMBER",
    ),
    "impossible sizes": (["record", "--per-run", "300", "--out", "r.zarr"], "at most examples"),
    "setting of another method": (
        ["fit", "RUNS", "--chains", "2", "--out", "p.nc"],
        "chains: got 2.*method nuts",
    ),
    "unknown prior": (["fit", "RUNS", "--prior", "magic", "--out", "p.nc"], "'magic'.*horseshoe"),
    "no fit config": (["fit", "RUNS", "--config", "no.yaml", "--out", "p.nc"], "no such file"),
    "ridge of another model": (
        ["fit", "RUNS", "--method", "ridge", "--noise", "ar1", "--out", "p.nc"],
        "other parts",
    ),
    "unknown band": (
        ["simulate", "p.nc", "RUNS", "--band", "x", "--out", "s.nc"],
        "'x'.*credible, conformal",
    ),
    "no band": (
        ["simulate", "p.nc", "RUNS", "--probability", "0.9", "--out", "s.nc"],
        "--probability: got no --band",
    ),
    "calibrated credibly": (
        [
            "simulate",
            "p.nc",
            "RUNS",
            "--band",
            "credible",
            "--calibration",
            "RUNS",
            "--out",
            "s.nc",
        ],
        "--calibration: got --band credible; expected --band conformal",
    ),
    "calibration of nothing": (
        [
            "simulate",
            "p.nc",
            "RUNS",
            "--band",
            "conformal",
            "--calibration-select",
            "0:2",
            "--out",
            "s.nc",
        ],
        "--calibration-select: got no --calibration",
    ),
    "nothing to compare": (["compare", "RUNS"], "neither --posterior nor --scores"),
    "scores without runs": (["compare", "RUNS", "--scores", "s.nc"], "--scores: got no runs"),
    "a selection of nothing": (
        ["compare", "RUNS", "--posterior", "p.nc", "--fitted-select", "0:2"],
        "--fitted-select: got no --fitted",
    ),
    "no format of a table": (
        ["compare", "RUNS", "--posterior", "p.nc", "--out", "t.xls"],
        "suffix '.xls'; expected one of .md",
    ),
    "nothing to diagnose": (["diagnose", "no.nc"], "a saved posterior"),
    "diagnosis overwrites": (["diagnose", "no.nc", "--figure", "RUNS"], "something that exists"),
    "nothing to calibrate": (["calibrate", "RUNS", "--posterior", "no.nc"], "a saved posterior"),
    "calibration overwrites": (
        ["calibrate", "RUNS", "--posterior", "no.nc", "--out", "RUNS"],
        "something that exists",
    ),
    "too few simulations": (["sbc", "RUNS", "--simulations", "5"], "at least 20"),
    "a point to rank": (["sbc", "RUNS", "--method", "ridge"], "a method that draws"),
    "ranks overwrite": (["sbc", "RUNS", "--figure", "RUNS"], "something that exists"),
    "nothing to import": (["import", "no.csv", "--out", "r.zarr"], "nothing there"),
    "import overwrites": (["import", "no.csv", "--out", "RUNS"], "something that exists"),
    "half a column": (
        ["import", "no.csv", "--column", "loss", "--out", "r.zarr"],
        "--column: got loss; expected OURS=THEIRS",
    ),
    "no format": (["export", "RUNS", "--out", "r.xls"], "no known format.*csv, parquet, npz"),
    "export overwrites": (["export", "RUNS", "--out", "RUNS"], "something that exists"),
    "bad choice": (["record", "--optimizer", "magic", "--out", "r.zarr"], "'magic'.*adamw"),
}


@pytest.mark.parametrize("case", sorted(MISUSES))
def test_misuse_is_one_line_and_exit_code_2(case, command, runs, tmp_path, monkeypatch):
    words, message = MISUSES[case]
    monkeypatch.chdir(tmp_path)
    before = sorted(file.name for file in tmp_path.iterdir())
    code, _, errors = command(*(str(runs) if word == "RUNS" else word for word in words))
    assert code == 2
    assert len(errors.strip().splitlines()) == 1
    assert __import__("re").search(message, errors), errors
    assert sorted(file.name for file in tmp_path.iterdir()) == before


def test_fitted_runs_are_not_held_out(command, runs, tmp_path):
    command("fit", runs, "--kind", "additive", "--quiet", "--out", tmp_path / "p.nc")
    code, _, errors = command("compare", runs, "--posterior", tmp_path / "p.nc")
    assert code == 2 and "a fit to the runs to compare on" in errors


def test_a_fit_is_repeated_by_its_settings(command, runs, tmp_path):
    (tmp_path / "mine.yaml").write_text("kind: linear\nmethod: ridge\npenalty: 1\nseed: 4\n")
    code, out, errors = command(
        "fit", runs, "--config", tmp_path / "mine.yaml", "--kind", "additive", "--select", "0:4",
        "--quiet", "--out", tmp_path / "one.nc",
    )  # fmt: skip
    assert code == 0, errors
    assert "one.yaml" in out
    saved = yaml.safe_load((tmp_path / "one.yaml").read_text())
    assert (saved["penalty"], saved["seed"], saved["select"]) == (1.0, 4, "0:4")
    assert saved["model"] == bs.Simfluence.additive().as_dict()
    again = ["fit", runs, "--config", tmp_path / "one.yaml", "--quiet", "--out"]
    assert command(*again, tmp_path / "two.nc")[0] == 0
    assert (tmp_path / "two.yaml").read_text() == (tmp_path / "one.yaml").read_text()
    one, two = (bs.load_posterior(tmp_path / f"{name}.nc") for name in ("one", "two"))
    assert one.settings == two.settings and one.runs.equals(two.runs)
    assert (one.simulator.b == two.simulator.b).all()
    # The settings of an earlier fit are not lost.
    assert command(*again, tmp_path / "one.yaml")[0] == 2
    (tmp_path / "three.yaml").write_text("kind: linear\n")
    code, _, errors = command(*again, tmp_path / "three.nc")
    assert code == 2 and "three.yaml: got something that exists" in errors
    (tmp_path / "mine.yaml").write_text("sort: linear\n")
    code, _, errors = command(
        "fit", runs, "--config", tmp_path / "mine.yaml", "--out", tmp_path / "p.nc"
    )
    assert code == 2 and "unknown names sort; expected names among method, model, kind" in errors


def test_diagnose_and_calibrate_a_saved_fit(command, runs, tmp_path):
    command("fit", runs, "--method", "ridge", "--select", "0:4", "--out", tmp_path / "p.nc",
            "--quiet")  # fmt: skip
    code, out, errors = command(
        "diagnose", tmp_path / "p.nc", "--figure", tmp_path / "d.png", "--quiet"
    )
    assert code == 0, errors
    assert "OK: Point estimate" in out and "on squared coefficients" in out
    assert (tmp_path / "d.png").read_bytes().startswith(b"\x89PNG")
    code, out, errors = command(
        "calibrate", runs, "--select", "4:", "--posterior", f"r={tmp_path / 'p.nc'}", "--draws", 20,
        "--figure", tmp_path / "c.png", "--out", tmp_path / "c.csv",
    )  # fmt: skip
    assert code == 0, errors
    assert "calibrate" in errors, "a progress bar"
    table = pd.read_csv(tmp_path / "c.csv")
    assert list(table["horizon"]) == ["1-24", "25-48", "49-72", "73-96", "all"]
    assert table["losses"].iloc[-1] == table["losses"].iloc[:-1].sum() == 4 * 96 * 3
    assert (tmp_path / "c.png").is_file()
    code, _, errors = command("calibrate", runs, "--posterior", tmp_path / "p.nc")
    assert code == 2 and "a fit to the runs" in errors


# Ten draws do not converge.
@pytest.mark.filterwarnings("ignore::bayes_simfluence.checks.FitWarning")
def test_a_sampled_fit_is_diagnosed_by_its_chains(command, tmp_path):
    few = bs.example_runs().isel(query=[0, 1], run=slice(0, 3), step=slice(0, 6), time=slice(0, 7))
    bs.export_netcdf(few, tmp_path / "few.nc")
    code, _, errors = command(
        "fit", tmp_path / "few.nc", "--method", "nuts", "--kind", "additive", "--chains", 2,
        "--warmup", 10, "--draws", 10, "--max-tree-depth", 3, "--out", tmp_path / "p.nc", "--quiet",
    )  # fmt: skip
    assert code == 0, errors
    code, out, errors = command(
        "diagnose", tmp_path / "p.nc", "--figure", tmp_path / "d.png", "--quiet"
    )
    assert code == 0, errors
    assert "R-hat" in out and "scale[" in out and "draws at which the sampler" in out
    assert (tmp_path / "d.png").is_file()


def test_runs_go_out_and_come_back(command, runs, tmp_path):
    table, store = tmp_path / "runs.csv", tmp_path / "runs.zarr"
    code, out, errors = command("export", runs, "--select", "2:5", "--out", table)
    assert code == 0, errors
    assert "3 runs of 96 steps" in out and "runs.csv" in out
    assert command("import", table, "--out", store)[0] == 0
    expected = bs.open_runs(runs).isel(run=slice(2, 5))
    xr.testing.assert_identical(bs.open_runs(store), expected)
    table.write_text(table.read_text().replace("loss", "nll", 1))
    code, out, errors = command(
        "import", table, "--format", "csv", "--column", "loss=nll", "--overwrite", "--out", store
    )
    assert code == 0, errors
    xr.testing.assert_identical(bs.open_runs(store), expected)


def test_a_method_is_calibrated_by_simulation(command, tmp_path):
    few = bs.example_runs().isel(query=[0, 1], run=slice(0, 2), step=slice(0, 6), time=slice(0, 7))
    bs.export_netcdf(few, tmp_path / "few.nc")
    code, out, errors = command(
        "sbc", tmp_path / "few.nc", "--kind", "additive", "--simulations", 20,
        "--kept", 19, "--queries", 1, "--figure", tmp_path / "r.png", "--out", tmp_path / "r.md",
    )  # fmt: skip
    assert code == 0, errors
    assert "20 simulations (false-alarm rate 0.01)" in out and "simulations" in errors
    assert "| total b[0] |" in (tmp_path / "r.md").read_text()
    assert (tmp_path / "r.png").is_file()


def test_simulations_have_the_band_that_was_asked_for(command, runs, tmp_path):
    command("fit", runs, "--method", "ridge", "--penalty", 1, "--select", "0:2", "--quiet",
            "--out", tmp_path / "p.nc")  # fmt: skip
    code, out, errors = command(
        "simulate", tmp_path / "p.nc", runs, "--select", "7", "--band", "conformal",
        "--probability", 0.8, "--simultaneous", "--calibration", runs, "--calibration-select",
        "2:7", "--draws", 20, "--out", tmp_path / "s.nc", "--quiet",
    )  # fmt: skip
    assert code == 0, errors
    assert "conformal band of 80% for whole trajectories" in out and "on 5 runs" in out
    found = xr.open_dataset(tmp_path / "s.nc", engine="h5netcdf")
    assert found["low"].attrs["probability"] == 0.8 and found["high"].attrs["simultaneous"] == 1
    code, out, errors = command(
        "simulate", tmp_path / "p.nc", runs, "--select", "7", "--band", "credible", "--draws", 20,
        "--out", tmp_path / "c.nc", "--quiet",
    )  # fmt: skip
    assert code == 0 and "credible band of 90% for each time" in out


def test_a_failure_of_the_work_is_exit_code_1(command, runs, tmp_path, monkeypatch):
    def broken(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(xr.Dataset, "to_netcdf", broken)
    code, _, errors = command(
        "fit", runs, "--kind", "additive", "--quiet", "--out", tmp_path / "p.nc"
    )
    assert code == 1 and "No space left" in errors and "Traceback" not in errors
    assert not (tmp_path / "p.nc").exists()


def test_debug_shows_the_traceback(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["x", "--debug", "fit", "nothing.zarr", "--out", "p.nc"])
    with pytest.raises(bs.Misuse):
        cli.main()


def test_record_has_an_option_for_every_setting_and_yaml_the_same_names(command, tmp_path):
    code, out, _ = command("record", "--help")
    squeezed = "".join(out.split())
    for name in RecordConfig.names():
        assert f"--{name.replace('_', '-')}" in squeezed, name
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"run": 3}))
    code, _, errors = command("record", "--config", tmp_path / "c.yaml", "--out", tmp_path / "r")
    assert code == 2 and "unknown names run" in errors


def test_fit_and_sbc_have_an_option_for_every_setting(command):
    for verb in ("fit", "sbc"):
        squeezed = "".join(command(verb, "--help")[1].split())
        for name in set(FitConfig.names()) - {"model"}:
            assert f"--{name.replace('_', '-')}" in squeezed, (verb, name)


def test_calibrate_needs_a_posterior_and_no_setting_of_a_fit(command, runs):
    for words, match in (
        ((), "--posterior"),
        (("--posterior", "p.nc", "--method", "nuts"), "--method"),
    ):
        code, _, errors = command("calibrate", runs, *words)
        assert code == 2 and match in errors


def test_help_is_quick_and_imports_no_jax():
    code = (
        "import sys, bayes_simfluence.cli as c, typer.testing as t;"
        "assert t.CliRunner().invoke(c.app, ['--help']).exit_code == 0;"
        "assert not {'jax', 'transformers', 'xarray', 'scipy'} & set(sys.modules), 'heavy import'"
    )
    took = []
    for _ in range(3):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True)
        took.append(time.perf_counter() - start)
    assert min(took) < 5.0  # 0.4 s on a quiet machine; a busy one must not fail the build


def test_a_curriculum_with_other_weights_is_another_run():
    batch, loss = [[[0, 1]]], [[[0.7], [0.6]]]
    plain = bs.runs_from_arrays(batch=batch, loss=loss)
    ones = bs.runs_from_arrays(batch=batch, loss=loss, weight=[[[1.0, 1.0]]])
    other = bs.runs_from_arrays(batch=batch, loss=loss, weight=[[[2.0, 1.0]]])
    apart({"p": SimpleNamespace(runs=plain)}, other)
    with pytest.raises(bs.Misuse, match="posterior 'p': got a fit to the runs to compare on: 0"):
        apart({"p": SimpleNamespace(runs=plain)}, ones)
