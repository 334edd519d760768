"""Tiny checkpoints and what `mode=export` makes of them, in this process."""

from pathlib import Path

import torch
from tiny import compose

import main
from cli.settle import algorithm_class
from data.tokenizers import get_tokenizer
from trainer_base import TrainerBase


def save_tiny(path: Path, *overrides: str, config_of: str = "") -> TrainerBase:
    """Writes a checkpoint whose raw weights are not its EMA weights.

    Args:
        path: Of the checkpoint.
        overrides: As on the command line, `algo=...` among them.
        config_of: Key that the checkpoint shall not state, with what is below it.

    Returns:
        The model with the EMA weights, in evaluation mode.
    """
    config = compose(*overrides)
    torch.manual_seed(0)
    model = algorithm_class(config)(config, get_tokenizer(config))
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.5)
    model.ema = model.make_ema()
    saved = {"state_dict": {k: x * 2 for k, x in model.state_dict().items()}}
    model.on_save_checkpoint(saved)
    node = saved["hyper_parameters"]["config"]
    if config_of:
        del node[config_of]
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(saved | {"global_step": 7}, path)
    return model.eval()


def export(source: Path | str, folder: Path | str, *overrides: str) -> dict[str, str]:
    """`mode=export` as main.py does it once Hydra has composed the config."""
    paths = (f"eval.checkpoint_path={source}", f"export.path={folder}")
    config = compose("mode=export", *paths, *overrides, tiny=False)
    return main.run.__wrapped__(config)


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
