"""Rows of the synthetic data set, packing of documents, and tokenizers."""

import re
from typing import Any

import numpy as np
import torch
from golden_cases import Case, for_cases
from omegaconf import OmegaConf

from data.detokenizers import DETOKENIZERS, detokenize
from data.loading import load_synthetic
from data.packing import Chunk, Layout, lay_out, rows_of
from data.rows import TokenRows
from data.synthetic import synthetic_rows
from data.tokenizers import get_tokenizer, synthetic_tokenizer, text8_tokenizer
from dataloader import ReferenceOrder

# Of their splits: ours, and the seed that the data set gives it.
SPLITS = {"train": ("train", 42), "validation": ("valid", 41)}


def synthetic_sizes(case: Case, name: str) -> dict[str, int]:
    """Rows, vocabulary and seed behind a tensor, as its meaning has them.

    Where it leaves out the vocabulary, the end of every row, K - 1, tells; where it
    leaves out the seed, it is the data set's; rows beyond the recorded do not matter.
    """
    text = case.meaning(name)
    sizes = {
        key: int(found[1])
        for key, pattern in {
            "num_rows": r"rows of (\d+)",
            "length": r"length (\d+)",
            "vocab_size": r"vocabulary (\d+)",
            "seed": r"seed (\d+)",
        }.items()
        if (found := re.search(pattern, text))
    }
    rows = case[name]
    told = {"length": rows.shape[1], "vocab_size": int(rows[0, -1]) + 1}
    assert told | sizes == sizes | told, f"{name}: {text}"
    _, seed = SPLITS[name.split("/")[-1]]
    return {"num_rows": len(rows), "seed": seed} | told | sizes


@for_cases("data_synthetic")
def test_synthetic_rows(case):
    """First rows at the given seeds, however many rows follow; and through the data
    set, if the seed is its own."""
    assert case.tensors
    for name, golden in case.tensors.items():
        sizes = synthetic_sizes(case, name)
        ours = torch.from_numpy(synthetic_rows(**sizes).astype(np.int64))
        assert torch.equal(ours[: len(golden)], golden)
        fewer = synthetic_rows(**sizes | {"num_rows": len(golden)})
        assert torch.equal(torch.from_numpy(fewer.astype(np.int64)), golden)
        split, seed = SPLITS[name.split("/")[-1]]
        if sizes["seed"] != seed:
            continue
        data = {"vocab_size": sizes["vocab_size"]}
        data |= {"num_train": sizes["num_rows"], "num_valid": sizes["num_rows"]}
        model = {"length": sizes["length"]}
        config = OmegaConf.create({"data": data, "model": model})
        rows = load_synthetic(config, None, split)
        ids = rows.__getitems__(list(range(len(golden))))["input_ids"]
        assert torch.equal(ids, golden)


def packed(documents: list, given: dict, insert_eos: bool) -> TokenRows:
    """Documents as rows; each is a chunk of its own."""
    chunks = (
        Chunk(np.array(ids, dtype=np.int32), np.array([len(ids)])) for ids in documents
    )
    length = given["block_size"]
    layout = Layout(length, given["bos"], given["eos"], pad=0, insert_eos=insert_eos)
    return rows_of(lay_out(chunks, layout), length)


@for_cases("data_group_texts", holding="cases")
def test_packing(case):
    """Documents that end in eos, concatenated, cut into blocks between bos and eos.

    The remainder is dropped. `insert_eos` puts the same eos behind documents without.
    """
    for given in case.values["cases"]:
        documents = given["input_ids"]
        rows = packed(documents, given, insert_eos=False)
        assert rows.ids.tolist() == given["output_input_ids"]
        assert len(rows) == len(given["output_input_ids"])
        masks = [rows[index]["attention_mask"] for index in range(len(rows))]
        assert [len(mask) for mask in masks] == given["attention_mask_lengths"]
        ones = all(bool((mask == 1).all()) for mask in masks)
        assert ones == given["attention_mask_all_ones"]
        if all(document[-1:] == [given["eos"]] for document in documents):
            bare = [document[:-1] for document in documents]
            again = packed(bare, given, insert_eos=True)
            assert again.ids.tolist() == given["output_input_ids"]


@for_cases("data_detokenizers", holding="cases")
def test_detokenizers(case):
    """Every clean-up of every sentence, to the letter."""
    for given in case.values["cases"]:
        names = given.keys() - {"input"}
        assert names
        for name in names:
            assert detokenize(given["input"], DETOKENIZERS[name]) == given[name], name


# ---------------------------------------------------------------- order


def numbered(golden: dict, front: str) -> tuple[int, Any]:
    """The number behind `front` in the one key that begins with it, and its value."""
    (key,) = (key for key in golden if re.fullmatch(rf"{front}\d+", key))
    return int(key.removeprefix(front)), golden[key]


def order_of(n: int, rank: int, world_size: int, seed: int) -> ReferenceOrder:
    return ReferenceOrder(n, 1, rank, world_size, seed)


@for_cases("data_samplers", holding="samplers")
def test_reference_order_of_one_device(case):
    """Epoch after epoch, and from the middle of one."""
    golden = case.values["samplers"]["random"]
    order = order_of(golden["n"], 0, 1, golden["generator_seed"])
    assert list(order) == golden["epoch0"]
    number, order.start = numbered(golden, "counter_after_")
    rest = golden["resumed_with_generator_state_from_epoch_start"]
    assert golden[f"first{number}"] + rest == golden["epoch0"]
    assert list(order) == rest
    order.start = 0
    order.set_epoch(1)
    assert list(order) == golden["epoch1"] == golden["then_next_epoch"]


@for_cases("data_samplers", holding="samplers")
def test_reference_order_of_many_devices(case):
    """The rows of full batches; the reference fills the last one with rows again.

    Its order without shuffling is that of places, rank, rank + W, ...; no run of ours
    leaves rows unshuffled.
    """
    for golden in case.values["samplers"]["distributed"]:
        n = golden.get("n", case.values["samplers"]["random"]["n"])
        world_size, rank = golden["num_replicas"], golden["rank"]
        if not golden["shuffle"]:
            full = list(range(rank, n // world_size * world_size, world_size))
            assert golden["epoch0"][: len(full)] == full
            continue
        order = order_of(n, rank, world_size, golden["seed"])
        for epoch in (0, 1):
            if world_size == 1 and epoch:
                continue  # ours goes on with the generator, as on one device
            order.set_epoch(epoch)
            full = golden[f"epoch{epoch}"][: n // world_size]
            assert list(order) == full
            if golden["drop_last"]:
                assert full == golden[f"epoch{epoch}"]
        if world_size > 1:
            order.start, rest = numbered(golden, "resumed_epoch1_counter")
            assert list(order) == rest[: n // world_size - order.start]


# ---------------------------------------------------------------- tokenizers


def data_config(name: str, **data) -> OmegaConf:
    return OmegaConf.create({"data": {"tokenizer_name_or_path": name, **data}})


@for_cases("data_tokenizers", holding="text8")
def test_text8_vocabulary(case):
    """Ids of all entries, sizes, special tokens; nothing is added by get_tokenizer."""
    golden = case.values["text8"]
    for tokenizer in (text8_tokenizer(), get_tokenizer(data_config("text8"))):
        assert tokenizer.get_vocab() == golden["vocab"]
        assert tokenizer.vocab_size == golden["vocab_size"]
        assert len(tokenizer) == golden["length"]
        for role, (token, index) in golden["special"].items():
            assert getattr(tokenizer, f"{role}_token") == token
            assert getattr(tokenizer, f"{role}_token_id") == index
    after = case.values["text8_after_get_tokenizer"]
    assert (tokenizer.vocab_size, len(tokenizer)) == (
        after["vocab_size"],
        after["length"],
    )


@for_cases("data_tokenizers", holding="text8")
def test_text8_encoding(case):
    """Text to ids, with special tokens in it, and nothing around it."""
    tokenizer = text8_tokenizer()
    for example in case.values["text8"]["encode"]:
        text = example["text"]
        assert tokenizer.encode(text) == example["ids"]
        bare = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert bare == example["ids_no_special"]


@for_cases("data_tokenizers", holding="text8")
def test_text8_decoding(case):
    """Ids to text, one by one and as a batch; spaces as they are."""
    tokenizer, golden = text8_tokenizer(), case.values["text8"]
    for example in golden["decode"]:
        assert tokenizer.decode(example["ids"]) == example["text"]
    ids = [example["ids"] for example in golden["decode"]]
    assert tokenizer.batch_decode(ids) == golden["batch_decode"]


@for_cases("data_tokenizers", holding="synthetic")
def test_synthetic_tokenizer(case):
    """Sizes, special tokens and decoding.

    The reference cannot encode; ours gives the ids back. It also adds a pad token
    beyond the vocabulary, which no size counts; ours pads with eos.
    """
    golden = case.values["synthetic"]
    config = data_config("synthetic", vocab_size=golden["argument_vocab_size"])
    after = golden["after_get_tokenizer"]
    for tokenizer, sizes in (
        (synthetic_tokenizer(config), golden),
        (get_tokenizer(config), after),
    ):
        assert tokenizer.vocab_size == sizes["vocab_size"]
        assert len(tokenizer) == sizes["length"]
        assert tokenizer.bos_token_id == golden["bos"]
        assert tokenizer.eos_token_id == golden["eos"]
        assert tokenizer.mask_token_id == golden["mask"]
        vocab = tokenizer.get_vocab()
        assert golden["some_tokens"].items() <= vocab.items()
        for example in golden["decode"]:
            assert tokenizer.decode(example["ids"]) == example["text"]
            encoded = tokenizer(example["text"], add_special_tokens=False)
            assert encoded["input_ids"] == example["ids"]
    if "encode" in golden:
        assert "fails" in golden["encode"]
    assert after["pad_token_id"] >= len(tokenizer)
    assert tokenizer.pad_token_id == golden["eos"]
