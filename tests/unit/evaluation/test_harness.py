"""Arguments, the config of a checkpoint, and the adapter, without the command."""

import sys
from types import SimpleNamespace

import pytest
import torch
from exported import export, save_tiny
from refusals import refused
from released import write_released

from evaluation import harness
from evaluation.harness import Arguments, command_line, load, request_of

DATA = ("data=docstrings", "model.length=16")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint and its model."""
    path = tmp_path_factory.mktemp("harness") / "last.ckpt"
    return path, save_tiny(path, "algo=mdlm", *DATA)


def arguments(path, **given) -> Arguments:
    return Arguments.parse({"checkpoint": str(path), "device": "cpu", **given})


# ---------------------------------------------------------------- arguments


def test_arguments_are_checked():
    def parse(**given):
        return lambda: Arguments.parse({"checkpoint": "a", **given})

    refused(parse(num_draw=3), "num_draw", "'num_draws'")
    refused(parse(max_batch_size=3), "max_batch_size", "batch_size")
    refused(parse(batch_size="auto"), "batch_size='auto'", "whole number")
    refused(parse(num_draws=0), "num_draws=0")
    refused(parse(num_draws=True), "num_draws=True")
    refused(parse(max_gen_toks=1.5), "max_gen_toks=1.5")
    refused(parse(seed=-1), "seed=-1")
    refused(parse(suffix_only="yes"), "suffix_only='yes'", "True")
    refused(lambda: Arguments.parse({}), "checkpoint is empty")


def test_arguments_become_overrides():
    given = Arguments.parse(
        {
            "checkpoint": 12,
            "overrides": "sampling.steps=4;algo=mdlm 'data.path=a b'",
            "tokenizer": "my folder",
            "device": "cuda:1",
            "batch_size": "16",
        }
    )
    assert given.all_overrides() == [
        "sampling.steps=4",
        "algo=mdlm",
        "data.path=a b",
        "data.tokenizer_name_or_path='my folder'",
        "trainer.accelerator=cuda",
    ]
    assert (given.checkpoint, given.batch_size, given.suffix_only) == ("12", 16, True)
    assert Arguments.parse({"checkpoint": "a", "seed": 0}).all_overrides() == ["seed=0"]


def test_the_command_names_our_model():
    ours = ["--tasks", "a", "--model", "discrete_diffusion"]
    assert command_line(["--tasks", "a"]) == ours
    for other in (["ls", "tasks"], ["--model", "hf"], ["--model=hf"], ["-h"], []):
        assert command_line(other) == other


@pytest.fixture(scope="module")
def adapter():
    """The class that lm_eval makes of our name."""
    pytest.importorskip("lm_eval", reason=harness.INSTALL)
    harness.register()
    from lm_eval.api.registry import get_model

    return get_model(harness.NAME)


def test_lm_evals_own_device_is_none(monkeypatch, adapter):
    """It gives one whether or not the machine has it; the best is taken instead."""
    from lm_eval.config.evaluate_config import EvaluatorConfig

    assert EvaluatorConfig(tasks=["a"]).device == harness.DEFAULT_DEVICE
    model = SimpleNamespace(device=torch.device("cpu"))
    monkeypatch.setattr(harness, "load", lambda _: SimpleNamespace(model=model))
    made = adapter.create_from_arg_obj
    given, extra = {"checkpoint": "a"}, {"device": harness.DEFAULT_DEVICE}
    monkeypatch.setattr(sys, "argv", ["harness", "--tasks", "a"])
    assert made(given, extra).arguments.device is None
    assert made(given, {"device": "cuda:1"}).arguments.device == "cuda:1"
    assert made({**given, "device": "cuda:0"}, extra).arguments.device == "cuda:0"
    for named in ("--device", "--dev", "--device=cuda:0"):
        monkeypatch.setattr(sys, "argv", ["harness", "--tasks", "a", named])
        assert made(given, extra).arguments.device == "cuda:0"


def test_overrides_that_nothing_reads_are_refused():
    refused(lambda: harness.compose(["+sampling.colour=1"]), "sampling.colour")
    assert harness.compose(["+wandb.offline=true"]).wandb.offline


def test_what_a_task_asks_to_write():
    assert request_of("a", {}, 9) == ("a", (), 9)
    assert request_of("a", {"until": "\n"}, 9) == ("a", ("\n",), 9)
    asked = {"until": ["x", "y"], "max_gen_toks": 3, "do_sample": False}
    assert request_of("a", asked, 9) == ("a", ("x", "y"), 3)
    assert request_of("a", {"until": None, "max_new_tokens": "4"}, 9) == ("a", (), 4)


def test_without_lm_eval_a_line_says_how_to_install_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.__main__", None)
    with pytest.raises(SystemExit) as end:
        harness.main()
    assert end.value.code == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert harness.INSTALL in line


def test_a_mistake_ends_the_command_with_a_line(monkeypatch, capsys):
    def evaluate():
        load(Arguments.parse({"checkpoint": "no.ckpt"}))

    monkeypatch.setattr(harness, "register", lambda: evaluate)
    monkeypatch.setattr(sys, "argv", ["harness.py", "--tasks", "a"])
    with pytest.raises(SystemExit) as end:
        harness.main()
    assert end.value.code == 2
    expected = "error: checkpoint='no.ckpt': there is no such file.\n"
    assert capsys.readouterr().err == expected
    assert sys.argv[1:] == ["--tasks", "a", "--model", harness.NAME]


# ---------------------------------------------------------------- the model


def test_a_checkpoint_says_what_it_is(saved):
    """Algorithm, sizes, length and tokenizer are its own; EMA weights are scored."""
    path, model = saved
    scorer = load(arguments(path, num_draws=3, batch_size=5, suffix_only=False))
    assert type(scorer.model) is type(model)
    for key in ("length", "hidden_size", "n_blocks"):
        assert scorer.model.config.model[key] == model.config.model[key]
    assert scorer.model.config.data.tokenizer_name_or_path == "text8"
    settings = (scorer.num_draws, scorer.batch_size, scorer.suffix_only)
    assert settings == (3, 5, False)
    with scorer.model.eval_weights():
        for got, expected in zip(
            scorer.model.parameters(), model.parameters(), strict=True
        ):
            assert torch.equal(got, expected)


def test_overrides_come_before_what_a_checkpoint_says(saved):
    path, _ = saved
    overrides = "model.length=8 sampling.steps=3 algo.ignore_bos=True noise=cosine"
    scorer = load(arguments(path, overrides=overrides, seed=5, tokenizer="text8"))
    config = scorer.model.config
    assert (config.model.length, config.sampling.steps, config.seed) == (8, 3, 5)
    assert (config.algo.ignore_bos, config.noise.type) == (True, "cosine")
    assert config.model.hidden_size == 32


def test_a_checkpoint_that_does_not_say_needs_overrides(tmp_path):
    path = tmp_path / "silent.ckpt"
    save_tiny(path, "algo=mdlm", *DATA, config_of="algo")
    refused(lambda: load(arguments(path)), "no algorithm", "overrides='algo=...'")
    assert load(arguments(path, overrides="algo=mdlm")).model.has_mask


def test_folders_of_the_hub_are_read(saved, tmp_path):
    path, _ = saved
    export(path, tmp_path / "ours")
    pairs = [("return", " it")]
    expected = load(arguments(path, num_draws=2)).score(pairs)
    assert load(arguments(tmp_path / "ours", num_draws=2)).score(pairs) == expected
    write_released(tmp_path / "theirs", "mdlm", vocab_size=35, length=16)
    theirs = load(arguments(tmp_path / "theirs", tokenizer="text8", num_draws=2))
    assert theirs.score(pairs)[0].log_likelihood < 0
    assert not (tmp_path / "theirs" / "RAN").exists()


def test_mistakes_are_one_line(saved, tmp_path):
    path, _ = saved

    def given(**more):
        return lambda: load(arguments(path, **more))

    refused(
        lambda: load(arguments(tmp_path / "no.ckpt")), "checkpoint=", "no such file"
    )
    refused(given(overrides="algo=mdml"), "algo='mdml'", "'mdlm'")
    refused(given(overrides="sampling.stepps=3"), "sampling.stepps", "sampling.steps")
    refused(given(overrides="algo='mdlm"), "algo='mdlm", "quotation")
    refused(given(overrides="algo"), "overrides='algo")
    refused(given(overrides="seed=["), "overrides='seed=[")
    refused(given(device="cpu:z"), "device='cpu:z'")
    refused(given(overrides="mode=train"), "mode has no meaning here")
    refused(given(overrides="sampling.prompt=a"), "sampling.prompt")
    refused(given(overrides="sampling.steps=0"), "sampling.steps=0")
    refused(given(overrides="model.n_blocks=3"), "eval.checkpoint_path=", "missing")
    refused(given(device="tpu"), "trainer.accelerator='tpu'", "cpu")
    refused(given(tokenizer="no-such-tokenizer"), "no-such-tokenizer", "text8")


# ---------------------------------------------------------------- the adapter


def test_a_model_of_images_is_refused(tmp_path):
    """Every task is of text."""
    own = ("data=images", "data.size=4", "model.length=12")
    save_tiny(tmp_path / "a.ckpt", "algo=mdlm", *own)
    call = lambda: load(arguments(tmp_path / "a.ckpt"))  # noqa: E731
    refused(call, "a.ckpt", "images", "data.tokenizer_name_or_path=pixels")


def test_the_adapter_answers_every_kind_of_request(saved, caplog, adapter):
    given = {"checkpoint": str(saved[0]), "num_draws": 2, "batch_size": 4}
    given["overrides"] = "sampling.steps=2"
    extra = {"batch_size": 1, "max_batch_size": None, "device": "cpu"}
    lm = adapter.create_from_arg_obj(given, extra)
    assert lm.scorer.batch_size == 4
    assert lm.device.type == "cpu"

    def requests(*args):
        return [SimpleNamespace(args=x) for x in args]

    (value, is_greedy), _ = lm.loglikelihood(requests(("a", "b"), ("a", "c")))
    assert value < 0
    assert is_greedy in (True, False)
    assert lm.loglikelihood_rolling(requests(("abc",)))[0] < 0
    settings = {"until": ["\n"], "max_gen_toks": 4, "do_sample": False}
    texts = lm.generate_until(requests(("ab", settings), ("cd", settings)))
    assert [type(text) for text in texts] == [str, str]
    assert "do_sample" in caplog.text
    refused(lambda: lm.apply_chat_template([]), "no template")
    assert lm.tokenizer_name == "text8"
