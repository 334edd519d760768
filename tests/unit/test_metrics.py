"""Generative perplexity under a judge of the test's own."""

import math

import pytest
import torch
from torch import nn

import metrics
from metrics import GenerativePerplexity, _load_judge, unigram_nll
from utils import ConfigError

VOCAB, EOS = 10, 9


class DigitTokenizer:
    """A character a token; eos is 9 and pads on the right."""

    eos_token_id = EOS

    def __call__(self, texts, *, truncation, padding, max_length, **kwargs):
        from transformers import BatchEncoding

        assert truncation
        assert padding
        rows = [[int(c) for c in text][:max_length] for text in texts]
        longest = max(map(len, rows))
        ids = [row + [EOS] * (longest - len(row)) for row in rows]
        mask = [[1] * len(row) + [0] * (longest - len(row)) for row in rows]
        return BatchEncoding(
            {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
        )


class Judge(nn.Module):
    """p(next = (x + 1) mod 10 | x) = 1/2, the other nine share the rest."""

    device = torch.device("cpu")

    def forward(self, ids, attention_mask):
        p = torch.full((*ids.shape, VOCAB), 0.5 / 9)
        p.scatter_(-1, ((ids + 1) % VOCAB)[..., None], 0.5)
        return type("Output", (), {"logits": p.log()})


@pytest.fixture
def judge(monkeypatch):
    loads = []

    def load(name):
        loads.append(name)
        return DigitTokenizer(), Judge()

    monkeypatch.setattr(metrics, "_load_judge", load)

    def build(**kwargs):
        built = GenerativePerplexity(
            "judge", **({"batch_size": 2, "max_length": 9} | kwargs)
        )
        assert len(loads) == 1  # once, however many texts there are
        return built

    return build


def expected_ppl(*texts):
    """Slowly: tokens 2, 3, ... of each text, of its eos only the first."""
    nll, count = 0.0, 0
    for text in texts:
        for i in range(1, len(text)):
            if text[i] == str(EOS) and str(EOS) in text[:i]:
                continue
            follows = (int(text[i - 1]) + 1) % VOCAB == int(text[i])
            nll -= math.log(0.5 if follows else 0.5 / 9)
            count += 1
    return math.exp(nll / count)


def test_perplexity_of_one_text(judge):
    assert judge()(["0123"]) == pytest.approx(2.0)


def test_of_the_eos_tokens_only_the_first_counts(judge):
    texts = ["01299991", "34567899"]
    assert judge()(texts) == pytest.approx(expected_ppl(*texts))


def test_every_text_counts_the_last_batch_included(judge):
    """Five texts in batches of two: weights by token, not by batch."""
    texts = ["0123", "0000", "4567", "1357", "8888"]
    assert judge()(texts) == pytest.approx(expected_ppl(*texts))
    whole = GenerativePerplexity("judge", batch_size=5, max_length=9)(texts)
    assert whole == pytest.approx(expected_ppl(*texts))


def test_texts_are_cut_to_the_longest_allowed(judge):
    assert judge(max_length=3)(["0120000"]) == pytest.approx(2.0)


def test_each_call_starts_anew_and_updates_add_up(judge):
    metric = judge()
    metric(["0000"])
    assert metric(["0123"]) == pytest.approx(2.0)
    metric.update(["0000"])
    assert metric.compute() == pytest.approx(expected_ppl("0123", "0000"))


@pytest.mark.parametrize("texts", [[], ["1"], ["1", "2", "3"]])
def test_without_a_token_to_score_there_is_no_perplexity(judge, texts):
    assert judge()(texts) is None


def test_a_judge_that_cannot_be_loaded_is_refused(tmp_path, monkeypatch):
    """One line that names the key and the ways out."""
    monkeypatch.setattr(metrics, "hub_options", lambda _: {"local_files_only": True})
    for name in (str(tmp_path), "nobody/nothing"):
        with pytest.raises(ConfigError) as error:
            _load_judge(name)
        text = str(error.value)
        assert "\n" not in text
        assert f"eval.gen_ppl_eval_model_name_or_path={name!r}" in text
        assert "null" in text


def test_any_causal_model_can_judge(tmp_path):
    """A GPT-2 of random weights, saved and loaded as a user's own folder."""
    from transformers import GPT2Config, GPT2LMHeadModel

    from dataloader import text8_tokenizer

    tokenizer = text8_tokenizer()
    config = GPT2Config(
        vocab_size=35, n_positions=16, n_embd=8, n_layer=1, n_head=1, eos_token_id=3
    )
    torch.manual_seed(0)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    metric = GenerativePerplexity(str(tmp_path), batch_size=2, max_length=16)
    assert metric(["some words here", "more", "and yet more words than fit"]) == (
        pytest.approx(35, rel=0.1)
    )
    assert not any(p.requires_grad for p in metric.model.parameters())
    assert not metric.model.training


def test_unigram_takes_any_integer_type(generator):
    ids = torch.randint(7, (50, 4), generator=generator).numpy()
    expected = unigram_nll(ids, ids, 7)
    for dtype in ("uint8", "uint16", "int32"):
        assert unigram_nll(ids.astype(dtype), ids.astype(dtype), 7) == expected
