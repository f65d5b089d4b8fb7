"""Losses of causal and seq2seq tasks against transformers' own, with labels masked by -100."""

import jax
import pytest

from bayes_simfluence.networks.checkpoint import load_checkpoint, pretrained
from bayes_simfluence.tasks.causal import causal_task
from bayes_simfluence.tasks.seq2seq import seq2seq_task

pytestmark = pytest.mark.parity
WORDS = ["<pad>", "</s>", "<s>", "<unk>", "a", "b", "c", "d", "yes", "no"]
KEY = jax.random.key(0)
ROWS = [
    {"q": "a b", "answer": "yes", "label": "1"},
    {"q": "c d a", "answer": "no no", "label": "0"},
]


def ids(text):
    return [WORDS.index(word) for word in text.split()]


@pytest.mark.filterwarnings("ignore")
def test_causal_losses_of_gpt2(tmp_path, toy_tokenizer, rows_of):
    torch = pytest.importorskip("torch")
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=10, n_embd=16, n_layer=2, n_head=2, n_positions=32, eos_token_id=1
    )
    model = GPT2LMHeadModel(config).eval()
    model.save_pretrained(tmp_path)
    toy_tokenizer(pad=False).save_pretrained(tmp_path)
    mine = pretrained(load_checkpoint(tmp_path))
    settings = {"prompt": "{q}", "completion": "{answer}", "key": KEY}
    task = causal_task(mine, rows_of(ROWS), rows_of(ROWS, "query"), **settings).validate()
    losses = jax.vmap(task.loss, in_axes=(None, 0))(task.params, task.query)
    for row, loss in zip(ROWS, losses.tolist(), strict=True):
        prompt, answer = ids(row["q"]), ids(f"{row['answer']} </s>")
        labels = torch.tensor([[-100] * len(prompt) + answer])
        expected = model(torch.tensor([prompt + answer]), labels=labels).loss.item()
        assert loss == pytest.approx(expected, rel=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_seq2seq_losses_of_t5(tmp_path, toy_tokenizer, rows_of):
    torch = pytest.importorskip("torch")
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(
        vocab_size=10, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    model = T5ForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path)
    toy_tokenizer().save_pretrained(tmp_path)
    mine = pretrained(load_checkpoint(tmp_path))
    settings = {"prompt": "{q}", "labels": {"0": "no no", "1": "yes"}, "key": KEY}
    task = seq2seq_task(mine, rows_of(ROWS), rows_of(ROWS, "query"), **settings).validate()
    losses = jax.vmap(task.loss, in_axes=(None, 0))(task.params, task.query)
    for row, loss in zip(ROWS, losses.tolist(), strict=True):
        source, answer = torch.tensor([ids(row["q"])]), torch.tensor([ids(f"{row['answer']} </s>")])
        assert loss == pytest.approx(model(input_ids=source, labels=answer).loss.item(), rel=1e-5)
