"""Runs that end where a test wants it, and a process that starts them quickly.

As a module it has algorithms that send their own process a signal. As a program it is
a nursery: it imports the framework once, and forks a real process for each command
line that it reads from stdin, which spares every one of them seconds of imports.
"""

import io
import json
import os
import resource
import runpy
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]

import torch  # noqa: E402

import algo  # noqa: E402
import distillation  # noqa: E402


class Stops:
    """Signals its own process at STOP_AT=step:phase:signal, and notes its data.

    Phases: train, valid (the second batch of a validation), write (half of the
    checkpoint of that step is on the disk), rename (all of it is, under another name).
    STOP_RANK is the rank that gets the signal; all, if empty.
    """

    _has_fired = False

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
        if not self.trainer.sanity_checking and batch_idx == 1:
            self._maybe("valid")

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


class Distilled(Stops, distillation.Distillation):
    pass


# ---------------------------------------------------------------- the nursery


def child(request):
    """Becomes `python main.py` with the arguments of a request."""
    os.setsid()
    os.chdir(request["cwd"])
    os.environ.update(request["env"])
    for number, name in ((1, "stdout"), (2, "stderr")):
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        os.dup2(os.open(request[name], flags), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    if limit := request["env"].get("FILE_SIZE_LIMIT"):  # Python ignores SIGXFSZ
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), resource.RLIM_INFINITY))
    sys.argv = [str(ROOT / "main.py"), *request["argv"]]
    runpy.run_path(sys.argv[0], run_name="__main__")


def serve():
    """Answers {argv, cwd, env, stdout, stderr} by a pid, {wait: pid} by its status."""
    import main  # noqa: F401  for the children
    import saving  # noqa: F401

    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.modules["stopper"] = sys.modules["__main__"]
    for line in iter(sys.stdin.readline, ""):
        request = json.loads(line)
        if "wait" in request:
            _, status = os.waitpid(request["wait"], 0)
            answer = os.waitstatus_to_exitcode(status)
        else:
            answer = os.fork()
            if answer == 0:
                return child(request)
        sys.stdout.write(f"{answer}\n")
        sys.stdout.flush()
    return None


if __name__ == "__main__":
    serve()
