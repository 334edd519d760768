"""Runs beyond the algorithms: demo, own text, judge, resume, loggers, fine-tuning."""

import gzip
import json
import math
import shutil

import pytest
import torch
from command_line import TINY, logged, run

from metrics.numbers import measured

TEXT = "the quick brown fox jumps over the lazy dog and runs away. "
SMALL = [x for x in TINY if not x.startswith("data")]


def test_demo_in_small(tmp_path):
    """The demo's command, cut to a few steps: table, unigram model and samples."""
    done = run(
        "experiment=demo",
        "trainer.max_steps=4",
        "trainer.val_check_interval=4",
        "model.n_blocks=1",
        "model.hidden_size=32",
        "sampling.steps=4",
        "eval.compute_generative_perplexity=False",
        "trainer.accelerator=cpu",
        "hydra.run.dir=demo",
        cwd=tmp_path,
        fresh=True,
    )
    for text in ("val/ppl of a unigram model", "sample 4", "files of this run"):
        assert text in done.stdout
    for name in ("checkpoints", "config_tree.txt", "csv", "samples"):
        assert f"{tmp_path}/demo/{name}" in done.stdout


@pytest.mark.parametrize("tokenizer", ["bytes", "text8"])
def test_own_text_files(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text(TEXT * 30)
    lines = "".join(json.dumps({"text": TEXT * 10}) + "\n" for _ in range(5))
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.write(lines)
    run(
        *SMALL,
        "data=text_files",
        f"data.path=[{tmp_path}/a.txt,{tmp_path}/*.jsonl.gz]",
        f"data.tokenizer_name_or_path={tokenizer}",
        f"data.cache_dir={tmp_path}/cache",
        "algo=mdlm",
        "hydra.run.dir=run",
        cwd=tmp_path,
    )
    assert len(logged(tmp_path / "run", "val/nll")) == 2


def test_half_precision_with_what_saves_memory_and_shows_time(tmp_path):
    """bf16 with clipping, checkpointed blocks, a table of Lightning's hooks."""
    done = run(
        *TINY,
        "trainer.precision=bf16",
        "training.activation_checkpointing=True",
        "trainer.profiler=simple",
        "hydra.run.dir=run",
        cwd=tmp_path,
    )
    assert "run_training_batch" in done.stdout + done.stderr
    assert all(map(math.isfinite, logged(tmp_path / "run", "val/nll")))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    run(*TINY, "eval.generate_samples=False", "hydra.run.dir=train", cwd=folder)
    return folder / "train" / "checkpoints" / "last.ckpt"


@pytest.mark.slow
def test_judge_from_a_folder(checkpoint, tmp_path):
    """Any causal language model with its tokenizer serves as the judge."""
    from transformers import GPT2Config, GPT2LMHeadModel

    from data.tokenizers import bytes_tokenizer

    torch.manual_seed(0)
    judge = tmp_path / "judge"
    tokenizer = bytes_tokenizer()
    size = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 256}
    config = GPT2Config(vocab_size=len(tokenizer), **size)
    GPT2LMHeadModel(config).save_pretrained(judge)
    tokenizer.save_pretrained(judge)
    done = run(
        *TINY,
        "mode=sample_eval",
        f"eval.checkpoint_path={checkpoint}",
        f"eval.gen_ppl_eval_model_name_or_path={judge}",
        "eval.compute_generative_perplexity=True",
        "hydra.run.dir=sample",
        cwd=tmp_path,
    )
    results = json.loads((tmp_path / "sample" / "samples.json").read_text())
    names = ("generative_ppl", "generative_ppl_stderr")
    assert measured(*(results[name] for name in names)) in done.stdout
    # A random judge is close to uniform over its 260 entries.
    assert math.log(results["generative_ppl"]) == pytest.approx(math.log(260), abs=0.3)


def test_same_seed_same_run(checkpoint, tmp_path):
    run(*TINY, "eval.generate_samples=False", "hydra.run.dir=again", cwd=tmp_path)
    one = torch.load(checkpoint, weights_only=True)
    two = torch.load(tmp_path / "again/checkpoints/last.ckpt", weights_only=True)
    for name, value in one["state_dict"].items():
        assert torch.equal(value, two["state_dict"][name])


def test_a_run_continues_from_its_last_checkpoint(tmp_path):
    save = f"checkpointing.save_dir={tmp_path}/kept"
    overrides = (*TINY, save, "eval.generate_samples=False")
    run(*overrides, "trainer.max_steps=10", "hydra.run.dir=one", cwd=tmp_path)
    run(*overrides, "trainer.max_steps=20", "hydra.run.dir=two", cwd=tmp_path)
    last = torch.load(tmp_path / "kept/checkpoints/last.ckpt", weights_only=True)
    assert last["global_step"] == 20
    assert last["ema"]["num_updates"] == 20


def test_finetuning_starts_from_the_given_weights(checkpoint, tmp_path):
    """With a learning rate of 0 the weights after training are the given ones."""
    run(
        *TINY,
        f"training.finetune_path={checkpoint}",
        "optim.lr=0",
        "seed=2",
        "trainer.max_steps=2",
        "eval.generate_samples=False",
        "hydra.run.dir=tuned",
        cwd=tmp_path,
    )
    given = torch.load(checkpoint, weights_only=True)["state_dict"]
    tuned = torch.load(tmp_path / "tuned/checkpoints/last.ckpt", weights_only=True)
    for name, value in given.items():
        assert torch.equal(value, tuned["state_dict"][name])


@pytest.mark.parametrize("words", [["+wandb.offline=true"], []], ids=["asked", "not"])
def test_wandb_needs_no_account(tmp_path, words):
    """The reference's keys: giving any wandb key on the command line uses wandb."""
    run(
        *TINY,
        *words,
        "wandb.name=trial",
        "trainer.max_steps=2",
        "eval.generate_samples=False",
        "hydra.run.dir=run",
        cwd=tmp_path,
        env={"HOME": str(tmp_path), "NETRC": ""},
    )
    assert list((tmp_path / "run").glob("wandb/offline-run-*"))
    assert logged(tmp_path / "run", "trainer/loss")


def test_no_logger(tmp_path):
    run(
        *TINY,
        "logger=none",
        "trainer.max_steps=2",
        "eval.generate_samples=False",
        "hydra.run.dir=run",
        cwd=tmp_path,
    )
    assert (tmp_path / "run/checkpoints/last.ckpt").exists()
    assert not (tmp_path / "run/csv").exists()


@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_accumulation_and_compile_and_multirun(tmp_path, compile):
    """Two jobs of a sweep: gradients accumulated over 4 micro-batches, compiled
    where there is the C++ compiler that torch.compile needs on a CPU."""
    compiler = compile and any(shutil.which(name) for name in ("g++", "clang++"))
    run(
        "-m",
        *TINY,
        "seed=1,2",
        "loader.batch_size=4",
        f"training.compile={compiler}",
        "trainer.max_steps=2",
        "eval.generate_samples=False",
        "hydra.sweep.dir=sweep",
        cwd=tmp_path,
    )
    for job in ("0", "1"):
        folder = tmp_path / "sweep" / job
        last = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)
        assert last["global_step"] == 2


@pytest.mark.gpu
def test_fsdp_trains_with_gradient_clipping(tmp_path):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    overrides = [x for x in TINY if not x.startswith("trainer.accelerator")]
    run(*overrides, "strategy=fsdp", "hydra.run.dir=r", cwd=tmp_path)
    assert (tmp_path / "r/checkpoints/last.ckpt").exists()
