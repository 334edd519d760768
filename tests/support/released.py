"""Hugging Face folders in the layout of released models, at small size."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from models.dit import DIT

SIZES = {"hidden_dim": 32, "cond_dim": 12, "n_blocks": 2, "n_heads": 2, "dropout": 0.0}
# What the modelling files of a folder do if anything runs them.
HOSTILE = """
from pathlib import Path
Path({marker!r}).touch()
import flash_attn
"""
# Fields of s-sahoo/duo and of kuleshov-group/mdlm-owt beside the sizes.
FIELDS = {
    "DUO": {
        "architectures": ["DUO"],
        "auto_map": {
            "AutoConfig": "config.DUOConfig",
            "AutoModelForMaskedLM": "model.DUO",
        },
        "causal": False,
        "model_type": "DUO",
        "torch_dtype": "float32",
        "transformers_version": "4.38.2",
        "var_min": False,
    },
    "mdlm": {
        "architectures": ["MDLM"],
        "auto_map": {
            "AutoConfig": "config.MDLMConfig",
            "AutoModelForMaskedLM": "model.MDLM",
        },
        "model_type": "mdlm",
        "return_dict": False,
        "time_conditioning": False,
        "torch_dtype": "float32",
        "transformers_version": "4.38.2",
    },
}


def random_weights(
    vocab_size: int, causal: bool = False, **sizes: int
) -> dict[str, Tensor]:
    """Of a network whose outputs depend on its inputs, under `backbone.`."""
    given = {**SIZES, **sizes}
    given["hidden_size"] = given.pop("hidden_dim")
    torch.manual_seed(0)
    network = DIT(vocab_size=vocab_size, causal=causal, **given)
    with torch.no_grad():
        for parameter in network.parameters():
            if not parameter.any():
                parameter.normal_(std=0.5)
    return {f"backbone.{name}": x for name, x in network.state_dict().items()}


def write_released(
    folder: Path, kind: str, vocab_size: int, length: int, **fields
) -> dict[str, Tensor]:
    """Writes a folder; its weights are returned, its code touches folder/RAN."""
    folder.mkdir(parents=True)
    config = {**FIELDS[kind], **SIZES, "vocab_size": vocab_size}
    config |= {"model_length": length} | fields
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("config.py", "model.py"):
        (folder / name).write_text(HOSTILE.format(marker=str(folder / "RAN")))
    weights = random_weights(vocab_size, config.get("causal", False))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return weights
