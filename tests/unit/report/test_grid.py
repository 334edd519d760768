"""The picture of generated images."""

import numpy as np
import pytest
from PIL import Image

from report.grid import ACROSS, GAP, LINE, rows_of, write_grid


def images(count: int, side: int = 32) -> np.ndarray:
    """Each of one colour, its number."""
    numbers = np.arange(count, dtype=np.uint8)[:, None, None, None]
    return np.broadcast_to(numbers, (count, side, side, 3)).copy()


def read(path: str) -> np.ndarray:
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        return np.asarray(picture)


def test_a_row_for_each_class(tmp_path):
    """The first ten of each class, in order, enlarged by a whole number."""
    labels = np.array([2, 0, 2, 0] * 8)
    path = str(tmp_path / "grid.png")
    write_grid(path, images(32), labels, ["cat", "dog", "\x1b[31m na\u00efve"])
    found = read(path)
    side, step = 64, LINE + 64 + GAP
    assert found.shape == (GAP + 2 * step, GAP + ACROSS * (side + GAP), 3)
    for row, label in enumerate((0, 2)):
        for place, index in enumerate(np.flatnonzero(labels == label)[:ACROSS]):
            top, left = GAP + row * step + LINE, GAP + place * (side + GAP)
            cell = found[top : top + side, left : left + side]
            assert (cell == index).all()
        heading = found[GAP + row * step : GAP + row * step + LINE]
        assert (heading < 128).any()


@pytest.mark.parametrize("count", [1, 9, 10, 11, 25])
def test_rows_without_classes(tmp_path, count):
    path = str(tmp_path / "grid.png")
    write_grid(path, images(count, side=100))
    rows = -(-count // ACROSS)
    assert read(path).shape[0] == GAP + rows * (100 + GAP)
    places = [index for _, indices in rows_of(count, None) for index in indices]
    assert places == list(range(count))


def test_not_all_of_many(tmp_path):
    assert len(rows_of(50_000, None)) == 50
    assert len(rows_of(3000, np.arange(3000) % 1000)) == 50
