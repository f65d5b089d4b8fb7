"""The command line: what each verb writes, its exit codes, its one-line errors, its speed."""

import subprocess
import sys
import time

import pandas as pd
import pytest
import xarray as xr
import yaml

import bayes_simfluence as bs
from bayes_simfluence import cli
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
    assert xr.open_dataset(tmp_path / "simulated.nc", engine="h5netcdf").sizes["draw"] == 10
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
    "impossible sizes": (["record", "--per-run", "300", "--out", "r.zarr"], "at most examples"),
    "bad choice": (["record", "--optimizer", "magic", "--out", "r.zarr"], "'magic'.*adamw"),
}


@pytest.mark.parametrize("case", sorted(MISUSES))
def test_misuse_is_one_line_and_exit_code_2(case, command, runs, tmp_path, monkeypatch):
    words, said = MISUSES[case]
    monkeypatch.chdir(tmp_path)
    before = sorted(one.name for one in tmp_path.iterdir())
    code, _, errors = command(*(str(runs) if word == "RUNS" else word for word in words))
    assert code == 2
    assert len(errors.strip().splitlines()) == 1
    assert __import__("re").search(said, errors), errors
    assert sorted(one.name for one in tmp_path.iterdir()) == before


def test_fitted_runs_are_not_held_out(command, runs, tmp_path):
    command("fit", runs, "--kind", "additive", "--quiet", "--out", tmp_path / "p.nc")
    code, _, errors = command("compare", runs, "--posterior", tmp_path / "p.nc")
    assert code == 2 and "a fit to the runs to compare on" in errors


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
