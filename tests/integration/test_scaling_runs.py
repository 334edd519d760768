"""A study of scaling through the real command line, in small: a sweep over sizes with
one budget, a run that goes on with a larger one, and the report of all.
"""

import json

from command_line import run

SMALL = (
    *("experiment=toy_isoflop", "algo.loss_type=low_var", "data.valid_fraction=0.01"),
    *("model.n_blocks=1", "model.length=32", "loader.global_batch_size=8"),
    *("trainer.accelerator=cpu", "trainer.log_every_n_steps=1"),
)


def left(folder) -> dict:
    return json.loads((folder / "compute.json").read_text())


def test_from_a_budget_to_the_best_size(tmp_path):
    sizes = ("-m", "model.hidden_size=8,16,24", "hydra.sweep.dir=sweep")
    done = run(*SMALL, *sizes, "training.flops=1e-10", cwd=tmp_path)
    runs = [left(tmp_path / "sweep" / f"{job}") for job in range(3)]
    assert [x["budget"] for x in runs] == [1e8] * 3
    for x in runs:
        assert x["steps"] * 8 * 32 == x["tokens"]
        assert x["flops"] <= x["budget"] < x["flops"] + 256 * x["flops_per_token"]
        said = f"steps                     {x['steps']} of 256 tokens"
        assert said in done.stdout
    assert runs[0]["steps"] > runs[1]["steps"] > runs[2]["steps"] > 1
    named = "report.runs=[sweep]"
    report = ("mode=report", "report.table=isoflop", named, "report.path=report")
    done = run(*report, "hydra.run.dir=r", cwd=tmp_path)
    assert "the best size for a budget" in done.stdout
    text = (tmp_path / "report" / "report.md").read_text()
    assert text.count("| mdlm, low_var | 1e+08 |") == 4  # the optimum and three runs
    assert (tmp_path / "report" / "report.png").stat().st_size > 0
    # A run that is given more goes on from its end.
    own = ("model.hidden_size=16", "hydra.run.dir=sweep/1", "training.flops=2e-10")
    done = run(*SMALL, *own, cwd=tmp_path)
    after = left(tmp_path / "sweep" / "1")
    assert after["steps"] - 2 * runs[1]["steps"] in (0, 1)
    assert f"from step {runs[1]['steps']} of {after['steps']}" in done.stdout


def test_two_lengths_of_one_run_are_refused(tmp_path):
    both = ("training.flops=1e-10", "trainer.max_steps=5")
    done = run(*SMALL, *both, "hydra.run.dir=two", cwd=tmp_path, status=2)
    assert "trainer.max_steps=5 contradicts training.flops=1e-10" in done.stderr
    assert "Traceback" not in done.stderr
