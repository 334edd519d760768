"""The DataModule: what it loads, in which batches, and what it refuses."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from refusals import refused
from tokenizer_kinds import tokenizer_of

from data import loading
from data.registry import DATASETS, DatasetSpec, check_splits
from data.rows import REPEATED, TokenRows
from data.tokenizers import TOKENIZERS, get_tokenizer, vocabulary_with_mask
from dataloader import DataModule
from utils import ConfigError


@pytest.fixture
def module(compose):
    """A DataModule over the configured data set."""

    def build(*overrides, mask_index=None):
        config = compose("data.num_train=20", "data.num_valid=6", *overrides)
        check_splits(config, ("train", "valid"))
        return DataModule(config, get_tokenizer(config), mask_index)

    return build


@pytest.fixture
def text_module(compose, tmp_path):
    """A DataModule over text files of the test."""

    def build(text, *overrides, mask_index=None, valid=None):
        (tmp_path / "corpus.txt").write_text(text)
        if valid is not None:
            (tmp_path / "apart").mkdir()
            (tmp_path / "apart" / "valid.txt").write_text(valid)
            overrides += (f"data.valid_path={tmp_path}/apart/valid.txt",)
        config = compose(
            "data=text_files",
            f"data.path={tmp_path}/*.txt",
            f"data.cache_dir={tmp_path}/cache",
            "data.tokenizer_name_or_path=text8",
            *overrides,
        )
        check_splits(config, ("train", "valid"))
        return DataModule(config, get_tokenizer(config), mask_index)

    return build


# ---------------------------------------------------------------- loading


def test_training_batches_cover_the_rows_once_in_another_order(module):
    data = module()
    batches = [batch["input_ids"] for batch in data.train_dataloader()]
    assert [len(batch) for batch in batches] == [4] * 5
    rows = data.load("train").ids.astype(np.int64)
    got = torch.cat(batches).numpy()
    assert not np.array_equal(got, rows)
    assert sorted(map(tuple, got)) == sorted(map(tuple, rows))


def test_validation_batches_are_the_rows_in_order(module):
    """All of them, the short last batch included."""
    data = module()
    batches = [batch["input_ids"] for batch in data.val_dataloader()]
    assert [len(batch) for batch in batches] == [4, 2]
    rows = data.load("valid").ids.astype(np.int64)
    assert np.array_equal(torch.cat(batches).numpy(), rows)


@pytest.mark.parametrize("num_rows", [1, 4, 7, 12, 13])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_share_the_validation_rows(module, monkeypatch, num_rows, world_size):
    """Batch by batch in the order of ranks; each has as many batches, and a row that is
    there for no other reason says so."""
    data = module(f"data.num_valid={num_rows}")
    ranks = []
    for rank in range(world_size):
        monkeypatch.setattr(data, "_rank", lambda rank=rank: (rank, world_size))
        ranks.append(list(data.val_dataloader()))
    assert len({len(batches) for batches in ranks}) == 1
    found = [batch for batches in zip(*ranks, strict=True) for batch in batches]
    measured = [batch["input_ids"] for batch in found if REPEATED not in batch]
    rows = data.load("valid").ids.astype(np.int64)
    assert np.array_equal(torch.cat(measured).numpy(), rows)


def test_ranks_share_the_training_rows(module):
    """Rank and world size are the trainer's; each row goes to one of them."""
    shares = []
    for rank in range(2):
        data = module("data.vocab_size=256")
        data.trainer = SimpleNamespace(global_rank=rank, world_size=2)
        shares += [batch["input_ids"] for batch in data.train_dataloader()]
    assert [len(batch) for batch in shares] == [4] * 4
    rows = set(map(tuple, data.load("train").ids.tolist()))
    assert len(rows) == 20
    got = [tuple(row) for row in torch.cat(shares).tolist()]
    assert len(set(got)) == 16
    assert set(got) <= rows


def test_rows_are_read_once(module, monkeypatch):
    data = module()
    first = data.load("train")
    monkeypatch.setitem(DATASETS, "synthetic", None)
    assert data.load("train") is first


def test_train_and_valid_differ(module):
    data = module()
    assert not np.array_equal(data.load("train").ids[:6], data.load("valid").ids)


def test_text_files_hold_out_their_end(text_module):
    data = text_module("the quick brown fox jumps over a lazy dog " * 20)
    train, valid = data.load("train").ids, data.load("valid").ids
    assert len(valid) == round(0.05 * (len(train) + len(valid)))
    decoded = data.tokenizer.decode(train[0], skip_special_tokens=True)
    assert decoded == "the qu"


def test_a_validation_path_of_its_own(text_module, tmp_path):
    """Then the training file is used whole."""
    held_out = tmp_path / "held_out"
    held_out.mkdir()
    (held_out / "v.txt").write_text("abcdef" * 3)
    data = text_module("uvwxyz" * 10, f"data.valid_path={held_out}/v.txt")
    assert data.tokenizer.batch_decode(data.load("valid").ids[:1].tolist()) == [
        "[BOS]abcdef[EOS]"
    ]
    assert len(data.load("train")) == 10


@pytest.mark.parametrize(
    "valid",
    ["valid.txt", "./valid.txt", "*.txt", "v*", "link.txt", "hard.txt", "copy*"],
)
def test_text_that_is_trained_on_is_not_validated_on(text_module, tmp_path, valid):
    """By whatever name, as a link, or as a copy."""
    (tmp_path / "valid.txt").write_text("abcdef" * 3)
    (tmp_path / "held_out").mkdir()
    others = {
        "link.txt": lambda path: path.symlink_to(tmp_path / "valid.txt"),
        "hard.txt": lambda path: path.hardlink_to(tmp_path / "valid.txt"),
        "copy.txt": lambda path: path.write_text("abcdef" * 3),
    }
    path = f"{tmp_path}/{valid}"
    if valid[:4] in ("link", "hard", "copy"):
        name = f"{valid[:4]}.txt"
        others[name](tmp_path / "held_out" / name)
        path = f"{tmp_path}/held_out/{valid}"
    call = lambda: text_module("uvwxyz" * 10, f"data.valid_path='{path}'")  # noqa: E731
    refused(call, "data.valid_path: ", ".txt", "validated on", "data.path")
    (tmp_path / "held_out" / "apart.txt").write_text("abcdeg" * 3)
    text_module("uvwxyz" * 10, f"data.valid_path={tmp_path}/held_out/apart.txt")


def test_rows_that_cannot_be_read(text_module, tmp_path, caplog):
    """They are named, or counted also when the rows come from the cache; what was made
    with some of them left out is not taken where the run is to stop."""
    (tmp_path / "a.jsonl").write_text('{"text": "abcdef"}\n' * 9 + "no json\n")
    options = (f"data.path={tmp_path}/a.jsonl", "data.valid_fraction=0.5")
    skip = "data.on_bad_row=skip"
    for _ in range(2):
        caplog.clear()
        text_module("", *options, skip).load("train")
        assert "1 rows could not be read and were passed over" in caplog.text
    refused(lambda: text_module("", *options).load("train"), "a.jsonl, line 10", skip)


def test_rows_are_skipped_where_there_are_some(module):
    call = lambda: module("data.on_bad_row=skip")  # noqa: E731
    refused(call, "data.on_bad_row=skip has no effect", "'synthetic'")


def test_a_stream_says_what_it_cannot_read(text_module, tmp_path):
    """As packing does, from a worker as well; and goes on where it stopped."""
    rows = [f'{{"text": "{"abc" * (n % 7)}"}}' for n in range(200)]
    rows[149] = "no json"
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    (tmp_path / "v.txt").write_text("valid" * 9)
    options = (
        f"data.path={tmp_path}/a.jsonl",
        f"data.valid_path={tmp_path}/v.txt",
        "data.streaming=True",
        "data.shuffle_rows=1",
    )
    for workers in (0, 1):
        mine = (*options, f"loader.num_workers={workers}")
        loader = text_module("", *mine).train_dataloader()
        seen = []
        with pytest.raises(ConfigError) as error:
            seen += iter(loader)
        assert f"data.path: {tmp_path}/a.jsonl, line 150 cannot" in str(error.value)
        assert "\n" not in str(error.value)
        assert len(seen) > 10
        again = text_module("", *mine, "data.on_bad_row=skip").train_dataloader()
        again.load_state_dict(loader.state_dict())
        assert len(list(itertools.islice(again, 99))) == 99


def test_text8_documents_are_normalized_and_others_are_not(text_module):
    text = "Ah! 7 " * 9
    data = text_module(text)
    first = data.tokenizer.decode(data.load("train").ids[0], skip_special_tokens=True)
    assert first == "ah sev"
    data = text_module(text, "data.tokenizer_name_or_path=bytes")
    first = data.tokenizer.decode(data.load("train").ids[0], skip_special_tokens=True)
    assert first == "Ah! 7 "


def test_docstrings_split_by_module(compose, monkeypatch, tmp_path):
    """Disjoint, complete, and a function of a module's name alone."""
    letters = "abcdefghijklmnopqrst"
    documents = [(f"{name}.py", name * 60) for name in letters]

    def loaded(documents):
        monkeypatch.setattr(loading, "docstrings", lambda files: iter(documents))
        config = compose(
            "data=docstrings",
            "data.valid_fraction=0.3",
            "model.length=32",
            f"data.cache_dir={tmp_path}/{len(documents)}",
        )
        config.data.insert_train_eos = config.data.insert_valid_eos = False
        tokenizer = get_tokenizer(config)
        parts = []
        for split in ("train", "valid"):
            rows = DATASETS["docstrings"].load(config, tokenizer, split)
            text = tokenizer.batch_decode(rows.ids.tolist(), skip_special_tokens=True)
            parts.append(set("".join(text)))
        return parts

    train, valid = loaded(documents)
    assert train | valid == set(letters)
    assert not train & valid
    assert 0 < len(valid) < len(train)
    assert loaded(documents) == [train, valid]
    fewer = [pair for pair in documents if pair[1][0] not in "afk"]
    assert loaded(fewer) == [train - set("afk"), valid - set("afk")]


# ---------------------------------------------------------------- crops


@pytest.fixture
def cropped(compose, tmp_path):
    """text8-crop over 400 characters, a row of which is 12 of them."""

    def build(seed=1):
        (tmp_path / "train.txt").write_text("abcdefghijklmnopqrst" * 20)
        (tmp_path / "test.txt").write_text("uvwxyz" * 10)
        config = compose(
            "data=text8-crop",
            f"data.source={tmp_path}",
            f"data.cache_dir={tmp_path}/cache",
            f"seed={seed}",
        )
        check_splits(config, ("train", "valid"))
        return DataModule(config, get_tokenizer(config), None)

    return build


def test_training_takes_a_random_part_of_each_row(cropped):
    """bos, L - 2 neighbouring characters, eos; every row, from every start."""
    data = cropped()
    whole = "abcdefghijklmnopqrst" * 20
    loader = data.train_dataloader()
    starts = set()
    for epoch in range(20):
        loader.order.set_epoch(epoch)
        for batch in loader:
            assert batch["input_ids"].shape == (4, 8)
            for text in data.tokenizer.batch_decode(batch["input_ids"]):
                assert text.startswith("[BOS]")
                assert text.endswith("[EOS]")
                content = text[5:-5]
                assert len(content) == 6
                assert content in whole
                starts.add(content)
    assert len(starts) == 20  # all characters begin one
    assert data.load("valid").ids.shape[1] == 8


def test_crops_are_a_function_of_seed_and_epoch(cropped):
    def epoch(data, number):
        loader = data.train_dataloader()
        loader.order.set_epoch(number)
        return [batch["input_ids"].tolist() for batch in loader]

    first = epoch(cropped(), 3)
    assert epoch(cropped(), 3) == first
    assert epoch(cropped(), 4) != first
    assert epoch(cropped(seed=2), 3) != first
    loader = cropped().train_dataloader()
    loader.load_state_dict({"epoch": 3, "rows": 8})
    assert [batch["input_ids"].tolist() for batch in loader] == first[2:]


def test_files_are_tokenized_once_for_both_splits(text_module, tmp_path, monkeypatch):
    data = text_module("the quick brown fox jumps over a lazy dog " * 20)
    data.load("train")
    monkeypatch.setattr(loading, "tokenize", lambda *a, **k: pytest.fail("again"))
    assert len(data.load("valid")) > 1


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "override", ["eval.unigram_baseline=True", "eval.ngram_order=3"]
)
def test_streams_are_not_counted(compose, override):
    config = compose("data=openwebtext-streaming", "data.source=hf://datasets/a/b")
    check_splits(config, ("train",))
    config = compose(
        "data=openwebtext-streaming", "data.source=hf://datasets/a/b", override
    )
    call = lambda: check_splits(config, ("train",))  # noqa: E731
    refused(call, override.split("=")[0], "data.streaming=True")


def test_an_unknown_detokenizer_is_refused_early(compose):
    config = compose("data=ptb", "data.detokenizer=bpt")
    call = lambda: check_splits(config, ("valid",))  # noqa: E731
    refused(call, "data.detokenizer='bpt'", "Did you mean 'ptb'?", "wikitext")


def test_an_unknown_data_set_is_refused(module):
    refused(
        lambda: module("data.train=synthetik"),
        "data.train='synthetik'",
        "Did you mean 'synthetic'?",
        *DATASETS,
    )


def test_streaming_is_refused_where_there_is_none(module, compose, text_module):
    assert module("data.streaming=True").config.data.streaming
    config = compose("data=docstrings", "data.streaming=True")
    call = lambda: check_splits(config, ("train",))  # noqa: E731
    refused(call, "data.streaming=True", "docstrings")
    call = lambda: text_module("text", "data.streaming=True")  # noqa: E731
    refused(call, "data.streaming=True", "data.valid_path")


def test_text_files_are_streamed(text_module, tmp_path):
    """The rows of packing; each file is a document."""
    (tmp_path / "held_out.jsonl").write_text('{"text": "abcdef"}')
    valid = f"data.valid_path={tmp_path}/held_out.jsonl"
    text = "the quick brown fox jumps over a lazy dog " * 20
    packed = text_module(text, valid).load("train").ids
    data = text_module(text, valid, "data.streaming=True", "data.shuffle_rows=5")
    loader = data.train_dataloader()
    rows = [
        row
        for batch, _ in zip(loader, range(9), strict=False)
        for row in batch["input_ids"].tolist()
    ]
    assert len(rows) == 36
    assert {tuple(row) for row in rows} <= {tuple(row) for row in packed.tolist()}
    assert rows[:5] != packed[:5].tolist()
    assert sorted(rows[:5]) == sorted(packed[:5].tolist())


@pytest.mark.parametrize("text", ["", "abc", "!!! ???"])
def test_empty_data_is_refused(text_module, text):
    data = text_module(text)
    for split in ("train", "valid"):
        refused(lambda split=split: data.load(split), "is empty", "model.length=8")


def test_too_few_rows_for_a_batch_are_refused(module):
    data = module("data.num_train=3")
    refused(data.load_training, "has 3 rows", "one batch of 4")
    assert len(module("data.num_valid=3").load("valid")) == 3


def test_all_ranks_need_rows(module):
    devices = ("trainer.devices=2", "loader.global_batch_size=8")
    data = module("data.num_train=7", *devices)
    refused(data.load_training, "one batch of 8")


def test_data_that_hold_the_mask_are_refused(module):
    """Their loss would be of order 1e5; mdlm on `synthetic` has its mask apart."""
    data = module(mask_index=0)
    refused(lambda: data.load("train"), "holds token 0", "mask", "algo=duo_base")
    assert len(module(mask_index=7).load("train")) == 20


@pytest.mark.parametrize("kind", ["gpt2", "gpt2_with_pad", "llama3", "gpt2_with_mask"])
@pytest.mark.parametrize("streaming", [False, True])
def test_padding_is_not_the_mask(text_module, kind, streaming, monkeypatch):
    """Where the pad has the mask's id, eos pads; else the pad does. Rows stay as they
    are, so that all algorithms share them."""
    monkeypatch.setitem(TOKENIZERS, kind, lambda config: tokenizer_of(kind))
    mask = vocabulary_with_mask(get_tokenizer(settings_of(kind)))[1]
    data = text_module(
        "a short one [PAD]",
        f"data.tokenizer_name_or_path={kind}",
        "model.length=64",
        "data.wrap=False",
        "loader.global_batch_size=1",
        f"data.streaming={streaming}",
        mask_index=mask,
        valid="a shorter one [PAD]",
    )
    tokenizer = data.tokenizer
    is_taken = kind in ("gpt2", "gpt2_with_pad")
    assert (tokenizer.pad_token_id == mask) == is_taken
    for loader in (data.train_dataloader(), data.val_dataloader()):
        batch = next(iter(loader))
        ids, is_text = batch["input_ids"], batch["attention_mask"].bool()
        padding = tokenizer.eos_token_id if is_taken else tokenizer.pad_token_id
        assert (ids[~is_text] == padding).all()
        assert (~is_text).any()
        assert (ids != mask).all()
        text = tokenizer.decode(ids[is_text][1:-1])
        assert text in ("a short one [PAD]", "a shorter one [PAD]")
    assert (np.asarray(data.load("valid").ids)[:, -1] == tokenizer.pad_token_id).all()


def settings_of(kind):
    return OmegaConf.create({"data": {"tokenizer_name_or_path": kind}})


@pytest.mark.parametrize("setting", ["keep", "split"])
def test_a_mask_in_a_text_is_text_or_refused(text_module, setting):
    """The line names the token, and what makes it text."""
    data = text_module(
        "the [MASK] of bytes" * 20,
        "data.tokenizer_name_or_path=bytes",
        f"data.special_tokens_in_text={setting}",
        mask_index=258,
        valid="a [MASK] of bytes" * 20,
    )
    if setting == "split":
        rows = data.load("valid")
        assert not (np.asarray(rows.ids)[:, 1:-1] >= 256).any()
        return
    cure = "data.special_tokens_in_text=split"
    refused(
        lambda: data.load("valid"), "holds token 258, '[MASK]'", "algo=duo_base", cure
    )


def test_a_row_needs_room_for_a_token(module):
    refused(lambda: module("model.length=2"), "model.length=2")
    assert module("model.length=3").load("valid").ids.shape == (6, 3)


@pytest.mark.parametrize("fraction", [0, 1, -0.5, 2])
def test_a_held_out_fraction_is_one(text_module, fraction):
    call = lambda: text_module("text", f"data.valid_fraction={fraction}")  # noqa: E731
    refused(call, f"data.valid_fraction={fraction}")


def test_files_are_looked_for_before_anything_is_loaded(compose):
    config = compose("data=text_files", "data.path=/nowhere/*.txt")
    validate = lambda: check_splits(config, ("train",))  # noqa: E731
    refused(validate, "data.path='/nowhere/*.txt'", "no file")


def test_a_set_has_one_modality(module):
    refused(
        lambda: module("data.modality=image"),
        *("data.modality='image'", "data.train='synthetic'", "text"),
    )
    refused(lambda: module("data.modality=sound"), "data.modality='sound'", "image")
    refused(lambda: module("data.num_classes=3"), "data.num_classes=3", "null")
    call = lambda: module("data.tokenizer_name_or_path=pixels")  # noqa: E731
    refused(call, "'pixels'", "data.modality=text")


def test_a_data_set_is_one_row_of_a_table(module, monkeypatch):
    """A loader and an entry are all that a new data set needs."""
    rows = TokenRows(np.tile(np.arange(8), (9, 1)))
    spec = DatasetSpec(lambda config, tokenizer, split: rows)
    monkeypatch.setitem(DATASETS, "counting", spec)
    data = module("data.train=counting", "data.valid=counting", "data.streaming=False")
    (batch, *_) = data.val_dataloader()
    assert batch["input_ids"].tolist() == [list(range(8))] * 4
