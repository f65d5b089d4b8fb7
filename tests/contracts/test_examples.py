"""Every script in ``examples/`` runs, at a small size where it has one."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

ROOT = Path(__file__).parents[2]
SHARED = Path(os.environ.get("BAYES_SIMFLUENCE_DATA", ROOT.parent / "shared" / "data"))
"""Public data that do not ship; without them the scripts that read them skip."""
SMALL = {
    "01_record_fit_simulate.py": [],
    "02_results_study.py": ["--splits=1", "--queries=3", "--draws=20", "--times=4"],
    "03_tasks_study.py": [
        "--recordings=trec",
        "--splits=1",
        "--queries=3",
        "--draws=20",
        "--times=2",
        "--parts=2",
        "--priors=1",
    ],
    "04_recorder_flax.py": [],
    "05_recorder_trainer.py": [],
    "06_causal_recording.py": [],
    "07_wrong_labels.py": [],
    "08_data_mixtures.py": [f"--data={SHARED / 'regmix'}", "--runs=48"],
    "09_counterfactuals.py": ["--small", "--runs=5"],
}
WRITTEN = {
    "01_record_fit_simulate.py": ["runs.zarr", "posterior.nc", "curves.png"],
    "02_results_study.py": ["results.md", "results.csv", "curves.png", "coverage.png"],
    "03_tasks_study.py": ["tasks.md", "tasks.csv", "tasks.png"],
    "04_recorder_flax.py": ["runs.zarr"],
    "05_recorder_trainer.py": ["runs.zarr"],
    "06_causal_recording.py": ["runs.zarr", "gpt2-small-text/model.safetensors"],
    "07_wrong_labels.py": ["wrong-labels.png", "wrong-labels.md", "pilot.zarr"],
    "08_data_mixtures.py": ["mixtures.png", "mixtures.md"],
    "09_counterfactuals.py": [
        "counterfactuals.png",
        "counterfactuals.md",
        "counterfactuals.json",
        "runs.zarr",
    ],
}
LONG = [
    "02_results_study.py",
    "03_tasks_study.py",
    "07_wrong_labels.py",
    "09_counterfactuals.py",
]
"""Studies: they run with the long suites, at a small size."""
READS = {"08_data_mixtures.py": SHARED / "regmix"}
SIZES = ("1m", "60m", "1B")
NEEDS = {"04_recorder_flax.py": ["flax"], "05_recorder_trainer.py": ["torch", "accelerate"]}
"""Packages of the extra [examples], without which a script says so and ends well."""


def test_every_example_is_run_here():
    assert sorted(SMALL) == sorted(path.name for path in (ROOT / "examples").glob("*.py"))


def run(script, folder, *words, before=""):
    """The script in a process of its own, after a line of Python."""
    program = (
        f"import runpy, sys\n{before}\nsys.argv = [{script!r}, '--out', {str(folder)!r}, "
        f"*{list(words)!r}]\nrunpy.run_path({str(ROOT / 'examples' / script)!r}, "
        "run_name='__main__')"
    )
    # All but the studies compile for longer than they compute.
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    if script not in LONG:
        environment["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        capture_output=True,
        text=True,
        env=environment,
    )


SCRIPTS = [
    pytest.param(
        script,
        marks=[pytest.mark.parity] * (script in NEEDS)
        + [pytest.mark.statistical] * (script in LONG),
    )
    for script in sorted(SMALL)
]
"""Those that need packages run where PyTorch is."""


@pytest.mark.parametrize("script", SCRIPTS)
def test_example(script, tmp_path):
    for package in NEEDS.get(script, []):
        pytest.importorskip(package)
    if script in READS and not READS[script].is_dir():
        pytest.skip(f"no {READS[script]}: set BAYES_SIMFLUENCE_DATA to the folder that holds it")
    done = run(script, tmp_path, *SMALL[script])
    assert done.returncode == 0, done.stderr
    for name in WRITTEN[script]:
        assert (tmp_path / name).exists()


def test_mixtures_of_any_domains_are_groups_with_shares(tmp_path):
    """The example on mixtures with a made-up law: the second domain's first tokens teach most."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "data"
    folder.mkdir()
    for split, size, count in (("train", "1m", 40), *(("test", size, 8) for size in SIZES)):
        shares = rng.dirichlet(np.full(3, 0.4), count)
        loss = 5.0 - np.minimum(shares[:, 1], 0.1) * 20.0 - shares[:, [0, 2]].T
        names = [f"train_the_pile_{name}" for name in "abc"]
        table = pd.DataFrame(shares, columns=names).rename_axis("index")
        table.to_csv(folder / f"{split}_mixture_{size}.csv")
        losses = {
            f"metric/the_pile_{name}_val_loss": row for name, row in zip("ac", loss, strict=True)
        }
        pd.DataFrame(losses).rename_axis("index").to_csv(folder / f"{split}_pile_loss_{size}.csv")
    done = run("08_data_mixtures.py", tmp_path, f"--data={folder}")
    assert done.returncode == 0, done.stderr
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if "|" in line][2:]
    mse = {name: float(text.split()[0]) for name, text, *_ in rows}
    assert mse["first tokens apart"] < 0.1 * mse["additive"]


@pytest.mark.parametrize("script", sorted(NEEDS))
def test_an_example_without_its_packages_says_so(script, tmp_path):
    for package in NEEDS[script]:
        done = run(script, tmp_path, before=f"sys.modules[{package!r}] = None")
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("skipped: ") and "[examples]" in done.stdout
        assert not list(tmp_path.iterdir())


@pytest.mark.parity
def test_the_trainer_example_refuses_batches_that_are_not_updates(tmp_path):
    for package in NEEDS["05_recorder_trainer.py"]:
        pytest.importorskip(package)
    done = run("05_recorder_trainer.py", tmp_path, "--accumulate=2")
    assert done.returncode == 1
    assert "Misuse: TrainingArguments: got 2 accumulated batches" in done.stderr
    assert not list(tmp_path.iterdir())
