"""What trains and what does not: splits, adapters by hand, gradients, refusals, a recording."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bayes_simfluence.checks import Misuse
from bayes_simfluence.networks.families import family_of
from bayes_simfluence.recording.config import RecordConfig
from bayes_simfluence.recording.record import record
from bayes_simfluence.recording.settings import Placement
from bayes_simfluence.tasks.task import Task
from bayes_simfluence.tuning.base import Tuning
from bayes_simfluence.tuning.layers import linear_layers, matched
from bayes_simfluence.tuning.tunings import IA3, Full, Head, LoRA, tuning_of

HIDDEN, WIDE = 4, 6


def bert_like(rng, dtype=jnp.float32):
    """A layer, embeddings, a head and a constant, under BERT's names."""
    layer = "encoder.layer.0"
    shapes = {
        "embeddings.word_embeddings.weight": (5, HIDDEN),
        "embeddings.LayerNorm.weight": (HIDDEN,),
        f"{layer}.attention.self.query.weight": (HIDDEN, HIDDEN),
        f"{layer}.attention.self.query.bias": (HIDDEN,),
        f"{layer}.attention.self.value.weight": (HIDDEN, HIDDEN),
        f"{layer}.attention.self.value.bias": (HIDDEN,),
        f"{layer}.attention.self.key.weight": (HIDDEN, HIDDEN),
        f"{layer}.attention.self.key.bias": (HIDDEN,),
        f"{layer}.output.dense.weight": (HIDDEN, WIDE),
        f"{layer}.output.dense.bias": (HIDDEN,),
        "classifier.weight": (2, HIDDEN),
        "classifier.bias": (2,),
    }
    tensors = {name: jnp.asarray(rng.normal(size=shape), dtype) for name, shape in shapes.items()}
    return {**tensors, "embeddings.position_ids": jnp.arange(5)}


def begun(tuning, tensors, family="bert"):
    return tuning.begin(tensors, family=family, key=jax.random.key(0))


def assembled(tuned):
    return tuned.assemble(tuned.params, tuned.frozen)


def same_bits(first, second):
    return (
        first.dtype == second.dtype and np.asarray(first).tobytes() == np.asarray(second).tobytes()
    )


EVERY = {
    "full": Full(),
    "excluding": Full(exclude=["embeddings.*"]),
    "head": Head(),
    "lora": LoRA(rank=3),
    "ia3": IA3(),
}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("tuning", EVERY.values(), ids=EVERY)
def test_training_starts_at_the_very_same_tensors(rng, tuning, dtype):
    tensors = bert_like(rng, dtype)
    tuned = begun(tuning, tensors)
    merged = assembled(tuned)
    assert sorted(merged) == sorted(tensors)
    assert all(same_bits(merged[name], tensors[name]) for name in tensors)
    assert isinstance(tuning, Tuning)


@pytest.mark.parametrize("tuning", EVERY.values(), ids=EVERY)
def test_only_what_is_trained_has_gradients_and_optimizer_state(rng, tuning):
    tuned = begun(tuning, bert_like(rng))
    started = jax.tree.map(lambda leaf: leaf + 0.1, tuned.params)

    def loss(params):
        values = tuned.assemble(params, tuned.frozen).values()
        return sum(jnp.square(value).sum() for value in values if value.dtype == jnp.float32)

    gradient = jax.jit(jax.grad(loss))(started)
    assert gradient.keys() == tuned.params.keys()
    assert all(np.abs(value).max() > 0 for value in gradient.values())
    state = optax.adamw(0.1).init(tuned.params)
    leaves = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim]
    assert len(leaves) == 2 * len(tuned.params)
    assert sum(leaf.size for leaf in leaves) == 2 * tuned.counts()["trained"]


def test_what_each_trains(rng):
    tensors = bert_like(rng)
    head = {"classifier.weight", "classifier.bias"}
    floating = set(tensors) - {"embeddings.position_ids"}
    attention = "encoder.layer.0.attention.self"
    trained = {name: set(begun(tuning, tensors).params) for name, tuning in EVERY.items()}
    assert trained["full"] == floating
    assert trained["excluding"] == {name for name in floating if "embeddings" not in name}
    assert trained["head"] == head
    assert trained["lora"] == head | {
        f"{attention}.{part}.lora_{factor}.weight" for part in ("query", "value") for factor in "AB"
    }
    assert trained["ia3"] == head | {
        f"{attention}.key.ia3_l",
        f"{attention}.value.ia3_l",
        "encoder.layer.0.output.dense.ia3_l",
    }


def test_counts_and_settings_are_plain_values(rng):
    tensors = bert_like(rng)
    network = sum(value.size for value in tensors.values()) - 5
    settings = begun(LoRA(rank=3, alpha=5), tensors).as_dict()
    trained = 2 * (3 * HIDDEN + HIDDEN * 3) + 2 * HIDDEN + 2
    total = network + trained - (2 * HIDDEN + 2)
    assert settings == {
        "name": "lora",
        "rank": 3,
        "alpha": 5,
        "targets": ["query", "value"],
        "trained": trained,
        "total": total,
        "share": trained / total,
    }
    assert begun(Full(["embeddings.*"]), tensors).as_dict()["exclude"] == ["embeddings.*"]
    settings = begun(IA3(), tensors).as_dict()
    assert settings["targets"] == ["key", "value", "output.dense"]
    assert settings["feedforward"] == ["output.dense"]
    assert IA3().as_dict() == {"name": "ia3", "targets": None, "feedforward": None}
    assert begun(Head(), tensors).counts()["trained"] == 2 * HIDDEN + 2


# By hand

WEIGHT = [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]
BIAS = [10.0, 20.0]


def by_hand(tuning, params, *, family="bert", dtype=jnp.float32, layer="query"):
    """Weight and bias of a layer of three inputs and two outputs under the adapter ``params``."""
    weight = jnp.asarray(WEIGHT, dtype)
    weight = weight.T if family == "gpt2" else weight
    tensors = {f"a.{layer}.weight": weight, f"a.{layer}.bias": jnp.asarray(BIAS, dtype)}
    tuned = begun(tuning, tensors, family)
    adapter = {f"a.{layer}.{name}": jnp.asarray(value) for name, value in params.items()}
    shapes = {name: value.shape for name, value in adapter.items()}
    assert {name: value.shape for name, value in tuned.params.items()} == shapes
    merged = tuned.assemble(adapter, tuned.frozen)
    weight = merged[f"a.{layer}.weight"]
    return weight.T if family == "gpt2" else weight, merged[f"a.{layer}.bias"]


@pytest.mark.parametrize(("family", "layer"), [("bert", "query"), ("gpt2", "c_attn")])
def test_lora_by_hand(family, layer):
    """alpha / rank = 3, B A = [[1, 0, -1], [2, 0, -2]]."""
    params = {"lora_A.weight": [[1.0, 0.0, -1.0]], "lora_B.weight": [[1.0], [2.0]]}
    tuning = LoRA(rank=1, alpha=3, targets=[layer])
    weight, bias = by_hand(tuning, params, family=family, layer=layer)
    np.testing.assert_array_equal(weight, [[4.0, 2.0, 0.0], [10.0, 5.0, 0.0]])
    np.testing.assert_array_equal(bias, BIAS)


@pytest.mark.parametrize(("family", "layer"), [("bert", "key"), ("gpt2", "c_attn")])
def test_ia3_of_outputs_by_hand(family, layer):
    """Rows of the weight, and the bias."""
    tuning = IA3(targets=[layer], feedforward=[])
    weight, bias = by_hand(tuning, {"ia3_l": [[2.0], [0.5]]}, family=family, layer=layer)
    np.testing.assert_array_equal(weight, [[2.0, 4.0, 6.0], [2.0, 2.5, 3.0]])
    np.testing.assert_array_equal(bias, [20.0, 10.0])


@pytest.mark.parametrize(("family", "layer"), [("bert", "output.dense"), ("gpt2", "mlp.c_proj")])
def test_ia3_of_inputs_by_hand(family, layer):
    """Columns of the weight; the bias stays."""
    tuning = IA3(targets=[layer])
    weight, bias = by_hand(tuning, {"ia3_l": [[2.0, 1.0, 0.0]]}, family=family, layer=layer)
    np.testing.assert_array_equal(weight, [[2.0, 2.0, 0.0], [8.0, 5.0, 0.0]])
    np.testing.assert_array_equal(bias, BIAS)


def test_changes_of_bfloat16_weights_are_added_in_float32():
    """1 - 257/256, where bfloat16 has no 257/256 and would take 1 for it."""
    params = {"lora_A.weight": [[-257 / 256, 0.0, 0.0]], "lora_B.weight": [[1.0], [0.0]]}
    tuning = LoRA(rank=1, alpha=1, targets=["query"])
    weight, bias = by_hand(tuning, params, dtype=jnp.bfloat16)
    assert weight.dtype == bias.dtype == jnp.bfloat16
    assert weight[0, 0] == -1 / 256


def test_lora_starts_uniform_within_the_bound_and_by_the_key(rng):
    tensors = {"a.query.weight": jnp.ones((7, 400))}
    name = "a.query.lora_A.weight"
    down = np.asarray(begun(LoRA(rank=50, targets=["query"]), tensors).params[name])
    bound = 400**-0.5
    assert np.abs(down).max() <= bound
    assert np.abs(down).max() > 0.99 * bound
    assert abs(down.std() / (bound / 3**0.5) - 1) < 0.02
    other = LoRA(rank=50, targets=["query"]).begin(tensors, family="", key=jax.random.key(1))
    assert not np.array_equal(down, other.params[name])


def test_many_runs_are_assembled_by_vmap(rng):
    tuned = begun(LoRA(rank=2), bert_like(rng))
    name = "encoder.layer.0.attention.self.query"
    up = jnp.asarray(rng.normal(size=(3, HIDDEN, 2)), jnp.float32)
    several = {name: jnp.repeat(value[None], 3, 0) for name, value in tuned.params.items()}
    several[f"{name}.lora_B.weight"] = up
    together = jax.vmap(tuned.assemble, in_axes=(0, None))(several, tuned.frozen)
    for run in range(3):
        alone = tuned.assemble({**tuned.params, f"{name}.lora_B.weight": up[run]}, tuned.frozen)
        np.testing.assert_allclose(
            together[f"{name}.weight"][run], alone[f"{name}.weight"], rtol=1e-6
        )


# Names


def test_patterns_match_whole_names_or_ends_after_a_dot():
    names = ["a.value", "a.lm_value", "b.value", "value", "b.value.dense"]
    assert matched(names, "value") == ["a.value", "b.value", "value"]
    assert matched(names, "b.value") == ["b.value"]
    assert matched(names, "b.*") == ["b.value", "b.value.dense"]
    assert matched(names, "nothing") == []


def test_embeddings_norms_biases_and_the_head_are_no_linear_layers(rng):
    layer = "encoder.layer.0"
    parts = ("key", "query", "value")
    expected = [*(f"{layer}.attention.self.{part}" for part in parts), f"{layer}.output.dense"]
    assert linear_layers(bert_like(rng), family_of("bert")) == expected


def test_constants_of_old_checkpoints_do_not_train():
    tensors = {
        "h.0.attn.c_attn.weight": jnp.ones((4, 12)),
        "h.0.attn.bias": jnp.ones((1, 1, 8, 8)),
        "h.0.attn.masked_bias": jnp.ones(()),
        "h.0.rotary_emb.inv_freq": jnp.ones(3),
    }
    assert list(begun(Full(), tensors, "gpt2").params) == ["h.0.attn.c_attn.weight"]


@pytest.mark.parametrize(
    ("tuning", "family", "match"),
    [
        (
            LoRA(targets=["qury"]),
            "bert",
            r"targets 'qury': got no linear layer.*key, query, value, dense",
        ),
        (LoRA(targets=["query", "LayerNorm"]), "bert", r"targets 'LayerNorm': .*encoder\.layer\.0"),
        (LoRA(targets=["classifier"]), "bert", "targets 'classifier'"),
        (LoRA(), "mamba", r"targets: got none, for the family 'mamba'.*bert.*query"),
        (LoRA(targets=[]), "bert", r"targets: got \[\]"),
        (LoRA(targets="query"), "bert", r"targets: got 'query'; expected a sequence"),
        (LoRA(), "gpt2", r"targets 'c_attn': got no linear layer"),
        (LoRA(rank=0), "bert", "rank: got 0"),
        (LoRA(alpha=0.0), "bert", "alpha: got 0.0"),
        (IA3(), "mamba", "targets: got none"),
        (IA3(targets=["query"]), "mamba", "feedforward: got none, for the family 'mamba'"),
        (IA3(targets=["key"], feedforward=["dense"]), "bert", "feedforward 'dense': got no linear"),
        (Full(exclude=["embedings.*"]), "bert", r"exclude 'embedings\.\*': got no tensor"),
        (Full(exclude=["*"]), "bert", r"exclude: got patterns \*, which match every tensor"),
        (Full(exclude="embeddings"), "bert", r"exclude: got 'embeddings'; expected a sequence"),
    ],
)
def test_what_does_not_fit_is_refused(rng, tuning, family, match):
    with pytest.raises(Misuse, match=match):
        begun(tuning, bert_like(rng), family)


def test_a_head_is_needed_to_train_one(rng):
    tensors = {name: value for name, value in bert_like(rng).items() if "classifier" not in name}
    with pytest.raises(Misuse, match=r"tuning head: got a network without tensors classifier"):
        begun(Head(), tensors)
    assert all("lora" in name for name in begun(LoRA(), tensors).params)


# Settings


@pytest.mark.parametrize(
    ("settings", "tuning"),
    [
        ({}, Full()),
        ({"exclude": "embeddings.*, *.bias"}, Full(("embeddings.*", "*.bias"))),
        ({"tuning": "head"}, Head()),
        ({"tuning": "lora", "rank": 2, "alpha": 3.0}, LoRA(2, 3.0)),
        ({"tuning": "lora", "targets": "query,key"}, LoRA(8, 16.0, ("query", "key"))),
        ({"tuning": "ia3", "targets": "key"}, IA3(("key",))),
    ],
)
def test_settings_name_a_tuning(settings, tuning):
    assert RecordConfig(**settings).validate().chosen_tuning() == tuning


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"tuning": "dora"}, "tuning: got 'dora'; expected one of full, head, lora, ia3"),
        ({"tuning": "lora", "rank": 0}, "rank: got 0"),
        ({"tuning": "lora", "alpha": -1.0}, "alpha: got -1.0"),
        ({"targets": "query"}, "targets: got 'query' with tuning 'full'.*lora or ia3"),
        ({"tuning": "ia3", "exclude": "x"}, "exclude: got 'x' with tuning 'ia3'"),
    ],
)
def test_settings_that_name_none_are_refused(settings, match):
    with pytest.raises(Misuse, match=match):
        RecordConfig(**settings).validate()


def test_an_unknown_name_is_refused():
    with pytest.raises(Misuse, match=r"tuning: got 'all'"):
        tuning_of("all")


# Recording


def test_recording_trains_the_adapters_alone(tmp_path, rng):
    """A network of one layer: its runs are those of plain SGD on the adapter, by hand."""
    tensors = {
        "a.query.weight": jnp.asarray(rng.normal(size=(3, 6)), jnp.float32),
        "classifier.weight": jnp.asarray(rng.normal(size=(1, 3)), jnp.float32),
    }
    tuned = begun(LoRA(rank=1, alpha=1, targets=["query"]), tensors)
    assert tuned.counts()["trained"] < sum(value.size for value in tensors.values())
    inputs = jnp.asarray(rng.normal(size=(5, 6)), jnp.float32)

    def loss(weights, example):
        return (weights["classifier.weight"] @ (weights["a.query.weight"] @ example))[0] ** 2

    task = Task(
        params=tuned.params,
        frozen=tuned.frozen,
        assemble=tuned.assemble,
        loss=loss,
        train=inputs[:3],
        query=inputs[3:],
        train_ids=range(3),
        query_ids=range(2),
        provenance={"tuning": tuned.as_dict()},
    )
    curricula = np.array([[[0], [1]], [[2], [0]]])
    optimizer = optax.inject_hyperparams(optax.sgd)(0.01)
    runs = record(
        task,
        curricula,
        optimizer,
        store=tmp_path / "runs.zarr",
        placement=Placement(parallel=2),
        features=0,
    )
    assert runs.attrs["tuning"] == tuned.as_dict()
    for run, batches in enumerate(curricula[:, :, 0]):
        params, losses = tuned.params, []
        for example in [None, *batches]:
            if example is not None:

                def of(params, example=example):
                    return loss(tuned.assemble(params, tuned.frozen), inputs[example])

                slope = jax.grad(of)(params)
                params = {name: params[name] - 0.01 * slope[name] for name in params}
            weights = tuned.assemble(params, tuned.frozen)
            losses.append([loss(weights, example) for example in inputs[3:]])
        np.testing.assert_allclose(runs["loss"][run], losses, rtol=1e-5)
