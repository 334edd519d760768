"""Runs whose `checkpointing.save_dir` is behind fsspec: in memory, and an S3 server on
this machine. They stop, resume, keep few files, and survive a torn last.ckpt."""

import uuid
from pathlib import Path

import fsspec
import pytest
import torch
from resumed import differences, train_here

from utils import ConfigError, RunStopped, path_exists

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
SHORT = (
    "trainer.max_steps=12",
    "trainer.val_check_interval=6",
    "callbacks.checkpoint_every_n_steps.every_n_train_steps=3",
    "callbacks.checkpoint_every_n_steps.save_top_k=1",
)


@pytest.fixture(scope="module")
def s3():
    """A bucket of a server on the loopback device; gives its address."""
    pytest.importorskip("s3fs")
    server_of = pytest.importorskip("moto.server")
    server = server_of.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "testing")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setitem(fsspec.config.conf, "s3", {"endpoint_url": endpoint})
        fsspec.filesystem("s3").mkdir("bucket")
        yield "s3://bucket"
        fsspec.filesystem("s3").clear_instance_cache()
    server.stop()


@pytest.fixture(params=["memory", "s3"])
def store(request) -> str:
    """An empty folder of a store."""
    if request.param == "memory":
        return f"memory://{uuid.uuid4().hex}"
    return f"{request.getfixturevalue('s3')}/{uuid.uuid4().hex}"


@pytest.fixture
def train(monkeypatch, tmp_path):
    """Trains in this process: train(save_dir, *overrides, stop=place)."""

    def go(save_dir: str, *overrides: str, stop: str = "") -> None:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("STOP_AT", stop)
        train_here(save_dir, *SHORT, *overrides, raises=RunStopped if stop else None)

    return go


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict:
    """The last checkpoint of a run on the disk that nothing stops."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train_here(folder, *SHORT)
    return torch.load(folder / "checkpoints/last.ckpt", weights_only=True)


def names(save_dir: str) -> list[str]:
    filesystem, inner = fsspec.core.url_to_fs(f"{save_dir}/checkpoints")
    filesystem.invalidate_cache()
    return sorted(Path(x).name for x in filesystem.ls(inner, detail=False))


def last(save_dir: str) -> dict:
    with fsspec.open(f"{save_dir}/checkpoints/last.ckpt", "rb") as file:
        return torch.load(file, weights_only=True)


PARTS = ("state_dict", "ema", "optimizer_states", "lr_schedulers", "global_step")


def check_same(one: dict, two: dict) -> None:
    assert [x for k in PARTS for x in differences(one[k], two[k], k)] == []


def test_stopped_and_resumed(train, store, whole, tmp_path):
    """In training and in a validation; few files are kept, none is half a one."""
    train(store, stop="5:train:15")
    assert last(store)["global_step"] == 6
    train(store, stop="6:valid:10")
    train(store)
    check_same(last(store), whole)
    assert names(store) == ["1-12.ckpt", "best.ckpt", "last.ckpt"]
    assert path_exists(f"{store}/samples/step_12.json")
    assert not any(tmp_path.rglob("*.ckpt"))  # nor in a folder named memory:


def test_a_torn_last_checkpoint(train, store, whole, caplog):
    """A half upload, as a store that is not atomic might have it."""
    train(store, "trainer.max_steps=9")
    path = f"{store}/checkpoints/last.ckpt"
    with fsspec.open(path, "rb") as file:
        content = file.read()
    with fsspec.open(path, "wb") as file:
        file.write(content[: len(content) // 2])
    caplog.clear()
    train(store)
    lines = [record.getMessage() for record in caplog.records]
    assert sum(path in line and "cannot be read" in line for line in lines) == 1
    assert any("going on from" in line for line in lines)
    check_same(last(store), whole)


def test_another_run_is_not_overwritten(train, store):
    train(store, "trainer.max_steps=3")
    before = last(store)
    with pytest.raises(ConfigError, match="would be overwritten"):
        train(store, "checkpointing.resume_from_ckpt=False")
    check_same(last(store), before)


@pytest.mark.parametrize("logger", ["csv", "none"])
def test_logs_do_not_end_up_in_a_local_folder(train, store, logger, tmp_path):
    """Named like the store's address."""
    train(store, "trainer.max_steps=3", f"logger={logger}")
    assert path_exists(f"{store}/csv/version_0/metrics.csv") == (logger == "csv")
    assert not any("metrics" in x.name for x in tmp_path.rglob("*"))


def test_the_config_is_kept_beside_the_checkpoints(train, store):
    train(store, "trainer.max_steps=3")
    assert path_exists(f"{store}/config_tree.txt")
