"""Texts into rows, rows into batches, and samples into texts."""

import logging
import math

import pytest
import torch
from refusals import refused

from data.tokenizers import bytes_tokenizer, text8_tokenizer
from evaluation.scoring import Request, Row, Scorer, cut
from sampling.prompts import Prompt, given_tokens

L = 12


@pytest.fixture
def scorer_of(make_model):
    """A scorer of a tiny model of characters: scorer_of("mdlm", num_draws=3)."""

    def make(name, *overrides, tokenizer=None, **settings):
        own = ("sampling.steps=4", f"model.length={L}", "model.dropout=0")
        model = make_model(
            f"algo={name}", *own, *overrides, tokenizer=tokenizer or text8_tokenizer()
        )
        return Scorer(model, **settings)

    return make


@pytest.fixture(params=["ar", "mdlm", "duo_base"])
def kind(request) -> str:
    return request.param


# ---------------------------------------------------------------- rows


@pytest.mark.parametrize("size", [0, 1, L - 2, L - 1, L, 3 * L + 2])
@pytest.mark.parametrize("context", [0, 1, 5, 40])
def test_windows_score_every_token_once(scorer_of, size, context):
    scorer = scorer_of("ar")
    before, ids = list(range(100, 100 + context)), list(range(200, 200 + size))
    rows = scorer.windows(before, ids)
    assert len(rows) == -(-size // (L - 1))
    scored = [token for row in rows for token in row.ids[row.num_known :]]
    assert scored == ids
    everything = before + ids
    for row in rows:
        assert row.ids[0] == scorer.tokenizer.bos_token_id
        assert 1 <= row.num_known < len(row.ids) <= L
        end = everything.index(row.ids[-1]) + 1  # what stood before, as it stood there
        assert list(row.ids[1:]) == everything[max(0, end - L + 1) : end]


def test_pairs_are_cut_where_the_tokenizer_cuts_the_whole(scorer_of):
    scorer = scorer_of("ar")
    context, continuation = scorer.encode_pair("a b  ", "cd")
    decode = scorer.tokenizer.decode
    assert (decode(context), decode(continuation)) == ("a b", "  cd")
    assert scorer.encode_pair("", "cd") == ([], scorer.encode("cd"))
    assert scorer.encode_pair("ab", "") == (scorer.encode("ab"), [])


def test_nothing_is_certain(scorer_of, kind):
    scorer = scorer_of(kind)
    assert scorer.score([("some text", "")]) == [(0.0, True)]
    assert scorer.score_whole([""]) == [0.0]
    assert scorer.score([]) == scorer.score_whole([]) == scorer.write([]) == []


def test_a_text_with_the_mask_has_no_likelihood(scorer_of):
    refused(lambda: scorer_of("mdlm").score([("a", " [MASK]")]), "[MASK]", "mask")


def test_unknown_characters_are_said_once(scorer_of, caplog):
    scorer = scorer_of("ar")
    with caplog.at_level(logging.WARNING):
        scorer.score([("a?", "b"), ("c!", "d")])
    assert len(caplog.records) == 1
    assert "'a?'" in caplog.text


# ---------------------------------------------------------------- numbers


def test_scores_do_not_depend_on_batches_or_other_texts(scorer_of, kind):
    pairs = [("return", " it"), ("a", "b"), ("return", " no"), ("", "abcdefgh")]
    together = scorer_of(kind, batch_size=64, num_draws=5).score(pairs)
    for batch_size in (1, 3):
        scorer = scorer_of(kind, batch_size=batch_size, num_draws=5)
        backwards = scorer.score(pairs[::-1])[::-1]
        alone = [scorer.score([pair])[0] for pair in pairs]
        for a, b, c in zip(together, backwards, alone, strict=True):
            assert a.log_likelihood == pytest.approx(b.log_likelihood, abs=1e-4)
            assert a.log_likelihood == pytest.approx(c.log_likelihood, abs=1e-4)
            assert a.is_greedy == b.is_greedy == c.is_greedy


def test_a_seed_changes_noise_and_nothing_exact(scorer_of, kind):
    pairs = [("return", " it")]
    one, other = (
        scorer_of(kind, f"seed={seed}", num_draws=4).score(pairs)[0] for seed in (1, 2)
    )
    assert (one.log_likelihood == other.log_likelihood) == (kind == "ar")


def test_exact_scores_of_texts(scorer_of):
    """Of a continuation and of a whole text, one token at a time."""
    scorer = scorer_of("ar", batch_size=2)

    def log_p(context, continuation):
        ids = [scorer.tokenizer.bos_token_id, *scorer.encode(context)]
        total = 0.0
        for token in scorer.encode(continuation):
            total += float(scorer.model.next_token(torch.tensor([ids]))[0, token])
            ids.append(token)
        return total

    pairs = [("abc", " de"), ("", "abc"), ("ab", "c")]
    with torch.no_grad():
        expected = [log_p(*pair) for pair in pairs]
    got = [score.log_likelihood for score in scorer.score(pairs)]
    assert got == pytest.approx(expected, abs=1e-5)
    whole = scorer.score_whole(["abc"])[0]
    assert whole == pytest.approx(expected[1], abs=1e-5)
    joint = scorer_of("ar", suffix_only=False).score(pairs)
    assert [x.log_likelihood for x in joint] == pytest.approx(expected, abs=1e-4)


def test_whole_scores_are_differences_of_two_bounds(scorer_of):
    scorer = scorer_of("mdlm", suffix_only=False, num_draws=6)
    bos, *ids = scorer.windows([], scorer.encode("abcde"))[0].ids
    rows = [Row((bos, *ids), 1), Row((bos, *ids[:3]), 1)]
    nll = scorer.nll(rows)
    got = scorer.score([("abc", "de")])[0].log_likelihood
    assert got == pytest.approx(nll[rows[1]] - nll[rows[0]])
    suffix = scorer_of("mdlm", num_draws=6)
    row = Row((bos, *ids), 4)
    got = suffix.score([("abc", "de")])[0].log_likelihood
    assert got == pytest.approx(-suffix.nll([row])[row])


def test_long_contexts_lose_their_beginning_and_it_is_said_once(
    scorer_of, kind, caplog
):
    scorer = scorer_of(kind, num_draws=2)
    fits, long = "b" * (L - 3), "a" * 20 + "b" * (L - 3)
    short = scorer.score([(fits, "cd")])
    with caplog.at_level(logging.WARNING):
        assert scorer.score([(long, "cd"), (long + "b", "cd")]) == short * 2
    assert len(caplog.records) == 1
    assert f"model.length={L}" in caplog.text


def test_long_texts_are_sums_over_windows(scorer_of, kind):
    scorer, text = scorer_of(kind, num_draws=2), "abcdefghij" * 3
    rows = scorer.windows([], scorer.encode(text))
    expected = -sum(scorer.nll(rows)[row] for row in rows)
    assert scorer.score_whole([text])[0] == pytest.approx(expected)


def test_ema_weights_are_scored(scorer_of):
    scorer = scorer_of("ar")
    before = scorer.score_whole(["abc"])
    scorer.model.ema = scorer.model.make_ema()
    with torch.no_grad():
        for parameter in scorer.model.parameters():
            parameter.mul_(2)
    assert scorer.score_whole(["abc"]) == before


# ---------------------------------------------------------------- writing


def test_texts_are_written_after_unchanged_prompts(scorer_of, kind, monkeypatch):
    scorer = scorer_of(kind, tokenizer=bytes_tokenizer())
    model, drawn = scorer.model, []
    draw = model.generate_samples
    monkeypatch.setattr(
        model,
        "generate_samples",
        lambda *a, **k: drawn.append(draw(*a, **k)) or drawn[0],
    )
    texts = scorer.write([Request("abc", (), 5), Request("d", (), 3)])
    for row, prompt, size, text in zip(
        drawn[0].tokens.tolist(), ("abc", "d"), (5, 3), texts, strict=True
    ):
        ids = [scorer.tokenizer.bos_token_id, *scorer.encode(prompt)]
        assert row[: len(ids)] == ids
        new = row[len(ids) : len(ids) + size]
        if scorer.tokenizer.eos_token_id in new:
            new = new[: new.index(scorer.tokenizer.eos_token_id)]
        assert text == scorer.tokenizer.decode(new, skip_special_tokens=True)


def test_texts_end_before_a_stop(scorer_of, kind):
    scorer = scorer_of(kind)
    text = scorer.write([Request("abc", (), 8)])[0]
    assert len(text) > 2
    stops = (text[1:], text[2:])
    assert scorer.write([Request("abc", stops, 8)]) == [text[: text.index(stops[0])]]
    short = scorer.write([Request("abc", (), 2)])[0]
    assert text.startswith(short)
    assert len(short) < len(text)


def test_texts_end_before_eos(scorer_of, monkeypatch):
    scorer = scorer_of("mdlm")
    eos, ids = scorer.tokenizer.eos_token_id, scorer.encode("xy")
    row = [scorer.tokenizer.bos_token_id, *scorer.encode("ab"), *ids, eos, *ids]

    class Drawn:
        tokens = torch.tensor([row])

    monkeypatch.setattr(scorer.model, "generate_samples", lambda *a, **k: Drawn)
    assert scorer.write([Request("ab", (), 8)]) == ["xy"]


@pytest.mark.parametrize(
    ("prompt", "wanted", "kept", "size"),
    [(3, 5, 3, 5), (3, 100, 3, 8), (30, 4, 7, 4), (30, 100, 5, 6), (0, 100, 0, 11)],
)
def test_long_prompts_share_the_length_with_what_is_written(
    scorer_of, caplog, prompt, wanted, kept, size
):
    scorer = scorer_of("mdlm")
    ids, got = scorer._fit(
        Request("ab" * 20, (), wanted)._replace(prompt=("ab" * 20)[:prompt]), L - 1
    )
    assert (len(ids), got) == (kept, size)
    assert bool(caplog.records) == (kept < prompt or size < wanted)


def test_without_a_tail_an_exact_model_writes_greedily(make_model):
    """sampling.p_nucleus=0, as docs/downstream_tasks.md says."""
    model = make_model("algo=ar", "sampling.p_nucleus=0", tokenizer=text8_tokenizer())
    scorer = Scorer(model)
    prompt = (model.tokenizer.bos_token_id, *scorer.encode("ab"))
    given = given_tokens([Prompt("ab", list(prompt[1:]))], prompt[0], model.num_tokens)
    x = model.generate_samples(1, given=given).tokens
    row = Row(tuple(x[0].tolist()), len(prompt))
    assert scorer.greedy([row]) == {row: True}


def test_cut():
    assert cut("one. two\n", ("\n", ".")) == "one"
    assert cut("one", ("", "x")) == "one"
    assert cut("one", ()) == "one"


# ---------------------------------------------------------------- errors


def test_a_bound_is_that_of_the_whole_text_with_its_error(scorer_of, kind):
    scorer = scorer_of(kind, num_draws=64)
    texts = ["a b c", "", "abc " * 9]
    bounds = scorer.bounds(texts)
    assert [-x.nll for x in bounds] == scorer.score_whole(texts)
    assert [x.num_tokens for x in bounds] == [len(scorer.encode(x)) for x in texts]
    if kind == "ar":
        assert {x.stderr for x in bounds} == {None}
        return
    assert [x.stderr > 0 for x in bounds] == [True, False, True]
    few = scorer_of(kind, num_draws=4).bounds(texts)
    assert few[2].stderr > bounds[2].stderr
    error = (few[2].stderr ** 2 + bounds[2].stderr ** 2) ** 0.5
    assert abs(few[2].nll - bounds[2].nll) < 4 * error
    assert bounds[0].ppl == math.exp(bounds[0].nll / bounds[0].num_tokens)
    assert math.isnan(bounds[1].ppl)
