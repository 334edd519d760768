"""The Mamba backbone through the real command line, and its checkpoints."""

import json
import math
from pathlib import Path

import command_line
import torch

NETWORK = ("algo.backbone=dimamba", "model=tiny-dimamba")
RUN = (
    *("algo=mdlm", *NETWORK, "model.n_blocks=1", "model.hidden_size=16"),
    *("data=synthetic", "data.vocab_size=7", "data.num_train=16", "data.num_valid=8"),
    *("model.length=8", "model.cond_dim=8", "loader.global_batch_size=4"),
    *("loader.eval_global_batch_size=4", "trainer.accelerator=cpu"),
    *("trainer.num_sanity_val_steps=0", "trainer.val_check_interval=2"),
    *("sampling.steps=2", "sampling.num_sample_batches=1", "training.ema=0.5"),
)


def start(folder: Path, *overrides: str, status: int = 0):
    folder.mkdir(exist_ok=True)
    given = (*RUN, f"hydra.run.dir={folder}/run", *overrides)
    return command_line.run(*given, cwd=folder, status=status)


def last(folder: Path) -> Path:
    return folder / "run" / "checkpoints" / "last.ckpt"


def written(folder: Path, name: str) -> dict:
    """What a mode has written in the run's folder."""
    return json.loads((folder / "run" / name).read_text())


def test_a_run_and_what_its_checkpoint_serves(tmp_path):
    """It goes on bit for bit, is evaluated, sampled from, inspected, not exported."""
    start(tmp_path / "whole", "trainer.max_steps=4")
    for steps in (2, 4):
        start(tmp_path / "parts", f"trainer.max_steps={steps}")
    found = [
        torch.load(last(tmp_path / name), weights_only=True)
        for name in ("whole", "parts")
    ]
    for entry in ("state_dict", "ema"):
        torch.testing.assert_close(*(x[entry] for x in found), rtol=0, atol=0)
    network = [x for x in found[0]["state_dict"] if x.startswith("backbone.")]
    shared = [x for x in network if x.endswith(("in_proj.weight", "out_proj.weight"))]
    assert len(shared) == 4
    assert len(found[0]["ema"]["shadow_params"]) == len(network) - 2

    path = f"eval.checkpoint_path={last(tmp_path / 'whole')}"
    start(tmp_path / "whole", "mode=ppl_eval", path)
    assert math.isfinite(written(tmp_path / "whole", "likelihood.json")["nll"])
    start(tmp_path / "whole", "mode=sample_eval", path, "model.scan=torch")
    assert len(written(tmp_path / "whole", "samples.json")["generated_seqs"]) == 4

    inspected = start(tmp_path / "whole", "mode=inspect", path).stdout
    sizes = [x.numel() for x in found[0]["ema"]["shadow_params"]]
    assert f"{sum(sizes):,}" in inspected
    refused = start(tmp_path / "whole", "mode=export", path, "export.path=x", status=2)
    assert "algo.backbone=dimamba" in refused.stderr
    assert not (tmp_path / "whole" / "x").exists()


def test_kernels_that_are_not_installed_cost_one_line(tmp_path):
    """Before anything heavy is imported."""
    refused = start(tmp_path, "model.scan=mamba_ssm", status=2)
    (line,) = [x for x in refused.stderr.splitlines() if "mamba" in x]
    assert "model.scan='mamba_ssm' needs the mamba-ssm package" in line
