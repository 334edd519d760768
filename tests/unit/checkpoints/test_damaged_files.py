"""Damaged checkpoints are read as they were or refused in one line, never in part."""

import hashlib
import os
import random
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from short_run import SHORT_RUN, train_in
from tiny import compose

from checkpoints.reading import read_checkpoint
from training.resume import KEY, find_checkpoint
from utils import ConfigError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> Path:
    """Folder of a run of two updates: 0-1.ckpt and last.ckpt are a real run's."""
    folder = tmp_path_factory.mktemp("run")
    train_in(folder)
    found = folder / "checkpoints"
    for name in ("1-2.ckpt", "0-2.ckpt", "best.ckpt"):
        (found / name).unlink(missing_ok=True)
    return found


def equal(one, two) -> bool:
    if type(one) is not type(two):
        return False
    if isinstance(one, torch.Tensor):
        return one.dtype == two.dtype and torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(equal(one[k], two[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(two) and all(map(equal, one, two))
    return one == two


def spans(path: Path) -> dict[str, range]:
    """Which bytes of a checkpoint are what."""
    size = path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        infos = archive.infolist()
        start = archive.start_dir
    sizes = {info.filename.split("/", 1)[1]: info for info in infos}
    weights = max(
        (x for x in infos if "/data/" in x.filename), key=lambda x: x.file_size
    )
    headers = sizes["data.pkl"].header_offset
    next_header = min(x.header_offset for x in infos if x.header_offset > headers)
    data = weights.header_offset
    return {
        "pickle": range(headers + 64, next_header),
        "tensor": range(data + 64, data + 64 + weights.file_size),
        "header": range(data, data + 64),
        "directory": range(start, size - 22),
        "end": range(size - 22, size),
        "anywhere": range(size),
    }


def damaged(original: bytes, where: dict[str, range], number: int) -> bytes:
    """Truncated, or with one to three bits flipped; always the same for a number."""
    draw = random.Random(number)
    kinds = ["truncated", *where]
    kind = kinds[number % len(kinds)]
    if kind == "truncated":
        return original[: draw.randrange(len(original))]
    content = bytearray(original)
    for _ in range(draw.randint(1, 3)):
        content[draw.choice(where[kind])] ^= 1 << draw.randrange(8)
    return bytes(content)


def test_the_spans_are_what_they_say(checkpoints):
    where = spans(checkpoints / "last.ckpt")
    raw = (checkpoints / "last.ckpt").read_bytes()
    assert raw[where["header"].start :][:4] == b"PK\x03\x04"
    assert raw[where["directory"].start :][:4] == b"PK\x01\x02"
    assert raw[where["end"].start :][:4] == b"PK\x05\x06"
    assert b"state_dict" in raw[where["pickle"].start : where["pickle"].stop]


def test_two_hundred_damaged_files(checkpoints, tmp_path):
    """Bits of the archive that mean nothing may differ; content never does."""
    original = (checkpoints / "last.ckpt").read_bytes()
    where = spans(checkpoints / "last.ckpt")
    good = read_checkpoint(str(checkpoints / "last.ckpt"), KEY).lightning
    path = tmp_path / "last.ckpt"
    num_refused = 0
    for number in range(200):
        content = damaged(original, where, number)
        path.write_bytes(content)
        try:
            found = read_checkpoint(str(path), KEY)
        except ConfigError as error:
            check_line(str(error), path)
            num_refused += 1
        else:
            assert equal(found.lightning, good), number
        assert path.read_bytes() == content
    assert 130 < num_refused < 200


def check_line(text: str, path: Path) -> None:
    assert "\n" not in text
    assert "Traceback" not in text
    assert str(path) in text


@pytest.mark.parametrize("number", range(0, 200, 20))
def test_the_previous_one_is_used(checkpoints, tmp_path, number, caplog):
    """And nothing on the disk is changed."""
    run = tmp_path / "checkpoints"
    shutil.copytree(checkpoints, run)
    content = damaged(
        (run / "last.ckpt").read_bytes(), spans(run / "last.ckpt"), number
    )
    (run / "last.ckpt").write_bytes(content)
    os.utime(run / "0-1.ckpt", (0, 0))
    before = digest(run)
    config = compose(*SHORT_RUN, f"checkpointing.save_dir={tmp_path}")
    try:
        read_checkpoint(str(run / "last.ckpt"), KEY)
    except ConfigError:
        expected = "0-1.ckpt"
        shown = [f"{run}/last.ckpt", f"going on from {run}/0-1.ckpt (step 1) instead"]
    else:
        expected, shown = "last.ckpt", []
    found = find_checkpoint(config)
    assert found.path == f"{run}/{expected}"
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == len(shown)
    for line, part in zip(lines, shown, strict=True):
        assert part in line
        assert "\n" not in line
    assert digest(run) == before


def digest(folder: Path) -> dict[str, str]:
    return {
        x.name: hashlib.sha256(x.read_bytes()).hexdigest() for x in folder.iterdir()
    }


def test_none_is_left(checkpoints, tmp_path):
    run = tmp_path / "checkpoints"
    shutil.copytree(checkpoints, run)
    for path in run.iterdir():
        path.write_bytes(path.read_bytes()[:-1])
    config = compose(*SHORT_RUN, f"checkpointing.save_dir={tmp_path}")
    with pytest.raises(ConfigError) as error:
        find_checkpoint(config)
    check_line(str(error.value), run / "last.ckpt")
    assert "Of 1 files beside it none can be" in str(error.value)


@pytest.mark.parametrize(
    "content", [b"", b"P", b"PK\x03\x04", b"\x80\x02.", b"\0" * 99]
)
def test_what_is_no_file_at_all(tmp_path, content):
    path = tmp_path / "a.ckpt"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as error:
        read_checkpoint(str(path), KEY)
    check_line(str(error.value), path)


def test_a_folder_in_the_place_of_a_file(tmp_path):
    with pytest.raises(ConfigError) as error:
        read_checkpoint(str(tmp_path), KEY)
    check_line(str(error.value), tmp_path)


# ---------------------------------------------------------------- the older format


@pytest.fixture
def old_format(checkpoints, tmp_path) -> Path:
    content = torch.load(checkpoints / "last.ckpt", weights_only=True)
    path = tmp_path / "old.ckpt"
    torch.save(content, path, _use_new_zipfile_serialization=False)
    assert not zipfile.is_zipfile(path)
    return path


def test_the_format_before_torch_1_6(checkpoints, old_format):
    good = read_checkpoint(str(checkpoints / "last.ckpt"), KEY).lightning
    assert equal(read_checkpoint(str(old_format), KEY).lightning, good)


def test_truncated_files_of_the_older_format(old_format):
    """It has no checksums: only a missing end can be seen."""
    content, draw = old_format.read_bytes(), random.Random(0)
    for _ in range(40):
        old_format.write_bytes(content[: draw.randrange(len(content))])
        with pytest.raises(ConfigError) as error:
            read_checkpoint(str(old_format), KEY)
        check_line(str(error.value), old_format)
