"""Every test runs the package under a runtime checker of its annotated types and shapes."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Before NumPy loads BLAS, and for the processes that pytest-xdist starts: several processes with
# several BLAS threads each spend most of their time waiting for one another.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# Likewise: what one process of these tests has compiled, the others and their commands need not.
OWN_PROGRAMS = "JAX_COMPILATION_CACHE_DIR" not in os.environ
if OWN_PROGRAMS:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="programs-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
# Most programs of the tests run for less time than their fused loops take to compile. A release of
# XLA without this option would end the process, so another one tries it.
QUICK_TO_COMPILE = "--xla_cpu_use_fusion_emitters=false"
if "XLA_FLAGS" not in os.environ:
    tried = subprocess.run(
        [sys.executable, "-c", "import jax; jax.numpy.zeros(1)"],
        env={**os.environ, "XLA_FLAGS": QUICK_TO_COMPILE},
        capture_output=True,
    )
    os.environ["XLA_FLAGS"] = QUICK_TO_COMPILE if tried.returncode == 0 else ""

from jaxtyping import install_import_hook  # noqa: E402

install_import_hook("bayes_simfluence", "beartype.beartype")

import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")


OPTIMIZED = ("statistical", "parity", "optimized")
"""Markers of tests that compute for long; in the others compilation takes most of the time."""


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Before any fixture, those of wider scope included."""
    wanted = any(item.get_closest_marker(one) for one in OPTIMIZED)
    benchmark = "benchmark" in getattr(item, "fixturenames", ())
    jax.config.update("jax_disable_most_optimizations", not (wanted or benchmark))


MAPS = Path("/proc/self/maps")
MOST_MAPS = 20_000
"""Each compiled program holds some memory maps, and Linux grants a process 65,530 of them; one more
ends it without a word."""


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item) -> None:
    """After each test: drop the compiled programs when they have become too many."""
    if MAPS.exists() and len(MAPS.read_bytes().splitlines()) > MOST_MAPS:
        jax.clear_caches()


def pytest_unconfigure(config: pytest.Config) -> None:
    """At the end of the process that started the others, which have found the folder made."""
    if OWN_PROGRAMS:
        shutil.rmtree(os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)


@pytest.fixture
def key() -> jax.Array:
    return jax.random.key(0)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture(scope="session")
def minilm_task() -> Callable[..., Any]:
    """Makes two-class fine-tuning of all weights of MiniLM on random texts of mixed length."""

    def made(train: int, queries: int, *, tokens: int = 32, words: int = 20_000) -> Any:
        import jax.numpy as jnp

        from bayes_simfluence.networks.checkpoint import load_checkpoint, network_of
        from bayes_simfluence.networks.heads import head_logits, with_head
        from bayes_simfluence.networks.network import Sequence
        from bayes_simfluence.tasks.task import Task
        from bayes_simfluence.tasks.tokens import filled_lengths, shortened

        checkpoint = load_checkpoint("minilm")
        network, rng = network_of(checkpoint), np.random.default_rng(0)

        def examples(count: int) -> dict[str, jax.Array]:
            lengths = rng.integers(tokens // 4, tokens + 1, count)
            return {
                "tokens": jnp.asarray(rng.integers(1000, 1000 + words, (count, tokens)), jnp.int32),
                "attended": jnp.asarray(np.arange(tokens)[None] < lengths[:, None]),
                "label": jnp.asarray(rng.integers(0, 2, count), jnp.int32),
            }

        def outputs(weights: Any, example: Any) -> jax.Array:
            found = example["tokens"]
            sequence = Sequence(found, jnp.zeros_like(found), example["attended"])
            return head_logits(network, weights, sequence, "mean")

        def output_loss(logits: jax.Array, example: Any) -> jax.Array:
            return -jax.nn.log_softmax(logits)[example["label"]]

        names = [name for name in network.shapes if "pooler" not in name]
        weights = {name: checkpoint.tensors[name] for name in names}
        query = examples(queries)
        return Task(
            params=with_head(weights, network, 2, jax.random.key(0)),
            loss=lambda weights, example: output_loss(outputs(weights, example), example),
            outputs=outputs,
            output_loss=output_loss,
            train=examples(train),
            query=query,
            train_ids=range(train),
            query_ids=range(queries),
            provenance={"folder": str(checkpoint.folder)},
            query_lengths=filled_lengths(query),
            cut=shortened,
        )

    return made


@pytest.fixture(scope="session")
def minilm_torch() -> Callable[[Any], Any]:
    """Makes transformers' MiniLM with the head of a ``minilm_task``, a function of tokens and of
    what is attended to."""

    def made(task: Any) -> Any:
        import torch
        import transformers

        class Classifier(torch.nn.Module):  # type: ignore[misc]
            def __init__(self) -> None:
                super().__init__()
                self.encoder = transformers.AutoModel.from_pretrained(
                    task.provenance["folder"],
                    add_pooling_layer=False,
                    dtype=torch.float32,
                    attn_implementation="eager",
                )
                self.classifier = torch.nn.Linear(self.encoder.config.hidden_size, 2)

            def forward(self, tokens: Any, attended: Any) -> Any:
                # Scores as a mask: transformers asks a mask of bits for values, which vmap forbids.
                mask = (1.0 - attended)[:, None, None, :] * torch.finfo(torch.float32).min
                hidden = self.encoder(input_ids=tokens, attention_mask=mask).last_hidden_state
                pooled = (hidden * attended[..., None]).sum(1) / attended.sum(1, keepdim=True)
                return self.classifier(pooled)

        model = Classifier().eval()
        with torch.no_grad():
            for name in ("weight", "bias"):
                value = torch.tensor(np.array(task.params[f"classifier.{name}"]))
                getattr(model.classifier, name).copy_(value)
        return model

    return made


@pytest.fixture(scope="session")
def kronfluence_scores() -> Callable[..., Any]:
    """Fits kronfluence's EK-FAC to a classifier of two classes and scores ``(train, query)``.

    Two classes have one direction of slopes, so nothing is random.
    """

    def made(
        model: Any,
        train: Any,
        query: Any,
        *,
        logits: Callable[[Any, Any], Any],
        label: Callable[[Any], Any],
        mask: Callable[[Any], Any] = lambda batch: None,
        damping: float,
        queries: int,
        folder: Path,
    ) -> Any:
        from kronfluence.analyzer import Analyzer, prepare_model
        from kronfluence.arguments import FactorArguments, ScoreArguments
        from kronfluence.task import Task
        from torch.nn.functional import cross_entropy

        class Classifier(Task):  # type: ignore[misc]
            def compute_train_loss(self, batch: Any, model: Any, sample: bool = False) -> Any:
                outputs = logits(model, batch)
                if not sample:
                    return cross_entropy(outputs, label(batch), reduction="sum")
                shares = outputs.detach().softmax(-1)
                return (shares.prod(-1).sqrt() * (outputs[:, 0] - outputs[:, 1])).sum()

            def compute_measurement(self, batch: Any, model: Any) -> Any:
                return self.compute_train_loss(batch, model)

            def get_attention_mask(self, batch: Any) -> Any:
                return mask(batch)

        task = Classifier()
        analyzer = Analyzer(
            "classifier",
            prepare_model(model, task),
            task,
            cpu=True,
            disable_tqdm=True,
            output_dir=str(folder),
        )
        analyzer.fit_all_factors("factors", train, 20, factor_args=FactorArguments("ekfac"))
        analyzer.compute_pairwise_scores(
            "scores", "factors", query, train, queries, 20, score_args=ScoreArguments(damping)
        )
        return analyzer.load_pairwise_scores("scores")["all_modules"].T.numpy()

    return made
