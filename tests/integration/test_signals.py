"""Signals outside of training's loop: the real command ends soon, with the signal's
status and one line that says what is kept and how it goes on.
"""

import json
import signal
import time

import pytest
from resumed import Life

from utils import STOP_SIGNALS

SOON = 15  # s
# One is enough for every day; how each is raised is a unit test.
SIGNALS = [
    signal.SIGTERM,
    *(
        pytest.param(x, marks=pytest.mark.slow)
        for x in STOP_SIGNALS
        if x != signal.SIGTERM
    ),
]


@pytest.fixture(scope="module")
def live():
    """Starts a process: live(folder, *overrides, NAME=value of the environment)."""
    return Life.start


@pytest.fixture(scope="module")
def checkpoint(live, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("trained")
    life = live(folder, "trainer.max_steps=2", "trainer.val_check_interval=2")
    assert life.wait() == 0, life.stderr
    return f"eval.checkpoint_path={folder}/checkpoints/last.ckpt"


def check_stopped(life: Life, number: int, kept: str) -> str:
    """What is said of it."""
    begin = time.monotonic()
    assert life.wait() == 128 + number, life.stderr
    assert time.monotonic() - begin < SOON
    (line,) = (x for x in life.stderr.splitlines() if x.startswith("stopped by"))
    name = signal.Signals(number).name
    assert line.startswith(f"stopped by {name}; {kept}")
    assert ". The command that goes on:" in line
    assert f"hydra.run.dir={life.folder}" in line
    assert "Traceback" not in life.stderr
    return line


@pytest.mark.parametrize("number", SIGNALS)
def test_an_evaluation(live, checkpoint, tmp_path, number):
    stop = f"0:valid:{number}"
    more = ("mode=ppl_eval", checkpoint, "data.num_valid=2000")
    life = live(tmp_path, *more, STOP_AT=stop)
    check_stopped(life, number, "nothing was written")
    assert not (tmp_path / "likelihood.json").exists()


@pytest.mark.parametrize("number", SIGNALS)
def test_samples(live, checkpoint, tmp_path, number):
    """Batches that were drawn are there; the same command goes on with them."""
    more = ("mode=sample_eval", checkpoint, "sampling.num_sample_batches=3")
    more += ("eval.gen_ppl_eval_model_name_or_path=null", "loader.eval_batch_size=4")
    for number_drawn in (1, 2):  # one more batch each time
        life = live(tmp_path, *more, STOP_AT=f"0:second:{number}")
        check_stopped(life, number, f"{number_drawn} of 3 batches are there")
    parts = list((tmp_path / "samples.json.parts").glob("batch_*"))
    assert len(parts) == 2
    assert not json.loads((tmp_path / "samples.json").read_text())["complete"]
    assert live(tmp_path, *more).wait() == 0
    assert json.loads((tmp_path / "samples.json").read_text())["complete"]


@pytest.mark.parametrize("number", SIGNALS)
def test_the_check_before_training(live, tmp_path, number):
    life = live(tmp_path, STOP_AT=f"0:sanity:{number}")
    check_stopped(life, number, "checkpoints that were written are as they were")
    assert not list(tmp_path.rglob("*.ckpt"))


@pytest.mark.parametrize(("number", "processes"), [(15, 1), (15, 2), (2, 2)])
def test_packing(live, tmp_path, number, processes):
    """Nothing is left half-written, and the same command packs."""
    text = tmp_path / "train.jsonl"
    text.write_text('{"text": "a line of a few words"}\n' * 300_000)
    more = ["mode=prepare_data", "data=text_files", f"data.path={text}"]
    more += ["data.tokenizer_name_or_path=bytes", f"data.cache_dir={tmp_path}/cache"]
    life = live(tmp_path / "run", *more, f"data.num_proc={processes}")
    end = time.monotonic() + 60
    while not list(tmp_path.glob("cache/rows/*.partial")):
        assert time.monotonic() < end, life.stderr
        time.sleep(0.02)
    life.kill(number)
    check_stopped(life, number, "splits that were packed are kept")
    assert not list(tmp_path.glob("cache/rows/*.partial"))
