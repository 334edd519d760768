"""Samples of a validation of images: numbers, a picture, and what loggers get."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import compose

from data.pixels import PixelTokenizer
from sampling.reverse_process import Samples
from training.sample_logging import SampleLogging


@pytest.mark.parametrize(
    ("overrides", "classes"),
    [
        ((), None),
        (("data.num_classes=3",), None),  # drawn from none
        (("data.num_classes=3", "sampling.guid_weight=1"), [0, 1, 2, 0, 1, 2, 0, 1]),
        (
            ("data.num_classes=3", "sampling.guid_weight=2", "sampling.labels=[2,0]"),
            [2, 0] * 4,
        ),
        (
            ("data.num_classes=3", "sampling.guid_weight=2", "sampling.labels=data"),
            [1, 1, 0, 2, 1, 1, 1, 0],
        ),
    ],
)
def test_images_are_a_picture(tmp_path, overrides, classes):
    """All samples of the validation, in order, as (N, H, W, 3), of classes in turn."""
    config = compose(
        *("data=images", "data.size=4", "model.length=12"),
        *(f"checkpointing.save_dir={tmp_path}", "sampling.num_sample_batches=2"),
        *("sampling.num_sample_log=3", *overrides),
    )
    drawn = [torch.randint(256, (4, 12)) for _ in range(2)]
    batches = iter(drawn)
    asked = []

    def generate_samples(*args, labels):
        asked.append(labels)
        return Samples(next(batches), torch.ones(4))

    model = SimpleNamespace(
        config=config,
        tokenizer=PixelTokenizer(),
        validation_due=False,
        global_step=7,
        global_rank=0,
        generator=lambda *position: None,
        generate_samples=generate_samples,
        log_dict=lambda numbers, sync_dist: logged.update(numbers),
    )
    logged, written, shown = {}, [], {}
    rows = SimpleNamespace(labels=np.array([1, 1, 0, 2, 1]))
    trainer = SimpleNamespace(
        state=SimpleNamespace(fn="fit"),
        sanity_checking=False,
        world_size=1,
        datamodule=SimpleNamespace(load=lambda split: rows),
        strategy=SimpleNamespace(reduce_boolean_decision=lambda x: x),
        loggers=[SimpleNamespace(log_image=shown.__setitem__), SimpleNamespace()],
    )
    callback = SampleLogging(None, lambda *args: written.append(args))
    callback.on_validation_epoch_end(trainer, model)
    expected = PixelTokenizer().batch_decode(torch.cat(drawn)).permute(0, 2, 3, 1)
    ((path, pixels, labels),) = written
    assert path == f"{tmp_path}/samples/step_7.png"
    assert np.array_equal(pixels, expected.numpy())
    assert pixels.dtype == np.uint8
    assert (None if labels is None else labels.tolist()) == classes
    if classes is None:
        assert asked == [None, None]
    else:
        assert torch.cat(asked).tolist() == classes
    said = json.loads((tmp_path / "samples/step_7.json").read_text())
    assert said["num_images"] == 8
    assert said["sampling"]["temperature"] == 1.0
    assert said["sample_entropy"] == float(logged["val/sample_entropy"])
    assert callback.texts == []
    assert [x.shape for x in shown["samples@global_step7"]] == [(2, 2, 3)] * 3
