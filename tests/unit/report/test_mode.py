"""Reports: what they print, what they refuse, and the evaluations they ask for."""

import re
import shlex
from functools import partial
from pathlib import Path

import pytest
import torch
from evaluated import images, likelihood, samples, write
from refusals import refused

from report.formats import markdown
from report.mode import OF_NOTHING, jobs_of, named, report, texts
from report.output import narrow
from report.tables import TABLES


def test_what_every_line_says_is_said_once():
    """In the title; of a single line all columns stay."""
    header = ["model", "dataset", "source"]
    lines = [["a", "OWT", "X"], ["b", "OWT", "Y"]]
    title, names, shown, keys = narrow("t", header, lines)
    assert title == "t; dataset OWT"
    assert (names, shown, keys) == (["model", "source"], [["a", "X"], ["b", "Y"]], 1)
    assert narrow("t", header, lines[:1]) == ("t", header, lines[:1], 2)


def test_a_narrow_screen_has_the_verdict_beside_the_numbers():
    header = [
        "model",
        "dataset",
        "paper",
        "source",
        "measured",
        "difference",
        "verdict",
    ]
    line = ["a", "OWT", "25.2", "X", "25.0", "-0.2", "agrees"]
    _, names, lines, keys = narrow("t", header, [line])
    assert names[:5] == ["model", "dataset", "paper", "measured", "verdict"]
    assert lines[0][:5] == ["a", "OWT", "25.2", "25.0", "agrees"]
    assert set(names) == set(header)
    assert keys == 2


def test_markdown_cells_hold_anything():
    assert markdown(["a"], [["x|y\nz"]]) == "| a |\n| --- |\n| x\\|y z |"


NAMES = [
    ("My method=runs", "My method", "runs"),
    ("Eso-LM a0=1=runs", "Eso-LM a0=1", "runs"),
    ("a b=c=d", "a b", "c=d"),
    ("runs", None, "runs"),
    ("a/b=c", None, "a/b=c"),
    ("x/sampling.steps=8", None, "x/sampling.steps=8"),
    ("steps=8", None, "steps=8"),  # which is there
    ("steps=*", None, "steps=*"),
    ("=runs", None, "=runs"),
    ("steps=", None, "steps="),
    ("s3://bucket/a=b", None, "s3://bucket/a=b"),
]


@pytest.mark.parametrize(("entry", "name", "path"), NAMES)
def test_a_name_may_stand_before_a_path(entry, name, path, tmp_path, monkeypatch):
    """Of anything; a path that is there keeps its equals signs."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "steps=8").mkdir()
    found = named(entry, ["Eso-LM a0=1"])
    assert found == (name, path if "://" in path else str(tmp_path / path))


def made(compose, tmp_path, *overrides: str) -> str:
    report(compose("mode=report", f"report.path={tmp_path}/out", *overrides))
    return (tmp_path / "out/report.md").read_text()


def test_own_methods_stand_in_tables_and_files(compose, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a/x.json", samples(32, 90.0))
    write(tmp_path / "b/x.json", samples(32, 80.0))
    write(tmp_path / "c/x.json", samples(32, None))
    runs = "report.runs=['My_method=a', 'Duo=b', 'No judge=c']"
    text = made(compose, tmp_path, runs)
    assert "](report.png)" in text
    assert "| My_method | 90.0 ± 0.5 |" in text
    assert "| Duo | 80.0 ± 0.5 (96.19) |" in text
    assert "| No judge | 5.570 ± 0.005 |" in text
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {f"report.{x}" for x in ("md", "csv", "tex", "png", "pdf")}
    assert (
        r"My\_method & 90.0 $\pm$ 0.5 \\" in (tmp_path / "out/report.tex").read_text()
    )
    out = capsys.readouterr().out
    assert "My_method" in out
    assert "unpublished" in out


def test_a_reason_is_said_once(compose, tmp_path, monkeypatch, capsys):
    """As a number in the lines, in words below them."""
    monkeypatch.chdir(tmp_path)
    for steps in (8, 16, 32):
        other = {"settings/sampling/use_float64": False}
        write(tmp_path / f"a/{steps}.json", samples(steps, 90.0, **other))
    text = made(compose, tmp_path, "report.runs=a")
    assert "90.0 ± 0.5† (198.27)" in text
    for shown in (text, capsys.readouterr().out):
        assert shown.count("use_float64 is False, not True") == 1
        assert "not comparable (1)" in shown


# ---------------------------------------------------------------- mistakes

MISTAKES = {
    "nothing": ([], ["report.runs=[]", "report.checkpoints"]),
    "table": (["report.table=zeroshot"], ["report.table='zeroshot'", "'zero_shot'"]),
    "a run too many": (
        ["report.runs=[a]", "report.table=schedules"],
        ["report.runs is of no use", "report.table=schedules needs no run"],
    ),
    "a checkpoint too many": (
        ["+report.checkpoints.duo=a.ckpt", "report.table=operator"],
        ["report.checkpoints is of no use"],
    ),
    "no run": (["report.runs=[none]"], ["report.runs='", "none", "likelihood.json"]),
    "no text": (["report.runs=[1]"], ["report.runs=[1]"]),
    "broken": (["report.runs=broken.json"], ["broken.json cannot be read"]),
    "foreign": (["report.runs=foreign.json"], ["foreign.json", "mode=ppl_eval"]),
    "field": (["report.runs=field.json"], ["field.json", "data.wrap='no' is no bool"]),
    "of another table": (
        ["report.runs=good.json", "report.table=gen_ppl"],
        ["report.table='gen_ppl'", "test_ppl"],
    ),
    "no table": (
        ["+report.checkpoints.duo=a.ckpt"],
        ["report.table=null", "zero_shot"],
    ),
    "table of no checkpoints": (
        ["+report.checkpoints.duo=a.ckpt", "report.table=fid"],
        ["report.table=fid", "report.runs", "mode=fid_eval"],
    ),
    "model": (
        ["+report.checkpoints.mdml=a.ckpt", "report.table=test_ppl"],
        ["report.checkpoints='mdml'", "'mdlm'"],
    ),
    "distilled": (
        ["+report.checkpoints.distillation=a.ckpt", "report.table=test_ppl"],
        ["report.checkpoints.distillation", "report.table=distillation"],
    ),
    "checkpoint": (
        ["+report.checkpoints.duo=[1]", "report.table=test_ppl"],
        ["report.checkpoints.duo=[1]"],
    ),
    "checkpoints": (["report.checkpoints=a.ckpt"], ["report.checkpoints='a.ckpt'"]),
    "override": (
        [
            "+report.checkpoints.duo=a.ckpt",
            "report.table=test_ppl",
            "report.overrides=[seed]",
        ],
        ["report.overrides", "'seed'"],
    ),
    "training of nothing": (
        ["report.table=training"],
        ["report.runs=[]", "metrics.csv"],
    ),
    "training without a log": (
        ["report.table=training", "report.runs=good.json"],
        ["good.json", "metrics.csv"],
    ),
    "training with a broken log": (
        ["report.table=training", "report.runs=broken.csv"],
        ["broken.csv cannot be read", "could not convert"],
    ),
    "training of checkpoints": (
        [
            "report.table=training",
            "report.runs=good.json",
            "+report.checkpoints.duo=a.ckpt",
        ],
        ["report.checkpoints is of no use", "report.table=training"],
    ),
    "frontier of nothing": (
        ["report.table=frontier"],
        ["report.runs=[]", "mode=sample_eval"],
    ),
    "frontier of likelihoods": (
        ["report.table=frontier", "report.runs=good.json"],
        ["with a judge", "eval.ngram_order"],
    ),
    "entropy of another table": (
        ["report.entropy=5.4", "report.runs=good.json"],
        ["report.entropy=5.4", "report.table=frontier", "null"],
    ),
    "of no use": (
        ["report.runs=good.json", "report.data=[ptb]"],
        ["report.data is of no use"],
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_refused(name, compose, tmp_path, monkeypatch):
    """Before anything is written."""
    overrides, expected = MISTAKES[name]
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "broken.json", '{"mode": ')
    write(tmp_path / "foreign.json", {"a": 1})
    write(tmp_path / "good.json", likelihood())
    write(tmp_path / "broken.csv", "step,val/ppl\n1,x\n")
    write(tmp_path / "field.json", likelihood(**{"data/wrap": "no"}))
    before = sorted(tmp_path.iterdir())
    refused(partial(report, compose("mode=report", *overrides)), *expected)
    assert sorted(tmp_path.iterdir()) == before


def test_the_users_settings_win_over_those_of_the_table(compose):
    config = compose(
        "report.table=gen_ppl",
        "+report.checkpoints={sedd: s-sahoo/x, mdlm: m.ckpt}",
        "report.overrides=['sampling.num_sample_batches=1', 'model=tiny']",
    )
    jobs = jobs_of(config)
    assert [x.overrides["algo"] for x in jobs] == ["sedd"] * 8 + ["mdlm"] * 8
    assert [x.overrides["sampling.steps"] for x in jobs[:2]] == ["1024", "512"]
    assert jobs[0].checkpoint == "s-sahoo/x"  # of the hub
    assert jobs[0].overrides["sampling.predictor"] == "analytic"
    assert jobs[0].overrides["sampling.num_sample_batches"] == "1"
    assert jobs[0].overrides["model"] == "tiny"
    assert jobs[0].result == "eval.generated_samples_path"
    assert len({x.name for x in jobs}) == len(jobs)


@pytest.mark.parametrize("table", [x for x, spec in TABLES.items() if spec.data])
def test_evaluations_of_a_table_have_the_settings_that_it_wants(compose, table):
    """Each job's command composes, and its settings are those of a column."""
    config = compose(f"report.table={table}", "+report.checkpoints={duo: x.ckpt}")
    jobs = jobs_of(config)
    assert len({x.name for x in jobs}) == len(jobs)
    for one in jobs[:9:2]:
        pairs = (f"{key}={value}" for key, value in one.overrides.items())
        made = compose(*pairs, tiny=False)
        assert made.mode == TABLES[table].mode
        wanted = TABLES[table].columns
        same = [
            column
            for column, settings in wanted.items()
            if settings["tokenizer"] == made.data.tokenizer_name_or_path
            and settings["length"] == made.model.length
            and settings.get("valid", made.data.valid) == made.data.valid
            and settings.get("wrap", made.data.wrap) == made.data.wrap
            and settings.get("insert_valid_eos", made.data.insert_valid_eos)
            == made.data.insert_valid_eos
        ]
        assert same, one


def test_a_checkpoint_says_its_own_length(compose, tmp_path):
    config = {"algo": {"name": "mdlm"}, "model": {"length": 48}}
    for name, settings in (("says", {"config": config}), ("silent", {})):
        content = {"state_dict": {}, "hyper_parameters": settings}
        torch.save(content, tmp_path / f"{name}.ckpt")
        path = f"+report.checkpoints={{mdlm: {tmp_path}/{name}.ckpt}}"
        jobs = jobs_of(compose("report.table=zero_shot", path))
        assert ("model.length" in jobs[0].overrides) == (name == "silent")


DOCS = (Path(__file__).parents[3] / "docs" / "reproduce.md").read_text()
COMMANDS = re.findall(r"^python main\.py (mode=report .*)$", DOCS, re.M)


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_of_the_documentation_compose(command, compose):
    """And their evaluations are named."""
    config = compose(*shlex.split(command), tiny=False)
    jobs = jobs_of(config)
    assert bool(jobs) == ("checkpoints" in command)
    assert jobs or texts(config, "runs") or config.report.table in OF_NOTHING


def test_the_documentation_has_every_table():
    assert len(COMMANDS) == 11
    for name in (*TABLES, *OF_NOTHING):
        assert f"report.table={name}" in DOCS


def test_a_report_of_images(compose, tmp_path, monkeypatch, capsys):
    """Rows, lines of the file, and curves over steps, with no published number."""
    monkeypatch.chdir(tmp_path)
    for steps, fid in ((32, 30.25), (64, 20.5)):
        write(tmp_path / f"runs/{steps}/fid.json", images(steps, fid))
    found = report(compose("report.runs=[runs]", f"report.path={tmp_path}/out"))
    assert found == {"not comparable": 4}
    text = (tmp_path / "out/report.md").read_text()
    assert "## fid: FID and Inception Score of images" in text
    for part in ("30.25", "20.5", "8.5", "guidance 1", "figures only"):
        assert part in text
    assert (tmp_path / "out/report.png").read_bytes().startswith(b"\x89PNG")
    assert "FID" in capsys.readouterr().out
