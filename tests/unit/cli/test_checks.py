"""Keys that take one of several kinds of values, and what a mode cannot run on; numbers
are in `test_main.py`."""

from functools import partial

import pytest
from omegaconf import OmegaConf
from refusals import refused

from cli.checks import check, check_inert_keys
from cli.known_keys import INERT_KEYS
from cli.settle import check_devices
from cli.values import check_labels, check_values


@pytest.mark.parametrize("value", [0, -3, "many", "", "7", 1.5, float("inf"), True])
def test_a_chunk_is_auto_null_or_a_whole_number(compose, value):
    config = compose()
    config.training.loss_chunk = value
    choices = "auto, null or a whole number"
    refused(partial(check_values, config), f"training.loss_chunk={value!r}", choices)


@pytest.mark.parametrize("override", ["auto", "null", "1", "7", "1000000"])
def test_chunks_that_are_fine(compose, override):
    check_values(compose(f"training.loss_chunk={override}"))


@pytest.mark.parametrize("value", ["yes", 2, None, "True"])
def test_the_loss_is_compiled_or_not_or_auto(compose, value):
    config = compose()
    for fine in (True, False, "auto"):
        config.training.loss_compile = fine
        check_values(config)
    config.training.loss_compile = value
    refused(
        partial(check_values, config),
        f"training.loss_compile={value!r}",
        "auto",
        "True",
        "False",
    )


SHARDED = {
    "mode=sample_eval": ("mode=sample_eval splits samples", "strategy=ddp"),
    "mode=fid_eval": ("mode=fid_eval splits samples", "strategy=ddp"),
    "trainer.precision=16": ("trainer.precision=16", "choose 32 or bf16-mixed"),
    "trainer.precision=bf16-true": ("'bf16-true'", "keeps weights in float32"),
    "trainer.accelerator=mps": ("Apple GPUs", "strategy=ddp"),
}


@pytest.mark.parametrize("override", SHARDED)
def test_what_weights_in_shards_do_not_do(compose, monkeypatch, override):
    """Also where CUDA is there; the rest passes."""
    monkeypatch.setattr("cli.settle.uses_cuda", lambda accelerator: True)
    two = ("strategy=fsdp", "trainer.devices=2")
    check_devices(compose(*two))
    check_devices(compose(*two, "trainer.precision=bf16"))
    refused(partial(check_devices, compose(*two, override)), *SHARDED[override])


def test_one_device_has_nothing_to_split(compose, caplog):
    check_devices(compose("strategy=fsdp", "trainer.devices=2"))
    assert not caplog.messages
    check_devices(compose("strategy=fsdp", "trainer.devices=1"))
    (line,) = caplog.messages
    assert "strategy=fsdp has one device and splits nothing" in line


def other_than(value):
    """A value of the same kind that is not the published one."""
    match value:
        case bool():
            return not value
        case int():
            return value + 3
        case None:
            return 1.5
    return "something_else"


@pytest.mark.parametrize("key", sorted(INERT_KEYS))
def test_keys_without_a_meaning_are_refused_when_changed(compose, key):
    """And accepted at the published value, also where a group lacks the key."""
    config = compose("algo=mdlm")
    OmegaConf.update(config, key, INERT_KEYS[key], force_add=True)
    check_inert_keys(config)
    given = other_than(INERT_KEYS[key])
    OmegaConf.update(config, key, given, force_add=True)
    refused(
        partial(check_inert_keys, config), f"{key}={given!r}", repr(INERT_KEYS[key])
    )


# ---------------------------------------------------------------- mode=fid_eval

IMAGES = ("mode=fid_eval", "data=cifar10", "model=unet", "algo.backbone=unet")
NO_IMAGES = {
    "text": (
        ["data=synthetic", "model=tiny", "algo.backbone=dit"],
        ["data.modality='text'", "data=cifar10"],
    ),
    "no extractor": (
        [],
        ["eval.fid_features is empty", "pt_inception-2015-12-05", "https://github.com"],
    ),
    "no such extractor": (
        ["eval.fid_features=nowhere.pt"],
        ["eval.fid_features='nowhere.pt'", "no such file"],
    ),
    "one image": (["eval.fid_num_images=1"], ["eval.fid_num_images=1", "at least 2"]),
    "half an image": (["eval.fid_num_images=2.5"], ["eval.fid_num_images=2.5"]),
    "no path": (["eval.fid_features=3"], ["eval.fid_features=3 is no text"]),
    "guidance without classes": (
        ["sampling.guid_weight=2.0", "data.num_classes=null"],
        ["sampling.guid_weight=2.0", "data.num_classes is null"],
    ),
    "one path": (
        [
            "eval.fid_features=extractor.pt",
            "eval.results_path=a.npz",
            "eval.generated_samples_path=a.npz",
        ],
        ["eval.results_path='a.npz'", "eval.generated_samples_path", "two paths"],
    ),
    "windows": (["sampling.semi_ar=True"], ["sampling.semi_ar=True"]),
    "no checkpoint": (
        ["eval.fid_features=extractor.pt", "eval.checkpoint_path=no.ckpt"],
        ["eval.checkpoint_path='no.ckpt'", "no such file"],
    ),
}


@pytest.mark.parametrize("name", NO_IMAGES)
def test_what_fid_eval_cannot_do_is_said_before_torch_is_there(
    name, compose, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "last.ckpt").touch()
    (tmp_path / "extractor.pt").touch()
    overrides, expected = NO_IMAGES[name]
    source = "data.source=." if name != "text" else "seed=1"
    usual = (*IMAGES, source, "eval.checkpoint_path=last.ckpt")
    (tmp_path / "data_batch_1").touch()
    config = compose(*usual, *overrides, tiny=False)
    refused(partial(check, config), *expected)


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["sampling.save_trajectory=a.html"], ["mode=train", "add mode=sample_eval"]),
        (["view.paths=[a.html]"], ["mode=train", "add mode=view"]),
        (
            ["mode=ppl_eval", "sampling.save_trajectory=a.html"],
            ["is for mode=sample_eval, not mode=ppl_eval"],
        ),
        (["sampling.save_trajectory=a.png"], ["'a.png' does not end in .html"]),
        (["sampling.save_trajectory=there.html"], ["exists; it is not overwritten"]),
        (["sampling.save_trajectory=3"], ["sampling.save_trajectory=3 is no text"]),
        (["mode=view", "view.paths=3"], ["view.paths"]),
    ],
)
def test_pages_that_cannot_be_are_refused(
    compose, overrides, parts, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.html").touch()
    (tmp_path / "last.ckpt").touch()
    usual = ["mode=sample_eval"] if "html" not in overrides[0] else []
    usual += ["mode=sample_eval"] if "there" in overrides[0] else []
    usual += ["eval.checkpoint_path=last.ckpt"] if usual or len(overrides) > 1 else []
    config = compose("algo=mdlm", *usual, *overrides)
    refused(partial(check, config), *parts)


def test_paths_have_names_of_their_mode(compose):
    """Texts and images are not mixed up by default."""
    names = {
        mode: [
            config.eval[key].rpartition("/")[2]
            for key in ("results_path", "generated_samples_path")
        ]
        for mode in ("fid_eval", "sample_eval", "ppl_eval", "train")
        for config in (compose(f"mode={mode}"),)
    }
    assert names.pop("fid_eval") == ["fid.json", "images.npz"]
    assert set(map(tuple, names.values())) == {("likelihood.json", "samples.json")}


WITH_CLASSES = ("data=cifar10", "sampling.guid_weight=1")
LABELS = {
    "a number": (["sampling.labels=3"], ["sampling.labels=3", "a list of classes"]),
    "nothing": (["sampling.labels=[]"], ["sampling.labels=[]", "a list of classes"]),
    "a word": (["sampling.labels=cats"], ["sampling.labels='cats'", "data"]),
    "too large": (["sampling.labels=[0,10]"], ["10 is no class", "0 to 9"]),
    "below 0": (["sampling.labels=[-1]"], ["-1 is no class"]),
    "no number": (["sampling.labels=[cat]"], ["'cat' is no class"]),
    "half": (["sampling.labels=[0.5]"], ["0.5 is no class"]),
    "a flag": (["sampling.labels=[True]"], ["True is no class"]),
    "no classes": (
        ["sampling.labels=data", "data.num_classes=null"],
        ["sampling.labels='data'", "data.num_classes=None"],
    ),
    "no guidance": (
        ["sampling.labels=[1]", "sampling.guid_weight=0"],
        ["sampling.labels=[1]", "sampling.guid_weight=0"],
    ),
}


@pytest.mark.parametrize("name", LABELS)
def test_classes_that_are_none_are_refused(name, compose):
    overrides, expected = LABELS[name]
    config = compose(*WITH_CLASSES, *overrides, tiny=False)
    refused(partial(check_labels, config), *expected)


@pytest.mark.parametrize("labels", ["null", "data", "[0]", "[9,0,9]"])
def test_classes_that_are_fine(labels, compose):
    check_labels(compose(*WITH_CLASSES, f"sampling.labels={labels}", tiny=False))


@pytest.mark.parametrize(
    "value", ["0", "-4", "2.0", "True", "many", "[]", "[4,4]", "[4,x]"]
)
def test_a_block_has_a_number_of_tokens(compose, value):
    config = compose("algo=mdlm", f"algo.block_size={value}")
    refused(partial(check_values, config), "algo.block_size=", "[4,8,16]")


@pytest.mark.parametrize("value", ["3", "[4,16]"])
def test_a_row_is_a_whole_number_of_blocks(compose, value):
    config = compose("algo=mdlm", f"algo.block_size={value}")
    refused(partial(check_values, config), "algo.block_size=", "model.length=8")


def test_flash_attention_has_no_blocks(compose):
    config = compose("algo=mdlm", "algo.block_size=4", "model.attention=flash")
    refused(partial(check_values, config), "model.attention='flash'", "auto or sdpa")


@pytest.mark.parametrize(
    "value", ["0.5", "[0.5]", "[0.8,0.3]", "[0.3,0.3]", "[-0.1,1]", "[0,1.1]", "[a,1]"]
)
def test_a_range_of_times_is_two_of_them(compose, value):
    config = compose("algo=mdlm", f"training.time_range={value}")
    refused(partial(check_values, config), "training.time_range=", "lo < hi")


def test_a_range_of_times_is_for_uniform_ones(compose):
    words = "algo=mdlm", "training.time_range=[0.3,0.8]"
    check_values(compose(*words))
    both = compose(*words, "training.importance_sampling=True")
    refused(partial(check_values, both), "time_range", "importance_sampling=True")
    early = compose("algo=mdlm", "training.time_range=[0,1e-4]")
    refused(partial(check_values, early), "time_range", "sampling_eps=0.001")
