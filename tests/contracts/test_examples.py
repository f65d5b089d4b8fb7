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
    ],
}
WRITTEN = {
    "01_record_fit_simulate.py": ["runs.zarr", "posterior.nc", "curves.png"],
    "02_results_study.py": ["results.md", "results.csv", "curves.png", "coverage.png"],
    "03_tasks_study.py": ["tasks.md", "tasks.csv", "tasks.png"],
}


def test_every_example_is_run_here():
    assert sorted(SMALL) == sorted(one.name for one in (ROOT / "examples").glob("*.py"))


@pytest.mark.parametrize("script", sorted(SMALL))
def test_example(script, tmp_path):
    command = [sys.executable, "-W", "error", ROOT / "examples" / script, "--out", tmp_path]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, *SMALL[script]], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    for name in WRITTEN[script]:
        assert (tmp_path / name).exists()
