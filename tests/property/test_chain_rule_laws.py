"""The chain-rule likelihood of absorbing states, by enumeration over three tokens."""

import itertools
import math

import pytest
import torch
from enumeration import configure
from refusals import refused
from torch import Tensor

from cli.checks import check_likelihood
from cli.settle import algorithm_class
from cli.values import check_values
from evaluation.chain_rule import ORDERS, ChainRule, chain_rule_nll, check_chain_rule

K, L, MASK = 7, 3, 6
TOKENS = torch.cartesian_prod(*[torch.arange(MASK)] * L)  # every text, (N, L)
N = len(TOKENS)
EVERY_ORDER = list(itertools.permutations(range(L)))


@pytest.fixture
def table() -> Tensor:
    """Logits by x_t and position, (K, K, K, L, K)."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(K, K, K, L, K, dtype=torch.float64, generator=generator)


@pytest.fixture
def build(make_model, give_logits, table):
    """A model of three tokens, whose network is the table."""

    def build(name, *overrides):
        model = make_model(f"algo={name}", *overrides)
        model.num_tokens = L
        give_logits(model, lambda xt, sigma, *labels: table[*xt.unbind(-1)])
        return model

    return build


def by_hand(table, order, block=1, texts=TOKENS, given=()):
    """log p(x) revealing `block` positions at a time, (N,)."""
    xt, total = torch.full((len(texts), L), MASK), torch.zeros(len(texts)).double()
    for position in given:
        xt[:, position] = texts[:, position]
    for start in range(0, L, block):
        logits = table[*xt.unbind(-1)].clone()
        logits[..., MASK] = -torch.inf
        log_p = logits.log_softmax(dim=-1)
        for position in order[start : start + block]:
            if position not in given:
                index = texts[:, position, None]
                total += log_p[:, position].gather(-1, index)[:, 0]
                xt[:, position] = texts[:, position]
    return total


def in_order(order, count=N):
    return torch.tensor(order).expand(count, L)


@pytest.mark.parametrize("order", EVERY_ORDER)
def test_the_chain_rule_is_the_enumeration(build, table, absorbing_name, order):
    """Of every text, to 1e-12; probabilities of all texts sum to 1."""
    nll = chain_rule_nll(build(absorbing_name), TOKENS, in_order(order)).sum(dim=-1)
    expected = -by_hand(table, order)
    torch.testing.assert_close(nll, expected, rtol=1e-12, atol=1e-12)
    assert float((-nll).exp().sum()) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("block", [2, 3])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_blocks_are_drawn_independently(build, table, block, order):
    nll = chain_rule_nll(build("mdlm"), TOKENS, in_order(order), block).sum(dim=-1)
    expected = -by_hand(table, order, block)
    torch.testing.assert_close(nll, expected, rtol=1e-12, atol=1e-12)
    assert float((-nll).exp().sum()) == pytest.approx(1, abs=1e-12)


def test_the_mean_over_orders_is_the_bound(build, table):
    """The continuous-time bound of a network that does not know the time:

    int_0^1 da / (1 - a) sum_S (1 - a)^|S| a^(L - |S|) sum_{i in S} -log p(x_i | not S)
    """
    orders = [chain_rule_nll(build("mdlm"), TOKENS, in_order(o)) for o in EVERY_ORDER]
    mean = torch.stack(orders).sum(dim=-1).mean(dim=0)
    bound = torch.zeros(N, dtype=torch.float64)
    for size in range(1, L + 1):
        weight = math.factorial(size - 1) * math.factorial(L - size) / math.factorial(L)
        for masked in itertools.combinations(range(L), size):
            given = [i for i in range(L) if i not in masked]
            bound -= weight * by_hand(table, masked, size, given=given)
    torch.testing.assert_close(mean, bound, rtol=1e-12, atol=1e-12)


def test_every_row_has_its_own_order(build, table):
    """And a first token that stays clean is given."""
    model = build("mdlm", "algo.ignore_bos=True")
    orders = torch.tensor(EVERY_ORDER)
    texts = TOKENS[torch.randperm(N, generator=torch.Generator().manual_seed(1))][:6]
    nll = chain_rule_nll(model, texts, orders)
    assert nll[:, 0].tolist() == [0.0] * 6
    for row, order in enumerate(EVERY_ORDER):
        expected = -by_hand(table, order, texts=texts[row : row + 1], given=(0,))
        torch.testing.assert_close(nll[row : row + 1].sum(dim=-1), expected)


def test_the_network_is_told_the_share_of_masks(build, monkeypatch):
    """From all noise down, a third less with each token."""
    model, levels = build("sedd"), []
    hidden = model.hidden

    def noted(xt, sigma, labels=None):
        levels.append(torch.exp(-sigma[0, 0]))
        return hidden(xt, sigma)

    monkeypatch.setattr(model, "hidden", noted)
    chain_rule_nll(model, TOKENS[:2], in_order((0, 1, 2), 2))
    alpha_1 = float(model.noise(torch.ones((), dtype=torch.float64)).alpha_t)
    expected = [1 - (1 - alpha_1) * left for left in (1, 2 / 3, 1 / 3)]
    assert [float(x) for x in levels] == pytest.approx(expected)


def test_orders():
    generator = torch.Generator().manual_seed(0)
    left_to_right = ORDERS["left_to_right"]((4, 5), generator)
    assert left_to_right.tolist() == [list(range(5))] * 4
    orders = ORDERS["random"]((60_000, 3), generator)
    found = (orders @ torch.tensor([9, 3, 1])).bincount()
    assert int((found > 0).sum()) == 6
    assert bool(((found[found > 0] - 10_000).abs() < 5 * 100).all())


def test_the_callback_measures_valid_tokens(build, table):
    """Mean over tokens with its error, as of the bound; and what the file says."""
    model = build("mdlm")
    configure_eval(model, likelihood_order="left_to_right")
    rule = ChainRule(model.config.eval)
    rule.on_validation_start(None, model)
    mask = torch.ones_like(TOKENS)
    mask[::2, 1] = 0
    for rows in torch.arange(N).split(100):
        batch = {"input_ids": TOKENS[rows], "attention_mask": mask[rows]}
        rule.on_validation_batch_end(None, model, None, batch, 0)
    rule.on_validation_end(None, model)
    nll = chain_rule_nll(model, TOKENS, in_order((0, 1, 2)))
    expected = float((nll * mask).sum() / mask.sum())
    record = rule.record()
    assert record["nll"] == pytest.approx(expected)
    assert record["ppl"] == pytest.approx(math.exp(expected))
    assert record["nll_stderr"] > 0
    assert (record["order"], record["block"]) == ("left_to_right", 1)
    assert record["estimator"] == "chain rule left to right, exact"


def configure_eval(model, **settings):
    for key, value in settings.items():
        model.config.eval[key] = value
    configure(model)


# ---------------------------------------------------------------- refusals

CHAIN_RULE = "eval.likelihood=chain_rule"


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        (("mode=train", CHAIN_RULE), "is for mode=ppl_eval"),
        (("mode=ppl_eval", "eval.likelihood_order=left_to_right"), CHAIN_RULE),
        (("mode=ppl_eval", "eval.likelihood_block=4"), CHAIN_RULE),
        (("mode=ppl_eval", "eval.likelihood=exact"), "eval.likelihood='exact'"),
        (("mode=ppl_eval", "eval.likelihood_block=0"), "eval.likelihood_block=0"),
        (("mode=ppl_eval", "eval.likelihood_order=any"), "likelihood_order='any'"),
    ],
)
def test_settings_without_a_meaning_are_refused(compose, overrides, part):
    config = compose("algo=mdlm", *overrides)

    def check():
        check_values(config)
        check_likelihood(config)

    refused(check, part)


@pytest.mark.parametrize("name", ["ar", "duo_base", "duo", "dimo", "distillation"])
def test_it_is_for_masked_diffusion(compose, name):
    config = compose(f"algo={name}", "mode=ppl_eval", CHAIN_RULE)
    check = algorithm_class(config)
    refused(lambda: check_chain_rule(config, check), f"algo={name}", "nelbo")
