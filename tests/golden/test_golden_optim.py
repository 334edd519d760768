"""Training updates, moving averages of weights, and learning-rate schedules."""

import math
import re

import hydra
import lightning
import pytest
import torch
from golden_cases import Case, close, for_cases
from golden_models import batch_sizes, build, composed
from torch import nn
from torch.utils.data import DataLoader

from models.ema import ExponentialMovingAverage

DRAWS = ("u_time", "u_move")


# ---------------------------------------------------------------- training updates


class Recorder(lightning.Callback):
    """What each update saw: loss, norm before clipping and after, learning rate."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.rates: list[float] = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
        self.norms.append(float(nn.utils.get_total_norm(gradients)))
        self.rates.append(optimizer.param_groups[0]["lr"])

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(float(outputs["loss"]))


def clip_norm(case: Case) -> float:
    """The largest total norm of the gradients; the description has it in words."""
    words = re.search(r"clip the total norm to ([\d.]+)", case.info["description"])
    return case.setting("trainer.gradient_clip_val") or float(words[1])


def batches(case: Case) -> list[dict[str, torch.Tensor]]:
    """The recorded batch of each update; all tokens are valid unless a mask says so."""
    return [
        {
            "input_ids": case[f"{k}/x0"],
            "attention_mask": case.tensors.get(
                f"{k}/attention_mask", torch.ones(case[f"{k}/x0"].shape)
            ),
        }
        for k in range(len(case.values["updates"]))
    ]


@pytest.mark.filterwarnings(
    "ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning"
)
@for_cases("optim", holding="updates")
def test_training(case, replay, tmp_path):
    """The recorded updates through a Lightning trainer, draws replayed.

    An update is loss, backward, clipping of the total norm, optimiser, schedule,
    average. The rate is that of the schedule before its step, so 0 at first under a
    warm-up from 0.
    """
    updates, data = case.values["updates"], batches(case)
    x0 = data[0]["input_ids"]
    sizes = batch_sizes(case, case.tensors.get("0/u_time", x0), len(x0))
    model = build(case, weights="initial/", **sizes)
    for k in range(len(updates)):
        replay.uniforms += [case[f"{k}/{n}"] for n in DRAWS if f"{k}/{n}" in case]
        if f"{k}/random_tokens" in case:
            replay.integers.append(case[f"{k}/random_tokens"])
    recorder = Recorder()
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=len(updates),
        gradient_clip_val=clip_norm(case),
        callbacks=[recorder],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(model.train(), DataLoader(data, batch_size=None))

    def recorded(name: str) -> torch.Tensor:
        return torch.tensor([update[name] for update in updates])

    limits = case.tolerance("loss")
    close(torch.tensor(recorder.losses), recorded("loss"), "losses", **limits)
    norms = recorded(name := "grad_norm_before_clipping")
    limits = case.tolerance(name, limits)
    close(torch.tensor(recorder.norms), norms, "gradient norms", **limits)
    assert recorder.rates == pytest.approx([update["lr"] for update in updates])
    for name, ours in model.state_dict().items():
        case.check(f"final/{name}", ours)
        # Adam may amplify rounding here and there, but not everywhere.
        initial, final = case[f"initial/{name}"], case[f"final/{name}"]
        moved = (final - initial).abs().mean()
        assert (ours - final).abs().mean() <= 1e-3 * moved, name
    check_average(case, model)


def check_average(case: Case, model: lightning.LightningModule) -> None:
    """The averages, in the order in which checkpoints store them.

    Ours start from the weights with which training starts, as an average of the run
    should. The recorded ones start from the weights with which the reference's model
    was constructed, before `initial/*` was put into it. That leaves a difference of
    c (initial - start), c the product of all decays, which is taken out here.
    """
    names = list(case.stated["average/*"]["entries"])
    ours = [name for name, p in model.backbone.named_parameters() if p.requires_grad]
    assert ours == names
    num_updates = len(case.values["updates"])
    assert model.ema.num_updates == num_updates
    assert model.ema.decay == case.config.training.ema
    decays = ((1 + k) / (10 + k) for k in range(1, num_updates + 1))
    c = math.prod(min(model.ema.decay, decay) for decay in decays)
    starts = dict(build(case, weights=None).backbone.named_parameters())
    for name, average in zip(names, model.ema.shadow_params, strict=True):
        golden, start = case[f"average/{name}"], starts[name].detach()
        initial, final = (case[f"{at}/backbone.{name}"] for at in ("initial", "final"))
        difference = average - golden
        # Zeros and ones are known starts; a random start is either the initial
        # weights or, of the embedding, lost but for its range.
        if start.min() == start.max():
            known = difference - c * (initial - start)
        else:
            known = difference - c * initial
            known = known - known.clamp(-c * start.abs().max(), c * start.abs().max())
        moved = (final - initial).abs().mean()
        error = min(difference, known, key=lambda x: float(x.abs().max()))
        limits = case.tolerance(f"average/{name}")
        close(error, torch.zeros_like(error), f"{case}: average/{name}", **limits)
        assert error.abs().mean() <= 1e-3 * moved, name


# ---------------------------------------------------------------- moving average


def runs(case: Case) -> list[tuple[str, float, bool, dict]]:
    """(suffix of the tensors, decay, whether it ramps up, final state) of each run."""
    found = []
    for name, state in case.values.items():
        if not (match := re.fullmatch(r"state_decay(.+)_warm([01])", name)):
            continue
        decay, warm = match.groups()
        suffix = f"decay{decay}_warm{warm}"
        found.append((suffix, float(decay), warm == "1", state))
    assert found
    return found


def parameters_of(case: Case, row: int) -> list[nn.Parameter]:
    """The recorded parameters after update `row`, and one that needs no gradient."""
    count = sum(re.fullmatch(r"param\d+", name) is not None for name in case.stated)
    recorded = [nn.Parameter(case[f"param{i}"][row].clone()) for i in range(count)]
    frozen = nn.Parameter(torch.full((2,), float(row)), requires_grad=False)
    return [recorded[0], frozen, *recorded[1:]]


@for_cases("optim", holding="param0")
def test_moving_average(case):
    """Shadow weights after every update, with and without the ramp.

    The ramp is min(decay, (1 + k) / (10 + k)) at update k = 1, 2, ... Parameters
    without gradient are left out.
    """
    for suffix, decay, ramps, state in runs(case):
        ema = ExponentialMovingAverage(
            parameters_of(case, 0), decay, use_num_updates=ramps
        )
        history = []
        for row in range(1, len(case["param0"])):
            ema.update(parameters_of(case, row))
            history.append([shadow.clone() for shadow in ema.shadow_params])
        for index, shadows in enumerate(zip(*history, strict=True)):
            case.check(f"shadow{index}_{suffix}", torch.stack(shadows))
        ours = ema.state_dict()
        assert sorted(ours) == sorted(state["keys"])
        assert ours["decay"] == state["decay"] == decay
        assert ours["num_updates"] == state["num_updates"]
        assert len(ours["shadow_params"]) == state["number_of_shadow_params"]


@for_cases("optim", holding="param0")
def test_loading_keeps_the_configured_decay(case):
    """The reference takes the decay from the file, which silences `training.ema` when
    fine-tuning. Ours keeps the configured one, and takes shadows and count."""
    for suffix, decay, _, state in runs(case):
        last = len(case["param0"]) - 1
        shadows = [
            case[f"shadow{i}_{suffix}"][-1]
            for i in range(state["number_of_shadow_params"])
        ]
        configured = decay / 2
        ema = ExponentialMovingAverage(parameters_of(case, last), configured)
        ema.load_state_dict(
            {
                "decay": state["decay"],
                "num_updates": state["num_updates"],
                "shadow_params": shadows,
            }
        )
        assert ema.decay == configured
        assert ema.num_updates == state["num_updates"]
        for ours, golden in zip(ema.shadow_params, shadows, strict=True):
            assert torch.equal(ours, golden)


# ---------------------------------------------------------------- learning rates


def rates(scheduler_config, lr: float, num_updates: int) -> list[float]:
    """Rate used at each update under a config's schedule."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=lr)
    scheduler = hydra.utils.instantiate(scheduler_config, optimizer=optimizer)
    used = []
    for _ in range(num_updates):
        used.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return used


def check_rates(case: Case, name: str, ours: list[float], golden: list[float]) -> None:
    wide = {"dtype": torch.float64}
    limits = case.tolerance(name)
    close(torch.tensor(ours, **wide), torch.tensor(golden, **wide), name, **limits)


@for_cases("optim", holding="constant_with_warmup")
def test_constant_after_warmup(case):
    """lr_scheduler=constant_warmup; the first update has rate 0."""
    for run in case.values["constant_with_warmup"]:
        warmup = f"lr_scheduler.num_warmup_steps={run['num_warmup_steps']}"
        config = composed("lr_scheduler=constant_warmup", warmup)
        golden = run["lr_used_at_update"]
        ours = rates(config.lr_scheduler, run["lr"], len(golden))
        check_rates(case, "constant_with_warmup", ours, golden)


@for_cases("optim", holding="cosine_decay_with_warmup")
def test_cosine_after_warmup(case):
    """lr_scheduler=cosine_decay_warmup; its lengths are those of the run, which are
    ours for its trainer.max_steps if a tenth of the run is warm-up."""
    lengths, limits = ("warmup_t", "t_initial"), ("warmup_lr_init", "lr_min")
    for run in case.values["cosine_decay_with_warmup"]:
        chosen = ["lr_scheduler=cosine_decay_warmup"]
        chosen += [f"trainer.max_steps={run['max_steps']}"]
        chosen += [f"lr_scheduler.{name}={run[name]}" for name in limits]
        config = composed(*chosen)
        if run["warmup_t"] == pytest.approx(run["max_steps"] / 10):
            for name in lengths:
                assert config.lr_scheduler[name] == pytest.approx(run[name])
        chosen += [f"lr_scheduler.{name}={run[name]}" for name in lengths]
        config = composed(*chosen)
        golden = run["lr_used_at_update"]
        ours = rates(config.lr_scheduler, run["lr"], len(golden))
        check_rates(case, "cosine_decay_with_warmup", ours, golden)


@for_cases("optim", holding="halving")
def test_halving(case):
    """lr_scheduler=step_scheduler: the factor of the rate, at selected updates."""
    for run in case.values["halving"]:
        config = composed(
            "lr_scheduler=step_scheduler",
            f"lr_scheduler.lr_lambda.warmup_steps={run['warmup_steps']}",
            f"lr_scheduler.lr_lambda.n_halve_steps={run['n_halve_steps']}",
        )
        factor = hydra.utils.instantiate(config.lr_scheduler.lr_lambda)
        ours = [factor(step) for step in run["steps"]]
        check_rates(case, "halving", ours, run["factor"])
        few = min(max(run["steps"]), 50)
        first = rates(config.lr_scheduler, 1.0, few)
        assert first == pytest.approx([factor(step) for step in range(few)])
