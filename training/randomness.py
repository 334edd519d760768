"""Global random states."""

import random

import numpy as np
import torch


def seed_all(seed: int) -> None:
    """Sets the global random states of torch (every device), numpy and Python."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)
