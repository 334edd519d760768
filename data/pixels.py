"""Images as tokens: one for each value of each pixel, in order (channel, row, column).

Shapes: N images, H = W pixels of a side, L = 3 H W tokens.
"""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from utils import CHANNELS, ConfigError

VALUES = 256  # of a pixel's channel


class PixelTokenizer:
    """What a model asks of a tokenizer, for images: 256 ids, which are the raw bytes.

    It has no bos, eos, pad or mask. A mask that a model adds comes behind the values,
    at 256, and so is never one of them.
    """

    vocab_size = VALUES
    bos_token = eos_token = pad_token = mask_token = unk_token = None
    bos_token_id = eos_token_id = pad_token_id = mask_token_id = unk_token_id = None
    split_special_tokens = True  # there are none

    def __len__(self) -> int:
        return VALUES

    def get_vocab(self) -> dict[str, int]:
        return {str(value): value for value in range(VALUES)}

    def encode(self, image: Any) -> Tensor:
        """Ids (L,) of an image (H, W, 3) of bytes."""
        return torch.from_numpy(pixel_ids(np.asarray(image)[None])[0].astype(np.int64))

    def decode(self, ids: Any) -> Tensor:
        """An image (H, W, 3) of bytes from ids (L,)."""
        return self.batch_decode(torch.as_tensor(ids)[None])[0].permute(1, 2, 0)

    def batch_decode(self, ids: Any) -> Tensor:
        """Images (N, 3, H, W) of bytes from ids (N, L).

        Raises:
            ConfigError: If an id is no value of a pixel, as a mask that was left.
        """
        x = torch.as_tensor(ids).long()  # bytes cannot be compared with more than 255
        is_left = (x < 0) | (x >= VALUES)
        if bool(is_left.any()):
            count, images = int(is_left.sum()), int(is_left.any(dim=-1).sum())
            raise ConfigError(
                f"{count} pixels in {images} of {len(x)} images have no value (id "
                f"{int(x[is_left][0])}, not 0 to {VALUES - 1}): a mask was left in the "
                "sample; sampling.noise_removal=ancestral leaves none."
            )
        side = side_of(x.shape[-1])
        return x.to(torch.uint8).reshape(-1, CHANNELS, side, side)


def side_of(length: int) -> int:
    """H of square images of L tokens.

    Raises:
        ConfigError: If there are none.
    """
    side = math.isqrt(length // CHANNELS)
    if not length or CHANNELS * side**2 != length:
        raise ConfigError(
            f"{length} tokens are no square image: that has {CHANNELS} x side x side."
        )
    return side


def pixel_ids(images: np.ndarray) -> np.ndarray:
    """Ids (N, L) of images (N, H, W, 3), bytes both."""
    length = images.shape[1] * images.shape[2] * images.shape[3]
    return images.transpose(0, 3, 1, 2).reshape(len(images), length)


def flipped(ids: np.ndarray) -> np.ndarray:
    """Ids of the images with left and right exchanged, (N, L)."""
    side = side_of(ids.shape[1])
    images = ids.reshape(len(ids), CHANNELS, side, side)
    return images[..., ::-1].reshape(ids.shape)
