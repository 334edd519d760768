"""What a run on images cannot ask for, and keys of images that contradict each other:
all is refused by the light check."""

import pytest
from image_files import NAMES, images_of, labels_of, write_both
from omegaconf import OmegaConf
from refusals import refused

from cli.checks import check
from cli.commandline import find_inputs
from cli.modality import TEXT_ONLY

SETS = (images_of(6), labels_of(6)), (images_of(6, seed=1), labels_of(6))
OTHER = {bool: True, int: 3, str: "split", type(None): "x"}


@pytest.fixture
def images(compose, tmp_path):
    """The config of a run on images."""
    source = write_both("npz", tmp_path, *SETS)

    def build(*overrides):
        return compose(
            *("data=images", f"data.source={source}", "data.size=16"),
            *("model.length=48", f"data.num_classes={len(NAMES)}", *overrides),
        )

    return build


@pytest.mark.parametrize("mode", ["train", "prepare_data", "ppl_eval", "sample_eval"])
def test_runs_on_images_are_fine(images, mode, tmp_path):
    (tmp_path / "a.ckpt").write_bytes(b"")
    path = [] if mode == "train" else [f"eval.checkpoint_path={tmp_path}/a.ckpt"]
    check(images(f"mode={mode}", *path))


@pytest.mark.parametrize("key", TEXT_ONLY)
def test_what_is_of_text_is_refused(images, key):
    """At every other value, with the one that images have."""
    only = TEXT_ONLY[key]
    value = OTHER[type(only.value)]
    value = {"data.on_bad_row": "skip", "sampling.num_blocks": 3}.get(key, value)
    config = images()
    OmegaConf.update(config, key, value, force_add=True)
    refused(
        lambda: check(config), f"{key}={value!r}", "data.modality=image", only.reason
    )


def test_models_that_write_from_left_to_right_are_refused(images):
    refused(lambda: check(images("algo=ar")), "algo=ar", "bos", "diffusion")


@pytest.mark.parametrize("mode", ["train", "sample_eval", "ppl_eval"])
@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("model.length=47", ("model.length=47", "data.length=48")),
        ("data.length=47", ("data.length=47", "data.length=48")),
        ("data.size=15", ("data.size=15", "16", "4 x 4")),
        ("data.size=null", ("data.size=None",)),
        ("data.size=25", ("model.length=48", "model.length=75")),
        ("data.size=0", ("data.size=0",)),
        ("data.num_classes=0", ("data.num_classes=0",)),
        ("data.num_classes=many", ("data.num_classes='many'",)),
        ("data.flip=maybe", ("data.flip='maybe'",)),
        ("data.tokenizer_name_or_path=gpt2", ("'gpt2'", "image", "give pixels")),
        ("data.modality=text", ("data.modality",)),
    ],
)
def test_keys_of_images_agree(images, mode, override, parts, tmp_path):
    (tmp_path / "a.ckpt").write_bytes(b"")
    given = [f"mode={mode}", f"eval.checkpoint_path={tmp_path}/a.ckpt", override]
    refused(lambda: check(images(*given)), *parts)


UNET = ("algo=duo_base", "algo.backbone=unet", "model=unet")
LEVELS = ("model.num_scales=2", "model.ch_mult=[1,2]")


@pytest.mark.parametrize("mode", ["train", "sample_eval", "ppl_eval"])
@pytest.mark.parametrize("data", ["synthetic", "openwebtext", "docstrings"])
@pytest.mark.parametrize("sizes", [(), ("model.size=16", "model.length=48")])
def test_the_unet_is_for_images(compose, mode, data, sizes):
    """Also where the sizes of an image are given."""
    config = compose(*UNET, f"data={data}", f"mode={mode}", *sizes, tiny=False)
    parts = (
        "algo.backbone=unet",
        "data.modality='text'",
        "data=cifar10",
        "model=small",
    )
    refused(lambda: check(config), *parts)


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (("model.length=47",), ("model.length=47", "48 values")),
        (("model.size=64",), ("model.length=48", "192 values")),
        (("model.size=null",), ("model.size=None",)),
        (("model.ch=null",), ("model.ch=None",)),
        (("model.ch_mult=2",), ("model.ch_mult=2", "num_scales=2")),
        (("model.ch_mult=[a,b]",), ("model.ch_mult", "whole numbers")),
        (("model.ch_mult=[1,0]",), ("model.ch_mult=[1, 0]", "at least 1")),
        (("model.ch_mult=[1,1.5]",), ("model.ch_mult=[1, 1.5]", "whole")),
        (("model.num_scales=3",), ("model.ch_mult=[1, 2]", "num_scales=3")),
        (("model.scale_count_to_put_attn=2",), ("attn=2", "num_scales=2", "-1")),
        (("algo=ar",), ("algo=ar", "unet is not causal")),
        (("algo=distillation",), ("algo=distillation", "algo.backbone=dit")),
        (("algo=sdtt",), ("algo=sdtt", "algo.backbone=dit")),
        (("algo=dimo",), ("algo=dimo", "algo.backbone=dit")),
        (("mode=export",), ("mode=export", "unet", "mode=sample_eval")),
        (
            ("data.num_classes=null", "sampling.guid_weight=2"),
            ("sampling.guid_weight=2", "data.num_classes is null"),
        ),
        (("data.modality=text",), ("data.modality='text'", "data.train='images'")),
    ],
)
def test_what_the_unet_cannot_do(images, compose, overrides, parts):
    """Before torch is imported."""
    source = f"data.source={images().data.source}"
    own = ("data=images", source, "data.size=16", "data.num_classes=3")
    config = [x for x in UNET if x.split("=")[0] != overrides[0].split("=")[0]]
    config = compose(
        *config, "algo.backbone=unet", *LEVELS, *own, *overrides, tiny=False
    )
    refused(lambda: check(config), *parts)


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (("model=unet",), ("model=unet", "algo.backbone=dit", "algo.backbone=unet")),
        (("model=unet", "data=synthetic"), ("model=unet", "or algo.backbone=unet")),
        (("algo.backbone=unet",), ("model=small", "'unet'", "or algo.backbone=dit")),
        (("model.type=mamba",), ("model.type='mamba'", "'ddit'", "another model.")),
    ],
)
def test_network_and_sizes_belong_together(compose, overrides, parts):
    config = compose("data=cifar10", "model.length=3072", *overrides, tiny=False)
    refused(lambda: check(config), *parts)


@pytest.mark.parametrize("weight", ["1", "2.5", "1e-3"])
def test_texts_have_no_guidance(compose, weight):
    """A weight of 0 asks for none."""
    parts = ("sampling.guid_weight=", "data.num_classes is null")
    refused(lambda: check(compose(f"sampling.guid_weight={weight}")), *parts)
    for none in ("0", "0.0", "null"):
        check(compose(f"sampling.guid_weight={none}"))


def test_a_text_has_no_classes(compose):
    refused(lambda: check(compose("data.num_classes=3")), "data.num_classes=3", "text")


@pytest.mark.parametrize("name", ["cifar10", "pixels", "text8", "bytes"])
def test_a_folder_of_the_name_of_a_tokenizer_is_no_tokenizer(compose, name, tmp_path):
    """The data set lies in such a folder more often than not."""
    (tmp_path / name).mkdir()
    config = compose(f"data.tokenizer_name_or_path={name}", f"data.source={name}")
    find_inputs(config, str(tmp_path))
    assert config.data.tokenizer_name_or_path == name
    assert config.data.source == f"{tmp_path}/{name}"
