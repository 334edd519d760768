"""Runs that are stopped, killed and resumed equal one that never was, bit for bit.

Real processes, forked by a nursery that has imported the framework once; see
`stopper.py`. What a run shows of itself: its last checkpoint, the curves of all its
CSV logs together, and which rows it trained on at which step.
"""

import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from command_line import run
from image_files import images_of, labels_of, write_both
from refusals import refused
from resumed import (
    BASE,
    COMPARED,
    DUO_BASE,
    TWO,
    Life,
    batches,
    check_end,
    check_same,
    curves,
    differences,
    end_of_two,
    last,
    train_here,
)

from utils import STOP_SIGNALS, RunStopped, SignalReceived

HERE = Path(__file__).parents[1] / "support"


@pytest.fixture(scope="module")
def live():
    """Starts a process: live(folder, *overrides, NAME=value of the environment)."""
    return Life.start


@pytest.fixture(scope="module")
def whole(live, tmp_path_factory) -> Path:
    """The run that nothing stops."""
    life = live(tmp_path_factory.mktemp("whole"))
    assert life.wait() == 0, life.stderr
    return life.folder


def test_the_comparison_sees_differences(whole, tmp_path):
    """Of one bit of a weight, of a moment, of a value of a curve, of a row."""
    one = last(whole)
    assert one["global_step"] == 30
    assert {step for _, step in curves(whole)} == {9, 19, *range(2, 30, 3)}
    assert len(batches(whole)) == 30
    assert {"val/nll", "train/nll", "trainer/lr"} <= {c for c, _ in curves(whole)}
    two = last(whole)
    two["optimizer_states"][0]["state"][3]["exp_avg"].view(-1)[2] += 1
    two["ema"]["shadow_params"][1].view(-1)[0] += 1
    assert differences(one, two) == [
        ".ema.shadow_params.1",
        ".optimizer_states.0.state.3.exp_avg",
    ]


# ---------------------------------------------------------------- one process


# Before there is any checkpoint; between two; in validations, the last among them;
# while a checkpoint is written; on one that is whole, but not yet in its place.
STOPS = (
    "3:train:9",
    "10:valid:15",
    "12:train:10",
    "15:write:9",
    "20:rename:9",
    "20:valid:9",
    "27:train:2",
    "30:valid:10",
)


@pytest.mark.parametrize(
    "stops",
    [
        ("10:valid:15", "15:write:9", "30:valid:2"),
        pytest.param(STOPS, marks=pytest.mark.slow),
    ],
    ids=["few", "all"],
)
def test_stopped_in_many_places(live, whole, tmp_path, stops):
    for stop in stops:
        life = live(tmp_path, STOP_AT=stop)
        check_end(life, int(stop.split(":")[2]))
    life = live(tmp_path)
    assert life.wait() == 0, life.stderr
    check_same(whole, tmp_path)
    names = sorted(x.name for x in (tmp_path / "checkpoints").iterdir())
    assert names == ["2-25.ckpt", "3-30.ckpt", "best.ckpt", "last.ckpt"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [15, 2])
def test_stopped_twice_in_its_last_validation(live, tmp_path, number):
    for _ in range(2):
        check_end(live(tmp_path, STOP_AT=f"30:valid:{number}"), number)


@pytest.mark.slow
def test_a_disk_without_space(live, whole, tmp_path):
    """One line, status 1; what was there is whole, and a run goes on from it."""
    assert live(tmp_path, "trainer.max_steps=10").wait() == 0
    before = (tmp_path / "checkpoints/last.ckpt").read_bytes()
    life = live(tmp_path, FILE_SIZE_LIMIT=str(len(before) // 2))
    assert life.wait() == 1
    (line,) = (x for x in life.stderr.splitlines() if x.startswith("error:"))
    assert ".ckpt cannot be written" in line
    assert "File too large" in line
    assert "Traceback" not in life.stderr
    assert (tmp_path / "checkpoints/last.ckpt").read_bytes() == before
    assert not list(tmp_path.rglob("*.partial"))
    assert live(tmp_path).wait() == 0
    check_same(whole, tmp_path)


def at_random(live, folder: Path, signals: list[int], most: int, *more: str) -> None:
    """Ends one life after another by a signal from outside, then lets one finish.

    Args:
        live: Starts a life.
        folder: Of the run.
        signals: In an order that is drawn, too.
        most: Batches of a life that it is not let live longer than.
        more: Overrides.
    """
    draw = random.Random(5)
    draw.shuffle(signals)
    for number in signals:
        life = live(folder, *more)
        life.reach(draw.randint(1, most))
        time.sleep(draw.uniform(0, 0.02))  # a few updates
        life.kill(number)
        check_end(life, number)
    life = live(folder, *more)
    assert life.wait() == 0, life.stderr


@pytest.mark.slow
def test_killed_at_random_moments(live, whole, tmp_path):
    signals = [signal.SIGKILL] * 2 + [signal.SIGTERM]
    at_random(live, tmp_path, signals, 6)
    check_same(whole, tmp_path)


@pytest.mark.slow
def test_killed_twenty_five_times(live, tmp_path):
    """400 steps with workers and accumulation; curves are joined over 26 lives."""
    more = ("trainer.max_steps=400", "loader.batch_size=4", "loader.num_workers=2")
    more += ("callbacks.checkpoint_every_n_steps.every_n_train_steps=7",)
    assert live(tmp_path / "whole", *more).wait() == 0
    signals = [signal.SIGKILL] * 20 + [signal.SIGTERM] * 5
    at_random(live, tmp_path / "killed", signals, 60, *more)
    check_same(tmp_path / "whole", tmp_path / "killed")


# ---------------------------------------------------------------- two processes


@pytest.fixture
def live_as_two():
    """Both ranks of a run."""

    def start(folder: Path, *overrides: str, **env: str) -> list[Life]:
        return Life.start_two(folder, *TWO, *overrides, **env)

    return start


def check_two(start, folder: Path, stops: list[tuple[str, str]]) -> None:
    """Stops at (place, rank); the other rank has to agree."""
    end_of_two(start(folder / "whole"), 0)
    for stop, rank in stops:
        lives = start(folder / "stopped", STOP_AT=stop, STOP_RANK=rank)
        end_of_two(lives, 128 + int(stop.split(":")[2]))
        said = "".join(life.stderr for life in lives).count("stopped by")
        assert said == 1
    end_of_two(start(folder / "stopped"), 0)
    check_same(folder / "whole", folder / "stopped")


@pytest.mark.slow
def test_two_processes(live_as_two, tmp_path):
    """With workers and accumulation; either rank alone may get the signal."""
    check_two(live_as_two, tmp_path, [("12:train:15", "1")])


FIRST_FILES = {
    "0-5.ckpt": (),
    "best.ckpt": ("callbacks.checkpoint_every_n_steps.every_n_train_steps=100",),
    "round_0.ckpt": ("algo=distillation", "algo._target_=stopper.Distilled"),
}


@pytest.mark.slow
@pytest.mark.parametrize("file", FIRST_FILES)
def test_two_processes_on_a_disk_without_space(live_as_two, train, tmp_path, file):
    """Whoever writes the first checkpoint of the run."""
    more = list(FIRST_FILES[file])
    if "algo=distillation" in more:
        short = ("trainer.max_steps=2", "trainer.val_check_interval=2")
        parent = train("parent", *short) / "checkpoints/last.ckpt"
        more += ["algo.T=16", f"training.finetune_path={parent}"]
    lives = live_as_two(tmp_path / "run", *more, FILE_SIZE_LIMIT="50000")
    assert [life.wait() for life in lives] == [1, 1]
    assert f"{file} cannot be written" in "".join(life.stderr for life in lives)
    assert not list(tmp_path.rglob("*.partial"))
    said = "".join(life.stderr for life in lives)
    assert said.count("error:") == 1
    assert "Traceback" not in said


@pytest.mark.slow
def test_two_processes_in_more_places(live_as_two, tmp_path):
    stops = [("4:train:2", ""), ("10:valid:10", "0"), ("10:valid:15", "1")]
    stops += [("17:train:10", "1"), ("30:valid:2", "")]
    check_two(live_as_two, tmp_path, stops)


@pytest.mark.slow
def test_two_processes_killed_at_random(live_as_two, tmp_path):
    """Six lives of at most 20 updates of 200, of two micro-batches each."""
    more = ("trainer.max_steps=200", "trainer.val_check_interval=50")
    end_of_two(live_as_two(tmp_path / "whole", *more), 0)
    draw = random.Random(6)
    for _ in range(6):
        lives = live_as_two(tmp_path / "killed", *more)
        lives[0].reach(draw.randint(1, 40))
        for life in lives:
            life.kill(signal.SIGKILL)
        end_of_two(lives, -signal.SIGKILL)
    end_of_two(live_as_two(tmp_path / "killed", *more), 0)
    check_same(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_one_of_two_processes_is_killed(live_as_two, tmp_path, rank):
    """The other one ends soon, with one line that says so if it is the first."""
    end_of_two(live_as_two(tmp_path / "whole"), 0)
    place = {"STOP_AT": "12:train:9", "STOP_RANK": str(rank)}
    lives = live_as_two(tmp_path / "killed", **place)
    assert lives[rank].wait() == -signal.SIGKILL
    assert lives[1 - rank].wait() == 1
    said = lives[1 - rank].stderr
    assert said.count("error: another process of this run has ended") == rank
    assert "Traceback" not in said
    end_of_two(live_as_two(tmp_path / "killed"), 0)
    check_same(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.slow
def test_two_processes_stopped_and_killed_within_rounds(live_as_two, train, tmp_path):
    """A distillation: in a round, in a validation at the end of one, by both ways."""
    short = ("trainer.max_steps=2", "trainer.val_check_interval=2")
    parent = train("parent", *short) / "checkpoints/last.ckpt"
    own = [x for x in DISTILLED if x not in SHORT]
    own += ["algo.update_teacher_every=10", f"training.finetune_path={parent}"]
    end_of_two(live_as_two(tmp_path / "whole", *own), 0)
    for stop in ("4:train:15", "10:valid:15", "16:train:10"):
        lives = live_as_two(tmp_path / "stopped", *own, STOP_AT=stop, STOP_RANK="1")
        end_of_two(lives, 128 + int(stop.split(":")[2]))
    lives = live_as_two(tmp_path / "stopped", *own, STOP_AT="24:train:9", STOP_RANK="")
    end_of_two(lives, -signal.SIGKILL)
    end_of_two(live_as_two(tmp_path / "stopped", *own), 0)
    check_same(tmp_path / "whole", tmp_path / "stopped")


@pytest.mark.slow
def test_the_real_command_of_two_processes(tmp_path):
    """Lightning starts the second one itself; only the first gets the signal."""
    own = (*BASE, *DUO_BASE, *TWO)
    run(*own, f"hydra.run.dir={tmp_path}/whole", cwd=tmp_path, pythonpath=HERE)
    options = {"cwd": tmp_path, "pythonpath": HERE}
    stopped = (*own, f"hydra.run.dir={tmp_path}/stopped")
    done = run(*stopped, **options, status=143, env={"STOP_AT": "12:train:15"})
    assert done.stderr.count("stopped by SIGTERM") == 1
    run(*stopped, **options)
    one, two = last(tmp_path / "whole"), last(tmp_path / "stopped")
    assert [d for k in COMPARED for d in differences(one.get(k), two.get(k), k)] == []


# ---------------------------------------------------------------- in this process


@pytest.fixture
def train(monkeypatch, tmp_path):
    """Trains in this process: train(name of a folder, *overrides, stop=place)."""

    def go(
        name: str,
        *overrides: str,
        stop: str = "",
        raises: type[BaseException] = RunStopped,
    ) -> Path:
        place = tmp_path / name
        place.mkdir(exist_ok=True)
        monkeypatch.chdir(place)
        monkeypatch.setenv("STOP_AT", stop)
        monkeypatch.setenv("DATALOG", f"{place}/log")
        train_here(place, *overrides, raises=raises if stop else None)
        return place

    return go


pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
ALGORITHMS = {
    "ar": ["algo=ar", "algo._target_=stopper.AR"],
    "mdlm": ["algo=mdlm", "algo._target_=stopper.MDLM"],
    "blocks": [
        "algo=mdlm",
        "algo._target_=stopper.MDLM",
        "algo.block_size=[4,2,8]",
        "training.time_range=[0.3,0.8]",
    ],
    "duo": [
        "algo=duo",
        "algo._target_=stopper.Duo",
        "algo.curriculum.start=4",
        "algo.curriculum.end=11",
    ],
    "images": [
        "data=images",
        "data.size=16",
        "data.num_classes=3",
        "data.flip=True",
        "model=unet",
        "model.ch=4",
        "model.num_scales=2",
        "model.ch_mult=[1,2]",
        "model.num_res_blocks=1",
        "algo.backbone=unet",
        "training.class_dropout_p=0.5",
        "sampling.guid_weight=2",
    ],
}
SHORT = (
    "trainer.max_steps=12",
    "trainer.val_check_interval=6",
    "callbacks.checkpoint_every_n_steps.every_n_train_steps=100",
    "loader.batch_size=4",
)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_algorithms(train, name, tmp_path):
    """Stopped in the curriculum, and in a validation, with accumulation; of blocks
    whose size is drawn for each row; of images with classes that are hidden at random,
    flips and dropout."""
    own = [*ALGORITHMS[name], *SHORT]
    if name == "images":
        sets = [(images_of(n, seed=n), labels_of(n)) for n in (72, 32)]
        source = write_both("npz", tmp_path / "set", *sets)
        own += [f"data.source={source}", f"data.cache_dir={tmp_path}/cache"]
    whole = train("whole", *own)
    train("stopped", *own, stop="5:train:15")
    train("stopped", *own, stop="6:valid:15")
    train("stopped", *own, stop="10:train:2")
    check_same(whole, train("stopped", *own))


DISTILLED = (
    "algo=distillation",
    "algo._target_=stopper.Distilled",
    "algo.update_teacher_every=3",
    "algo.T=16",
    "optim.lr=1e-2",
    *SHORT,
)


# Four rounds of three steps, after which it ends by itself.
SDTT = (
    "algo=sdtt",
    "algo._target_=stopper.SDTT",
    "algo.grow_dt_every=3",
    "algo.orig_num_sampling_steps=16",
    "algo.min_num_sampling_steps=2",
    "optim.lr=1e-2",
    *SHORT,
    "trainer.max_steps=20",
)
OF_MDLM = ("algo=mdlm", "algo._target_=algo.MDLM")
GROWTH = ("algo.use_ema_on_growth=True", "algo.reset_optimizer_on_growth=True")
# By name: what the teacher is trained with, and the distillation's own settings.
DISTILLATIONS = {
    "dcd": ((), DISTILLED),
    "dcd-ema": ((), (*DISTILLED, "algo.teacher_ema=True")),
    "sdtt": (OF_MDLM, SDTT),
    "sdtt-growth": (OF_MDLM, (*SDTT, *GROWTH)),
}


OFTEN = (("dcd-ema", 2), ("sdtt-growth", 2))  # the others are slow tests


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        pytest.param(name, rows, marks=[pytest.mark.slow] * ((name, rows) not in OFTEN))
        for name in DISTILLATIONS
        for rows in (8, 2)
    ],
)
def test_distillation(train, name, rows):
    """Stopped in a round, at the end of one, in a validation at the end of one and of
    the run; killed in a round and at the end of one; with accumulation 1 and 4."""
    of_parent, own = DISTILLATIONS[name]
    short = ("trainer.max_steps=2", "trainer.val_check_interval=2")
    parent = train("parent", *short, *of_parent)
    own = [*own, f"training.finetune_path={parent}/checkpoints/last.ckpt"]
    own += [f"loader.batch_size={rows}"]
    own += ["callbacks.checkpoint_every_n_steps.every_n_train_steps=2"]
    whole = train("whole", *own)
    assert last(whole)["global_step"] == 12
    assert last(whole)["teacher"]["round"] == 3
    stops = ("2:train:15", "4:saved:9", "6:saved:9", "6:valid:15", "7:train:2")
    for stop in (*stops, "10:saved:9", "12:valid:15"):
        train("stopped", *own, stop=stop)
    check_same(whole, train("stopped", *own))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


# What may happen to the file of a teacher.
HARMS = {
    "a bit": flip,
    "half": lambda path: path.write_bytes(path.read_bytes()[:5000]),
    "all": lambda path: path.unlink(),
    "another": lambda path: shutil.copy(path.with_name("round_0.ckpt"), path),
}


@pytest.mark.parametrize(
    "harm",
    [
        *("half", "another"),
        *(pytest.param(x, marks=pytest.mark.slow) for x in ("a bit", "all")),
    ],
)
def test_a_distillation_whose_teacher_is_lost(train, caplog, harm):
    """It goes on from where it needs none: the end of the round before."""
    parent = train("parent", "trainer.max_steps=2", "trainer.val_check_interval=2")
    path = f"training.finetune_path={parent}/checkpoints/last.ckpt"
    every = "callbacks.checkpoint_every_n_steps.every_n_train_steps=3"
    own = [*DISTILLED, path, every]
    whole = train("whole", *own)
    place = train("stopped", *own, stop="7:train:15")
    HARMS[harm](place / "checkpoints/round_2.ckpt")
    check_same(whole, train("stopped", *own))
    assert ".ckpt (step 6) instead" in caplog.text


def test_a_distillation_that_lost_all_it_needs(train):
    parent = train("parent", "trainer.max_steps=2", "trainer.val_check_interval=2")
    path = f"training.finetune_path={parent}/checkpoints/last.ckpt"
    own = [*DISTILLED, path, "callbacks.checkpoint_monitor.save_top_k=0"]
    place = train("stopped", *own, stop="7:train:15")
    (place / "checkpoints/round_2.ckpt").unlink()
    refused(lambda: train("stopped", *own), "teacher of round 2", "To train anew")


@pytest.mark.parametrize(
    "stops",
    [
        ("8:train:15",),
        ("8:train:15", "12:train:15"),
        ("8:train:15", "17:train:15"),
    ],
)
def test_stopped_at_ends_of_epochs(train, stops):
    """Nine updates are one: the next one begins with its first row."""
    own = [*SHORT, "trainer.max_steps=22", "trainer.val_check_interval=20"]
    whole = train("whole", *own)
    for stop in stops:
        train("stopped", *own, stop=stop)
    check_same(whole, train("stopped", *own))


# Nine updates are an epoch, checkpoints are written every three. Validations by number
# of updates, also across epochs; by epoch, at its end and on the way.
VALIDATIONS = {
    "updates": ("null", 5),
    "epochs": (1, 1.0),
    "second epochs": (2, 1.0),
    "thirds of epochs": (1, 0.34),
    "updates of epochs": (1, 6),
}
FEW_VALIDATIONS = ("epochs", "updates of epochs")  # in the default suite


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(x, marks=() if x in FEW_VALIDATIONS else pytest.mark.slow)
        for x in VALIDATIONS
    ],
)
def test_validations_are_those_of_a_run_that_was_not_stopped(train, name):
    """Killed behind checkpoints near ends of epochs, signalled in validations."""
    epochs, interval = VALIDATIONS[name]
    own = [
        *SHORT,
        "optim.lr=3e-3",
        "callbacks.checkpoint_monitor.mode=max",  # the best validation is an early one
        "trainer.max_steps=20",
        f"trainer.check_val_every_n_epoch={epochs}",
        f"trainer.val_check_interval={interval}",
        "callbacks.checkpoint_every_n_steps.every_n_train_steps=3",
    ]
    whole = train("whole", *own)
    steps = sorted(step + 1 for column, step in curves(whole) if column == "val/nll")
    stops = [(step, "saved:9") for step in (3, 9, 12, 18)]
    for step, how in sorted(stops + [(step, "valid:15") for step in steps]):
        train("stopped", *own, stop=f"{step}:{how}")
    check_same(whole, train("stopped", *own))
    path = whole / "checkpoints/best.ckpt"
    step = last(whole, "best")["global_step"]
    assert step < 20
    again = train("again", *own, f"checkpointing.resume_ckpt_path={path}")
    assert differences(last(whole)["state_dict"], last(again)["state_dict"]) == []
    late = {key: x for key, x in curves(whole).items() if key[1] >= step}
    assert {key: x for key, x in curves(again).items() if key[1] >= step} == late


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_stopped_while_a_validation_draws_its_samples(train, number):
    """In the middle of them, which may take long; at the end of the run, too."""
    whole = train("whole", *SHORT)
    for step in (6, 12):
        stop = f"{step}:sample:{number}"
        train("stopped", *SHORT, stop=stop, raises=SignalReceived)
    check_same(whole, train("stopped", *SHORT))


def test_killed_behind_its_last_checkpoint(train):
    own = [*SHORT, "trainer.val_check_interval=6"]
    whole = train("whole", *own)
    train("stopped", *own, stop="12:saved:9")
    check_same(whole, train("stopped", *own))


def test_a_run_that_is_moved_while_it_stands(train):
    """Its best validation is the first one: the best is what nll is worst at."""
    own = [*SHORT, "optim.lr=1e-2", "callbacks.checkpoint_monitor.mode=max"]
    own += ["trainer.max_steps=20", "trainer.val_check_interval=4"]
    whole = train("whole", *own)
    assert last(whole, "best")["global_step"] < 12
    place = train("moved", *own, stop="12:train:15")
    shutil.copytree(place, place.parent / "copy")
    place.rename(place.parent / "elsewhere")
    (place.parent / "link").symlink_to("elsewhere")
    for name in ("copy", "link"):
        check_same(whole, train(name, *own))


def test_resumed_from_the_best(train):
    """Its folder of its own; what came after is trained again, and the same."""
    whole = train("whole")
    best = torch.load(whole / "checkpoints/best.ckpt", weights_only=True)
    assert best["global_step"] in (10, 20, 30)
    path = f"checkpointing.resume_ckpt_path={whole}/checkpoints/best.ckpt"
    again = train("again", path, "trainer.max_steps=40")
    longer = train("whole", "trainer.max_steps=40")
    assert differences(last(longer)["state_dict"], last(again)["state_dict"]) == []


@pytest.mark.parametrize("num_steps", [10, 18])
def test_a_longer_run_goes_on_from_a_finished_one(train, num_steps):
    """At a validation; at the end of an epoch, with a validation that ends it."""
    whole = train("whole", "trainer.max_steps=24")
    train("parts", f"trainer.max_steps={num_steps}")
    ended = 0 if num_steps == 10 else num_steps
    check_same(whole, train("parts", "trainer.max_steps=24"), ended)


@pytest.mark.parametrize("stops", [("8:saved:9",), ("8:valid:15", "8:sample:15")])
def test_stopped_in_a_validation_that_ends_the_run(train, stops):
    """It is not one of those that come every so many updates."""
    own = [*SHORT, "trainer.max_steps=8"]
    whole = train("whole", *own)
    assert ("val/nll", 7) in curves(whole)
    for stop in stops:
        how = SignalReceived if "sample" in stop else RunStopped
        train("stopped", *own, stop=stop, raises=how)
    check_same(whole, train("stopped", *own))
