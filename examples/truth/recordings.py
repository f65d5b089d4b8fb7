"""What was really trained: random and diverse runs to be fitted, and runs of every kind.

The demo's small network is recorded on the spot. Recordings of MiniLM ship as example runs; with
``--data`` they are recorded anew from the texts.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import jax
import numpy as np
import xarray as xr
from truth.kinds import KINDS, LIKE, NEW_QUERIES, Source

import bayes_simfluence as bs
from bayes_simfluence.data.designs import Design
from bayes_simfluence.demo.pretrain import pretrained_checkpoint
from bayes_simfluence.progress import Bars
from bayes_simfluence.recording.config import RecordConfig
from bayes_simfluence.recording.from_config import classes_of, optimizer_of, task_of
from bayes_simfluence.tasks.rows import read_rows

Settings = Mapping[str, Any]
"""Settings of a recording by name."""
DEMO: Settings = {
    "examples": 256,
    "queries": 48,
    "runs": 16,
    "per_run": 160,
    "batch_size": 8,
    "epochs": 5,
    "learning_rate": 8e-4,
    "max_tokens": 24,
    "parallel": 8,
    "design": "diverse",
}
SMALL: Settings = {
    **DEMO,
    "examples": 27,
    "queries": 8,
    "runs": 5,
    "per_run": 16,
    "batch_size": 4,
    "epochs": 3,
}
"""A trial."""
MINILM: Settings = {
    "checkpoint": "minilm",
    "examples": 160,
    "queries": 32,
    "runs": 16,
    "per_run": 96,
    "batch_size": 4,
    "epochs": 3,
    "learning_rate": 5e-5,
    "max_tokens": 24,
    "evaluate_every": 3,
}
SST2: Settings = {**MINILM, "evaluate_every": 1, "design": "diverse"}
LORA: Settings = {**MINILM, "tuning": "lora", "learning_rate": 1e-3}
RECORDINGS: dict[str, tuple[str, Settings]] = {
    "sst2": ("sst2", SST2),
    "trec": ("trec", MINILM),
    "sst2-lora": ("sst2", LORA),
    "trec-lora": ("trec", LORA),
}
"""Name -> folder of its texts, and settings. Those of ``design`` diverse have such runs as well."""
NEW = 9
"""One of so many examples is in no fitted run, one of half so many queries in no fit."""
JUDGED = 4
"""Runs of each kind."""
RANDOM, DIVERSE = "random", "diverse"


@dataclass(frozen=True)
class Recorded:
    """Everything that was trained.

    Attributes:
        fitted: runs to fit, by design, without what is new.
        kinds: runs to judge with; the first, second, ... of each kind come of the same run.
        sides: the class of each query, by kind.
    """

    fitted: dict[str, xr.Dataset]
    kinds: dict[str, xr.Dataset]
    sides: dict[str, np.ndarray]


def demo_settings(work: Path, size: Settings, seed: int) -> RecordConfig:
    """A checkpoint in ``work``, made if it is not there, and the settings of its fine-tuning."""
    texts: list[str] = []
    for name in ("train.jsonl", "query.jsonl"):
        with as_file(files("bayes_simfluence.demo") / name) as source:
            (work / name).write_bytes(source.read_bytes())
        texts += read_rows(work / name).column("text", "text_field")
    if not (work / "checkpoint").exists():
        key = jax.random.fold_in(jax.random.key(seed), 1)
        pretrained_checkpoint(texts, work / "checkpoint", key=key, progress=Bars())
    names = {name: str(work / f"{name}.jsonl") for name in ("train", "query")}
    checkpoint = str(work / "checkpoint")
    return RecordConfig(checkpoint=checkpoint, **names, **size, seed=seed).validate()


def text_settings(data: Path, name: str, seed: int) -> RecordConfig:
    """Settings of a recording of MiniLM, on texts in the folder ``data``."""
    folder, size = RECORDINGS[name]
    texts = {"train": data / folder / "train.jsonl", "query": data / folder / "test.jsonl"}
    names = {key: str(path) for key, path in texts.items()}
    return RecordConfig(**names, **size, seed=seed).validate()


def trained(work: Path, config: RecordConfig) -> list[xr.Dataset]:
    """Runs to fit and of every kind, recorded in ``work``: those of each length together.

    The coordinate ``curriculum`` says what a run is.
    """
    task = task_of(config)
    labels = classes_of(config, task)
    old = config.examples - config.examples // NEW
    random_key, judged_key = jax.random.split(jax.random.key(config.seed))
    sizes = {name: getattr(config, name) for name in ("per_run", "batch_size", "epochs")}
    given = {"runs": config.runs, "key": random_key, **sizes}
    curricula = {RANDOM: bs.designs.random(old, **given).curricula}
    if config.design == DIVERSE:
        diverse = bs.designs.diverse(old, labels=labels[:old], **given)
        curricula[DIVERSE] = diverse.curricula
    like = bs.designs.random(old, runs=JUDGED, key=judged_key, **sizes).curricula
    rng = np.random.default_rng(config.seed)
    new, classes = np.arange(old, config.examples), np.unique(labels)
    sources = [
        Source(run, classes[at % len(classes)], labels, new, rng) for at, run in enumerate(like)
    ]
    curricula |= {
        name: np.stack([kind.make(source) for source in sources])
        for name, kind in KINDS.items()
        if name != NEW_QUERIES
    }
    stores: dict[tuple[float, float], list[str]] = {}
    for name in curricula:
        kind = KINDS.get(name, KINDS[LIKE])
        stores.setdefault((kind.step_size, kind.length), []).append(name)
    recorded: dict[float, list[xr.Dataset]] = {}
    for (step_size, length), names in stores.items():
        rate = step_size * config.learning_rate
        # The schedule decays over the steps, which follow from the examples of a run.
        changed = replace(config, learning_rate=rate, per_run=int(length * config.per_run))
        kinds = tuple(name for name in names for _ in curricula[name])
        runs = bs.record(
            task,
            Design(np.concatenate([curricula[name] for name in names]), kinds),
            optimizer_of(changed),
            store=work / f"step-size-{step_size:.2g}-steps-{length:g}.zarr",
            evaluation=config.evaluation,
            placement=config.placement,
            provenance={"query_classes": np.asarray(task.query["label"]).tolist()},
            resume=True,
            progress=Bars(),
        )
        before = sum(part.sizes["run"] for part in recorded.get(length, []))
        recorded.setdefault(length, []).append(
            runs.assign_coords(run=before + np.arange(runs.sizes["run"]))
        )
    return [
        xr.concat(parts, "run", data_vars="minimal", combine_attrs="override")
        for parts in recorded.values()
    ]


def shipped(name: str) -> list[xr.Dataset]:
    """The same of a recording that ships with the package."""
    return [bs.example_runs(f"{name}-counterfactuals"), bs.example_runs(f"{name}-longer")]


def export(runs: list[xr.Dataset], name: str, folder: Path) -> None:
    """The files that ship."""
    for part, kind in zip(runs, ("counterfactuals", "longer"), strict=True):
        path = folder / f"example_runs_{name.replace('-', '_')}_{kind}.nc"
        bs.export_netcdf(part, path, overwrite=True)


def sorted_out(recorded: list[xr.Dataset]) -> Recorded:
    """Runs to fit, without what is new, and those of every kind."""
    classes = np.asarray(recorded[0].attrs["query_classes"])
    old = recorded[0].sizes["train"] - recorded[0].sizes["train"] // NEW
    known = np.arange(len(classes)) < len(classes) - 2 * len(classes) // NEW
    parts = {
        str(name): runs.isel(run=runs["curriculum"].values == name)
        for runs in recorded
        for name in np.unique(runs["curriculum"])
    }
    parts[NEW_QUERIES] = parts[LIKE]
    asked = {name: known if name != NEW_QUERIES else ~known for name in KINDS}
    return Recorded(
        {
            name: parts[name].isel(query=known, train=slice(old))
            for name in (RANDOM, DIVERSE)
            if name in parts
        },
        {name: parts[name].isel(query=which) for name, which in asked.items()},
        {name: classes[which] for name, which in asked.items()},
    )
