"""What callbacks take over from a checkpoint of a run that has been moved."""

import os

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from training.callback_states import fit_callbacks
from training.resume import KEY
from utils import whole_file


def monitored(folder: str, scores: dict[str, float], mode: str = "min") -> dict:
    """What ModelCheckpoint would say of files in a folder."""
    callback = ModelCheckpoint(folder, monitor="val/nll", mode=mode)
    tensors = {f"{folder}/{name}": torch.tensor(x) for name, x in scores.items()}
    callback.best_k_models = tensors
    order = sorted(tensors, key=lambda path: tensors[path], reverse=mode == "max")
    callback.best_model_path, callback.kth_best_model_path = order[0], order[-1]
    callback.best_model_score = tensors[order[0]]
    callback.kth_value = tensors[order[-1]]
    callback.last_model_path = f"{folder}/last.ckpt"
    return callback.state_dict()


def restored(state: dict, folder: str, mode: str = "min") -> ModelCheckpoint:
    callback = ModelCheckpoint(folder, monitor="val/nll", mode=mode)
    states = {callback.state_key: state}
    fit_callbacks(states, [callback], KEY)
    if callback.state_key in states:
        callback.load_state_dict(states[callback.state_key])
    return callback


def files_in(folder: str, *names: str) -> None:
    for name in names:
        with whole_file(f"{folder}/{name}") as file:
            file.write(b"")


@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize("place", ["{tmp}/new", "{tmp}/o=l d[1]/x", "memory://new"])
def test_a_run_that_was_moved_keeps_its_best(tmp_path, place, mode):
    new = place.format(tmp=tmp_path)
    files_in(new, "best.ckpt", "last.ckpt")
    found = restored(monitored("/old/run", {"best.ckpt": 0.5}, mode), new, mode)
    path = f"{found.dirpath}/best.ckpt"
    assert found.best_k_models == {path: torch.tensor(0.5)}
    assert found.best_model_path == found.kth_best_model_path == path
    assert found.best_model_score == found.kth_value == 0.5


def test_a_run_that_is_reached_through_a_link(tmp_path):
    files_in(str(tmp_path / "real"), "best.ckpt")
    (tmp_path / "link").symlink_to("real")
    state = monitored(str(tmp_path / "real"), {"best.ckpt": 0.5})
    found = restored(state, str(tmp_path / "link"))
    assert found.best_model_score == 0.5
    assert os.path.samefile(found.best_model_path, tmp_path / "real/best.ckpt")


def test_a_best_one_that_stayed_behind_is_forgotten(tmp_path):
    """In a folder of its own, where a run goes on from a file of another one."""
    found = restored(monitored("/old", {"best.ckpt": 0.5}), str(tmp_path))
    assert (found.best_k_models, found.best_model_path) == ({}, "")
    assert found.best_model_score is None
    assert found.kth_value == float("inf")
    assert found.last_model_path == ""


def test_names_that_lead_out_of_the_folder(tmp_path):
    """They are no files of the run."""
    files_in(str(tmp_path), "secret.txt")
    files_in(str(tmp_path / "run"), "best.ckpt")
    names = {"../secret.txt": 1.0, "..": 2.0, "../x/best.ckpt": 3.0, "": 4.0}
    found = restored(monitored("/old", names), str(tmp_path / "run"))
    assert found.best_k_models == {}
