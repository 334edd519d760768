"""SDTT: the teacher's targets, divergences, the whole loss, rounds.

Ours draws in another way which tokens a step of the teacher reveals, and as what, with
one uniform number for each instead of one for each entry of the vocabulary. What
replays here is the published draw, from our posterior, in the place of `SDTT.reveal`.

Known errors of the reference, and how its numbers are compared:

* the mask's column is in mse and tvd: `algo.compat=reference`; ours leaves it out, of
  which the cases have numbers of their own formula;
* its time grid is `legacy`; numbers of the grids `exact` and `endpoint` are those of a
  formula beside it, as each run's `provenance` says;
* a time below 0 has a negative probability of being masked, which is 0 in ours; either
  reveals every mask;
* a batch without masked tokens has the loss nan, ours 0;
* after a resume in the middle of a round the step size is the first one, ours that of
  the round;
* the work at the start of a round is done once for each micro-batch, ours once.
"""

import re
from types import SimpleNamespace

import pytest
import torch
from golden_cases import Case, approx, close, for_cases
from golden_models import StubTokenizer, composed, followed, sizes_of
from omegaconf import OmegaConf
from torch import Tensor

from cli.settle import algorithm_class
from diffusion.base import Latent, flat_positions
from distillation.sdtt import SDTT, GrowingSteps
from models.head import Head, logits_of
from sampling.categorical import exponential_race

DTYPES = {"float32": torch.float32, "float64": torch.float64}
DTYPES |= {"f32": torch.float32, "f64": torch.float64}
# The published names of divergences that have another one here.
MODES = {"tvd": "tvd-log"}
NOISES = {"loglinear": "log-linear"}
SIZES = ("hidden_size", "cond_dim", "length", "n_blocks", "n_heads", "dropout")


def settings(case: Case, **more) -> dict:
    """Our settings, dotted keys, that the case's config states."""
    own = {
        **{f"model.{key}": case.setting(f"model.{key}") for key in SIZES},
        **{
            f"training.{key}": case.setting(f"training.{key}")
            for key in ("sampling_eps", "antithetic_sampling", "ema")
        },
        "noise.type": NOISES.get(case.setting("noise.type")),
        "noise.eps": case.setting("noise.eps"),
        "algo.time_conditioning": case.setting("time_conditioning"),
    }
    for key, value in case.setting("parameterization", {}).items():
        if not OmegaConf.is_config(value) and key != "loss_precision":
            own[f"algo.{key}"] = value
    return {key: x for key, x in own.items() if x is not None} | more


def build(case: Case, dtype: torch.dtype = torch.float32, **more) -> SDTT:
    """A model in training mode, with `more` settings (`__` for the dot)."""
    config = composed("algo=sdtt", "model=tiny", "model.n_heads=1", "model.cond_dim=8")
    more = {key.replace("__", "."): x for key, x in more.items()}
    for key, value in settings(case, **more).items():
        OmegaConf.update(config, key, value)
    tokenizer = StubTokenizer(*sizes_of(case))
    with torch.random.fork_rng():
        model = algorithm_class(config)(config, tokenizer)
    return model.train().to(dtype)


def published_reveal(model, noise: Tensor, replay, monkeypatch) -> list[Tensor]:
    """Has the teacher draw as published, and takes notes.

    Args:
        noise: Uniforms of each step, (M, B, L, K).

    Returns:
        Gets the ids after each step, (B, L).
    """
    after: list[Tensor] = []

    def reveal(x, head, step):
        log_p = model.denoised(
            logits_of(head, model.loss_precision()), xt=x, sigma=step.sigma
        )
        levels = {"alpha_t": step.alpha_t, "alpha_s": step.alpha_s}
        q_xs = model.posterior(log_p.exp(), xt=x, **levels).to(log_p.dtype)
        assert not replay.uniforms
        replay.uniforms = [noise[len(after)]]
        after.append(exponential_race(q_xs, None))
        return after[-1]

    monkeypatch.setattr(model, "reveal", reveal)
    return after


def log_probs(model, head: Head, x: Tensor) -> Tensor:
    """SUBS of the teacher's logits at ids x."""
    logits = logits_of(head, model.loss_precision())
    sigma = torch.zeros(len(x), 1)
    return model.carry_over(model.process_logits(logits, xt=x, sigma=sigma), x)


def nothing_drawn(steps: int, x0: Tensor) -> Tensor:
    """Our own draws of the teacher, which `published_reveal` does not use."""
    return torch.zeros(len(x0), steps, 2, x0.shape[1])


# ---------------------------------------------------------------- targets


@for_cases("sdtt", holding="runs")
def test_targets(case, replay, monkeypatch):
    """Times, levels, the teacher's predictions, its trajectory and the targets, of
    every run of the case; revealed tokens keep the target of their step."""
    assert case.values["runs"]
    for run in case.values["runs"]:
        check_targets(case, run, replay, monkeypatch)


def check_targets(case, run, replay, monkeypatch) -> None:
    prefix, M = run["prefix"], run["M"]
    model = build(
        case,
        DTYPES[run["dtype"]],
        algo__num_distill_steps=M,
        algo__teacher_time_grid=run["time_grid"],
        algo__sampling_mode=run["teacher_update"],
        algo__min_num_sampling_steps=1,
    )
    rounds = range(64)
    number = next(r for r in rounds if model.rounds.step_size(r) > run["D"] * 0.999)
    assert model.rounds.step_size(number) == pytest.approx(run["D"], rel=1e-12)
    model.teacher.take(case.group("teacher/"), number)
    model.teacher.network.to(DTYPES[run["dtype"]])
    t, xt = case["t"].double(), case["x_t"]
    masked = xt == model.mask_index
    alpha_t, dalpha_t = model.noise(t[:, None])
    z = Latent(xt, alpha_t, dalpha_t, flat_positions(masked), is_noised=masked)
    monkeypatch.setattr(model, "corrupt", lambda *args: z)
    replay.uniforms = [nothing_drawn(M, xt)]
    _, steps = model.plan(xt, t)
    noise = case[f"{prefix.split('/')[0]}/u"]
    after = published_reveal(model, noise, replay, monkeypatch)
    target = model.targets(xt, steps)

    before = [xt, *after]
    heads = [
        model.teacher.head(x, model.condition(step.sigma))
        for x, step in zip(before, steps, strict=True)
    ]
    model.reveal(before[-1], heads[-1], steps[-1])  # which nothing depends on
    times = model.teacher_times(t)
    case.check(f"{prefix}/tau", times, default={"atol": 1e-6})
    for name in ("t", "s"):
        if (golden := f"{prefix}/move_chance_{name}") in case:
            levels = [1 - getattr(step, f"alpha_{name}").squeeze(-1) for step in steps]
            limits = case.tolerance(golden)
            close(torch.stack(levels), case[golden].clamp(min=0), golden, **limits)
    for k, (x, xs) in enumerate(zip(before, after, strict=True)):
        assert torch.equal(xs, case[f"{prefix}/x_steps"][k]), f"{case}: {prefix} {k}"
        if f"{prefix}/newly" in case:
            assert torch.equal(xs != x, case[f"{prefix}/newly"][k])
        if f"{prefix}/log_p" in case:
            limits = case.tolerance(f"{prefix}/log_p")
            ours, golden = log_probs(model, heads[k], x), case[f"{prefix}/log_p"][k]
            at = x == model.mask_index
            close(ours[at], golden[at], f"{prefix} {k}", **limits)
    golden = case[f"{prefix}/target"]
    assert not golden[~masked].any()
    ours = log_probs(model, target, xt)
    limits = case.tolerance(f"{prefix}/target")
    close(ours[masked], golden[masked], f"{case}: {prefix}", **limits)
    assert ours.dtype == golden.dtype


# ---------------------------------------------------------------- divergences


def logit_losses(case: Case) -> list[tuple[str, str]]:
    """(name of a divergence, suffix) of each loss."""
    found = [re.fullmatch(r"loss_(.+)_(\w+)", name) for name in case.values]
    return [(match[1], match[2]) for match in found if match]


# What computes each of them: `training.loss_precision` and the network's type.
PRECISIONS = {
    "f32": ("float32", torch.float32),
    "prec32": ("float32", torch.float32),
    "prec64": ("float64", torch.float32),
    "f64": ("float64", torch.float64),
}


@pytest.fixture
def on_logits(monkeypatch):
    """on_logits(case, mode, suffix, xt): a model whose head gets logits as they are,
    and who sees xt."""

    def make(case, name, suffix, xt):
        precision, dtype = PRECISIONS[suffix]
        mode = name.removesuffix("-no-mask")
        model = build(
            case,
            dtype,
            algo__distill_mode=MODES.get(mode, mode),
            algo__compat="paper" if name.endswith("-no-mask") else "reference",
            training__loss_precision=precision,
            model__length=xt.shape[1],
        )
        eye = torch.eye(model.vocab_size, dtype=dtype)
        masked = xt == model.mask_index
        ones = torch.ones(len(xt), 1)
        z = Latent(xt, ones, ones, flat_positions(masked), is_noised=masked)
        student = case["student_logits"].to(dtype).requires_grad_()
        teacher = Head(case["teacher_logits"].to(dtype), eye, None)
        monkeypatch.setattr(model, "plan", lambda *args: (z, []))
        monkeypatch.setattr(model, "sample_t", lambda *args: None)
        monkeypatch.setattr(model, "hidden", lambda *args: student)
        monkeypatch.setattr(model, "_head", lambda hidden: Head(hidden, eye, None))
        monkeypatch.setattr(model, "targets", lambda *args: teacher)
        return model, student

    return make


def batch_of(xt: Tensor) -> dict[str, Tensor]:
    return {"input_ids": xt, "attention_mask": torch.ones(xt.shape)}


@for_cases("sdtt", holding="student_logits")
def test_divergences_and_gradients(case, on_logits):
    """Means over the masked tokens, of the divergences as published and of those
    without the mask's column, and their gradients with respect to raw logits."""
    assert logit_losses(case)
    xt = case["x_t"]
    for name, suffix in logit_losses(case):
        model, student = on_logits(case, name, suffix, xt)
        for key in ("target_f32", "target_f64"):
            target = case["teacher_logits"].to(DTYPES[key[-3:]])
            masked = xt == model.mask_index
            assert int(masked.sum()) == case.values["masked_rows"]
            ours = model.denoised(target, xt=xt, sigma=xt)
            case.check(key, ours, rows=masked)
        loss = model.distillation_loss(batch_of(xt), 0)
        key = f"loss_{name}_{suffix}"
        golden, limits = case.values[key], case.tolerance(key)
        assert float(loss.loss.detach()) == approx(golden, limits), f"{case}: {key}"
        assert int(loss.num_tokens.sum()) == case.values["masked_rows"]
        (gradient,) = torch.autograd.grad(loss.loss, student)
        if (key := f"grad_{name}_{suffix}") in case:
            case.check(key, gradient)


@for_cases("sdtt", holding="batch_without_masked_tokens")
def test_a_batch_without_masked_tokens(case, on_logits):
    """Nothing to learn from: 0, and no gradient."""
    xt = torch.zeros_like(case["x_t"])
    for name, golden in case.values["batch_without_masked_tokens"].items():
        assert golden == "nan"
        model, student = on_logits(case, name, "f32", xt)
        loss = model.distillation_loss(batch_of(xt), 0).loss
        (gradient,) = torch.autograd.grad(loss, student)
        assert float(loss.detach()) == 0
        assert not gradient.any()


# ---------------------------------------------------------------- the whole loss


def full_losses(case: Case) -> list[tuple[str, str]]:
    found = [re.fullmatch(r"loss_(.+)_(f32|f64)", name) for name in case.values]
    return [(match[1], match[2]) for match in found if match]


@for_cases("sdtt", holding="u_teacher")
def test_the_whole_loss(case, replay, monkeypatch):
    """From clean ids and every draw: times, noisy ids, targets, loss, gradients."""
    assert full_losses(case)
    for name, suffix in full_losses(case):
        check_loss(case, name, suffix, "reference", replay, monkeypatch)
        if name.startswith("kl"):  # without the mask's column the same
            check_loss(case, name, suffix, "paper", replay, monkeypatch)


def loss_precision(case: Case, suffix: str) -> str:
    """The published null means the network's."""
    stated = case.setting("parameterization.loss_precision")
    bits = re.search(r"\d+", suffix)[0] if stated is None else stated
    return f"float{bits}"


def check_loss(case, name, suffix, compat, replay, monkeypatch) -> None:
    x0, M = case["x0"], len(case["u_teacher"])
    model = build(
        case,
        DTYPES[suffix],
        algo__distill_mode=MODES.get(name, name),
        algo__compat=compat,
        # The published code has no other one, so its settings do not name it.
        algo__teacher_time_grid="legacy",
        algo__min_num_sampling_steps=1,
        loader__global_batch_size=len(x0),
        loader__batch_size=len(x0),
        training__loss_precision=loss_precision(case, suffix),
    )
    assert case.values["M"] == model.num_distill_steps == M
    model.trainer = SimpleNamespace(
        global_step=0,
        global_rank=0,
        num_nodes=1,
        devices=1,
        accumulate_grad_batches=1,
    )
    model.config.trainer.devices = 1
    model.config.trainer.accumulate_grad_batches = 1
    model.backbone.load_state_dict(case.group("student/"), strict=True)
    model.teacher.take(case.group("teacher/"), 0)
    model.teacher.network.to(DTYPES[suffix])
    assert model.step_size == pytest.approx(case.values["D"], rel=1e-12)
    seen: dict[str, Tensor] = {}

    def noted(name):
        function = getattr(model, name)

        def call(*args):
            seen[name] = function(*args)
            return seen[name]

        monkeypatch.setattr(model, name, call)

    for function in ("sample_t", "plan", "targets"):
        noted(function)
    replay.uniforms = [case["u_time"], case["u_move"], nothing_drawn(M, x0)]
    published_reveal(model, case["u_teacher"], replay, monkeypatch)
    loss = model.distillation_loss(batch_of(x0), 0).loss

    z, _ = seen["plan"]
    masked = z.xt == model.mask_index
    case.check(f"t_{suffix}", seen["sample_t"])
    case.check(f"move_chance_{suffix}", 1 - z.alpha_t)
    case.check(f"x_t_{suffix}", z.xt)
    target = log_probs(model, seen["targets"], z.xt)
    case.check(f"target_{suffix}", target, rows=masked)
    golden, limits = case.values[f"loss_{name}_{suffix}"], case.tolerance
    assert float(loss.detach()) == approx(golden, limits(f"loss_{name}_{suffix}")), name
    loss.backward()
    gradients = {n: p.grad for n, p in model.backbone.named_parameters()}
    front = f"grad_{name}_{suffix}"
    for weight in case.group(f"{front}/"):
        stated = case.tolerance(f"{front}/{weight}", limits("grad_x"))
        case.check(f"{front}/{weight}", gradients[weight], default=stated)
    for weight, norm in case.values.get(f"grad_norms_{name}_{suffix}", {}).items():
        ours, stated = gradients[weight].norm(), limits("grad_x")
        if f"grad_{name}_{suffix}" in case.info["tolerance"]:
            stated = limits(f"grad_{name}_{suffix}")
        assert float(ours) == approx(norm, stated), (name, suffix, weight)
    assert all(p.grad is None for p in model.teacher.network.parameters())


# ---------------------------------------------------------------- rounds


def rounds_of(schedule: dict) -> GrowingSteps:
    config = composed("algo=sdtt", "model=tiny")
    for key in set(config.algo) & set(schedule):
        config.algo[key] = schedule[key]
    config.training.sampling_eps = schedule["sampling_eps"]
    return GrowingSteps(config)


@for_cases("sdtt", holding="schedules")
def test_step_sizes_and_the_end(case):
    """By global step; also where a run goes on in the middle of a round, where the
    reference begins with its first step size again."""
    for schedule in case.values["schedules"]:
        rounds, rows = rounds_of(schedule), schedule["rows"]
        limits = case.tolerance("schedules")
        first = rows[0]["global_step"]
        is_resumed = rounds.number(first) > 0
        for row in rows:
            step = row["global_step"]
            number = rounds.number(step)
            ours = rounds.step_size(number)
            is_boundary = step == rounds.start(number)
            if is_resumed and number == rounds.number(first) and not is_boundary:
                assert row["D"] == schedule["D_initial"]
                continue
            assert ours == approx(row["D"], limits), row
            assert rounds.num_steps(number) == row["teacher_steps"]
            copies = is_boundary and step > 0 and not rounds.is_over(step)
            micro_batches = schedule["accumulate_grad_batches"]
            assert copies * micro_batches == row["teacher_copies"]
            if is_boundary:
                assert rounds.is_over(step) == row["stops"]


@for_cases("sdtt", holding="weights")
@pytest.mark.parametrize("index", [0, 1])
def test_weights_over_rounds(case, index):
    """Replays the recorded updates: teacher, student and EMA as every loss sees them,
    through the hooks that Lightning calls; further micro-batches change nothing."""
    rule = case.values["weights"][index]
    front = "ema_teacher" if rule["use_ema_on_growth"] else "plain_teacher"
    keys = ("grow_dt_every", "use_ema_on_growth")
    algo = {key: rule[key] for key in keys}
    training = {"ema": rule["ema"], "sampling_eps": 1e-5}
    model, name, student, saved = followed(
        case, front, "sdtt", algo=algo, training=training
    )
    place = [n for n, _ in model.backbone.named_parameters()].index(name)

    def check(step: int) -> None:
        limits = case.tolerance("teacher")
        found = {
            "teacher": model.teacher.network.get_parameter(name),
            "student": student,
            "shadow": model.ema.shadow_params[place],
        }
        for what, ours in found.items():
            close(ours, case[f"{front}/{what}"][step], f"{what} at {step}", **limits)
        assert model.step_size == approx(rule["D"][step], case.tolerance("schedules"))
        assert model.ema.num_updates == rule["ema_num_updates"][step]

    for step, update in enumerate(case[f"{front}/updates"]):
        model.trainer.global_step = step
        model.on_train_batch_start(None, 0)
        check(step)
        model.on_train_batch_start(None, 1)
        check(step)
        with torch.no_grad():
            student += update
        model.ema.update(model.parameters())  # as optimizer_step does
    every = rule["grow_dt_every"]
    assert len(saved) == len({s // every for s in range(len(rule["D"]))})
