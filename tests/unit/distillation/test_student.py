"""A student whose teacher comes from a checkpoint and stays: what an objective has to
say for it beside its loss, and that its runs start and go on with that teacher."""

import lightning
import pytest
import torch
from tiny import compose

import main
from algo import MDLM
from checkpoints.reading import read_checkpoint
from distillation.divergences import kl_forward
from distillation.student import Student
from distillation.teacher import Teacher
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

    def nll(self, x0, weights=None, batch_idx=0):
        if not self.training:
            return super().nll(x0, weights, batch_idx)
        xt = torch.full_like(x0, self.mask_index)
        sigma = torch.ones(len(x0), 1)
        head = self.teacher.head(xt, self.condition(sigma))
        hidden = self.hidden(xt, sigma)
        return self.head_loss(hidden, kl_forward, weights, others=[head])


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
