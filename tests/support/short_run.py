"""A run of two updates of a tiny model, whose files tests damage or take for somebody
else's.
"""

import contextlib
import io
from pathlib import Path

import lightning
from tiny import compose

import main

SHORT_RUN = (
    "algo=duo_base",
    "data.num_train=8",
    "data.num_valid=4",
    "model.n_blocks=1",
    "model.hidden_size=8",
    "trainer.max_steps=2",
    "trainer.val_check_interval=2",
    "trainer.num_sanity_val_steps=0",
    "eval.generate_samples=False",
    "callbacks.checkpoint_every_n_steps.every_n_train_steps=1",
    "+trainer.enable_progress_bar=False",
    "+trainer.enable_model_summary=False",
    "logger=none",
)


def short_run(*overrides: str) -> list[str]:
    """The overrides of the run with some in the place of its own."""
    every = {x.split("=")[0]: x for x in (*SHORT_RUN, *overrides)}
    return list(every.values())


def train_in(folder: Path, *overrides: str) -> None:
    """Trains in a folder, from where it was."""
    with contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()):
        config = compose(*short_run(*overrides), f"checkpointing.save_dir={folder}")
        lightning.seed_everything(config.seed, verbose=False)
        main.train(config)
