"""Training on two processes (gloo, DDP) with the loss in chunks and the plain way:
DDP reduces a gradient when autograd hands it over, in whichever way it was formed.
"""

import pytest
import torch
from command_line import ALGORITHMS, TINY, logged, run


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_two_processes_train_the_same_weights(tmp_path, algorithm):
    """After 5 steps of 2 accumulated micro-batches each: weights, EMA and logged losses
    to 1e-5."""
    for chunk in ("5", "null"):
        run(
            *TINY,
            f"algo={algorithm}",
            f"training.loss_chunk={chunk}",
            "loader.batch_size=4",
            "trainer.devices=2",
            "trainer.max_steps=5",
            "trainer.val_check_interval=5",
            "eval.generate_samples=False",
            f"hydra.run.dir=run-{chunk}",
            cwd=tmp_path,
        )
    folders = [tmp_path / f"run-{chunk}" for chunk in ("5", "null")]
    for column in ("trainer/loss", "train/nll", "val/nll"):
        curves = [logged(folder, column) for folder in folders]
        assert len(curves[0]) >= (1 if column == "val/nll" else 5)
        assert curves[0] == pytest.approx(curves[1], rel=1e-5)
    chunked, plain = (
        torch.load(folder / "checkpoints/last.ckpt", weights_only=True)
        for folder in folders
    )
    for state, chunk in ((chunked, 5), (plain, None)):
        assert state["global_step"] == 5
        training = state["hyper_parameters"]["config"]["training"]
        assert training["loss_chunk"] == chunk
    assert chunked["state_dict"].keys() == plain["state_dict"].keys()
    for name, value in plain["state_dict"].items():
        other = chunked["state_dict"][name]
        torch.testing.assert_close(other, value, rtol=1e-5, atol=1e-6)
    shadows = [state["ema"]["shadow_params"] for state in (chunked, plain)]
    torch.testing.assert_close(*shadows, rtol=1e-5, atol=1e-6)
