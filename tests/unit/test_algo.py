"""The objectives: look-up by config, parameterisations, the autoregressive model."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from refusals import refused
from tiny import ALGORITHMS, CONFIGS

from algo import D3PMAbsorb, D3PMAsPublished, pick, without_mask
from cli.settle import algorithm_class
from models.attention import KVCache
from sampling.prompts import Given
from utils import ConfigError

# ---------------------------------------------------------------- look-up


def test_a_configs_class_is_found(compose, algo_name):
    found = algorithm_class(compose(f"algo={algo_name}"))
    assert found.__name__ == compose(f"algo={algo_name}").algo._target_.split(".")[1]


@pytest.mark.parametrize(
    "target", ["algo.Nonexistent", "nowhere.Thing", "algo", "", "algo.F"]
)
def test_an_absent_class_is_refused_in_one_line(compose, target):
    """With the classes that there are."""
    config = compose("algo=mdlm", f"algo._target_='{target}'")
    with pytest.raises(ConfigError) as error:
        algorithm_class(config)
    text = str(error.value)
    assert "\n" not in text
    for part in ("algo=mdlm", target, "algo.MDLM", "algo.AR"):
        assert part in text
    assert "TrainerBase" not in text


def test_every_config_has_its_class():
    assert ALGORITHMS.keys() == {path.stem for path in (CONFIGS / "algo").glob("*")}


def test_a_class_of_the_users_own(compose, tmp_path, monkeypatch):
    (tmp_path / "my_own_algo.py").write_text("class Mine:\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    found = algorithm_class(compose("algo=mdlm", "algo._target_=my_own_algo.Mine"))
    assert found.__name__ == "Mine"


# ---------------------------------------------------------------- formulas


def test_pick():
    values = torch.arange(24).view(2, 3, 4)
    index = torch.tensor([[0, 1, 2], [3, 2, 1]])
    assert pick(values, index).tolist() == [[0, 5, 10], [15, 18, 21]]


def test_without_mask_touches_the_mask_only(generator):
    logits = torch.randn(2, 3, 5, generator=generator)
    before = logits.clone()
    got = without_mask(logits, 3)
    assert torch.equal(logits, before)
    others = [0, 1, 2, 4]
    assert torch.equal(got[..., others], logits[..., others])
    assert not got.softmax(dim=-1)[..., 3].any()


@pytest.mark.parametrize("mask_index", [0, 2, 4])
def test_subs(make_model, stub_tokenizer, generator, mask_index):
    """At a mask: softmax over the other tokens; at a token: that token for sure."""
    tokenizer = stub_tokenizer(5, 0, mask_token_id=mask_index)
    model = make_model("algo=mdlm", tokenizer=tokenizer)
    logits = torch.randn(1, 5, 5, dtype=torch.float64, generator=generator)
    xt = torch.arange(5)[None]
    log_p = model.process_logits(logits, xt=xt, sigma=torch.ones(1, 1))
    x_theta = model.carry_over(log_p, xt).exp()[0]
    expected = F.one_hot(xt[0], 5).double()
    kept = logits[0, mask_index].clone()
    kept[mask_index] = -torch.inf
    expected[mask_index] = kept.softmax(dim=-1)
    torch.testing.assert_close(x_theta, expected)


def test_sedd_log_score(make_model, generator):
    """logits - log(e^sigma - 1) - log(K - 1), and 0 at the current token."""
    model = make_model("algo=sedd")
    logits = torch.randn(1, 2, 7, dtype=torch.float64, generator=generator)
    xt, sigma = torch.tensor([[6, 3]]), torch.tensor([[0.8]], dtype=torch.float64)
    got = model.carry_over(model.process_logits(logits, xt=xt, sigma=sigma), xt)
    expected = logits - torch.log(torch.exp(sigma) - 1) - torch.log(torch.tensor(6.0))
    expected[0, 0, 6] = expected[0, 1, 3] = 0
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


def test_sedd_denoises_by_its_score(make_model, generator):
    """p(x_0 | mask) is proportional to the score, whatever the score's sum is."""
    model = make_model("algo=sedd")
    xt, sigma = torch.tensor([6, 6]), torch.tensor([0.3, 2.0], dtype=torch.float64)
    logits = torch.randn(2, 7, dtype=torch.float64, generator=generator)
    log_score = model.log_score(logits, alpha_t=torch.exp(-sigma), sigma=sigma)
    score = log_score.exp()[:, :6]
    x_theta = model.denoised(logits, xt=xt, sigma=sigma).exp()
    expected = score / score.sum(dim=-1, keepdim=True)
    torch.testing.assert_close(x_theta[:, :6], expected)
    assert not x_theta[:, 6].any()


@pytest.mark.parametrize("masking", [True, False])
def test_d3pm_masks_only_if_asked(make_model, generator, masking):
    model = make_model("algo=d3pm", f"algo.subs_masking={masking}")
    logits = torch.randn(1, 8, 7, generator=generator)
    xt, sigma = torch.full((1, 8), 6), torch.ones(1, 1)
    p = model.process_logits(logits, xt=xt, sigma=sigma).exp()
    assert bool(p[..., 6].any()) is not masking
    torch.testing.assert_close(p.sum(dim=-1), torch.ones(1, 8))


def test_d3pm_redraws_revealed_tokens_only_for_compatibility(make_model):
    """The reference draws revealed tokens anew; rows with mass on the mask sum below 1.

    By default they stay, and rows sum to 1.
    """
    x_theta = torch.tensor([0.3, 0.2, 0.1, 0.1, 0.1, 0.1, 0.1]).expand(1, 2, 7).double()
    xt = torch.tensor([[2, 6]])
    levels = {"alpha_t": torch.tensor([[0.2]]), "alpha_s": torch.tensor([[0.6]])}
    paper = make_model("algo=d3pm").posterior(x_theta, xt=xt, **levels)
    old = make_model("algo=d3pm", "algo.compat=reference")
    old = old.posterior(x_theta, xt=xt, **levels)
    assert paper[0, 0].tolist() == [0, 0, 1, 0, 0, 0, 0]
    assert torch.equal(old[0, 0], x_theta[0, 0])
    torch.testing.assert_close(old[0, 1, :6], 0.5 * x_theta[0, 1, :6])
    assert old[0, 1, 6].item() == pytest.approx(0.5)
    assert paper[0, 1, 6].item() == pytest.approx(0.5)
    assert paper[0, 1].sum().item() == pytest.approx(1.0)


def test_the_published_d3pm_is_a_class_of_its_own(compose):
    """`algo.compat` chooses it, and a class without its reverse process is refused."""
    published = compose("algo=d3pm", "algo.compat=reference")
    assert algorithm_class(published) is D3PMAsPublished
    assert algorithm_class(compose("algo=d3pm")) is D3PMAbsorb
    D3PMAsPublished.validate_config(published)

    class Mine(D3PMAbsorb):
        pass

    for kind in (Mine.as_published(), D3PMAbsorb):
        refused(
            partial(kind.validate_config, published),
            "algo.compat=reference",
            kind.__name__,
            "D3PMAsPublished",
            "algo.compat=paper",
        )


@pytest.mark.parametrize("name", ["mdlm", "sedd", "duo", "duo_base", "ar"])
def test_other_algorithms_are_the_same_class_under_either_compat(compose, name):
    config = compose(f"algo={name}", "algo.compat=reference")
    assert algorithm_class(config) is algorithm_class(compose(f"algo={name}"))


def test_d3pm_reconstruction_is_the_denoiser_at_time_zero(make_model):
    model = make_model("algo=d3pm")
    x0 = torch.arange(16).view(2, 8) % 6
    got = model.reconstruction_nll(x0)
    expected = -pick(model(x0, torch.zeros(2, 1)), x0)
    torch.testing.assert_close(got.nll, expected)
    torch.testing.assert_close(got.total, expected.sum())
    assert bool((got.nll > 0).all())


# ---------------------------------------------------------------- AR


@pytest.fixture
def ar(make_model):
    return make_model("algo=ar")


def test_ar_is_next_token_cross_entropy(ar):
    """-log p(x_i | x_<i) for i = 1 .. L - 1, one prefix at a time."""
    x0 = torch.tensor([[0, 3, 1, 5, 2, 2, 4, 1], [0, 1, 1, 1, 5, 4, 3, 2]])
    nll = ar.nll(x0).nll
    assert nll.shape == (2, 7)
    for i in range(1, 8):
        log_probs = ar.next_token(x0[:, :i])
        torch.testing.assert_close(nll[:, i - 1], -pick(log_probs, x0[:, i]))


def test_ar_never_predicts_the_mask(ar):
    p = ar.next_token(torch.zeros(1, 3, dtype=torch.long)).exp()
    assert p.sum().item() == pytest.approx(1.0, abs=1e-6)
    assert p[0, ar.mask_index] == 0


def test_ar_scores_what_it_predicts(ar):
    """L - 1 positions; padding is not scored."""
    mask = torch.tensor([[1, 1, 1, 0, 0, 0, 0, 0], [1] * 8]).float()
    batch = {"input_ids": torch.full((2, 8), 3), "attention_mask": mask}
    losses = ar.loss(batch)
    assert losses.num_tokens.tolist() == [2, 7]
    nll = ar.nll(batch["input_ids"]).nll
    torch.testing.assert_close(losses.nlls[0], nll[0, :2].sum())


def test_ar_puts_bos_first(ar):
    """Whatever is given there; the rest of what is given stays."""
    ar.tokenizer.bos_token_id = 5
    known = torch.tensor([[True, True, False], [False, False, True]])
    given = ar.with_bos(Given(torch.full((2, 3), 3), known))
    assert given.known.tolist() == [[True, True, False], [True, False, True]]
    assert given.tokens[:, 0].tolist() == [5, 5]
    assert given.tokens[:, 1:].tolist() == [[3, 3], [3, 3]]


def test_ar_hidden_states_of_a_cache_are_those_of_the_whole_prefix(ar, generator):
    """The first tokens at once, the others one by one, as samplers feed them."""
    x = torch.randint(6, (3, 8), generator=generator)
    whole = ar.hidden(x)
    for start in (1, 4, 7):
        cache = KVCache(8)
        parts = [ar.hidden(x[:, :start], cache)]
        parts += [ar.hidden(x[:, i : i + 1], cache) for i in range(start, 8)]
        assert cache.length == 8
        torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=0, atol=1e-5)
