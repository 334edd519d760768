"""The summary of a sweep: rows, columns, table, CSV and plot, from what jobs leave in
their folders; a real multirun is in tests/integration."""

import csv
import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from evaluated import samples, write
from hydra.core.utils import JobStatus
from omegaconf import OmegaConf

from report import sweep
from report.sweep import ROW, Summary, plot, write_summary

NUMBERS = {
    "generative_ppl": 30.0,
    "generative_ppl_stderr": 2.0,
    "entropy": 4.25,
    "entropy_stderr": 0.125,
    "distinct_1": 0.5,
    "evaluations": 8.0,
    "num_samples": 6,
}
PNG = b"\x89PNG\r\n"


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")


def job(number: int, numbers: dict, **overrides: str) -> dict:
    named = {key.replace("__", "."): value for key, value in overrides.items()}
    return {"job": number, "overrides": named, "numbers": numbers}


def rows_of(folder: Path) -> list[dict[str, str]]:
    with open(folder / "summary.csv", newline="") as file:
        return list(csv.DictReader(file))


def hydra_config(folder, number=0, mode="MULTIRUN", overrides=()):
    """What Hydra hands to its callbacks, as far as they look."""
    return OmegaConf.create(
        {
            "hydra": {
                "mode": f"RunMode.{mode}",
                "job": {"num": number},
                "overrides": {"task": list(overrides)},
                "runtime": {"output_dir": str(folder / str(number))},
                "sweep": {"dir": str(folder)},
            }
        }
    )


def end(folder, number, returned, status=JobStatus.COMPLETED, mode="MULTIRUN", **more):
    """A job that ends."""
    (folder / str(number)).mkdir()
    returned = SimpleNamespace(status=status, return_value=returned)
    Summary().on_job_end(hydra_config(folder, number, mode, **more), returned)


# ---------------------------------------------------------------- table and CSV


def test_columns_are_what_was_swept_and_what_came_out(tmp_path, capsys):
    """Keys that are the same in all jobs are left out; the CSV has every number."""
    other = NUMBERS | {"generative_ppl": 20.0, "evaluations": 4.0}
    jobs = [
        job(0, NUMBERS, sampling__steps="8", seed="1"),
        job(1, other, sampling__steps="16", seed="1"),
    ]
    write_summary(jobs, tmp_path)
    rows = rows_of(tmp_path)
    assert list(rows[0]) == ["job", "sampling.steps", *NUMBERS]
    assert [row["sampling.steps"] for row in rows] == ["8", "16"]
    assert [float(row["generative_ppl"]) for row in rows] == [30.0, 20.0]
    assert {row["entropy_stderr"] for row in rows} == {"0.125"}
    out = capsys.readouterr().out
    assert "2 runs" in out
    assert "30.0 ± 2.0" in out
    assert "4.25 ± 0.12" in out
    assert "distinct_1" not in out
    for name in ("csv", "md", "tex", "png", "pdf"):
        assert str(tmp_path / f"summary.{name}") in out
    assert "](summary.png)" in (tmp_path / "summary.md").read_text()
    assert "30.0 $\\pm$ 2.0" in (tmp_path / "summary.tex").read_text()
    assert (tmp_path / "summary.pdf").read_bytes().startswith(b"%PDF")
    assert (tmp_path / "summary.png").read_bytes().startswith(PNG)


def test_numbers_that_no_job_has_are_no_column(tmp_path, capsys):
    """Without a judge there is no perplexity to show."""
    unjudged = NUMBERS | {"generative_ppl": None, "generative_ppl_stderr": None}
    write_summary(
        [job(i, unjudged, sampling__steps=str(i + 1)) for i in (0, 1)], tmp_path
    )
    assert "generative_ppl" not in rows_of(tmp_path)[0]
    assert "generative_ppl" not in capsys.readouterr().out
    assert (tmp_path / "summary.png").read_bytes().startswith(PNG)


def test_a_number_that_some_jobs_lack_is_empty(tmp_path, capsys):
    partly = [job(0, NUMBERS, seed="1"), job(1, {"entropy": 4.0}, seed="2")]
    write_summary(partly, tmp_path)
    assert [row["generative_ppl"] for row in rows_of(tmp_path)] == ["30.0", ""]
    assert " - " in capsys.readouterr().out


def test_likelihoods_have_a_table_and_no_plot(tmp_path, capsys):
    """mode=ppl_eval draws no samples."""
    jobs = [
        job(i, {"nll": 1.5, "nll_stderr": 0.25, "ppl": 4.5, "bpd": 2.2}, seed=str(i))
        for i in (0, 1)
    ]
    write_summary(jobs, tmp_path)
    out = capsys.readouterr().out
    assert "1.50 ± 0.25" in out
    assert "ppl" in out
    assert list(rows_of(tmp_path)[0])[:2] == ["job", "seed"]
    assert not (tmp_path / "summary.png").exists()
    assert "summary.png" not in out


def test_values_with_commas_stay_one_cell(tmp_path):
    jobs = [job(i, NUMBERS, sampling__prompt=f'a, "{i}"') for i in (0, 1)]
    write_summary(jobs, tmp_path)
    assert [row["sampling.prompt"] for row in rows_of(tmp_path)] == ['a, "0"', 'a, "1"']


# ---------------------------------------------------------------- plot


@pytest.fixture
def drawn(monkeypatch):
    """What is drawn: the axes of every figure, before it is closed."""
    from matplotlib import pyplot

    axes = []
    monkeypatch.setattr(pyplot, "close", lambda figure: axes.extend(figure.axes))
    yield axes
    monkeypatch.undo()
    pyplot.close("all")


def points(axes) -> list[tuple[float, float]]:
    return [
        tuple(map(float, point))
        for container in axes.containers
        for point in container.lines[0].get_xydata()
    ]


def test_perplexity_against_entropy_and_against_steps(tmp_path, drawn):
    """Steps in order of size, not of jobs or of their first digit."""
    jobs = [
        job(i, {"generative_ppl": ppl, "entropy": 4.0 + i}, sampling__steps=steps)
        for i, (steps, ppl) in enumerate((("16", 20.0), ("8", 30.0), ("128", 10.0)))
    ]
    assert plot(jobs, tmp_path) == [tmp_path / f"summary.{x}" for x in ("png", "pdf")]
    left, right, below = drawn
    assert points(left) == [(4.0, 20.0), (5.0, 30.0), (6.0, 10.0)]
    assert points(right) == [(8.0, 30.0), (16.0, 20.0), (128.0, 10.0)]
    assert points(below) == [(8.0, 5.0), (16.0, 4.0), (128.0, 6.0)]
    assert {text.get_text() for text in left.texts} == {"8", "16", "128"}
    assert right.get_ylabel() == "generative perplexity (a token)"


def test_entropy_against_steps_without_a_judge(tmp_path, drawn):
    jobs = [job(i, {"entropy": 4.0 + i}, sampling__steps=str(8 - i)) for i in (0, 1)]
    plot(jobs, tmp_path)
    (only,) = drawn
    assert points(only) == [(7.0, 5.0), (8.0, 4.0)]
    assert "entropy" in only.get_ylabel()
    assert "nats a token" in only.get_ylabel()


def test_a_job_without_a_judge_still_shows_its_entropy(tmp_path, drawn):
    """And one model has one look in all panels, whichever it is missing in."""
    jobs = [
        job(i, numbers | {"entropy": 4.0 + i}, algo=algo, sampling__steps=steps)
        for i, (algo, steps, numbers) in enumerate(
            [
                ("mdlm", "8", {}),
                ("duo", "8", {"generative_ppl": 9.0}),
                ("mdlm", "16", {}),
                ("duo", "16", {"generative_ppl": 8.0}),
            ]
        )
    ]
    plot(jobs, tmp_path)
    looks = [
        {x.lines[0].get_color(): x.lines[0].get_marker() for x in axes.containers}
        for axes in drawn
    ]
    assert looks[0] == looks[1]
    assert len(looks[0]) == 1
    assert len(looks[2]) == 2
    assert looks[0].items() <= looks[2].items()


def test_what_does_not_compare_is_hollow_and_not_joined(tmp_path, drawn):
    """Another judge than most."""
    jobs = [
        job(i, {"generative_ppl": 9.0 - i, "entropy": 4.0}, sampling__steps=str(8 + i))
        | {"about": {"judge": "gpt2" if i == 1 else "gpt2-large"}}
        for i in range(4)
    ]
    plot(jobs, tmp_path)
    filled, hollow = (x.lines[0] for x in drawn[1].containers)
    assert filled.get_xdata().tolist() == [8, 10, 11]
    assert filled.get_linestyle() == "-"
    assert hollow.get_xdata().tolist() == [9]
    assert hollow.get_linestyle() == "None"
    assert hollow.get_markerfacecolor() == "white"


def test_a_sweep_over_other_keys_has_no_curve_of_steps(tmp_path, drawn):
    plot([job(7, {"generative_ppl": 10.0, "entropy": 4.0}, seed="2")], tmp_path)
    (only,) = drawn
    assert points(only) == [(4.0, 10.0)]
    assert [text.get_text() for text in only.texts] == ["7"]


# ---------------------------------------------------------------- Hydra's calls


def test_a_job_leaves_its_row(tmp_path):
    """Additions and plain overrides alike, the value as it was written."""
    given = ["sampling.steps=8", "+wandb.offline=true", "sampling.prompt='a=b'"]
    end(tmp_path, 3, NUMBERS, overrides=given)
    row = json.loads((tmp_path / "3" / ROW).read_text())
    assert row["job"] == 3
    assert row["numbers"] == NUMBERS
    assert row["overrides"] == {
        "sampling.steps": "8",
        "wandb.offline": "true",
        "sampling.prompt": "'a=b'",
    }


@pytest.mark.parametrize(
    "more",
    [{"status": JobStatus.FAILED}, {"status": JobStatus.UNKNOWN}, {"mode": "RUN"}],
)
def test_failed_jobs_and_single_runs_leave_none(tmp_path, more):
    end(tmp_path, 0, NUMBERS, **more)
    assert not list(tmp_path.rglob(ROW))


def test_the_summary_is_of_the_jobs_that_ended_well(tmp_path):
    """In order of their numbers, from two digits on as well."""
    for number in reversed(range(24)):
        status = JobStatus.FAILED if number == 7 else JobStatus.COMPLETED
        overrides = [f"seed={number}"]
        end(tmp_path, number, NUMBERS, status=status, overrides=overrides)
    Summary().on_multirun_end(hydra_config(tmp_path))
    expected = [str(number) for number in range(24) if number != 7]
    assert [row["seed"] for row in rows_of(tmp_path)] == expected


def test_jobs_that_return_nothing_do_not_break_it(tmp_path):
    for number in (0, 1):
        end(tmp_path, number, None, overrides=[f"seed={number}"])
    Summary().on_multirun_end(hydra_config(tmp_path))
    assert rows_of(tmp_path) == [
        {"job": "0", "seed": "0"},
        {"job": "1", "seed": "1"},
    ]


def test_without_a_job_there_is_no_summary(tmp_path):
    Summary().on_multirun_end(hydra_config(tmp_path))
    assert not list(tmp_path.iterdir())


def test_what_is_shown_is_what_runs_return():
    """Columns of the table that no run could fill would never appear."""
    from evaluation.sample_file import summarise as numbers_of

    trained = {"nll", "ppl", "step", "rows", "weights"}
    of_images = {"fid", "inception_score"}
    known = {*numbers_of([]), "mauve", *trained, *of_images, sweep.REFUSED}
    assert set(sweep.SHOWN) <= known


def test_runs_that_differ_in_more_than_steps_are_lines_of_their_own():
    jobs = [
        job(i, {}, eval__checkpoint_path=f"/a/{name}/x", sampling__steps=steps)
        for i, (name, steps) in enumerate(itertools.product("mn", ("8", "64")))
    ]
    lines = sweep._lines(jobs)
    assert list(lines) == ["m", "n"]
    assert [x["job"] for x in lines["n"]] == [2, 3]
    assert list(sweep._lines(jobs[:2])) == ["samples"]
    both = [
        x | {"overrides": x["overrides"] | {"seed": str(i)}} for i, x in enumerate(jobs)
    ]
    assert next(iter(sweep._lines(both))) == "checkpoint_path=m, seed=0"


# ---------------------------------------------------------------- frontier


def test_judged_samples_have_a_frontier(tmp_path):
    """Of two runs at least; files that are gone or not judged are not read."""
    jobs = []
    for index, temperature in enumerate((0.7, 1.0)):
        own = {"settings/sampling/temperature": temperature}
        path = write(tmp_path / f"{index}/x.json", samples(**own))
        jobs.append(job(index, NUMBERS, seed="1") | {"samples": path})
    broken = write(tmp_path / "broken.json", "{")
    jobs.append(job(2, {"entropy": 2.0}) | {"samples": broken})
    jobs.append(job(3, NUMBERS) | {"samples": str(tmp_path / "gone.json")})
    jobs.append(job(4, NUMBERS) | {"samples": None})
    sweep.write_frontier(jobs[1:], tmp_path)
    assert not list(tmp_path.glob("frontier.*"))
    sweep.write_frontier(jobs, tmp_path)
    assert "temperature" in (tmp_path / "frontier.md").read_text()
    assert (tmp_path / "frontier.png").read_bytes().startswith(PNG)
