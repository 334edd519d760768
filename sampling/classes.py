"""Classes that samples of a checkpoint are drawn from (`sampling.labels`), in turn."""

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor


def classes_of(config: DictConfig, of_data: np.ndarray | None) -> np.ndarray | None:
    """The classes that samples are drawn from, in order; None: from none.

    Args:
        config: The run's config.
        of_data: Those of the training images, (N,), which `sampling.labels=data` takes,
            and null where they are given; without them every class takes its turn.
    """
    sampling, num_classes = config.sampling, config.data.get("num_classes")
    if num_classes is None or not sampling.guid_weight:
        return None
    if sampling.labels not in (None, "data"):
        return np.array(list(sampling.labels))
    return np.arange(num_classes) if of_data is None else of_data


def labels_at(classes: np.ndarray | None, first: int, count: int) -> Tensor | None:
    """Those of the samples `first`, `first` + 1, ..., (count,)."""
    if classes is None:
        return None
    return torch.from_numpy(classes[np.arange(first, first + count) % len(classes)])
