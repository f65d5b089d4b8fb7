"""Finding wrong labels: a fifth of them is flipped, and methods rank the examples by suspicion.

    python examples/07_wrong_labels.py --train sst2/train.jsonl --query sst2/test.jsonl --out FOLDER

Random subsets of the examples, wrong labels included, train a checkpoint in 24 recorded runs; the
labels of queries are right. Examples are ranked by the posterior probability that they do harm, by
their scores (TracIn over five checkpoints of one run, summed over queries), and by self-influence,
which uses no query. Writes precision and recall as a picture and a table. Without files the example
makes a small checkpoint and trains it on texts that ship with the package: a minute or two.
"""

import argparse
import json
from pathlib import Path

import jax
import numpy as np

import bayes_simfluence as bs
from bayes_simfluence.attribution.tracin import self_influence, tracin
from bayes_simfluence.demo.pretrain import pretrained_checkpoint
from bayes_simfluence.evaluation.mislabel import detection, flip_labels, probability_of_harm
from bayes_simfluence.progress import Bars
from bayes_simfluence.recording.checkpoints import open_checkpoints
from bayes_simfluence.recording.config import RecordConfig
from bayes_simfluence.recording.from_config import design_of, optimizer_of, task_of
from bayes_simfluence.recording.record import record
from bayes_simfluence.recording.session import merged, record_from_config
from bayes_simfluence.report.attribution import plot_detection
from bayes_simfluence.report.plots import save_figure

SHARE = 0.2
"""Of the labels that are flipped."""
POINTS = 5
"""Checkpoints that TracIn and self-influence use."""
SIZE = {"examples": 200, "queries": 100, "per_run": 100, "epochs": 2, "runs": 24}
SMALL = {"examples": 24, "queries": 8, "per_run": 12, "epochs": 2, "runs": 5, "learning_rate": 5e-4}
"""Sizes without files."""


def rows_of(path: Path) -> list[dict]:
    """The objects of JSON lines."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines() if line.strip()]


def with_wrong_labels(path: Path, count: int, out: Path) -> set[str]:
    """Write the first ``count`` examples, some with another label; return the ids of these."""
    rows = rows_of(path)[:count]
    noisy = flip_labels([row["label"] for row in rows], SHARE, key=jax.random.key(0))
    wrong = set()
    with out.open("w", encoding="utf-8") as file:
        for place, (row, label, flipped) in enumerate(
            zip(rows, noisy.labels, noisy.flipped, strict=True)
        ):
            name = str(row.get("id", place))
            file.write(json.dumps({**row, "id": name, "label": label}) + "\n")
            wrong |= {name} if flipped else set()
    return wrong


def record_all(config: RecordConfig, out: Path) -> tuple:
    """Record all runs, and the first of them once more with its checkpoints."""
    runs = record_from_config(config, out / "runs.zarr", progress=Bars())
    task, curricula = task_of(config), design_of(config).curricula
    record(
        task,
        curricula[:1],
        optimizer_of(config),
        store=out / "pilot.zarr",
        evaluation=bs.Evaluation(evaluate_every=config.steps, checkpoints=POINTS),
        features=0,
        progress=Bars(),
    )
    return runs, task, open_checkpoints(out / "pilot.zarr", 0)


def main() -> None:
    """Flip, record, rank, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("wrong-labels"))
    parser.add_argument("--train", type=Path, help="JSON lines with text and label")
    parser.add_argument("--query", type=Path, help="JSON lines whose labels are right")
    parser.add_argument("--checkpoint", default="minilm")
    options = parser.parse_args()
    options.out.mkdir(parents=True)
    size = SIZE
    if options.train is None:
        texts = Path(bs.__file__).parent / "demo"
        options.train, options.query, size = texts / "train.jsonl", texts / "query.jsonl", SMALL
        words = [row["text"] for path in (options.train, options.query) for row in rows_of(path)]
        options.checkpoint = options.out / "checkpoint"
        pretrained_checkpoint(words, options.checkpoint, key=jax.random.key(2), progress=Bars())
    wrong = with_wrong_labels(options.train, size["examples"], options.out / "train.jsonl")
    config = merged(
        {"checkpoint": str(options.checkpoint), "max_tokens": 32, "evaluate_every": 5, **size},
        {"train": str(options.out / "train.jsonl"), "query": str(options.query)},
    )
    runs, task, saved = record_all(config, options.out)
    posterior = bs.fit(runs, method=bs.Exact(), key=jax.random.key(3), progress=Bars())
    print(posterior.verdict)
    rankings = {
        "probability of harm": probability_of_harm(posterior, key=jax.random.key(4)),
        "TracIn": tracin(task, saved, progress=Bars()).sum("query"),
        "self-influence": self_influence(task, saved, progress=Bars()),
    }
    flipped = [str(name) in wrong for name in runs["train"].values]
    detections = {
        name: detection(suspicion, flipped, key=jax.random.key(5))
        for name, suspicion in rankings.items()
    }
    save_figure(plot_detection(detections), options.out / "wrong-labels.png")
    lines = ["| ranked by | average precision | found in the first 20% |", "|---|---|---|"]
    for name, curves in detections.items():
        precision = [float(curves[f"average_precision{end}"]) for end in ("", "_low", "_high")]
        first = curves.sel(examined=SHARE, method="nearest")
        recall = [float(first[f"recall{end}"]) for end in ("", "_low", "_high")]
        texts = ("{:.2f} [{:.2f}, {:.2f}]".format(*three) for three in (precision, recall))
        lines.append(f"| {name} | {' | '.join(texts)} |")
    lines.append(f"| nothing | {np.mean(flipped):.2f} | {SHARE:.2f} |")
    (options.out / "wrong-labels.md").write_text("\n".join(lines) + "\n", "utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
