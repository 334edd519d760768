"""Every algorithm through train -> ppl_eval -> sample_eval, on one process and two."""

import json
import math

import pytest
import torch
from command_line import ALGORITHMS, TINY, logged, run

from data.synthetic import synthetic_entropy

RECORDER = '''
from pathlib import Path

import torch

import algo


class Recorder(algo.DUO_BASE):
    """Writes down the training times that each rank draws."""

    def sample_t(self, batch_size, batch_idx=0):
        t = super().sample_t(batch_size, batch_idx)
        if self.training:
            name = f"t-{self.global_step}-{self.global_rank}.pt"
            torch.save(t, Path(self.config.checkpointing.save_dir) / name)
        return t
'''


@pytest.fixture(scope="module", params=ALGORITHMS)
def trained(request, tmp_path_factory):
    """(algorithm, folder of a finished training run)."""
    folder = tmp_path_factory.mktemp(request.param)
    run(*TINY, f"algo={request.param}", "hydra.run.dir=train", cwd=folder)
    return request.param, folder


def test_training_leaves_checkpoints_config_log_and_samples(trained):
    algorithm, folder = trained
    run_dir = folder / "train"
    assert (run_dir / "checkpoints" / "best.ckpt").exists()
    assert (
        f"algo.{'AR' if algorithm == 'ar' else ''}"
        in (run_dir / "config_tree.txt").read_text()
    )
    losses = logged(run_dir, "trainer/loss")
    assert len(losses) == 20
    assert all(math.isfinite(loss) for loss in losses)
    samples = json.loads((run_dir / "samples" / "step_20.json").read_text())
    assert len(samples["generated_seqs"]) == 64
    state = torch.load(run_dir / "checkpoints" / "last.ckpt", weights_only=True)
    assert state["global_step"] == 20
    assert state["ema"]["num_updates"] == 20
    assert state["hyper_parameters"]["config"]["algo"]["name"] == algorithm


def test_ppl_eval_repeats_the_last_validation(trained):
    """Same weights (EMA), same rows, same draws: the same number."""
    algorithm, folder = trained
    done = run(
        *TINY,
        "mode=ppl_eval",
        f"algo={algorithm}",
        f"eval.checkpoint_path={folder}/train/checkpoints/last.ckpt",
        "hydra.run.dir=ppl",
        cwd=folder,
    )
    (measured,) = logged(folder / "ppl", "val/nll")
    assert measured == pytest.approx(logged(folder / "train", "val/nll")[-1], rel=1e-6)
    assert logged(folder / "ppl", "val/nll_stderr")[0] > 0
    for name in ("val/nll", "val/bpd", "val/ppl", " ± ", "EMA weights"):
        assert name in done.stdout
    scored = 31 if algorithm == "ar" else 32
    floor = synthetic_entropy(32, 256) / scored
    assert measured > floor - 4 * logged(folder / "ppl", "val/nll_stderr")[0]


def test_sample_eval_writes_samples(trained):
    algorithm, folder = trained
    overrides = (
        *TINY,
        "mode=sample_eval",
        f"algo={algorithm}",
        f"eval.checkpoint_path={folder}/train/checkpoints/last.ckpt",
        "hydra.run.dir=sample",
    )
    done = run(*overrides, cwd=folder)
    results = json.loads((folder / "sample" / "samples.json").read_text())
    assert results["generative_ppl"] is None
    how_to_judge = "eval.compute_generative_perplexity=True has gpt2-large do it"
    assert how_to_judge in done.stderr + done.stdout
    assert len(results["generated_seqs"]) == 64
    assert 0 < results["entropy"] <= math.log(32)


@pytest.mark.parametrize(
    "trained",
    [
        name if name == "duo_base" else pytest.param(name, marks=pytest.mark.slow)
        for name in ALGORITHMS
    ],
    indirect=True,
)
def test_two_processes_train_as_one_with_twice_the_batch(trained):
    """The same curve, weights and validation to rounding."""
    algorithm, folder = trained
    run(
        *TINY,
        f"algo={algorithm}",
        "eval.generate_samples=False",
        "trainer.devices=2",
        "hydra.run.dir=two",
        cwd=folder,
    )
    one, two = folder / "train", folder / "two"
    curve = logged(one, "train/nll")
    assert len(curve) == 20
    assert logged(two, "train/nll") == pytest.approx(curve, abs=1e-5)
    weights = [
        torch.load(run_dir / "checkpoints" / "last.ckpt", weights_only=True)
        for run_dir in (one, two)
    ]
    for name, value in weights[0]["state_dict"].items():
        other = weights[1]["state_dict"][name]
        torch.testing.assert_close(value, other, atol=1e-5, rtol=0)
    found = [logged(run_dir, "val/nll")[-1] for run_dir in (one, two)]
    assert found[0] == pytest.approx(found[1], abs=1e-5)


@pytest.mark.slow
def test_two_ranks_share_the_times_of_one_process(tmp_path):
    """At every step the ranks' times, in order of rank, are those of one process."""
    (tmp_path / "recorder.py").write_text(RECORDER)
    overrides = (
        *TINY,
        "algo=duo_base",
        "algo._target_=recorder.Recorder",
        "eval.generate_samples=False",
        "trainer.max_steps=3",
    )
    paths = {"cwd": tmp_path, "pythonpath": tmp_path}
    run(*overrides, "hydra.run.dir=one", **paths)
    run(*overrides, "hydra.run.dir=two", "trainer.devices=2", **paths)
    for step in range(3):
        one = torch.load(tmp_path / "one" / f"t-{step}-0.pt")
        two = [torch.load(tmp_path / "two" / f"t-{step}-{rank}.pt") for rank in (0, 1)]
        assert len(one) == 16
        assert torch.equal(torch.cat(two), one)
        # Stratified: one time in each sixteenth of the unit interval.
        strata = ((one - 1e-3) / (1 - 1e-3) * 16).floor().sort().values
        assert torch.equal(strata, torch.arange(16, dtype=one.dtype))
