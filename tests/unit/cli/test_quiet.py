"""What screens show of libraries."""

import logging
import subprocess
import sys
import warnings
from contextlib import contextmanager

import pytest
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from cli import quiet

PATH = "/x/site-packages/lightning/pytorch/trainer/setup.py"


def record(text: str, level: int = logging.INFO, path: str = PATH):
    logger = logging.getLogger("lightning.pytorch")
    return logger.makeRecord("lightning", level, path, 1, text, (), None)


@pytest.mark.parametrize(
    ("text", "is_shown"),
    [
        ("💡 Tip: For seamless cloud logging, try installing [litlogger](x)", False),
        ("GPU available: False, used: False", False),
        ("`Trainer(limit_val_batches=1.0)` was configured so 100% of", False),
        ("`Trainer.fit` stopped: `max_steps=20` reached.", False),
        ("`Trainer.fit` stopped: No training batches.", True),
        ("Time limit reached. Elapsed time is 0:01. Signaling Trainer to stop.", True),
        ("Monitored metric val/nll did not improve in the last 3 records.", True),
        ("FIT Profiler Report", True),
    ],
)
def test_notes_of_lightning(text, is_shown):
    assert quiet.is_of_interest(record(text)) == is_shown
    assert quiet.is_of_interest(record(text, logging.WARNING))
    assert quiet.is_of_interest(record(text, path="/x/duo/training/callbacks.py"))


def test_our_notes_through_lightning_are_ours(caplog):
    """`rank_zero_info` says from where it was called."""
    caplog.set_level(logging.INFO)
    rank_zero_info("step %d: wrote %s", 5, "last.ckpt")
    (said,) = caplog.records
    assert said.pathname == __file__
    assert quiet.is_of_interest(said)


@contextmanager
def hearing(monkeypatch):
    """What is said of warnings that libraries raise."""
    monkeypatch.setattr(sys, "warnoptions", [])
    for name in ("HF_HUB", "HF_DATASETS"):
        monkeypatch.setenv(f"{name}_DISABLE_PROGRESS_BARS", "0")
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("default")
        quiet.keep_quiet()
        yield heard


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("The `srun` command is available on your system but is not used.", None),
        ("The 'train_dataloader' does not have many workers which may be a", None),
        ("Checkpoint directory /x exists and is not empty.", None),
        ("The number of training batches (5) is smaller than the logging", None),
        *(("x is deprecated", kind) for kind in quiet.FOR_DEVELOPERS),
    ],
)
def test_idle_advice(monkeypatch, text, kind):
    with hearing(monkeypatch) as heard:
        rank_zero_warn(text, category=kind or UserWarning)
    assert not heard


@pytest.mark.parametrize("kind", [UserWarning, RuntimeWarning])
def test_what_a_user_can_act_on(monkeypatch, kind):
    """And all that nobody has thought of."""
    with hearing(monkeypatch) as heard:
        warnings.warn("the disk is nearly full", kind, stacklevel=1)
    assert len(heard) == 1


def test_the_user_tells_python_what_to_say(monkeypatch):
    with hearing(monkeypatch) as heard:
        warnings.resetwarnings()
        monkeypatch.setattr(sys, "warnoptions", ["default"])
        quiet.keep_quiet()
        warnings.warn("x is deprecated", FutureWarning, stacklevel=1)
    assert len(heard) == 1


def test_a_warning_is_one_line_without_code():
    text = "disk of\n/x is \x1b[2J nearly full"
    line = quiet.as_a_line(UserWarning(text), UserWarning, "x.py", 3)
    assert line == "warning: disk of /x is \\x1b[2J nearly full\n"


def test_levels_are_said_of_warnings_alone():
    formatter = quiet.ScreenFormatter("%(message)s")
    assert formatter.format(record("one")) == "one"
    assert formatter.format(record("two", logging.WARNING)) == "warning: two"


def test_lightning_says_nothing_twice():
    """In a process of its own, whose root logger has a handler as Hydra's has."""
    code = (
        "import logging, warnings; logging.basicConfig(level=logging.INFO);"
        "from cli.quiet import keep_quiet, show_once; keep_quiet();"
        "import lightning; show_once();"
        "from lightning.pytorch.utilities.rank_zero import rank_zero_info as say;"
        "say('of ours'); lightning.Trainer(accelerator='cpu', logger=False,"
        "enable_checkpointing=False)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stderr.count("of ours") == 1
    assert "Tip" not in done.stderr
    assert "GPU available" not in done.stderr
