"""A picture of images in rows, one for each class."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from utils import printable, whole_file

ACROSS = 10  # images of a row
MOST_ROWS = 50
GAP = 2  # pixels between images
SMALLEST = 64  # pixels of a side, to which smaller images are enlarged
LINE = 14  # pixels of a line of text


def write_grid(
    path: str,
    images: np.ndarray,
    labels: np.ndarray | None = None,
    names: Sequence[str] = (),
) -> None:
    """Writes a PNG of the first images of each class, or of all.

    Args:
        path: Local or fsspec path of the PNG.
        images: (N, H, W, 3) uint8.
        labels: Class of each image, (N,); None: rows are filled as they come.
        names: Of the classes, where they have names.
    """
    from PIL import Image, ImageDraw

    rows = rows_of(len(images), labels)
    height, width = images.shape[1:3]
    times = max(1, -(-SMALLEST // max(height, width)))  # whole, so that pixels stay
    high, wide = height * times, width * times
    heading = LINE if labels is not None else 0
    across = max((len(indices) for _, indices in rows), default=1)
    size = (
        GAP + across * (wide + GAP),
        GAP + len(rows) * (heading + high + GAP),
    )
    picture: Any = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(picture)
    for number, (label, indices) in enumerate(rows):
        top = GAP + number * (heading + high + GAP)
        if label is not None:
            draw.text((GAP, top), _name(label, names), fill="black")
        for place, index in enumerate(indices):
            corner = (GAP + place * (wide + GAP), top + heading)
            picture.paste(Image.fromarray(_enlarged(images[index], times)), corner)
    with whole_file(path) as file:
        picture.save(file, format="png")


def rows_of(
    count: int, labels: np.ndarray | None
) -> list[tuple[int | None, Sequence[int]]]:
    """Label and images of each row: the first of a class, or all in order."""
    if labels is None:
        starts = range(0, min(count, ACROSS * MOST_ROWS), ACROSS)
        return [(None, range(x, min(x + ACROSS, count))) for x in starts]
    classes = np.unique(labels)[:MOST_ROWS].tolist()
    return [(x, np.flatnonzero(labels == x)[:ACROSS].tolist()) for x in classes]


def _enlarged(image: np.ndarray, times: int) -> np.ndarray:
    return image.repeat(times, axis=0).repeat(times, axis=1)


def _name(label: int, names: Sequence[str]) -> str:
    """What is written over a row, in letters that the picture's font has."""
    name = names[label] if label < len(names) else str(label)
    return printable(name).encode("ascii", "replace").decode()
