"""What becomes of a sampling run's file when the run is killed, interrupted, started
again, or split over processes; the files of a sweep."""

import csv
import json
import os
import signal
import subprocess
import time

import pytest
import torch
from command_line import TINY, command, run

from cli.plugins import MEASURED
from cli.settle import algorithm_class
from data.tokenizers import get_tokenizer
from metrics.numbers import measured
from report.mode import report

NUM_BATCHES, BATCH_SIZE = 40, 2
SAMPLING = (
    *TINY,
    "mode=sample_eval",
    "algo=mdlm",
    "eval.gen_ppl_eval_model_name_or_path=null",
    "sampling.steps=16",
    f"sampling.num_sample_batches={NUM_BATCHES}",
    f"loader.eval_batch_size={BATCH_SIZE}",
    "hydra.run.dir=run",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("sample-files")


@pytest.fixture
def checkpoint(compose, folder) -> str:
    """An override that names random weights."""
    path = folder / "random.ckpt"
    if not path.exists():
        config = compose(*TINY, "algo=mdlm", tiny=False)
        torch.manual_seed(0)
        model = algorithm_class(config)(config, get_tokenizer(config))
        with torch.no_grad():
            model.backbone.output_embedding.weight.normal_()
        torch.save({"state_dict": model.state_dict()}, path)
    return f"eval.checkpoint_path={path}"


@pytest.fixture
def overrides(checkpoint):
    """Of a run that writes a JSON: overrides(path)."""
    return lambda path: (
        *SAMPLING,
        checkpoint,
        f"eval.generated_samples_path={path}",
    )


@pytest.fixture
def uninterrupted(overrides, folder) -> dict:
    """The JSON of a run that nothing disturbs."""
    path = folder / "whole.json"
    if not path.exists():
        run(*overrides(path), cwd=folder)
    return json.loads(path.read_text())


def stop(arguments, parts, signal_number: int, cwd) -> int:
    """Starts a run and sends a signal once three more batches are there.

    Returns:
        The status it ends with.
    """
    wanted = len(list(parts.glob("batch_*.json"))) + 3
    env = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command(*arguments), cwd=cwd, env=env, **quiet)
    try:
        limit = time.monotonic() + 120
        while len(list(parts.glob("batch_*.json"))) < wanted:
            assert process.poll() is None, "the run ended before it was stopped"
            assert time.monotonic() < limit
            time.sleep(0.002)
        process.send_signal(signal_number)
        return process.wait(timeout=60)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


@pytest.mark.slow
def test_a_run_that_is_stopped_goes_on(overrides, uninterrupted, folder):
    """Killed, then interrupted, then left alone: what was finished is kept each time,
    and the samples are those of a run that nobody stopped."""
    path, parts = folder / "stopped.json", folder / "stopped.json.parts"
    arguments = overrides(path)

    assert stop(arguments, parts, signal.SIGKILL, folder) == -signal.SIGKILL
    after_kill = sorted(parts.glob("batch_*.json"))
    assert 3 <= len(after_kill) < NUM_BATCHES
    for part in after_kill:
        assert len(json.loads(part.read_text())["generated_seqs"]) == BATCH_SIZE
    times = {part: part.stat().st_mtime_ns for part in after_kill}

    assert stop(arguments, parts, signal.SIGINT, folder) != 0
    results = json.loads(path.read_text())
    assert results["complete"] is False
    num_done = len(list(parts.glob("batch_*.json")))
    assert len(after_kill) < num_done < NUM_BATCHES
    assert results["num_samples"] == num_done * BATCH_SIZE
    whole = uninterrupted["generated_seqs"]
    assert results["generated_seqs"] == whole[: num_done * BATCH_SIZE]
    for part, written in times.items():  # nothing is drawn twice
        assert part.stat().st_mtime_ns == written

    run(*arguments, cwd=folder)
    results = json.loads(path.read_text())
    assert results["complete"] is True
    assert results["generated_seqs"] == whole
    assert results["entropy"] == uninterrupted["entropy"]
    assert not parts.exists()
    assert not list(folder.glob("*.partial"))

    before = path.read_bytes()
    done = run(*arguments, cwd=folder, status=2)
    assert "not overwritten" in done.stderr
    assert path.read_bytes() == before


@pytest.mark.slow
def test_two_processes_draw_what_one_draws(overrides, uninterrupted, folder):
    """A sample depends on the seed and on its batch, not on who draws it."""
    path = folder / "two.json"
    run(*overrides(path), "trainer.devices=2", cwd=folder)
    results = json.loads(path.read_text())
    assert results["generated_seqs"] == uninterrupted["generated_seqs"]
    for name in ("complete", "num_samples", "entropy", "evaluations", "settings"):
        assert results[name] == uninterrupted[name]
    assert not (folder / "two.json.parts").exists()


def test_a_sweep_ends_with_a_summary(checkpoint, tmp_path):
    """One table over its runs, the same as CSV, and a plot."""
    few = ("sampling.num_sample_batches=2", "sampling.steps=2,4")
    done = run("-m", *SAMPLING, checkpoint, *few, "hydra.sweep.dir=sweep", cwd=tmp_path)
    table = done.stdout[done.stdout.index("2 runs") :]
    for text in ("steps", "entropy", "evaluations", "±"):
        assert text in table
    folder = tmp_path / "sweep"
    with open(folder / "summary.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["job"] for row in rows] == ["0", "1"]
    assert [row["sampling.steps"] for row in rows] == ["2", "4"]
    columns = rows[0].keys()
    assert {"entropy", "entropy_stderr", "distinct_1", "evaluations"} <= columns
    assert not {"generative_ppl", "data", "model", "algo"} & columns
    for row in rows:
        assert 0 < float(row["evaluations"]) <= int(row["sampling.steps"]) + 1
        assert row["num_samples"] == "4"
        assert (folder / row["job"] / "samples.json").exists()
        error = float(row["entropy_stderr"])
        assert measured(float(row["entropy"]), error) in table
    assert (folder / "summary.png").read_bytes().startswith(b"\x89PNG\r\n")
    for name in ("csv", "md", "tex", "png", "pdf"):
        assert str(folder / f"summary.{name}") in table


def test_a_sweep_over_temperatures_ends_with_a_frontier(checkpoint, tmp_path, compose):
    """At the entropy of held-out text; a report over its folder has the same."""
    asked = ("eval.ngram_order=2", "eval.held_out=True", "sampling.steps=4")
    swept = ("sampling.temperature=0.1,1", "sampling.num_sample_batches=2")
    run("-m", *SAMPLING, checkpoint, *asked, *swept, "hydra.sweep.dir=s", cwd=tmp_path)
    content = json.loads((tmp_path / "s/0/samples.json").read_text())
    of_others = {name.removesuffix("_stderr") for name in content}
    assert of_others <= set(MEASURED)  # which no metric of a plug-in may be called
    assert content["draws"] == "float64"
    assert content["data"] == {"train": "synthetic", "valid": "synthetic", "wrap": True}
    about = content["held_out"]
    assert about["rows"] > 0
    assert about["entropy"] > 0
    assert about["ngram_ppl"] > 1
    with open(tmp_path / "s/frontier.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["row"] for row in rows] == ["run", "run", "at matched entropy"]
    assert {row["value"] for row in rows[:2]} == {"0.1", "1"}
    assert float(rows[2]["entropy"]) == about["entropy"]
    entropies = [float(row["entropy"]) for row in rows[:2]]
    is_within = min(entropies) <= about["entropy"] <= max(entropies)
    assert bool(rows[2]["ppl"]) == is_within
    where = f"report.path={tmp_path}/r"
    table = ("mode=report", "report.table=frontier", f"report.runs={tmp_path}/s")
    assert report(compose(*table, where)) == {"samplers": 1}
    assert (tmp_path / "r/report.csv").read_text() == (
        tmp_path / "s/frontier.csv"
    ).read_text()
    picture = tmp_path / "r/report.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
