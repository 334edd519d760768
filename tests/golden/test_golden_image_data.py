"""Images as tokens: order, ids, flips, decoding, vocabularies of the algorithms."""

import numpy as np
import pytest
import torch
from golden_cases import Case, find_cases, golden_dir, parameters
from refusals import refused
from tiny import ALGORITHMS, compose

from data.images import ImageRows, load_images
from data.pixels import PixelTokenizer
from data.tokenizers import get_tokenizer

CASES = find_cases(golden_dir(), "image_tokenizer")
for_cases = pytest.mark.parametrize("case", parameters(CASES, "image_tokenizer*"))


def parts(case: Case) -> list[str]:
    """The sets of images of a case, by the fronts of their names."""
    return sorted({name.split("/")[0] for name in case.tensors})


def loaded(case: Case, part: str, folder) -> ImageRows:
    """The training rows of a case's images, by way of a file."""
    images = case[f"{part}/image"].numpy()
    labels = np.array(case.values[part]["labels"])
    np.savez(folder / f"{part}.npz", images=images, labels=labels)
    size = images.shape[1] * images.shape[2]
    name = case.setting("data.tokenizer_name_or_path")
    config = compose(
        "data=images",
        f"data.tokenizer_name_or_path={name}",
        f"data.source={folder}/{part}.npz",
        f"data.cache_dir={folder}/cache",
        f"data.num_classes={labels.max() + 1}",
        f"data.size={size}",
        f"model.length={3 * size}",
        "data.flip=True",
    )
    return load_images(config, get_tokenizer(config), "train")


@for_cases
def test_rows_of_images(case, tmp_path):
    """All of red row by row, then green, then blue; labels; a mask of ones."""
    for part in parts(case):
        rows = loaded(case, part, tmp_path)
        batch = rows.__getitems__(list(range(len(rows))))
        golden, said = case[f"{part}/input_ids"], case.values[part]
        assert torch.equal(batch["input_ids"], golden.to(torch.int64))
        assert f"torch.{said['id_dtype']}" == str(batch["input_ids"].dtype)
        assert batch["labels"].tolist() == said["labels"]
        is_ones = bool((batch["attention_mask"] == 1).all())
        assert is_ones == said["attention_mask_all_ones"]


@for_cases
def test_flipped_rows(case, tmp_path):
    """The second half of the indices."""
    for part in parts(case):
        if f"{part}/input_ids_flipped" in case:
            rows = loaded(case, part, tmp_path)
            assert rows.num_starts == 2
            ids = rows.__getitems__([len(rows) + n for n in range(len(rows))])
            golden = case[f"{part}/input_ids_flipped"]
            assert torch.equal(ids["input_ids"], golden.to(torch.int64))


@for_cases
def test_decoding(case):
    """Of one and of many; and an image is encoded to the same ids."""
    tokenizer = get_tokenizer(case.config)
    for part in parts(case):
        images, ids = case[f"{part}/image"], case[f"{part}/input_ids"].to(torch.int64)
        decoded = tokenizer.batch_decode(ids)
        assert decoded.dtype == torch.uint8
        assert torch.equal(decoded, images.permute(0, 3, 1, 2))
        if f"{part}/batch_decoded" in case:
            assert torch.equal(decoded, case[f"{part}/batch_decoded"])
        for number, (row, image) in enumerate(zip(ids, images, strict=True)):
            one = tokenizer.decode(row)
            assert torch.equal(one, image)
            assert torch.equal(tokenizer.encode(image), row)
            if f"{part}/decoded_{number}" in case:
                assert torch.equal(one, case[f"{part}/decoded_{number}"])


@for_cases
def test_a_mask_that_is_left_is_no_value(case):
    """The reference makes it 0, a dark spot; ours says it."""
    tokenizer = get_tokenizer(case.config)
    for part in parts(case):
        if f"{part}/with_mask" not in case:
            continue
        ids, golden = case[f"{part}/with_mask"], case[f"{part}/with_mask_decoded"]
        wrong = ids >= len(tokenizer)
        assert (golden.flatten(1)[wrong] == 0).all()
        said = f"{int(wrong.sum())} pixels in {int(wrong.any(dim=1).sum())} of"
        refused(lambda ids=ids: tokenizer.batch_decode(ids), said, "256", "mask")
        refused(lambda ids=ids: tokenizer.decode(ids[0]), "256", "noise_removal")
        assert torch.equal(tokenizer.batch_decode(ids.masked_fill(wrong, 0)), golden)


@for_cases
def test_vocabularies_of_models(case):
    """The mask is behind the values, of which uniform states have no more."""
    tokenizer = get_tokenizer(case.config)
    assert isinstance(tokenizer, PixelTokenizer)
    (plain,) = (
        x
        for x in case.values["tokenizers"]
        if not x["add_mask_token"] and not x["add_special_tokens"]
    )
    assert len(tokenizer) == tokenizer.vocab_size == plain["length"]
    assert tokenizer.vocab_size == plain["vocab_size"] == plain["pixel_values"]
    for role in ("mask", "bos", "eos", "pad"):
        assert getattr(tokenizer, f"{role}_token_id") is None
        assert plain[f"{role}_token_id"] in ("absent", None)
    for said in case.values["algorithms"]:
        vocabulary = ALGORITHMS[said["algo"]].vocabulary(tokenizer)
        assert vocabulary == (said["model_vocab_size"], said["mask_index"])
