"""What a checkpoint says is taken over where the command is silent, and a contradiction
that changes numbers is refused."""

import json
import os
import shutil

import pytest
import torch
from hydra.errors import HydraException
from omegaconf import OmegaConf
from refusals import refused
from released import write_released
from tiny import compose, tiny_model

import main
from checkpoints.reading import read_checkpoint
from cli.stated import MAY_DIFFER, said, take_over, without
from cli.uses import commands
from data.tokenizers import text8_tokenizer
from utils import CONFIGS

KEY = "eval.checkpoint_path"
SIZES = {"hidden_size": 32, "cond_dim": 16, "n_blocks": 2, "n_heads": 4, "length": 24}
TRAINED = (
    *("data=docstrings", "data.valid_fraction=0.02", "noise=cosine", "noise.eps=1e-4"),
    *("training.sampling_eps=1e-5", "model=tiny"),
    *(f"model.{key}={x}" for key, x in SIZES.items()),
)


def write(path, *words: str, is_own: bool = True, **edits) -> str:
    """A file as a run with these words writes it."""
    config = compose(*TRAINED, *words, tiny=False)
    model = tiny_model(*TRAINED, *words, tokenizer=text8_tokenizer())
    node = OmegaConf.to_container(config, resolve=True)
    for key, value in edits.items():
        group, name = key.split("__")
        node[group][name] = value
    content = {"state_dict": model.state_dict(), "hyper_parameters": {"config": node}}
    if is_own:
        content["identity"] = {"settings": {}, "course": {}, "data": {}}
    torch.save(content | {"global_step": 3}, path)
    return str(path)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A file of each algorithm, made once: files(name)."""
    folder, made = tmp_path_factory.mktemp("files"), {}

    def get(algo: str) -> str:
        if algo not in made:
            made[algo] = write(folder / f"{algo}.ckpt", f"algo={algo}")
        return made[algo]

    return get


def taken(path: str, *words: str, mode: str = "ppl_eval"):
    """The config of a command that names the file, after it has been taken over."""
    words = (f"mode={mode}", *words, f"{KEY}={path}")

    def again(choices):
        return compose(*choices, *without(words, choices), tiny=False)

    config = compose(*words, tiny=False)
    take_over(config, words, again, [CONFIGS])
    return config


ALGORITHMS = ("duo_base", "duo", "mdlm", "sedd", "ar", "dimo", "sdtt")


@pytest.mark.parametrize("mode", ["ppl_eval", "sample_eval", "export"])
@pytest.mark.parametrize("algo", ALGORITHMS)
def test_a_file_is_enough(files, algo, mode):
    path = files(algo)
    config = taken(path, mode=mode)
    stated = read_checkpoint(path, KEY)
    for key in ("name", "_target_", "time_conditioning", "T", "parameterization"):
        assert config.algo[key] == stated.setting(f"algo.{key}")
    assert {key: config.model[key] for key in SIZES} == SIZES
    assert (config.noise.type, config.noise.eps) == ("cosine", 1e-4)
    assert config.training.sampling_eps == 1e-5
    assert (config.data.train, config.data.valid_fraction) == ("docstrings", 0.02)
    assert config.data.tokenizer_name_or_path == "text8"
    one_step = algo == "dimo"
    assert (config.sampling.predictor == "one_step") == one_step


def test_data_of_the_command_come_with_the_tokenizer_of_the_file(files):
    config = taken(files("mdlm"), "data=ptb")
    assert (config.data.train, config.data.tokenizer_name_or_path) == ("ptb", "text8")
    assert "valid_fraction" not in config.data


def test_what_the_command_says_of_the_course_holds(files):
    config = taken(files("mdlm"), "data.cache_dir=/mine", "seed=7", "model=tiny")
    assert (config.data.cache_dir, config.seed) == ("/mine", 7)
    assert config.model.hidden_size == SIZES["hidden_size"]


@pytest.mark.parametrize(
    ("word", "ours", "theirs"),
    [
        ("algo=sedd", "algo=sedd", "algo=mdlm"),
        ("noise=log-linear", "noise=log-linear", "noise=cosine"),
        ("noise.eps=1e-3", "noise.eps=0.001", "noise.eps=0.0001"),
        ("model.length=16", "model.length=16", "model.length=24"),
        ("algo.T=100", "algo.T=100", "algo.T=0"),
        ("algo.ignore_bos=True", "algo.ignore_bos=True", "algo.ignore_bos=False"),
        ("algo.block_size=4", "algo.block_size=4", "algo.block_size=null"),
        ("data.tokenizer_name_or_path=gpt2", "=gpt2 contra", "_path=text8"),
        ("training.sampling_eps=1e-3", "_eps=0.001", "_eps=1e-05"),
        ("data.bos_token=a", "data.bos_token=a", "data.bos_token=null"),
        ("experiment=eval_owt_sedd", "algo=sedd (experiment=", "algo=mdlm"),
        ("experiment=zero_shot_mdlm", "model.length=1024 (exp", "model.length=24"),
    ],
)
def test_contradictions_are_refused(files, word, ours, theirs):
    path = files("mdlm")
    refused(lambda: taken(path, word), ours, theirs, KEY, path, "eval.differing=[")


def test_blocks_are_those_of_the_file(tmp_path):
    """One size; of several any that training had."""
    quiet = "eval.generate_samples=False"
    path = write(tmp_path / "a.ckpt", "algo=mdlm", "algo.block_size=4", quiet)
    assert taken(path).algo.block_size == 4
    assert taken(path, "algo.block_size=4").algo.block_size == 4
    for ours in ("8", "null"):
        word = f"algo.block_size={ours}"
        refused(lambda word=word: taken(path, word), word, "algo.block_size=4", path)
    meant = taken(path, "algo.block_size=8", "eval.differing=[algo.block_size]")
    assert meant.algo.block_size == 8
    several = write(tmp_path / "b.ckpt", "algo=mdlm", "algo.block_size=[4,8]", quiet)
    assert taken(several).algo.block_size == [4, 8]
    assert taken(several, "algo.block_size=8").algo.block_size == 8
    word = "algo.block_size=2"
    refused(lambda: taken(several, word), word, "algo.block_size=[4, 8]")


@pytest.mark.parametrize("word", ["model.hidden_size=64", "model.n_heads=2"])
def test_sizes_cannot_be_others_even_on_purpose(files, word):
    with pytest.raises(ValueError, match=word.replace(".", r"\.")) as error:
        taken(files("mdlm"), word)
    assert "eval.differing" not in str(error.value)


@pytest.mark.parametrize(
    "word",
    [
        *("algo=mdlm", "noise=cosine", "noise.eps=1e-4", "model.length=24"),
        *("model=small", "algo.backbone=hf_dit", "algo.compat=reference"),
        "model.attention=sdpa",
    ],
)
def test_what_agrees_or_changes_no_number_is_accepted(files, word):
    config = taken(files("mdlm"), word)
    assert config.model.length == 24
    key, _, value = word.partition("=")
    if key.startswith("algo."):
        assert OmegaConf.select(config, key) == value


@pytest.mark.parametrize(
    ("trained", "asked"),
    [("duo", "duo_base"), ("duo_base", "duo"), ("sdtt", "mdlm"), ("mdlm", "dimo")],
)
def test_algorithms_that_are_alike_may_stand_for_each_other(files, trained, asked):
    config = taken(files(trained), f"algo={asked}", mode="sample_eval")
    assert (config.algo.name, config.model.length) == (asked, 24)


def test_a_difference_on_purpose(files):
    path = files("mdlm")
    config = taken(path, "model.length=16", "eval.differing=[model.length]")
    assert (config.model.length, config.noise.type) == (16, "cosine")
    config = taken(path, "noise=linear", "eval.differing=noise")
    assert config.noise.type == "linear"
    assert "eps" not in config.noise
    config = taken(path, "algo=sedd", "eval.differing=[algo]", "algo.T=0")
    assert config.algo.name == "sedd"
    refused(
        lambda: taken(path, "eval.differing=[model.lenght]"),
        "eval.differing='model.lenght'",
        "'model.length'",
    )
    refused(
        lambda: taken(path, "model.length=16", "eval.differing=[noise]"),
        "model.length=16",
    )
    for name in MAY_DIFFER:
        taken(path, f"eval.differing=[{name}]")


def test_data_that_are_gone(tmp_path):
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("to be or not to be " * 100)
    path = tmp_path / "last.ckpt"
    words = ("data=text_files", f"data.path={corpus}")
    write(path, "data.tokenizer_name_or_path=text8", *words)
    assert taken(str(path)).data.path == str(corpus)
    corpus.unlink()
    refused(lambda: taken(str(path)), str(path), str(corpus), "Give data=...")
    assert taken(str(path), mode="sample_eval").model.length == 24
    assert taken(str(path), "data=docstrings").data.train == "docstrings"


def test_files_of_others_say_nothing_of_data(tmp_path):
    path = write(tmp_path / "theirs.ckpt", "algo=mdlm", is_own=False)
    config = taken(path)
    assert config.data.train == "openwebtext"
    assert (config.algo.name, config.data.tokenizer_name_or_path) == ("mdlm", "text8")


def test_a_tokenizer_elsewhere_may_be_the_same(files, tmp_path):
    """Only loading it tells, by its mark."""
    text8_tokenizer().save_pretrained(tmp_path / "own")
    config = taken(files("mdlm"), f"data.tokenizer_name_or_path={tmp_path}/own")
    assert config.data.tokenizer_name_or_path == f"{tmp_path}/own"


def test_folders_of_the_hub(tmp_path):
    """Without algo.backbone=hf_dit, and with it."""
    write_released(tmp_path / "duo", "DUO", vocab_size=35, length=32)
    config = taken(str(tmp_path / "duo"), "model=small")
    assert (config.algo.name, config.model.length) == ("duo", 32)
    assert (config.model.hidden_size, config.model.cond_dim) == (32, 12)
    more = ("algo=duo_base", "algo.backbone=hf_dit")
    assert taken(str(tmp_path / "duo"), *more).model.hidden_size == 32
    refused(lambda: taken(str(tmp_path / "duo"), "algo=ar"), "algo=ar", "algo=duo")
    refused(lambda: taken(str(tmp_path / "duo"), "model.length=8"), "model.length=32")


def test_training_takes_the_sizes_alone(files):
    words = ("algo=sdtt", f"training.finetune_path={files('mdlm')}")
    config = compose(*words, tiny=False)
    take_over(config, words, lambda _: pytest.fail("nothing is chosen anew"), [])
    assert config.model.hidden_size == SIZES["hidden_size"]
    assert (config.model.length, config.algo.name) == (1024, "sdtt")
    assert config.noise.type == "log-linear"


def test_values_that_refer_to_others_are_not_taken(tmp_path):
    evil = {"model__length": "${oc.env:HOME}", "data__bos_token": "${oc.env:HOME}"}
    path = write(tmp_path / "evil.ckpt", "algo=mdlm", **evil)
    config = taken(path)
    assert (config.model.length, config.data.bos_token) == (1024, None)


def test_an_algorithm_that_is_not_here(tmp_path):
    path = write(tmp_path / "own.ckpt", "algo=mdlm", algo__name="my_own")

    def nothing(choices):
        raise HydraException("Could not find 'algo/my_own'")

    words = ("mode=ppl_eval", f"{KEY}={path}")
    config = compose(*words, tiny=False)
    refused(lambda: take_over(config, words, nothing), path, "my_own")


def test_what_a_command_says():
    words = ("experiment=zero_shot_mdlm", "+algo.T=3", "data=ptb", "noise.eps=1e-3")
    given = said(words, [CONFIGS])
    assert given.groups["data"] == ""
    assert given.groups["algo"] == "experiment=zero_shot_mdlm"
    assert given.where("model.length") == "experiment=zero_shot_mdlm"
    assert (given.where("algo.T"), given.where("noise.eps")) == ("", "")
    assert given.where("model.hidden_size") is None
    inner = said(["experiment=demo_samples"], [CONFIGS])  # builds upon demo
    assert "data" in inner.groups


# ---------------------------------------------------------------- mode=inspect


@pytest.mark.parametrize("algo", ["mdlm", "ar", "dimo"])
def test_the_commands_of_a_file_are_understood(files, algo):
    path = files(algo)
    lines = [x for x in commands(read_checkpoint(path, KEY), path) if "main.py" in x]
    modes = []
    for line in lines:
        words = line.split("main.py ")[1].split()
        config = taken(path, *(x for x in words if not x.startswith((KEY, "mode="))))
        assert config.algo.name == algo
        modes += [x for x in words if x.startswith("mode=")]
        assert f"{KEY}={path}" in words
        assert os.path.exists(line.split()[0])
    assert modes == ["mode=ppl_eval", "mode=sample_eval"]


def test_a_path_of_any_kind_can_be_copied(files, tmp_path):
    import shlex

    odd = str(tmp_path / "a b'c=(1),$HOME.ckpt")
    shutil.copy(files("mdlm"), odd)
    lines = [x for x in commands(read_checkpoint(odd, KEY), odd) if "main.py" in x]
    for line in lines:
        word = next(x for x in shlex.split(line) if x.startswith(KEY))
        assert compose(word, tiny=False).eval.checkpoint_path == odd


def test_inspect_shows_sizes(files, compose, capsys):
    config = compose("mode=inspect", f"{KEY}={files('mdlm')}")
    lines = main.MODES["inspect"](config)
    assert lines["length"] == "24"
    assert "hidden size 32, blocks 2, heads 4" in lines["network"]
    whole, rest = (
        int(lines[name].replace(",", ""))
        for name in ("parameters", "without embedding")
    )
    assert whole - rest == 35 * 32
    assert "mode=ppl_eval" in capsys.readouterr().out


def test_inspect_shows_blocks(tmp_path, compose):
    quiet = "eval.generate_samples=False"
    for size, words in (("4", "of 4 tokens"), ("[8,4]", "of 8, 4 tokens, drawn")):
        path = write(tmp_path / "a.ckpt", "algo=mdlm", f"algo.block_size={size}", quiet)
        lines = main.MODES["inspect"](compose("mode=inspect", f"{KEY}={path}"))
        assert lines["blocks"].startswith(words)


def test_inspect_of_a_folder_that_says_little(tmp_path, compose):
    write_released(tmp_path / "mdlm", "mdlm", vocab_size=35, length=32)
    about = read_checkpoint(str(tmp_path / "mdlm"), KEY)
    text = "\n".join(commands(about, str(tmp_path / "mdlm")))
    assert "data=text_files data.path=FILES" in text
    assert json.loads((tmp_path / "mdlm/config.json").read_text())["n_blocks"] == 2
