"""Consistency distillation: noisy pairs, divergences, time gaps and the teacher.

`stepN_*` is one training loss at a step of the optimiser. A known error of the
reference: its time gap keeps doubling, also past 1, and takes the teacher to times
that do not exist; ours stays in the last round whose gap is at most 1. Losses are
compared from the recorded inputs all the same.
"""

import re

import pytest
import torch
from golden_cases import EXACT, FORWARD, Case, close, for_cases
from golden_models import batch_sizes, build, composed, followed

from diffusion.gaussian import Levels, pair_of
from distillation.dcd import Noisy
from distillation.teacher import Rounds
from integral.tables import Table, write_table
from integral.transform import gauss_levels
from models.head import Loss, logits_of

TIMES = {"atol": 1e-6}  # where a case states nothing: float32 rounding of gamma


def prefixes(case: Case, fits: bool | None = None) -> list[str]:
    """'step0_', ...; only those whose gap is at most 1, or above, if asked for."""
    found = [
        match[1]
        for name in case.values
        if (match := re.fullmatch(r"(step\d+_)dt", name))
        if fits is None or (case.values[name] <= 1) == fits
    ]
    return sorted(found)


def of_losses(case: Case) -> bool:
    return bool(prefixes(case))


@pytest.fixture
def model_at(replay, place, tmp_path):
    """model_at(case, prefix): student and teacher in training, at the step's times."""

    def make(case, prefix, draws_times=True):
        pt, path = case["table_pt"].numpy(), tmp_path / "table.npz"
        write_table(path, Table(**case.values["table"], pt=pt, grad_pt=0 * pt))
        model = build(
            case,
            weights=None,
            algo__compat="reference",
            algo__curriculum__integral_cache_path=str(path),
            training__loss_precision=case.values[f"{prefix}loss_precision"],
            **batch_sizes(case, case[f"{prefix}u_time"], len(case["x0"])),
        )
        step = case.values[f"{prefix}global_step"]
        place(model, step=step)
        model.backbone.load_state_dict(case.group("student/"), strict=True)
        model.teacher.take(case.group("teacher/"), model.rounds.number(step))
        if draws_times:
            replay.uniforms = [case[f"{prefix}u_time"]]
        return model.train()

    return make


def noise_parts(case: Case, prefix: str) -> tuple:
    """Noise of x_0, and the largest of the other tokens with its id."""
    eps, x0 = case[f"{prefix}epsilon"], case["x0"][..., None]
    largest, other = eps.scatter(-1, x0, -torch.inf).max(dim=-1)
    return eps.gather(-1, x0).squeeze(-1), largest, other


def recorded_levels(case: Case, prefix: str) -> list[Levels]:
    """Gaussian levels at the recorded gammas, t before s."""
    gammas = [case[f"{prefix}gamma_{time}"][:, None] for time in "ts"]
    return [Levels(*gauss_levels(gamma), torch.zeros_like(gamma)) for gamma in gammas]


@for_cases("distillation", holding="student/*", where=of_losses)
def test_times_and_noisy_pair(case, model_at, monkeypatch):
    """From the drawn times and the recorded noise: levels, ids and sigmas."""
    assert prefixes(case, fits=True)
    for prefix in prefixes(case, fits=True):
        model = model_at(case, prefix)
        gap = model.rounds.gap(case.values[f"{prefix}global_step"])
        assert gap == pytest.approx(case.values[f"{prefix}dt"], rel=1e-9)
        seen = []

        def from_record(x0, later, earlier, K, generator, prefix=prefix, seen=seen):
            seen += [later, earlier]
            return pair_of(x0, later, earlier, *noise_parts(case, prefix))

        monkeypatch.setattr("distillation.dcd.argmax_pair", from_record)
        t = model.sample_t(len(case["x0"]))
        case.check(f"{prefix}t_drawn", t, default=TIMES)
        student, teacher = model.corrupt_pair(case["x0"], t)
        for level, time in zip(seen, "ts", strict=True):
            gamma = 2 * torch.log(level.gauss_sigma / level.gauss_alpha)
            name = f"{prefix}gamma_{time}"
            case.check(name, gamma.squeeze(-1), default=TIMES)
        case.check(f"{prefix}xt", student.xt, default=EXACT)
        case.check(f"{prefix}xs", teacher.xt, default=EXACT)
        limits = case.tolerance("sigma")
        case.check(f"{prefix}sigma_t", student.sigma, default=limits)
        case.check(f"{prefix}sigma_s", teacher.sigma, default=limits)


@for_cases("distillation", holding="student/*", where=of_losses)
def test_pair_of_recorded_levels(case):
    """The same ids at every step, also where the reference's gap is too large."""
    for prefix in prefixes(case):
        levels = recorded_levels(case, prefix)
        xt, xs = pair_of(case["x0"], *levels, *noise_parts(case, prefix))
        case.check(f"{prefix}xt", xt, default=EXACT)
        case.check(f"{prefix}xs", xs, default=EXACT)


def recorded_pair(case: Case, prefix: str) -> tuple[Noisy, Noisy]:
    student = Noisy(case[f"{prefix}xt"], case[f"{prefix}sigma_t"])
    return student, Noisy(case[f"{prefix}xs"], case[f"{prefix}sigma_s"])


@for_cases("distillation", holding="student/*", where=of_losses)
def test_networks(case, model_at):
    """Log-probabilities of student and teacher at the recorded inputs."""
    for prefix in prefixes(case):
        model = model_at(case, prefix, draws_times=False)
        student, teacher = recorded_pair(case, prefix)
        ours = model(student.xt, student.sigma)
        case.check(f"{prefix}log_student", ours, default=FORWARD)
        head = model.teacher_head(teacher.xt, teacher.sigma)
        log_teacher = logits_of(head, model.loss_precision()).log_softmax(dim=-1)
        case.check(f"{prefix}log_teacher", log_teacher, default=FORWARD)
        assert not log_teacher.requires_grad


@for_cases("distillation", holding="student/*", where=of_losses)
def test_loss_and_gradients(case, model_at, monkeypatch):
    """Of the recorded inputs; the teacher gets no gradient."""
    for prefix in prefixes(case):
        model = model_at(case, prefix)
        pair = recorded_pair(case, prefix)
        monkeypatch.setattr(model, "corrupt_pair", lambda *args, pair=pair: pair)
        valid = torch.ones(case["x0"].shape)
        loss = model.consistency(case["x0"], Loss.weights(valid))
        name = f"{prefix}loss_per_token"
        limits = case.tolerance("loss_per_token")
        case.check(name, loss.nll, default=limits)
        assert loss.nll.dtype == case[name].dtype
        close(loss.total, case[name].mean(), f"{case}: {prefix}mean", **limits)
        loss.total.backward()
        gradients = {n: p.grad for n, p in model.backbone.named_parameters()}
        recorded = case.group(f"{prefix}grad/")
        assert recorded
        for name in recorded:
            rtol = {"rtol": limits["rtol"]}  # and an atol by the gradient's size
            case.check(f"{prefix}grad/{name}", gradients[name], default=rtol)
        assert all(p.grad is None for p in model.teacher.network.parameters())


@for_cases("distillation", holding="student/*", where=of_losses)
def test_a_gap_above_1_is_not_taken(case, model_at, replay):
    """The reference's leads to gammas below the range; ours is the last that fits."""
    for prefix in prefixes(case, fits=False):
        model = model_at(case, prefix)
        step, algo = case.values[f"{prefix}global_step"], model.config.algo
        dt = 2 ** (step // algo.update_teacher_every) / algo.T
        assert case.values[f"{prefix}dt"] == pytest.approx(dt)
        low, high = algo.curriculum.gamma_min, algo.curriculum.gamma_max
        assert (case[f"{prefix}gamma_s"] < low).all()

        ours = model.rounds.gap(step)
        assert 0.5 < ours <= 1
        assert ours * algo.T == 2 ** model.rounds.number(step)
        assert model.rounds.gap(100 * step) == ours
        t = model.sample_t(len(case["x0"]))
        x0 = case["x0"]
        replay.uniforms = [torch.full((*x0.shape, 1), 0.5)]
        replay.integers = [torch.zeros_like(x0)]
        student, teacher = model.corrupt_pair(x0, t)
        later = (t[:, None] + ours).clamp(max=1)
        for noisy, time in ((student, later), (teacher, later - ours)):
            gamma = low + time * (high - low)
            assert (gamma >= low).all()
            sigma = -model.operator.at(gamma).alpha_t.log()
            close(noisy.sigma, sigma, f"{case}: {prefix}sigma", atol=1e-12)


# ---------------------------------------------------------------- schedules


@for_cases("distillation", holding="dt_schedules")
def test_time_gap(case):
    """The reference's while that is at most 1, then the last such one."""
    limits = case.tolerance("dt")
    for schedule in case.values["dt_schedules"]:
        config = composed("algo=distillation", "model=tiny")
        config.trainer.max_steps = schedule["max_steps"]
        for key in set(config.algo) & set(schedule):
            config.algo[key] = schedule[key]
        rounds = Rounds(config)
        is_linear = schedule["linear_growth_dt"]
        largest = schedule["linear_growth_max"] if is_linear else 1
        last = 2 ** (schedule["T"].bit_length() - 1) / schedule["T"]
        for step, dt in zip(schedule["steps"], schedule["dt"], strict=True):
            golden = dt if dt <= largest else largest if is_linear else last
            pair = torch.tensor([rounds.gap(step), golden], dtype=torch.float64)
            close(*pair, f"{case}: step {step} of {schedule}", **limits)


@for_cases("distillation", holding="teacher_rule")
@pytest.mark.parametrize("kind", ["plain", "ema"])
def test_teacher(case, kind):
    """Replays the recorded updates; the teacher is renewed as often as recorded.

    Through the hooks that Lightning calls, with a stand-in for its trainer.
    """
    rule, front = case.values["teacher_rule"], f"{kind}_teacher"
    updates, students, teachers = (
        case[f"{front}/{name}"] for name in ("updates", "student", "teacher")
    )
    every = rule["update_teacher_every"]
    algo = {"update_teacher_every": every, "teacher_ema": kind == "ema"}
    ema = {"ema": rule["ema_decay"]}
    model, name, student, saved = followed(
        case, front, "distillation", algo=algo, training=ema
    )
    for step, update in enumerate(updates):
        model.trainer.global_step = step
        limits = case.tolerance("teacher")
        close(student, students[step], f"{case}: {front} student", **limits)
        model.on_train_batch_start(None, 0)
        ours = model.teacher.network.get_parameter(name)
        close(ours, teachers[step], f"{case}: {front} at {step}", **limits)
        with torch.no_grad():
            student += update
        model.ema.update(model.parameters())  # as optimizer_step does
        model.on_train_batch_start(None, 0)  # a further micro-batch changes nothing
        close(ours, teachers[step], f"{case}: {front} after {step}", **limits)
    assert len(saved) == len({step // every for step in range(len(updates))})
