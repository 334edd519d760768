"""Folders in the layout of released models through the real command line, on a machine
where neither their code nor flash-attn may run."""

import json

import pytest
import torch
from command_line import TINY, run
from exported import export
from released import write_released
from tiny import compose

import main
from checkpoints.reading import read_checkpoint

# The command line's own network is another one than the folder's.
DATA = [x for x in TINY if not x.startswith("model.") or "length" in x]
VOCAB = 256
QUIET = ("eval.generate_samples=False", "trainer.num_sanity_val_steps=0")
HF_DIT = "algo.backbone=hf_dit"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """owner/duo and owner/mdlm, and a flash_attn that must not be imported."""
    root = tmp_path_factory.mktemp("hub")
    write_released(root / "owner/duo", "DUO", vocab_size=VOCAB, length=32)
    write_released(root / "owner/mdlm", "mdlm", vocab_size=VOCAB + 1, length=32)
    (root / "path").mkdir()
    (root / "path" / "flash_attn.py").write_text("raise ImportError('flash_attn')")
    return root


@pytest.fixture(autouse=True)
def _nothing_of_the_folders_runs(folders):
    yield
    assert not list(folders.rglob("RAN"))


def in_process(tmp_path, monkeypatch, *overrides: str) -> dict:
    """A command as main.py does it once Hydra has composed the config."""
    monkeypatch.chdir(tmp_path)
    quiet = ("+trainer.enable_progress_bar=False", "logger=none")
    judge = "eval.gen_ppl_eval_model_name_or_path=null"
    config = compose(*DATA, *quiet, judge, *overrides, tiny=False)
    return main.run.__wrapped__(config)


def test_a_released_model_is_evaluated(folders, tmp_path):
    """As published: the owner and the name, here a folder that was downloaded."""
    done = run(
        *DATA,
        "mode=ppl_eval",
        "algo=duo_base",
        HF_DIT,
        "eval.checkpoint_path=owner/duo",
        f"hydra.run.dir={tmp_path}/run",
        cwd=folders,
        pythonpath=folders / "path",
    )
    assert "val/ppl" in done.stdout
    assert "was made with" not in done.stderr + done.stdout


def test_a_released_model_is_fine_tuned(folders, tmp_path, monkeypatch):
    """As in MDLM's code; what comes of it is a checkpoint like any other."""
    steps = ("trainer.max_steps=2", "trainer.val_check_interval=2")
    run(
        *DATA,
        *QUIET,
        *steps,
        "algo=mdlm",
        HF_DIT,
        "eval.checkpoint_path=owner/mdlm",
        f"hydra.run.dir={tmp_path}/run",
        cwd=folders,
        pythonpath=folders / "path",
    )
    last = f"eval.checkpoint_path={tmp_path}/run/checkpoints/last.ckpt"
    sizes = ("model.hidden_size=32", "model.cond_dim=12", "model.n_blocks=2")
    evaluate = ("mode=ppl_eval", "algo=mdlm", last)
    one = in_process(tmp_path, monkeypatch, *evaluate, HF_DIT)
    two = in_process(tmp_path, monkeypatch, *evaluate, *sizes, "model.n_heads=2")
    assert one == two


def test_fine_tuning_starts_from_the_released_weights(folders, tmp_path, monkeypatch):
    start = f"training.finetune_path={folders}/owner/mdlm"
    more = ("optim.lr=0", "trainer.max_steps=1", "trainer.val_check_interval=1")
    in_process(tmp_path, monkeypatch, *QUIET, *more, "algo=mdlm", HF_DIT, start)
    last = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)
    given = read_checkpoint(f"{folders}/owner/mdlm", "x").weights
    for name, value in given.items():
        assert torch.equal(value, last["state_dict"][name])


@pytest.mark.parametrize(
    ("folder", "algo"),
    [
        ("mdlm", "mdlm"),
        ("mdlm", "sedd"),
        ("mdlm", "d3pm"),
        ("duo", "duo_base"),
        ("duo", "duo"),
        ("duo", "distillation"),
    ],
)
def test_every_algorithm_that_fits(folder, algo, folders, tmp_path, monkeypatch):
    path = f"eval.checkpoint_path={folders}/owner/{folder}"
    overrides = (f"algo={algo}", HF_DIT, path)
    results = in_process(tmp_path, monkeypatch, "mode=ppl_eval", *overrides)
    assert results["ppl"] > 0
    sizes = ("sampling.steps=2", "loader.eval_batch_size=2")
    in_process(tmp_path, monkeypatch, "mode=sample_eval", *sizes, *overrides)
    samples = json.loads((tmp_path / "samples.json").read_text())
    assert len(samples["generated_seqs"]) == 2


def test_a_left_to_right_model_returns(folders, tmp_path, monkeypatch):
    """Trained here, exported, and used again from its folder."""
    train = ("algo=ar", "model.hidden_size=32", "model.n_blocks=1", "model.n_heads=2")
    steps = ("trainer.max_steps=1", "trainer.val_check_interval=1")
    in_process(tmp_path, monkeypatch, *train, *steps, *QUIET)
    last = f"{tmp_path}/checkpoints/last.ckpt"
    export(last, tmp_path / "folder")
    evaluate = ("mode=ppl_eval", "algo=ar")
    path = f"eval.checkpoint_path={tmp_path}/folder"
    returned = in_process(tmp_path, monkeypatch, *evaluate, HF_DIT, path)
    path = f"eval.checkpoint_path={last}"
    assert returned == in_process(tmp_path, monkeypatch, *evaluate, HF_DIT, path)


def test_a_folder_is_also_a_tokenizer(tmp_path, monkeypatch):
    """Its own, beside the weights; the modelling files of the config do not run."""
    sizes = ("model.hidden_size=32", "model.n_blocks=1", "model.n_heads=2")
    steps = ("trainer.max_steps=1", "trainer.val_check_interval=1")
    in_process(tmp_path, monkeypatch, "algo=mdlm", *sizes, *steps, *QUIET)
    folder = tmp_path / "folder"
    export(f"{tmp_path}/checkpoints/last.ckpt", folder)
    marker = tmp_path / "RAN"
    for path in folder.glob("*.py"):
        path.write_text(f"open({str(marker)!r}, 'w')\n{path.read_text()}")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    monkeypatch.setattr("training.weights.rank_zero_warn", pytest.fail)
    results = in_process(
        tmp_path,
        monkeypatch,
        "mode=ppl_eval",
        "algo=mdlm",
        HF_DIT,
        f"eval.checkpoint_path={folder}",
        f"data.tokenizer_name_or_path={folder}",
    )
    assert results["ppl"] > 0
    assert not marker.exists()


def test_the_export_of_a_released_folder(folders, tmp_path):
    """Keeps every weight; the tokenizer, which it lacks, is the command line's."""
    overrides = ("data=synthetic", f"data.vocab_size={VOCAB}")
    export(folders / "owner/duo", tmp_path / "once", *overrides)
    export(tmp_path / "once", tmp_path / "again")
    one, two = (
        read_checkpoint(str(path), "x").weights
        for path in (folders / "owner/duo", tmp_path / "again")
    )
    assert all(torch.equal(one[name], two[name]) for name in one.keys() | two.keys())
