"""Evaluations as files of unknown origin, and those that are made."""

import json
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from evaluated import likelihood, read, samples, write
from refusals import refused

from checkpoints.about import likelihood as worth
from checkpoints.checkpoint import Checkpoint
from data.fingerprints import Fingerprint
from evaluation.records import check_path, likelihood_record, origin
from report import jobs
from report.jobs import Job, make
from report.runs import read_runs
from utils import RunStopped

# ---------------------------------------------------------------- files


WRONG = [
    ({"algo": 3}, "algo=3 is no str"),
    ({"checkpoint": "x"}, "checkpoint.path=None is no str"),
    ({"checkpoint/step": "1e6"}, "checkpoint.step='1e6' is no int"),
    ({"data/wrap": 1}, "data.wrap=1 is no bool"),
    ({"data/rows": None}, "data.rows=None is no int"),
    ({"ppl": "25"}, "ppl='25' is no int or float"),
    ({"ppl": -1.0}, "ppl=-1.0 is out of range"),
    ({"ppl_stderr": 1e999}, "ppl_stderr=inf is out of range"),
    ({"data/sha256": ["x" * 100]}, "data.sha256=['xxx"),
]


@pytest.mark.parametrize(("change", "message"), WRONG)
def test_fields_of_the_wrong_kind_are_named(change, message):
    refused(lambda: read(likelihood(**change)), "some.json is no evaluation", message)


def test_folders_files_and_globs(tmp_path, caplog):
    """In folders, what is no evaluation is passed over; of that which is broken, a
    line is logged."""
    one = write(tmp_path / "a/b/likelihood.json", likelihood())
    two = write(tmp_path / "a/samples.json", samples())
    write(tmp_path / "a/samples.json.parts/batch_000000.json", samples())
    write(tmp_path / "a/numbers.json", {"job": 1})
    write(tmp_path / "a/list.json", [1])
    write(tmp_path / "a/deep.json", "[" * 100_000)
    write(tmp_path / "a/nan.json", '{"mode": "ppl_eval", "ppl": NaN}')
    assert {x.path for x in read_runs([(None, str(tmp_path / "a"))])} == {one, two}
    assert "nan.json cannot be read (it holds NaN)" in caplog.text
    assert "deep.json cannot be read" in caplog.text
    pattern = str(tmp_path / "*/*/like*.json")
    (found,) = read_runs([(None, str(tmp_path / "a")), ("UDLM", pattern)])[:1]
    assert (found.path, found.model) == (one, "UDLM")  # the later entry says more


@pytest.mark.parametrize("folder", ["lr=[1e-4]", "a?", "*", "[!x]"])
def test_a_folder_is_no_pattern(tmp_path, folder):
    """Whatever is in its name, alone or with a pattern behind it."""
    write(tmp_path / "lr=1/likelihood.json", likelihood())
    one = write(tmp_path / folder / "x/likelihood.json", likelihood())
    for path in ("", "/x", "/x/likelihood.json", "/*/*.json", "/**/like*"):
        found = read_runs([(None, f"{tmp_path}/{folder}{path}")])
        assert [x.path for x in found] == [one]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read"),
        ('{"a": 1}', "neither of mode=ppl_eval nor of mode=sample_eval"),
        ("[1]", "neither of mode=ppl_eval"),
        ('"\ud800"'.encode("utf-8", "surrogatepass").decode("latin-1"), "neither"),
    ],
)
def test_a_file_that_is_named_must_be_one(tmp_path, content, message):
    path = write(tmp_path / "x.json", content)
    refused(lambda: read_runs([(None, path)]), f"report.runs='{path}'", message)


def test_nothing_there(tmp_path):
    for path in (tmp_path, tmp_path / "none.json", tmp_path / "*.json"):
        refused(
            lambda p=path: read_runs([(None, str(p))]), str(path), "likelihood.json"
        )


def test_likelihood_is_written_as_it_is_read(compose):
    """The standard error of one row is NaN, which is null."""
    config = compose("algo=mdlm", "eval.checkpoint_path=x.ckpt")
    about = origin(config, Checkpoint(step=7), has_ema=True)
    numbers = {"nll": 1.0, "bpd": 1.4, "ppl": 2.7}
    results = numbers | {f"{name}_stderr": float("nan") for name in numbers}
    results |= {"rows": 1, "tokens": 8, "estimator": "exact"}
    prints = Fingerprint(1, 8, "ef" * 32)
    expected = prints._replace(rows=2, sha256="cd" * 32)
    found = {"documents": 3, "published_documents": None}
    record = likelihood_record(config, results, prints, expected, about, found)
    one = read(json.loads(json.dumps(record, allow_nan=False)))
    assert one.numbers == {"ppl": (2.7, None)}
    assert one.settings["step"] == 7
    assert (one.settings["rows"], one.settings["tokens"]) == (1, 8)
    assert (one.settings["documents"], one.settings["published_documents"]) == (3, None)
    assert one.settings["sha256"] == "ef" * 32
    assert one.settings["expected_sha256"] == "cd" * 32
    assert one.settings["weights"] == "EMA"
    assert one.settings["distilled"] is None  # no config in the checkpoint
    assert one.settings["estimator"] == "exact"
    assert one.settings["precision"] == str(config.trainer.precision)


@pytest.mark.parametrize("path", [None, "", 3, "/", "nostore://a/b.json"])
def test_a_path_that_cannot_be_written_is_refused_early(path):
    refused(partial(check_path, path, "eval.results_path"), f"results_path={path!r}")


def test_a_path_that_can_be_written_is_none_of_these(tmp_path):
    check_path(str(tmp_path / "new" / "likelihood.json"), "eval.results_path")
    check_path("memory://likelihood.json", "eval.results_path")


def checkpoint_of(algo, **other) -> Checkpoint:
    return Checkpoint(config={"algo": {"name": algo}}, **other)


def rounds_of(algo, **keys) -> Checkpoint:
    return Checkpoint(config={"algo": {"name": algo, **keys}})


ORIGINS = [
    (checkpoint_of("duo"), "distilled", False),
    (checkpoint_of("distillation"), "distilled", True),
    (
        checkpoint_of("distillation", likelihood=worth("distillation")),
        "distilled",
        True,
    ),
    (checkpoint_of("duo", likelihood="comparable unless"), "distilled", None),
    (checkpoint_of("sdtt"), "distilled", True),
    (rounds_of("distillation", update_teacher_every=7), "update_teacher_every", 7),
    (rounds_of("sdtt", grow_dt_every=7), "update_teacher_every", 7),
    (checkpoint_of("sdtt"), "update_teacher_every", None),
    (checkpoint_of(["duo"]), "algo", None),
    (checkpoint_of("duo", step=SimpleNamespace()), "step", None),
    (checkpoint_of("duo"), "weights", "raw"),
    (checkpoint_of("duo", format="duo"), "weights", None),
    (checkpoint_of("duo", format="ours", weights_kind="EMA"), "weights", "EMA"),
]


@pytest.mark.parametrize(("checkpoint", "name", "expected"), ORIGINS)
def test_what_a_checkpoint_says_of_itself(compose, checkpoint, name, expected):
    about = origin(compose(), checkpoint, has_ema=False)
    assert about[name] == expected
    json.dumps(about)


def test_ema_weights_that_are_switched_off_are_raw(compose):
    config = compose("eval.disable_ema=True")
    assert origin(config, Checkpoint(), has_ema=True)["weights"] == "raw"


# ---------------------------------------------------------------- jobs


def job(tmp_path, name="duo-ptb", **overrides: str) -> Job:
    return Job(name, overrides, "eval.results_path", str(tmp_path / "x.ckpt"))


def test_a_job_has_another_file_for_other_settings_and_contents(tmp_path):
    (tmp_path / "x.ckpt").write_text("one")
    file = job(tmp_path, seed="1").file("r")
    assert file == job(tmp_path, seed="1").file("r")
    assert file != job(tmp_path, seed="2").file("r")
    (tmp_path / "x.ckpt").write_text("three")
    assert file != job(tmp_path, seed="1").file("r")


def test_paths_survive_the_command_line(tmp_path):
    from hydra.core.override_parser.overrides_parser import OverridesParser

    odd = "/a b/it's,{x}=[1]\\"
    words = job(tmp_path, **{"eval.checkpoint_path": odd}).command("f", tmp_path)[2:]
    parsed = OverridesParser.create().parse_overrides(words)
    found = {x.key_or_group: x.value() for x in parsed}
    assert found["eval.checkpoint_path"] == odd
    assert found["eval.results_path"] == "f"


@pytest.fixture
def runs(monkeypatch, tmp_path):
    """Commands that were run; a process writes its file unless it is of a bad job."""
    done = []

    def run(command, run_dir):
        given = next(x for x in command if x.startswith("eval.results_path="))
        file = Path(given.partition("=")[2])
        done.append(command)
        if file.name.startswith("bad-"):  # a digest may have these letters, too
            return 2, "no such data"
        write(file, likelihood())
        return None

    monkeypatch.setattr(jobs, "_run", run)
    return done


def test_what_is_there_is_not_made_again(runs, tmp_path):
    jobs = [job(tmp_path, name) for name in ("a", "b")]
    folder = str(tmp_path / "runs")
    files, failed = make(jobs[:1], folder)
    assert (len(files), failed, len(runs)) == (1, [], 1)
    files, failed = make(jobs, folder)
    assert (len(files), failed, len(runs)) == (2, [], 2)


def test_an_unfinished_file_is_gone_on_with(runs, tmp_path):
    one = job(tmp_path, "a")
    file = one.file(str(tmp_path))
    write(Path(file), samples(complete=False))
    assert not jobs.is_finished(file)
    make([one], str(tmp_path))
    assert len(runs) == 1


def test_a_failure_does_not_stop_the_others(runs, tmp_path):
    files, failed = make([job(tmp_path, x) for x in ("bad", "a")], str(tmp_path))
    assert len(files) == 1
    assert failed == ["bad: no such data"]
    with pytest.raises(RunStopped, match="1 of 1 evaluations failed; bad: no") as error:
        make([job(tmp_path, "bad")], str(tmp_path))
    assert error.value.status == 2


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("print('fine')", None),
        (
            "import sys; print('a'); sys.exit('error: no such data')",
            (1, "no such data"),
        ),
        ("import os; os._exit(7)", (7, "status 7")),
    ],
)
def test_a_process_that_fails_says_why(code, expected, tmp_path):
    """And where the rest of what it said is."""
    found = jobs._run([sys.executable, "-c", code], tmp_path / "job")
    log = tmp_path / "job" / "log.txt"
    assert log.exists()
    said = expected and (expected[0], f"{expected[1]} (log: {log})")
    assert found == said


def test_images_have_bits_and_no_perplexity():
    one = read(likelihood("cifar10", ppl=None, bpd=3.5, bpd_stderr=0.1))
    assert one.numbers == {"bpd": (3.5, 0.1)}
