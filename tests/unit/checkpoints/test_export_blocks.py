"""`mode=export` of models with `algo.block_size`: the folder, and the model in it,
which writes block by block with a cache."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from documented import PAGES, blocks
from exported import export, files_of, save_tiny
from refusals import refused
from tiny import compose
from transformers import DynamicCache

import main
from checkpoints.about import describe
from checkpoints.modeling.modeling_discrete_diffusion import (
    CACHE,
    DiscreteDiffusionForCausalLM,
    DiscreteDiffusionForMaskedLM,
    DiscreteDiffusionModel,
)
from checkpoints.reading import read_checkpoint
from cli.stated import take_over_from
from models.attention import KVCache
from sampling.prompts import Given

KEY = "eval.checkpoint_path"
TEXT8 = "data.tokenizer_name_or_path=text8"
L, SIZE, B = 8, 2, 5
# At t = 0 not all tokens are clean, and the network is told so.
TOLD = ("algo.time_conditioning=True", "noise=linear", "noise.sigma_min=0.4")
CASES = {
    "mdlm": ("algo=mdlm",),
    "mdlm told": ("algo=mdlm", *TOLD),
    "duo_base": ("algo=duo_base",),
    "duo_base told": ("algo=duo_base", *TOLD),
}
OF_RUN = (
    *("logger=none", "+trainer.enable_progress_bar=False", "trainer.accelerator=cpu"),
    *("loader.eval_global_batch_size=4", "eval.gen_ppl_eval_model_name_or_path=null"),
    *("sampling.steps=3", "sampling.num_sample_batches=1"),
)
cases = pytest.mark.parametrize("name", CASES)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Our model with some settings, its folder, and the model in that."""
    made = {}

    def get(*settings):
        if settings not in made:
            root = tmp_path_factory.mktemp("blocks")
            model = save_tiny(root / "a.ckpt", *settings, TEXT8)
            export(root / "a.ckpt", root / "folder")
            kind = DiscreteDiffusionForMaskedLM
            if type(model).is_autoregressive:
                kind = DiscreteDiffusionForCausalLM
            theirs = kind.from_pretrained(root / "folder").eval()
            made[settings] = model, root / "folder", theirs
        return made[settings]

    return get


def of_blocks(pair, name, size=SIZE, *more):
    return pair(*CASES[name], f"algo.block_size={size}", *more)


def fields_of(folder):
    return json.loads((folder / "config.json").read_text())


def random_ids(model, length=L, rows=2):
    generator = torch.Generator().manual_seed(3)
    return torch.randint(model.vocab_size, (rows, length), generator=generator)


def close(one, two):
    torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------- the network


@cases
@torch.no_grad()
def test_logits_of_a_noisy_block_behind_clean_ones(name, pair):
    """Ours with a cache, ours in one pass, and those of the folder, where a clean pass
    is kept and a noisy one is not."""
    ours, _, theirs = of_blocks(pair, name)
    ids, sigma = random_ids(ours), torch.tensor([0.6, 3.0])
    whole = ours.hidden_of(ids, ids, sigma[:, None].expand(-1, L), SIZE)
    cache, kept = KVCache(L, SIZE), None
    for begin in range(0, L, SIZE):
        block = ids[:, begin : begin + SIZE]
        hidden = ours.hidden(block, sigma[:, None], None, cache)
        out = theirs(block, sigma, past_key_values=kept)
        again = theirs(block, sigma, **{CACHE: kept}).logits
        assert torch.equal(out.logits, again)
        assert out.get(CACHE) is kept
        close(out.logits, ours.logits_for_loss(hidden))
        of_pass = ours.logits_for_loss(whole[:, begin : begin + SIZE])
        close(out.logits, of_pass)
        ours.hidden(block, ours.clean_sigma(2), None, cache)
        cache.keep(SIZE)
        kept = theirs(block, past_key_values=kept, use_cache=True)[CACHE]
        assert kept.get_seq_length() == begin + SIZE


@cases
@torch.no_grad()
def test_several_clean_blocks_are_kept_in_one_pass(name, pair):
    ours, folder, theirs = of_blocks(pair, name)
    ids, sigma = random_ids(ours), torch.tensor([0.6, 3.0])
    model = DiscreteDiffusionModel.from_pretrained(folder).eval()
    parts = None
    for block in ids[:, :6].split(SIZE, dim=1):
        parts = model(block, past_key_values=parts, use_cache=True)[CACHE]
    whole = model(ids[:, :2], use_cache=True)[CACHE]
    whole = model(ids[:, 2:6], use_cache=True, return_dict=False, **{CACHE: whole})[1]
    assert whole.get_seq_length() == 6
    found = [theirs(ids[:, 6:], sigma, cache=x).logits for x in (parts, whole)]
    close(*found)
    assert whole.get_seq_length() == 6


@torch.no_grad()
def test_without_a_cache(pair):
    """At most a block is what the plain network sees; of several, a token sees its own
    and those before it, whatever the padding."""
    ours, _, theirs = of_blocks(pair, "mdlm")
    ids = random_ids(ours)
    block = ids[:, :SIZE]
    close(theirs(block).logits, ours.backbone(block, torch.zeros(2)))
    logits = theirs(ids).logits
    close(
        logits,
        ours.logits_for_loss(
            ours.hidden(ids, torch.zeros(2, 1), None, KVCache(L, SIZE))
        ),
    )
    for left, right in ((0, 3), (3, 0), (1, 2)):
        zeros = [torch.zeros_like(ids[:, :n]) for n in (left, right)]
        padded = torch.cat([zeros[0], ids, zeros[1]], dim=1)
        mask = torch.cat([zeros[0], torch.ones_like(ids), zeros[1]], dim=1)
        found = theirs(padded, attention_mask=mask).logits[:, left : left + L]
        close(found, logits)
    assert "past_key_values" not in theirs(ids)


@torch.no_grad()
def test_passes_that_make_no_sense_are_refused(pair):
    ours, _, theirs = of_blocks(pair, "duo_base")
    ids, sigma = random_ids(ours), torch.ones(2)
    with pytest.raises(ValueError, match="leave timesteps out"):
        theirs(ids, sigma, use_cache=True)
    with pytest.raises(ValueError, match="whole blocks of 2 tokens: it has 0, and 3"):
        theirs(ids[:, :3], use_cache=True)
    kept = theirs(ids[:, :4], use_cache=True)[CACHE]
    mask = torch.ones(2, 6, dtype=torch.long)
    expected = theirs(ids[:, 4:6], sigma, cache=kept).logits
    found = theirs(ids[:, 4:6], sigma, attention_mask=mask, cache=kept).logits
    assert torch.equal(found, expected)
    mask[0, 0] = 0
    with pytest.raises(ValueError, match="there is no padding"):
        theirs(ids[:, 4:6], sigma, attention_mask=mask, cache=kept)
    plain = pair("algo=mdlm")[2]
    with pytest.raises(ValueError, match="has no cache"):
        plain(ids, past_key_values=kept)
    kept = DynamicCache()
    for layer in range(2):
        kept.update(*torch.zeros(2, 2, 2, 3, 16), layer)
    with pytest.raises(ValueError, match="whole blocks of 2 tokens: it has 3"):
        theirs(ids[:, :2], sigma, cache=kept)


# ---------------------------------------------------------------- samples


def drawn_by_both(ours, theirs, given=None, steps=5, seed=4, **options):
    """Samples of the folder's model, and ours."""
    seeds = {"seed": seed} | options
    if given is not None:
        seeds["template"] = given
        tokens = given.expand(B, -1)
        given = Given(tokens, tokens >= 0)
    found = theirs.generate(B, steps, **seeds)
    generator = torch.Generator().manual_seed(seed)
    return found, ours.generate_samples(B, generator, steps, given)


# Settings of ours, and the same as options of the folder's model.
TEMPERED = ("sampling.temperature=2", "sampling.p_nucleus=0.9")
HITTING = ("sampling.predictor=first_hitting", "sampling.num_blocks=7")
WAYS = {
    "as long as a row": ((), {}),
    "longer": (("sampling.num_blocks=7",), {"num_blocks": 7}),
    "shorter": (("sampling.num_blocks=3",), {"num_blocks": 3}),
    "tempered": (TEMPERED, {"temperature": 2, "p_nucleus": 0.9}),
    "greedy": (("sampling.noise_removal=greedy",), {"noise_removal": "greedy"}),
    "first hitting": (HITTING, {"predictor": "first_hitting", "num_blocks": 7}),
}


@pytest.mark.parametrize(
    ("name", "way"),
    [
        (name, way)
        for name in CASES
        for way in WAYS
        if way != "first hitting" or "mdlm" in name  # which is of masks
    ],
)
def test_samples_are_those_of_whole_passes(name, way, pair):
    """Token for token: with the folder's cache, and by our sampler without one, which
    shows the network all clean tokens at every evaluation."""
    settings, options = WAYS[way]
    whole = ("sampling.block_cache=False", *settings)
    ours, _, theirs = of_blocks(pair, name, SIZE, *whole)
    found, expected = drawn_by_both(ours, theirs, **options)
    assert torch.equal(found, expected.tokens)


@cases
def test_a_text_ends_at_eos_behind_what_is_given(name, pair):
    """A prompt with an eos in it, gaps that are given further on, and rows of other
    lengths: whoever has ended leaves the batch."""
    more = ("sampling.num_blocks=9", "sampling.stop_at_eos=True")
    hot = "sampling.temperature=3"
    ours, _, theirs = of_blocks(pair, name, SIZE, *more, hot)
    eos, L = theirs.config.eos_token_id, 18
    ends = {"num_blocks": 9, "stop_at_eos": True, "temperature": 3.0}
    given = torch.full((B, L), -1)
    given[:, 1:4] = torch.tensor([5, eos, 6])
    given[0, 6] = 7
    rows, widths = [], []
    theirs.backbone.register_forward_pre_hook(lambda _, x: widths.append(len(x[0])))
    for seed in range(4):
        found, expected = drawn_by_both(ours, theirs, given, seed=seed, **ends)
        assert torch.equal(found, expected.tokens)
        for i, end in enumerate(expected.lengths.tolist()):
            assert (found[i, end:] == eos).all()
            assert not (found[i, 4 if i else 7 : end] == eos).any()
        assert (found[:, 1:4] == given[:, 1:4]).all()
        assert (found[0, 6] == 7).all()
        rows.append(expected.lengths)
    lengths = torch.cat(rows)
    assert int(lengths.min()) < L == int(lengths.max())
    assert min(widths) < B == max(widths)
    alone = theirs.generate(B, 5, seed=1, prompt=torch.tensor([5, 6]), **ends)
    assert (alone[:, 1:3] == torch.tensor([5, 6])).all()


@pytest.mark.parametrize("name", ["mdlm", "duo_base told"])
def test_one_block_is_the_plain_model(name, pair):
    whole, plain = of_blocks(pair, name, L)[2], pair(*CASES[name])[2]
    options = {"seed": 3, "p_nucleus": 0.9, "prompt": [5, 6]}
    expected = plain.generate(B, 6, **options)
    assert torch.equal(whole.generate(B, 6, **options), expected)
    assert torch.equal(whole.generate(B, 6, num_blocks=1, **options), expected)


@pytest.mark.parametrize(
    ("name", "size", "options", "words"),
    [
        ("mdlm", "null", {"num_blocks": 2}, "num_blocks=2 is for models that write"),
        ("mdlm", "null", {"stop_at_eos": True}, "the only value is False"),
        ("ar", None, {"num_blocks": 2}, "num_blocks=2 is for models that write"),
        ("mdlm", SIZE, {"num_blocks": 0}, "num_blocks is 0; give a whole number"),
        ("mdlm", SIZE, {"num_blocks": 2.5}, "num_blocks is 2.5; give a whole number"),
        ("mdlm", L, {"num_blocks": 2}, "model_length=8 has room for one"),
        ("mdlm", SIZE, {"template": torch.full((9,), -1)}, "template has shape (9,)"),
        (
            *("mdlm", SIZE, {"template": torch.full((8,), -1), "num_blocks": 5}),
            "whole numbers of shape (10,)",
        ),
        ("mdlm", SIZE, {"prompt": [1] * 5, "num_blocks": 2}, "n is at most 3"),
    ],
)
def test_options_that_make_no_sense_are_refused(name, size, options, words, pair):
    settings = (
        ("algo=ar",) if size is None else (f"algo={name}", f"algo.block_size={size}")
    )
    theirs = pair(*settings)[2]
    with pytest.raises(ValueError, match=re.escape(words)) as error:
        theirs.generate(B, 2, **options)
    assert "\n" not in str(error.value)


def test_a_text_without_eos_cannot_end(pair):
    theirs = of_blocks(pair, "mdlm")[2]
    theirs.config.eos_token_id, eos = None, theirs.config.eos_token_id
    try:
        with pytest.raises(ValueError, match=r"eos_token_id of config\.json is null"):
            theirs.generate(B, 2, stop_at_eos=True)
    finally:
        theirs.config.eos_token_id = eos


# ---------------------------------------------------------------- the folder


@pytest.mark.parametrize("size", [4, "[4,2,8]"])
def test_the_folder_says_its_blocks(size, pair, tmp_path):
    """Of several sizes the first; an export of it has the same bytes, and the card
    shows the call."""
    ours, folder, theirs = of_blocks(pair, "mdlm", size)
    assert fields_of(folder)["block_size"] == ours.block_size == 4
    assert describe(read_checkpoint(str(folder), KEY))["blocks"] == "of 4 tokens"
    export(folder, tmp_path / "again")
    assert files_of(tmp_path / "again") == files_of(folder)
    theirs.save_pretrained(tmp_path / "saved")
    saved = DiscreteDiffusionForMaskedLM.from_pretrained(tmp_path / "saved")
    assert saved.config.block_size == 4
    card = (folder / "README.md").read_text()
    for words in ("| blocks | of 4 tokens |", "algo.block_size=4"):
        assert words in card


def test_the_calls_of_the_card(pair):
    """They run as they stand there."""
    for name in ("mdlm", "duo_base told"):
        _, folder, theirs = of_blocks(pair, name)
        card = (folder / "README.md").read_text()
        parts = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
        told = [x for x in parts if "num_blocks" in x or "DynamicCache" in x]
        names = {"model": theirs, "torch": torch}
        for code in told:
            exec(code, names)
        assert len(told) == 2
        assert names["ids"].shape == (2, 2 * L)
        assert names["cache"].get_seq_length() == SIZE
        assert names["logits"].shape[:2] == (2, SIZE)
    one = of_blocks(pair, "mdlm", L)[1]
    assert "num_blocks" not in (one / "README.md").read_text()


def test_the_call_of_the_page(pair, tmp_path, monkeypatch):
    """That of docs/block_diffusion.md, with fewer blocks."""
    _, folder, _ = of_blocks(pair, "mdlm")
    shutil.copytree(folder, tmp_path / "exported")
    monkeypatch.chdir(tmp_path)
    (code,) = blocks(PAGES["docs/block_diffusion.md"], "python")
    assert "num_blocks=200" in code
    names = {}
    exec(code.replace("num_blocks=200", "num_blocks=6"), names)
    assert names["ids"].shape == (4, 6 * SIZE)


def test_whole_rows_have_no_field_of_it(pair):
    """Their config.json and card are what they were before there were blocks: the field
    is written where it says something."""
    _, folder, theirs = pair("algo=mdlm")
    assert "block_size" not in fields_of(folder)
    assert "block" not in (folder / "README.md").read_text()
    assert theirs.config.block_size is None


@pytest.mark.parametrize(
    ("stated", "word", "size"),
    [
        ("4", "null", 4),
        ("null", "4", None),  # which it states
        ("[4,2]", "2", 2),  # each row of the training had one of them
        ("[4,2]", "8", 4),
        (None, "4", 4),  # of an algorithm that it does not tell
    ],
)
def test_the_checkpoint_says_what_its_blocks_are(stated, word, size, tmp_path):
    silent = "algo" if stated is None else ""
    block = f"algo.block_size={stated or 'null'}"
    save_tiny(tmp_path / "a.ckpt", "algo=mdlm", block, TEXT8, config_of=silent)
    export(
        tmp_path / "a.ckpt", tmp_path / "out", "algo=mdlm", f"algo.block_size={word}"
    )
    assert fields_of(tmp_path / "out").get("block_size") == size


@pytest.mark.parametrize("value", [0, -2, True, 2.0, [2], "2"])
def test_a_block_size_that_is_none_is_refused(value, pair, tmp_path):
    folder = of_blocks(pair, "mdlm")[1]
    for name, content in files_of(folder).items():
        (tmp_path / name).write_bytes(content)
    fields = fields_of(folder) | {"block_size": value}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    refused(
        lambda: read_checkpoint(str(tmp_path), KEY), KEY, "config.json", "block_size"
    )


@pytest.mark.parametrize("name", ["mdlm", "duo_base"])
def test_our_own_code_reads_the_folder(name, pair, tmp_path, monkeypatch):
    """By its path alone: the bound of held-out text and samples, by blocks, are those
    of the checkpoint."""
    monkeypatch.chdir(tmp_path)
    folder = of_blocks(pair, name, SIZE, DATA[1])[1]
    for mode in ("ppl_eval", "sample_eval"):
        both = [evaluated(mode, path) for path in (folder, folder.parent / "a.ckpt")]
        assert both[0] == both[1]


# Of ids below that of the mask of text8.
DATA = ("data=synthetic", "data.vocab_size=4", "data.num_valid=8", TEXT8)


def evaluated(mode, path):
    """What an evaluation of a checkpoint finds, given its path alone."""
    words = [f"mode={mode}", f"{KEY}={path}", *DATA, *OF_RUN, "sampling.num_blocks=5"]
    config = compose(*words, tiny=False)
    take_over_from(config, words)
    assert (config.algo.block_size, config.model.length) == (SIZE, L)
    found = main.run.__wrapped__(config)
    if mode == "ppl_eval":
        return found
    written = Path("samples.json").rename(f"{Path(path).name}.json")
    return json.loads(written.read_text())["generated_seqs"]
