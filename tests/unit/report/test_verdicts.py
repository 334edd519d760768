"""Published numbers against their transcription, what a measurement is compared with,
and verdicts."""

import re
from collections import Counter
from pathlib import Path

import pytest
from evaluated import images, likelihood, read, samples

from report.tables import TABLES, read_published
from report.verdicts import compare, curves, other_rows, tolerance, verdict

TEXT = (Path(__file__).parents[2] / "published_tables.md").read_text()
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
    assert {x.table for x in PUBLISHED} == {x for x in TABLES if TABLES[x].columns}
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


@pytest.mark.parametrize(
    ("algo", "size", "model"),
    [
        ("mdlm", 16, "BD3-LM L'=16"),
        ("mdlm", 1024, "MDLM"),
        ("mdlm", None, "MDLM"),
        ("duo_base", 4, "Duo L'=4"),
    ],
)
def test_models_of_blocks_have_names_of_their_own(algo, size, model):
    rows = compared(likelihood(algo=algo, block_size=size))
    assert {row.cell[0] for row in rows} == {model}
    if model.startswith("BD3-LM"):
        assert "22.27" in {row.published.value for row in rows if row.published}


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
    "data/measured_rows": (8, "8 of 100 rows were measured"),
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
    "settings/sampling/temperature": (0.8, "temperature is 0.8"),
    "settings/sampling/corrector": ("gibbs", "corrector is gibbs"),
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
    rows = [x for x in compared(samples(**{path: value})) if x.cell[-1] == "ppl"]
    unseen = "unpublished" if path.endswith("/steps") else "not comparable"
    assert {row.verdict for row in rows} == {unseen}
    assert reason in rows[0].reason


CACHED = {"settings/sampling/predictor": "ancestral_cache"}
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
    (
        samples(16, algo="sdtt", trained_as="sdtt"),
        *("distillation", "MDLM+SDTT", "16", "5", "89.17"),
    ),
    (
        samples(8, algo="mdlm", trained_as="sdtt", **{"checkpoint/step": 30_000}),
        *("distillation", "MDLM+SDTT", "8", "3", "323.56"),
    ),
    (
        samples(8, algo="sdtt", **CACHED, trained_as="sdtt"),
        *("distillation", "MDLM+SDTT", "8", "5", "193.05"),
    ),
]


@pytest.mark.parametrize(("content", "table", "model", "steps", "number", "ppl"), CELLS)
def test_samples_have_their_cells(content, table, model, steps, number, ppl):
    first = compared(content)[0]
    assert (first.table, *first.cell) == (table, model, "OWT", steps, number, "ppl")
    assert first.published.value == ppl
    assert first.verdict != "not comparable"


@pytest.mark.parametrize("predictor", ["one_step", "ancestral"])
@pytest.mark.parametrize(("refined", "steps"), [(None, "1"), (0, "1"), (3, "4")])
def test_samples_of_one_step_have_rows_of_their_own(predictor, refined, steps):
    """The steps that refine them count, sampling.steps does not."""
    own = {"predictor": predictor, "refine_steps": refined}
    paths = {f"settings/sampling/{key}": value for key, value in own.items()}
    first = compared(samples(1000, algo="dimo", trained_as="dimo", **paths))[0]
    cell = ("MDLM+DiMO", "OWT", steps, "", "ppl")
    assert (first.table, first.cell) == ("distillation", cell)
    assert first.reason == "no published ppl of MDLM+DiMO with these settings"


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


def test_entropy_needs_no_judge():
    """Its verdict does not depend on who judged, or whether anybody has."""
    for judge in ("gpt2", None):
        path = "settings/eval.gen_ppl_eval_model_name_or_path"
        rows = compared(samples(ppl=None, **{path: judge}))
        assert {(row.cell[-1], row.verdict) for row in rows} == {("entropy", "agrees")}


def test_an_n_gram_model_is_a_judge_of_its_own():
    rows = compared(
        samples(ppl=None) | {"ngram_ppl": 40.0, "ngram_ppl_stderr": 1.0},
    )
    (row,) = [x for x in rows if x.cell[-1] == "ngram_ppl"]
    assert (row.measured, row.verdict, row.published) == ((40, 1), "unpublished", None)


@pytest.mark.parametrize("content", [likelihood(), samples()], ids=["ppl", "samples"])
def test_an_own_method_stands_beside_the_papers(content):
    """With their settings it compares, though no paper has a number of it."""
    rows = compared(content, model="My method")
    assert {row.verdict for row in rows} == {"unpublished"}
    assert {row.cell[0] for row in rows} == {"My method"}
    assert {row.cell[1] for row in rows} == {"OWT"}
    assert all(row.fits for row in rows)


OTHER_KIND = [
    ({"settings/model": {"length": 64}}, "tokenizer gpt2, length 64"),
    (
        {"settings/data.tokenizer_name_or_path": "/a/bytes"},
        "tokenizer bytes, length 1024",
    ),
]


@pytest.mark.parametrize(("other", "name"), OTHER_KIND)
def test_samples_on_another_scale_are_not_those_of_a_paper_s_data(other, name):
    rows = compared(samples(**other))
    assert {row.cell[1] for row in rows} == {name}
    assert {(row.published, row.fits) for row in rows} == {(None, False)}


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


# ---------------------------------------------------------------- images


def test_images_have_a_table_without_published_numbers():
    """Each metric a row beside model, data set and steps; what else it depends on is
    named, because nothing else says which two rows compare."""
    evaluations = [
        read(images(**{"sampling/guid_weight": weight}), name)
        for weight, name in ((1.0, None), (2.5, None), (None, "MDLM"), (0, None))
    ]
    rows = compare(evaluations, PUBLISHED)
    assert {row.table for row in rows} == {"fid"}
    assert len(rows) == 8
    first, second, *_ = rows
    assert first.cell == ("Duo", "cifar10", "64", "", "fid")
    assert first.measured == (20.5, None)
    assert second.cell[-1] == "inception_score"
    assert second.measured == (8.5, None)
    assert {row.verdict for row in rows} == {"not comparable"}
    for row in rows:
        assert row.published is None
        assert "figures only" in row.reason
        for part in (
            "ancestral",
            "cosine",
            "50000 images beside 50000",
            "1000",
            "abab",
        ):
            assert part in row.record()["note"]
    notes = [row.record()["note"].split(",")[0] for row in rows[::2]]
    assert notes == ["guidance 1", "guidance 2.5", "no guidance", "no guidance"]
    assert [row.cell[0] for row in rows[::2]] == ["Duo", "Duo", "MDLM", "Duo"]


def test_images_of_distilled_and_of_raw_models_say_so():
    one = read(images(**{"checkpoint/weights": "raw", "checkpoint/distilled": True}))
    row, _ = compare([one], PUBLISHED, "fid")
    assert row.cell[0] == "Duo+DCD"
    assert "raw weights" in row.reason


# ---------------------------------------------------------------- signatures

OF_MDLM = {"algo": "mdlm", "settings/sampling/noise_removal": "ancestral"}
SIGNED = [
    (40.74, 5.278, 1000, True),  # what a public issue has
    (40.7, 5.28, 1024, True),
    (104.85, 5.63, 1024, False),
    (40.7, 5.63, 1024, False),  # a better model
    (104.85, 5.28, 1024, False),
    (40.7, 5.28, 600, False),  # no published number is near
]


@pytest.mark.parametrize(("ppl", "entropy", "steps", "is_signed"), SIGNED)
@pytest.mark.parametrize("use_float64", [True, False])
def test_a_known_sign_of_a_mismatch_is_named(
    ppl, entropy, steps, is_signed, use_float64
):
    """Whatever the file says of its draws; the verdict stays."""
    own = {"settings/sampling/use_float64": use_float64}
    rows = compared(samples(steps, ppl, entropy, **OF_MDLM, **own))
    measured = [row for row in rows if row.evaluation]
    assert len(measured) == 2
    for row in measured:
        assert ("as with float32 draws" in row.reason) == is_signed
        assert ("104.85 / 5.63" in row.reason) == is_signed
