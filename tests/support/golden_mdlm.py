"""Golden cases of the code of MDLM: recorded logits, draws and settings."""

from typing import Any, NamedTuple

import pytest
import torch
from golden_cases import Case
from golden_models import StubTokenizer, composed
from omegaconf import OmegaConf
from torch import Tensor

from algo import MDLM
from diffusion.base import Latent
from models.head import Head

# Its names of schedules that have another one here.
NOISES = {"loglinear": "log-linear", "cosine": "cosine-mdlm"}
# Ways to draw times, and the key of each.
VARIANTS = {
    "plain": None,
    "importance": "training.importance_sampling",
    "change": "training.change_of_variables",
}
GIVEN_TYPES = {"f32": "float32", "f64": "float64"}  # training.loss_precision


def our_schedule(name: str) -> str:
    return NOISES.get(name, name)


def names_of() -> tuple[str, ...]:
    return ("loglinear", "cosine", "cosinesqr", "linear", "geometric")


def takes(case: Case, index: int, mode: str) -> dict[str, Any]:
    """Settings, dotted keys, of a case of schedules: one of its settings, one mode."""
    names, values = case.values["setting_names"], case.values["settings"][index]
    own = {f"noise.{name}": x for name, x in zip(names, values, strict=True)}
    own |= {
        "noise.type": our_schedule(case.config.noise.type),
        "algo.T": case.config.T,
        "algo.time_conditioning": case.config.time_conditioning,
    }
    own |= {f"training.{key}": x for key, x in case.config.training.items()}
    if key := VARIANTS[mode]:
        own[key] = True
    return own


def build(case: Case, precision: str, **settings: Any) -> MDLM:
    """A model of the case's vocabulary, in evaluation mode; its network is not used.

    Args:
        case: Gives sizes.
        precision: f32 or f64, of the logits.
        settings: Dotted keys.
    """
    name = settings["noise.type"]
    config = composed("algo=mdlm", "model=tiny", f"noise={name}")
    length = case["x0"].shape[1]
    sizes = {"hidden_size": 8, "n_blocks": 1, "n_heads": 1, "cond_dim": 8}
    own = {f"model.{key}": x for key, x in (sizes | {"length": length}).items()}
    own |= settings | {"training.loss_precision": GIVEN_TYPES[precision]}
    for key, value in own.items():
        OmegaConf.update(config, key, value)
    K, mask = case.values["vocab_size"], case.values["mask_index"]
    model = MDLM(config, StubTokenizer(K, mask))
    assert (model.vocab_size, model.mask_index) == (K, mask)
    return model.eval()


class Ran(NamedTuple):
    """One loss with recorded draws and logits."""

    z: Latent
    told: Tensor  # what the network is told of the noise, (B,)
    nll: Tensor  # of each token that counts, (B, L)
    loss: float  # their mean, in their own precision


def ran(
    model: MDLM,
    case: Case,
    u_time: Tensor,
    u_move: Tensor,
    replay: Any,
    monkeypatch: Any,
) -> Ran:
    """The loss of the case's clean ids, with logits in place of the network's."""
    replay.uniforms = [u_time, u_move]
    seen: dict[str, Any] = {}
    corrupt = model.corrupt
    logits, eye = case["logits"], torch.eye(model.vocab_size)

    def watched(*args: Any, **given: Any) -> Latent:
        seen["z"] = corrupt(*args, **given)
        return seen["z"]

    def hidden(xt: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
        seen["told"] = model.condition(sigma)
        return logits

    monkeypatch.setattr(model, "corrupt", watched)
    monkeypatch.setattr(model, "hidden", hidden)
    monkeypatch.setattr(model, "_head", lambda hidden: Head(hidden, eye, None))
    nll = model.nll(case["x0"]).nll
    replay.uniforms = [u_time, u_move]
    mask = case["attention_mask"]
    loss = model.loss({"input_ids": case["x0"], "attention_mask": mask}).loss
    mean = float((nll * mask).sum() / mask.sum())
    assert float(loss) == pytest.approx(mean, rel=1e-5)  # that is float32
    return Ran(seen["z"], seen["told"], nll * mask, mean)
