"""A checkpoint that is resumed is somebody's word: all state that training would use is
compared with what the run has, before anything of it is used.
"""

import copy
from pathlib import Path

import pytest
import torch
from refusals import refused
from short_run import SHORT_RUN, train_in
from tiny import tiny_model

from checkpoints.checkpoint import Checkpoint
from training.resume import KEY, Resumed, _check_resumable, check_state
from training.row_streams import NOISE_VERSION

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    train_in(folder)
    return folder


@pytest.fixture(scope="module")
def content(run) -> dict:
    return torch.load(run / "checkpoints/last.ckpt", weights_only=True)


@pytest.fixture(scope="module")
def model():
    return tiny_model(*SHORT_RUN)


def check(content: dict, model) -> None:
    resumed = Resumed("a.ckpt", Checkpoint.of_lightning(content))
    _check_resumable(*resumed)
    check_state(resumed, model)


def test_its_own_state_fits(content, model):
    check(copy.deepcopy(content), model)


def test_noise_of_a_version_to_come_is_refused(content, model):
    content = copy.deepcopy(content)
    content["training"]["noise"] = NOISE_VERSION + 1
    said = f"noise is of version {NOISE_VERSION + 1}", f"has {NOISE_VERSION}"
    refused(lambda: check(content, model), KEY, "a.ckpt", *said)


DELETE = object()
OPTIMIZER = "optimizer_states.0.state.0"
GROUP = "optimizer_states.0.param_groups.0"
FIT = "loops.fit_loop"
BATCHES = f"{FIT}/epoch_loop.batch_progress"
MISFITS: dict[str, tuple] = {
    f"{OPTIMIZER}.exp_avg": (
        *(torch.zeros(1), torch.zeros(()), torch.zeros(0), torch.zeros(7, 9)),
        *(torch.zeros(7, 8, dtype=torch.int64), "x", None, 3, [0.0], DELETE),
    ),
    f"{OPTIMIZER}.exp_avg_sq": (torch.zeros(1), torch.zeros(8, 7), DELETE),
    f"{OPTIMIZER}.max_exp_avg_sq": (torch.zeros(1),),
    f"{OPTIMIZER}.step": (torch.zeros(2), -1, float("nan"), 1e30, "x", DELETE),
    f"{OPTIMIZER}": ("x", [], {"step": 1}),
    f"{GROUP}.params": ([], [0], [0] * 20, list(range(21)), "x", None, DELETE),
    f"{GROUP}.lr": ("x", None, float("nan"), float("inf"), [1], DELETE),
    f"{GROUP}.initial_lr": ("x", b"x", None, [], float("inf")),
    "optimizer_states.0.param_groups": ([], {}, "x", DELETE),
    "optimizer_states.0.state": ([], {99: {}}, {"x": {}}, {-1: {}}, DELETE),
    "optimizer_states": ([], {}, None, [1], "x", torch.zeros(2), DELETE),
    "lr_schedulers": ({}, None, [7], [[]], DELETE),
    "lr_schedulers.0.last_epoch": (-2, "x", 1 << 60, 0.5, None, DELETE),
    "lr_schedulers.0.base_lrs": ("x", [None], {}, [float("inf")]),
    "lr_schedulers.0._last_lr": ("x", ["x"]),
    "loops": ({}, [], None, torch.zeros(0), DELETE),
    FIT: ({}, [], DELETE),
    f"{BATCHES}.total.ready": (-1, 0.5, "x", None, True, 1 << 60, 0, DELETE),
    f"{BATCHES}.current.completed": (99, -1, DELETE),
    f"{BATCHES}.is_last_batch": (1, None, "x", DELETE),
    f"{BATCHES}.reset": (1,),  # would replace a method
    f"{BATCHES}.current.reset": (1,),
    f"{FIT}/epoch_progress": ({}, 1, DELETE),
    f"{FIT}/epoch_loop.state_dict": ([], {"_batches_that_stepped": "x"}, DELETE),
    f"{FIT}/state_dict": ({"combined_loader": 1}, {"combined_loader": ["x"]}, DELETE),
    f"{FIT}/state_dict.combined_loader": (
        [{"epoch": -1}],
        [{"rows": "x"}],
        [{"stream": [[[1, 2]]], "next": 0}],
        [{"stream": [[[0] * 6]], "next": 1}],
        [{"stream": [[[0] * 6], []], "next": 0}],
        [{"stream": [[[0] * 6]]}],
        [{"stream": [], "next": 0}],
        [{"stream": [[[0] * 5 + [-1]]], "next": 0}],
    ),
    "global_step": (0, 3, 1 << 40, -1, "2", None, True, DELETE),
    "epoch": (99, -1, "x", DELETE),
    "callbacks": ([], 3, {"a": 1}, {3: {}}, DELETE),
    "training": ({}, 3, None),
    "training.likelihood": (torch.zeros(6), torch.zeros(1, 5), "x", DELETE),
    "training.validation_due": (1, "x", DELETE),
    "training.logged_step": (-1, "x", DELETE),
    "pytorch-lightning_version": ("1.5.0", "x", "", "2.6.6\n", "9" * 99, 2, DELETE),
    "hyper_parameters": ({}, None, {"config": {}}),
    "hyper_parameters.config.loader": ({}, None, [1], DELETE),
    "hyper_parameters.config.loader.batch_size": (0, -1, "4", None, 0.5, DELETE),
    "hyper_parameters.config.trainer.devices": (0, 1 << 40, "auto", DELETE),
}


def changed(content: dict, place: str, value) -> dict:
    """A copy with another value; of the loops' names, dots are parts."""
    content = copy.deepcopy(content)
    before, slash, name = place.partition("/")
    if slash:
        first, dot, rest = name.partition("_progress")
        names = [*before.split("."), first + dot, *rest.split(".")[1:]]
        if not dot:
            names = [*before.split("."), *name.split(".combined_")[:1]]
            names += ["combined_loader"] * (".combined_" in name)
    else:
        names = place.split(".")
    *path, last = [int(x) if x.isdigit() else x for x in names]
    node = content
    for key in path:
        node = node[key]
    if value is DELETE:
        del node[last]
    else:
        node[last] = value
    return content


CASES = [(place, i) for place, values in MISFITS.items() for i in range(len(values))]


@pytest.mark.parametrize(("place", "index"), CASES)
def test_a_misfit_is_refused_before_it_is_used(content, model, place, index):
    bad = changed(content, place, MISFITS[place][index])
    refused(lambda: check(bad, model), KEY, "a.ckpt", "cannot be resumed")


def test_attributes_of_the_schedule_are_not_replaced(content, model):
    """Entries that it does not have are left out."""
    bad = changed(content, "lr_schedulers.0.step", "x")
    check(bad, model)
    assert "step" not in bad["lr_schedulers"][0]


# ---------------------------------------------------------------- whole runs


def hostile(content: dict, victim: Path) -> dict:
    """Says that every callback has written a file elsewhere."""
    content = copy.deepcopy(content)
    far = "../" * 20
    for key, state in content["callbacks"].items():
        if key.startswith("ModelCheckpoint"):
            path = f"local://{victim}"
            score = torch.tensor(1e9)
            state |= {"best_k_models": {path: score}, "kth_best_model_path": path}
            state |= {"kth_value": score, "best_model_path": path}
        else:
            state["written"] = [f"{far}{victim}"[: len(far)] + str(victim)[1:]] * 5
    return content


@pytest.mark.parametrize("place", ["own", "elsewhere"])
def test_no_file_outside_of_the_folder_is_deleted(tmp_path, content, place):
    victim = tmp_path / "home/thesis.tex"
    victim.parent.mkdir()
    victim.write_text("mine")
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    path = run / "checkpoints/last.ckpt" if place == "own" else tmp_path / "a.ckpt"
    torch.save(hostile(content, victim), path)
    train_in(run, "trainer.max_steps=6", f"{KEY}={path}")
    assert victim.read_text() == "mine"
    names = {x.name for x in (run / "checkpoints").iterdir()}
    assert {"best.ckpt", "last.ckpt", "2-6.ckpt"} <= names | {"2-6.ckpt"}


def test_an_optimiser_of_other_sizes_is_one_line(tmp_path, content):
    """Where the kernels would write beyond its memory."""
    bad = copy.deepcopy(content)
    for state in bad["optimizer_states"][0]["state"].values():
        state |= {"exp_avg": torch.zeros(1), "exp_avg_sq": torch.zeros(1)}
    (tmp_path / "checkpoints").mkdir()
    torch.save(bad, tmp_path / "checkpoints/last.ckpt")
    refused(lambda: train_in(tmp_path, "trainer.max_steps=4"), KEY, "exp_avg")
