"""EMA, samples and the loss in chunks with sharded weights, on two CPU processes.

Lightning runs FSDP on CUDA alone and torch asks for an accelerator, but its sharding
itself works on CPUs; what the trainer would do is done by hand here.
"""

import subprocess
import sys
from pathlib import Path

import pytest
from command_line import ROOT
from ports import free_port

SCRIPT = """
import copy
import os
import sys
from types import SimpleNamespace

import hydra
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FullyShardedDataParallel, _common_utils
from torch.distributed.fsdp import fully_sharded_data_parallel

from algo import MDLM
from benchmarks.cases import LossOf
from utils import register_resolvers


def cpu_handle(state, module, ignored_params, device_id):
    handle = _common_utils._FSDPDeviceHandle.from_device(torch.device("cpu"))
    state._device_handle = handle
    return state


def wrapped(model):
    model.trainer = SimpleNamespace(model=FullyShardedDataParallel(
        model, device_id=torch.device("cpu"), use_orig_params=True))
    return model


fully_sharded_data_parallel._init_device_handle = cpu_handle
rank = int(sys.argv[1])
os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": sys.argv[2]}
dist.init_process_group("gloo", rank=rank, world_size=2)
register_resolvers()
with hydra.initialize_config_dir(sys.argv[3] + "/configs", version_base="1.3"):
    config = hydra.compose("config", [
        "algo=mdlm", "data=synthetic", "model=tiny", "model.length=8",
        "model.n_blocks=1", "model.n_heads=2", "model.hidden_size=8",
        "trainer.accelerator=cpu", "sampling.steps=2", "training.ema=0.5"])
tokenizer = SimpleNamespace(vocab_size=10, mask_token_id=None)

torch.manual_seed(0)
model = wrapped(MDLM(config, tokenizer))
with model.whole_weights():
    before = [p.detach().clone() for p in model.parameters()]
model.ema = model.make_ema()
with torch.no_grad():
    for p in model.parameters():
        p.add_(1.0)
model.ema.update(model.parameters())
decay = min(0.5, 2 / 11)
checkpoint = {}
model.on_save_checkpoint(checkpoint)
for shadow, old in zip(checkpoint["ema"]["shadow_params"], before, strict=True):
    torch.testing.assert_close(shadow, old + (1 - decay))

torch.manual_seed(1)
other = wrapped(MDLM(config, tokenizer))
with other.whole_weights():
    raw = [p.detach().clone() for p in other.parameters()]
other.on_load_checkpoint(checkpoint)
assert other.ema.num_updates == 1
with other.whole_weights():
    for p, value in zip(other.parameters(), raw, strict=True):
        assert torch.equal(p, value)
with other.eval_weights(), other.whole_weights():
    for p, value in zip(other.parameters(), before, strict=True):
        torch.testing.assert_close(p.detach(), value + (1 - decay))
x = other.generate_samples(3).tokens
assert x.shape == (3, 8)
assert (x != other.mask_index).all()

plain = MDLM(config, tokenizer).train()
torch.nn.init.normal_(plain.backbone.output_embedding.weight)
sharded = MDLM(copy.deepcopy(config), tokenizer).train()
sharded.load_state_dict(plain.state_dict())
plain.config.training.loss_chunk = None
sharded.config.training.loss_chunk = 3
wrapper = FullyShardedDataParallel(
    LossOf(sharded), device_id=torch.device("cpu"), use_orig_params=True)
runs = [(LossOf(plain), plain.make_optimizer()), (wrapper, sharded.make_optimizer())]
ids = torch.arange(32).view(4, 8) % 10
for step in range(3):
    losses = []
    for loss_of, optimizer in runs:
        optimizer.zero_grad()
        losses.append(loss_of(ids))
        losses[-1].backward()
        optimizer.step()
    torch.testing.assert_close(*losses)
with FullyShardedDataParallel.summon_full_params(wrapper):
    for ours, theirs in zip(sharded.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.detach(), theirs.detach())
print("agreed")
"""


@pytest.mark.slow
def test_sharded_weights_do_what_whole_ones_do(tmp_path: Path):
    script, port = tmp_path / "sharded.py", str(free_port())
    script.write_text(SCRIPT)
    ranks = [
        subprocess.Popen(
            [sys.executable, script, str(rank), port, str(ROOT)],
            env={
                "PYTHONPATH": str(ROOT),
                "PATH": "/usr/bin:/bin",
                "OMP_NUM_THREADS": "1",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in (0, 1)
    ]
    for process in ranks:
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 0, output[-3000:]
        assert "agreed" in output
