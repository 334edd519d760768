"""The checks of the entry point; whole runs are in tests/integration."""

import errno
from functools import partial
from types import SimpleNamespace

import hypothesis.strategies as st
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import example, given
from refusals import refused
from rich.console import Console

import main
from algo import AR, MDLM
from cli.commandline import arguments, quoted
from cli.settle import check_batches, check_devices
from cli.values import check_numbers
from evaluation import samples
from evaluation.samples import load_judge, mauve_references
from models.device import device_of
from report import console
from report.console import report_sampling
from utils import ConfigError


def test_defaults_pass_every_check(compose):
    config = compose("trainer.accelerator=cpu", tiny=False)
    check_numbers(config)
    check_devices(config)
    check_batches(config)


@pytest.mark.parametrize(
    ("number", "status"),
    [
        *(("ENOSPC", 1), ("EDQUOT", 1), ("EFBIG", 1)),
        *(("EACCES", 2), ("EPERM", 2), ("EROFS", 2), ("EIO", None)),
    ],
)
def test_no_space_and_no_right_are_one_line(
    compose, monkeypatch, capsys, number, status
):
    """Also where it is a log that cannot be written; other faults keep their trace."""

    def write(config):
        raise OSError(getattr(errno, number), "cannot write", "metrics.csv")

    monkeypatch.setitem(main.MODES, "report", write)
    config = compose("mode=report")
    with pytest.raises((SystemExit, OSError)) as error:
        main.run.__wrapped__(config)
    assert isinstance(error.value, SystemExit if status else OSError)
    if status:
        assert error.value.code == status
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ")
        assert "metrics.csv" in line


@pytest.mark.parametrize(
    "error",
    [MemoryError(), RuntimeError("CUDA out of memory"), RuntimeError("not that")],
)
def test_no_memory_is_one_line(compose, monkeypatch, capsys, error):
    """Python's, a device's, an allocator's; other faults keep their trace."""

    def fill(config):
        raise error

    monkeypatch.setitem(main.MODES, "report", fill)
    is_fault = "not that" in str(error)
    with pytest.raises(RuntimeError if is_fault else SystemExit):
        main.run.__wrapped__(compose("mode=report"))
    if not is_fault:
        (line,) = capsys.readouterr().err.splitlines()
        assert "loader.batch_size" in line


def test_batches_must_make_up_the_global_one(compose):
    config = compose("loader.global_batch_size=16", "loader.batch_size=3")
    refused(
        partial(check_batches, config),
        "loader.global_batch_size=16",
        "batch_size=3",
        "18",
    )
    check_batches(compose("loader.global_batch_size=16", "loader.batch_size=4"))


def test_absent_devices_are_refused(compose, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    gpu = compose()
    for name in ("gpu", "cuda"):
        gpu.trainer.accelerator = name
        refused(partial(check_devices, gpu), f"trainer.accelerator={name!r}", "cpu")
    gpu.trainer.accelerator = "tpu"
    refused(partial(check_devices, gpu), "trainer.accelerator='tpu'", "auto")


def test_evaluation_runs_on_the_configured_device(compose):
    assert device_of(compose("trainer.accelerator=cpu")).type == "cpu"


# ---------------------------------------------------------------- the judge


@pytest.fixture
def judges(monkeypatch):
    """Arguments of every judge that is made; the judge itself is not."""
    made = []

    def judge(name, **arguments):
        made.append((name, arguments))
        return SimpleNamespace(name=name)

    monkeypatch.setattr(samples, "GenerativePerplexity", judge)
    return made


def test_the_judge_reads_texts_of_a_samples_length(compose, judges):
    """With windows a sample is longer than the model."""
    judge = "eval.gen_ppl_eval_model_name_or_path=mine"
    config = compose("eval.perplexity_batch_size=3", judge)
    assert load_judge(config, MDLM).name == "mine"
    windows = ("sampling.semi_ar=True", "sampling.stride_length=2", judge)
    load_judge(compose(*windows, "sampling.num_strides=5"), MDLM)
    (_, plain), (_, long) = judges
    assert (plain["max_length"], plain["batch_size"]) == (8, 3)
    assert long["max_length"] == 8 + 5 * 2
    assert plain["device"].type == "cpu"


def test_a_judge_is_taken_where_it_is_asked_for(compose, judges, caplog):
    """A default command downloads none, and says how to have one."""
    caplog.set_level("INFO")
    assert load_judge(compose("algo=ar"), AR) is None
    assert "eval.compute_generative_perplexity=True" in caplog.text
    caplog.clear()
    assert load_judge(compose("eval.ngram_order=2"), AR) is None
    assert not caplog.text
    assert not judges
    asked = compose("eval.compute_generative_perplexity=True")
    assert load_judge(asked, AR).name == "gpt2-large"


def test_a_judge_out_of_reach_is_missed_only_where_it_is_asked_for(
    compose, monkeypatch, caplog
):
    def judge(name, **arguments):
        raise ConfigError("no judge today.")

    monkeypatch.setattr(samples, "GenerativePerplexity", judge)
    config = compose("eval.gen_ppl_eval_model_name_or_path=mine")
    assert load_judge(config, MDLM) is None
    assert "no judge today. Going on without it." in caplog.text
    for asked in (
        ["eval.compute_generative_perplexity=True"],
        ["eval.mauve_references=a.txt", "eval.gen_ppl_eval_model_name_or_path=mine"],
    ):
        refused(partial(load_judge, compose(*asked), MDLM), "no judge today.")


def test_mauve_references_are_texts_of_a_file(compose, tmp_path, monkeypatch):
    monkeypatch.setattr(samples, "require_mauve", lambda: None)
    assert mauve_references(compose()) == []
    path = tmp_path / "texts.txt"
    path.write_text("one\ntwo\n")
    config = compose("eval.gen_ppl_eval_model_name_or_path=mine")
    config.eval.mauve_references = str(path)
    assert mauve_references(config)
    assert "one" in "".join(mauve_references(config))
    config.eval.mauve_references = str(tmp_path / "none.txt")
    refused(partial(mauve_references, config), "eval.mauve_references", "none.txt")


def test_mauve_needs_a_judge(compose):
    config = compose(
        "eval.mauve_references=a.txt", "eval.gen_ppl_eval_model_name_or_path=null"
    )
    refused(
        partial(mauve_references, config),
        "eval.mauve_references='a.txt'",
        "eval.gen_ppl_eval_model_name_or_path",
    )


# ---------------------------------------------------------------- reports


def test_the_table_has_every_number_with_its_error(compose, monkeypatch, capsys):
    """None is a dash; paths may hold what rich takes for markup."""
    monkeypatch.setattr(console, "console", Console(width=120))
    config = compose("sampling.predictor=psi")
    config.eval.generated_samples_path = "[a]/samples.json"
    results = {
        "generative_ppl": None,
        "generative_ppl_stderr": None,
        "entropy": 1.25,
        "entropy_stderr": 0.5,
        "num_samples": 6,
        "samples_per_second": 3.0,
        "mauve": 0.875,
        "ngram_ppl": None,
    }
    report_sampling(config, results)
    out = capsys.readouterr().out
    assert "6 samples, psi" in out
    rows = [line.split() for line in out.splitlines()]
    assert ["generative_ppl", "-"] in rows
    assert ["entropy", "1.2", "±", "0.5"] in rows
    assert ["mauve", "0.875"] in rows
    assert ["file", "[a]/samples.json"] in rows
    assert "num_samples" not in out
    assert "ngram_ppl" not in out
    report_sampling(config, results | {"ngram_ppl": 2.5, "ngram_ppl_stderr": 0.5})
    out = capsys.readouterr().out
    assert "  ngram_ppl           2.5 ± 0.5" in out.splitlines()
    assert "generative_ppl" not in out


# ---------------------------------------------------------------- the command line


def through_hydra(argument: str):
    """The value that Hydra's own parser reads from an argument."""
    return OverridesParser.create().parse_override(quoted(argument)).value()


# Printable, blanks and quotes included; "${" is an interpolation.
PRINTABLE = st.text(
    st.characters(exclude_categories=["C", "Zl", "Zp"])
    | st.sampled_from("\\'\" ,=[]{}"),
    min_size=1,
).filter(lambda text: "${" not in text)


def is_quoted_already(text: str) -> bool:
    """As in examples of Hydra's: such text goes to Hydra as it is."""
    return text[0] in "'\"" and text[-1] == text[0]


@pytest.mark.parametrize("key", ["prompt", "infill"])
@given(
    text=PRINTABLE.filter(
        lambda text: (
            text != "null" and not is_quoted_already(text) and not text.endswith("\\")
        )
    )
)
@example(text='It\'s "so", he said: {a, b} = [c] ~ 100%')
@example(text="a\\'b\\\\'c")
@example(text="1,2,3")
@example(text="True")
@example(text=" The [MASK:12] sat on [MASK:5].")
def test_prompts_survive_the_command_line(key, text):
    """Whatever the text, Hydra reads a string: this one."""
    assert through_hydra(f"sampling.{key}={text}") == text


@pytest.mark.parametrize("text", ["C:\\", '"So," he said, "be it."'])
def test_prompts_with_quotes_and_backslashes_at_the_end_survive(text):
    """A backslash at the end; quotes at both ends that are not a pair."""
    assert through_hydra(f"sampling.prompt={text}") == text


def test_a_prompt_of_null_is_none():
    assert quoted("sampling.prompt=null") == "sampling.prompt=null"
    assert through_hydra("sampling.prompt=null") is None


def test_text_in_quotes_is_hydras_already():
    """So that a command that quotes for Hydra works, and a second pass, as for the
    processes of several devices, changes nothing."""
    assert through_hydra("sampling.prompt='a, b'") == "a, b"
    once = quoted("sampling.prompt=It's, well")
    assert quoted(once) == once


@pytest.mark.parametrize(
    "argument",
    [
        "sampling.steps=8,16",
        "-m",
        "sampling.prompt_file=a b",
        "+wandb.offline=true",
        "a.prompt=x y",
        "prompt=x y",
    ],
)
def test_other_arguments_stay(argument):
    assert quoted(argument) == argument


@pytest.mark.parametrize("flag", ["-m", "--multirun"])
def test_the_flag_of_a_sweep_may_stand_anywhere(flag):
    """Hydra itself takes it for an override behind others."""
    others = ["mode=sample_eval", "sampling.steps=8,16", "--cfg=job"]
    for place in range(4):
        argv = [*others[:place], flag, *others[place:]]
        assert arguments(argv) == [flag, *others]
    assert arguments(["sampling.prompt=a b"]) == ["sampling.prompt='a b'"]
