"""What a notebook calls: the same models, numbers and mistakes as the command line."""

import subprocess
import sys

import pytest
import torch
from command_line import ROOT
from nursery import ENV

import duo
from report.trajectory import read_page
from utils import ConfigError

SMALL = (
    *("data=docstrings", "model=tiny", "model.length=16", "model.n_blocks=1"),
    *("model.hidden_size=16", "model.n_heads=2", "trainer.accelerator=cpu"),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With last.ckpt of a model whose weights are random, as a run leaves it."""
    folder = tmp_path_factory.mktemp("run")
    config = duo.compose("algo=mdlm", *SMALL)
    from algo import MDLM
    from data.tokenizers import get_tokenizer

    torch.manual_seed(0)
    model = MDLM(config, get_tokenizer(config))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    content = {"state_dict": model.state_dict()}
    model.on_save_checkpoint(content)
    (folder / "checkpoints").mkdir()
    torch.save(content, folder / "checkpoints" / "last.ckpt")
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return duo.load(folder, device="cpu")


def test_importing_it_costs_no_torch():
    code = "import sys, duo; assert not {'torch', 'lightning'} & set(sys.modules)"
    environment = ENV | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], env=environment, cwd="/", check=True)


def test_main_finds_its_configs_from_any_folder(tmp_path):
    code = "import sys, main; sys.argv = ['', 'algo=mdml']; main.main()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=ENV | {"PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: Unknown algo='mdml'. Did you mean 'mdlm'?")


def test_a_file_and_its_folder_are_the_same(model, folder, monkeypatch):
    monkeypatch.chdir(folder)
    for path in ("checkpoints/last.ckpt", ".", folder / "checkpoints" / "last.ckpt"):
        weights = duo.load(path, device="cpu").model.state_dict()
        for name, x in model.model.state_dict().items():
            assert torch.equal(weights[name], x)


def test_samples_of_a_seed_are_the_same(model):
    first = model.sample(3, steps=4)
    assert first == model.sample(3, steps=4)
    assert first != model.sample(3, steps=4, seed=2)
    assert len(set(first)) == 3
    assert model.model.sampler.num_steps == 1000  # as it was


def test_a_page_shows_the_same_samples(folder, tmp_path):
    """Of several batches."""
    model = duo.load(folder, "loader.eval_batch_size=2", device="cpu")
    page = tmp_path / "a.html"
    texts = model.sample(3, steps=4, prompts="ab", save_trajectory=page)
    assert texts == model.sample(3, steps=4, prompts="ab")
    (shown,) = read_page(str(page))
    assert shown.title == "mdlm, ancestral, 4 steps"
    assert shown.about["checkpoint"] == "last.ckpt"
    for text, one in zip(texts, shown.samples, strict=True):
        ids = one.states()[-1].tolist()
        assert "".join(shown.pieces[x] for x in ids) == text
        assert one.given.nonzero()[0].tolist() == [0, 1, 2]


def test_prompts_and_gaps_are_kept(model):
    samples = model.sample(2, prompts=["ab", "cd"], steps=2)
    assert ["ab" in x for x in samples] == [True, True, False, False]
    assert ["cd" in x[:12] for x in samples[2:]] == [True, True]
    (filled,) = model.sample(infill="x[MASK:3]y", steps=2, predictor="first_hitting")
    assert "x" in filled


def test_texts_of_blocks_are_of_any_length(folder):
    model = duo.load(folder, "algo.block_size=4", device="cpu")
    texts = model.sample(4, steps=2, num_blocks=6, stop_at_eos=True)
    eos = model.tokenizer.eos_token
    assert not any(eos in text.removeprefix(eos) for text in texts)
    assert max(map(len, texts)) > 16
    (text,) = model.sample(prompts=["a" * 18], steps=2, num_blocks=6)
    assert "a" * 18 in text
    with pytest.raises(ConfigError, match=r"room for 23 \(sampling.num_blocks"):
        model.sample(prompts=["a" * 40], num_blocks=6)


def test_more_samples_than_a_batch(folder):
    model = duo.load(folder, "loader.eval_batch_size=2", device="cpu")
    assert len(model.sample(5, steps=2)) == 5


def test_scores_have_errors(model):
    long, short = model.score(["a text of some length, and more", "a"], num_draws=8)
    assert long.nll > short.nll > 0
    assert long.stderr > 0
    assert long.num_tokens > short.num_tokens == 1
    assert model.score("a", num_draws=8) == [short]


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"step": 4}, r"Unknown key sampling.step\. Did you mean 'sampling.steps'"),
        ({"steps": 0}, "sampling.steps=0 is not a whole number of at least 1"),
        ({"steps": "many"}, "sampling.steps='many' is not a whole number"),
        ({"predictor": "psy"}, r"Unknown sampling.predictor='psy' \(MDLM\)"),
        ({"p_nucleus": 2.0}, "sampling.p_nucleus=2.0 is not a number"),
        ({"psi__high_mode": "x"}, "sampling.psi.high_mode='x'"),
        ({"num_samples": 0}, "num_samples=0 is not at least 1"),
        ({"infill": ["a"]}, "sampling.infill='a' has no gap"),
        ({"prompts": ["a"], "infill": ["b [MASK]"]}, "give one of them"),
        ({"prompts": ["a" * 40]}, "there is room for 15"),
        ({"save_trajectory": "a.png"}, "save_trajectory=.*does not end in .html"),
        (
            {"save_trajectory": "a.html", "num_samples": 10**5},
            "100000 samples of 16 tokens are too many for a page",
        ),
    ],
)
def test_a_mistake_is_the_line_of_the_command(model, asked, said):
    if "psi__high_mode" in asked:
        asked = asked | {"predictor": "psi"}
    with pytest.raises(ConfigError, match=said) as refused:
        model.sample(**asked)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: duo.compose("algo=mdml"), "Unknown algo='mdml'. Did you mean 'mdlm'"),
        (lambda: duo.compose("optim.lrr=1"), "Unknown key optim.lrr. Did you mean"),
        (lambda: duo.compose("seed=${nothing}").seed, "nothing"),
        (lambda: duo.train("algo=mdlm", *SMALL, "optim.lr=a"), "optim.lr='a' is not"),
        (lambda: duo.train("+a=1"), "Unknown key a."),
        (lambda: duo.load("nothing.ckpt"), "there is no such file"),
    ],
)
def test_mistakes_of_other_calls(call, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Exception, match=said):
        call()


def test_a_contradiction_is_that_of_the_command(model):
    for word in ("model.length=8", "noise=cosine", "algo=duo_base"):
        with pytest.raises(ConfigError, match=r"contradicts eval.checkpoint_path="):
            model.evaluate(word)
