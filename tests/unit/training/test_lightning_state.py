"""What is known of Lightning's private state, and that it is known in one file."""

import os
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from lightning.fabric.utilities import cloud_io
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.trainer.connectors import checkpoint_connector

from training import lightning_state
from training.lightning_state import (
    batches_of_epoch,
    begin_epoch,
    begin_validation,
    data_position,
    epochs_done,
    is_epoch_over,
    is_validation_due,
    is_within_epoch,
    recount_batches,
    set_batches,
    set_data_position,
    share_paths,
    validate_first,
)

ROOT = Path(__file__).parents[3]
# Of the loops' state and attributes, and of the barrier in which ranks wait.
NAMES = re.compile(
    r"fit_loop|epoch_loop|val_loop|batch_progress|epoch_progress|_batches_that_stepped"
    r"|combined_loader|is_last_batch|val_check_batch|Trainer\.save_checkpoint"
)


def test_it_is_in_one_file():
    files = [*ROOT.glob("*.py"), *ROOT.glob("[a-z]*/*.py")]
    found = {path.name for path in files if NAMES.search(path.read_text())}
    assert found == {"lightning_state.py"}


def test_the_tested_version_is_the_pinned_one():
    """A new pin asks for a look at the file, whose head names it."""
    pins = (ROOT / "requirements.txt").read_text()
    (version,) = re.findall(r"^lightning==([\d.]+)", pins, re.MULTILINE)
    assert f"It was tested with lightning {version}." in lightning_state.__doc__


def counts(ready: int, unfinished: int = 0) -> dict[str, int]:
    names = ("ready", "started", "processed")
    return dict.fromkeys(names, ready) | {"completed": ready - unfinished}


def content(**more) -> dict:
    """Of a file after five batches of an epoch and fifteen of the run; the last one was
    saved before it was completed."""
    loop = {
        "epoch_progress": {"current": counts(1), "total": counts(1)},
        "epoch_loop.batch_progress": {
            "current": counts(5, unfinished=1),
            "total": counts(15, unfinished=1),
            "is_last_batch": False,
        },
        "epoch_loop.state_dict": {"_batches_that_stepped": 15},
        "state_dict": {},
    }
    return {"loops": {"fit_loop": loop | more}, "global_step": 15}


def test_where_a_run_is():
    found = content()
    assert (epochs_done(found), batches_of_epoch(found)) == (1, 5)
    assert not is_epoch_over(found)


def test_a_batch_that_is_not_completed_stays_so():
    found = content()
    set_batches(found, of_epoch=0, of_run=7)
    progress = found["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    assert progress["current"] == counts(0, unfinished=1)
    assert progress["total"] == counts(7, unfinished=1)


def test_batches_of_another_size():
    found = content()
    recount_batches(found, theirs=4, ours=2)
    progress = found["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    assert progress["current"] == counts(10, unfinished=1)
    assert progress["total"] == counts(30, unfinished=1)


def test_the_next_epoch():
    found = content(epoch_progress={"current": counts(2, 1), "total": counts(2, 1)})
    loop = found["loops"]["fit_loop"]
    loop["epoch_loop.batch_progress"]["is_last_batch"] = True
    assert is_epoch_over(found)
    begin_epoch(found)
    assert loop["epoch_progress"] == {"current": counts(2), "total": counts(2)}
    progress = loop["epoch_loop.batch_progress"]
    assert progress["current"] == counts(0)
    assert progress["total"] == counts(15)
    assert loop["epoch_loop.state_dict"] == {"_batches_that_stepped": 15}
    assert not is_epoch_over(found)


def test_a_validation_that_comes_first():
    validation = {"current": counts(3), "total": counts(7), "is_last_batch": True}
    found = content(**{"epoch_loop.val_loop.batch_progress": validation})
    found["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"] = 0
    assert is_within_epoch(found)
    begin_validation(found)
    progress = found["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    assert progress["current"] == counts(5)
    assert progress["total"] == counts(15)
    begun = {"ready": 1, "started": 1, "processed": 0, "completed": 0}
    assert validation["current"] == validation["total"] == begun


@pytest.mark.parametrize(("last", "step"), [(12, 12), (12, 20), (12, 5), (-1, 5)])
def test_a_run_does_not_end_before_its_validation(last, step):
    """Nor does it train on behind it."""

    def _should_check_val_fx(fetcher):
        return False

    loop = SimpleNamespace(
        max_steps=last, restarting=True, _should_check_val_fx=_should_check_val_fx
    )
    fit_loop = SimpleNamespace(epoch_loop=loop)
    validate_first(SimpleNamespace(fit_loop=fit_loop), step)
    assert last == -1 or loop.max_steps > step
    assert loop._should_check_val_fx(None)
    assert loop.max_steps == last
    assert loop._should_check_val_fx(None)
    loop.restarting = False
    assert not loop._should_check_val_fx(None)


def test_the_position_in_the_data():
    found = content()
    assert data_position(found) == {}
    set_data_position(found, {"epoch": 1, "rows": 20})
    assert data_position(found) == {"epoch": 1, "rows": 20}
    empty = content(state_dict={"combined_loader": []})
    assert data_position(empty) == {}


@pytest.mark.parametrize(
    ("every", "epochs", "total", "in_epoch", "limit", "expected"),
    [
        (10, None, 9, 0, 1, True),
        (10, None, 10, 1, 1, False),
        (10, None, 9, 0, 0, False),
        (0, None, 9, 0, 1, False),
        (float("inf"), None, 9, 0, 1, False),
        (5, 1, 33, 4, 1, True),
        (5, 1, 34, 5, 1, False),
        (5, 2, 33, 4, 1, False),
    ],
)
def test_is_validation_due(every, epochs, total, in_epoch, limit, expected):
    trainer = SimpleNamespace(
        val_check_batch=every,
        check_val_every_n_epoch=epochs,
        limit_val_batches=limit,
        current_epoch=0,
        fit_loop=SimpleNamespace(total_batch_idx=total, batch_idx=in_epoch),
    )
    assert is_validation_due(trainer) == expected


def test_lightning_reads_local_paths_as_we_do(tmp_path, monkeypatch):
    """Its CSV log and its callback write into the folder, not into the file beside."""
    for module in (cloud_io, checkpoint_connector):
        monkeypatch.setattr(module, "url_to_fs", module.url_to_fs)
    share_paths()
    (tmp_path / "vec").write_text("my notes")
    folder = f"{tmp_path}/vec::notes"
    logger = CSVLogger(folder, name="csv")
    logger.log_metrics({"a": 1.0}, 0)
    logger.save()
    callback = ModelCheckpoint(dirpath=f"{folder}/checkpoints", monitor="a")
    callback._fs.makedirs(callback.dirpath)
    assert sorted(os.listdir(folder)) == ["checkpoints", "csv"]
    assert (tmp_path / "vec").read_text() == "my notes"
