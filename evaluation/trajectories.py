"""`sampling.save_trajectory`: the page of a run's samples, and what it says of them."""

from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any

from omegaconf import DictConfig

from cli.modality import is_image
from data.pixels import side_of
from report.frontier import STEPLESS
from report.trajectory import MOST_TOKENS, Shown, pieces_of, write_page
from sampling.trajectory import Trajectory
from trainer_base import TrainerBase
from utils import ConfigError

# Keys of `sampling` that a page names where they are not as usual.
USUAL = {
    "temperature": 1,
    "p_nucleus": 1,
    "noise_removal": "ancestral",
    "corrector": None,
    "guid_weight": None,
    "semi_ar": False,
    "refine_steps": 0,
}


def check_size(num_samples: int, length: int, key: str) -> None:
    """Refuses more samples than a page has room for.

    Args:
        num_samples: To be recorded.
        length: Tokens of one.
        key: That sets their number, for the message.

    Raises:
        ConfigError: If a browser would have too much to show.
    """
    if num_samples * length > MOST_TOKENS:
        raise ConfigError(
            f"sampling.save_trajectory: {num_samples} samples of {length} tokens are "
            f"too many for a page, which holds {MOST_TOKENS} tokens, "
            f"{max(1, MOST_TOKENS // length)} samples of this length: lower {key}."
        )


def save_trajectories(
    path: str,
    model: TrainerBase,
    config: DictConfig,
    checkpoint: str,
    samples: Sequence[Trajectory],
) -> None:
    """Writes the page of some samples.

    Args:
        path: Of the page.
        model: That drew them.
        config: With the `sampling` of which they are.
        checkpoint: Path of the model's weights.
        samples: Of one run.
    """
    ids = set().union(*(sample.ids() for sample in samples))
    mask = model.mask_index
    mask = None if mask is None else int(mask)
    shown = Shown(
        title=_title(model, config),
        about=_about(config, checkpoint),
        pieces={},
        names=[],
        mask=mask,
        side=side_of(len(samples[0].first)) if is_image(config) else None,
        samples=list(samples),
    )
    if shown.side is None:
        tokenizer = model.tokenizer
        pieces = pieces_of(tokenizer, ids - {mask})
        if mask is not None:
            pieces[mask] = "[MASK]"
        special = {*tokenizer.all_special_ids, mask}
        shown = shown._replace(pieces=pieces, names=sorted(special & pieces.keys()))
    write_page(path, [shown])


def _title(model: TrainerBase, config: DictConfig) -> str:
    sampling = config.sampling
    if model.is_autoregressive:
        return f"{config.algo.name}, left to right"
    kind = str(sampling.predictor)
    kind += f" + {sampling.corrector}" if sampling.corrector else ""
    steps = "" if kind in STEPLESS or model.is_one_step else f", {sampling.steps} steps"
    return f"{config.algo.name}, {kind}{steps}"


def _about(config: DictConfig, checkpoint: str) -> dict[str, str]:
    sampling = config.sampling
    about: dict[str, Any] = {
        "checkpoint": PurePosixPath(checkpoint).name,
        "predictor": sampling.predictor,
        "seed": config.seed,
    }
    about |= {k: sampling[k] for k, usual in USUAL.items() if sampling[k] != usual}
    return {name: str(value) for name, value in about.items()}
