"""Classes that samples of a checkpoint are drawn from (`sampling.labels`), in turn."""

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor

from data.images import ImageRows


def classes_of(config: DictConfig, rows: ImageRows | None) -> np.ndarray | None:
    """The classes that samples are drawn from, in order; None: from none.

    Args:
        config: The run's config.
        rows: Whose classes are taken with `sampling.labels=data`, and where no list is
            given; without them every class takes its turn.
    """
    sampling, num_classes = config.sampling, config.data.get("num_classes")
    if num_classes is None or not sampling.guid_weight:
        return None
    if sampling.labels not in (None, "data"):
        return np.array(list(sampling.labels))
    return np.arange(num_classes) if rows is None else rows.labels


def labels_at(classes: np.ndarray | None, first: int, count: int) -> Tensor | None:
    """Those of the samples `first`, `first` + 1, ..., (count,)."""
    if classes is None:
        return None
    return torch.from_numpy(classes[np.arange(first, first + count) % len(classes)])
