"""Documented commands run as written: README and the pages with code."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import bayes_simfluence as bs
from bayes_simfluence.recording.config import RecordConfig
from bayes_simfluence.recording.session import merged
from bayes_simfluence.settings import kinds_of
from bayes_simfluence.study.config import study_of
from bayes_simfluence.study.methods import ATTRIBUTIONS

ROOT = Path(__file__).parents[2]


def blocks(page, languages=("python", "bash")):
    """Fenced blocks of a page, in order."""
    text = (ROOT / page).read_text("utf-8")
    found = re.findall(r"^```(\w+)\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    return [(language, code) for language, code in found if language in languages]


def run_line(line, folder):
    """One line of a bash block, with this interpreter's own command."""
    words = shlex.split(line)
    assert words[0] == "bayes-simfluence", line
    command = [sys.executable, "-W", "error", "-m", "bayes_simfluence", *words[1:]]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{line}\n{done.stderr}"


def run_page(page, folder, monkeypatch, few=None):
    """The blocks of a page, on ``few`` of the runs that ship where it is given."""
    monkeypatch.chdir(folder)
    shipped = bs.example_runs
    monkeypatch.setattr(bs, "example_runs", lambda *name: shipped(*name).isel(few))
    names = {}
    for language, code in blocks(page):
        if language == "python":
            exec(compile(code, str(page), "exec"), names)
        else:
            for line in code.strip().splitlines():
                run_line(line, folder)
    return names


def first_steps(count):
    """Selection of the first steps of runs."""
    return {"step": slice(0, count), "time": slice(0, count + 1)}


# Several minutes of compilation: with the long suites.
@pytest.mark.statistical
def test_getting_started(tmp_path, monkeypatch):
    """As written, on ten of the fifty queries and the first sixteen steps."""
    few = {"query": slice(0, 10), **first_steps(16)}
    names = run_page("docs/getting-started.md", tmp_path, monkeypatch, few)
    assert names["table"].loc["bayes", "mse"] < names["table"].loc["mean", "mse"]
    made = {"runs.nc", "mine.zarr", "posterior.nc", "simulated.nc", "curves.png", "table.md"}
    assert made <= {path.name for path in tmp_path.iterdir()}


def test_recording_page(tmp_path, monkeypatch):
    names = run_page("docs/recording.md", tmp_path, monkeypatch)
    assert names["runs"].sizes["run"] == 4
    assert bs.open_runs(tmp_path / "mine.zarr").sizes["run"] == 4
    assert bs.open_runs(tmp_path / "again.zarr").identical(names["mine"])


def test_the_recording_page_records_with_settings_that_fit():
    """The commands that need checkpoints and files from elsewhere: their options are checked."""
    text = (ROOT / "docs/recording.md").read_text("utf-8").replace("\\\n", "")
    commands = re.findall(r"^bayes-simfluence record .*$", text, flags=re.MULTILINE)
    kinds, tasks = kinds_of(RecordConfig), set()
    for words in map(shlex.split, commands):
        if "--config" in words:  # of a recording that is there
            continue
        options = [word[2:].replace("-", "_") for word in words[2::2]]
        values = dict(zip(options, words[3::2], strict=True))
        for place in ("out", "only"):
            values.pop(place, None)
        typed = {name: int(x) if kinds[name] == (int,) else x for name, x in values.items()}
        tasks.add(merged(typed).task)
    assert tasks == {"classification", "choice", "causal", "seq2seq"}


def test_models_page(tmp_path, monkeypatch):
    names = run_page("docs/models.md", tmp_path, monkeypatch, first_steps(32))
    assert names["simulated"]["low"].attrs["kind"] == "credible"
    settings, again = ((tmp_path / f"{name}.yaml").read_text() for name in ("ridge", "again"))
    assert settings == again and "penalty: 0.1" in settings


# ArviZ's advice on large k, and what its dependencies will drop.
@pytest.mark.filterwarnings("ignore:Estimated shape parameter:UserWarning")
@pytest.mark.filterwarnings("ignore:Pareto k is above:bayes_simfluence.checks.FitWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning:arviz")
def test_arviz_page(tmp_path, monkeypatch):
    names = run_page("docs/arviz.md", tmp_path, monkeypatch, first_steps(48))
    assert names["ranked"].index[0] == "default"
    assert len(names["cheap"]) == len(names["refitted"]) == 8
    assert (tmp_path / "idata.nc").is_file()


def test_baselines_page(tmp_path, monkeypatch):
    names = run_page("docs/baselines.md", tmp_path, monkeypatch)
    assert names["table"].loc["bayes", "mse"] < names["table"].loc["mean", "mse"]
    assert names["table"]["failed"].tolist()[:3] == ["", "", ""]
    assert "failed" not in (tmp_path / "table.tex").read_text()
    detections = names["curves"].values()
    assert all(curve["average_precision"] > curve.attrs["share"] for curve in detections)
    ((_, settings),) = blocks("docs/baselines.md", ("yaml",))
    study = study_of(yaml.safe_load(settings))
    assert [cell.name for cell in study.cells] == ["sst2-full", "sst2-lora", "trec-full"]
    assert study.needed == study.cells[1].record.runs and study.cells[1].record.tuning == "lora"


@pytest.mark.parametrize("name", ["scores.yaml", "study.yaml", "study_every_step.yaml"])
def test_the_settings_of_studies_are_possible(name):
    study = study_of(yaml.safe_load((ROOT / "examples" / name).read_text("utf-8")))
    assert set(study.methods) <= set(ATTRIBUTIONS)
    for cell in study.cells:
        if cell.runs:
            # Checkpoints and scores are those of the recording that ships.
            runs = bs.example_runs(cell.runs.removeprefix("example:"))
            assert cell.record.steps == runs.sizes["step"]
            assert (cell.record.examples, cell.record.queries) == (
                runs.sizes["train"],
                runs.sizes["query"],
            )


def test_the_readme_has_two_commands_that_ci_calls():
    lines = [line for _, code in blocks("README.md", ("bash",)) for line in code.splitlines()]
    install, tests = (line for line in lines if "python3 -m venv" in line)
    assert install.endswith(".venv/bin/bayes-simfluence demo")
    assert tests.endswith(".venv/bin/python -m pytest -n 2 --dist loadfile")
    assert "grep -m1 \"pip install -e '.\\[test\\]'\" README.md" in (ROOT / ".ci/run").read_text()


def test_the_readme_uses_options_that_exist():
    from typer.testing import CliRunner

    from bayes_simfluence.cli import app

    lines = [line for _, code in blocks("README.md", ("bash",)) for line in code.splitlines()]
    for line in (line for line in lines if line.startswith("bayes-simfluence")):
        verb = shlex.split(line)[1]
        known = CliRunner().invoke(app, [verb, "--help"], env={"COLUMNS": "200"}).output
        for option in re.findall(r"--[\w-]+", line):
            assert option in known, (verb, option)


@pytest.mark.parametrize(
    "page", ["README.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
)
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text("utf-8")
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert ((ROOT / page).parent / target).exists(), target
