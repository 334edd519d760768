"""Algorithms that send their own process a signal where a test wants it to end."""

import io
import json
import os
from pathlib import Path

import torch

import algo
import distillation
from models.shards import local
from utils import RunStopped


class Stops:
    """Signals its own process at STOP_AT=step:phase:signal, and notes its data.

    Phases: train, valid (the second batch of a validation), write (half of the
    checkpoint of that step is on the disk), rename (all of it is, under another name),
    saved (the checkpoint of that step is there; the process ends as if it were killed),
    sanity (the second batch of the check before training), sample (samples are
    drawn), second (before the second batch of samples).
    STOP_RANK is the rank that gets the signal; all, if empty.
    """

    _has_fired = False
    _num_calls = 0

    def _spot(self, *phases):
        step, phase, number = (os.environ.get("STOP_AT") or "-1::0").split(":")
        ranks = os.environ.get("STOP_RANK", "0")
        is_here = self.global_step == int(step) and phase in phases
        if is_here and ranks in ("", str(self.global_rank)):
            return phase, int(number)
        return None

    def _maybe(self, phase):
        found = self._spot(phase)
        if found and not self._has_fired:  # a step may have several batches
            self._has_fired = True
            os.kill(os.getpid(), found[1])

    def training_step(self, batch, batch_idx):
        if "DATALOG" in os.environ:
            rows = batch["input_ids"].flatten().tolist()
            line = f"{self.global_step} {batch_idx} {hash(tuple(rows))}\n"
            with open(f"{os.environ['DATALOG']}{self.global_rank}", "a") as file:
                file.write(line)
        loss = super().training_step(batch, batch_idx)
        self._maybe("train")
        return loss

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        if batch_idx == 1:
            self._maybe("sanity" if self.trainer.sanity_checking else "valid")

    def generate_samples(self, *args, **options):
        self._num_calls += 1
        if self._num_calls == 2:
            self._maybe("second")
        samples = super().generate_samples(*args, **options)
        self._maybe("sample")
        return samples

    def on_train_batch_end(self, *args):
        super().on_train_batch_end(*args)
        if self._spot("saved"):
            raise RunStopped("killed")

    def on_save_checkpoint(self, checkpoint):
        super().on_save_checkpoint(checkpoint)
        if found := self._spot("write", "rename"):
            _die_writing(*found)


def _die_writing(phase, number):
    """Has the next checkpoint end the process in its middle, or before its name."""
    whole = torch.save

    def save(checkpoint, file):
        buffer = io.BytesIO()
        whole(checkpoint, buffer)
        content = buffer.getvalue()
        file.write(content[: len(content) // 2] if phase == "write" else content)
        file.flush()
        os.kill(os.getpid(), number)

    torch.save = save


class DuoBase(Stops, algo.DUO_BASE):
    pass


class Duo(Stops, algo.DUO):
    pass


class AR(Stops, algo.AR):
    pass


class MDLM(Stops, algo.MDLM):
    pass


class Counted(MDLM):
    """Notes what this process holds for training, in bytes{rank}.json of its folder."""

    def on_before_optimizer_step(self, optimizer):
        super().on_before_optimizer_step(optimizer)
        self._gradients = _bytes(p.grad for p in self.parameters())

    def on_train_end(self):
        super().on_train_end()
        held = {"gradients": self._gradients, "ema": _bytes(self.ema.shadow_params)}
        held["parameters"] = _bytes(self.parameters())
        moments = self.optimizers(use_pl_optimizer=False).state.values()
        for name in ("exp_avg", "exp_avg_sq"):
            held[name] = _bytes(state[name] for state in moments)
        folder = Path(self.config.checkpointing.save_dir)
        (folder / f"bytes{self.global_rank}.json").write_text(json.dumps(held))


def _bytes(tensors):
    return sum(local(x).nbytes for x in tensors)


class Distilled(Stops, distillation.Distillation):
    pass


class SDTT(Stops, distillation.SDTT):
    pass


class DiMO(Stops, distillation.DiMO):
    pass
