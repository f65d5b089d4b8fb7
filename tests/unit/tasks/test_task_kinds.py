"""Causal, choice and seq2seq tasks against losses computed by hand, word by word."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bayes_simfluence.checks import Misuse
from bayes_simfluence.recording.measure import fixed_of, length_groups, measure_of
from bayes_simfluence.tasks.causal import causal_task
from bayes_simfluence.tasks.choice import choice_task
from bayes_simfluence.tasks.classification import classification_task
from bayes_simfluence.tasks.likelihood import drawn_slopes, mean_nats
from bayes_simfluence.tasks.seq2seq import seq2seq_task
from bayes_simfluence.tuning.tunings import Full

WORDS = ["<pad>", "</s>", "<s>", "<unk>", "a", "b", "c", "d", "yes", "no"]
KEY = jax.random.key(0)
TRAIN = [{"q": "a b", "answer": "yes", "label": "1"}, {"q": "c", "answer": "no", "label": "0"}]
QUERY = [{"q": "b", "answer": "no no", "label": "0"}, {"q": "d a c", "answer": "yes", "label": "1"}]
METRICS = ["accuracy", "margin"]
LABELS = {"0": "no no", "1": "yes"}
COPA = [
    {"q": "a b", "one": "yes", "two": "no c", "label": 0},
    {"q": "d", "one": "c d a", "two": "b", "label": 1},
]


def every(function, task):
    """A loss or metric of all queries."""
    return np.asarray(jax.vmap(function, in_axes=(None, 0))(task.params, task.query))


def by_hand(model, before, words, *, read=None):
    """Nats of each of ``words`` after the tokens ``before``, one at a time, in NumPy."""
    embed, out = (np.asarray(model.tensors[name], float) for name in ("embed", "out"))
    ids, nats = list(before), []
    for word in words.split():
        state = sum(0.5**back * embed[token] for back, token in enumerate(reversed(ids)))
        logits = (state + (0.0 if read is None else read)) @ out.T
        ids.append(WORDS.index(word))
        nats.append(np.log(np.exp(logits).sum()) - logits[ids[-1]])
    return np.array(nats)


def ids(text):
    return [WORDS.index(word) for word in text.split()]


def read_by_hand(model, text):
    """What the encoder of an encoder-decoder hands over: the sum of all states."""
    embed = np.asarray(model.tensors["embed"], float)
    states = [np.zeros(embed.shape[1])]
    for token in ids(text):
        states.append(0.5 * states[-1] + embed[token])
    return sum(states)


def words_of(row):
    return " ".join(WORDS[token] for token in np.asarray(row))


# Causal


@pytest.fixture(scope="module")
def causal(toy, rows_of):
    """A causal task of questions and answers, for any toy and settings."""

    def made(model=None, train=TRAIN, query=QUERY, **settings):
        arguments = {"prompt": "{q}", "completion": "{answer}", "key": KEY, **settings}
        return causal_task(model or toy("decoder"), rows_of(train), rows_of(query), **arguments)

    return made


def test_causal_loss_is_the_mean_over_the_completion_by_hand(toy, causal):
    model, task = toy("decoder"), causal()
    expected = [by_hand(model, ids(row["q"]), f"{row['answer']} </s>").mean() for row in QUERY]
    np.testing.assert_allclose(every(task.loss, task), expected, rtol=1e-5)
    assert task.validate().provenance == {
        "model": "toy",
        "tuning": {"name": "full", "exclude": [], "trained": 100, "total": 100, "share": 1.0},
        "task": "causal",
        "prompt": "{q}",
        "completion": "{answer}",
        "padded_tokens": 8,
        "truncated": {"train": 0, "query": 0},
    }


def test_causal_residual_is_the_mean_probability_that_tokens_lack_by_hand(toy, causal):
    model, task = toy("decoder"), causal()

    def residual(weights, example):
        return task.output_residual(task.outputs(weights, example), example)

    nats = [by_hand(model, ids(row["q"]), f"{row['answer']} </s>") for row in QUERY]
    expected = [(1 - np.exp(-tokens)).mean() for tokens in nats]
    np.testing.assert_allclose(every(residual, task), expected, rtol=1e-5)


def test_causal_without_a_prompt_begins_with_eos_and_predicts_everything(toy, causal):
    model, task = toy("decoder"), causal(prompt="", completion="{q}")
    assert words_of(task.query["tokens"][0]).startswith("</s> b </s> <pad>")
    expected = [by_hand(model, [1], f"{row['q']} </s>").mean() for row in QUERY]
    np.testing.assert_allclose(every(task.loss, task), expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, "b no no </s> <pad>"),
        ({"bos": True}, "<s> b no no </s>"),
        ({"eos": False}, "b no no <pad> <pad>"),
        ({"pad": False}, "b no no </s> </s>"),
        ({"pad": False, "eos": False}, "b no no <pad> <pad>"),
    ],
)
def test_special_tokens_of_a_causal_sequence(toy, causal, settings, expected, caplog):
    caplog.set_level("INFO")
    task = causal(toy("decoder", **settings))
    assert words_of(task.query["tokens"][0][:5]) == expected
    target = np.asarray(task.query["target"][0])
    assert target.sum() == 2 + ("eos" not in settings)
    assert target.argmax() == 1 + ("bos" in settings)
    assert ("no padding token" in caplog.text) == ("pad" in settings)
    assert not np.asarray(task.query["attended"][0])[target.argmax() + target.sum() :].any()


def test_longer_neighbours_keep_causal_losses(causal):
    longer = [*TRAIN, {"q": "a " * 8, "answer": "yes"}]
    task, padded = causal(), causal(train=longer)
    shapes = [variant.query["tokens"].shape for variant in (task, padded)]
    assert shapes == [(2, 8), (2, 16)]
    np.testing.assert_allclose(every(task.loss, task), every(padded.loss, padded), rtol=1e-6)


def test_completions_that_are_cut_are_counted_and_lost_ones_refused(toy, causal, caplog):
    task = causal(max_tokens=4)
    assert task.provenance["truncated"] == {"train": 0, "query": 1}
    assert "1 of 4 texts cut to 4 tokens" in caplog.text
    assert words_of(task.query["tokens"][1]) == "d a c yes"
    match = r"file line 2: got a prompt of 3 tokens, which leaves none .*raise --max-tokens"
    with pytest.raises(Misuse, match=match):
        causal(max_tokens=3)
    with pytest.raises(Misuse, match="fewer than the limit of 3"):
        causal(toy("decoder", positions=3))


def test_accuracy_is_what_greedy_decoding_would_write(toy, causal):
    model = toy("decoder", scale=3.0)
    out, embed = (np.asarray(model.tensors[name]) for name in ("out", "embed"))
    rows = []
    for word in ("a", "b", "c", "d"):
        best = WORDS[int((embed[WORDS.index(word)] @ out.T).argmax())]
        rows += [{"q": word, "answer": best}, {"q": word, "answer": "a" if best != "a" else "b"}]
    task = causal(toy("decoder", scale=3.0, eos=False), query=rows, metrics=["accuracy", "margin"])
    np.testing.assert_array_equal(every(task.metrics["accuracy"], task), [1.0, 0.0] * 4)
    logits = embed[ids("a")[0]] @ out.T
    first, second = np.sort(logits)[::-1][:2]
    np.testing.assert_allclose(every(task.metrics["margin"], task)[0], first - second, rtol=1e-5)


@pytest.mark.parametrize(
    ("settings", "arguments", "match"),
    [
        ({"vocabulary": 8}, {}, "file line 1: got token 'yes' with id 8; expected ids below 8"),
        ({}, {"prompt": "{x}"}, r"file line 1: got no 'x' among fields q, answer, label.*--prompt"),
        ({}, {"completion": "{none}"}, r"got no 'none' .*--completion"),
        ({"eos": False}, {"prompt": ""}, r"file line 1: got no prompt.*neither BOS nor EOS"),
        (
            {},
            {"metrics": ["bleuh"]},
            "metrics: got bleuh; .* accuracy, margin, bleu, rou",
        ),
    ],
)
def test_what_does_not_fit_a_causal_task_is_refused(toy, causal, settings, arguments, match):
    with pytest.raises(Misuse, match=match):
        causal(toy("decoder", **settings), **arguments)


def test_a_tuning_decides_what_trains(causal):
    task, full = causal(tuning=Full(exclude=["embed"])), causal()
    assert list(task.validate().params) == ["out"] and list(task.frozen) == ["embed"]
    assert task.provenance["tuning"]["trained"] == 50
    weights = task.weights(task.params, task.frozen)
    losses = jax.vmap(task.loss, in_axes=(None, 0))(weights, task.query)
    np.testing.assert_array_equal(losses, every(full.loss, full))


# Choice


def choice(model, rows_of, **settings):
    defaults = {"prompt": "{q}", "options": ["one", "two"], "key": KEY, "metrics": METRICS}
    return choice_task(model, rows_of(COPA), rows_of(COPA, "query"), **{**defaults, **settings})


def check_choice(task, scores):
    """Loss and metrics of scores that were computed by hand."""
    scores = np.array(scores)
    right = scores[[0, 1], [0, 1]]
    wrong = scores[[0, 1], [1, 0]]
    np.testing.assert_allclose(
        every(task.loss, task), np.logaddexp(right, wrong) - right, rtol=1e-4, atol=1e-6
    )
    np.testing.assert_allclose(every(task.metrics["margin"], task), right - wrong, rtol=1e-4)
    np.testing.assert_array_equal(every(task.metrics["accuracy"], task), right > wrong)


def test_choice_by_a_decoders_likelihood_by_hand(toy, rows_of):
    model = toy("decoder")
    task = choice(model, rows_of)
    assert task.validate().query["tokens"].shape == (2, 2, 8)
    scores = [
        [-by_hand(model, ids(row["q"]), row[option]).mean() for option in ("one", "two")]
        for row in COPA
    ]
    check_choice(task, scores)


def test_choice_by_the_answers_of_an_encoder_decoder_by_hand(toy, rows_of):
    model = toy("encoder-decoder")
    task = choice(model, rows_of)
    assert task.query["tokens"].shape == (2, 8) and task.query["target"].shape == (2, 2, 8)
    reads = [read_by_hand(model, row["q"]) for row in COPA]
    scores = [
        [-by_hand(model, [0], f"{row[option]} </s>", read=read).mean() for option in ("one", "two")]
        for row, read in zip(COPA, reads, strict=True)
    ]
    check_choice(task, scores)


def test_choice_by_an_encoders_head_by_hand(toy, rows_of):
    model = toy("encoder")
    task = choice(model, rows_of)
    embed = np.asarray(model.tensors["embed"], float)
    head = np.asarray(task.params["classifier.weight"], float)[0]
    scores = []
    for row in COPA:
        pair = []
        for option in ("one", "two"):
            state, states = np.zeros(embed.shape[1]), []
            for token in ids(f"{row['q']} {row[option]}"):
                state = 0.5 * state + embed[token]
                states.append(state)
            pair.append(np.mean(states, axis=0) @ head)
        scores.append(pair)
    check_choice(task, scores)


@pytest.mark.parametrize(
    ("change", "settings", "match"),
    [
        ({"label": 2}, {}, r"file line 1 field 'label': got 2; .*place .* 0 to 1"),
        ({"label": -1}, {}, "got -1; expected the place of the right option"),
        ({"label": "yes"}, {}, "got yes; expected the place"),
        ({"two": "yes"}, {}, "file line 1: got the right option 'yes' more than once"),
        ({"two": None}, {}, r"file line 1: got no 'two' .*--choices-fields"),
        ({}, {"options": ["one"]}, "choices_fields: got one; expected two or more"),
        ({}, {"metrics": ["bleu"]}, "metrics: got bleu; expected those of this task: accuracy,"),
    ],
)
def test_choices_that_do_not_fit_are_refused(toy, rows_of, change, settings, match):
    rows = rows_of([{**COPA[0], **change}, COPA[1]])
    arguments = {"prompt": "{q}", "options": ["one", "two"], "key": KEY, **settings}
    with pytest.raises(Misuse, match=match):
        choice_task(toy("decoder"), rows, rows_of(COPA), **arguments)


# Seq2seq


def seq2seq(model, rows_of, train=TRAIN, query=QUERY, **settings):
    arguments = {"prompt": "{q}", "labels": LABELS, "key": KEY, **settings}
    return seq2seq_task(model, rows_of(train), rows_of(query, "query"), **arguments)


def test_seq2seq_loss_and_ranks_against_brute_force(toy, rows_of):
    model = toy("encoder-decoder", scale=0.7)
    query = [
        {"q": f"{first} {second}", "label": str(at % 2)}
        for at, (first, second) in enumerate([("a", "b"), ("c", "d"), ("b", "b"), ("d", "yes")])
    ]
    task = seq2seq(model, rows_of, query=query, metrics=METRICS).validate()
    losses = np.array(
        [
            [
                by_hand(model, [0], f"{text} </s>", read=read_by_hand(model, row["q"])).mean()
                for text in LABELS.values()
            ]
            for row in query
        ]
    )
    right = np.array([int(row["label"]) for row in query])
    mine = losses[np.arange(4), right]
    np.testing.assert_allclose(every(task.loss, task), mine, rtol=1e-5)
    accuracy = every(task.metrics["accuracy"], task)
    np.testing.assert_array_equal(accuracy, losses.argmin(axis=1) == right)
    assert 0.0 < accuracy.mean() < 1.0
    margin = losses[np.arange(4), 1 - right] - mine
    np.testing.assert_allclose(every(task.metrics["margin"], task), margin, rtol=1e-4, atol=1e-5)


def test_seq2seq_of_any_text_and_padding(toy, rows_of):
    model = toy("encoder-decoder")
    texts = {"labels": None, "completion": "{answer}"}
    task = seq2seq(model, rows_of, **texts)
    by_label = seq2seq(model, rows_of)
    np.testing.assert_array_equal(every(task.loss, task), every(by_label.loss, by_label))
    longer = [*TRAIN, {"q": "a " * 9, "answer": "c " * 9}]
    padded = seq2seq(model, rows_of, train=longer, **texts)
    assert padded.query["tokens"].shape == padded.query["target"].shape == (2, 16)
    np.testing.assert_allclose(every(task.loss, task), every(padded.loss, padded), rtol=1e-6)
    cut = seq2seq(model, rows_of, train=longer, max_tokens=8, **texts)
    assert cut.provenance["truncated"] == {"train": 1, "query": 0}
    assert cut.provenance["truncated_targets"] == {"train": 1, "query": 0}


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"labels": {"0": "yes", "2": "no"}}, "train label, file line 1 field 'label': got 1"),
        ({"labels": {"0": "x", "1": "y"}}, "label_texts: got the same tokens for 0=x, 1=y"),
        ({"labels": {"0": "yes", "1": " "}}, "text of label '1': got a text of no tokens"),
        ({"completion": "{q}"}, "completion: got both it and labels"),
        ({"labels": None}, "completion: got neither it nor labels"),
        ({"labels": None, "completion": "{q}", "metrics": ["margin"]}, "metrics: got margin"),
        ({"labels": {"1": "yes"}}, "labels: got 1; expected two or more"),
    ],
)
def test_what_does_not_fit_a_seq2seq_task_is_refused(toy, rows_of, settings, match):
    with pytest.raises(Misuse, match=match):
        seq2seq(toy("encoder-decoder"), rows_of, **settings)


def test_networks_of_another_kind_are_refused(toy, rows_of):
    with pytest.raises(Misuse, match=r"'causal' with toy.*encoder; expected a decoder"):
        causal_task(toy("encoder"), rows_of(TRAIN), rows_of(QUERY), key=KEY)
    with pytest.raises(Misuse, match=r"'seq2seq' with toy .*\(decoder\); expected an encoder-dec"):
        seq2seq(toy("decoder"), rows_of)


# Queries of like length


@pytest.mark.parametrize("kind", ["causal", "choice", "choice by likelihood", "seq2seq"])
def test_queries_without_their_padding_have_the_same_losses(kind, toy, rows_of, monkeypatch):
    monkeypatch.setattr("bayes_simfluence.recording.measure.MULTIPLE", 1)
    rest = {"answer": "yes", "label": "0", "one": "no", "two": "yes yes"}
    rows = [{"q": " ".join("abcd"[:length]), **rest} for length in (1, 4, 2)]
    files, of_choice = (rows_of(rows), rows_of(rows, "query")), {"options": ["one", "two"]}
    task = {
        "causal": lambda: causal_task(
            toy("decoder"), *files, prompt="{q}", completion="{answer}", key=KEY
        ),
        "choice": lambda: choice_task(toy("encoder"), *files, prompt="{q}", key=KEY, **of_choice),
        "choice by likelihood": lambda: choice_task(
            toy("decoder"), *files, prompt="{q}", key=KEY, **of_choice
        ),
        "seq2seq": lambda: seq2seq(toy("encoder-decoder"), rows_of, query=rows),
    }[kind]()
    whole = dataclasses.replace(task.validate(), query_lengths=None, cut=None)
    assert len(length_groups(task.query_lengths)) > 1
    cut, expected = (
        jax.jit(measure_of(variant.functions, None))(variant.params, fixed_of(variant))
        for variant in (task, whole)
    )
    for name, value in expected.items():
        np.testing.assert_allclose(cut[name], value, rtol=1e-5, atol=1e-6)
    # The loss in two parts is the loss.
    parts = jax.vmap(lambda example: task.output_loss(task.outputs(task.params, example), example))
    np.testing.assert_allclose(parts(task.query), every(task.loss, task), rtol=1e-5)


def test_drawn_slopes_have_the_hessian_of_the_loss_of_a_text():
    logits = jnp.asarray([[0.5, -1.0, 0.2], [2.0, 0.0, 1.0], [0.0, 1.0, 0.0]])
    target, counted = jnp.asarray([0, 2, 1]), jnp.asarray([True, False, True])

    def loss(flat):
        return mean_nats(flat.reshape(3, 3), target, counted)

    keys = jax.random.split(KEY, 20_000)
    drawn = jax.vmap(lambda key: drawn_slopes(logits, counted, key))(keys).reshape(-1, 9)
    # Standard errors are below .5 / sqrt(20000).
    np.testing.assert_allclose(drawn.mean(axis=0), 0.0, atol=0.015)
    covariance = drawn.T @ drawn / len(keys)
    np.testing.assert_allclose(covariance, jax.hessian(loss)(logits.ravel()), atol=0.015)


# Classification by other networks


def test_a_decoder_classifies_by_its_last_token(toy, rows_of):
    settings = {"prompt": "{q}", "labels": ["0", "1"], "key": KEY}
    files = (rows_of(TRAIN), rows_of(QUERY))
    model = toy("decoder")
    task = classification_task(model, *files, pooling="last", **settings)
    embed, head = (np.asarray(task.params[name], float) for name in ("embed", "classifier.weight"))
    state = np.zeros(embed.shape[1])
    for token in ids("d a c"):
        state = 0.5 * state + embed[token]
    logits = state @ head.T
    expected = np.log(np.exp(logits).sum()) - logits[1]
    np.testing.assert_allclose(every(task.loss, task)[1], expected, rtol=1e-5)
    with pytest.raises(Misuse, match=r"pooling"):
        classification_task(model, *files, pooling="cls", **settings)
    with pytest.raises(Misuse, match=r"pooling"):
        classification_task(model, *files, pooling="pooler", **settings)
    with pytest.raises(Misuse, match="labels: got 0; expected two or more"):
        classification_task(model, *files, **{**settings, "labels": ["0"]})
