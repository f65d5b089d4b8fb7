"""Every script in ``examples/`` runs, at a small size where it has one."""

import importlib
import os
import runpy
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
        "--few=1",
        "--parts=2",
        "--priors=1",
    ],
    "04_recorder_flax.py": [],
    "05_recorder_trainer.py": [],
    "06_causal_recording.py": [],
    "07_wrong_labels.py": [],
    "08_data_mixtures.py": [f"--data={SHARED / 'regmix'}", "--runs=48"],
    "09_counterfactuals.py": ["--small", "--fits=1", "--times=4", "--draws=40"],
    "10_scores_as_prior.py": [
        *("--recordings", "trec", "--counts", "0", "2"),
        *("--queries=3", "--draws=20", "--times=4"),
    ],
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
    ],
    "10_scores_as_prior.py": ["scores-as-prior.png", "scores-as-prior.json", "baselines.md"],
}
LONG = [
    "02_results_study.py",
    "03_tasks_study.py",
    "07_wrong_labels.py",
    "09_counterfactuals.py",
    "10_scores_as_prior.py",
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
    # A script that is run as one finds its neighbours.
    paths = os.pathsep.join([str(ROOT), str(ROOT / "examples")])
    environment = {**os.environ, "PYTHONPATH": paths}
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


@pytest.fixture(scope="module")
def counterfactuals():
    """What the script of the counterfactuals page defines, and its module of kinds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "examples"))
        script = runpy.run_path(str(ROOT / "examples" / "09_counterfactuals.py"))
        return {**vars(importlib.import_module("truth.kinds")), **script}


def test_kinds_of_counterfactuals_are_what_they_say(counterfactuals):
    """Of a run of 40 examples, even ones of class 0, in five epochs of batches of 8."""
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 2
    members = rng.choice(60, 40, replace=False)
    batches = np.concatenate([rng.permutation(members) for _ in range(5)]).reshape(25, 8)
    new = np.array([60, 61, 62])
    labels = np.append(labels, [0, 1, 0])
    source = counterfactuals["Source"](batches, 1, labels, new, rng)
    kinds = {name: kind.make(source) for name, kind in counterfactuals["KINDS"].items()}
    used = {name: set(made[made >= 0].tolist()) for name, made in kinds.items()}
    own = set(members.tolist())
    assert all(one <= own for name, one in used.items() if name != "new examples")
    assert used["new examples"] - own == set(new.tolist())
    assert len(used["new examples"]) == len(own)
    assert (kinds["new queries"] == batches).all()
    lost = {name: len(own) - len(one) for name, one in used.items()}
    of_side = sum(labels[list(own)])
    assert lost["one dropped"] == 1 and lost["ten dropped"] == 10
    assert lost["thirty dropped"] == 20  # never more than half
    assert lost["one class halved"] == of_side // 2
    assert lost["half subset"] == 20 and lost["sixteen repeated"] == 24
    assert used["one class only"] == {one for one in own if labels[one] == 1}
    for name in ("one dropped", "one class halved", "half batches"):
        kept = kinds[name] >= 0
        assert (kinds[name][kept] == batches[kept]).all()
    assert (kinds["half batches"] >= 0).sum(axis=1).tolist() == [4] * 25
    assert (kinds["reversed"] == batches[::-1]).all()
    flat = kinds["sorted by class"].ravel()
    assert (np.diff(labels[flat]) <= 0).all() and sorted(flat) == sorted(batches.ravel())
    assert kinds["1.5 x steps"].shape == (37, 8)
    assert (kinds["1.5 x steps"][:25] == batches).all()
    for name in ("half subset", "sixteen repeated", "one class only"):
        counts = np.unique(kinds[name], return_counts=True)[1]
        assert kinds[name].shape == (25, 8) and np.ptp(counts) <= 1


def test_covers_of_the_counterfactuals_page(counterfactuals):
    """Draws around the truth with errors in common to all queries, and to both runs."""
    rng = np.random.default_rng(1)
    truth, unedited = rng.normal(2.0, 0.5, (2, 4, 6, 10))
    error = rng.normal(0.0, 1.0, (999, 4, 1, 1))
    support = np.array([[1.0, 0.9], [1.0, 0.6], [1.0, 0.4], [1.0, 1.0]])
    made = [
        counterfactuals["Simulated"](one + error, one[None], support) for one in (truth, unedited)
    ]
    sides = np.arange(10) % 2
    told = counterfactuals["judged"](made[0], truth, truth + 0.5, sides)
    assert told["mse"] < 0.02 and told["mse_of_mean_trajectory"] == pytest.approx(0.25)
    assert told["query"] == told["mean"] == told["classes"] == [1.0, 1.0]
    assert told["support"] == 0.4 and told["flagged"] == 1
    shifted = counterfactuals["judged"](made[0], truth + 2.0, truth, sides)
    assert shifted["query"] == [0.0, 0.0] and shifted["mse"] == pytest.approx(4.0, rel=0.1)
    difference = counterfactuals["compared"](*made, truth, unedited)
    lower = truth[:, -1] < unedited[:, -1]
    assert difference["lower"] == [lower.mean(), lower.mean(), 0.0]
    groups = difference["lower_by_said"]
    assert groups[0] == [(~lower).sum(), 0] and groups[-1] == [lower.sum(), lower.sum()]
    longer = np.concatenate([truth, truth[:, -1:] - 9.0], axis=1)
    ours = counterfactuals["Simulated"](longer + error, longer[None], support)
    assert counterfactuals["compared"](ours, made[1], longer, unedited)["lower"][:2] == [1.0, 1.0]


def test_energy_score_of_the_counterfactuals_page(counterfactuals):
    """Of a standard normal and its own draws, by the two expected distances in closed form; draws
    that lose their dependence do worse where the queries have it."""
    rng = np.random.default_rng(2)
    energy, independent = counterfactuals["energy"], counterfactuals["independent"]
    truth = np.zeros((1, 1, 3))
    draws = rng.normal(size=(200_000, 1, 1, 3))
    length = 2.0 * np.sqrt(2.0 / np.pi)  # mean length of three standard normal numbers
    assert energy(draws, truth) == pytest.approx(length * (1 - np.sqrt(0.5)), abs=0.01)
    common = np.repeat(rng.normal(size=(2000, 50, 1, 1)), 8, axis=-1)
    true = np.repeat(rng.normal(size=(50, 1, 1)), 8, axis=-1)
    assert energy(common, true) < 0.95 * energy(independent(common), true)
    assert (np.sort(independent(common), axis=0) == np.sort(common, axis=0)).all()


def test_the_prose_of_the_counterfactuals_page_stays(counterfactuals):
    replaced = counterfactuals["between_marks"]
    first = replaced("# Title\n\nprose\n", "old", "demo")
    assert first == "# Title\n\nprose\n<!-- demo -->\nold\n<!-- end of demo -->\n"
    both = replaced(f"{first}more\n", "other", "sst2")
    assert both.startswith(f"{first}more\n") and both.endswith("other\n<!-- end of sst2 -->\n")
    assert replaced(both, "new", "demo") == both.replace("old", "new")


def test_the_counterfactuals_page_is_not_overwritten_by_accident(tmp_path):
    (tmp_path / "counterfactuals.json").write_text("mine")
    done = run("09_counterfactuals.py", tmp_path)
    assert done.returncode == 1 and "got something that exists" in done.stderr
    assert (tmp_path / "counterfactuals.json").read_text() == "mine"


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
