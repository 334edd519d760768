"""The benchmarks and the profile run, at sizes that measure nothing, and write what
they say; one mistake on their command line.
"""

import collections
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from command_line import ROOT

from benchmarks import bench_scan, block_table, cases, distill_table, scale
from benchmarks.bench import VARIANTS, main, parse
from data.tokenizers import bytes_tokenizer
from sampling.registry import SAMPLERS
from utils import register_resolvers

TINY = (
    *("--vocab-size", "40", "--scaling-vocab-size", "40", "--length", "16"),
    *("--hidden-size", "16", "--blocks", "1", "--heads", "2", "--rounds", "1"),
    *("--sampling-steps", "2"),
)


def bench(script: str, *args: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "benchmarks" / script), *args]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def run_sections(tmp_path, *sections: str, algorithms=("ar", "d3pm")) -> dict:
    done = bench(
        "bench.py",
        *TINY,
        *("--sections", *sections),
        *("--algorithms", *algorithms, "--scaling-algorithms", "mdlm"),
        *("--output", str(tmp_path)),
    )
    assert done.returncode == 0, done.stderr
    data = json.loads((tmp_path / "cpu.json").read_text())
    assert data["setting"]["commit"]
    assert data["setting"]["torch"]
    assert set(data["results"]) == set(sections)
    table = (tmp_path / "cpu.md").read_text()
    assert all(row.count("|") >= 2 for row in table.splitlines() if row[:1] == "|")
    return data["results"]


@pytest.mark.slow
def test_a_section_measures_and_reports(tmp_path):
    results = run_sections(tmp_path, "loading")
    assert results["loading"][0]["tokens_per_s"] > 0


@pytest.mark.slow
def test_start_up_and_a_shared_machine_are_measured(tmp_path):
    sizes = ("--repeats", "1", "--updates", "2", "--busy", "0")
    done = bench("bench_machine.py", *sizes, "--output", str(tmp_path))
    assert done.returncode == 0, done.stderr
    numbers = json.loads((tmp_path / "machine.json").read_text())
    assert all(row["cpu"] > 0 for row in numbers["start_up"])
    assert [row["code"] for row in numbers["training"]] == ["ours", "plain"]
    assert "| no such file |" in (tmp_path / "machine.md").read_text()


@pytest.mark.slow
def test_two_trees_are_compared(tmp_path):
    sizes = ("--length", "8", "--hidden-size", "16", "--blocks", "1", "--heads", "2")
    more = ("--vocab-size", "40", "--sampling-steps", "2", "--turns", "2")
    done = bench("compare.py", str(ROOT), *sizes, *more, "--output", str(tmp_path))
    assert done.returncode == 0, done.stderr
    rows = [x for x in (tmp_path / "compare.md").read_text().splitlines() if "|" in x]
    assert len(rows) == 2 + 5 + 5 + 4
    assert all(float(row.split("|")[-2]) > 0 for row in rows[2:])


@pytest.mark.slow
def test_blocks_are_measured(tmp_path):
    sizes = ("--lengths", "8", "--sizes", "4", "--hidden-size", "16", "--blocks", "1")
    more = ("--heads", "2", "--vocab-size", "40", "--rounds", "1", "--uncached")
    words = (*sizes, *more, "--tokens", "16", "--output", str(tmp_path))
    done = bench("block_cost.py", *words)
    assert done.returncode == 0, done.stderr
    numbers = json.loads((tmp_path / "block_cost.json").read_text())
    rows = numbers["training"], numbers["sampling"]
    assert [len(x) for x in rows] == [1 + 2 * 2, 1 + 2 * 3]
    for row in (*rows[0], *rows[1]):
        assert row["ms_a_token"] > 0
        assert row["step_mb"] > 0
        assert (row["ratio"] == 1) == (row["way"] == "whole rows")
    assert all(row["evaluations"] > 0 for row in rows[1])


@pytest.mark.slow
def test_scans_are_measured(tmp_path):
    sizes = (
        "--lengths",
        "3",
        "40",
        "--channels",
        "4",
        "--states",
        "2",
        "--rounds",
        "1",
    )
    done = bench("bench_scan.py", *sizes, "--output", str(tmp_path))
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "scan.json").read_text())["rows"]
    scans = ("ours", "unbound", "loop")
    found = [(row["length"], row["scan"]) for row in rows]
    assert found == [(length, scan) for length in (3, 40) for scan in scans]
    numbers = ("forward_ms", "backward_ms", "step_mb")
    assert all(row[name] > 0 for row in rows for name in numbers)
    assert "| 40 | loop |" in (tmp_path / "scan.md").read_text()


def test_scans_that_are_compared_are_the_same():
    args = SimpleNamespace(batch_size=2, channels=3, states=4, device="cpu")
    tensors = bench_scan.inputs(args, 9)
    found = [scan(*tensors) for scan in bench_scan.SCANS.values()]
    for other in found[1:]:
        torch.testing.assert_close(other, found[0])


@pytest.mark.slow
def test_the_other_sections_measure_and_report(tmp_path):
    results = run_sections(tmp_path, "train", "evaluation", "sampling", "scaling")
    assert [row["algorithm"] for row in results["sampling"]] == ["ar"]
    assert all(row["speed"] > 0 for row in results["sampling"])
    assert all(row["ours_step_mb"] > 0 for row in results["sampling"])
    for section in ("train", "evaluation"):
        assert [r["algorithm"] for r in results[section]] == ["ar", "d3pm"]
        assert all(row["speed"] > 0 for row in results[section])
    assert all(row["plain_peak_mb"] > 50 for row in results["train"])
    axes = {row["axis"] for row in results["scaling"]}
    assert axes == {"batch_size", "length", "vocab_size", "loss_tokens"}
    assert (tmp_path / "cpu.png").stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_predictor_is_measured(tmp_path):
    algorithms = ("ar", "mdlm", "sedd", "duo_base")
    rows = run_sections(tmp_path, "sampling", algorithms=algorithms)["sampling"]
    measured = {(row["algorithm"], row["predictor"]) for row in rows}
    assert {("duo_base", "psi"), ("mdlm", "first_hitting")} <= measured
    # One pass of a generator is a part of its train step.
    assert {predictor for _, predictor in measured} == SAMPLERS.keys() - {"one_step"}
    assert all(row["speed"] > 0 for row in rows)


@pytest.mark.parametrize("index", range(len(cases.TRAINING)))
def test_soft_inputs_are_those_of_the_plain_way(index):
    """Losses of both, before any training: means of 40 batches of 64 tokens agree
    within 4 standard errors."""
    register_resolvers()
    args = parse([*TINY, "--curriculum-batch", "4"])
    losses = {}
    for variant in VARIANTS:
        case = cases.TRAINING[index]
        model, x0 = cases.curriculum_model(case, args)
        torch.manual_seed(1)  # what the heads start from is 0, and so would be KL
        for parameter in model.parameters():
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.3)
        values = []
        for seed in range(40):
            model.config.seed = seed
            if variant == "plain":
                loss = case.nll(model, x0).mean()
            else:
                batch = {"input_ids": x0, "attention_mask": torch.ones(x0.shape)}
                loss = model.loss(batch).loss
            values.append(float(loss.detach()))
        losses[variant] = torch.tensor(values)
    one, two = losses.values()
    error = ((one.var() + two.var()) / 40).sqrt()
    assert abs(one.mean() - two.mean()) < 4 * error
    cases.curriculum_step(str(index), "ours", args)()
    cases.curriculum_step(str(index), "plain", args)()


@pytest.mark.slow
def test_soft_inputs_and_the_operator_are_measured(tmp_path):
    results = run_sections(tmp_path, "curriculum", "distillation", "integral")
    assert len(results["curriculum"]) == len(cases.CURRICULUM)
    assert len(results["distillation"]) == len(cases.DISTILLATION)
    for rows in results.values():
        assert all(row["speed"] > 0 for row in rows)


@pytest.mark.slow
def test_two_processes_are_compared_with_one(tmp_path):
    (row,) = run_sections(tmp_path, "processes")["processes"]
    assert 0 < row["efficiency"] < 2


@pytest.mark.slow
def test_the_profile_names_the_phases_of_a_step(tmp_path):
    trace = tmp_path / "trace.json"
    args = ("--algorithm", "mdlm", "--trace", str(trace))
    args += ("--picture", str(tmp_path / "phases"))
    done = bench("profile_step.py", *TINY, *args)
    assert done.returncode == 0, done.stderr
    for phase in ("corrupt", "trunk, forward", "head and loss", "optimiser", "EMA"):
        assert phase in done.stdout
    assert json.loads(trace.read_text())["traceEvents"]
    assert (tmp_path / "phases.png").stat().st_size > 5_000


def test_an_unknown_algorithm_is_one_line(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bench.py", "--algorithms", "mdml"])
    with pytest.raises(SystemExit, match=r"mdml.*duo_base"):
        main()


@pytest.mark.slow
def test_packing_is_measured(tmp_path):
    """Ours and plain code make as many rows; both are reported."""
    bytes_tokenizer().save_pretrained(tmp_path / "tokenizer")
    done = bench(
        "bench_data.py",
        *("--tokenizer", str(tmp_path / "tokenizer")),
        *("--documents", "50", "--processes", "2"),
        *("--output", str(tmp_path)),
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "data.json").read_text())
    assert [(row["code"], row["num_proc"]) for row in rows] == [
        *(("plain", 1), ("ours", 2)),
    ]
    assert len({row["rows"] for row in rows}) == 1
    assert (tmp_path / "data.md").read_text().count("\n|") == 2 + len(rows)


@pytest.mark.slow
def test_distillations_side_by_side(tmp_path):
    """A table of all models; what is finished is not done again."""
    sizes = ("model.hidden_size=16", "model.n_blocks=1", "model.n_heads=2")
    sizes += ("trainer.max_steps=2", "trainer.val_check_interval=2")
    sizes += ("sampling.num_sample_batches=1", "loader.eval_batch_size=4")
    places = ("--folder", str(tmp_path / "runs"), "--output", str(tmp_path))
    done = bench("distill_table.py", *sizes, *places)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "distillation.json").read_text())["results"]
    counts = collections.Counter(row["model"] for row in results)
    assert counts == dict.fromkeys(distill_table.MODELS, len(distill_table.STEPS))
    (one,) = (x for x in results if (x["model"], x["steps"]) == ("dimo", 1))
    assert one["evaluations"] == 1
    logs = {path: path.stat().st_mtime_ns for path in tmp_path.glob("runs/**/log.txt")}
    again = bench("distill_table.py", *sizes, *places)
    assert again.returncode == 0, again.stderr
    assert logs == {path: path.stat().st_mtime_ns for path in logs}


@pytest.mark.slow
def test_perplexity_against_the_size_of_blocks(tmp_path):
    """Rows and columns of the table; what is finished is not done again."""
    sizes = ("model.hidden_size=16", "model.n_blocks=1", "model.n_heads=2")
    sizes += ("trainer.max_steps=2", "trainer.val_check_interval=2")
    sizes += ("data.valid_fraction=0.01",)
    places = ("--folder", str(tmp_path / "runs"), "--output", str(tmp_path))
    done = bench("block_table.py", *sizes, *places)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "block.md").read_text()
    for name in ("MDLM", "DUO_BASE"):
        (row,) = (x for x in text.splitlines() if x.startswith(f"| {name} |"))
        assert row.count(" ± ") == len(block_table.SIZES) + 1
        assert f"- {name}, from L' = 64 to 1 and AR: " in text
    assert (tmp_path / "block.png").read_bytes().startswith(b"\x89PNG")
    logs = {path: path.stat().st_mtime_ns for path in tmp_path.glob("runs/**/log.txt")}
    assert len(logs) == len(block_table.runs())
    again = bench("block_table.py", *sizes, *places)
    assert again.returncode == 0, again.stderr
    assert logs == {path: path.stat().st_mtime_ns for path in logs}


def test_a_bound_that_rises_with_smaller_blocks_is_named():
    """By more than two standard errors of the difference."""
    ppl = {"mdlm-64": 30, "mdlm-16": 29, "mdlm-4": 30.4, "mdlm-1": 34, "ar": 33}
    results = {name: block_table.Result(x, 0.5) for name, x in ppl.items()}
    said = block_table.verdict("mdlm", results)
    assert said.endswith("from L' = 64 to 1 and AR: L' = 1 is above L' = 4 by 3.60.")
    results["mdlm-1"] = block_table.Result(31, 0.5)
    results["ar"] = block_table.Result(32.9, 0.9)
    said = block_table.verdict("mdlm", results)
    assert said.endswith("none rises by more than two standard errors.")


@pytest.mark.slow
def test_the_best_size_for_a_budget(tmp_path):
    """All curves that are asked for are in the table, and what is finished stays."""
    sizes = ("training.flops=1e-9", "data.valid_fraction=0.01", "--curves", "duo_base")
    places = ("--folder", str(tmp_path / "runs"), "--output", str(tmp_path))
    done = bench("isoflop_table.py", *sizes, *places)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "isoflop.md").read_text()
    assert text.count("| duo_base | 1e+09 |") == 1 + 3 + 5 + 3  # the optimum, and runs
    assert (tmp_path / "isoflop.png").read_bytes().startswith(b"\x89PNG")
    logs = {path: path.stat().st_mtime_ns for path in tmp_path.glob("runs/**/log.txt")}
    again = bench("isoflop_table.py", *sizes, *places)
    assert again.returncode == 0, again.stderr
    assert logs == {path: path.stat().st_mtime_ns for path in logs}


@pytest.mark.slow
def test_samplers_at_the_entropy_of_held_out_text(tmp_path):
    """A checkpoint that is given is not trained; each sampler is in the table."""
    sizes = ("model.hidden_size=16", "model.n_blocks=1", "model.n_heads=2")
    sizes += ("trainer.max_steps=2", "trainer.val_check_interval=2")
    sizes += ("sampling.num_sample_batches=1", "loader.eval_batch_size=4")
    sizes += ("data.valid_fraction=0.01",)
    places = ("--folder", str(tmp_path / "runs"), "--output", str(tmp_path))
    done = bench("frontier_table.py", *sizes, *places)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "frontier.md").read_text()
    for name in ("duo, ancestral + gibbs, 4 steps", "mdlm, entropy_bound, gamma=0"):
        assert f"| {name} |" in text
    assert (tmp_path / "frontier.png").read_bytes().startswith(b"\x89PNG")
    given = f"ar={tmp_path}/runs/ar/checkpoints/last.ckpt"
    logs = {path: path.stat().st_mtime_ns for path in tmp_path.glob("runs/**/log.txt")}
    again = bench("frontier_table.py", *sizes, "--checkpoints", given, *places)
    assert again.returncode == 0, again.stderr
    assert logs == {path: path.stat().st_mtime_ns for path in logs}
    wrong = bench("frontier_table.py", "--checkpoints", "gpt=x")
    assert wrong.returncode == 2
    assert "gpt is none of" in wrong.stderr


def test_a_step_is_predicted_from_its_phases():
    """Rates are medians of seconds over work; only what backward hides is free."""
    work = scale.Work(forward=2, backward=4, head=3, update=5, corrupt=1)
    times = {
        "forward_s": 4,
        "backward_s": 4,
        "head_s": 9,
        "update_s": 5,
        "corrupt_s": 0,
    }
    row = {"work": work._asdict(), **times}
    slower = row | {"forward_s": 400}
    rates = scale.Rates.fitted([row, row, slower])
    assert rates == (2, 1, 3, 1, 0)
    assert rates.step(work) == 4 + 4 + 9 + 5
    assert rates.step(work, exchange=3) == rates.step(work)
    assert rates.step(work, exchange=7) == rates.step(work) + 3


def test_gradients_are_summed_around_a_ring():
    two, many = (
        scale.Cluster(N, peak=100, memory=36, link=4).exchange(10) for N in (2, 1000)
    )
    assert two == 10
    assert many == pytest.approx(20, rel=2e-3)
    rates = scale.Cluster(2, peak=100, memory=36, link=4).rates(use=0.5)
    assert rates == (1 / 50, 1 / 50, 1 / 50, 1, 0)


@pytest.mark.slow
def test_cost_against_size_is_measured_and_reported(tmp_path):
    sizes = ("--sizes", "128 x 2", "256 x 4", "--memory-sizes", "128 x 2")
    small = (*sizes, "--process-sizes", "128 x 2", "--vocab-size", "40")
    small = (*small, "--length", "16", "--batch-size", "4", "--rounds", "1")
    done = bench("scale.py", *small, "--output", str(tmp_path))
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "scale.json").read_text())
    assert len(found["phases"]) == 2 * len(scale.ALGORITHMS)
    assert all(row["bytes_per_parameter"] >= 19 for row in found["memory"])
    assert all(row["together_s"] > 0 for row in found["processes"])
    assert all(row["at_0.3"] > row["at_0.5"] > 0 for row in found["published"])
    assert (tmp_path / "scale.md").read_text().count("##") == 5
