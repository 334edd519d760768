"""Generative perplexity under a judge of the test's own, MAUVE, distinct n-grams,
means with standard errors."""

import math
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from refusals import refused
from torch import nn

from metrics import judge as judges
from metrics.judge import (
    GenerativePerplexity,
    TextScores,
    _load_judge,
    mauve_score,
    require_mauve,
)
from metrics.samples import distinct_n, mean_and_error
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

    def __init__(self, context=None):
        super().__init__()
        self.config = SimpleNamespace(max_position_embeddings=context)

    def forward(self, ids, attention_mask, output_hidden_states=False):
        assert ids.shape[1] <= (self.config.max_position_embeddings or math.inf)
        p = torch.full((*ids.shape, VOCAB), 0.5 / 9)
        p.scatter_(-1, ((ids + 1) % VOCAB)[..., None], 0.5)
        # A state that tells token and position: (10 position + token, batch's row).
        places = 10 * torch.arange(ids.shape[1]) + ids
        rows = torch.arange(len(ids))[:, None].expand_as(ids)
        states = (None, torch.stack([places, rows], dim=-1).bfloat16())
        return SimpleNamespace(
            logits=p.log(), hidden_states=states if output_hidden_states else None
        )


@pytest.fixture
def judge(monkeypatch):
    loads = []

    def build(context=None, **kwargs):
        def load(name):
            loads.append(name)
            return DigitTokenizer(), Judge(context)

        monkeypatch.setattr(judges, "_load_judge", load)
        before = len(loads)
        built = GenerativePerplexity(
            "judge", **({"batch_size": 2, "max_length": 9} | kwargs)
        )
        assert len(loads) == before + 1  # once, however many texts there are
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


def test_each_call_starts_anew(judge):
    metric = judge()
    metric(["0000"])
    assert metric(["0123"]) == pytest.approx(2.0)


def test_scores_are_those_of_each_text(judge):
    """So that batches scored one after the other, or by several devices, add up."""
    texts = ["0123", "0000", "4567", "1357", "8888"]
    together = judge().score(texts)
    assert together.nll.dtype == torch.float64
    assert together.num_tokens.tolist() == [3] * 5
    for text, nll in zip(texts, together.nll, strict=True):
        assert math.exp(nll / 3) == pytest.approx(expected_ppl(text))


def test_perplexity_has_the_standard_error_of_a_ratio():
    """Of exp(sum of nll / sum of tokens) over independent texts, by the delta
    method."""
    nll, tokens = np.array([3.0, 4.5, 2.0, 9.0]), np.array([2, 3, 2, 4])
    mean = nll.sum() / tokens.sum()
    spread = ((nll - mean * tokens) ** 2).sum() * 4 / 3
    error = math.exp(mean) * math.sqrt(spread) / tokens.sum()
    got = TextScores(torch.tensor(nll), torch.tensor(tokens)).perplexity()
    assert got == pytest.approx((math.exp(mean), error))


def test_one_text_has_no_standard_error():
    ppl, error = TextScores(torch.tensor([2.0]), torch.tensor([2])).perplexity()
    assert ppl == pytest.approx(math.e)
    assert math.isnan(error)


@pytest.mark.parametrize("texts", [[], ["1"], ["1", "2", "3"]])
def test_without_a_token_to_score_there_is_no_perplexity(judge, texts):
    assert judge().score(texts).perplexity() is None
    assert judge()(texts) is None


def test_long_texts_are_scored_a_context_at_a_time(judge):
    """Each on its own: its first token is not scored, its first eos counts."""
    texts = ["01230000", "99123999"]
    parts = [text[i : i + 3] for text in texts for i in (0, 3, 6)]
    assert judge(context=3)(texts) == pytest.approx(expected_ppl(*parts))
    scores = judge(context=3).score(texts)
    assert scores.num_tokens.tolist() == [5, 3]


def test_a_last_context_of_one_token_scores_nothing(judge):
    assert judge(context=3)(["0123"]) == pytest.approx(expected_ppl("012"))


@pytest.mark.parametrize(("context", "last"), [(None, 24), (2, 13)])
def test_features_are_the_last_state_of_the_last_token(judge, context, last):
    """At a text's own last token, not at its batch's; cut to the judge's context."""
    got = judge(context=context).features(["23", "5", "234"])
    assert got.dtype == np.float32
    assert got.tolist() == [[13, 0], [5, 1], [last, 0]]


def test_a_judge_that_cannot_be_loaded_is_refused(tmp_path, monkeypatch):
    """One line that names the key and the ways out."""
    monkeypatch.setattr(judges, "hub_options", lambda _: {"local_files_only": True})
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

    from data.tokenizers import text8_tokenizer

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


# ---------------------------------------------------------------- MAUVE


def test_mauve_gets_references_first_and_the_seed(monkeypatch):
    """p are the references, q the samples; the score is not symmetric."""
    calls = []

    def compute_mauve(**arguments):
        calls.append(arguments)
        return SimpleNamespace(mauve=np.float64(0.25))

    fake = ModuleType("mauve")
    fake.compute_mauve = compute_mauve
    monkeypatch.setitem(sys.modules, "mauve", fake)
    references, samples = np.zeros((3, 2)), np.ones((4, 2))
    score = mauve_score(references, samples, seed=5)
    assert type(score) is float
    assert score == 0.25
    (arguments,) = calls
    assert arguments["p_features"] is references
    assert arguments["q_features"] is samples
    assert arguments["seed"] == 5


def test_mauve_that_is_not_installed_is_refused(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    refused(require_mauve, "eval.mauve_references", "pip install mauve-text", "null")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: "found")
    require_mauve()


# ---------------------------------------------------------------- plain numbers


@pytest.mark.parametrize("n", [1, 2, 3])
def test_distinct_n_counts_different_n_grams(n, generator):
    """Of each sample by itself, in plain Python."""
    x = torch.randint(4, (6, 12), generator=generator)
    expected = []
    for row in x.tolist():
        grams = [tuple(row[i : i + n]) for i in range(len(row) - n + 1)]
        expected.append(len(set(grams)) / len(grams))
    assert distinct_n(x, n).tolist() == expected


def test_distinct_n_of_extremes():
    x = torch.stack([torch.arange(8), torch.zeros(8, dtype=torch.long)])
    assert distinct_n(x, 2).tolist() == [1, 1 / 7]


def test_mean_and_error_is_numpys():
    values = [1.0, 2.5, 4.0, -3.0]
    error = np.std(values, ddof=1) / 2
    assert mean_and_error(values) == pytest.approx((np.mean(values), error))
    assert mean_and_error([3]) == (3.0, None)
