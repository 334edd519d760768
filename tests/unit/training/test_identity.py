"""What makes a run another one, what it may change, and on what processes agree."""

import logging
import os
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from refusals import refused

from checkpoints.checkpoint import Checkpoint
from data.marks import CHANGED, OTHER, SAME, compared, stream_mark, tokenizer_mark
from data.rows import TokenRows
from data.tokenizers import bytes_tokenizer, text8_tokenizer
from training import agreement, identity
from training.agreement import Agreement, disagreement, mark_of
from training.identity import (
    NAME,
    course_of,
    record_of,
    refuse_other_data,
    refuse_other_settings,
    settings_of,
)
from training.resume import Resumed
from utils import ConfigError

MARKS = {"tokenizer": "tokenizer:a", "train": "rows:b", "valid": "rows:c"}
PATH = "/runs/a/checkpoints/last.ckpt"


def written_by(config, marks=MARKS, **changes) -> Resumed:
    """What a run with a config has written at step 7."""
    content = {
        "state_dict": {"w": torch.ones(2)},
        "global_step": 7,
        NAME: record_of(config, marks),
    }
    return Resumed(PATH, Checkpoint.of_lightning(content | changes))


@pytest.fixture
def run(compose):
    return partial(compose, "checkpointing.save_dir=/runs/a")


@pytest.fixture
def said(caplog):
    """Lines of warnings so far."""
    caplog.set_level(logging.INFO)
    return lambda: [record.getMessage() for record in caplog.records]


OTHERS = [
    ("algo=mdlm", "algo.name="),
    ("algo=d3pm", "algo.name="),
    ("algo.T=4", "algo.T=4 here, 0 there"),
    ("algo.loss_type=low_var", "algo.loss_type="),
    ("algo.compat=reference", "algo.compat="),
    ("model.n_heads=4", "model.n_heads=4 here, 2 there"),
    ("model.length=16", "model.length="),
    ("model.hidden_size=64", "model.hidden_size="),
    ("model.n_blocks=1", "model.n_blocks="),
    ("noise=cosine", "noise.type='cosine' here, 'log-linear' there"),
    ("noise.eps=1e-2", "noise.eps="),
    ("training.sampling_eps=1e-2", "training.sampling_eps="),
    (
        "training.change_of_variables=True",
        "training.change_of_variables=True here, False there",
    ),
]


@pytest.mark.parametrize(("change", "part"), OTHERS)
def test_another_run_is_refused(run, change, part):
    resumed = written_by(run())
    config = run(change)
    call = partial(refuse_other_settings, resumed, config)
    ways = ("hydra.run.dir", f"training.finetune_path={PATH}")
    refused(call, PATH, "another run", part, *ways)


def test_the_curriculum_is_of_the_loss(run):
    resumed = written_by(run("algo=duo"))
    config = run("algo=duo", "algo.curriculum.end=7")
    refused(partial(refuse_other_settings, resumed, config), "algo.curriculum.end=7")


def test_a_checkpoint_of_another_folder_is_left_out(run):
    resumed = written_by(run())._replace(path="/elsewhere/last.ckpt")
    config = run("noise=cosine")
    call = partial(refuse_other_settings, resumed, config)
    refused(call, "leave out checkpointing.resume_ckpt_path")


def test_many_differences_are_counted(run):
    resumed = written_by(
        run("model.hidden_size=64", "model.n_blocks=9", "noise.eps=.1")
    )
    config = run("algo=mdlm")
    call = partial(refuse_other_settings, resumed, config)
    refused(call, "another run: algo.name='mdlm' here, 'duo_base' there; ", "more")


CHANGES = [
    ("seed=2", "seed=2 holds, 1 does not"),
    ("trainer.max_steps=9", "trainer.max_steps=9 holds, 1000000 does not"),
    ("optim.beta1=0.5", "optim.beta1=0.5 holds, 0.9 does not"),
    ("training.ema=0.5", "training.ema=0.5 holds"),
    ("training.importance_sampling=True", "training.importance_sampling=True holds"),
    ("model.dropout=0.2", "model.dropout=0.2 holds"),
    ("training.antithetic_sampling=False", "training.antithetic_sampling=False"),
    ("lr_scheduler.num_warmup_steps=3", "lr_scheduler.num_warmup_steps=3 holds"),
    ("trainer.gradient_clip_val=2", "trainer.gradient_clip_val=2 holds"),
    ("algo._target_=my.DUO", "algo._target_='my.DUO' holds"),
]


@pytest.mark.parametrize(("change", "part"), CHANGES)
def test_what_may_change_is_said_in_one_line(run, said, change, part):
    resumed, config = written_by(run()), run(change)
    refuse_other_settings(resumed, config)
    refuse_other_data(resumed, config, MARKS)
    (line,) = said()
    assert part in line
    assert PATH in line


@pytest.mark.parametrize(
    "change",
    [
        *("model.attention=sdpa", "model.name=mine", "algo.backbone=hf_dit"),
        "+model.scan=torch",
        *("loader.num_workers=3", "trainer.log_every_n_steps=7", "optim.lr=1e-5"),
        *("training.finetune_path=/x", "logger=none", "sampling.steps=3", "seed=1"),
    ],
)
def test_what_does_not_count_or_is_said_elsewhere(run, said, change):
    resumed, config = written_by(run()), run(change)
    refuse_other_settings(resumed, config)
    refuse_other_data(resumed, config, MARKS)
    assert said() == []


@pytest.mark.parametrize("name", ["tokenizer", "train"])
def test_other_data_are_refused(run, name):
    resumed, config = written_by(run()), run()
    call = partial(
        refuse_other_data, resumed, config, MARKS | {name: MARKS[name] + "x"}
    )
    part = {"tokenizer": "the tokenizer differs", "train": "training data differ"}
    refused(call, PATH, part[name], "hydra.run.dir", "training.finetune_path")


def test_other_validation_data_are_said(run, said):
    refuse_other_data(written_by(run()), run(), MARKS | {"valid": "rows:x"})
    (line,) = said()
    assert "the validation data differ" in line


@pytest.mark.parametrize("record", [None, {}, "x", {"settings": {}}])
def test_files_without_a_record_are_taken_at_their_word(run, said, record):
    """Older ones, and those of the published code."""
    resumed = written_by(run(), **{NAME: record})
    config = run("algo=mdlm", "seed=2")
    refuse_other_settings(resumed, config)
    refuse_other_data(resumed, config, dict.fromkeys(MARKS, "x"))
    assert said() == []


def test_keys_that_one_version_does_not_know(run):
    resumed, config = written_by(run()), run()
    record = resumed.checkpoint.lightning[NAME]
    del record["settings"]["algo.T"]
    record["settings"]["algo.of_later"] = 3
    refuse_other_settings(resumed, config)


def test_every_key_is_of_one_kind(run):
    config = run("algo=duo")
    settings, course = settings_of(config), course_of(config)
    assert not settings.keys() & course.keys()
    assert {"algo.name", "model.n_heads", "noise.type"} <= settings.keys()
    assert {"seed", "optim.lr", "lr_scheduler._target_"} <= course.keys()
    for key in (*settings, *course):
        OmegaConf.select(config, key, throw_on_missing=True)
    for key in (*identity.OF_NEITHER, *identity.SAID_ELSEWHERE):
        assert key not in settings


# ---------------------------------------------------------------- marks


def test_tokenizers():
    marks = {tokenizer_mark(t()) for t in (bytes_tokenizer, text8_tokenizer)}
    assert len(marks) == 2
    other = bytes_tokenizer()
    assert tokenizer_mark(other) in marks
    other.eos_token = other.bos_token
    assert tokenizer_mark(other) not in marks


@pytest.mark.parametrize("limit", [1 << 26, 8])
def test_rows(monkeypatch, limit):
    monkeypatch.setattr("data.rows.MARKED", limit)
    ids = np.arange(40).reshape(10, 4) % 7
    mark = TokenRows(ids).mark()
    assert TokenRows(ids.astype(np.uint16)).mark() == mark
    changed = ids.copy()
    changed[4, 2] += 1
    padded = TokenRows(ids, np.full(10, 3))
    marks = [TokenRows(x).mark() for x in (changed, ids[:9], ids.reshape(20, 2))]
    assert len({mark, padded.mark(), *marks}) == 5
    assert TokenRows(ids).part(0, 9).mark() == TokenRows(ids[:9]).mark()


def test_no_rows():
    assert TokenRows(np.empty((0, 4), np.int32)).mark()


@pytest.fixture
def files(tmp_path):
    """Two files of a stream, and a function that gives their mark."""
    lines = [f"line {number} of a file" for number in range(30)]
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("\n".join([name, *lines, name]))
    paths = [str(tmp_path / name) for name in ("a.txt", "b.txt")]
    return tmp_path, lambda *about: stream_mark(paths, about)


def test_streams(files):
    folder, mark = files
    before = mark()
    assert compared(before, mark()) == SAME
    assert compared(before, mark("another layout")) == OTHER
    text = (folder / "a.txt").read_text()
    (folder / "a.txt").write_text(text.replace("line 7", "mended"))
    assert compared(before, mark()) == CHANGED
    (folder / "a.txt").write_text(text + " and one more line, longer than the end is")
    assert compared(before, mark()) == CHANGED
    (folder / "a.txt").write_text("completely different " * 90)
    assert compared(before, mark()) == OTHER
    (folder / "a.txt").write_text(text)
    os.utime(folder / "a.txt", (1, 1))
    assert compared(before, mark()) == SAME


def test_streams_by_name(files, tmp_path):
    """In whichever folder; files of a store by their paths."""
    folder, mark = files
    (tmp_path / "moved").mkdir()
    moved = [shutil.copy(folder / x, tmp_path / "moved") for x in ("a.txt", "b.txt")]
    assert stream_mark(moved, []) == mark()
    assert compared(stream_mark(moved[:1], []), mark()) == OTHER
    stored = [stream_mark([f"memory://{x}"], []) for x in ("a", "b")]
    assert compared(*stored) == OTHER


def test_rows_that_were_streamed(files):
    _, mark = files
    assert compared(mark(), TokenRows(np.zeros((2, 4))).mark()) == CHANGED


@pytest.mark.parametrize("text", ["", "rows", "stream", "stream:a", ":::", "x:y:z"])
def test_marks_of_nobody(files, text):
    """A file says what it likes."""
    _, mark = files
    assert compared(text, mark()) in (CHANGED, OTHER)


def test_weights():
    weights = {"a": torch.zeros(3, 4), "b": torch.ones(2)}
    mark = mark_of(weights)
    assert mark_of(dict(reversed(weights.items()))) == mark
    weights["a"] = torch.zeros(4, 3)
    assert mark_of(weights) != mark
    weights["a"] = torch.zeros(3, 4)
    weights["b"][1] = 2
    assert mark_of(weights) != mark
    assert mark_of({}) != mark


# ---------------------------------------------------------------- processes


def of_rank(config, resumed=None, marks=MARKS, problem=None):
    found = Agreement(config)
    found.begin(resumed, marks)
    return problem, found._start, found._weights, found._record


def test_processes_that_agree(run):
    config = run("trainer.num_nodes=2")
    assert disagreement([of_rank(config)] * 3) is None
    assert disagreement([of_rank(config, written_by(config))] * 3) is None
    moved = written_by(config)._replace(path="/another/disk/last.ckpt")
    assert (
        disagreement([of_rank(config, x) for x in (written_by(config), moved)]) is None
    )


def test_processes_that_disagree(run):
    config = run("trainer.num_nodes=2")
    resumed = written_by(config)
    later = written_by(config, global_step=8)
    other_weights = written_by(config, state_dict={"w": torch.zeros(2)})
    first = of_rank(config, resumed)
    cases = {
        "process 0 would go on from step 7 of": of_rank(config),
        f"process 1 from step 8 of {PATH}": of_rank(config, later),
        "what to resume": of_rank(config, other_weights),
        "optim.lr: process 0 has 0.0003, process 1 0.001": of_rank(
            run("trainer.num_nodes=2", "optim.lr=1e-3"), resumed
        ),
        "noise.type": of_rank(run("trainer.num_nodes=2", "noise=cosine"), resumed),
        "the training data": of_rank(config, resumed, MARKS | {"train": "rows:x"}),
        "it is damaged (process 1 of 2)": of_rank(config, problem="it is damaged"),
    }
    for part, other in cases.items():
        line = disagreement([first, other])
        assert part in line
        assert "\n" not in line
        assert "2" in line


@pytest.mark.parametrize("nodes", [1, 2])
def test_a_mistake_waits_for_the_others(run, nodes, monkeypatch):
    monkeypatch.setattr(agreement, "has_others", lambda config: nodes > 1)
    found = Agreement(run())

    def fail():
        with found.collecting():
            raise ConfigError("first")
        with found.collecting():
            raise ConfigError("second")

    if nodes == 1:
        refused(fail, "first")
    else:
        fail()
        assert found._problem == "first"
