"""Sets of images: every kind of file, labels, flips, the cache, and what is refused."""

import io
import os
import pickle

import numpy as np
import pytest
import torch
from image_files import (
    KINDS,
    NAMES,
    archive_members,
    batch_pickle,
    images_of,
    labels_of,
    png,
    write_archive,
    write_both,
    write_folder,
    write_parquet,
)
from PIL import Image
from refusals import refused

from data import images
from data.image_files import ordered_files
from data.images import ImageRows
from data.pixels import pixel_ids
from data.registry import check_splits
from data.tokenizers import get_tokenizer
from dataloader import DataModule

SIDE = 4
TRAIN = images_of(30), labels_of(30)
VALID = images_of(12, seed=1), labels_of(12)


@pytest.fixture
def module(compose, tmp_path):
    """A DataModule over images of the test."""

    def build(source, *overrides, side=SIDE, mask_index=None):
        config = compose(
            "data=images",
            f"data.source={source}",
            f"data.size={side**2}",
            f"model.length={3 * side**2}",
            f"data.cache_dir={tmp_path}/cache",
            *overrides,
        )
        check_splits(config, ("train", "valid"))
        return DataModule(config, get_tokenizer(config), mask_index)

    return build


CLASSES = f"data.num_classes={len(NAMES)}"


def batches(loader) -> dict[str, torch.Tensor]:
    """All batches of a loader as one."""
    found = list(loader)
    return {name: torch.cat([x[name] for x in found]) for name in found[0]}


# ---------------------------------------------------------------- every kind


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["images", "cifar10"])
def test_every_kind_of_file_gives_the_same_rows(module, tmp_path, kind, name):
    """In their order, with labels and the names of the classes."""
    source = write_both(kind, tmp_path / "set", TRAIN, VALID)
    data = module(source, CLASSES, f"data={name}", "data.length=48", mask_index=256)
    for split, (pictures, labels) in {"train": TRAIN, "valid": VALID}.items():
        rows = data.load(split)
        assert np.array_equal(np.asarray(rows.ids), pixel_ids(pictures))
        assert rows.ids.dtype == np.uint8
        assert rows.labels.tolist() == labels.tolist()
        assert rows.class_names == NAMES
        assert rows.num_documents == len(pictures)
    batch = batches(data.val_dataloader())
    assert {key: x.dtype for key, x in batch.items()} == {
        "input_ids": torch.int64,
        "attention_mask": torch.float32,
        "labels": torch.int64,
    }
    assert batch["input_ids"].tolist() == pixel_ids(VALID[0]).tolist()
    assert batch["labels"].tolist() == VALID[1].tolist()


def test_without_classes_batches_have_no_labels(module, tmp_path):
    """Whether the files have some or none."""
    for number, labels in enumerate((TRAIN[1], None)):
        root = tmp_path / str(number)
        write_folder(root / "train", TRAIN[0], labels)
        write_folder(root / "valid", VALID[0], None)
        data = module(root)
        assert batches(data.train_dataloader()).keys() == {
            "input_ids",
            "attention_mask",
        }
        assert data.load("valid").class_names == []


def test_a_set_of_one_split_each(module, tmp_path):
    """As mode=fid_eval writes them: images, perhaps with labels."""
    np.savez(tmp_path / "a.npz", images=TRAIN[0], labels=TRAIN[1].astype(np.uint8))
    np.savez(tmp_path / "b.npz", images=VALID[0])
    data = module(tmp_path / "a.npz", f"data.valid_source={tmp_path}/b.npz")
    assert len(data.load("train")) == 30
    assert len(data.load("valid")) == 12
    data = module(
        tmp_path / "a.npz", f"data.valid_source={tmp_path}/b.npz", "data.num_classes=5"
    )
    assert data.load("train").class_names == ["0", "1", "2"]
    refused(lambda: data.load("valid"), "data.num_classes=5", "b.npz", "no labels")


def test_classes_of_folders_are_the_same_in_all_splits(module, tmp_path):
    """Though one lacks some; by number where the names have numbers."""
    write_folder(tmp_path / "set/train", *TRAIN)
    only = VALID[1] == 2
    write_folder(tmp_path / "set/valid", VALID[0][only], VALID[1][only])
    data = module(tmp_path / "set", CLASSES)
    assert set(data.load("valid").labels.tolist()) == {2}
    assert data.load("valid").class_names == NAMES
    for split, numbers in {"train": range(12), "test": (10, 11)}.items():
        for number in numbers:
            write_folder(tmp_path / f"many/{split}/{number}", TRAIN[0][:1], None)
    data = module(tmp_path / "many", "data.num_classes=12")
    assert data.load("train").class_names == [str(x) for x in range(12)]
    assert data.load("valid").labels.tolist() == [10, 11]


def test_files_are_in_the_order_of_their_numbers(tmp_path):
    write_folder(tmp_path, TRAIN[0], None)
    source = images.ImageSource("folder", "data.source", (str(tmp_path),))
    names = [file.name for file in ordered_files(source)]
    assert names == [f"{number}.png" for number in range(30)]


def test_a_class_may_be_called_train(module, tmp_path):
    """As one of CIFAR-100 is: splits are all folders or none."""
    for name in ("train", "zebra"):
        write_folder(tmp_path / "set" / name, TRAIN[0][:4], None)
    write_folder(tmp_path / "other" / "zebra", VALID[0], None)
    data = module(
        tmp_path / "set",
        "data.num_classes=2",
        f"data.valid_source={tmp_path}/other",
    )
    assert data.load("train").class_names == ["train", "zebra"]
    assert set(data.load("valid").labels.tolist()) == {1}


def test_palettes_are_colours(module, tmp_path):
    """They say the same in another way."""
    picture = np.zeros((SIDE, SIDE, 3), np.uint8)
    picture[1:3] = (200, 10, 30)
    for split in ("train", "valid"):
        (tmp_path / "set" / split).mkdir(parents=True)
        file = tmp_path / "set" / split / f"{split}.png"
        Image.fromarray(picture).quantize(4).save(file)
        assert Image.open(file).mode == "P"
    rows = module(tmp_path / "set").load("train")
    assert np.array_equal(np.asarray(rows.ids), pixel_ids(picture[None]))


# ---------------------------------------------------------------- flips


@pytest.mark.parametrize("compat", ["paper", "reference"])
def test_flips(module, tmp_path, compat):
    """Of the image, half of the time, in training only; also in the published order."""
    source = write_both("npz", tmp_path, TRAIN, VALID)
    data = module(source, CLASSES, "data.flip=True", f"algo.compat={compat}")
    loader = data.train_dataloader()
    mirrored = pixel_ids(TRAIN[0][:, :, ::-1]).tolist()
    plain = pixel_ids(TRAIN[0]).tolist()
    seen: dict[int, list[bool]] = {}
    for epoch in range(40):
        loader.order.set_epoch(epoch)
        batch = batches(loader)
        pairs = zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True)
        for row, label in pairs:
            is_flipped = row in mirrored
            number = (mirrored if is_flipped else plain).index(row)
            assert label == TRAIN[1][number]
            seen.setdefault(number, []).append(is_flipped)
    assert len(seen) == 30
    assert all(0 < sum(x) < len(x) for x in seen.values())
    every = [x for several in seen.values() for x in several]
    assert abs(np.mean(every) - 0.5) < 5 * 0.5 / len(every) ** 0.5
    valid = batches(data.val_dataloader())["input_ids"]
    assert valid.tolist() == pixel_ids(VALID[0]).tolist()


def test_no_flips(module, tmp_path):
    source = write_both("npz", tmp_path, TRAIN, VALID)
    got = batches(module(source).train_dataloader())["input_ids"].tolist()
    plain = pixel_ids(TRAIN[0]).tolist()
    assert all(row in plain for row in got)


@pytest.mark.parametrize("compat", ["paper", "reference"])
def test_flips_are_a_function_of_seed_and_epoch(module, tmp_path, compat):
    """So a run that goes on in the middle of an epoch has the same."""
    source = write_both("npz", tmp_path, TRAIN, VALID)

    def epoch(number, state=None, seed=1):
        settings = ("data.flip=True", f"algo.compat={compat}", f"seed={seed}")
        loader = module(source, *settings).train_dataloader()
        loader.order.set_epoch(number)
        if state is not None:
            loader.load_state_dict(state)
        return [batch["input_ids"].tolist() for batch in loader]

    first = epoch(3)
    assert epoch(3) == first
    assert epoch(4) != first
    assert epoch(3, seed=2) != first
    assert epoch(0, {"epoch": 3, "rows": 8}) == first[2:]


def test_ranks_share_the_flips_of_an_epoch(module, tmp_path, monkeypatch):
    source = write_both("npz", tmp_path, TRAIN, VALID)
    data = module(source, "data.flip=True", "loader.global_batch_size=8")
    alone = batches(data.train_dataloader())["input_ids"].tolist()
    shares = []
    for rank in range(2):
        two = module(
            source,
            *("data.flip=True", "loader.global_batch_size=8", "trainer.devices=2"),
        )
        monkeypatch.setattr(two, "_rank", lambda rank=rank: (rank, 2))
        shares.append([x["input_ids"].tolist() for x in two.train_dataloader()])
    both = [row for pair in zip(*shares, strict=True) for part in pair for row in part]
    assert both == alone


# ---------------------------------------------------------------- the cache, marks


def test_images_are_read_once(module, tmp_path, monkeypatch):
    """And stay on disk."""
    source = write_both("folder", tmp_path / "set", TRAIN, VALID)
    first = module(source, CLASSES).load("train")
    monkeypatch.setattr(images, "read_images", lambda asked: pytest.fail("again"))
    again = module(source, CLASSES).load("train")
    assert again.fingerprint() == first.fingerprint()
    assert again.class_names == NAMES
    assert again.labels.tolist() == TRAIN[1].tolist()
    monkeypatch.undo()
    (source / "train" / "cat" / "0.png").write_bytes(png(VALID[0][0]))
    changed = module(source, CLASSES).load("train")
    assert changed.fingerprint() != first.fingerprint()


def test_marks_and_fingerprints_know_labels():
    """Of the same images with other classes, a run that goes on would be another."""
    ids = pixel_ids(TRAIN[0])
    other = TRAIN[1].copy()
    other[3] += 1
    rows = [ImageRows(ids, x) for x in (TRAIN[1], other, None)]
    assert len({x.mark() for x in rows}) == 3
    assert len({x.fingerprint().sha256 for x in rows}) == 3
    assert ImageRows(ids, TRAIN[1], flips=True).mark() == rows[0].mark()
    again = pickle.loads(pickle.dumps(rows[0]))
    assert again.mark() == rows[0].mark()


def test_marks_of_many_images_know_labels(monkeypatch):
    """Where some rows stand for all, every label counts."""
    monkeypatch.setattr("data.rows.MARKED", 100)
    monkeypatch.setattr("data.rows.SAMPLED", 3)
    ids, other = pixel_ids(TRAIN[0]), TRAIN[1].copy()
    other[3] += 1
    assert ImageRows(ids, TRAIN[1]).mark() != ImageRows(ids, other).mark()


# ---------------------------------------------------------------- refusals of images


def bad_image(module, tmp_path, content: bytes, suffix: str = "png", **options):
    """Reading a set of which one image is bad."""
    source = write_both("folder", tmp_path / "set", TRAIN, VALID)
    bad = source / "train" / "dog" / f"bad.{suffix}"
    bad.write_bytes(content)
    return lambda: module(source, CLASSES, **options).load("train"), str(bad)


@pytest.mark.parametrize(
    ("height", "width"), [(SIDE, SIDE + 1), (SIDE + 1, SIDE), (2 * SIDE, 2 * SIDE)]
)
def test_images_of_another_size_are_refused(module, tmp_path, height, width):
    picture = np.zeros((height, width, 3), np.uint8)
    call, path = bad_image(module, tmp_path, png(picture))
    refused(
        call, "data.source", path, f"{height} x {width} pixels", "4 x 4", "data.size=16"
    )


@pytest.mark.parametrize("mode", ["L", "1", "RGBA", "LA", "I;16"])
def test_images_that_are_not_red_green_and_blue_are_refused(module, tmp_path, mode):
    """Grey ones would count three times, and what is transparent has no colour."""
    picture = TRAIN[0][0]
    if mode == "I;16":
        content = png(np.zeros((SIDE, SIDE), np.uint16))
    else:
        content = png(picture, mode)
    call, path = bad_image(module, tmp_path, content)
    refused(call, "data.source", path, "not RGB", "convert('RGB')")


@pytest.mark.parametrize(
    "content", [b"", b"no image", png(TRAIN[0][0])[:60], png(TRAIN[0][0])[:-40]]
)
def test_broken_images_are_refused(module, tmp_path, content):
    call, path = bad_image(module, tmp_path, content)
    refused(call, "data.source", path, "cannot be read")


def test_other_formats_of_the_library_are_not_tried(module, tmp_path):
    """Only those that images of data sets have."""
    file = io.BytesIO()
    Image.fromarray(TRAIN[0][0]).save(file, "TIFF")
    call, path = bad_image(module, tmp_path, file.getvalue())
    refused(call, path, "cannot be read")


def test_an_image_that_would_fill_the_memory_is_not_unpacked(module, tmp_path):
    content = bytearray(png(TRAIN[0][0]))
    content[16:24] = (60_000).to_bytes(4) * 2
    import zlib

    content[29:33] = zlib.crc32(bytes(content[12:29])).to_bytes(4)
    call, path = bad_image(module, tmp_path, bytes(content))
    refused(call, path)


def test_images_beside_the_folders_of_classes_are_refused(module, tmp_path):
    source = write_both("folder", tmp_path / "set", TRAIN, VALID)
    (source / "train" / "loose.png").write_bytes(png(TRAIN[0][0]))
    refused(lambda: module(source).load("train"), "data.source", "loose.png", "classes")


@pytest.mark.parametrize("kind", KINDS)
def test_labels_out_of_range_are_refused(module, tmp_path, kind):
    source = write_both(kind, tmp_path / "set", TRAIN, VALID)
    data = module(source, "data.num_classes=2")
    parts = ("data.num_classes=2", str(source), "label 2", "data.num_classes=3")
    refused(lambda: data.load("train"), *parts, "(ship)")


@pytest.mark.parametrize("column", ["img", "image", "picture"])
def test_tables_without_labels_or_images(module, tmp_path, column):
    for split, pair in (("train", TRAIN), ("valid", VALID)):
        write_parquet(tmp_path / "set" / f"{split}.parquet", pair[0], None, column)
    if column == "picture":
        refused(lambda: module(tmp_path / "set").load("train"), "no column", "picture")
        return
    assert len(module(tmp_path / "set").load("train")) == 30
    data = module(tmp_path / "set", CLASSES)
    refused(lambda: data.load("train"), CLASSES, "no labels", "data.num_classes=null")


@pytest.mark.parametrize(
    ("arrays", "part"),
    [
        ({"images": np.zeros((3, 48), np.uint8)}, "shape (3, 48)"),
        ({"images": np.zeros((3, 4, 4, 3), np.float32)}, "float32"),
        ({"images": np.zeros((3, 3, 4, 4), np.uint8)}, "shape (3, 3, 4, 4)"),
        ({"images": np.zeros((3, 5, 4, 3), np.uint8)}, "5 x 4 pixels"),
        ({"images": TRAIN[0], "labels": TRAIN[1][:-1]}, "labels is int64"),
        ({"images": TRAIN[0], "labels": TRAIN[1] / 2}, "labels is float64"),
        ({"images": np.array([{}], dtype=object)}, "cannot be read"),
        ({"pictures": TRAIN[0]}, "no array images"),
        ({"x_heldout": TRAIN[0]}, "no array x_train"),
    ],
)
def test_arrays_that_are_no_images_are_refused(module, tmp_path, arrays, part):
    np.savez(tmp_path / "a.npz", **arrays)
    np.savez(tmp_path / "b.npz", images=VALID[0])
    data = module(tmp_path / "a.npz", f"data.valid_source={tmp_path}/b.npz")
    refused(lambda: data.load("train"), "data.source", f"{tmp_path}/a.npz", part)


def test_files_that_hold_code_run_none(module, tmp_path):
    """An ordinary unpickler would."""
    marker = tmp_path / "marker"

    class Call:
        def __reduce__(self):
            return os.system, (f"touch {marker}",)

    evil = pickle.dumps({"data": Call(), "labels": [1]}, protocol=2)
    pickle.loads(evil)
    assert marker.exists()
    marker.unlink()
    members = archive_members(TRAIN, VALID)
    for name in ("data_batch_2", "batches.meta", "test_batch"):
        source = write_archive(tmp_path / "a.tar.gz", members | {name: evil})
        data = module(source, CLASSES)
        split = "valid" if name == "test_batch" else "train"
        refused(lambda d=data, s=split: d.load(s), "a.tar.gz", "cannot be read")
    np.savez(tmp_path / "a.npz", images=np.array([Call()], dtype=object))
    np.savez(tmp_path / "b.npz", images=VALID[0])
    data = module(tmp_path / "a.npz", f"data.valid_source={tmp_path}/b.npz")
    refused(lambda: data.load("train"), "a.npz", "cannot be read")
    assert not marker.exists()


def test_the_archive_is_what_python_2_writes():
    """The stand-in means to Python what it is to mean."""
    content = pickle.loads(batch_pickle(*VALID), encoding="latin1")
    assert np.array_equal(content["data"], pixel_ids(VALID[0]))
    assert content["labels"] == VALID[1].tolist()


@pytest.mark.parametrize(
    "change",
    [
        lambda members: members.pop("data_batch_3"),
        lambda members: members.update(data_batch_1=b"\x80\x02]."),
        lambda members: members.update(data_batch_1=members["data_batch_1"][:-50]),
        lambda members: members.update(
            data_batch_1=batch_pickle(images_of(3, 5), labels_of(3))
        ),
        lambda members: members.update(
            data_batch_1=batch_pickle(images_of(3), labels_of(4))
        ),
    ],
)
def test_damaged_archives_are_refused(module, tmp_path, change):
    members = archive_members(TRAIN, VALID)
    change(members)
    source = write_archive(tmp_path / "a.tgz", members)
    refused(lambda: module(source).load("train"), str(source), "cannot be read")
    source.write_bytes(source.read_bytes()[:200])
    refused(lambda: module(source).load("train"), str(source), "cannot be read")


# ---------------------------------------------------------------- refusals of places


def test_a_source_is_needed(compose):
    config = compose("data=images", "model.length=3072")
    call = lambda: check_splits(config, ("train", "valid"))  # noqa: E731
    refused(call, "data.source is empty", "data.train='images'", ".npz", "folder")


def test_nothing_or_something_else_is_refused(module, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.txt").write_text("text")
    for name in ("empty", "a.txt"):
        refused(lambda n=name: module(tmp_path / n), "data.source", name, ".parquet")
    refused(lambda: module(tmp_path / "nowhere"), "data.source", "no such file")


def test_a_split_that_is_not_there_is_refused(module, tmp_path):
    write_folder(tmp_path / "set" / "train", *TRAIN)
    refused(lambda: module(tmp_path / "set"), "data.source", "validation", "test")
    write_parquet(tmp_path / "tables" / "train.parquet", *TRAIN)
    refused(lambda: module(tmp_path / "tables"), "data.source", "validation")


def test_what_is_trained_on_is_not_validated_on(module, tmp_path):
    """The same folder or file, one inside the other, a copy."""
    flat = write_folder(tmp_path / "flat", *TRAIN)
    refused(lambda: module(flat), "data.source", "data.valid_source")
    for other in (flat, flat / "cat"):
        refused(lambda o=other: module(flat, f"data.valid_source={o}"), "data.source")
    np.savez(tmp_path / "a.npz", images=TRAIN[0])
    refused(lambda: module(tmp_path / "a.npz"), "data.source")
    np.savez(tmp_path / "b.npz", images=TRAIN[0])
    (tmp_path / "b.npz").write_bytes((tmp_path / "a.npz").read_bytes())
    call = lambda: module(  # noqa: E731
        tmp_path / "a.npz", f"data.valid_source={tmp_path}/b.npz"
    )
    refused(call, "data.valid_source", "b.npz", "data.source")
