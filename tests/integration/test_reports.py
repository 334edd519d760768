"""mode=ppl_eval leaves a file, mode=report reads it beside the published numbers."""

import csv
import json
import os
import signal
import time

import pytest
import torch
from command_line import TINY, run
from evaluated import likelihood, samples
from nursery import nursery

from cli.settle import algorithm_class
from data.tokenizers import get_tokenizer
from metrics.numbers import measured


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("reports")


@pytest.fixture
def checkpoint(compose, folder):
    """checkpoint(algorithm, ...): a file of random weights that says what it is."""

    def path(algo: str, **about) -> str:
        file = folder / f"{algo}.ckpt"
        if not file.exists():
            config = compose(*TINY, f"algo={algo}", tiny=False)
            torch.manual_seed(0)
            model = algorithm_class(config)(config, get_tokenizer(config))
            about = {"algo": {"name": algo, **about}}
            content = {"state_dict": model.state_dict(), "global_step": 7}
            torch.save(content | {"hyper_parameters": {"config": about}}, file)
        return str(file)

    return path


def rows_of(path) -> list[dict[str, str]]:
    with open(path / "report.csv", newline="") as file:
        return list(csv.DictReader(file))


def write(folder, *contents):
    """The files of a folder."""
    folder.mkdir(parents=True)
    for index, content in enumerate(contents):
        (folder / f"{index}.json").write_text(json.dumps(content))


def picture(path):
    """Pixels of a PNG; fails if it is none."""
    from matplotlib import image

    return image.imread(path / "report.png")


# ---------------------------------------------------------------- from a checkpoint


def test_an_evaluation_is_a_file_that_a_report_reads(checkpoint, tmp_path):
    evaluated = run(
        *TINY,
        "mode=ppl_eval",
        "algo=mdlm",
        f"eval.checkpoint_path={checkpoint('mdlm')}",
        "hydra.run.dir=evaluated",
        cwd=tmp_path,
    )
    path = tmp_path / "evaluated" / "likelihood.json"
    content = json.loads(path.read_text())
    for value in (
        measured(content["ppl"], content["ppl_stderr"]),
        content["data"]["sha256"][:16],
        str(path),
    ):
        assert value in evaluated.stdout
    data = content["data"]
    assert (data["valid"], data["rows"], data["tokens"]) == ("synthetic", 64, 64 * 32)
    assert content["checkpoint"]["step"] == 7
    assert content["checkpoint"]["weights"] == "raw"
    assert content["ppl_stderr"] > 0
    done = run("mode=report", "report.runs=evaluated", "hydra.run.dir=r", cwd=tmp_path)
    assert "no published number for data 'synthetic'" in done.stdout
    (row,) = rows_of(tmp_path / "r" / "report")
    assert float(row["measured"]) == content["ppl"]
    assert (row["verdict"], row["file"]) == ("not comparable", str(path))


def test_samples_say_what_their_checkpoint_is(checkpoint, tmp_path):
    """A distilled one is no base model, though it is sampled with algo=duo_base."""
    path = checkpoint("distillation", update_teacher_every=7)
    run(
        *TINY,
        "mode=sample_eval",
        "algo=duo_base",
        f"eval.checkpoint_path={path}",
        "eval.gen_ppl_eval_model_name_or_path=null",
        "hydra.run.dir=s",
        cwd=tmp_path,
    )
    run("mode=report", "report.runs=s", "report.path=out", cwd=tmp_path)
    (row,) = rows_of(tmp_path / "out")
    names = ("table", "model", "round", "metric")
    assert [row[x] for x in names] == ["distillation", "Duo+DCD", "1", "entropy"]
    assert row["verdict"] == "not comparable"
    for reason in ("tokenizer is synthetic, not gpt2", "length is 32", "raw weights"):
        assert reason in row["reason"]


# ---------------------------------------------------------------- whole tables


def test_published_settings_are_compared_in_all_tables(tmp_path):
    greedy = {"settings/sampling/noise_removal": "greedy"}
    write(
        tmp_path / "runs",
        likelihood(),
        likelihood(algo="mdlm", ppl=23.0),
        likelihood(ppl=30.27, **{"checkpoint/distilled": True}),
        likelihood("ptb", 95.0),
        likelihood("lambada", 49.8),
        *(samples(steps, ppl) for steps, ppl in ((8, 150.0), (32, 96.0), (1024, 78.0))),
        samples(8, 70.0, 5.3, trained_as="distillation", **greedy),
    )
    done = run("mode=report", "report.runs=[runs]", "report.path=out", cwd=tmp_path)
    for name in ("test_ppl", "zero_shot", "gen_ppl", "distillation"):
        assert f"{name}: " in done.stdout
    assert "Rule: a measurement agrees" in done.stdout
    rows = rows_of(tmp_path / "out")
    words = {
        (row["model"], row["dataset"], row["steps"], row["metric"], row["measured"]): (
            row["paper"],
            row["verdict"],
        )
        for row in rows
        if row["source"].startswith("D1")
    }
    assert words == {
        ("Duo", "OWT", "", "ppl", "25.2"): ("25.2", "agrees"),
        ("MDLM", "OWT", "", "ppl", "23.0"): ("23.2", "agrees"),
        ("Duo", "OWT", "", "ppl", "30.27"): ("25.2", "not comparable"),
        ("Duo", "PTB", "", "ppl", "95.0"): ("89.35", "worse"),
        ("Duo", "Lambada", "", "ppl", "49.8"): ("49.78", "agrees"),
        ("Duo", "OWT", "8", "ppl", "150.0"): ("198.27", "better"),
        ("Duo", "OWT", "8", "entropy", "5.57"): ("5.57", "agrees"),
        ("Duo", "OWT", "32", "ppl", "96.0"): ("96.19", "agrees"),
        ("Duo", "OWT", "32", "entropy", "5.57"): ("5.57", "agrees"),
        ("Duo", "OWT", "1024", "ppl", "78.0"): ("77.69", "agrees"),
        ("Duo", "OWT", "1024", "entropy", "5.57"): ("5.55", "agrees"),
        ("Duo+DCD, greedy tail", "OWT", "8", "ppl", "70.0"): ("69.58", "agrees"),
        ("Duo+DCD, greedy tail", "OWT", "8", "entropy", "5.3"): ("5.30", "agrees"),
    }
    text = (tmp_path / "out/report.md").read_text()
    assert (
        "| Duo | 95.00 ± 0.05 (89.35) | 49.80 ± 0.05 (49.78) |" in text
    )  # as the paper
    assert "Rule: a measurement agrees" in text
    assert "abab" * 16 in text
    pixels = picture(tmp_path / "out")
    assert pixels.shape[0] > 1000
    assert len({tuple(color) for color in pixels.reshape(-1, pixels.shape[-1])}) > 50


def test_a_table_that_is_asked_for_lists_what_is_missing(tmp_path):
    write(tmp_path / "runs", likelihood("ptb", 89.0), likelihood())
    run(
        "mode=report",
        "report.table=zero_shot",
        "report.runs='UDLM=runs'",
        "report.path=out",
        cwd=tmp_path,
    )
    rows = rows_of(tmp_path / "out")
    assert {row["table"] for row in rows} == {"zero_shot"}
    (measured,) = [row for row in rows if row["measured"]]
    assert (measured["model"], measured["paper"]) == ("UDLM", "112.82")
    assert measured["verdict"] == "better"
    missing = [row for row in rows if row["verdict"] == "not measured"]
    assert len(missing) == len(rows) - 1 > 50


# ---------------------------------------------------------------- making evaluations


@pytest.mark.slow
def test_missing_evaluations_are_made_once(checkpoint, tmp_path):
    """Stopped by Ctrl-C, gone on with, and then only read."""
    overrides = [x for x in TINY if not x.startswith(("data=", "sampling"))]
    command = (
        "mode=report",
        "report.table=test_ppl",
        f"+report.checkpoints.mdlm={checkpoint('mdlm')}",
        "report.data=[synthetic]",
        f"report.overrides={overrides}",
        "report.path=out",
    )
    outputs = tmp_path / "stdout", tmp_path / "stderr"
    pid = nursery().start([*command, "hydra.run.dir=one"], tmp_path, *outputs)
    limit = time.monotonic() + 120
    while not list(tmp_path.glob("one/jobs/*/log.txt")) and time.monotonic() < limit:
        time.sleep(0.02)
    os.killpg(pid, signal.SIGINT)
    assert nursery().wait(pid) == 130
    assert "0 of 1 evaluations are in" in outputs[1].read_text()
    run(*command, "hydra.run.dir=two", cwd=tmp_path)
    (made,) = tmp_path.glob("out/runs/test_ppl/mdlm-synthetic-*.json")
    (measured,) = [row for row in rows_of(tmp_path / "out") if row["measured"]]
    assert (measured["model"], measured["file"]) == ("MDLM", str(made))
    assert float(measured["measured"]) == json.loads(made.read_text())["ppl"]
    written = made.stat().st_mtime_ns
    run(*command, "hydra.run.dir=three", cwd=tmp_path)
    assert made.stat().st_mtime_ns == written
    assert not (tmp_path / "three" / "jobs").exists()


# ---------------------------------------------------------------- mistakes


def test_mistake_is_one_line(tmp_path):
    overrides = ("mode=report", "report.table=zeroshot", "hydra.run.dir=r")
    done = run(*overrides, cwd=tmp_path, status=2)
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "report.table='zeroshot'" in error
    assert "'zero_shot'" in error
    assert "Traceback" not in done.stderr + done.stdout
    assert not list(tmp_path.rglob("report.*"))
