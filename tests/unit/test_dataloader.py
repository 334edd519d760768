"""From documents to batches: packing, padding, the order of an epoch."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data.documents import Listed
from data.loading import layout_of
from data.packing import Chunk, Layout, lay_out, rows_of, tokenize
from data.rows import TokenRows
from data.tokenizers import TOKENIZERS, get_tokenizer
from dataloader import EpochOrder

BOS, EOS, PAD = 90, 91, 92
documents = st.lists(st.lists(st.integers(0, 9), max_size=12), max_size=8)


def laid_out(lists, length, size=3, **options):
    """Rows of documents that come `size` at a time."""
    chunks = [
        Chunk(
            np.array([i for ids in some for i in ids], dtype=np.int32),
            np.array([len(ids) for ids in some]),
        )
        for some in (
            lists[start : start + size] for start in range(0, len(lists), size)
        )
    ]
    layout = Layout(length, bos=BOS, eos=EOS, pad=PAD, **options)
    return rows_of(lay_out(chunks, layout), length)


# ---------------------------------------------------------------- layouts


@given(documents, st.integers(3, 9), st.booleans())
def test_packed_rows_are_the_stream_in_order(lists, length, insert_eos):
    rows = laid_out(lists, length, insert_eos=insert_eos)
    stream = [i for ids in lists for i in ids + [EOS] * insert_eos]
    num_rows = len(stream) // (length - 2)
    assert rows.ids.shape == (num_rows, length)
    assert (rows.ids[:, 0] == BOS).all()
    assert (rows.ids[:, -1] == EOS).all()
    assert rows.ids[:, 1:-1].ravel().tolist() == stream[: num_rows * (length - 2)]
    assert rows.num_valid is None


@given(documents, st.integers(3, 9))
def test_padded_rows_are_one_document_each(lists, length):
    rows = laid_out(lists, length, wrap=False)
    assert rows.ids.shape == (len(lists), length)
    valids = [length] * len(lists) if rows.num_valid is None else rows.num_valid
    for row, valid, ids in zip(rows.ids.tolist(), valids, lists, strict=True):
        framed = [BOS, *ids[: length - 2], EOS]
        assert row == framed + [PAD] * (length - len(framed))
        assert valid == len(framed)


def rows_of_texts(texts, tokenizer, layout):
    return rows_of(lay_out(tokenize(Listed(texts), tokenizer), layout), layout.length)


def test_layout_and_eos_follow_the_config(compose):
    """data.wrap chooses the layout, insert_eos whether documents are separated."""
    config = compose("data=text_files", "data.tokenizer_name_or_path=text8")
    tokenizer = get_tokenizer(config)

    def rows_now():
        layout = layout_of(config, tokenizer, "valid")
        return rows_of_texts(["ab", "cdef"], tokenizer, layout)

    assert tokenizer.batch_decode(rows_now().ids) == ["[BOS]ab[EOS]cde[EOS]"]
    config.data.keep_remainder = True
    rows = rows_now()
    assert tokenizer.batch_decode(rows.ids)[1:] == ["[BOS]f[EOS][EOS]" + 4 * "[PAD]"]
    assert rows.num_valid.tolist() == [8, 4]
    config.data.keep_remainder = False
    config.data.insert_valid_eos = False
    assert tokenizer.batch_decode(rows_now().ids) == ["[BOS]abcdef[EOS]"]
    config.data.wrap = False
    rows = rows_now()
    assert tokenizer.batch_decode(rows.ids) == [
        "[BOS]ab[EOS][PAD][PAD][PAD][PAD]",
        "[BOS]cdef[EOS][PAD][PAD]",
    ]
    assert rows.num_valid.tolist() == [4, 6]


def bert_tokenizer(config):
    """Words, and a post-processor that frames a text as [CLS] ... [SEP]."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["[CLS]", "[SEP]", "[MASK]", "[PAD]", "the", "of", "and"]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 0), ("[SEP]", 1)]
    )
    roles = {f"{role}_token": f"[{role.upper()}]" for role in ("cls", "sep", "mask")}
    return PreTrainedTokenizerFast(tokenizer_object=core, **roles, pad_token="[PAD]")


@pytest.mark.parametrize(
    ("compat", "separator"), [("paper", "[SEP]"), ("reference", "[CLS]")]
)
def test_packed_bert_documents_are_separated_by_sep(
    compose, monkeypatch, compat, separator
):
    """The reference takes the first id of encode(eos), which is [CLS] for BERT."""
    monkeypatch.setitem(TOKENIZERS, "tiny-bert", bert_tokenizer)
    config = compose(
        "data=text_files",
        "data.tokenizer_name_or_path=tiny-bert",
        f"algo.compat={compat}",
        "model.length=7",
    )
    tokenizer = get_tokenizer(config)
    layout = layout_of(config, tokenizer, "train")
    rows = rows_of_texts(["the", "of and"], tokenizer, layout)
    got = tokenizer.convert_ids_to_tokens(rows.ids[0])
    assert got == ["[CLS]", "the", separator, "of", "and", separator, separator]


# ---------------------------------------------------------------- rows


@pytest.fixture
def padded():
    return laid_out([[1, 2, 3], [4], []], 6, wrap=False)


def test_a_batch_holds_ids_and_masks(padded):
    batch = padded.__getitems__([2, 0])
    assert batch["input_ids"].tolist() == [
        [BOS, EOS, PAD, PAD, PAD, PAD],
        [BOS, 1, 2, 3, EOS, PAD],
    ]
    assert batch["attention_mask"].tolist() == [[1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 0]]
    assert batch["input_ids"].dtype == torch.int64


def test_one_row_is_a_batch_of_one_without_its_axis(padded):
    one, batch = padded[1], padded.__getitems__([1])
    assert one.keys() == batch.keys()
    assert all(torch.equal(one[name], batch[name][0]) for name in one)


def test_packed_rows_have_no_padding():
    rows = TokenRows(np.arange(12, dtype=np.uint16).reshape(3, 4))
    batch = rows.__getitems__([0, 2])
    assert batch["attention_mask"].tolist() == [[1] * 4] * 2
    assert rows.valid_ids().tolist() == list(range(12))


def test_valid_ids_leave_the_padding_out(padded):
    assert padded.valid_ids().tolist() == [BOS, 1, 2, 3, EOS, BOS, 4, EOS, BOS, EOS]


def test_batches_do_not_alias_the_data():
    rows = TokenRows(np.zeros((2, 3), dtype=np.int64))
    rows.__getitems__([0])["input_ids"] += 5
    assert not rows.ids.any()


@given(st.integers(2, 50), st.floats(0.01, 0.9))
def test_split_tail_cuts_in_two(num_rows, fraction):
    rows = TokenRows(np.arange(num_rows)[:, None], np.ones(num_rows, dtype=int))
    head, tail = rows.split_tail(fraction)
    both = np.concatenate([head.ids, tail.ids])[:, 0].tolist()
    assert both == list(range(num_rows))
    assert len(tail) == max(1, round(fraction * num_rows))
    assert len(head.num_valid) == len(head)


# ---------------------------------------------------------------- order


def orders(num_rows, batch_size, world_size, epoch=0, seed=1):
    """Each rank's indices of an epoch, cut into batches."""
    ranks = []
    for rank in range(world_size):
        order = EpochOrder(num_rows, batch_size, rank, world_size, seed)
        order.set_epoch(epoch)
        indices = list(order)
        assert len(indices) == len(order)
        ranks.append(np.array(indices, dtype=int).reshape(-1, batch_size))
    return ranks


@given(st.integers(1, 200), st.integers(1, 6), st.integers(1, 5))
def test_ranks_partition_the_epoch(num_rows, batch_size, world_size):
    """No row twice; fewer than one global batch is left out; ranks keep step."""
    ranks = orders(num_rows, batch_size, world_size)
    assert len({len(rank) for rank in ranks}) == 1
    used = np.concatenate([rank.ravel() for rank in ranks])
    assert len(set(used.tolist())) == len(used)
    assert set(used.tolist()) <= set(range(num_rows))
    assert num_rows - len(used) < batch_size * world_size


@given(st.integers(8, 200), st.integers(1, 4), st.integers(1, 4))
def test_many_ranks_see_what_one_would(num_rows, batch_size, world_size):
    """W ranks with batch b, side by side, are one rank with batch W b, in order."""
    ranks = orders(num_rows, batch_size, world_size)
    (alone,) = orders(num_rows, batch_size * world_size, 1)
    assert np.array_equal(np.concatenate(ranks, axis=1), alone)


def test_epochs_differ_and_replay():
    (first,), (second,) = orders(100, 4, 1, epoch=0), orders(100, 4, 1, epoch=1)
    assert not np.array_equal(first, second)
    assert np.array_equal(orders(100, 4, 1, epoch=1)[0], second)
    assert not np.array_equal(orders(100, 4, 1, seed=2)[0], first)
    assert sorted(first.ravel()) == sorted(second.ravel()) == list(range(100))
