"""`mode=sample_eval` from the composed config to the JSON and the table, in one process
with tiny networks: every sampling command of the published scripts, prompts and gaps,
the judge, MAUVE."""

import json
import math
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from command_line import ALGORITHMS
from rich.console import Console

import main
from cli.commandline import quoted
from cli.settle import algorithm_class
from data.tokenizers import bytes_tokenizer
from metrics.numbers import measured
from report import console

LENGTH = 16
SIZES = (
    "model.hidden_size=16",
    "model.cond_dim=8",
    "model.n_blocks=1",
    "model.n_heads=2",
    f"model.length={LENGTH}",
    "data.tokenizer_name_or_path=bytes",
    "trainer.accelerator=cpu",
    "+trainer.enable_progress_bar=False",
    "eval.gen_ppl_eval_model_name_or_path=null",
    "loader.eval_batch_size=2",
    "sampling.num_sample_batches=2",
)
# What the tiny networks write: anything else in a sample was given.
WRITES = "abcdefghijklmnopqrstuvwxyz "

LM1B = "mode=sample_eval loader.batch_size=2 loader.eval_batch_size=64 data=lm1b-wrap"
OWT = (
    "mode=sample_eval seed=1 loader.batch_size=2 loader.eval_batch_size=8 "
    "data=openwebtext-split"
)
PSI = (
    "mode=sample_eval data=openwebtext-split data.cache_dir=cache model=small "
    "noise=log-linear sampling.predictor=psi sampling.steps=256 "
    "sampling.num_sample_batches=32 loader.eval_batch_size=16"
)
PSI_LOOP = (
    f"{PSI} sampling.p_nucleus=0.95 "
    "sampling.psi.time_profile=linear-constant-linear-0.9-inv "
    "sampling.psi.high_mode=pure-posterior "
    "sampling.psi.middle_mode=constant-remdm-0.01 "
    "sampling.psi.low_mode=pure-posterior "
    "sampling.psi.high_frac=0.45 sampling.psi.middle_frac=0.5"
)


def psi_of_one_mode(mode: str) -> str:
    return (
        f"{PSI} sampling.p_nucleus=0.9 sampling.psi.time_profile=linear "
        f"sampling.psi.high_mode={mode} sampling.psi.middle_mode={mode} "
        f"sampling.psi.low_mode={mode} "
        "sampling.psi.high_frac=0.0 sampling.psi.middle_frac=0.0"
    )


MDLM = "mode=sample_eval algo=mdlm data=openwebtext-split sampling.steps=1000"
# Overrides of the published scripts, but for the paths.
PUBLISHED = {
    "gen_ppl_lm1b_ar": (
        f"{LM1B} algo=ar model=small model.length=128 sampling.num_sample_batches=15 "
        "+wandb.offline=true"
    ),
    "gen_ppl_lm1b_duo": (
        f"{LM1B} algo=duo_base model=small model.length=128 "
        "sampling.num_sample_batches=15 sampling.steps=32 +wandb.offline=true "
        "sampling.noise_removal=greedy"
    ),
    "gen_ppl_owt_ar": (
        f"{OWT} algo=ar model=small sampling.num_sample_batches=100 "
        "+wandb.offline=true eval.generated_samples_path=samples.json"
    ),
    "gen_ppl_owt_duo": (
        f"{OWT} algo=duo_base model=small sampling.num_sample_batches=100 "
        "sampling.steps=32 +wandb.offline=true "
        "eval.generated_samples_path=samples.json"
    ),
    "gen_ppl_owt_mdlm": (
        "mode=sample_eval loader.batch_size=16 loader.eval_batch_size=16 "
        "data=openwebtext-split model=small algo=mdlm sampling.num_sample_batches=4 "
        "+wandb.offline=true"
    ),
    "gen_ppl_owt_sedd": (
        f"{OWT} algo=sedd model=small sampling.num_sample_batches=100 "
        "sampling.steps=32 sampling.predictor=analytic +wandb.offline=true"
    ),
    **{
        f"{algo}_{name}": f"{overrides} algo={algo}"
        for name, overrides in {
            "loop_remdm": PSI_LOOP,
            "max_capped_remdm": psi_of_one_mode("max-capped-0.01"),
            "max_rescale_eta": psi_of_one_mode("max-rescale-0.05"),
        }.items()
        for algo in ("duo_base", "mdlm")
    },
    "mdlm_readme": f"{MDLM} sampling.predictor=ddpm_cache",
    "mdlm_readme_semi_ar": (
        f"{MDLM} sampling.predictor=ddpm_cache sampling.semi_ar=True "
        "sampling.stride_length=4 sampling.num_strides=2"
    ),
    "mdlm_readme_ancestral": f"{MDLM} sampling.predictor=ddpm",
    "mdlm_readme_analytic": f"{MDLM} sampling.predictor=analytic",
    "mdlm_readme_float32": f"{MDLM} sampling.use_float64=False",
    "mdlm_readme_greedy": f"{MDLM} sampling.noise_removal=True",
    "mdlm_readme_no_removal": f"{MDLM} sampling.noise_removal=False",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """For checkpoints, which all tests share."""
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture
def checkpoint(compose, folder):
    """Path of an algorithm's checkpoint of tiny size: checkpoint("mdlm").

    Random networks that write the characters of WRITES and eos, so that a text has as
    many characters and special tokens as the sample has tokens.
    """

    def path(name: str) -> str:
        file = folder / f"{name}.ckpt"
        if file.exists():
            return str(file)
        tokenizer = bytes_tokenizer()
        config = compose(f"algo={name}", "data=synthetic", *SIZES, tiny=False)
        torch.manual_seed(0)
        model = algorithm_class(config)(config, tokenizer)
        bias = model.backbone.output_embedding.bias
        written = [*WRITES.replace(" ", "Ġ"), "[EOS]"]
        allowed = tokenizer.convert_tokens_to_ids(written)
        with torch.no_grad():
            for parameter in model.parameters():
                if not parameter.any():
                    parameter.normal_(std=0.5)
            kept = bias[allowed]
            bias.fill_(-1e4)
            bias[allowed] = kept
        saved = {"state_dict": model.state_dict()}
        model.ema = model.make_ema()
        model.on_save_checkpoint(saved)
        torch.save(saved, file)
        return str(file)

    return path


@pytest.fixture
def sample(compose, checkpoint, tmp_path, monkeypatch):
    """Runs a command as main.py does once Hydra has composed it; gives the JSON."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(console, "console", Console(width=200))

    def run(*overrides: str, published: str = "mode=sample_eval") -> dict:
        last = [quoted(override) for override in overrides]
        config = compose(*published.split(), *SIZES, *last, tiny=False)
        config.eval.checkpoint_path = checkpoint(config.algo.name)
        returned = main.run.__wrapped__(config)
        results = json.loads((tmp_path / "samples.json").read_text())
        assert returned.items() <= results.items()
        (tmp_path / "samples.json").unlink()
        assert not (tmp_path / "samples.json.parts").exists()
        return results

    return run


def characters(text: str) -> str:
    """One character a token: ^ is bos, $ is eos."""
    return text.replace("[BOS]", "^").replace("[EOS]", "$")


# ---------------------------------------------------------------- published commands


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_command(name, sample, capsys):
    overrides = PUBLISHED[name].split()
    results = sample("sampling.steps=8", published=PUBLISHED[name])
    length = LENGTH + (2 * 4 if "semi_ar" in name else 0)
    texts = [characters(text) for text in results["generated_seqs"]]
    assert [len(text) for text in texts] == [length] * 4
    written = "".join(texts).replace("^", "").replace("$", "")
    if name != "mdlm_readme_no_removal":  # which may leave a mask
        assert set(written) <= set(WRITES)
    assert results["complete"] is True
    assert results["num_samples"] == 4
    assert results["generative_ppl"] is None
    assert 0 < results["entropy"] <= math.log(length)
    limit = LENGTH if "algo=ar" in overrides else (1 + 2 * ("semi_ar" in name)) * 9
    assert 0 < results["evaluations"] <= limit
    settings = results["settings"]
    for override in overrides:
        key, value = override.split("=", 1)
        if key.startswith("sampling.psi") or key == "sampling.predictor":
            _, *path = key.split(".")
            node = settings["sampling"]
            for part in path:
                node = node[part]
            assert str(node) == value
    out = capsys.readouterr().out
    for shown in ("4 samples, ", "evaluations", "samples_per_second", "samples.json"):
        assert shown in out
    assert measured(results["entropy"], results["entropy_stderr"]) in out


def test_lengths_of_windows_are_the_tokens_before_eos(sample):
    """Bos not counted; without an eos all."""
    windows = ("sampling.semi_ar=True", "sampling.stride_length=8")
    results = sample("algo=mdlm", "data=synthetic", *windows, "sampling.steps=4")
    texts = [characters(text) for text in results["generated_seqs"]]
    assert any("$" in text[1:] for text in texts)
    expected = [len(text[1:].split("$")[0]) for text in texts]
    assert results["sequence_lengths"] == expected


def test_texts_of_blocks_end_at_eos(sample):
    """What is behind the end is in no number; lengths as of windows."""
    blocks = ("algo.block_size=4", "sampling.num_blocks=6", "sampling.stop_at_eos=True")
    results = sample("algo=mdlm", "data=synthetic", *blocks, "sampling.steps=4")
    texts = [characters(text) for text in results["generated_seqs"]]
    lengths = [len(text) for text in texts]
    assert not any("$" in text[1:] for text in texts)
    assert len(set(lengths)) > 1
    assert max(lengths) <= 24
    assert results["sequence_lengths"] == [length - 1 for length in lengths]
    counts = [[text.count(x) / len(text) for x in set(text)] for text in texts]
    entropies = [-sum(p * math.log(p) for p in shares) for shares in counts]
    assert results["entropy"] == pytest.approx(sum(entropies) / 4)
    assert results["complete"] is True


# ---------------------------------------------------------------- prompts and gaps


@pytest.mark.parametrize("name", ALGORITHMS)
def test_samples_begin_with_the_prompt(name, sample):
    """Bos, then the text; the rest is the network's."""
    results = sample(
        f"algo={name}", "data=synthetic", "sampling.steps=4", "sampling.prompt=ONCE, A"
    )
    assert results["prompts"] == ["ONCE, A"] * 4
    for text in map(characters, results["generated_seqs"]):
        assert text.startswith("^ONCE, A")
        assert set(text[8:]) <= set(WRITES + "$")
    assert len(set(results["generated_seqs"])) > 1


@pytest.mark.parametrize("name", [name for name in ALGORITHMS if name != "ar"])
@pytest.mark.parametrize("predictor", ["ancestral", "psi"])
def test_gaps_are_filled_between_the_given_text(name, predictor, sample):
    results = sample(
        f"algo={name}",
        "data=synthetic",
        f"sampling.predictor={predictor}",
        "sampling.psi.middle_mode=constant-0.5",
        "sampling.steps=5",
        "sampling.infill=THE[MASK:4]SAT[MASK].",
    )
    for text in map(characters, results["generated_seqs"]):
        assert (text[:4], text[8:11], text[12]) == ("^THE", "SAT", ".")
        assert set(text[4:8] + text[11] + text[13:]) <= set(WRITES + "$")


CHOOSING = {
    "gibbs": (
        *("algo=duo_base", "sampling.corrector=gibbs", "sampling.corrector_parallel=3"),
        "sampling.corrector_select=lowest_max",
    ),
    "confidence": (
        "algo=mdlm",
        "sampling.predictor=confidence",
        "sampling.order=margin",
    ),
    "entropy_bound": ("algo=sedd", "sampling.predictor=entropy_bound"),
}


@pytest.mark.parametrize("name", CHOOSING)
def test_samplers_that_choose_positions_fill_gaps(name, sample):
    """The file says all on which they depend, the temperature among it."""
    results = sample(
        *("data=synthetic", *CHOOSING[name], "sampling.temperature=0.7"),
        *("sampling.steps=5", "sampling.infill=THE[MASK:4]SAT[MASK]."),
    )
    for text in map(characters, results["generated_seqs"]):
        assert (text[:4], text[8:11], text[12]) == ("^THE", "SAT", ".")
        assert set(text[4:8] + text[11] + text[13:]) <= set(WRITES + "$")
    settings = results["settings"]["sampling"]
    assert settings["temperature"] == 0.7
    assert (settings["corrector"] or settings["predictor"]) == name
    assert results["evaluations"] > 0


def test_prompts_of_a_file_take_turns(sample, tmp_path):
    lines = ['"A"', '{"infill": "B[MASK:2]C"}', '{"prompt": "DE"}']
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    path = f"sampling.prompt_file={tmp_path}/prompts.jsonl"
    results = sample("algo=mdlm", "data=synthetic", "sampling.steps=4", path)
    assert results["prompts"] == ["A", "B[MASK:2]C", "DE", "A"]
    texts = [characters(text) for text in results["generated_seqs"]]
    assert [text[:2] for text in texts] == ["^A", "^B", "^D", "^A"]
    assert (texts[1][4], texts[2][2]) == ("C", "E")


def test_a_template_may_span_windows(sample):
    """A given token far beyond the first window is in its place as well."""
    results = sample(
        "algo=duo_base",
        "data=synthetic",
        "sampling.steps=4",
        "sampling.semi_ar=True",
        "sampling.stride_length=6",
        "sampling.num_strides=2",
        "sampling.infill=A[MASK:22]B",
    )
    for text in map(characters, results["generated_seqs"]):
        assert (len(text), text[:2], text[24]) == (28, "^A", "B")


def test_mistakes_are_one_line_and_leave_no_file(sample, tmp_path, capsys):
    """Those that only the tokenizer or the number of samples can tell, too."""
    (tmp_path / "prompts.txt").write_text("A\n" * 5)
    for override, part in (
        (f"sampling.prompt={'a' * LENGTH}", "model.length"),
        (f"sampling.prompt_file={tmp_path}/prompts.txt", "holds 5 prompts"),
        ("sampling.infill=none", "no gap"),
        ("sampling.temperature=-0.1", "at least 0 and at most"),
        ("sampling.gamma=0.5", "is for sampling.predictor=entropy_bound"),
        ("sampling.corrector=gibbs", "sampling.predictor=psi"),
    ):
        with pytest.raises(SystemExit) as end:
            sample("algo=mdlm", "data=synthetic", override)
        assert end.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()[-1:]
        assert line.startswith("error: sampling.")
        assert part in line
        assert not list(tmp_path.glob("samples.json*"))


# ---------------------------------------------------------------- judge and MAUVE


@pytest.fixture
def judge(tmp_path, monkeypatch):
    """Folder of a random GPT-2 over bytes, and how often it was loaded."""
    from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    tokenizer, folder = bytes_tokenizer(), tmp_path / "judge"
    size = {"n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 64}
    GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **size)).save_pretrained(
        folder
    )
    tokenizer.save_pretrained(folder)
    loads, load = [], AutoModelForCausalLM.from_pretrained

    def counted(*args, **kwargs):
        loads.append(args)
        return load(*args, **kwargs)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", counted)
    return SimpleNamespace(folder=folder, loads=loads)


def plain_perplexity(folder, texts: list[str]) -> tuple[float, float]:
    """Text by text: of eos tokens the first counts, the first token does not."""
    from transformers import AutoTokenizer, GPT2LMHeadModel

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = GPT2LMHeadModel.from_pretrained(folder).eval()
    nlls, counts = [], []
    for text in texts:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            log_p = model(ids).logits[0].double().log_softmax(dim=-1)
        tokens = ids[0].tolist()
        counted = [
            i
            for i in range(1, len(tokens))
            if tokens[i] != tokenizer.eos_token_id or tokens[i] not in tokens[:i]
        ]
        nlls.append(-sum(float(log_p[i - 1, tokens[i]]) for i in counted))
        counts.append(len(counted))
    x, n = np.array(nlls), np.array(counts)
    mean = x.sum() / n.sum()
    spread = ((x - mean * n) ** 2).sum() * len(x) / (len(x) - 1)
    return math.exp(mean), math.exp(mean) * math.sqrt(spread) / n.sum()


def test_generative_perplexity_is_that_of_the_texts(judge, sample, capsys):
    """Over every sample of every batch; the runs of a sweep load the judge once."""
    overrides = (
        *("algo=mdlm", "data=synthetic", "loader.eval_batch_size=3"),
        f"eval.gen_ppl_eval_model_name_or_path={judge.folder}",
        "eval.perplexity_batch_size=2",
    )
    for steps in (2, 4):
        results = sample(*overrides, f"sampling.steps={steps}")
        ppl, error = plain_perplexity(judge.folder, results["generated_seqs"])
        assert results["generative_ppl"] == pytest.approx(ppl, rel=1e-5)
        assert results["generative_ppl_stderr"] == pytest.approx(error, rel=1e-3)
        assert measured(ppl, error) in capsys.readouterr().out
    assert len(judge.loads) == 1


def test_mauve_compares_with_the_references(
    judge, sample, tmp_path, monkeypatch, capsys
):
    calls = []

    def compute_mauve(**arguments):
        calls.append(arguments)
        return SimpleNamespace(mauve=0.4321)

    fake = ModuleType("mauve")
    fake.compute_mauve = compute_mauve
    fake.__spec__ = ModuleSpec("mauve", None)
    monkeypatch.setitem(sys.modules, "mauve", fake)
    texts = [{"text": f"reference {i}"} for i in range(5)]
    (tmp_path / "texts.jsonl").write_text("\n".join(map(json.dumps, texts)))
    results = sample(
        "algo=mdlm",
        "data=synthetic",
        "seed=4",
        "sampling.steps=4",
        f"eval.gen_ppl_eval_model_name_or_path={judge.folder}",
        f"eval.mauve_references={tmp_path}/texts.jsonl",
    )
    (arguments,) = calls
    assert arguments["p_features"].shape == (5, 8)
    assert arguments["q_features"].shape == (4, 8)
    assert arguments["seed"] == 4
    assert results["mauve"] == 0.4321
    assert "0.4321" in capsys.readouterr().out


def test_mauve_that_is_not_installed_is_refused_at_once(
    judge, sample, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (tmp_path / "texts.txt").write_text("one\n")
    with pytest.raises(SystemExit):
        sample(
            "algo=mdlm",
            "data=synthetic",
            f"eval.gen_ppl_eval_model_name_or_path={judge.folder}",
            f"eval.mauve_references={tmp_path}/texts.txt",
        )
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: eval.mauve_references")
    assert "pip install mauve-text" in line
    assert not judge.loads
    assert not list(tmp_path.glob("samples.json*"))
