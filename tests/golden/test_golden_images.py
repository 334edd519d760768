"""The U-Net and its head, class labels, guided posteriors, the loss of images.

Known errors of the reference, each repeated by `algo.compat=reference`: without labels
no class embedding is added at all, instead of that of "no class"; labels are dropped in
validation, too; the greedy end tells the network no class.
"""

import re

import pytest
import torch
from golden_cases import Case, close, for_cases
from golden_models import (
    StubTokenizer,
    build,
    composed,
    configured,
    derivative_factor,
)
from omegaconf import OmegaConf

from cli.settle import algorithm_class
from models.logistic import logistic_logits
from models.registry import build_backbone
from sampling.reverse_process import Tokens

# ---------------------------------------------------------------- the network


def network_of(case: Case, fix_logistic: bool, compat: str):
    """The case's network, with its weights."""
    config = composed("algo=duo_base", "algo.backbone=unet", "model=unet")
    OmegaConf.set_struct(config, False)
    config = OmegaConf.merge(config, {"model": case.config.model})
    config.model.fix_logistic = fix_logistic
    config.data.num_classes = case.setting("num_classes")
    config.algo.compat = compat
    network = build_backbone(config, case.config.vocab_size)
    network.load_state_dict(case.group("weights/"), strict=True)
    return network.eval()


def variants(case: Case) -> list[tuple[str, bool, bool]]:
    """Names of recorded logits, with fix_logistic and whether there were labels."""
    found = [re.fullmatch(r"logits_fix(\d)_class(\d)", name) for name in case.stated]
    return [(m[0], m[1] == "1", m[2] == "1") for m in found if m]


@for_cases("unet")
def test_logits(case):
    assert variants(case)
    for name, fix_logistic, has_labels in variants(case):
        network = network_of(case, fix_logistic, "reference")
        labels = case["class_cond"] if has_labels else None
        with torch.no_grad():
            ours = network(case["x"], case["sigma"], labels)
        case.check(name, ours)


@for_cases("unet")
def test_parts_of_the_network(case):
    """Centred ids, time embedding without a class, and the head alone."""
    network = network_of(case, False, "reference")
    with torch.no_grad():
        centred = network.centred(case["x"])
        embedding = network.embedded(case["sigma"])
    case.check("centered", centred, default={"atol": 1e-6})
    case.check("time_embedding", embedding)
    limits = {"atol": 1e-3, "rtol": 1e-3}
    parts = case["logistic_in"].chunk(2, dim=1)  # location and log-scale
    hidden = torch.stack([x.flatten(1) for x in parts], dim=-1)
    for fix in (False, True):
        network.logistic.keywords["fix_logistic"] = fix
        case.check(f"logistic_out_fix{int(fix)}", network.head(hidden), default=limits)


@for_cases("unet")
def test_no_label_is_no_class(case):
    """Unless published behaviour is asked for."""
    network = network_of(case, False, "paper")
    none = torch.full_like(case["class_cond"], case.config.num_classes)
    with torch.no_grad():
        told, untold = (network(case["x"], case["sigma"], x) for x in (none, None))
    assert torch.equal(told, untold)
    assert not torch.equal(untold, case["logits_fix0_class0"])


# ---------------------------------------------------------------- the logistic head


def head(net_out, centred, vocab_size: int, fix: int, dtype=None):
    """Logits from the output of the last convolution, (B, 6, H, W) -> (B, L, K)."""
    dtype = dtype or net_out.dtype
    shift, log_scale = net_out.to(dtype).chunk(2, dim=1)
    mu = torch.tanh(centred.to(dtype) + shift)
    hidden = torch.stack([mu.flatten(1), log_scale.flatten(1)], dim=-1)
    return logistic_logits(hidden, vocab_size=vocab_size, fix_logistic=bool(fix))


def blocks(case: Case) -> list[tuple[str, int]]:
    return [(x["prefix"], x["vocab_size"]) for x in case.values["blocks"]]


@for_cases("image", holding="blocks")
def test_logistic_head(case):
    """Both settings in float32 and float64, over ordinary and extreme values."""
    for prefix, vocab_size in blocks(case):
        for fix in (0, 1):
            for suffix, dtype in (("f32", torch.float32), ("f64", torch.float64)):
                name = f"{prefix}/logits_fix{fix}_{suffix}"
                if name in case:
                    ours = head(
                        case[f"{prefix}/net_out"],
                        case[f"{prefix}/centered"],
                        vocab_size,
                        fix,
                        dtype,
                    )
                    case.check(name, ours)


@for_cases("image", holding="blocks")
def test_gradient_of_the_logistic_head(case):
    tested = 0
    for prefix, vocab_size in blocks(case):
        for fix in (0, 1):
            name = f"{prefix}/grad_net_out_fix{fix}_f64"
            if name in case:
                net_out = case[f"{prefix}/net_out"].double().requires_grad_()
                centred = case[f"{prefix}/centered"].double()
                log_p = head(net_out, centred, vocab_size, fix).log_softmax(dim=-1)
                (log_p * case[f"{prefix}/grad_probe"]).sum().backward()
                case.check(name, net_out.grad)
                tested += 1
    assert tested


@for_cases("image", holding="blocks")
def test_logistic_head_beside_the_exact_masses(case):
    """The recorded distances of the published formula from the exact bin masses."""
    for block in case.values["blocks"]:
        prefix = block["prefix"]
        exact = case[f"{prefix}/log_mass_exact_f64"].softmax(dim=-1)
        for fix in (0, 1):
            net_out, centred = case[f"{prefix}/net_out"], case[f"{prefix}/centered"]
            size = block["vocab_size"]
            ours = head(net_out, centred, size, fix, torch.float64).softmax(dim=-1)
            distance = 0.5 * (ours - exact).abs().sum(dim=-1).max()
            recorded = block[f"max_total_variation_to_exact_fix{fix}"]
            assert float(distance) == pytest.approx(recorded, rel=1e-4, abs=1e-9)


# ---------------------------------------------------------------- labels


@for_cases("image", holding="u_label")
def test_dropped_labels(case, replay):
    """Labels that the network receives, by the recorded draws."""
    names = [name for name in case.stated if name.startswith("y_dropped_")]
    assert names
    for name in names:
        model = tiny_unet(case, training__class_dropout_p=float(name[10:])).train()
        replay.uniforms = [case["u_label"]]
        case.check(name, model.with_dropout(case["y"], 0))


def tiny_unet(case: Case, **settings):
    """A small U-Net of the case's algorithm and classes."""
    config = composed(f"algo={case.config.algo}", "algo.backbone=unet", "model=unet")
    sizes = {"ch": 4, "num_scales": 1, "ch_mult": [1], "num_res_blocks": 1}
    sizes |= {"size": 4, "length": 12, "scale_count_to_put_attn": -1}
    OmegaConf.update(config, "model", sizes)
    config.data.num_classes = case.values["num_classes"]
    config.sampling.steps = case.setting("sampling.steps")
    for key, value in settings.items():
        OmegaConf.update(config, key.replace("__", "."), value)
    return algorithm_class(config)(config, StubTokenizer(8, None)).eval()


@for_cases("image", holding="rows")
def test_labels_of_every_network_call(case, monkeypatch):
    """With `algo.compat=reference` as published; where that fails, as it would be
    without the slip. Guided calls are one batch of ours."""
    for row in case.values["rows"]:
        model = tiny_unet(
            case,
            algo__compat="reference",
            sampling__predictor=row["predictor"],
            sampling__noise_removal=row["noise_removal"],
            sampling__guid_weight=row["guid_weight"],
        )
        told: list = []
        trunk = model.backbone.trunk

        def noted(x, sigma, labels=None, told=told, trunk=trunk):
            told.append(None if labels is None else labels.tolist())
            return trunk(x, sigma, labels=labels)

        monkeypatch.setattr(model.backbone, "trunk", noted)
        labels = None if row["labels"] is None else torch.tensor(row["labels"])
        expected = row.get(
            "network_labels", row.get("network_labels_with_self_repaired")
        )
        if expected is None:
            with pytest.raises(ValueError, match="guid_weight needs labels"):
                model.generate_samples(2, labels=labels)
            continue
        model.generate_samples(2, labels=labels)
        assert flat(told) == flat(expected), row


def flat(calls: list) -> list:
    """Labels one after the other; of a call without labels, None."""
    found: list = []
    for call in calls:
        found += [None] if call is None else call
    return found


# ---------------------------------------------------------------- guidance


@for_cases("guidance")
def test_guided_posterior(case):
    """For every weight and nucleus; the posteriors at the recorded positions."""
    found = [re.fullmatch(r"w(.+)_p(.+)/posterior", name) for name in case.stated]
    names = [match for match in found if match]
    assert names
    xt, labels = case["xt"], case["labels"]
    for match in names:
        weight = None if match[1] == "None" else float(match[1])
        model = build(
            case, sampling__guid_weight=weight, sampling__p_nucleus=float(match[2])
        )
        sampler = model.sampler
        conditions = sampler.conditions(model, labels)
        columns = torch.arange(0, xt.shape[1])[::5]
        golden = case[match[0]]
        assert golden.shape[1] == len(columns)
        with torch.no_grad():
            logits = [
                model.logits_for_loss(model.hidden(xt, case["sigma"], x)[:, columns])
                for x in conditions
            ]
        at = xt[:, columns]
        levels = [
            case[name].double().expand(at.shape) for name in ("alpha_t", "alpha_s")
        ]
        rows = torch.zeros_like(at)
        tokens = Tokens(
            rows, rows, logits[0], at, levels[0], case["sigma"], *logits[1:]
        )
        x_thetas = sampler.x_thetas(model, tokens)
        posteriors = [
            model.posterior(x, xt=at, alpha_t=levels[0], alpha_s=levels[1])
            for x in x_thetas
        ]
        where = model.undecided(at)
        ours = sampler.guided(posteriors)
        limits = case.tolerance(match[0])
        close(ours[where], golden[where], f"{case}: {match[0]}", **limits)
        parts = ("p_x0",) if len(x_thetas) == 1 else ("p_x0_cond", "p_x0_uncond")
        for name, x in zip(parts, x_thetas, strict=True):
            name = match[0].replace("posterior", name)
            close(x[where], case[name][where], f"{case}: {name}", **limits)


# ---------------------------------------------------------------- loss


@for_cases("loss", holding="eval_u_label")
def test_loss_of_images(case, replay):
    """Loss of every token, with labels dropped by the recorded draws; in validation,
    too, as published."""
    for prefix in ("train_", "eval_"):
        names = ("u_time", "u_move", "u_label")
        sizes = {
            "loader__global_batch_size": len(case["x0"]),
            "loader__batch_size": len(case["x0"]),
        }
        model = build(case, algo__compat="reference", **sizes).train(prefix == "train_")
        replay.uniforms = [case[f"{prefix}{name}"] for name in names]
        if f"{prefix}random_tokens" in case:
            replay.integers = [case[f"{prefix}random_tokens"]]
        with torch.no_grad():
            ours = model.nll(case["x0"], labels=case["labels"]).nll
        replay.assert_all_used()
        factor = derivative_factor(model.config)
        case.check(f"{prefix}loss_per_token", ours, factor=factor)


@for_cases("loss", holding="eval_u_label")
def test_labels_are_kept_in_validation(case, replay):
    """By ours, which is not as published."""
    config = configured(case)
    model = build(case)
    assert config.algo.compat == "paper"
    labels = case["labels"]
    assert torch.equal(model.with_dropout(labels, 0), labels)
