"""The folder of a run means its last checkpoint."""

import pytest
from refusals import refused

from checkpoints.locating import checkpoint_in
from cli.commandline import CHECKPOINTS, find_inputs

KEY = "eval.checkpoint_path"


@pytest.fixture
def run_folder(tmp_path):
    """As training leaves it."""
    folder = tmp_path / "my [run]"
    (folder / "checkpoints").mkdir(parents=True)
    for name in ("last.ckpt", "best.ckpt", "0-4.ckpt"):
        (folder / "checkpoints" / name).touch()
    return folder


def test_a_folder_of_a_run(run_folder):
    last = f"{run_folder}/checkpoints/last.ckpt"
    for path in (run_folder, f"{run_folder}/", f"{run_folder}/checkpoints"):
        assert checkpoint_in(str(path), KEY) == last
    for path in (last, f"{run_folder}/no.ckpt", "owner/name", "gpt2"):
        assert checkpoint_in(path, KEY) == path


def test_a_hugging_face_folder_is_what_it_is(run_folder):
    (run_folder / "config.json").write_text("{}")
    assert checkpoint_in(str(run_folder), KEY) == str(run_folder)


def test_a_folder_in_a_store():
    import fsspec

    with fsspec.open("memory://runs/one/checkpoints/last.ckpt", "wb") as file:
        file.write(b"x")
    last = "memory://runs/one/checkpoints/last.ckpt"
    assert checkpoint_in("memory://runs/one", KEY) == last
    assert checkpoint_in("memory://runs/two", KEY) == "memory://runs/two"


def test_other_folders_are_refused(tmp_path, run_folder):
    refused(lambda: checkpoint_in(str(tmp_path), KEY), KEY, str(tmp_path), "last.ckpt")
    (run_folder / "checkpoints/last.ckpt").unlink()
    folder = str(run_folder / "checkpoints")
    refused(lambda: checkpoint_in(folder, KEY), "such as", "0-4.ckpt")


@pytest.mark.parametrize("key", CHECKPOINTS)
def test_every_key_of_a_checkpoint_takes_a_folder(compose, run_folder, key):
    config = compose(f"{key}='{run_folder.name}'")
    find_inputs(config, str(run_folder.parent))
    group, name = key.split(".")
    assert config[group][name] == f"{run_folder}/checkpoints/last.ckpt"
