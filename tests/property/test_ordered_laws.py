"""Laws of samplers that choose the order in which masks are revealed."""

import math
from itertools import pairwise

import pytest
import torch
from enumeration import configure
from tiny import ALGORITHMS, SAMPLING, compose

from cli.settle import algorithm_class
from sampling.ordered import ORDERS, entropy
from sampling.prompts import Given
from sampling.registry import sampler_class
from sampling.reverse_process import Chain

B, L, K = 16, 8, 7
ORDERED = [pair for pair in SAMPLING if pair[0] in ("confidence", "entropy_bound")]
pairs = pytest.mark.parametrize(
    ("predictor", "name"), ORDERED, ids=["-".join(pair) for pair in ORDERED]
)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def visited(monkeypatch):
    """x_t whenever tokens are proposed, and what is asked for."""
    seen, tokens = [], Chain.tokens

    def noted(chain, xt, alpha_t, where):
        seen.append((xt.clone(), alpha_t.clone(), where.clone()))
        return tokens(chain, xt, alpha_t, where)

    monkeypatch.setattr(Chain, "tokens", noted)
    return seen


def some_given():
    """Nothing, a prompt, a text with gaps, everything; as many rows of each."""
    known = torch.zeros(4, L, dtype=torch.bool)
    known[1, :3] = True
    known[2, [0, 1, 4, 7]] = True
    known[3] = True
    known = known.repeat(B // 4, 1)
    return Given(torch.randint(6, (B, L), generator=seeded(5)), known)


# ---------------------------------------------------------------- both


@pairs
@pytest.mark.parametrize("use_float64", [True, False])
@pytest.mark.parametrize("compat", ["paper", "reference"])
def test_what_is_revealed_stays(
    make_model, visited, predictor, name, use_float64, compat
):
    """And what is given; each step reveals something, none is asked for twice."""
    model = make_model(
        f"algo={name}",
        f"sampling.predictor={predictor}",
        f"sampling.use_float64={use_float64}",
        f"algo.compat={compat}",
    )
    given = some_given()
    samples = model.generate_samples(B, seeded(), given=given)
    m = model.mask_index
    states = [xt for xt, _, _ in visited] + [samples.tokens]
    for xt, xs in pairwise(states):
        assert torch.equal(xs[xt != m], xt[xt != m])
    for xt, _, where in visited:
        assert bool((where <= (xt == m)).all())
    assert not (samples.tokens == m).any()
    assert torch.equal(samples.tokens[given.known], given.tokens[given.known])
    asked = sum(where.any(dim=-1).long() for _, _, where in visited)
    assert torch.equal(samples.evaluations, asked)
    assert samples.evaluations[3::4].tolist() == [0] * (B // 4)
    assert bool((samples.evaluations <= (~given.known).sum(dim=-1)).all())


@pairs
def test_a_prompt_is_as_good_as_revealed(make_model, predictor, name):
    """What a row reveals does not depend on the rows beside it, at temperature 0."""
    model = make_model(
        f"algo={name}", f"sampling.predictor={predictor}", "sampling.temperature=0"
    ).double()
    given = some_given()
    together = model.generate_samples(B, seeded(), given=given).tokens
    for row in range(4):
        alone = Given(*(x[row : row + 1] for x in given))
        x = model.generate_samples(1, seeded(9), given=alone).tokens
        assert torch.equal(x[0], together[row])


@pairs
def test_windows_reveal_their_own_tokens(make_model, predictor, name):
    """Semi-autoregressive: three windows, of which the later ones keep a part."""
    model = make_model(
        *(f"algo={name}", f"sampling.predictor={predictor}", "sampling.semi_ar=True"),
        *("sampling.stride_length=3", "sampling.num_strides=2"),
    )
    samples = model.generate_samples(4, seeded())
    assert samples.tokens.shape == (4, L + 6)
    assert not (samples.tokens == model.mask_index).any()


@pytest.mark.parametrize("predictor", ["confidence", "entropy_bound"])
def test_scores_are_the_models_own(make_model, visited, predictor):
    """At temperature 0 every drawn token has probability 1; the order is not that."""
    orders = []
    for temperature in (0.0, 0.01):
        model = make_model(
            *("algo=mdlm", f"sampling.predictor={predictor}"),
            f"sampling.temperature={temperature}",
        )
        if predictor == "entropy_bound":
            configure(model, gamma=0)
        visited.clear()
        model.generate_samples(4, seeded())
        orders.append(torch.stack([where for _, _, where in visited]))
    assert torch.equal(*orders)
    is_left_to_right = orders[0].long().diff(dim=-1) >= 0
    assert not bool(is_left_to_right.all())


@pytest.mark.parametrize("predictor", ["confidence", "entropy_bound"])
@pytest.mark.parametrize("name", ["ar", "duo_base", "dimo"])
def test_other_algorithms_have_no_masks_to_order(make_model, predictor, name):
    if name == "dimo" or not ALGORITHMS[name].has_mask:
        with pytest.raises(ValueError, match="Choose from") as error:
            make_model(f"algo={name}", f"sampling.predictor={predictor}")
        assert "\n" not in str(error.value)


def test_every_masked_algorithm_has_them():
    for name in ALGORITHMS:
        algorithm = algorithm_class(compose(f"algo={name}"))
        if algorithm.has_mask and not algorithm.is_one_step:
            for predictor in ("confidence", "entropy_bound"):
                assert sampler_class(predictor, algorithm).fits(algorithm)


# ---------------------------------------------------------------- confidence


def masks_left(visited, last, mask_index):
    """Of each row, before each step and at the end, (steps + 1, B)."""
    states = [xt for xt, _, _ in visited] + [last]
    return torch.stack([(xt == mask_index).sum(dim=-1) for xt in states])


@pytest.mark.parametrize("num_steps", [1, 2, 3, 5, 8, 13, 100])
@pytest.mark.parametrize("schedule", ["log-linear", "cosine"])
@pytest.mark.parametrize("order", ORDERS)
def test_counts_sum_to_what_is_masked(make_model, visited, num_steps, schedule, order):
    """And follow the schedule: as many are left as ancestral steps leave on average,
    to rounding. Noise on the order does not change the counts."""
    model = make_model(
        *("algo=mdlm", "sampling.predictor=confidence", f"noise={schedule}"),
        *(f"sampling.order={order}", "sampling.order_noise=0.5"),
    )
    given = some_given()
    x = model.generate_samples(B, seeded(), num_steps, given=given).tokens
    left = masks_left(visited, x, model.mask_index)
    total = (~given.known).sum(dim=-1)
    assert torch.equal(left[0], total)
    assert left[-1].tolist() == [0] * B
    assert torch.equal((left[:-1] - left[1:]).sum(dim=0), total)
    plan = model.sampler.plan(model.noise, num_steps)
    for step, masks in zip(plan[:-1], left[1:-1], strict=True):
        expected = total * (1 - step.alpha_s) / (1 - plan[0].alpha_t)
        assert bool(((masks - expected).abs() <= 0.5 + 1e-9).all())


@pytest.mark.parametrize("order", ORDERS)
def test_the_surest_are_revealed_first(make_model, give_logits, visited, order):
    """By a fixed belief whose positions differ: the sharper the earlier."""
    model = make_model("algo=mdlm", "sampling.predictor=confidence")
    configure(model, order=order, steps=L, temperature=0)
    sharpness = torch.tensor([3.0, 0.5, 7.0, 2.0, 6.0, 1.0, 5.0, 4.0])
    logits = sharpness[:, None] * torch.arange(K).double().neg() / 4
    give_logits(model, lambda xt, sigma: logits.expand(len(xt), L, K))
    x = model.generate_samples(2, seeded()).tokens
    assert bool((x == 0).all())
    expected = sharpness.argsort(descending=True).tolist()
    assert len(visited) == L
    for count, (xt, _, _) in enumerate(visited):
        known = (xt[0] != model.mask_index).nonzero().flatten().tolist()
        assert sorted(expected[:count]) == known


def test_noise_makes_the_order_random(make_model, give_logits, visited):
    """With much of it every position comes first as often."""
    model = make_model("algo=mdlm", "sampling.predictor=confidence")
    configure(model, order="margin", order_noise=1e6)
    logits = (torch.arange(L)[:, None] * torch.arange(K)).double()
    give_logits(model, lambda xt, sigma: logits.expand(len(xt), L, K))
    n = 20_000
    model.generate_samples(n, seeded(), 8)
    first = (visited[1][0] != model.mask_index).double().mean(dim=0)
    assert bool((first - 1 / L).abs().max() < 5 * math.sqrt(1 / L / n))


# ---------------------------------------------------------------- entropy bound


def believed(model, give_logits, certain):
    """A network that is certain at some positions, (L,) bool, and unsure elsewhere."""
    unsure = torch.linspace(0.3, 1.5, L)[:, None] * torch.randn(
        L, K, generator=seeded(3), dtype=torch.float64
    )
    sure = torch.full((L, K), -1e6, dtype=torch.float64)
    sure[:, 2] = 0
    logits = torch.where(certain[:, None], sure, unsure)
    give_logits(model, lambda xt, sigma: logits.expand(len(xt), L, K))
    logits = logits.clone()
    logits[:, model.mask_index] = -torch.inf
    return entropy(logits.softmax(dim=-1))


@pytest.mark.parametrize("certain", [(), (1, 6), tuple(range(L))])
def test_gamma_zero_reveals_one_at_a_time(make_model, give_logits, visited, certain):
    """The first one together with all of which the network is certain."""
    model = make_model("algo=mdlm", "sampling.predictor=entropy_bound")
    configure(model, gamma=0)
    is_certain = torch.isin(torch.arange(L), torch.tensor(certain, dtype=torch.long))
    H = believed(model, give_logits, is_certain)
    samples = model.generate_samples(4, seeded())
    left = masks_left(visited, samples.tokens, model.mask_index)[:, 0].tolist()
    unsure = L - len(certain)
    expected = [L, *range(unsure - 1, -1, -1)] if unsure else [L, 0]
    assert left == expected
    assert samples.evaluations.tolist() == [len(expected) - 1] * 4
    order = H.argsort(stable=True).tolist()
    for xt, _, _ in visited[1:]:
        known = (xt[0] != model.mask_index).nonzero().flatten().tolist()
        assert known == sorted(order[: len(known)])


@pytest.mark.parametrize("gamma", [1e9, math.inf])
def test_gamma_infinity_reveals_all_at_once(make_model, gamma):
    model = make_model("algo=mdlm", "sampling.predictor=entropy_bound")
    configure(model, gamma=gamma)
    given = some_given()
    samples = model.generate_samples(B, seeded(), given=given)
    assert samples.evaluations.tolist() == [1, 1, 1, 0] * (B // 4)


@pytest.mark.parametrize("gamma", [0.3, 1.0, 2.5, 4.0])
def test_a_step_reveals_the_largest_set_within_the_bound(
    make_model, give_logits, visited, gamma
):
    """sum H - max H <= gamma, in the order of H, by a slow loop."""
    model = make_model("algo=mdlm", "sampling.predictor=entropy_bound")
    configure(model, gamma=gamma)
    H = believed(model, give_logits, torch.zeros(L, dtype=torch.bool)).tolist()
    x = model.generate_samples(1, seeded()).tokens
    left, sizes = sorted(H), []
    while left:
        size = 1
        while size < len(left) and sum(left[: size + 1]) - left[size] <= gamma:
            size += 1
        sizes.append(size)
        left = left[size:]
    masks = masks_left(visited, x, model.mask_index)[:, 0]
    assert (masks[:-1] - masks[1:]).tolist() == sizes


def test_a_network_that_knows_the_time_is_told_the_share_of_masks(make_model, visited):
    """alpha_t = 1 - (1 - alpha_1) masks left / masks at the start, of each row."""
    model = make_model("algo=sedd", "sampling.predictor=entropy_bound")
    given = some_given()
    model.generate_samples(B, seeded(), given=given)
    total = (~given.known).sum(dim=-1)
    alpha_1 = float(model.noise(torch.ones((), dtype=torch.float64)).alpha_t)
    assert len(visited) > 1
    for xt, alpha_t, where in visited:
        left = (xt == model.mask_index).sum(dim=-1)
        expected = 1 - (1 - alpha_1) * left / total.clamp(min=1)
        asked = where.any(dim=-1)
        torch.testing.assert_close(alpha_t[asked, 0], expected[asked].double())


def test_entropies_of_certain_rows_are_exactly_zero():
    rows = torch.tensor([[0.0, 1.0, 0.0], [1 / 3] * 3], dtype=torch.float64)
    H = entropy(rows)
    assert float(H[0]) == 0
    assert float(H[1]) == pytest.approx(math.log(3))
