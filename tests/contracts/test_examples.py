"""Every script in ``examples/`` runs, at a small size where it has one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
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
}
WRITTEN = {
    "01_record_fit_simulate.py": ["runs.zarr", "posterior.nc", "curves.png"],
    "02_results_study.py": ["results.md", "results.csv", "curves.png", "coverage.png"],
    "03_tasks_study.py": ["tasks.md", "tasks.csv", "tasks.png"],
    "04_recorder_flax.py": ["runs.zarr"],
    "05_recorder_trainer.py": ["runs.zarr"],
    "06_causal_recording.py": ["runs.zarr", "gpt2-small-text/model.safetensors"],
    "07_wrong_labels.py": ["wrong-labels.png", "wrong-labels.md", "pilot.zarr"],
}
NEEDS = {"04_recorder_flax.py": ["flax"], "05_recorder_trainer.py": ["torch", "accelerate"]}
"""Packages of the extra [examples], without which a script says so and ends well."""


def test_every_example_is_run_here():
    assert sorted(SMALL) == sorted(one.name for one in (ROOT / "examples").glob("*.py"))


def run(script, folder, *words, before=""):
    """The script in a process of its own, after a line of Python."""
    program = (
        f"import runpy, sys\n{before}\nsys.argv = [{script!r}, '--out', {str(folder)!r}, "
        f"*{list(words)!r}]\nrunpy.run_path({str(ROOT / 'examples' / script)!r}, "
        "run_name='__main__')"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        capture_output=True,
        text=True,
        env=environment,
    )


LONG = ["02_results_study.py", "03_tasks_study.py", "07_wrong_labels.py"]
"""Studies: they run with the long suites, at a small size."""
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
    done = run(script, tmp_path, *SMALL[script])
    assert done.returncode == 0, done.stderr
    for name in WRITTEN[script]:
        assert (tmp_path / name).exists()


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
