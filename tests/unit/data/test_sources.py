"""Where published data sets come from: files here, the hub, its fallbacks."""

import http.server
import json
import time
import zipfile
from functools import partial

import pytest
from refusals import refused
from servers import listening
from stand_ins import CONFIGS, SHARED, write_documents

from data import sources
from data.published import CORPORA, Source
from data.registry import check_splits
from data.sources import (
    check_published,
    documents_of,
    identity,
    local_files,
    sources_of,
    stream_files,
)


@pytest.fixture
def config_of(compose, tmp_path):
    """The config of a data set, with a cache of the test's own."""

    def build(data, *overrides):
        return compose(f"data={data}", f"data.cache_dir={tmp_path}/cache", *overrides)

    return build


@pytest.fixture
def documents(tmp_path):
    return write_documents(tmp_path / "documents", num=40)


def texts(config, split):
    found = documents_of(config, split, f"{config.data.cache_dir}/texts")
    return found.texts(0, len(found))


# ---------------------------------------------------------------- the table


@pytest.mark.parametrize("name", sorted(CORPORA))
def test_every_corpus_has_sources_and_counts_of_its_splits(name):
    corpus = CORPORA[name]
    assert corpus.sources
    assert corpus.train or corpus.valid
    wanted = {corpus.train, corpus.valid} - {None}
    if name not in (
        "HuggingFaceFW/fineweb-edu",
        "cerebras/SlimPajama-627B",
    ):  # no number
        assert wanted <= corpus.num_documents.keys()
    for source in corpus.sources:
        assert source.files is None or source.is_whole or wanted <= source.files.keys()


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_names_known_data_sets(config_of, name):
    data = config_of(name).data
    assert {data.train, data.valid} <= CORPORA.keys()
    assert CORPORA[data.valid].valid is not None


# ---------------------------------------------------------------- local files


def test_a_folder_with_a_file_for_each_split(config_of, documents):
    config = config_of("ptb", f"data.source={documents}")
    assert "of the train set" in texts(config, "train")[0]
    assert "of the validation set" in texts(config, "valid")[0]
    config = config_of("ag_news", f"data.source={documents}")
    assert "of the test set" in texts(config, "valid")[0]


@pytest.mark.parametrize(
    "name",
    [
        *("ptb.valid.jsonl", "valid.jsonl", "val-00000-of-00001.jsonl"),
        *("dev/part.jsonl", "valid3.jsonl"),
    ],
)
def test_names_of_splits(config_of, tmp_path, name):
    path = tmp_path / "mine" / name
    path.parent.mkdir(parents=True)
    path.write_text('{"sentence": "a b"}')
    config = config_of("ptb", f"data.source={tmp_path}/mine")
    assert texts(config, "valid") == ["a b"]
    call = lambda: local_files(config.data, "train")  # noqa: E731
    refused(call, f"data.source='{tmp_path}/mine'", "train*", ".jsonl")


@pytest.mark.parametrize("pattern", ["validation-{:05d}-of-00012", "valid{}", "{}/dev"])
@pytest.mark.parametrize("as_glob", [True, False])
def test_shards_stay_in_order(config_of, tmp_path, pattern, as_glob):
    """Of their numbers, with zeros in front of them or without."""
    for number in range(12):
        file = tmp_path / f"{pattern.format(number)}.jsonl"
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps({"sentence": str(number)}))
    source = f"{tmp_path}/**/*.jsonl" if as_glob else tmp_path
    config = config_of("ptb", f"data.source='{source}'")
    assert texts(config, "valid") == [str(number) for number in range(12)]


def test_a_text_file_has_a_document_a_line(config_of, tmp_path):
    """Without blanks around it, as in the hub's copies. Of WikiText, whose copy is
    another, lines keep them and their ends, and blank ones are empty documents."""
    path = tmp_path / "valid.txt"
    path.write_text(" = A = \n \n text of it \n")
    options = f"data.source={tmp_path}"
    assert texts(config_of("ptb", options), "valid") == ["= A =", "", "text of it"]
    expected = [" = A = \n", "", " text of it \n"]
    assert texts(config_of("wikitext2", options), "valid") == expected


def test_a_missing_column_is_refused(config_of, tmp_path):
    (tmp_path / "valid.jsonl").write_text('{"text": "a"}')
    config = config_of("ptb", f"data.source={tmp_path}")
    refused(lambda: texts(config, "valid"), "'sentence'", "text", "valid.jsonl")


def test_the_end_of_openwebtext_is_held_out(config_of, documents):
    """The last documents in order; nothing of them is trained on."""
    options = (f"data.source={documents}/train.jsonl", "data.valid_documents=15")
    config = config_of("openwebtext-split", *options)
    whole = texts(config_of("openwebtext", *options), "train")
    assert len(whole) == 40
    assert texts(config, "valid") == whole[25:]
    assert texts(config, "train") == whole[:25]
    config.data.valid_documents = 40
    refused(lambda: texts(config, "valid"), "data.valid_documents=40", "only 40")


def test_text8_is_cut_by_characters(config_of, tmp_path):
    path = tmp_path / "text8.txt"
    path.write_text("a" * 90 + "b" * 5 + "c" * 5)
    config = config_of("text8", f"data.source={path}")
    assert texts(config, "train") == ["a" * 90]
    assert texts(config, "valid") == ["c" * 5]


def test_the_same_documents_are_not_validated_on(config_of, documents):
    file = f"{documents}/train.jsonl"
    both = ("train", "valid")
    config = config_of("ptb", f"data.source={file}")
    call = lambda: check_splits(config, both)  # noqa: E731
    refused(call, f"data.source='{file}'", "data.valid_source")
    check_splits(config, ("valid",))
    config.data.valid_source = f"{documents}/test.jsonl"
    check_splits(config, both)
    assert "of the test set" in texts(config, "valid")[0]


@pytest.mark.parametrize("valid", ["t*.jsonl", "copy.jsonl", "link.jsonl", "*"])
def test_files_of_both_splits_are_named(config_of, documents, valid):
    (documents / "link.jsonl").symlink_to(documents / "train.jsonl")
    (documents / "copy.jsonl").write_bytes((documents / "train.jsonl").read_bytes())
    for train, data in (("train.jsonl", "ptb"), ("tr*", "openwebtext")):
        options = (f"data.source={documents}/{train}",)
        config = config_of(data, *options, f"data.valid_source='{documents}/{valid}'")
        call = lambda c=config: check_splits(c, ("train", "valid"))  # noqa: E731
        refused(call, "data.valid_source: ", ".jsonl", "of data.source")


def test_validation_of_another_set_has_a_source_of_its_own(config_of, documents):
    """data.source is of what is trained on."""
    config = config_of("openwebtext", f"data.source={documents}")
    assert local_files(config.data, "train") is not None
    assert local_files(config.data, "valid") is None
    config.data.valid_source = str(documents)
    (file,) = local_files(config.data, "valid").files
    assert file.endswith("validation.jsonl")


def test_keys_of_published_sets_are_refused_elsewhere(compose):
    config = compose("data.source=/somewhere")
    call = lambda: check_splits(config, ("train",))  # noqa: E731
    refused(call, "data.source='/somewhere'", "synthetic")


def test_a_set_without_a_split_to_train_on(config_of, documents):
    config = config_of("lambada", f"data.source={documents}")
    call = lambda: check_splits(config, ("train",))  # noqa: E731
    refused(call, "data.train='lambada'", "no split to train on")
    check_splits(config, ("valid",))


# ---------------------------------------------------------------- identity


def test_identity_is_that_of_the_files(config_of, documents):
    """Another time of change or size is another data set; reading changes nothing."""
    config = config_of("ptb", f"data.source={documents}")
    before = identity(config, "valid")
    texts(config, "valid")
    assert identity(config, "valid") == before
    assert identity(config, "train") != before
    file = documents / "validation.jsonl"
    file.write_text(file.read_text() + '\n{"sentence": "more"}')
    assert identity(config, "valid") != before


def test_identity_of_published_sets_needs_no_network(config_of):
    config = config_of("openwebtext-split")
    start = time.monotonic()
    held_out = identity(config, "valid")
    config.data.valid_documents = 5
    assert identity(config, "valid") != held_out
    assert time.monotonic() - start < 1


# ---------------------------------------------------------------- the hub


class Hub:
    """Stands for the hub: what it has, and what it was asked for."""

    def __init__(self, monkeypatch, rows, builder="parquet"):
        import datasets

        self.asked, self._rows, self._builder = [], rows, builder
        monkeypatch.setattr(sources, "hub_answers", lambda: True)
        monkeypatch.setattr(datasets, "load_dataset_builder", self.builder)
        monkeypatch.setattr(datasets, "load_dataset", self.load)

    def builder(self, path, name=None, **options):
        import types

        given = {key: value for key, value in options.items() if value is not None}
        self.asked.append((path, name, *given.values()))
        if self.asked[-1] not in self._rows:
            raise ConnectionError(f"{path} is gone")
        splits = {key: [self.asked[-1]] for key in ("train", "validation", "test")}
        config = types.SimpleNamespace(data_files=splits)
        return types.SimpleNamespace(name=self._builder, config=config)

    def load(self, builder, data_files, split, **options):
        import datasets

        (found,) = data_files
        if found not in self._rows:
            raise FileNotFoundError(found)
        return datasets.Dataset.from_dict(self._rows[found])


PTB = [
    ("ptb-text-only/ptb_text_only", None, "refs/convert/parquet", "penn_treebank"),
    ("ptb-text-only/ptb_text_only", "penn_treebank"),
]


def test_sources_are_tried_in_order(config_of, monkeypatch):
    """A wrong number of documents is not the published set either."""
    full = {"sentence": ["a"] * 3370}
    hub = Hub(monkeypatch, {PTB[0]: full, PTB[1]: full})
    assert len(texts(config_of("ptb"), "valid")) == 3370
    assert hub.asked == PTB[:1]
    hub = Hub(monkeypatch, {PTB[0]: {"sentence": ["a"] * 3369}, PTB[1]: full})
    assert len(texts(config_of("ptb"), "valid")) == 3370
    assert hub.asked == PTB


def test_when_all_fail_all_are_named(config_of, monkeypatch):
    """With their reasons, and the key that helps."""
    Hub(monkeypatch, {PTB[0]: {"sentence": ["a"]}, PTB[1]: {"text": ["a"] * 3370}})
    refused(
        lambda: texts(config_of("ptb"), "valid"),
        "data.valid='ptb' cannot be loaded. Tried:",
        "ptb-text-only/ptb_text_only@refs/convert/parquet (1 documents instead of 3",
        "ptb-text-only/ptb_text_only/penn_treebank (",
        "ptb.valid.txt",
        "data.source=FOLDER",
    )
    config = config_of("openwebtext")
    Hub(monkeypatch, {})
    refused(lambda: texts(config, "valid"), "data.valid_source=FOLDER")


def test_a_source_of_ones_own_on_the_hub(config_of, monkeypatch):
    """Its number of documents is its own."""
    path = "hf://datasets/me/mine@refs%2Fpr%2F1/small"
    config = config_of("ptb", f"data.source='{path}'")
    key = ("me/mine", "small", "refs/pr/1")
    Hub(monkeypatch, {key: {"text": [" a ", "b"]}}, builder="text")
    assert texts(config, "train") == ["a", "b"]
    Hub(monkeypatch, {key: {"sentence": ["a", "b"]}})
    assert texts(config, "train") == ["a", "b"]
    assert sources_of(CORPORA["ptb"], config.data, "train") == (Source(*key),)
    config.data.source = "hf://datasets/mine"
    call = lambda: check_published(config, "train")  # noqa: E731
    refused(call, "hf://datasets/mine", "OWNER/NAME")


def test_streams_are_of_the_same_files(config_of, monkeypatch, documents):
    asked = []
    path = "hf://datasets/a/b@sha/data/train-00000-of-00001.parquet"

    def data_files(source, split):
        asked.append((str(source), split))
        return "parquet", [path]

    monkeypatch.setattr(sources, "data_files", data_files)
    config = config_of("fineweb-edu")
    assert stream_files(config.data).paths == [path]
    assert asked == [("HuggingFaceFW/fineweb-edu/default", "train")]
    config = config_of("slimpajama-streaming")
    assert stream_files(config.data).paths == [path]
    assert asked.pop() == ("cerebras/SlimPajama-627B", "train")
    path = "hf://datasets/a/b@sha/train/chunk1/example_train_0.jsonl.zst"
    monkeypatch.setattr(sources, "has_zstandard", lambda: False)
    call = lambda: stream_files(config.data)  # noqa: E731
    refused(call, "data.train='cerebras/SlimPajama-627B'", "pip install zstandard")
    monkeypatch.setattr(sources, "has_zstandard", lambda: True)
    assert call().paths == [path]
    config = config_of("fineweb-edu", f"data.source={documents}")
    files = stream_files(config.data)
    assert [path.rsplit("/", 1)[-1] for path in files.paths] == ["train.jsonl"]
    assert files.column == "text"


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"{SHARED} is not on this machine")
@pytest.mark.parametrize("answers", [True, False], ids=["online", "loaded before"])
def test_a_repository_is_read_as_the_library_does(config_of, monkeypatch, answers):
    """By the real library, on a folder in the layout of a hub repository."""
    folder = str(SHARED / "wikitext2" / "wikitext")
    corpus = CORPORA["wikitext2"]
    local = corpus._replace(sources=(Source(folder, "wikitext-2-raw-v1"),))
    monkeypatch.setitem(CORPORA, "wikitext2", local)
    monkeypatch.setattr(sources, "hub_answers", lambda: answers)
    config = config_of("wikitext2")
    found = texts(config, "valid")
    assert len(found) == 3760
    assert found[0] == ""
    assert found[1] == " = Homarus gammarus = \n"
    if answers:
        (path,) = stream_files(config.data).paths
        assert path.endswith("wikitext-2-raw-v1/train.parquet")
        refused(lambda: texts(config, "train"), "3302 documents instead of 36718")


@pytest.fixture
def website(tmp_path, monkeypatch):
    """A folder, and the address under which this machine serves its files."""
    folder = tmp_path / "website"
    folder.mkdir()
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    monkeypatch.setattr(handler.func, "log_message", lambda *args: None)
    with listening(handler) as address:
        yield folder, address


@pytest.mark.parametrize("name", ["text8", "ptb", "lambada"])
def test_files_of_a_website_need_no_hub(config_of, monkeypatch, website, name):
    """The table's own files, from another address: a zip, lines, JSON."""
    folder, address = website
    content = {
        "text8": ("a" * 90 + "b" * 5 + "c" * 5, ["c" * 5]),
        "ptb": (" no it was n't \n in N \n", ["no it was n't", "in N"]),
        "lambada": ('{"text": "a b"}\n{"text": "c"}\n', ["a b", "c"]),
    }
    text, expected = content[name]
    (published,) = (x for x in CORPORA[name].sources if x.files is not None)
    files = {split: url.rsplit("/", 1)[-1] for split, url in published.files.items()}
    for file in files.values():
        if file.endswith(".zip"):
            with zipfile.ZipFile(folder / file, "w") as archive:
                archive.writestr("text8", text)
        else:
            (folder / file).write_text(text)
    urls = {split: f"{address}/{file}" for split, file in files.items()}
    here = published._replace(files=urls)
    others = tuple(x for x in CORPORA[name].sources if x.files is None)
    corpus = CORPORA[name]._replace(sources=(*others, here), num_documents={})
    monkeypatch.setitem(CORPORA, name, corpus)
    monkeypatch.setattr(sources, "hub_answers", lambda: False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    assert texts(config_of(name), "valid") == expected


def test_what_is_out_of_reach_is_said_in_time(config_of, monkeypatch):
    """Not after a minute of retries for each source."""
    monkeypatch.setattr(sources, "hub_answers", lambda: False)
    start = time.monotonic()
    refused(lambda: texts(config_of("ag_news"), "valid"), "fancyzhx/ag_news (", "Tried")
    assert time.monotonic() - start < 20


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"{SHARED} is not on this machine")
def test_copies_of_hub_repositories(config_of):
    """A folder for each config, with a file for each split."""
    config = config_of("wikitext2", f"data.source={SHARED}/wikitext2/wikitext")
    assert len(texts(config, "valid")) == 3760
    folder = f"{SHARED}/scientific_papers/scientific_papers"
    config = config_of("scientific_papers_pubmed", f"data.source={folder}")
    assert "pubmed" in local_files(config.data, "valid").files[0]
    raw = config_of("ptb", f"data.source={SHARED}/ptb")
    copy = config_of("ptb", f"data.source={SHARED}/ptb/ptb_text_only")
    assert texts(raw, "valid") == texts(copy, "valid")
    assert len(texts(raw, "train")) == 42_068
