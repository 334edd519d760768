"""A teacher without its distillation: where its weights come from and are kept."""

import shutil

import pytest
import torch
from refusals import refused

from checkpoints.checkpoint import Checkpoint
from distillation.teacher import Teacher, weights_digest

WHERE = "training.finetune_path='a.ckpt'"


@pytest.fixture
def student(make_model):
    """A model of any algorithm; a teacher asks for its network alone."""
    return make_model("algo=mdlm")


@pytest.fixture
def make_teacher(student, tmp_path):
    """make_teacher(use_ema, resume_ckpt_path), of a run in tmp_path/run."""

    def make(use_ema=False, resume=""):
        checkpointing = student.config.checkpointing
        checkpointing.save_dir = f"{tmp_path}/run"
        checkpointing.resume_ckpt_path = resume or f"{tmp_path}/run/checkpoints/a.ckpt"
        return Teacher(student.backbone, student.config, use_ema=use_ema)

    return make


def scaled(student, factor: float) -> dict:
    """A state dict of the student's network, with other weights."""
    state = student.backbone.state_dict()
    return {name: factor * value for name, value in state.items()}


def checkpoint_of(student, factor: float, ema_factor: float | None = None):
    """A checkpoint with the student's weights times a factor, and EMA ones times
    another."""
    weights = {f"backbone.{k}": x for k, x in scaled(student, factor).items()}
    ema = None
    if ema_factor is not None:
        shadow = [ema_factor * p.detach() for p in student.backbone.parameters()]
        ema = {"decay": 0.5, "num_updates": 1, "shadow_params": shadow}
    return Checkpoint(weights=weights, ema=ema)


def head_weight(teacher: Teacher) -> torch.Tensor:
    return teacher.network.output_embedding.weight


class Writer:
    """A trainer that only writes checkpoints of a model."""

    def __init__(self, model) -> None:
        self.model = model

    def save_checkpoint(self, path: str, weights_only: bool) -> None:
        assert weights_only
        content = {"state_dict": self.model.state_dict(), "global_step": 0}
        torch.save(content, path)


def test_it_has_weights_once_it_takes_some(student, make_teacher):
    teacher = make_teacher()
    assert not teacher.is_there
    assert teacher.state() == {"round": None, "sha256": ""}
    with pytest.raises(RuntimeError, match="no weights yet"):
        teacher.network  # noqa: B018
    weights = scaled(student, 2)
    teacher.take(weights, 3)
    assert teacher.is_there
    assert teacher.state() == {"round": 3, "sha256": weights_digest(teacher.network)}
    for name, value in teacher.network.state_dict().items():
        assert torch.equal(value, weights[name])


def test_it_is_not_trained_and_not_seen(student, make_teacher):
    """By anything that asks the student's module for its weights."""
    names, size = student.state_dict().keys(), len(list(student.parameters()))
    student.teacher = make_teacher()
    student.teacher.take(scaled(student, 2), 0)
    assert student.state_dict().keys() == names
    assert len(list(student.parameters())) == size
    assert not student.teacher.network.training
    assert not any(p.requires_grad for p in student.teacher.network.parameters())
    ids = torch.zeros(2, student.num_tokens, dtype=torch.long)
    head = student.teacher.head(ids, torch.ones(2))
    assert not head.hidden.requires_grad


def test_later_weights_take_the_place_of_earlier_ones(student, make_teacher):
    """In the same network, of which the student's own is no part."""
    teacher = make_teacher()
    teacher.take(scaled(student, 2), 0)
    network, before = teacher.network, teacher.state()["sha256"]
    teacher.take(scaled(student, 3), 1)
    assert teacher.network is network
    assert teacher.network is not student.backbone
    assert teacher.state()["sha256"] != before
    with torch.no_grad():
        student.backbone.output_embedding.weight.zero_()
    assert head_weight(teacher).any()


def test_it_moves_along(student, make_teacher):
    teacher = make_teacher()
    teacher.move(lambda x: x.double())  # nothing is there yet
    teacher.take(scaled(student, 2), 0)
    teacher.move(lambda x: x.double())
    assert head_weight(teacher).dtype == torch.float64


@pytest.mark.parametrize("is_wide", [True, False])
def test_it_computes_in_float32_or_as_the_run(student, is_wide):
    teacher = Teacher(student.backbone, student.config, is_wide=is_wide)
    teacher.take(scaled(student, 2), 0)
    ids = torch.arange(2 * student.num_tokens).view(2, -1) % 7
    wide = teacher.head(ids, torch.ones(2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = teacher.head(ids, torch.ones(2))
        student_hidden = teacher.network.trunk(ids, torch.ones(2))
    same = wide.hidden if is_wide else student_hidden
    assert torch.equal(found.hidden, same)
    assert not torch.equal(wide.hidden, student_hidden)
    assert found.weight.dtype == torch.float32


@pytest.mark.parametrize("is_compiled", [False, True])
def test_it_is_compiled_as_the_student_is(student, make_teacher, is_compiled):
    """Every block, each time a new network is made."""
    student.config.training.compile = is_compiled
    teacher = make_teacher()
    teacher.take(scaled(student, 2), 0)
    for block in teacher.network.blocks:
        assert (block._compiled_call_impl is not None) == is_compiled


def test_averages_of_weights_with_two_names(student, make_model, make_teacher):
    """Those of a network whose parts share some stand under both."""
    student.backbone = make_model(
        "algo=mdlm", "algo.backbone=dimamba", "model=tiny-dimamba"
    ).backbone
    teacher = make_teacher(use_ema=True)
    teacher.take_checkpoint(checkpoint_of(student, 2, 3), 0, WHERE)
    for name, expected in scaled(student, 3).items():
        assert torch.equal(teacher.network.state_dict()[name], expected), name


@pytest.mark.parametrize(("use_ema", "factor"), [(False, 2), (True, 3)])
def test_weights_of_a_checkpoint(student, make_teacher, use_ema, factor):
    """Whichever run has written it: one teacher for a whole run comes from there."""
    teacher = make_teacher(use_ema)
    teacher.take_checkpoint(checkpoint_of(student, 2, 3), 0, WHERE)
    weight = student.backbone.output_embedding.weight
    assert torch.equal(head_weight(teacher), factor * weight)


def test_a_checkpoint_without_ema_weights_is_refused(student, make_teacher):
    checkpoint = checkpoint_of(student, 2)
    teacher = make_teacher(use_ema=True)
    refused(lambda: teacher.take_checkpoint(checkpoint, 0, WHERE), WHERE, "no EMA")
    assert not teacher.is_there


def test_a_checkpoint_of_another_network_is_refused(make_model, make_teacher):
    checkpoint = checkpoint_of(make_model("algo=mdlm", "model.n_blocks=3"), 2)
    teacher = make_teacher()
    refused(
        lambda: teacher.take_checkpoint(checkpoint, 0, WHERE),
        WHERE,
        "does not fit",
        "unexpected",
    )
    refused(lambda: teacher.take_checkpoint(Checkpoint(), 0, WHERE), "missing")
    assert not teacher.is_there


# ---------------------------------------------------------------- files of rounds


@pytest.fixture
def stopped(student, make_teacher, tmp_path):
    """A run that was stopped in round 2: what its checkpoint says of the teacher."""
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    teacher = make_teacher()
    teacher.take(student.backbone.state_dict(), 2)
    teacher.write(Writer(student))
    return teacher.state()


def test_a_run_goes_on_with_its_teacher(student, make_teacher, stopped, tmp_path):
    teacher = make_teacher()
    assert teacher.path(2) == f"{tmp_path}/run/checkpoints/round_2.ckpt"
    teacher.expect(stopped)
    teacher.restore(2)
    assert teacher.state() == stopped
    weight = student.backbone.output_embedding.weight
    assert torch.equal(head_weight(teacher), weight)


def test_it_is_read_once(make_teacher, stopped):
    teacher = make_teacher()
    teacher.restore(2)
    shutil.rmtree(teacher.path(2).removesuffix("/round_2.ckpt"))
    teacher.restore(2)
    assert teacher.state() == stopped


def test_a_run_in_another_folder_takes_the_file_along(make_teacher, stopped, tmp_path):
    """The one beside the checkpoint that is resumed."""
    (tmp_path / "run").rename(tmp_path / "old")
    teacher = make_teacher(resume=f"{tmp_path}/old/checkpoints/last.ckpt")
    teacher.expect(stopped)
    teacher.restore(2)
    files = [tmp_path / name / "checkpoints/round_2.ckpt" for name in ("old", "run")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_file_that_is_missing_is_named(make_teacher, stopped):
    teacher = make_teacher()
    refused(
        lambda: teacher.restore(1),
        "checkpointing.resume_ckpt_path",
        "teacher of round 1",
        teacher.path(1),
    )


def test_another_teacher_in_its_place_is_refused(student, make_teacher, stopped):
    """Also where it does not come from a file of a round."""
    teacher = make_teacher()
    teacher.expect(stopped | {"sha256": "00"})
    refused(lambda: teacher.restore(2), "round_2.ckpt is not the teacher")
    assert teacher.round is None  # so that the round gets one if it begins again
    teacher = make_teacher()
    teacher.expect(stopped)
    checkpoint = checkpoint_of(student, 2)
    refused(
        lambda: teacher.take_checkpoint(checkpoint, 2, WHERE), f"{WHERE} is not the"
    )


def test_a_checkpoint_that_says_nothing_of_it_expects_nothing(make_teacher, stopped):
    teacher = make_teacher()
    teacher.expect({})
    teacher.restore(2)
    assert teacher.state() == stopped
