"""Generated texts against greedy decoding one word at a time; measures and padding of any kind."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bayes_simfluence.checks import Misuse
from bayes_simfluence.networks.network import Sequence
from bayes_simfluence.tasks.causal import causal_task
from bayes_simfluence.tasks.generation import continuations, text_scores
from bayes_simfluence.tasks.measures import margin, measures
from bayes_simfluence.tasks.seq2seq import seq2seq_task
from bayes_simfluence.tasks.tokens import bucket

KEY = jax.random.key(0)
PROMPTS = ["a", "b c", "d d a", "c", "yes", "no b", "a a", "d", "b", "c a"]


def slow(model, prompt, new_tokens):
    """Words that a decoder writes after ``prompt``, each by a pass over exactly what stands."""
    ids = model.tokenizer(prompt)["input_ids"]
    written = []
    for _ in range(new_tokens):
        sequence = jnp.asarray(ids)
        attended = jnp.ones(len(ids), bool)
        inputs = Sequence(sequence, jnp.zeros_like(sequence), attended)
        ids = [*ids, int(model.network.logits(model.tensors, inputs)[-1].argmax())]
        if ids[-1] == model.tokenizer.eos_token_id:
            break
        written.append(ids[-1])
    return model.tokenizer.decode(written, skip_special_tokens=True)


@pytest.mark.parametrize("eos", [True, False])
def test_greedy_decoding_word_by_word(toy, eos):
    model = toy("decoder", eos=eos, scale=2.0)
    ids = [model.tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    written = continuations(model, ids, 4)(model.tensors)
    assert written == [slow(model, prompt, 4) for prompt in PROMPTS]
    assert len(set(written)) > 2
    ended = [len(text.split()) < 4 for text in written]
    assert not eos or any(ended)


def test_an_encoder_decoder_writes_what_it_ranks_first(toy, rows_of):
    """Its text is scored by both packages; ten queries take two batches."""
    model = toy("encoder-decoder", scale=2.0)
    rows = [{"q": prompt, "label": str(at % 2)} for at, prompt in enumerate(PROMPTS)]
    settings = {"prompt": "{q}", "labels": {"0": "no", "1": "yes"}, "key": KEY, "new_tokens": 3}
    task = seq2seq_task(
        model, rows_of(rows), rows_of(rows, "query"), metrics=["rouge_l", "bleu"], **settings
    )
    assert (list(task.scores), task.metrics) == (["rouge_l", "bleu"], {})
    rouge, bleu = (score(task.params) for score in task.scores.values())
    assert rouge.shape == bleu.shape == (10,)
    for at, row in enumerate(rows):
        read = model.tokenizer(row["q"])["input_ids"]
        inputs = jnp.asarray(read)
        source = Sequence(inputs, jnp.zeros_like(inputs), jnp.ones(len(read), bool))
        buffer, words = [0], []
        for _ in range(3):
            logits = model.network.seq2seq_logits(model.tensors, source, jnp.asarray(buffer))
            buffer.append(int(logits[-1].argmax()))
            if buffer[-1] == 1:
                break
            words.append(model.tokenizer.decode([buffer[-1]], skip_special_tokens=True))
        words, right = [word for word in words if word], ["no", "yes"][at % 2]
        words = [word for word in words if word != "<unk>"]
        hits = min(words.count(right), 1)
        assert rouge[at] == pytest.approx(2 * hits / (len(words) + 1) if words else 0.0)
        assert (bleu[at] > 0) == bool(hits)


def test_bleu_and_rouge_are_those_of_the_packages():
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu import sentence_bleu

    written = ["the cat sat on the mat", "", "a dog", "the same words here"]
    right = ["the cat is on the mat", "nothing", "no match", "the same words here"]
    scores = text_scores(lambda weights: written, right)
    weights = {"w": jnp.zeros(1)}
    bleu, rouge = scores["bleu"](weights), scores["rouge_l"](weights)
    rows = list(zip(written, right, strict=True))
    expected = [sentence_bleu(text, [reference]).score for text, reference in rows]
    np.testing.assert_allclose(bleu, expected, rtol=1e-6)
    scorer = RougeScorer(["rougeL"])
    expected = [scorer.score(reference, text)["rougeL"].fmeasure for text, reference in rows]
    np.testing.assert_allclose(rouge, expected, rtol=1e-6)
    assert bleu[3] == pytest.approx(100.0) and rouge[3] == 1.0
    assert bleu[1] == rouge[1] == 0.0 and 0.0 < rouge[0] < 1.0


def test_texts_are_written_once_for_the_same_weights():
    asked = []

    def write(weights):
        asked.append(float(weights["w"]))
        return ["yes" if asked[-1] else "no"]

    scores = text_scores(write, ["yes"])
    first, second = {"w": jnp.zeros(())}, {"w": jnp.ones(())}
    assert [scores[name](first)[0] for name in ("bleu", "rouge_l")] == [0.0, 0.0]
    assert [scores[name](dict(first))[0] for name in ("bleu", "rouge_l")] == [0.0, 0.0]
    assert scores["rouge_l"](second)[0] == 1.0
    assert asked == [0.0, 1.0]


def test_a_metric_whose_package_is_missing_says_which_extra(toy, rows_of, monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    rows = [{"q": "a", "answer": "b"}]
    settings = {"prompt": "{q}", "completion": "{answer}", "key": KEY, "metrics": ["bleu"]}
    with pytest.raises(Misuse, match=r"metric 'bleu': got no package sacrebleu.*\[generation\]"):
        causal_task(toy("decoder"), rows_of(rows), rows_of(rows), **settings)


def test_no_room_for_new_tokens_is_refused(toy, rows_of):
    rows = [{"q": "a b c", "answer": "b"}]
    settings = {"prompt": "{q}", "completion": "{answer}", "key": KEY, "metrics": ["rouge_l"]}
    files = (rows_of(rows), rows_of(rows))
    with pytest.raises(Misuse, match=r"new_tokens: got 6 after a prompt of 3 tokens; .* 8 pos"):
        causal_task(toy("decoder", positions=8), *files, new_tokens=6, **settings)
    task = causal_task(toy("decoder", positions=8), *files, new_tokens=5, **settings)
    assert task.scores["rouge_l"](task.params).shape == (1,)


# Measures and padding

SCORES = st.lists(st.integers(-40, 40).map(lambda eighths: eighths / 8), min_size=2, max_size=5)


@settings(max_examples=50, deadline=None)
@given(SCORES, st.integers(0, 4))
def test_accuracy_is_the_sign_of_the_margin(scores, right):
    right %= len(scores)
    others = [score for at, score in enumerate(scores) if at != right]
    values = np.array(scores, "f4")
    with jax.disable_jit():
        log_odds = float(margin(jnp.asarray(values), jnp.asarray(right)))
        hit = float(measures(margin)["accuracy"](jnp.asarray(values), jnp.asarray(right)))
    assert log_odds == scores[right] - max(others)
    assert hit == (scores[right] > max(others))


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 4096), st.integers(1, 4096))
def test_padded_lengths_hold_the_text_and_waste_little(length, limit):
    length = min(length, limit)
    padded = bucket(length, limit)
    assert length <= padded <= limit
    assert padded < length + max(8, length / 4)
    assert bucket(padded, limit) == padded


def test_few_padded_lengths_serve_all_texts():
    lengths = {bucket(longest, 1024) for longest in range(1, 1025)}
    assert len(lengths) == 28 and max(lengths) == 1024
    assert {bucket(longest, 128) for longest in range(1, 129)} == set(range(8, 129, 8))
