"""What a process of `mode=fid_eval` does: which batches are its own, what is in them,
and what cannot become an image."""

import math
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from image_files import images_of, labels_of
from omegaconf import OmegaConf
from refusals import refused
from torch import nn

from data.images import ImageRows
from data.pixels import PixelTokenizer, pixel_ids
from evaluation.extractor import Named
from evaluation.image_file import ImageFile
from evaluation.images import AT_A_TIME, Measuring, sums_of
from metrics.fid import frechet_distance
from utils import NotFinite

NUM_REAL, NUM_IMAGES, BATCH_SIZE = 11, 10, 4
REAL, LABELS = images_of(NUM_REAL), labels_of(NUM_REAL)


class Colours(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 5)
        self.seen: list[int] = []

    def forward(self, images):
        self.seen.append(len(images))
        features = self.linear(images.float().mean(dim=(2, 3)) / 255)
        return features, 2 * features


class Model:
    """Draws images of noise, and remembers for which classes."""

    tokenizer = PixelTokenizer()

    def __init__(self, largest=256, num_classes=3, **sampling) -> None:
        settings = {"guid_weight": 1.0, "labels": None} | sampling
        loader = {"eval_batch_size": BATCH_SIZE}
        data = {"num_classes": num_classes}
        parts = {"sampling": settings, "loader": loader, "data": data}
        self.config = OmegaConf.create(parts)
        self.largest = largest
        self.told: list = []

    def generator(self, purpose: str, index: int) -> torch.Generator:
        assert purpose == "fid_eval"
        return torch.Generator().manual_seed(index)

    def generate_samples(self, count, generator, labels, show_progress):
        self.told.append(labels)
        shape = (count, 48)
        tokens = torch.randint(0, self.largest, shape, generator=generator)
        return SimpleNamespace(tokens=tokens, evaluations=torch.ones(count))


@pytest.fixture
def extractor() -> Named:
    torch.manual_seed(0)
    return Named(Colours().eval(), "a.pt", "ab", "TorchScript")


@pytest.fixture
def measuring(tmp_path, extractor):
    """measuring(rank, world_size, ...) of one run."""

    def make(rank=0, world_size=1, path="a", model=None, labels=LABELS) -> Measuring:
        placed = type(
            "Placed",
            (Measuring,),
            {
                "global_rank": rank,
                "trainer": SimpleNamespace(world_size=world_size),
            },
        )
        file = ImageFile(str(tmp_path / path), {}, math.ceil(NUM_IMAGES / BATCH_SIZE))
        real = ImageFile(
            str(tmp_path / f"{path}.real"), {}, math.ceil(NUM_REAL / BATCH_SIZE)
        )
        rows = ImageRows(pixel_ids(REAL), labels)
        parts = (extractor, file, real, rows, NUM_IMAGES)
        return placed(model or Model(), *parts)

    return make


def share(one: Measuring) -> list[int]:
    return [int(number) for number in one.predict_dataloader()]


def work(one: Measuring) -> None:
    for number in share(one):
        one.predict_step(number)


# ---------------------------------------------------------------- shares


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_every_batch_is_of_one_process(measuring, world_size):
    """Three real and three generated ones; some processes may have none."""
    shares = [share(measuring(rank, world_size)) for rank in range(world_size)]
    assert sorted(number for one in shares for number in one) == list(range(6))
    assert all(one == sorted(one) for one in shares)
    assert measuring().allow_zero_length_dataloader_with_multiple_devices


def test_what_is_there_is_not_made_again(measuring):
    """Also where only one of two processes has seen the cache of the real images."""
    first = measuring()
    for number in (1, 3):
        first.predict_step(number)
    assert share(measuring(0, 2)) == [0, 2, 4]
    assert share(measuring(1, 2)) == [5]
    seeing = measuring(0, 2)
    seeing.has_real = True
    assert share(seeing) == [4]


@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_make_what_one_makes(measuring, world_size):
    """Whoever draws a batch, and whenever; the distance is equal to the last digit."""
    work(measuring())
    for rank in reversed(range(world_size)):
        work(measuring(rank, world_size, path="b"))
    one, other = measuring(), measuring(path="b")
    for ours, theirs in ((one.file, other.file), (one.real, other.real)):
        for a, b in zip(ours.batches(), theirs.batches(), strict=True):
            assert a.keys() == b.keys()
            for name in a.keys() - {"seconds"}:
                np.testing.assert_array_equal(a[name], b[name])
    distances = [
        frechet_distance(sums_of(x.real), sums_of(x.file)) for x in (one, other)
    ]
    assert distances[0] == distances[1]


# ---------------------------------------------------------------- batches


def test_a_batch(measuring, extractor):
    """Images as they are looked at, and their features; the last one is smaller."""
    one = measuring()
    work(one)
    sizes = [len(batch["images"]) for batch in one.file.batches()]
    assert sizes == [4, 4, 2]
    for batch in one.file.batches():
        assert batch["images"].shape[1:] == (4, 4, 3)
        x = torch.from_numpy(batch["images"]).permute(0, 3, 1, 2)
        features, logits = extractor.network(x)
        np.testing.assert_allclose(batch["features"], features.detach(), rtol=1e-6)
        np.testing.assert_allclose(batch["logits"], logits.detach(), rtol=1e-6)


def test_features_of_real_images_are_of_all_as_they_are(measuring, extractor):
    """In order, none of them flipped, whatever is left over of the last batch."""
    one = measuring()
    work(one)
    found = np.concatenate([batch["features"] for batch in one.real.batches()])
    expected, _ = extractor.network(torch.from_numpy(REAL).permute(0, 3, 1, 2))
    np.testing.assert_allclose(found, expected.detach(), rtol=1e-6)
    assert sums_of(one.real).count == NUM_REAL


def test_classes_are_those_of_the_training_set_in_order(measuring):
    """And from its beginning again; or those of a list, which take turns."""
    model = Model()
    one = measuring(model=model)
    assert one.labels(8, 6).tolist() == [*LABELS[8:], *LABELS[:3]]
    work(one)
    told = torch.cat(model.told).tolist()
    assert told == LABELS[:NUM_IMAGES].tolist()
    there = np.concatenate([batch["labels"] for batch in one.file.batches()])
    assert there.tolist() == told
    assert measuring(model=Model(labels="data")).labels(0, 3).tolist() == [0, 0, 0]
    taking_turns = measuring(model=Model(labels=[2, 0]))
    assert taking_turns.labels(3, 4).tolist() == [0, 2, 0, 2]


@pytest.mark.parametrize("weight", [None, 0, 0.0])
def test_without_guidance_there_are_no_classes(measuring, weight):
    """Nor with a model that has none."""
    for one in (
        measuring(model=Model(guid_weight=weight)),
        measuring(labels=None, model=Model(num_classes=None, guid_weight=weight)),
    ):
        assert one.labels(0, 3) is None
        assert "labels" not in one.draw(0)


def test_a_mask_that_is_left_is_no_pixel(measuring):
    """The line says so, and there is no such batch."""
    one = measuring(model=Model(largest=257))
    refused(partial(one.predict_step, 3), "mask was left", "sampling.noise_removal")
    assert one.file.done() == set()


def test_the_extractor_sees_a_few_at_a_time_in_full_precision(measuring, extractor):
    one = measuring()
    x = torch.randint(0, 256, (AT_A_TIME + 3, 3, 4, 4), dtype=torch.uint8)
    extractor.network.seen.clear()
    with torch.autocast("cpu", torch.bfloat16):
        features, _ = one.extract(x)
    assert extractor.network.seen == [AT_A_TIME, 3]
    expected, _ = extractor.network(x)
    np.testing.assert_allclose(features, expected.detach(), rtol=1e-6)
    assert not any(x is extractor.network for x in one.modules())


def test_features_that_are_no_numbers_are_said_at_once(measuring, extractor):
    with torch.no_grad():
        extractor.network.linear.bias[1] = math.nan
    with pytest.raises(NotFinite, match=r"eval\.fid_features"):
        measuring().predict_step(0)
