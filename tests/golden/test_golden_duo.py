"""DUO's curriculum: temperature, soft inputs, levels and losses from recorded draws.

`stepN_*` is one training pass at a step of the optimiser, `eval_*` validation. Known
errors of the reference, and what ours does instead:

* at the very end of the curriculum it feeds a softmax with a temperature of 1e-10 for
  one step; ours takes the true bound from that step on. What it recorded there is
  still compared, with a curriculum that lasts one step longer;
* sparse inputs take x_t = x_0 wherever x_0 is kept, and its table gives a slope with
  an error; ours repeats both under `algo.compat=reference` only.
"""

import math
import re
from types import SimpleNamespace

import pytest
import torch
from golden_cases import EXACT, FORWARD, Case, close, for_cases
from golden_models import batch_sizes, build, composed, configured, derivative_factor
from golden_weights import check_weights
from torch import Tensor

from diffusion.curriculum import NEVER_SOFT, Curriculum
from diffusion.gaussian import (
    DenseLatents,
    PublishedTopLatents,
    TopDraws,
    TopLatents,
)
from integral.approximations import Series
from integral.tables import Nearest, Table, write_table
from integral.transform import gauss_levels, quadrature
from models import head

# Where a case states nothing: what its siblings state.
TIMES = {"atol": 1e-6}
LEVELS = {"atol": 1e-6}
FITS = {"atol": 2e-4}
DIFFERENCE = 1e-3  # step in gamma of the reference's slope


# ---------------------------------------------------------------- temperature


@for_cases("duo_tau", holding="schedules")
def test_temperature(case):
    """Of every step; the true bound from `end` on, where the reference is late by one.

    Its own record of that step: the soft branch, at a temperature of 1e-10.
    """
    limits = case.tolerance("inverse_tau")
    for schedule in case.values["schedules"]:
        config = composed("algo=duo", "model=tiny")
        for key in ("gumbel_tau_log10_start", "gumbel_tau_log10_end", "start", "end"):
            config.algo.curriculum[key] = schedule[key]
        curriculum = Curriculum(config, 7)
        columns = ("steps", "inverse_tau", "uses_ordinary_loss_in_training")
        for step, golden, is_plain in zip(
            *(schedule[name] for name in columns), strict=True
        ):
            ours = 10.0 ** -curriculum.log10_tau_at(step)
            pair = (torch.tensor([x], dtype=torch.float64) for x in (ours, golden))
            close(*pair, f"{case}: step {step}", **limits)
            assert curriculum.is_over(step) == (step >= schedule["end"])
            if step == schedule["end"]:
                assert not is_plain
                assert math.log10(golden) == pytest.approx(-NEVER_SOFT)
            else:
                assert curriculum.is_over(step) == is_plain


# ---------------------------------------------------------------- whole losses


def prefixes(case: Case, is_soft: bool) -> list[str]:
    """The passes with a soft input ('step0_', ...), or those without ('eval_', ...)."""
    found = [
        match[1]
        for name in case.stated
        if (match := re.fullmatch(r"((?:step\d+|eval)_)loss_per_token", name))
        if case.holds(f"{match[1]}gamma_t") == is_soft
    ]
    return sorted(found)


def micro_batch(case: Case, prefix: str) -> int:
    """Which part of the global batch; the plain passes say it in words."""
    if f"{prefix}micro_batch" in case.values:
        return case.values[f"{prefix}micro_batch"]
    numbers = {"first": 0, "second": 1, "third": 2, "fourth": 3}
    named = re.search(r"(\w+) micro-batch", case.meaning(f"{prefix}loss_per_token"))
    return numbers[named[1]] if named else 0


def table_of(case: Case) -> Table:
    slopes = case.tensors.get("table_grad_pt", torch.zeros_like(case["table_pt"]))
    values = {"pt": case["table_pt"].numpy(), "grad_pt": slopes.numpy()}
    return Table(**case.values["table"], **values)


def is_late(case: Case, prefix: str) -> bool:
    """Whether the reference is still in its curriculum, and ours is not."""
    step = case.values[f"{prefix}global_step"]
    return step >= configured(case).algo.curriculum.end


@pytest.fixture
def run(replay, monkeypatch, place, tmp_path):
    """run(case, prefix): our loss with the recorded draws, and what it went through.

    Returns a namespace with model, operator, loss, and the results of sample_t,
    corrupt and nll. With `given_levels` the loss gets the recorded ones; with
    `late=False` the curriculum ends where ours ends.
    """

    def once(case, prefix, *, given_levels=False, late=True, **settings):
        x0 = case["x0"]
        batches = batch_sizes(case, case[f"{prefix}u_time"], len(x0))
        settings = {"algo__compat": "reference", **batches, **settings}
        if "table_pt" in case:
            path = tmp_path / "table.npz"
            write_table(path, table_of(case))
            settings.setdefault("algo__curriculum__integral_cache_path", str(path))
        model = build(case, **settings).train(prefix != "eval_")
        step = case.values.get(f"{prefix}global_step", 0)
        place(model, step=step)
        is_soft = case.holds(f"{prefix}gamma_t")
        if is_soft and late and is_late(case, prefix):
            model.curriculum.end = step + 1
            model.curriculum.log10_tau = NEVER_SOFT, NEVER_SOFT
        replay.uniforms = [case[f"{prefix}u_time"]]
        if not is_soft:
            replay.uniforms.append(case[f"{prefix}u_move"])
            replay.integers = [case[f"{prefix}random_tokens"]]
        elif late:
            replay_latents(case, prefix, monkeypatch)
        else:  # any will do
            replay.uniforms.append(torch.linspace(0, 1, x0.numel()).view_as(x0))
            replay.integers = [x0.flip(0)]
        seen = SimpleNamespace(model=model, operator=model.curriculum.operator)

        def watch(name):
            method = getattr(model, name)

            def watched(*args, **kwargs):
                result = method(*args, **kwargs)
                setattr(seen, name, result)
                if name == "corrupt" and given_levels:
                    levels = ("alpha_t", "dalpha_t")
                    given = {x: case[f"{prefix}{x}"].double() for x in levels}
                    return result._replace(**given)
                return result

            monkeypatch.setattr(model, name, watched)

        for name in ("sample_t", "corrupt", "nll"):
            watch(name)
        of = PublishedTopLatents.of

        def watched_of(*args):
            seen.given = args
            return of(*args)

        monkeypatch.setattr(PublishedTopLatents, "of", watched_of)
        batch = {"input_ids": x0, "attention_mask": torch.ones(x0.shape)}
        seen.loss = model.loss(batch, batch_idx=micro_batch(case, prefix)).loss
        return seen

    return once


def replay_latents(case, prefix, monkeypatch):
    """Recorded noise in place of what a curriculum draws."""
    if f"{prefix}epsilon" in case:
        eps = case[f"{prefix}epsilon"].flatten(0, 1)

        def noise(self, index, shape):
            rows = eps[self.chunks[index]]
            assert rows.shape == shape
            return rows.clone()

        K = eps.shape[-1]
        monkeypatch.setitem(head.CHUNK_BYTES, "cpu", 4 * K * (len(eps) // 3 + 1))
        monkeypatch.setattr(DenseLatents, "noise", noise)
        monkeypatch.setattr("diffusion.curriculum.enough", lambda *args: None)
        return
    u, slots = case[f"{prefix}u"], case[f"{prefix}random_ints"]
    order = torch.full_like(slots, -1)  # the published form has no use for it
    draws = TopDraws(u, case[f"{prefix}eps_extra"].double(), slots, order)
    gamma_t = case[f"{prefix}gamma_t"][:, None]

    def draw(shape, vocab_size, k, generators, device):
        assert (*shape, k) == u.shape
        return draws

    def float32_levels(gamma):
        """The reference computes them in float32."""
        close(gamma, gamma_t, f"{case}: {prefix}gamma_t", **TIMES)
        return gauss_levels(gamma_t)

    monkeypatch.setattr(TopDraws, "draw", draw)
    monkeypatch.setattr("diffusion.curriculum.gauss_levels", float32_levels)


def cell(case: Case, gamma: Tensor) -> Tensor:
    """How much alpha changes between neighbouring points of the table near gamma."""
    table = table_of(case)
    K, width = table.vocab_size, table.gamma_max - table.gamma_min
    spacing = width / (table.num_points - 1)
    reach = math.ceil(DIFFERENCE / spacing) + 2
    index = ((gamma.double() - table.gamma_min) / spacing).round().long()
    index = index[..., None] + torch.arange(-2, reach + 1)
    alpha = (K * case["table_pt"] - 1) / (K - 1)
    near = alpha[index.clamp(0, table.num_points - 1)]
    return near.diff(dim=-1).abs().amax(dim=-1)


def check_times(case, prefix, seen):
    """t and gamma."""
    case.check(f"{prefix}t", seen.sample_t, default=TIMES)
    gamma = seen.operator.gammas.gamma(seen.sample_t)
    case.check(f"{prefix}gamma_t", gamma, default=case.tolerance("gamma_t", TIMES))


def check_looked_up(case, prefix, seen):
    """Levels from a table; float32 may have taken them from a neighbouring entry."""
    limits, gammas = case.tolerance("alpha_t", LEVELS), seen.operator.gammas
    one = cell(case, case[f"{prefix}gamma_t"])[:, None]
    slack = {"alpha_t": one, "dalpha_t": one * (gammas.high - gammas.low) / DIFFERENCE}
    for name, allowed in slack.items():
        error = (getattr(seen.corrupt, name) - case[f"{prefix}{name}"]).abs()
        assert (error <= limits["atol"] + allowed).all(), (prefix, name)
        same = error <= limits["atol"]  # most are the very entry
        assert same.double().mean() >= 0.5


@for_cases("duo_curriculum", holding="step0_epsilon")
def test_dense_times_and_levels(case, run):
    """Levels from the recorded table: float32 may take them one entry further."""
    for prefix in prefixes(case, is_soft=True):
        seen = run(case, prefix)
        check_times(case, prefix, seen)
        check_looked_up(case, prefix, seen)
        sigma = seen.model.sigma(case[f"{prefix}alpha_t"])
        case.check(f"{prefix}sigma", sigma, default=LEVELS)


@for_cases("duo_curriculum", holding="step0_epsilon")
def test_dense_soft_input(case, run):
    """x_t and softmax(w / tau) of the recorded noise, in several chunks."""
    for prefix in prefixes(case, is_soft=True):
        seen = run(case, prefix)
        soft = seen.corrupt.inputs
        assert len(soft.chunks) > 1
        case.check(f"{prefix}xt", seen.corrupt.xt, default=case.tolerance("xt"))
        golden = case[f"{prefix}net_input"].double()
        inverse = case.values[f"{prefix}inverse_temperature"]
        assert float(1 / soft.levels.tau[0]) == pytest.approx(inverse, rel=1e-6)
        ours = torch.cat([soft.latents(i) for i in range(len(soft.chunks))])
        what = f"{case}: {prefix}net_input"
        close(ours.view_as(golden) * inverse, golden, what, **FORWARD)
        weights = torch.cat([soft.weights(i) for i in range(len(soft.chunks))])
        # Rounding of a logit is a relative error of the weight.
        rounding = 4 * torch.finfo(torch.float32).eps * float(golden.abs().max())
        limits = {"rtol": min(max(rounding, FORWARD["rtol"]), 1e-3), "atol": 1e-6}
        close(weights.view_as(golden), golden.softmax(-1), what, **limits)


def per_token(case: Case) -> dict[str, float]:
    """The tolerance of a loss that was computed in float32."""
    return {"atol": 1e-5} | case.tolerance("loss_per_token")


@for_cases("duo_curriculum", holding="step0_epsilon")
def test_dense_loss_and_gradient(case, run):
    """Given the recorded levels, as the case asks for; without, if they are ours."""
    for prefix in prefixes(case, is_soft=True):
        limits = case.tolerance("loss_per_token")
        own = run(case, prefix)
        same = torch.ones(len(case["x0"]), dtype=torch.bool)
        for name in ("alpha_t", "dalpha_t"):
            error = (getattr(own.corrupt, name) - case[f"{prefix}{name}"]).abs()
            same &= error.flatten() < 1e-9
        name = f"{prefix}loss_per_token"
        case.check(name, own.nll.nll, rows=same, default=limits)
        given = run(case, prefix, given_levels=True)
        case.check(name, given.nll.nll, default=limits)
        mean = case[name].mean()
        close(given.loss, mean, f"{case}: {prefix} mean", **limits)
        given.loss.backward()
        gradients = {n: p.grad for n, p in given.model.backbone.named_parameters()}
        recorded = case.group(f"{prefix}grad/")
        assert recorded
        for name in recorded:
            rtol = {"rtol": limits["rtol"]}  # and an atol by the gradient's size
            case.check(f"{prefix}grad/{name}", gradients[name], default=rtol)


@for_cases("duo_curriculum", holding="step0_epsilon")
def test_the_end_has_the_plain_bound(case, run):
    """Where the reference is late by a step, ours is past its curriculum."""
    late = [p for p in prefixes(case, is_soft=True) if is_late(case, p)]
    if not late:
        pytest.skip(f"{case} has no step at the end of its curriculum")
    for prefix in late:
        seen = run(case, prefix, late=False)
        step, end = case.values[f"{prefix}global_step"], seen.model.curriculum.end
        assert step == end
        z, model = seen.corrupt, seen.model
        assert z.inputs is None
        alpha_t, dalpha_t = model.noise(seen.sample_t[:, None])
        assert torch.equal(z.alpha_t, alpha_t)
        assert torch.equal(z.dalpha_t, dalpha_t)
        assert not torch.allclose(z.alpha_t, case[f"{prefix}alpha_t"], atol=1e-2)


@for_cases("duo_curriculum", holding="eval_loss_per_token")
def test_plain_bound(case, run):
    """After the curriculum and in validation: the loss without soft inputs."""
    plain = prefixes(case, is_soft=False)
    assert "eval_" in plain
    for prefix in plain:
        seen = run(case, prefix)
        assert seen.corrupt.inputs is None
        name, factor = f"{prefix}loss_per_token", derivative_factor(seen.model.config)
        case.check(name, seen.nll.nll, factor=factor, default=per_token(case))


@for_cases("duo_curriculum", holding="table_pt")
def test_levels_of_the_paper(case, run):
    """Without a table and `compat=reference`: the operator, and its very slope.

    The recorded levels are off by the table's spacing and by the forward difference,
    and by no more.
    """
    paper = {"algo__compat": "paper", "algo__curriculum__integral_cache_path": None}
    for prefix in prefixes(case, is_soft=True):
        seen = run(case, prefix, **paper)
        K, operator = case.values["vocab_size"], seen.operator
        width = operator.gammas.high - operator.gammas.low
        t = seen.sample_t[:, None].clone().requires_grad_()
        alpha = operator(t).alpha_t
        (slope,) = torch.autograd.grad(alpha.sum(), t)
        gamma = operator.gammas.gamma(seen.sample_t)
        P, dP = map(torch.from_numpy, quadrature(gamma.numpy(), K))
        truth = (K * P - 1) / (K - 1), K / (K - 1) * dP * width
        for ours, right in zip(seen.corrupt[1:3], truth, strict=True):
            close(ours.squeeze(-1), right, f"{case}: {prefix}", atol=1e-10)
        close(seen.corrupt.dalpha_t, slope, f"{case}: {prefix}slope", atol=1e-10)

        one = cell(case, gamma)[:, None]
        error = (seen.corrupt.alpha_t - case[f"{prefix}alpha_t"]).abs()
        assert (error <= one).all()
        # alpha'' between gamma and gamma + 0.001, times half the step.
        times = seen.sample_t[:, None] + torch.linspace(0, DIFFERENCE / width, 9)
        times = times.clamp(max=1).requires_grad_()
        dalpha = operator(times).dalpha_t
        (curvature,) = torch.autograd.grad(dalpha.sum(), times)
        largest = curvature.abs().amax(dim=-1, keepdim=True)
        allowed = DIFFERENCE / width / 2 * largest + one * width / DIFFERENCE
        error = (seen.corrupt.dalpha_t - case[f"{prefix}dalpha_t"]).abs()
        assert (error <= allowed * (1 + 1e-6)).all()


# ---------------------------------------------------------------- sparse inputs


def rounding(case: Case, name: str) -> float:
    """What float32 may make of a recorded curve: its terms are large and cancel."""
    if "coefficients" not in case:
        return LEVELS["atol"]
    size = case["coefficients"].abs()
    if name == "dalpha_t":
        size = size * torch.arange(len(size))
    return max(LEVELS["atol"], float(size.sum()) * torch.finfo(torch.float32).eps)


def is_sparse(case: Case) -> bool:
    return case.holds("step0_random_ints")


@for_cases("duo_curriculum", holding="step0_gamma_t", where=is_sparse)
def test_sparse_soft_input(case, run):
    """Ids, weights and x_t of the recorded draws."""
    for prefix in prefixes(case, is_soft=True):
        seen = run(case, prefix)
        check_times(case, prefix, seen)
        soft = seen.corrupt.inputs
        assert isinstance(soft, TopLatents)
        case.check(f"{prefix}xt", seen.corrupt.xt, default=EXACT)
        case.check(f"{prefix}indices", soft.ids, default=EXACT)
        limits, unit = case.tolerance("weights"), torch.finfo(torch.float32).eps
        check_weights(case, f"{prefix}weights", limits, seen.given, unit)


@for_cases("duo_curriculum", holding="step0_gamma_t", where=is_sparse)
def test_sparse_levels(case, run):
    """alpha and slope; of a fit, those of the recorded coefficients, too."""
    for prefix in prefixes(case, is_soft=True):
        seen = run(case, prefix)
        operator = seen.operator
        if isinstance(operator, Nearest):
            check_looked_up(case, prefix, seen)
            continue
        if isinstance(operator, Series):
            for name in ("m", "i"):
                golden = case[f"coefficients_{name}"]
                ours = torch.from_numpy(getattr(operator, name)).view_as(golden)
                close(ours, golden, f"{case}: {name}", **LEVELS)
        else:
            case.check(f"{prefix}alpha_t", seen.corrupt.alpha_t, default=FITS)
            operator.coefficients = case["coefficients"].tolist()
        levels = operator(seen.sample_t[:, None])
        for name, ours in levels._asdict().items():
            limits = {"atol": rounding(case, name)}
            case.check(f"{prefix}{name}", ours, default=limits)
        sigma = seen.model.sigma(case[f"{prefix}alpha_t"])
        case.check(f"{prefix}sigma", sigma, default=LEVELS)


@for_cases("duo_curriculum", holding="step0_gamma_t", where=is_sparse)
def test_sparse_loss(case, run):
    """Given the recorded levels; with its own ones a series has the same loss."""
    for prefix in prefixes(case, is_soft=True):
        limits = case.tolerance("loss_per_token")
        name = f"{prefix}loss_per_token"
        given = run(case, prefix, given_levels=True)
        case.check(name, given.nll.nll, default=limits)
        if "coefficients" not in case:
            case.check(name, run(case, prefix).nll.nll, default=limits)
        with torch.no_grad():
            sigma = case[f"{prefix}sigma"]
            model, soft = given.model, given.corrupt.inputs
            logits = model.logits_for_loss(model.hidden(soft, sigma))
            case.check(f"{prefix}log_x_theta", logits.log_softmax(-1), default=FORWARD)
