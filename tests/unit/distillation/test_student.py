"""A student whose teacher comes from a checkpoint and stays: what an objective has to
say for it beside its loss, and that its runs start and go on with that teacher."""

import dataclasses

import lightning
import pytest
import torch
from omegaconf import OmegaConf
from refusals import refused
from tiny import StubTokenizer, compose

import main
from algo import MDLM
from checkpoints.checkpoint import Checkpoint
from checkpoints.reading import read_checkpoint
from data.marks import tokenizer_mark
from distillation.divergences import kl_forward
from distillation.student import Student
from distillation.teacher import Teacher
from models.head import Loss
from utils import ConfigError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
KEY = "eval.checkpoint_path"  # of the teacher
OVERRIDES = (
    "algo=mdlm",
    "data.num_train=32",
    "data.num_valid=4",
    "model.n_blocks=1",
    "model.hidden_size=8",
    "optim.lr=1e-2",
    "trainer.val_check_interval=50",
    "trainer.num_sanity_val_steps=0",
    "eval.generate_samples=False",
    "+trainer.enable_progress_bar=False",
    "+trainer.enable_model_summary=False",
)


class OneRound:
    """The whole run."""

    def number(self, step: int) -> int:
        return 0

    def start(self, number: int) -> int:
        return 0


class FixedTeacher(Student, MDLM):
    """What it believes of a sequence of masks is drawn to what its teacher believes."""

    def __init__(self, config, tokenizer):
        super().__init__(config, tokenizer)
        self.rounds = OneRound()
        self.teacher = Teacher(self.backbone, config)

    def renew_teacher(self, number):
        path = self.config.eval.checkpoint_path
        checkpoint = read_checkpoint(path, KEY)
        self.teacher.take_checkpoint(checkpoint, number, f"{KEY}={path!r}")

    restore_teacher = renew_teacher

    def distillation_loss(self, batch, batch_idx):
        x0, valid_tokens = batch["input_ids"], batch["attention_mask"]
        xt = torch.full_like(x0, self.mask_index)
        sigma = torch.ones(len(x0), 1)
        head = self.teacher.head(xt, self.condition(sigma))
        hidden = self.hidden(xt, sigma)
        weights = Loss.weights(valid_tokens)
        nll = self.head_loss(hidden, kl_forward, weights, others=[head])
        return Loss.reduce(nll, valid_tokens)


def train(folder, monkeypatch, *overrides: str) -> dict:
    """Trains in a folder, from where it was, if it was: its last checkpoint."""
    folder.mkdir(exist_ok=True)
    monkeypatch.chdir(folder)
    config = compose(*OVERRIDES, *overrides, f"checkpointing.save_dir={folder}")
    lightning.seed_everything(config.seed, verbose=False)
    main.train(config)
    return torch.load(folder / "checkpoints/last.ckpt", weights_only=True)


@pytest.fixture
def teacher(tmp_path, monkeypatch) -> str:
    """A checkpoint of a few updates."""
    train(tmp_path / "teacher", monkeypatch, "trainer.max_steps=4")
    return f"{tmp_path}/teacher/checkpoints/last.ckpt"


@pytest.fixture
def distil(tmp_path, monkeypatch, teacher):
    """distil(name of a folder, number of updates): the last checkpoint.

    The student is another model than the teacher at first.
    """
    train(tmp_path / "parent", monkeypatch, "trainer.max_steps=2")
    own = [f"algo._target_={__name__}.FixedTeacher", f"{KEY}={teacher}"]
    own += [f"training.finetune_path={tmp_path}/parent/checkpoints/last.ckpt"]

    def go(name: str, max_steps: int) -> dict:
        steps = f"trainer.max_steps={max_steps}"
        return train(tmp_path / name, monkeypatch, *own, steps)

    return go


def test_it_has_the_same_teacher_all_along(distil, tmp_path):
    """A run that is stopped is the one that is not, and writes no file of a round."""
    whole = distil("whole", 6)
    distil("stopped", 3)
    stopped = distil("stopped", 6)
    assert whole["teacher"] == stopped["teacher"]
    assert whole["teacher"]["round"] == 0
    parent = f"{tmp_path}/parent/checkpoints/last.ckpt"
    before = read_checkpoint(parent, KEY).weights
    for name, value in whole["state_dict"].items():
        assert torch.equal(value, stopped["state_dict"][name])
    assert any(not torch.equal(whole["state_dict"][k], x) for k, x in before.items())
    assert not list(tmp_path.glob("*/checkpoints/round_*"))


def test_another_teacher_is_refused_where_a_run_goes_on(distil, teacher):
    """The file has changed since."""
    distil("run", 3)
    content = torch.load(teacher, weights_only=True)
    content["state_dict"]["backbone.output_layer.linear.bias"] += 1
    torch.save(content, teacher)
    with pytest.raises(ConfigError, match="is not the teacher of the run"):
        distil("run", 6)


# ---------------------------------------------------------------- which teachers fit


def saying(model, **said) -> Checkpoint:
    """A checkpoint with the model's weights, whose config says something else."""
    config = OmegaConf.to_container(model.config, resolve=True)
    config = OmegaConf.create(config)
    for key, value in said.items():
        OmegaConf.update(config, key.replace("__", "."), value)
    weights = {f"backbone.{k}": x for k, x in model.backbone.state_dict().items()}
    return Checkpoint(weights=weights, config=OmegaConf.to_container(config))


OTHER_KINDS = {
    "algo=mdlm": {"algo__name": "mdlm"},
    "algo=ar": {"algo__name": "ar"},
    "algo.time_conditioning=False, the student has True": {
        "algo__time_conditioning": False
    },
    "data.tokenizer_name_or_path=a/bert, the student has synthetic": {
        "data__tokenizer_name_or_path": "a/bert"
    },
}


@pytest.mark.parametrize("said", OTHER_KINDS)
def test_a_teacher_of_another_kind_is_refused(make_model, said):
    """Although its weights would fit; where it is only evaluated they are taken."""
    model = make_model("algo=distillation", "training.finetune_path=a.ckpt")
    checkpoint = saying(model, **OTHER_KINDS[said])
    check = lambda: model.load_weights(checkpoint, "training.finetune_path")  # noqa: E731
    refused(check, "training.finetune_path='a.ckpt' cannot be the teacher of", said)
    model.config.mode = "sample_eval"
    check()


@pytest.mark.parametrize(
    "said",
    [
        {},
        {"algo__name": "duo"},
        {"algo__name": "one_of_my_own"},
        {"data__tokenizer_name_or_path": "/elsewhere/synthetic"},
    ],
)
def test_a_teacher_of_the_same_kind_is_taken(make_model, said):
    model = make_model("algo=distillation", "training.finetune_path=a.ckpt")
    model.load_weights(saying(model, **said), "training.finetune_path")


def test_the_tokenizer_that_a_checkpoint_has_recorded_decides(make_model):
    """Not its name."""
    model = make_model("algo=distillation", "training.finetune_path=a.ckpt")
    model.tokenizer.get_vocab = lambda: {"a": 0}
    for vocabulary, is_refused in (({"a": 0}, False), ({"b": 0}, True)):
        other = StubTokenizer()
        other.get_vocab = lambda vocabulary=vocabulary: vocabulary
        found = saying(model, data__tokenizer_name_or_path="/elsewhere/other")
        record = {"identity": {"data": {"tokenizer": tokenizer_mark(other)}}}
        found = dataclasses.replace(found, lightning=record)
        if is_refused:
            load = lambda x=found: model.load_weights(x, "training.finetune_path")  # noqa: E731
            refused(load, "cannot be the teacher", "data.tokenizer_name_or_path=")
        else:
            model.load_weights(found, "training.finetune_path")
