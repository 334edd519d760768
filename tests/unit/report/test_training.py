"""`report.table=training`: what is read of the logs of runs, and what is made of it."""

import csv

import pytest
from evaluated import write
from refusals import refused

from report import training
from report.mode import report
from report.training import Point, read_logs

HEADER = "epoch,step,train/nll,val/nll,val/ppl,val/ppl_stderr,val/sample_entropy"
VALIDATED = "0,{},,2.0,{},0.25,4.5"


def log(folder, *lines: str, version: int = 0, header: str = HEADER) -> str:
    text = "\n".join([header, *lines]) + "\n"
    return write(folder / f"csv/version_{version}/metrics.csv", text)


def about(folder, algo: str, data: str = "docstrings") -> None:
    text = f"algo:\n  name: {algo}\ndata:\n  valid: {data}\n  length: ${{model.x}}\n"
    write(folder / ".hydra/config.yaml", text)


def test_curves_of_a_run(tmp_path):
    """Steps are counted from 0 in the log; holes and NaN are left out."""
    log(tmp_path / "a", "0,19,3.5,,,,", VALIDATED.format(19, 8.0), "0,39,nan,,,,")
    about(tmp_path / "a", "mdlm")
    (run,) = read_logs([(None, str(tmp_path / "a"))])
    assert (run.name, run.algo, run.data) == ("mdlm", "mdlm", "docstrings")
    assert run.curves["train/nll"] == [Point(20, 3.5, None)]
    assert run.curves["val/ppl"] == [Point(20, 8.0, 0.25)]


def test_a_resumed_run_is_one_curve(tmp_path):
    """Updates that were made again stand in place of those before; 10 is after 9."""
    steps = {0: (0, 1, 2, 3), 9: (2, 3), 10: (3, 4)}
    for version, some in steps.items():
        lines = [f"0,{step},{version}.5,,,," for step in some]
        log(tmp_path, *lines, version=version)
    (run,) = read_logs([("mine", str(tmp_path))])
    assert [tuple(x[:2]) for x in run.curves["train/nll"]] == [
        *((1, 0.5), (2, 0.5), (3, 9.5), (4, 10.5), (5, 10.5)),
    ]


def test_runs_are_called_by_their_folders_or_as_the_user_says(tmp_path):
    for name in ("one", "two"):
        log(tmp_path / "runs" / name, VALIDATED.format(1, 8.0))
    names = [run.name for run in read_logs([(None, str(tmp_path / "runs"))])]
    assert names == ["one", "two"]
    names = [run.name for run in read_logs([("both", str(tmp_path / "runs"))])]
    assert names == ["both, one", "both, two"]
    single = [("x", str(tmp_path / f"runs/{name}")) for name in ("one", "two")]
    assert [run.name for run in read_logs(single)] == ["x", "x (2)"]
    file = str(tmp_path / "runs/one/csv/version_0/metrics.csv")
    assert [run.name for run in read_logs([("f", file)])] == ["f"]


@pytest.mark.parametrize("text", ["", "algo: 3\n", "algo: [", "a: ${b}\n", "- 1\n"])
def test_a_run_need_not_say_what_it_is_of(tmp_path, text):
    log(tmp_path, VALIDATED.format(1, 8.0))
    write(tmp_path / ".hydra/config.yaml", text)
    (run,) = read_logs([("x", str(tmp_path))])
    assert (run.algo, run.data) == ("", "")


def test_report_of_training(compose, tmp_path, capsys):
    """Table, files and picture; one run is in one place of each panel."""
    for name, ppl in (("a", 8.0), ("b", 6.0)):
        lines = [f"0,{step},{5 - step / 100},,,," for step in range(0, 100, 2)]
        lines += [VALIDATED.format(99, ppl + 1), VALIDATED.format(199, ppl)]
        log(tmp_path / "runs" / name, *lines)
        about(tmp_path / "runs" / name, "mdlm")
    header = "epoch,step,trainer/loss,val/sample_entropy"
    log(tmp_path / "runs/c", "0,9,0.5,4.0", header=header)
    found = report(
        compose(
            *("mode=report", "report.table=training"),
            *(f"report.runs={tmp_path}/runs", f"report.path={tmp_path}/out"),
        )
    )
    assert found == {"runs": 3}
    text = (tmp_path / "out/report.md").read_text()
    assert "](report.png)" in text
    assert "6.00 ± 0.25 (200)" in text
    assert "6.00 ± 0.25" in capsys.readouterr().out
    with open(tmp_path / "out/report.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    (last,) = [r for r in rows if r["run"] == "a" and r["value"] == "8.0"]
    assert (last["updates"], last["stderr"], last["algo"]) == ("200", "0.25", "mdlm")
    assert "tabular" in (tmp_path / "out/report.tex").read_text()
    for name, start in (("png", b"\x89PNG"), ("pdf", b"%PDF")):
        assert (tmp_path / f"out/report.{name}").read_bytes().startswith(start)


def test_panels_have_units_and_one_look_for_each_run(tmp_path, monkeypatch):
    from matplotlib import pyplot

    figures = []
    monkeypatch.setattr(pyplot, "close", figures.append)
    log(tmp_path / "a", "0,1,3.0,,,,", VALIDATED.format(1, 8.0))
    header = "epoch,step,trainer/loss,val/sample_entropy"
    log(tmp_path / "b", "0,9,0.5,4.0", header=header)
    runs = read_logs([("a", str(tmp_path / "a")), ("b", str(tmp_path / "b"))])
    training.draw(runs, str(tmp_path / "t"))
    monkeypatch.undo()
    (figure,) = figures
    looks = {
        axes.get_ylabel(): [
            (x.lines[0].get_color(), x.lines[0].get_marker()) for x in axes.containers
        ]
        for axes in figure.axes
    }
    assert list(looks) == [
        "validation perplexity (a token)",
        "training loss (nats a token)",
        "objective of distillation",
        "entropy of samples (nats a token)",
    ]
    (a,), (b,) = (
        looks["training loss (nats a token)"],
        looks["objective of distillation"],
    )
    assert a != b
    assert looks["entropy of samples (nats a token)"] == [a, b]
    assert {axes.get_xlabel() for axes in figure.axes} == {"updates"}
    pyplot.close("all")


def test_logs_of_nothing_are_refused(tmp_path):
    log(tmp_path / "a", "0,1,1e-3", header="epoch,step,trainer/lr")
    runs = read_logs([("a", str(tmp_path / "a"))])
    refused(lambda: training.draw(runs, str(tmp_path / "t")), "report.table=training")
