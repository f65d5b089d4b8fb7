"""The demo: what it writes, and at full size (with the statistical suites) what it says."""

import json
from importlib.resources import files

import jax
import pandas as pd
import pytest

import bayes_simfluence as bs
from bayes_simfluence.checks import Misuse
from bayes_simfluence.demo import main, pretrain
from bayes_simfluence.demo.main import run_demo
from bayes_simfluence.demo.pretrain import pretrained_checkpoint
from bayes_simfluence.networks.checkpoint import load_checkpoint, load_tokenizer
from bayes_simfluence.progress import Silent

# Ten of 32 examples dropped leaves what was recorded; at full size ten of 160 do not.
pytestmark = pytest.mark.filterwarnings("ignore::bayes_simfluence.SupportWarning")
SMALL = {"examples": 40, "queries": 6, "per_run": 32, "batch_size": 4, "epochs": 3}


@pytest.fixture(
    scope="module", params=["small", pytest.param("full", marks=pytest.mark.statistical)]
)
def demo(request, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "small":
            patch.setattr(main, "SIZES", SMALL)
            patch.setattr(main, "HELD_OUT", 2)
            patch.setattr(pretrain, "STEPS", 50)
        yield run_demo(tmp_path_factory.mktemp("demo") / "out")


def test_it_writes_everything_it_promises(demo):
    written = {path.name for path in demo.folder.iterdir()}
    promised = {
        "runs.zarr", "runs.yaml", "posterior.nc", "table.csv", "table.md", "curves.png",
        "coverage.png", "effects.png", "counterfactual.png", "dropped.csv",
    }  # fmt: skip
    assert promised <= written
    runs = bs.open_runs(demo.folder / "runs.zarr")
    assert runs.sizes["run"] >= 16
    assert len({batch.tobytes() for batch in runs["batch"].values}) == runs.sizes["run"]
    assert bs.load_posterior(demo.folder / "posterior.nc").runs.sizes["run"] == main.FITTED


def table_of(demo):
    return pd.read_csv(demo.folder / "table.csv", index_col="method")


def test_the_table_compares_the_methods(demo):
    assert list(table_of(demo).index) == [
        "bayes", "ridge (paper)", "mean trajectory", "initial loss kept",
    ]  # fmt: skip


@pytest.mark.statistical
@pytest.mark.parametrize("demo", ["full"], indirect=True)
def test_the_model_predicts_best(demo):
    table = table_of(demo)
    assert table.loc["bayes", "mse"] < table.loc["ridge (paper)", "mse"]
    assert table.loc["bayes", "crps"] < table.loc["mean trajectory", "crps"]


def test_the_counterfactual_has_a_band_and_a_truth(demo):
    middle, low, high = demo.simulated
    assert low < middle < high
    assert middle < 0  # without what hurts it, the query's loss is lower
    assert len(demo.dropped) == 10 and (demo.dropped["probability_harmful"] > 0.5).all()


def test_it_does_not_write_into_what_exists(tmp_path):
    with pytest.raises(Misuse, match="something that exists"):
        run_demo(tmp_path)


def test_the_texts_that_ship_are_clean():
    for name, count in (("train", 320), ("query", 80)):
        lines = (files("bayes_simfluence.demo") / f"{name}.jsonl").read_text("utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        assert len(rows) == count == len({row["text"] for row in rows})
        assert sum(row["label"] == "positive" for row in rows) == count / 2


def test_pretraining_makes_a_checkpoint_that_depends_on_its_seed(tmp_path, monkeypatch):
    monkeypatch.setattr("bayes_simfluence.demo.pretrain.STEPS", 50)
    texts = ["a good day.", "a bad day.", "good food."]
    compiled = pretrain._some_steps._cache_size()
    for name, seed in (("first", 0), ("again", 0), ("other", 1)):
        pretrained_checkpoint(texts, tmp_path / name, key=jax.random.key(seed), progress=Silent())
    first, again, other = (load_checkpoint(tmp_path / name) for name in ("first", "again", "other"))
    assert pretrain._some_steps._cache_size() == compiled + 1, "once for the three of them"
    words = "embeddings.word_embeddings.weight"
    assert (first.tensors[words] == again.tensors[words]).all()
    assert (first.tensors[words] != other.tensors[words]).any()
    tokenizer = load_tokenizer(tmp_path / "first")
    assert tokenizer.decode(tokenizer("good zebra")["input_ids"]).startswith("[CLS] good z")
