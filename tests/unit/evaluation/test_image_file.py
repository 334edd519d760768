"""The npz of `mode=fid_eval` and the batches behind it; the cached moments of the real
images."""

import os
import stat

import fsspec
import numpy as np
import pytest
import torch
from refusals import refused

from evaluation.image_file import ImageFile, RealSums, write_arrays
from metrics.fid import FeatureSums
from utils import RunStopped, path_exists

SETTINGS = {"seed": 1, "sampling": {"steps": 8}}


def batch(first: int, size: int = 2) -> dict[str, np.ndarray]:
    """Images whose bytes are their numbers."""
    numbers = np.arange(first, first + size)
    shape = (size, 4, 4, 3)
    return {
        "images": np.broadcast_to(numbers[:, None, None, None], shape).astype(np.uint8),
        "features": numbers[:, None] + np.arange(3, dtype=np.float32),
        "labels": numbers % 2,
        "seconds": np.array(0.5),
    }


@pytest.fixture(params=["local", "memory"])
def path(request, tmp_path) -> str:
    """Of an npz that does not exist, on a local disk and behind fsspec."""
    if request.param == "local":
        return str(tmp_path / "new folder" / "images.npz")
    fsspec.filesystem("memory").store.clear()
    return f"memory://{tmp_path.name}/images.npz"


def image_file(path: str, **settings) -> ImageFile:
    return ImageFile(path, SETTINGS | settings, 3)


def test_a_run_from_its_beginning_to_its_end(path):
    """Every finished batch is on disk at once, and is what it was."""
    file = image_file(path)
    assert file.check() == 0
    file.begin()
    for index, first in ((2, 4), (0, 0), (1, 2)):
        file.add(index, batch(first))
        assert index in image_file(path).done()
    file.check_all()
    for index, found in enumerate(file.batches()):
        expected = batch(2 * index)
        assert found.keys() == expected.keys()
        for name, x in expected.items():
            assert found[name].dtype == x.dtype
            np.testing.assert_array_equal(found[name], x)
    file.close()
    assert not path_exists(file.parts)


def test_equal_arrays_make_equal_files(tmp_path):
    """Whatever their order and the time of the day."""
    paths = [str(tmp_path / name) for name in "ab"]
    write_arrays(paths[0], batch(0))
    write_arrays(paths[1], dict(reversed(batch(0).items())))
    assert fsspec.filesystem("file").cat(paths[0]) == (tmp_path / "b").read_bytes()


def test_a_run_that_was_killed_is_gone_on_with(path):
    killed = image_file(path)
    killed.begin()
    killed.add(1, batch(2))
    again = image_file(path)
    assert again.check() == 1
    with pytest.raises(RunStopped, match="2 batches of"):
        again.check_all()


def test_an_interruption_before_the_first_batch_leaves_nothing(path):
    file = image_file(path)
    file.begin()
    file.interrupt()
    assert not path_exists(file.parts)


def damages(raw: bytes) -> dict[str, bytes]:
    """What may become of a part on a disk."""
    middle = len(raw) // 2
    return {
        "empty": b"",
        "cut off": raw[:100],
        "half": raw[:middle],
        "one bit": raw[:middle] + bytes([raw[middle] ^ 1]) + raw[middle + 1 :],
        "zeros": bytes(len(raw)),
        "text": b"{}",
        "no end": raw[:-30],
    }


DAMAGES = sorted(damages(b"0" * 500))


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_part_is_named_and_drawn_again(path, name, caplog):
    first = image_file(path)
    first.begin()
    first.add(0, batch(0))
    first.add(1, batch(2))
    filesystem, inner = fsspec.core.url_to_fs(first._part(1))
    filesystem.pipe(inner, damages(filesystem.cat(inner))[name])
    again = image_file(path)
    assert again.check() == 1
    (line,) = [record.getMessage() for record in caplog.records]
    assert f"{path}.parts/batch_000001.npz" in line
    with pytest.raises(RunStopped, match="damaged"):
        again.batch(1)
    again.add(1, batch(2))
    assert image_file(path).done() == {0, 1}


def test_a_part_of_other_settings_is_not_taken(path):
    """Nor one under another number."""
    file, other = image_file(path), image_file(path, seed=2)
    file.begin()
    other.add(0, batch(0))
    file.add(1, batch(2))
    filesystem, inner = fsspec.core.url_to_fs(file._part(1))
    filesystem.copy(inner, inner.replace("000001", "000002"))
    assert image_file(path).done() == {1}


def test_refusals(path):
    """What is there is never overwritten, nor mixed with other settings."""
    where = f"eval.generated_samples_path={path!r}"
    file = image_file(path)
    file.begin()
    file.add(0, batch(0))
    other = image_file(path, sampling={"steps": 16})
    refused(other.check, where, "another sampling.steps (8 there, 16 now)", file.parts)
    write_arrays(path, batch(0))
    assert image_file(path).check() == 1  # killed after the npz, before the end
    file.close()
    refused(image_file(path).check, where, "not overwritten")


# ---------------------------------------------------------------- real images

KEY = {"extractor": "ab" * 32, "rows": "rows:1"}
SUMS = FeatureSums.of(torch.arange(12.0).view(4, 3))


def test_sums_come_back_as_they_were(path):
    """For the same extractor and rows alone."""
    folder = path.rsplit("/", 1)[0]
    cache = RealSums(folder, KEY)
    assert cache.read() is None
    cache.write(SUMS)
    found = RealSums(folder, dict(reversed(KEY.items()))).read()
    assert found.count == 4
    assert torch.equal(found.total, SUMS.total)
    assert torch.equal(found.products, SUMS.products)
    for name in KEY:
        assert RealSums(folder, KEY | {name: "other"}).read() is None


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_sums_are_made_anew(tmp_path, name, caplog):
    cache = RealSums(str(tmp_path), KEY)
    cache.write(SUMS)
    with open(cache.path, "rb") as file:
        damaged = damages(file.read())[name]
    with open(cache.path, "wb") as file:
        file.write(damaged)
    assert RealSums(str(tmp_path), KEY).read() is None
    assert cache.path in caplog.text
    cache.write(SUMS)
    assert cache.read().count == 4


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_cache_that_is_read_only_is_no_reason_to_stop(tmp_path, caplog):
    tmp_path.chmod(stat.S_IREAD | stat.S_IEXEC)
    RealSums(str(tmp_path), KEY).write(SUMS)
    assert "going on without" in caplog.text


def test_a_cache_that_is_a_file_is_no_reason_to_stop(tmp_path, caplog):
    (tmp_path / "fid").write_text("in the way")
    RealSums(str(tmp_path), KEY).write(SUMS)
    assert "going on without" in caplog.text
