"""The page of a run: what it says of texts and of images."""

import pytest
import torch
from refusals import refused
from tiny import tiny_model

from data.pixels import PixelTokenizer
from data.tokenizers import text8_tokenizer
from evaluation.trajectories import check_size, save_trajectories
from report.trajectory import read_page
from sampling.recording import Recorder

TEXT = text8_tokenizer()


def shown(tmp_path, *overrides, tokenizer=TEXT):
    model = tiny_model(*overrides, tokenizer=tokenizer)
    recorder = Recorder()
    samples = model.generate_samples(
        2, torch.Generator().manual_seed(0), recorder=recorder
    )
    path = str(tmp_path / "new" / "a.html")
    made = recorder.trajectories()
    save_trajectories(path, model, model.config, "runs/last.ckpt", made)
    (found,) = read_page(path)
    return found, samples.tokens


@pytest.mark.parametrize(
    ("overrides", "title"),
    [
        (["algo=mdlm"], "mdlm, ancestral, 8 steps"),
        (["algo=ar"], "ar, left to right"),
        (["algo=mdlm", "sampling.predictor=first_hitting"], "mdlm, first_hitting"),
        (
            ["algo=duo_base", "sampling.corrector=gibbs"],
            "duo_base, ancestral + gibbs, 8 steps",
        ),
    ],
)
def test_a_page_says_what_it_shows(tmp_path, overrides, title):
    found, tokens = shown(tmp_path, *overrides)
    assert found.title == title
    assert found.about["checkpoint"] == "last.ckpt"
    assert found.about["seed"] == "1"
    assert found.side is None
    ends = [x.states()[-1].tolist() for x in found.samples]
    assert ends == tokens.tolist()
    special = set(TEXT.all_special_ids)
    assert set(found.names) == found.pieces.keys() & special
    if "algo=mdlm" in overrides:
        assert found.mask == TEXT.mask_token_id
        assert found.pieces[found.mask] == "[MASK]"


def test_a_mask_behind_the_vocabulary_has_a_name(tmp_path):
    """As GPT-2's has none of its own."""
    tokenizer = text8_tokenizer()
    tokenizer.mask_token = None
    found, _ = shown(tmp_path, "algo=mdlm", tokenizer=tokenizer)
    assert found.mask == tokenizer.vocab_size
    assert found.pieces[found.mask] == "[MASK]"


def test_a_page_of_images(tmp_path):
    overrides = ("algo=mdlm", "data=cifar10", "model.length=12", "noise=cosine")
    found, tokens = shown(tmp_path, *overrides, tokenizer=PixelTokenizer())
    assert (found.side, found.mask, found.pieces) == (2, 256, {})
    assert [x.states()[-1].tolist() for x in found.samples] == tokens.tolist()
    assert (found.samples[0].first == 256).all()


def test_what_is_not_as_usual_is_said(tmp_path):
    found, _ = shown(tmp_path, "algo=mdlm", "sampling.temperature=0.5")
    assert found.about["temperature"] == "0.5"


def test_more_samples_than_a_page_has_room_for_are_refused():
    check_size(256, 1024, "key")
    parts = ["512 samples of 1024 tokens are too many", "256 samples", "lower key"]
    refused(lambda: check_size(512, 1024, "key"), *parts)
    refused(lambda: check_size(1, 2**20, "key"), "1 samples of this length")
