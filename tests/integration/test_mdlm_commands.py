"""Commands of MDLM's README, letter by letter: composed, and run at a tiny size with
files in the place of the hub; and what its checkpoints are good for."""

import json
import shlex

import pytest
import torch
from command_line import run
from mdlm_files import CONFIG, write_file
from omegaconf import OmegaConf
from released import write_released
from stand_ins import write_documents
from tiny import compose

import main
from cli.commandline import arguments
from cli.settle import algorithm_class
from data.tokenizers import bytes_tokenizer

LENGTH = 16
COMMANDS = {
    "train": r"""
python main.py \
  model=small \
  data=openwebtext-split \
  wandb.name=mdlm-owt \
  parameterization=subs \
  model.length=1024 \
  eval.compute_generative_perplexity=True \
  sampling.steps=1000
""",
    "eval": r"""
python main.py \
  mode=ppl_eval \
  loader.batch_size=16 \
  loader.eval_batch_size=16 \
  data=openwebtext-split \
  model=small \
  parameterization=subs \
  backbone=dit \
  model.length=1024 \
  eval.checkpoint_path=/path/to/checkpoint/mdlm.ckpt \
  +wandb.offline=true
""",
    "eval_ar": r"""
python main.py \
  mode=ppl_eval \
  loader.batch_size=16 \
  loader.eval_batch_size=16 \
  data=openwebtext-split \
  model=small-ar \
  parameterization=ar \
  backbone=ar \
  model.length=1024 \
  eval.checkpoint_path=/path/to/checkpoint/ar.ckpt \
  +wandb.offline=true
""",
    "eval_sedd": r"""
python main.py \
  mode=ppl_eval \
  loader.batch_size=16 \
  loader.eval_batch_size=16 \
  data=openwebtext-split \
  model=small \
  parameterization=sedd \
  backbone=dit \
  model.length=1024 \
  eval.checkpoint_path=/path/to/checkpoint/sedd.ckpt \
  time_conditioning=True \
  sampling.predictor=analytic \
  +wandb.offline=true
""",
    "sample_hub": r"""
python main.py \
  mode=sample_eval \
  eval.checkpoint_path=kuleshov-group/mdlm-owt \
  data=openwebtext-split  \
  model.length=1024  \
  sampling.predictor=ddpm_cache  \
  sampling.steps=1000 \
  loader.eval_batch_size=1 \
  sampling.num_sample_batches=10 \
  backbone=hf_dit
""",
    "sample": r"""
python main.py \
  mode=sample_eval \
  eval.checkpoint_path=/path/to/checkpoint/mdlm.ckpt \
  data=openwebtext-split  \
  model.length=1024  \
  sampling.predictor=ddpm_cache  \
  sampling.steps=10000 \
  loader.eval_batch_size=1 \
  sampling.num_sample_batches=1 \
  backbone=dit
""",
    "semi_ar": r"""
python main.py \
  mode=sample_eval \
  eval.checkpoint_path=kuleshov-group/mdlm-owt \
  data=openwebtext-split  \
  parameterization=subs \
  model.length=1024  \
  sampling.predictor=ddpm_cache  \
  sampling.steps=1000 \
  loader.eval_batch_size=1 \
  sampling.num_sample_batches=2 \
  sampling.semi_ar=True \
  sampling.stride_length=512 \
  sampling.num_strides=2 \
  backbone=hf_dit
""",
}
# What a command means here, beside what it says in the words of this code.
MEANT = {
    "train": {"algo.name": "mdlm", "algo.time_conditioning": False},
    "eval": {"algo.name": "mdlm", "algo.backbone": "dit"},
    "eval_ar": {"algo.name": "ar", "model.name": "small", "algo.backbone": "dit"},
    "eval_sedd": {"algo.name": "sedd", "algo.time_conditioning": True},
    "sample_hub": {
        "algo.name": "mdlm",
        "algo.backbone": "hf_dit",
        "sampling.predictor": "ancestral_cache",
    },
    "sample": {"algo.name": "mdlm", "sampling.predictor": "ancestral_cache"},
    "semi_ar": {"algo.name": "mdlm", "sampling.predictor": "ancestral_cache"},
}
QUIET = ("+trainer.enable_progress_bar=False", "+trainer.enable_model_summary=False")
SIZES = (
    "model.hidden_size=32",
    "model.cond_dim=12",
    "model.n_blocks=2",
    "model.n_heads=2",
    "model.dropout=0",
)
SMALL = (
    f"model.length={LENGTH}",
    "loader.global_batch_size=4",
    "loader.batch_size=4",
    "loader.eval_global_batch_size=4",
    "loader.eval_batch_size=2",
    "loader.num_workers=0",
    "trainer.accelerator=cpu",
    "trainer.devices=1",
    "trainer.max_steps=2",
    "trainer.val_check_interval=2",
    "trainer.num_sanity_val_steps=0",
    "sampling.steps=4",
    "sampling.num_sample_batches=1",
    "eval.gen_ppl_eval_model_name_or_path=null",
    "data.tokenizer_name_or_path=bytes",
    "data.valid_documents=5",
    "data.num_proc=1",
    *QUIET,
)


def words_of(name: str) -> list[str]:
    """What a command gives to main.py."""
    words = shlex.split(COMMANDS[name].replace("\\\n", " "))
    assert words[:2] == ["python", "main.py"]
    return words[2:]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with documents, the hub's model under its name, and the three files."""
    folder = tmp_path_factory.mktemp("mdlm")
    write_documents(folder / "documents", num=20)
    tokenizer = bytes_tokenizer()

    def size(algo: str) -> int:
        config = compose(f"algo={algo}", "data=synthetic", *SIZES, tiny=False)
        return algorithm_class(config)(config, tokenizer).vocab_size

    mask, none = size("mdlm"), size("ar")
    write_released(folder / "kuleshov-group/mdlm-owt", "mdlm", mask, LENGTH)
    write_file(folder / "mdlm.ckpt", mask)
    write_file(folder / "ar.ckpt", none, parameterization="ar", backbone="ar")
    told = {"parameterization": "sedd", "time_conditioning": True}
    write_file(folder / "sedd.ckpt", mask, **told)
    return folder


@pytest.fixture
def smaller(workplace):
    """What makes a command tiny and gives it its files: smaller(words)."""

    def more(words: list[str]) -> list[str]:
        given = dict(word.split("=", 1) for word in words if "=" in word)
        path = given.get("eval.checkpoint_path", "")
        name = path.rpartition("/")[2]
        files = [f"eval.checkpoint_path={workplace}/{name}"] if ".ckpt" in path else []
        sizes = SIZES if given.get("backbone") != "hf_dit" else ()
        strides = ["sampling.stride_length=4"] if "sampling.semi_ar" in given else []
        data = [f"data.source={workplace}/documents", f"data.cache_dir={workplace}/c"]
        return [*SMALL, *sizes, *data, *files, *strides]

    return more


def in_process(words: list[str]) -> dict:
    """A command as main.py does it once Hydra has composed the config."""
    return main.run.__wrapped__(compose(*arguments(words), tiny=False))


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_composes(name):
    words = words_of(name)
    config = compose(*arguments(words), tiny=False)
    for key, value in MEANT[name].items():
        assert OmegaConf.select(config, key) == value
    own = [word for word in words if "=" in word and "." in word.split("=")[0]]
    said = dict(word.lstrip("+").split("=", 1) for word in own)
    for key in said.keys() - MEANT[name].keys():
        assert str(OmegaConf.select(config, key)).lower() == said[key].lower()


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_runs(name, workplace, smaller, monkeypatch):
    """To its end, with nothing of it changed but sizes and paths."""
    monkeypatch.chdir(workplace)
    words = words_of(name)
    folder = workplace / name
    place = f"checkpointing.save_dir={folder}"
    samples = folder / "samples.json"
    more = [place, f"eval.generated_samples_path={samples}"]
    if name == "train":  # GPT-2 large is not on this machine
        more.append("eval.compute_generative_perplexity=False")
    results = in_process([*words, *smaller(words), *more])
    if "mode=sample_eval" in words:
        content = json.loads(samples.read_text())
        texts = content["generated_seqs"]
        assert content["complete"] is True
        assert len(texts) == 2
        assert all(texts)
        assert content["settings"]["sampling"]["semi_ar"] is (name == "semi_ar")
    else:
        assert results["ppl"] > 1


def test_the_real_command_line(workplace, smaller, monkeypatch):
    """Each new spelling is said once, and the numbers are those of our own words."""
    words = words_of("eval_sedd")
    meant = "eval.differing=data.tokenizer_name_or_path"  # the file states gpt2
    more = [*smaller(words), "logger=none", meant]
    done = run(*words, *more, "hydra.run.dir=theirs", cwd=workplace)
    for word, own in {
        "parameterization=sedd": "algo=sedd",
        "backbone=dit": "algo.backbone=dit",
        "time_conditioning=True": "algo.time_conditioning=True",
    }.items():
        assert done.stderr.count(f"{word} is MDLM's spelling: {own}") == 1
    own = ["algo=sedd" if x.startswith("parameter") else x for x in words]
    own = [x for x in own if x.split("=")[0] not in ("backbone", "time_conditioning")]
    theirs = json.loads((workplace / "theirs" / "likelihood.json").read_text())
    monkeypatch.chdir(workplace)
    assert theirs["nll"] == in_process([*own, *more])["nll"]


def test_a_contradiction_is_one_line(tmp_path):
    done = run("algo=duo", "parameterization=subs", cwd=tmp_path, status=2)
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: parameterization=subs and algo=duo contradict")
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- its checkpoints


def test_a_file_is_inspected(workplace, capsys):
    path = f"eval.checkpoint_path={workplace}/ar.ckpt"
    lines = main.run.__wrapped__(compose("mode=inspect", path, tiny=False))
    assert (lines["algorithm"], lines["step"]) == ("ar", "1000000")


def test_evaluation_takes_the_averaged_weights(workplace, smaller, monkeypatch):
    """Which are those of the folder, whatever the raw ones are."""
    monkeypatch.chdir(workplace)
    content = torch.load(workplace / "mdlm.ckpt", weights_only=False)
    vocab = len(content["state_dict"]["backbone.vocab_embed.embedding"])
    write_file(workplace / "raw.ckpt", vocab, raw=2.0)
    words = words_of("eval")
    base = [*words, *smaller(words), "logger=none"]
    file = f"eval.checkpoint_path={workplace}/raw.ckpt"
    averaged = in_process([*base, file])
    raw = in_process([*base, file, "eval.disable_ema=True"])
    hub = "eval.checkpoint_path=kuleshov-group/mdlm-owt"
    assert averaged["nll"] == in_process([*base, hub, "algo.backbone=dit"])["nll"]
    assert averaged["nll"] != raw["nll"]


@pytest.mark.parametrize("source", ["mdlm.ckpt", "kuleshov-group/mdlm-owt"])
def test_it_is_fine_tuned(source, workplace, smaller, tmp_path, monkeypatch):
    """From its weights: with a learning rate of 0 they are what is saved."""
    monkeypatch.chdir(workplace)
    words = [x for x in words_of("train") if "generative" not in x]
    start = f"training.finetune_path={workplace}/{source}"
    place = f"checkpointing.save_dir={tmp_path}"
    more = ["optim.lr=0", "logger=none", "eval.generate_samples=False", start, place]
    in_process([*words, *smaller(words), *more])
    last = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)
    content = torch.load(workplace / "mdlm.ckpt", weights_only=False)
    for name, value in content["state_dict"].items():
        assert torch.equal(value, last["state_dict"][name])


def test_a_file_of_a_mamba(workplace, smaller, tmp_path, monkeypatch):
    """Tied tensors are there twice in the weights, and once in the EMA."""
    monkeypatch.chdir(workplace)
    mamba = ["backbone=dimamba", "model=tiny-dimamba"]
    words = [
        x for x in words_of("eval") if x.split("=")[0] not in ("backbone", "model")
    ]
    words += mamba
    sizes = [*smaller(words), "model.hidden_size=16", "logger=none"]
    config = compose(*arguments([*words, *sizes]), tiny=False)
    torch.manual_seed(0)
    model = algorithm_class(config)(config, bytes_tokenizer())
    saved = {f"backbone.{k}": x for k, x in model.backbone.state_dict().items()}
    theirs = CONFIG | {"backbone": "dimamba"}
    shadow = [x.detach() for x in model.backbone.parameters()]
    content = {
        "state_dict": saved,
        "global_step": 3,
        "epoch": 0,
        "hyper_parameters": {"config": OmegaConf.create(theirs)},
        "ema": {"decay": 0.9999, "num_updates": 3, "shadow_params": shadow},
    }
    torch.save(content, tmp_path / "mamba.ckpt")
    file = f"eval.checkpoint_path={tmp_path}/mamba.ckpt"
    lines = main.run.__wrapped__(compose("mode=inspect", file, tiny=False))
    assert lines["algorithm"] == "mdlm"
    assert lines["parameters"] == f"{sum(x.numel() for x in shadow):,}"
    assert in_process([*words, *sizes, file])["ppl"] > 1


def test_it_is_exported(workplace, smaller, tmp_path, monkeypatch):
    """To a folder that says the same of itself, and evaluates to the same number."""
    monkeypatch.chdir(workplace)
    content = torch.load(workplace / "mdlm.ckpt", weights_only=False)
    vocab = len(content["state_dict"]["backbone.vocab_embed.embedding"])
    own = {"tokenizer_name_or_path": "bytes"}
    write_file(tmp_path / "own.ckpt", vocab, data=own)
    file = f"eval.checkpoint_path={tmp_path}/own.ckpt"
    in_process(["mode=export", file, f"export.path={tmp_path}/folder", *SMALL])
    fields = json.loads((tmp_path / "folder" / "config.json").read_text())
    assert (fields["algorithm"], fields["noise"]) == ("mdlm", "log-linear")
    words = words_of("eval")
    base = [*words, *smaller(words), "logger=none"]
    folder = f"eval.checkpoint_path={tmp_path}/folder"
    assert in_process([*base, file])["nll"] == in_process([*base, folder])["nll"]
