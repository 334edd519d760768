"""Samplers with the recorded weights and draws: nucleus, analytic steps, whole runs.

Ours draw in fewer random numbers (`Sampler.is_lean`), so what replays here is the
dense path in float64: the published draw of every position that may change. Positions
that cannot change take no draw; the recorded noise for them is passed over.

Known errors of the reference, and how its runs replay:

* D3PM draws revealed tokens anew at every step: `algo.compat=reference`; under ours
  revealed tokens stay;
* psi's max-rescale-ETA multiplies by ETA twice: `algo.compat=reference`;
* psi's time profiles `...-inv` use an inverse schedule that ignores eps: its formula
  takes the place of ours;
* the greedy end tells an image network no class: `algo.compat=reference`;
* autoregressive sampling ignores `p_nucleus`, which ours does not: it is 1 here.

What ours does instead of the second and third is in `test_golden_schedules.py`.
"""

import re
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from golden_cases import Case, close, find_cases, for_cases, golden_dir, parameters
from golden_models import build, composed, inverse_of_reference, sizes_of
from golden_replay import Replay
from torch import Tensor

from sampling.categorical import exponential_race, nucleus
from sampling.predictors import Analytic
from sampling.registry import SAMPLERS
from sampling.reverse_process import Chain, Step
from sampling.sampler import TIME_EPS, Sampler


class Playback:
    """Makes a sampler draw from whole rows with recorded noise, and takes notes.

    Every list has an entry for each recorded categorical draw of (B, L, K).

    Args:
        sampler: Made dense.
        noise: Uniforms of each draw, (draws, B, L, K).
        replay: Gets those of the positions drawn, a chunk at a time.
    """

    def __init__(
        self,
        sampler: Sampler,
        noise: Tensor,
        replay: Replay,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        self.before: list[Tensor] = []  # ids, (B, L)
        self.after: list[Tensor] = []  # ids, (B, L)
        self.where: list[Tensor] = []  # positions drawn, (B, L) bool
        self.probs: list[Tensor] = []  # at these positions, (n, K)
        replace, rows = Chain.replace, []

        def drawn(probs, generator):
            rows.append(probs)
            return exponential_race(probs, generator)

        def replayed(chain, xt, alpha_t, where, new):
            if len(self.after) == len(noise):  # the greedy end draws nothing
                return replace(chain, xt, alpha_t, where, new)
            u = noise[len(self.after)][where]
            replay.uniforms = list(u.split(chain.chunk)) if len(u) else []
            xs = replace(chain, xt, alpha_t, where, new)
            replay.assert_all_used()
            self.before.append(xt)
            self.after.append(xs)
            self.where.append(where)
            self.probs.append(torch.cat(rows) if rows else torch.empty_like(u))
            rows.clear()
            return xs

        sampler.is_lean, sampler.draw = False, drawn
        monkeypatch.setattr(Chain, "replace", replayed)


# ---------------------------------------------------------------- nucleus


@for_cases("nucleus", holding="log_probs")
def test_nucleus(case):
    """Kept and renormalised probabilities for every top_p; what is cut is exactly 0.

    Among equal probabilities the order of torch.sort decides which go, so rows with
    ties at the edge are compared as sorted lists. Ours has no top-k.
    """
    probs = case["log_probs"].exp()
    names = [name for name in case.stated if re.fullmatch(r"top_p_[\d.]+", name)]
    assert names
    for name in names:
        golden = case[name].exp()
        ours = nucleus(probs, float(name.removeprefix("top_p_")))
        tied = (golden > 0).sum(dim=-1) != unambiguous(probs, golden)
        assert torch.equal((ours > 0)[~tied], (golden > 0)[~tied])
        limits = case.tolerance(name)
        close(ours[~tied], golden[~tied], f"{case}: {name}", **limits)
        in_order = (x[tied].sort(dim=-1).values for x in (ours, golden))
        close(*in_order, f"{case}: {name}, ties", **limits)


def unambiguous(probs: Tensor, golden: Tensor) -> Tensor:
    """Tokens as likely as the least likely kept one or more, (..., K) -> (...).

    More than are kept means that a tie was cut.
    """
    least = torch.where(golden > 0, probs, torch.inf).amin(dim=-1, keepdim=True)
    return (probs >= least).sum(dim=-1)


# ---------------------------------------------------------------- analytic


@for_cases("analytic", holding="t_dt")
def test_analytic_step(case, replay, monkeypatch):
    """Scores, then the step from t to t - dt and noise removal at t: probabilities
    (no mask is left by the latter) and draws. Revealed tokens stay."""
    model = build(case)
    sampler, scores = Analytic(model.config.sampling), []
    xt, (K, mask) = case["xt"], sizes_of(case)
    column = torch.ones(len(xt), 1, dtype=torch.float64)
    where = xt == mask
    take = sampler.log_scores

    def noted(*arguments):
        scores.append(take(*arguments).exp())
        return scores[-1].log()

    monkeypatch.setattr(sampler, "log_scores", noted)
    names = [
        f"{index}/{name}"
        for index in range(len(case.values["t_dt"]))
        for name in ("analytic", "denoise")
    ]
    noise = torch.stack([case[f"{name}_u"] for name in names])
    played = Playback(sampler, noise, replay, monkeypatch)
    chain = Chain(model, torch.ones_like(where), None)
    for t, dt in case.values["t_dt"]:
        alpha_t, alpha_s = (model.noise(s * column).alpha_t for s in (t, t - dt))
        with torch.no_grad():
            sampler.step(chain, xt, Step(alpha_t, alpha_s))
            sampler.remove_by_draw(chain, xt, alpha_t)

    revealed = F.one_hot(xt[~where], K).double()
    for name, score, probs, drawn_at, xs in zip(
        names, scores, played.probs, played.where, played.after, strict=True
    ):
        assert torch.equal(drawn_at, where)
        limits = {"atol": case.tolerance(f"{name}_probs")["rtol"]}
        golden = case[f"{name.split('/')[0]}/score"][where].double()
        score[:, mask] = 1  # of the mask, p_t(m) / p_t(m); ours leaves it out
        close(in_rows(score), in_rows(golden), f"{case}: score of {name}", **limits)
        golden = in_rows(case[f"{name}_probs"])
        close(in_rows(probs), golden[where], f"{case}: {name}", **limits)
        close(golden[~where], revealed, f"{case}: {name}, revealed", **limits)
        case.check(f"{name}_sample", xs)
        if name.endswith("denoise"):
            assert (probs[:, mask] == 0).all()


def in_rows(x: Tensor) -> Tensor:
    """Over each row's maximum, (..., K), which no draw depends on.

    Nor on a negative weight, which the mask has in the reference where the step is
    long; ours is 0.
    """
    return x.clamp(min=0) / x.amax(dim=-1, keepdim=True)


# ---------------------------------------------------------------- whole runs


def runs(where=lambda case: True) -> list:
    """(case, index of a run) for every recorded run; those of predictors that ours
    does not have are skipped."""
    found = []
    for case in find_cases(golden_dir(), "sampling", holding="runs"):
        if not where(case):
            continue
        for index, run in enumerate(case.values["runs"]):
            marks = []
            if run["predictor"] not in SAMPLERS:
                reason = f"predictor={run['predictor']} is not in samplers.SAMPLERS"
                marks = [pytest.mark.skip(reason=reason)]
            name = f"{case}-{index}-{run['predictor']}"
            found.append(pytest.param((case, index), id=name, marks=marks))
    return found or parameters([], "sampling* with runs")


def played_run(
    case: Case, index: int, replay: Replay, monkeypatch, **settings
) -> tuple[Tensor, Playback, Sampler, int]:
    """Our run with the recorded draws: ids, notes, sampler, network calls."""
    run = case.values["runs"][index]
    ours = composed(f"algo={case.config.algo.name}").sampling
    settings |= {f"sampling__{key}": run[key] for key in ours if key in run}
    model = build(case, **settings)
    if run.get("psi", {}).get("time_profile", "").endswith("-inv"):
        inverse = inverse_of_reference(case.config.noise.type)
        monkeypatch.setattr(model.noise, "inverse", inverse)
    if f"{index}/x_init" in case:
        replay.integers = [case[f"{index}/x_init"]]
    played = Playback(model.sampler, case[f"{index}/u"], replay, monkeypatch)
    calls: list[int] = []
    network, labels = model.backbone, None
    if is_of_images(case):
        first = network.input_conv
        plan = recorded_plan(model, run)
        monkeypatch.setattr(model.sampler, "plan", lambda *arguments: plan)
    else:
        first = network.blocks[0]
    if "labels" in run:
        labels = torch.tensor(run["labels"])
    num_samples = case[f"{index}/u"].shape[1]
    first.register_forward_hook(  # two of guided samples are one batch
        lambda module, inputs, output: calls.extend(
            [1] * -(-len(output) // num_samples)
        )
    )
    samples = model.generate_samples(num_samples, labels=labels)
    assert int(samples.evaluations.max()) <= len(calls)
    return samples.tokens, played, model.sampler, len(calls)


def is_of_images(case: Case) -> bool:
    return case.setting("model.type") == "unet"


def recorded_plan(model, run: dict) -> list[Step]:
    """Our steps, at the signal levels of the reference's float32 times.

    Near t = 1 those of the cosine schedule have few digits left, and the U-Net is told
    1000 times their logarithm.
    """
    steps = model.sampler.plan(model.noise, run["steps"])
    times = torch.linspace(1, TIME_EPS, run["steps"] + 1)
    levels = [float(alpha) for alpha in model.noise(times).alpha_t]
    recorded = {t: s for t, s, _ in run.get("posteriors", [])}  # in order
    if recorded:
        # Of the greedy end there is none.
        assert list(recorded) == pytest.approx(levels[: len(recorded)], rel=0.1)
        levels[: len(recorded)] = recorded
    alphas = torch.tensor(levels, dtype=torch.float64)
    pairs = zip(steps, pairwise(alphas), strict=True)
    return [step._replace(alpha_t=t, alpha_s=s) for step, (t, s) in pairs]


def has_known_error(case: Case, run: dict) -> bool:
    """Whether the recorded run has an error that `algo.compat=reference` repeats."""
    modes = [str(value) for value in run.get("psi", {}).values()]
    is_d3pm = case.config.algo.name == "d3pm"
    forgets_labels = "labels" in run and run["noise_removal"] == "greedy"
    is_rescaled = any(mode.startswith("max-rescale") for mode in modes)
    return is_d3pm or forgets_labels or is_rescaled


@pytest.mark.parametrize("run", runs())
def test_run(run, replay, monkeypatch):
    """Ids after every draw and at the end, exactly; probabilities of the first and
    of the last draw; no more network calls than the reference's.

    Rows that ours does not draw are certain in the recorded run: those tokens stay.
    """
    case, index = run
    recorded = case.values["runs"][index]
    compat = "reference" if has_known_error(case, recorded) else "paper"
    x, played, sampler, calls = played_run(
        case, index, replay, monkeypatch, algo__compat=compat
    )
    for step, (ours, golden) in enumerate(
        zip(played.after, case[f"{index}/x_steps"], strict=True)
    ):
        assert torch.equal(ours, golden), f"step {step}"
    case.check(f"{index}/x_final", x)
    for name, draw in (("first_probs", 0), ("last_probs", -1)):
        check_probs(
            case, f"{index}/{name}", played, draw, isinstance(sampler, Analytic)
        )
    # float32 noise would make rare tokens rarer.
    assert all(probs.dtype == case[f"{index}/u"].dtype for probs in played.probs)
    assert len(played.after) == recorded["sampling_calls"]
    assert calls <= recorded["network_calls"]


def check_probs(
    case: Case, name: str, played: Playback, draw: int, any_scale: bool
) -> None:
    """Probabilities of a draw where ours draws; elsewhere the golden row is one-hot.

    Args:
        any_scale: Compare rows over their maximum, for those of `Analytic`.
    """
    golden, where = case[name], played.where[draw]
    ours, limits = played.probs[draw], case.tolerance(name)
    if any_scale:
        golden, ours = in_rows(golden), in_rows(ours)
    close(ours, golden[where], f"{case}: {name}", **limits)
    stays = F.one_hot(played.before[draw], golden.shape[-1])
    close(golden[~where], stays[~where], f"{case}: {name}, certain", **limits)


@pytest.mark.parametrize("run", runs(lambda case: case.config.algo.name == "d3pm"))
def test_d3pm_keeps_revealed_tokens(run, replay, monkeypatch):
    """With algo.compat=paper a token stays once it is there, which is what the
    posterior says; the recorded run changes some."""
    case, index = run
    x, played, *_ = played_run(case, index, replay, monkeypatch, algo__compat="paper")
    mask = case.values["mask_index"]
    assert not changed([*played.after, x], mask)
    if case.values["runs"][index]["noise_removal"] != "none":
        assert (x != mask).all()
    if not changed(list(case[f"{index}/x_steps"]), mask):
        pytest.skip(f"{case}: run {index} happens to change no revealed token")


def changed(x_steps: list[Tensor], mask: int) -> bool:
    """Whether any token that is not the mask is another one a step later."""
    return any(bool(((x != mask) & (x != y)).any()) for x, y in pairwise(x_steps))


@for_cases("sampling", holding="gumbel")
def test_autoregressive_run(case, replay):
    """Token by token from bos, with the recorded Gumbel noise g turned into the
    uniforms u = exp(-exp(-g)) of the same draw: argmax p / -log u = argmax log p + g.
    """
    gumbel = case["gumbel"].double()
    replay.uniforms = list(torch.exp(-torch.exp(-gumbel)).unbind(dim=1))
    model = build(case, sampling__p_nucleus=1.0)
    model.sampler.is_lean, model.sampler.draw = False, exponential_race
    samples = model.generate_samples(len(gumbel))
    x, steps = samples.tokens, gumbel.shape[1]
    case.check("x", x)
    assert (samples.evaluations == steps).all()
    assert (x[:, 0] == case.values["bos_token_id"]).all()
    assert (x != sizes_of(case)[1]).all()  # never the mask
