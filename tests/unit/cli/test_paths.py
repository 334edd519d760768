"""Where what a run writes goes, and what happens where it may not."""

import errno
import os
import stat
from functools import partial
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from refusals import refused

import main
from cli import paths
from cli.paths import (
    MADE,
    PATHS,
    check_writable,
    not_permitted,
    permission_line,
    place_outputs,
    refuse_shared,
)

IS_ROOT = os.geteuid() == 0
HERE = "/where/the command/was given"
OVERRIDES = ("algo=duo", "data=text_files")  # have all keys


@pytest.mark.parametrize("key", PATHS)
@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("runs/a", f"{HERE}/runs/a"),
        ("./a", f"{HERE}/a"),
        ("../b", "/where/the command/b"),
        ("a=b, [c]::d", f"{HERE}/a=b, [c]::d"),
        (".", HERE),
        ("~/x", f"{Path.home()}/x"),
        ("/absolute/x", "/absolute/x"),
        ("s3://bucket/run", "s3://bucket/run"),
        ("memory://run", "memory://run"),
    ],
)
def test_relative_paths_mean_where_the_command_was_given(compose, key, value, expected):
    config = compose(*OVERRIDES)
    OmegaConf.update(config, key, value)
    place_outputs(config, HERE)
    assert OmegaConf.select(config, key) == expected


def test_what_is_not_set_stays(compose, monkeypatch, tmp_path):
    """Defaults are in the run's folder, empty values are none."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DUO_CACHE_DIR", raising=False)
    config, before = compose(*OVERRIDES), compose(*OVERRIDES)
    place_outputs(config, HERE)
    assert OmegaConf.to_container(config) == OmegaConf.to_container(before)
    assert config.checkpointing.save_dir == str(tmp_path)
    assert config.export.path == ""


def test_what_is_made_of_a_path_follows_it(compose):
    config = compose("checkpointing.save_dir=runs/a")
    place_outputs(config, HERE)
    own = f"{HERE}/runs/a"
    assert config.checkpointing.resume_ckpt_path == f"{own}/checkpoints/last.ckpt"
    assert config.callbacks.checkpoint_monitor.dirpath == f"{own}/checkpoints"
    assert config.logger.csv.save_dir == own
    assert OmegaConf.is_interpolation(config.logger.csv, "save_dir")


@pytest.mark.parametrize(
    "key",
    [
        "callbacks.checkpoint_monitor.dirpath",
        "callbacks.checkpoint_every_n_steps.dirpath",
        "logger.csv.save_dir",
    ],
)
def test_folders_of_callbacks_and_loggers(compose, key):
    config = compose(f"{key}=mine")
    place_outputs(config, HERE)
    assert OmegaConf.select(config, key) == f"{HERE}/mine"


def test_the_cache_of_the_environment(compose, monkeypatch):
    monkeypatch.setenv("DUO_CACHE_DIR", "mycache")
    config = compose()
    place_outputs(config, HERE)
    assert config.data.cache_dir == f"{HERE}/mycache"


@pytest.mark.parametrize("group", ["callbacks", "logger"])
def test_groups_without_nodes(compose, group):
    config = compose()
    OmegaConf.update(config, group, None)
    place_outputs(config, HERE)


@pytest.mark.parametrize("mode", MADE)
def test_every_mode_and_its_key_exist(compose, mode):
    assert mode in main.MODES
    config = compose()
    assert OmegaConf.select(config, MADE[mode], throw_on_missing=True) is not None


# ---------------------------------------------------------------- sweeps


@pytest.mark.parametrize("mode", MADE)
def test_jobs_of_a_sweep_have_places_of_their_own(compose, monkeypatch, mode):
    monkeypatch.setattr(paths, "_jobs", {})
    key = MADE[mode]
    config = compose(f"mode={mode}", f"{key}=/runs/a")
    refuse_shared(config, 0)
    refuse_shared(config, 0)
    refuse_shared(compose(f"mode={mode}", f"{key}=/runs/b"), 1)
    refused(partial(refuse_shared, config, 2), f"{key}='/runs/a'", "job 0", "job.num")


def test_modes_that_make_nothing_share_all(compose, monkeypatch):
    monkeypatch.setattr(paths, "_jobs", {})
    for job in range(2):
        refuse_shared(compose("mode=inspect"), job)


# ---------------------------------------------------------------- permissions


@pytest.fixture
def locked(tmp_path):
    """A folder that nobody but root may write to."""
    folder = tmp_path / "locked"
    folder.mkdir()
    folder.chmod(stat.S_IRUSR | stat.S_IXUSR)
    yield folder
    folder.chmod(stat.S_IRWXU)


@pytest.fixture
def refuses(monkeypatch):
    """Says of all folders below some that they may not be written to."""

    def install(folder: Path) -> None:
        allowed = os.access
        monkeypatch.setattr(
            os,
            "access",
            lambda path, mode: (
                not str(path).startswith(str(folder)) and allowed(path, mode)
            ),
        )

    return install


@pytest.mark.parametrize("mode", MADE)
@pytest.mark.parametrize("below", ["", "a/b/c"])
def test_places_that_may_not_be_written_to(compose, tmp_path, refuses, mode, below):
    key = MADE[mode]
    folder = tmp_path / "locked"
    folder.mkdir()
    path = folder / (below or "x")
    config = compose(f"mode={mode}", f"{key}={path}")
    check_writable(config)
    refuses(folder)
    refused(partial(check_writable, config), f"{key}='{path}'", f"{folder} may not")


@pytest.mark.skipif(IS_ROOT, reason="root may write everywhere")
def test_a_locked_folder(compose, locked):
    config = compose(f"checkpointing.save_dir={locked}/run")
    refused(partial(check_writable, config), f"{locked} may not be written to")


def test_a_file_in_the_place_of_a_folder(compose, tmp_path):
    (tmp_path / "file").write_text("")
    config = compose(f"checkpointing.save_dir={tmp_path}/file/run")
    refused(partial(check_writable, config), f"{tmp_path}/file is no folder")


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.EROFS])
@pytest.mark.parametrize(
    "key", ["data.cache_dir", "checkpointing.save_dir", "eval.results_path", ""]
)
def test_a_refusal_names_the_key_that_leads_there(
    compose, monkeypatch, capsys, number, key
):
    path = "/the/place/rows/x"
    override = [f"{key}={'/the/place' if 'dir' in key else path}"] if key else []

    def write(config):
        try:
            raise OSError(number, os.strerror(number), path)
        except OSError as error:
            raise ValueError("a library says it in its words") from error

    monkeypatch.setitem(main.MODES, "inspect", write)
    with pytest.raises(ValueError, match="words") as raised:
        write(None)
    refusal = not_permitted(raised.value)
    line = permission_line(refusal, compose(*override))
    assert line.startswith(f"{path}: {os.strerror(number)}; ")
    assert (f"another {key}," if key else "another path") in line
    assert "\n" not in line


def test_other_faults_are_no_refusals():
    assert not_permitted(FileNotFoundError(errno.ENOENT, "no")) is None
    assert not_permitted(ValueError("no")) is None
