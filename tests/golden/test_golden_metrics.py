"""Likelihood over batches, entropy of samples, generative perplexity."""

import pytest
import torch
from golden_cases import approx, close, for_cases
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from metrics.judge import GenerativePerplexity, TextScores, counted_tokens
from metrics.likelihood import Likelihood
from metrics.samples import sample_entropy


@for_cases("metrics", holding="batches_nll_sum_and_tokens")
def test_validation_average(case):
    """Sum of all losses over number of all valid tokens, in float64; not a mean of
    batch means. The result does not depend on how batches are made."""
    batches = case.values["batches_nll_sum_and_tokens"]
    one_by_one, together = Likelihood(), Likelihood()
    for nll_sum, num_tokens in batches:
        one_by_one.update(torch.tensor([nll_sum]), torch.tensor([num_tokens]))
    nlls, num_tokens = torch.tensor(batches).T
    together.update(nlls, num_tokens)
    for likelihood in (one_by_one, together):
        results = likelihood.compute()
        for name, golden in case.values["result"].items():
            ours = results[name.removeprefix("val/")]
            assert ours.dtype == torch.float64
            limits = case.tolerance(name)
            close(ours, torch.tensor(golden, dtype=torch.float64), name, **limits)


@for_cases("metrics", holding="entropy")
def test_entropy(case):
    """Entropy of each sample's own token frequencies in nats, and its mean."""
    golden, limits = case.values["entropy"], case.tolerance("entropy")
    ours = sample_entropy(case["tokens"])
    close(ours, torch.tensor(golden["per_sample"]), "entropy", **limits)
    assert float(ours.mean()) == approx(golden["mean"], limits)


@for_cases("metrics", holding="eos_token_id")
def test_counted_tokens(case):
    """A token counts if it is not eos, or is its text's first eos."""
    eos = case.values["eos_token_id"]
    assert torch.equal(counted_tokens(case["tokens"], eos)[:, 1:], case["counted"])


@pytest.fixture
def judge(case, tmp_path) -> GenerativePerplexity:
    """The case's small GPT-2, loaded from a folder as any judge is. Its tokenizer
    splits texts at spaces into ids written as <id>."""
    settings = case.values["gpt2_config"]
    network = GPT2LMHeadModel(GPT2Config(**settings))
    missing, unexpected = network.load_state_dict(case.group("gpt2/"), strict=False)
    assert missing == ["lm_head.weight"]  # tied to the embedding
    assert not unexpected
    network.save_pretrained(tmp_path)
    vocab = {f"<{token}>": token for token in range(settings["vocab_size"])}
    eos = f"<{case.values['eos_token_id']}>"
    core = Tokenizer(models.WordLevel(vocab, unk_token=eos))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=eos)
    tokenizer.save_pretrained(tmp_path)
    context = min(case.values["full_context"]["context"], settings["n_positions"])
    batch_size = case.values["full_context"]["batch_size"]
    return GenerativePerplexity(
        str(tmp_path), batch_size=batch_size, max_length=context
    )


def texts_of(tokens: torch.Tensor) -> list[str]:
    return [" ".join(f"<{token}>" for token in row) for row in tokens.tolist()]


def check(
    scores: TextScores, golden: dict[str, float], limits: dict[str, float]
) -> None:
    """Sums over the rows, and the perplexity that they make."""
    assert int(scores.num_tokens.sum()) == golden["token_count"]
    assert float(scores.nll.sum()) == approx(golden["nll_sum"], limits)
    perplexity, _ = scores.perplexity()
    assert perplexity == approx(golden["perplexity"], limits)


@for_cases("metrics", holding="full_context")
def test_generative_perplexity(case, judge):
    """Texts to perplexity, over the rows that the reference counted.

    It dropped the rows beyond the last full batch. Every text belongs to the sample,
    so ours counts all: the totals over all rows are those of the recorded tokens.
    """
    golden, limits = case.values["full_context"], case.tolerance("full_context")
    texts = texts_of(case["tokens"])
    rows = slice(golden["rows_used"])
    check(judge.score(texts[rows]), golden, limits)
    assert judge(texts[rows]) == approx(golden["perplexity"], limits)
    scores = judge.score(texts)
    counted = case["counted"]
    assert int(scores.num_tokens.sum()) == int(counted.sum())
    total = float(case["token_nll"].double()[counted].sum())
    assert float(scores.nll.sum()) == approx(total, limits)
    dropped = counted[golden["rows_used"] :].sum()
    assert int(scores.num_tokens.sum()) == golden["token_count"] + int(dropped)


@for_cases("metrics", holding="padded")
def test_generative_perplexity_of_padded_rows(case, judge):
    """With an attention mask; what is padding is for the eos rule to say, not for
    the mask."""
    golden, limits = case.values["padded"], case.tolerance("padded")
    rows = slice(golden["rows_used"])
    scores = judge.score_ids(case["tokens"][rows], case["attention_mask"][rows])
    check(scores, golden, limits)


@for_cases("metrics", holding="chunked")
def test_generative_perplexity_of_chunks(case, judge):
    """Texts beyond the judge's context are scored in chunks, each on its own."""
    golden, limits = case.values["chunked"], case.tolerance("chunked")
    tokens = case["tokens"][slice(golden["rows_used"])]
    judge.context = golden["context"]
    scores = judge.score_ids(tokens, torch.ones_like(tokens))
    check(scores, golden, limits)
