"""Published numbers against their transcription, what a measurement is compared with,
verdicts, and files of unknown origin."""

import json
import re
import shlex
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from evaluated import likelihood, samples
from refusals import refused

import evaluations
from checkpoints import likelihood as worth
from evaluations import (
    Job,
    check_path,
    evaluation,
    likelihood_record,
    make,
    origin,
    read_runs,
)
from packing import Fingerprint
from papers import (
    TABLES,
    compare,
    curves,
    other_rows,
    read_published,
    tolerance,
    verdict,
)
from report import jobs_of, markdown, narrow, report, texts
from utils import RunStopped

TEXT = (Path(__file__).parents[1] / "published_tables.md").read_text()
PUBLISHED = read_published()
NUMBER = re.compile(r"\d+\.\d+")
METRICS = ("ppl", "entropy")

# ---------------------------------------------------------------- published numbers


def section(name: str) -> str:
    """The text of E1, E2, E3 or E4."""
    return re.search(rf"### {name}\..*?(?=\n### |\Z)", TEXT, re.S)[0]


def cells(name: str) -> dict[tuple[str, str], str]:
    """(row, column) -> cell of the section's table, without bold and remarks."""
    lines = [x.strip("|").split("|") for x in section(name).split("\n") if x[:1] == "|"]
    header, _, *rows = [[x.strip() for x in line] for line in lines]
    return {
        (row[0].replace("*", ""), column): re.sub(r"\(.*?\)|\*", "", value)
        for row in rows
        for column, value in zip(header[1:], row[1:], strict=True)
    }


def values(**wanted: str) -> list[str]:
    """Values of the rows of the CSV whose columns are as wanted."""
    return [
        x.value for x in PUBLISHED if all(getattr(x, k) == v for k, v in wanted.items())
    ]


E1_ROWS = {
    "AR Transformer": ["AR"],
    "Duo++ k=2 / 3 / 5": ["Duo++ k=2", "Duo++ k=3", "Duo++ k=5"],
    "Duo w/o curriculum; also w/o improved loss (= UDLM)": [
        "Duo without curriculum",
        "UDLM",
    ],
}
E1_SOURCES = {"Duo++ k=2 / 3 / 5": "D2"}


def test_e1_has_every_cell():
    claimed = Counter()
    for (row, column), cell in cells("E1").items():
        if column == "source":
            continue
        source = E1_SOURCES.get(row, "D1 T3" if "w/o" in row else "D1 T1")
        named = {"table": "test_ppl", "dataset": column, "source": source}
        found = [
            value for x in E1_ROWS.get(row, [row]) for value in values(model=x, **named)
        ]
        assert found == NUMBER.findall(cell), (row, column)
        claimed.update({source: len(found)})
    for source in ("D1 T1", "D1 T3", "D2"):
        assert claimed[source] == len(values(table="test_ppl", source=source))


def test_e2_has_every_cell():
    found = cells("E2")
    for (row, column), cell in found.items():
        named = {"model": row.split(" (")[0], "dataset": column, "source": "D1 T2"}
        assert values(table="zero_shot", **named) == NUMBER.findall(cell), (row, column)
    count = sum(len(NUMBER.findall(cell)) for cell in found.values())
    assert count == len(values(source="D1 T2"))


E4_COLUMNS = {
    "MDLM+SDTT": ["MDLM+SDTT"],
    "Duo+DCD ancestral": ["Duo+DCD"],
    "Duo+DCD greedy-tail": ["Duo+DCD, greedy tail"],
    "DCD with EMA teacher anc. / greedy": [
        "Duo+DCD, EMA teacher",
        "Duo+DCD, EMA teacher, greedy tail",
    ],
}


@pytest.mark.parametrize(
    ("name", "table", "source", "number"),
    [("E3", "gen_ppl", "D1 T5", ""), ("E4", "distillation", "D1 T6-7", "5")],
)
def test_e3_and_e4_have_every_cell(name, table, source, number):
    """Perplexity and entropy in turn."""
    count = 0
    for (row, column), cell in cells(name).items():
        named = {"table": table, "steps": row, "source": source, "round": number}
        models = E4_COLUMNS.get(column, [column])
        for model, part in zip(models, cell.split(";"), strict=True):
            found = values(model=model, **named)
            assert found == NUMBER.findall(part), (row, column)
            by_name = (values(model=model, metric=x, **named) for x in METRICS)
            assert [x for some in by_name for x in some] == found
            count += len(found)
    assert count == len(values(table=table, source=source, round=number))


# Beginnings of lines outside of the tables, and whose numbers they hold.
PROSE = [
    ("E1", "Finer digits", {"source": "M T1-2"}),
    ("E1", "MDLM ablation", {"source": "M T8"}),
    ("E1", "BD3-LM (LM1B 65B tok)", {"source": "B T3-4"}),
    ("E2", "SEDD paper Table 1", {"source": "S T1"}),
    ("E3", "AR at 1024", {"source": ("D1, quoted later", "L")}),
    ("E4", "Base Duo with greedy tail", {"model": "Duo, greedy tail"}),
    ("E4", "R1 ", {"round": ("1", "2")}),
    ("E4", "R3 ", {"round": ("3", "4")}),
    ("E4", "1-4 steps", {"source": "X", "dataset": "OWT"}),
    ("E4", "LM1B [X]", {"source": "X", "dataset": "LM1B"}),
    ("E4", "MDLM+SDTT with loss", {"source": "P T7"}),
]


@pytest.mark.parametrize(("name", "start", "wanted"), PROSE)
def test_the_text_beside_the_tables_is_there_in_its_order(name, start, wanted):
    (line,) = [x for x in section(name).split("\n") if x.startswith(start)]
    either = {k: v if isinstance(v, tuple) else (v,) for k, v in wanted.items()}
    found = [
        x.value
        for x in PUBLISHED
        if all(getattr(x, key) in names for key, names in either.items())
    ]
    assert found == NUMBER.findall(line)


def test_the_eso_lm_table_is_there():
    """In another order than in the text; three numbers are in a remark."""
    text = section("E1")
    lines = text[text.index("Eso-LM table") : text.index("=> the 250K")]
    remark = NUMBER.findall(re.search(r"Eso-LM's table flags.*", text)[0])
    found = NUMBER.findall(lines) + remark
    assert Counter(values(source="E T1")) == Counter(found)
    cheap = dict(re.findall(r"(\w+) (\d+\.\d+)", text[text.index("=> the 250K") :]))
    assert len(cheap) == 5
    names = {"SEDD": "SEDD Absorb"}
    for model, value in cheap.items():
        named = {"model": names.get(model, model), "training_steps": "250000"}
        assert values(**named) == [value]


def test_every_row_comes_from_the_text():
    """And none is there twice."""
    there = Counter(NUMBER.findall(TEXT))
    assert not Counter(x.value for x in PUBLISHED) - there
    assert len(set(PUBLISHED)) == len(PUBLISHED)
    assert {x.table for x in PUBLISHED} == set(TABLES)
    assert all(x.source and float(x.value) > 0 for x in PUBLISHED)


# ---------------------------------------------------------------- verdicts


@pytest.mark.parametrize(
    ("measured", "error", "paper", "metric", "expected"),
    [
        (25.2, 0.0, "25.2", "ppl", "agrees"),
        (25.502, 0.0, "25.2", "ppl", "agrees"),  # 0.05 + 0.252
        (25.51, None, "25.2", "ppl", "worse"),
        (24.89, None, "25.2", "ppl", "better"),
        (26.0, 0.4, "25.2", "ppl", "agrees"),  # two standard errors
        (26.01, 0.4, "25.2", "ppl", "worse"),
        (29.0, 2.0, "25.2", "ppl", "undecided"),
        (25.3, 2.0, "25.2", "ppl", "agrees"),
        (5.6, 0.0, "5.55", "entropy", "agrees"),
        (5.7, 0.01, "5.55", "entropy", "higher"),
        (5.4, 0.01, "5.55", "entropy", "lower"),
    ],
)
def test_verdicts(measured, error, paper, metric, expected):
    assert verdict(measured, error, paper, metric) == expected


def test_tolerance_is_of_the_digits_as_written():
    assert tolerance("25.2") == pytest.approx(0.05 + 0.252)
    assert tolerance("23.00") == pytest.approx(0.005 + 0.23)
    assert tolerance("80") == pytest.approx(0.5 + 0.8)


# ---------------------------------------------------------------- comparing


def read(content: dict, model: str | None = None):
    mode = "ppl_eval" if "mode" in content else "sample_eval"
    return evaluation("some.json", mode, content)._replace(model=model)


def compared(content: dict, asked=None, model=None) -> list:
    return compare([read(content, model)], PUBLISHED, asked)


COLUMNS = [
    ("openwebtext-valid", {}, "test_ppl", ["OWT"]),
    ("ptb", {}, "zero_shot", ["PTB"]),
    ("wikitext103", {}, "zero_shot", ["Wikitext", "WT103"]),
    ("wikitext2", {}, "zero_shot", ["WT2"]),
    ("lambada", {}, "zero_shot", ["Lambada"]),
    ("ag_news", {}, "zero_shot", ["AG News"]),
    ("scientific_papers_pubmed", {}, "zero_shot", ["Pubmed"]),
    ("scientific_papers_arxiv", {}, "zero_shot", ["Arxiv"]),
    ("lm1b", {}, "zero_shot", ["LM1B"]),
    (
        "lm1b",
        {"data/tokenizer": "x/bert-base-uncased", "data/length": 128},
        "test_ppl",
        ["LM1B-p"],
    ),
    (
        "lm1b",
        {
            "data/tokenizer": "bert-base-uncased",
            "data/length": 128,
            "data/wrap": False,
        },
        "test_ppl",
        ["LM1B-np"],
    ),
]


@pytest.mark.parametrize(("valid", "other", "table", "names"), COLUMNS)
def test_data_have_their_columns(valid, other, table, names):
    """Of every model that SEDD's paper has, too."""
    insert = {"data/insert_valid_eos": table == "test_ppl"}
    content = likelihood(valid, algo="sedd", **insert, **other)
    rows = compared(content)
    assert {row.table for row in rows} == {table}
    expected = {x.dataset for x in PUBLISHED if x.model == "SEDD Absorb"} & set(names)
    assert {row.cell[1] for row in rows} == expected
    settled = [row for row in rows if not row.published.training_steps]
    assert settled
    assert all(row.verdict != "not comparable" for row in settled)


MODELS = {"ar": "AR", "mdlm": "MDLM", "sedd": "SEDD Absorb", "duo_base": "Duo"}


@pytest.mark.parametrize("algo", MODELS)
def test_algorithms_have_their_models(algo):
    rows = compared(likelihood(algo=algo))
    assert {row.cell[0] for row in rows} == {MODELS[algo]}
    row = next(row for row in rows if row.published.source == "D1 T1")
    assert row.published.dataset == "OWT"


def test_the_user_may_name_the_model():
    """duo_base is also what UDLM is evaluated with."""
    (first, *_) = compared(likelihood(ppl=27.4), model="UDLM")
    assert (first.cell[0], first.published.value, first.verdict) == (
        "UDLM",
        "27.4",
        "agrees",
    )
    assert compared(samples(), model="Duo+DCD")[0].table == "distillation"


LIKELIHOOD_DIFFERS = {
    "data/length": (512, "length is 512, not 1024"),
    "data/tokenizer": ("bytes", "tokenizer is bytes, not gpt2"),
    "data/wrap": (False, "wrap is False, not True"),
    "data/insert_valid_eos": (False, "insert_valid_eos is False, not True"),
    "data/limit_val_batches": (8, "limit_val_batches is 8"),
    "data/documents": (20, "20 documents, the published set has 8013769"),
    "data/expected_sha256": ("cd" * 32, "not those of the published data set"),
    "checkpoint/weights": ("raw", "raw weights, not EMA"),
    "checkpoint/distilled": (True, "a distilled model's likelihood"),
    "checkpoint/algo": ("mdlm", "the checkpoint is of mdlm, evaluated as duo_base"),
    "checkpoint/step": (20, "trained for 20 steps"),
}


@pytest.mark.parametrize("path", LIKELIHOOD_DIFFERS)
def test_another_setting_is_named(path):
    value, reason = LIKELIHOOD_DIFFERS[path]
    rows = compared(likelihood(**{path: value}))
    assert {row.verdict for row in rows} == {"not comparable"}
    assert reason in rows[0].reason
    assert rows[0].published.value == "25.2"  # which is shown all the same


SAMPLES_DIFFER = {
    "settings/model": ({"length": 512}, "length is 512"),
    "settings/data.tokenizer_name_or_path": ("bytes", "tokenizer is bytes"),
    "settings/eval.gen_ppl_eval_model_name_or_path": ("gpt2", "judge is gpt2"),
    "settings/sampling/use_float64": (False, "use_float64 is False"),
    "settings/sampling/p_nucleus": (0.9, "p_nucleus is 0.9"),
    "settings/sampling/semi_ar": (True, "semi_ar is True"),
    "settings/sampling/prompt": ("a", "prompt is a"),
    "settings/sampling/predictor": ("psi", "predictor is psi, not ancestral"),
    "settings/sampling/noise_removal": ("none", "noise_removal is none"),
    "settings/sampling/steps": (33, "no published ppl of Duo"),
    "complete": (False, "complete is False"),
}


@pytest.mark.parametrize("path", SAMPLES_DIFFER)
def test_another_setting_of_samples_is_named(path):
    value, reason = SAMPLES_DIFFER[path]
    rows = compared(samples(**{path: value}))
    assert {row.verdict for row in rows} == {"not comparable"}
    assert reason in rows[0].reason


GREEDY = {"settings/sampling/noise_removal": "greedy"}
DISTILLED = {"trained_as": "distillation"}
CELLS = [
    (samples(), "gen_ppl", "Duo", "32", "", "96.19"),
    (samples(**GREEDY), "gen_ppl", "Duo, greedy tail", "32", "", "84.52"),
    (samples(64, algo="mdlm"), "gen_ppl", "MDLM", "64", "", "143.88"),
    (samples(1000, algo="ar"), "gen_ppl", "AR", "1024", "", "35.90"),
    (
        samples(8, algo="sedd", **{"settings/sampling/predictor": "analytic"}),
        *("gen_ppl", "SEDD Absorb", "8", "", "748.37"),
    ),
    (samples(**DISTILLED), "distillation", "Duo+DCD", "32", "5", "61.31"),
    (
        samples(8, **DISTILLED, **GREEDY),
        *("distillation", "Duo+DCD, greedy tail", "8", "5", "69.58"),
    ),
    (
        samples(1024, **DISTILLED, **{"checkpoint/teacher_ema": True}),
        *("distillation", "Duo+DCD, EMA teacher", "1024", "5", "57.09"),
    ),
    (
        samples(8, **DISTILLED, **{"checkpoint/step": 20_000}),
        *("distillation", "Duo+DCD", "8", "2", "137.87"),
    ),
]


@pytest.mark.parametrize(("content", "table", "model", "steps", "number", "ppl"), CELLS)
def test_samples_have_their_cells(content, table, model, steps, number, ppl):
    first = compared(content)[0]
    assert (first.table, *first.cell) == (table, model, "OWT", steps, number, "ppl")
    assert first.published.value == ppl
    assert first.verdict != "not comparable"


OLD_NAMES = [
    ("mdlm", "ddpm_cache", True, "MDLM, greedy tail"),
    ("mdlm", "ddpm", "ancestral", "MDLM"),
    ("sedd", "analytic", True, "SEDD Absorb"),
    ("ar", "ancestral", False, "AR"),
]


@pytest.mark.parametrize(("algo", "predictor", "removal", "model"), OLD_NAMES)
def test_names_of_mdlms_configs_mean_the_same(algo, predictor, removal, model):
    old = {"predictor": predictor, "noise_removal": removal}
    paths = {f"settings/sampling/{key}": value for key, value in old.items()}
    first = compared(samples(algo=algo, **paths))[0]
    assert first.cell[0] == model
    assert "predictor" not in first.reason
    assert "noise_removal" not in first.reason


def test_a_checkpoint_inside_a_round_is_of_none():
    rows = compared(samples(**DISTILLED, **{"checkpoint/step": 35_000}))
    assert "step 35000 is not the end of a round" in rows[0].reason


def test_without_a_judge_entropy_alone_is_compared():
    rows = compared(samples(ppl=None))
    assert [row.cell[-1] for row in rows] == ["entropy"]


def test_a_quarter_of_the_training_has_its_own_column():
    """Of the Eso-LM paper; the others are then not comparable, and the reverse."""
    content = likelihood(ppl=27.1, **{"checkpoint/step": 250_000})
    words = {row.published.source: row.verdict for row in compared(content)}
    assert words == {"D1 T1": "not comparable", "E T1": "agrees"}
    words = {row.published.source: row.verdict for row in compared(likelihood())}
    assert words == {"D1 T1": "agrees", "E T1": "not comparable"}


def test_what_a_file_does_not_say_is_said():
    unknown = {"checkpoint/distilled": None, "checkpoint/weights": None}
    first = compared(likelihood(**unknown))[0]
    assert first.verdict == "agrees"
    assert "not stated whether the checkpoint was distilled" in first.reason
    assert "not stated whether the weights are EMA" in first.reason


def test_other_data_and_other_models_have_no_published_number():
    (row,) = compared(likelihood("docstrings"))
    assert (row.published, row.verdict) == (None, "not comparable")
    assert "data 'docstrings'" in row.reason
    rows = compared(likelihood("docstrings"), asked="zero_shot")
    (row,) = [row for row in rows if row.evaluation]
    assert (row.table, row.published) == ("zero_shot", None)


def test_a_table_that_is_asked_for_is_whole():
    rows = compared(likelihood("ptb", 89.0), asked="zero_shot")
    (measured,) = [row for row in rows if row.evaluation]
    assert (measured.cell[:2], measured.verdict) == (("Duo", "PTB"), "agrees")
    rest = [row for row in rows if not row.evaluation]
    assert {row.verdict for row in rest} == {"not measured"}
    assert len(rows) == len(values(table="zero_shot"))
    assert not [row for row in compared(likelihood(), "zero_shot") if row.evaluation]


def test_other_rows_of_data_are_pointed_out():
    one = read(likelihood())
    two = read(likelihood(algo="mdlm", **{"data/sha256": "cd" * 32}))
    (line,) = other_rows(compare([one, two], PUBLISHED))
    assert "OWT" in line
    assert "abababababababab, cdcdcdcdcdcdcdcd" in line
    assert not other_rows(compare([one], PUBLISHED))


def test_curves_are_completed_from_the_same_source():
    rows = compared(samples())
    more = {row.cell[2] for row in curves(rows, PUBLISHED)}
    assert more == {"1024", "512", "256", "128", "64", "32", "16", "8"} - {"32"}
    assert curves(compared(likelihood()), PUBLISHED) == []


def test_a_row_as_a_record():
    record = compared(likelihood(ppl=25.0))[0].record()
    assert record["difference"] == pytest.approx(-0.2)
    assert (record["paper"], record["measured"], record["stderr"]) == ("25.2", 25, 0.05)
    empty = compared(likelihood("docstrings"))[0].record()
    assert (empty["paper"], empty["difference"]) == (None, None)


def test_what_every_line_says_is_said_once():
    """In the title; of a single line all columns stay."""
    header = ["model", "dataset", "source"]
    lines = [["a", "OWT", "X"], ["b", "OWT", "Y"]]
    table = narrow("t", header, lines)
    assert table.title == "t; dataset OWT"
    assert [column.header for column in table.columns] == ["model", "source"]
    assert [list(column.cells) for column in table.columns] == [["a", "b"], ["X", "Y"]]
    table = narrow("t", header, lines[:1])
    assert table.title == "t"
    assert [column.header for column in table.columns] == header


def test_markdown_cells_hold_anything():
    assert markdown(["a"], [["x|y\nz"]]) == "| a |\n| --- |\n| x\\|y z |"


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


def write(path: Path, content) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


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
    about = origin(config, {"global_step": 7}, has_ema=True)
    numbers = {"nll": 1.0, "bpd": 1.4, "ppl": 2.7}
    results = numbers | {f"{name}_stderr": float("nan") for name in numbers}
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


@pytest.mark.parametrize("path", [None, "", 3, "/", "nostore://a/b.json"])
def test_a_path_that_cannot_be_written_is_refused_early(path):
    refused(partial(check_path, path, "eval.results_path"), f"results_path={path!r}")


def test_a_path_that_can_be_written_is_none_of_these(tmp_path):
    check_path(str(tmp_path / "new" / "likelihood.json"), "eval.results_path")
    check_path("memory://likelihood.json", "eval.results_path")


def checkpoint_of(algo, **other) -> dict:
    return {"hyper_parameters": {"config": {"algo": {"name": algo}}}, **other}


ORIGINS = [
    (checkpoint_of("duo"), "distilled", False),
    (checkpoint_of("distillation"), "distilled", True),
    (
        checkpoint_of("distillation", likelihood=worth("distillation")),
        "distilled",
        True,
    ),
    (checkpoint_of("duo", likelihood="comparable unless"), "distilled", None),
    (checkpoint_of(["duo"]), "algo", None),
    (checkpoint_of("duo", global_step=SimpleNamespace()), "step", None),
    (checkpoint_of("duo"), "weights", "raw"),
    (checkpoint_of("duo", format="duo"), "weights", None),
    (checkpoint_of("duo", format="ours", weights="EMA"), "weights", "EMA"),
]


@pytest.mark.parametrize(("checkpoint", "name", "expected"), ORIGINS)
def test_what_a_checkpoint_says_of_itself(compose, checkpoint, name, expected):
    about = origin(compose(), checkpoint, has_ema=False)
    assert about[name] == expected
    json.dumps(about)


def test_ema_weights_that_are_switched_off_are_raw(compose):
    config = compose("eval.disable_ema=True")
    assert origin(config, {}, has_ema=True)["weights"] == "raw"


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

    monkeypatch.setattr(evaluations, "_run", run)
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
    assert not evaluations.is_finished(file)
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
    found = evaluations._run([sys.executable, "-c", code], tmp_path / "job")
    log = tmp_path / "job" / "log.txt"
    assert log.exists()
    said = expected and (expected[0], f"{expected[1]} (log: {log})")
    assert found == said


# ---------------------------------------------------------------- mistakes

MISTAKES = {
    "nothing": ([], ["report.runs=[]", "report.checkpoints"]),
    "table": (["report.table=zeroshot"], ["report.table='zeroshot'", "'zero_shot'"]),
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


@pytest.mark.parametrize("table", sorted(TABLES))
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


DOCS = (Path(__file__).parents[2] / "docs" / "reproduce.md").read_text()
COMMANDS = re.findall(r"^python main\.py (mode=report .*)$", DOCS, re.M)


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_of_the_documentation_compose(command, compose):
    """And their evaluations are named."""
    config = compose(*shlex.split(command), tiny=False)
    jobs = jobs_of(config)
    assert bool(jobs) == ("checkpoints" in command)
    assert jobs or texts(config, "runs")


def test_the_documentation_has_every_table():
    assert len(COMMANDS) == 6
    for name in TABLES:
        assert f"report.table={name}" in DOCS
