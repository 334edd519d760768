"""What a screen does not show of libraries: adverts, and warnings that no user can act
on.

Warnings of this project and those that say what to do are shown, each as one line.
"""

import logging
import os
import re
import sys
import warnings

from utils import one_line, printable

# Kinds of warnings that are for those who write code.
FOR_DEVELOPERS = (FutureWarning, DeprecationWarning, PendingDeprecationWarning)
# Beginnings of warnings that give advice which does not hold here, or none.
IDLE = (
    r"The `srun` command is available",  # of a shell on a machine with Slurm
    r"The '\w+' does not have many workers",  # loader.num_workers is chosen
    r"The number of training batches \(\d+\) is smaller",  # epochs are not counted
    r"Checkpoint directory .* exists and is not empty",  # a run goes on in its folder
    r"Experiment logs directory .* exists and is not empty",
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
    r"The `LightningModule` has a `\w+` hook",
    r"Starting from v1\.9\.0, `tensorboardX`",
    r"You defined a `validation_step` but have no `val_dataloader`",
    r"'pin_memory' argument is set as true but no accelerator",
    r"\s*Found \d+ module\(s\) in eval mode",  # a teacher, a judge
    r"Trying to infer the `batch_size`",
    r"barrier\(\): using the device under current context",
    r"No device id is provided via `init_process_group`",
    r"Not enough SMs to use max_autotune_gemm",
)
# What Lightning says that a user asks for or has to know; the rest of its notes is of
# what the run says itself, and adverts.
NOTES = re.compile(
    r"Time limit|`Trainer\.fit` stopped: (?!`max_)|Metric .*|Monitored metric"
    r"|.*Signaling Trainer to stop|\w+ Profiler Report"
)
LIBRARY = "lightning"


def is_of_interest(record: logging.LogRecord) -> bool:
    """Whether a record of Lightning's loggers is shown."""
    is_note = record.levelno < logging.WARNING
    is_theirs = f"{os.sep}site-packages{os.sep}" in record.pathname
    return not (is_note and is_theirs) or bool(NOTES.match(record.getMessage().strip()))


def keep_quiet() -> None:
    """Has libraries keep to themselves what no user can act on.

    What the user tells Python of warnings (-W, PYTHONWARNINGS) holds. Call this before
    libraries are imported.
    """
    if not sys.warnoptions:
        for kind in FOR_DEVELOPERS:
            warnings.simplefilter("ignore", kind)
        for beginning in IDLE:
            warnings.filterwarnings("ignore", beginning)
    # Of torch's C++, such as names of machines that cannot be looked up.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if not sys.stderr.isatty():  # where bars are lines
        for name in ("HF_HUB", "HF_DATASETS"):
            os.environ.setdefault(f"{name}_DISABLE_PROGRESS_BARS", "1")


def show_once() -> None:
    """Has Lightning's notes and warnings shown as those of others are.

    Importing it has given it a handler of its own beside that of all, and its format
    to all warnings. Call this after it was imported.
    """
    its = logging.getLogger(LIBRARY)
    if logging.getLogger().handlers:
        its.handlers.clear()
    for name, logger in list(logging.Logger.manager.loggerDict.items()):
        if name.split(".")[0] == LIBRARY and isinstance(logger, logging.Logger):
            logger.addFilter(is_of_interest)
    warnings.formatwarning = as_a_line


def as_a_line(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    line: str | None = None,
) -> str:
    """A warning on one line, without the code that has raised it."""
    return f"warning: {printable(one_line(str(message)))}\n"


class ScreenFormatter(logging.Formatter):
    """A record as a line for a screen; the log in the run's folder has times."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        is_note = record.levelno < logging.WARNING
        return text if is_note else f"{record.levelname.lower()}: {text}"
