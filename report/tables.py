"""Published numbers, and the settings they were measured with."""

import csv
from pathlib import Path
from typing import Any, NamedTuple

PUBLISHED = Path(__file__).parent / "published_results.csv"

# ---------------------------------------------------------------- settings


class Published(NamedTuple):
    """A row of `published_results.csv`; empty where the source says nothing."""

    table: str
    model: str
    dataset: str
    steps: str
    round: str
    metric: str
    value: str  # with the digits of the source
    source: str
    training_steps: str
    note: str

    @property
    def cell(self) -> tuple[str, ...]:
        return self.model, self.dataset, self.steps, self.round, self.metric


def read_published() -> list[Published]:
    """All published numbers, in the order of their tables."""
    with open(PUBLISHED, newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    if tuple(header) != Published._fields:
        raise ValueError(f"{PUBLISHED}: its columns are {header}")
    return [Published(*row) for row in rows]


# Models by the algorithm that a run names.
MODELS = {
    "ar": "AR",
    **dict.fromkeys(("mdlm", "sdtt", "dimo"), "MDLM"),
    "sedd": "SEDD Absorb",
    "d3pm": "D3PM Absorb",
    **dict.fromkeys(("duo", "duo_base", "distillation"), "Duo"),
}
# Predictors of the published samples; any for AR.
PREDICTORS = {
    **dict.fromkeys(("MDLM", "MDLM+SDTT"), ("ancestral", "ancestral_cache")),
    "SEDD Absorb": ("analytic",),
    "MDLM+DiMO": ("one_step", "ancestral"),
}
# Names of distillations by the algorithm that has trained a checkpoint.
METHODS = {"distillation": "DCD", "sdtt": "SDTT", "dimo": "DiMO"}
ONE_STEP = ("dimo",)  # whose samples take one step, and those that refine them

GPT2 = {"tokenizer": "gpt2", "length": 1024}
BERT = {"tokenizer": "bert-base-uncased", "length": 128}
_OWT = {"valid": "openwebtext-valid", **GPT2, "wrap": True, "insert_valid_eos": True}
_LM1B = {"valid": "lm1b", **BERT}
_ZERO_SHOT = {**GPT2, "wrap": True, "insert_valid_eos": False}
_SAMPLES = {
    "judge": "gpt2-large",
    "use_float64": True,
    "p_nucleus": 1,
    "semi_ar": False,
    "prompt": None,
    "prompt_file": None,
    "infill": None,
    "complete": True,
}
SAMPLED = {"OWT": {**GPT2, **_SAMPLES}, "LM1B": {**BERT, **_SAMPLES}}
STEPS = (1024, 512, 256, 128, 64, 32, 16, 8)
ZERO_SHOT = {
    "PTB": "ptb",
    "Wikitext": "wikitext103",  # the sources do not say which; see docs/reproduce.md
    "LM1B": "lm1b",
    "Lambada": "lambada",
    "AG News": "ag_news",
    "Pubmed": "scientific_papers_pubmed",
    "Arxiv": "scientific_papers_arxiv",
    "WT2": "wikitext2",
    "WT103": "wikitext103",
}


class TableSpec(NamedTuple):
    """A published table."""

    title: str
    mode: str  # of the evaluations that it is about
    columns: dict[str, dict[str, Any]]  # data set of the paper -> settings
    data: tuple[str, ...]  # configs that report.checkpoints are evaluated on
    extra: tuple[dict[str, str], ...] = ({},)  # overrides, one evaluation each


TABLES = {
    "test_ppl": TableSpec(
        "test perplexity",
        "ppl_eval",
        {
            "LM1B-np": {**_LM1B, "wrap": False},
            "LM1B-p": {**_LM1B, "wrap": True, "insert_valid_eos": True},
            "OWT": _OWT,
        },
        ("openwebtext-split",),
    ),
    "zero_shot": TableSpec(
        "zero-shot perplexity of models of OWT",
        "ppl_eval",
        {name: {"valid": valid, **_ZERO_SHOT} for name, valid in ZERO_SHOT.items()},
        (
            *("ptb", "wikitext103", "lm1b-gpt2", "lambada", "ag_news"),
            *("scientific_papers_pubmed", "scientific_papers_arxiv"),
        ),
        ({"data.insert_valid_eos": "False"},),
    ),
    "gen_ppl": TableSpec(
        "generative perplexity and entropy (nats) against steps",
        "sample_eval",
        SAMPLED,
        ("openwebtext-split",),
        tuple({"sampling.steps": str(steps)} for steps in STEPS),
    ),
    "distillation": TableSpec(
        "generative perplexity and entropy (nats) of distilled models",
        "sample_eval",
        SAMPLED,
        ("openwebtext-split",),
        tuple(
            {"sampling.steps": str(steps), "sampling.noise_removal": removal}
            for removal in ("ancestral", "greedy")
            for steps in STEPS
        ),
    ),
    # Chapter II has its numbers in figures only, so there are none to compare with.
    "fid": TableSpec("FID and Inception Score of images", "fid_eval", {}, ()),
}
