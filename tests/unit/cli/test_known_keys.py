"""Keys that nothing reads are refused, and what may be added is not."""

import inspect
import re
from functools import partial

import lightning
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf
from refusals import refused
from tiny import CONFIGS

from cli.checks import check
from cli.commandline import explain
from cli.known_keys import (
    ARGUMENTS,
    TAKEN,
    TRAINER,
    Added,
    added_keys,
    known_keys,
    refuse_arguments,
    refuse_unread,
    unknown_key,
)

EXPERIMENTS = sorted(
    str(path.relative_to(CONFIGS / "experiment").with_suffix(""))
    for path in (CONFIGS / "experiment").rglob("*.yaml")
)
GROUPS = ("algo", "data", "model", "noise", "lr_scheduler", "strategy", "logger")


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiments_hold_known_keys_alone(compose, name):
    assert added_keys(compose(f"experiment={name}", tiny=False)) == []


@pytest.mark.parametrize("group", GROUPS)
def test_every_choice_holds_known_keys_alone(compose, group):
    """Resolved or not; in data sets a missing value stays one."""
    names = (path.stem for path in (CONFIGS / group).glob("[a-z]*.yaml"))
    for choice in names:
        config = compose(f"{group}={choice}", tiny=False)
        assert added_keys(config) == []


def dotted(node, prefix=""):
    """Every dotted key of a config that is no node."""
    for name in node:
        key = f"{prefix}{name}"
        value = None if OmegaConf.is_missing(node, name) else node[name]
        if OmegaConf.is_dict(value) and value:
            yield from dotted(value, f"{key}.")
        else:
            yield key


def test_a_misspelt_key_is_found_wherever_it_is(compose):
    """In groups and nested nodes; and what is said advises no plus."""
    others = ("wandb", "callbacks", "logger", "lr_scheduler", "trainer", "strategy")
    keys = dotted(compose("algo=duo", tiny=False))
    wrong = [f"{key}x" for key in keys if key.split(".")[0] not in (*others, "report")]
    config = compose("algo=duo", *(f"+{key}=1" for key in wrong), tiny=False)
    assert len(wrong) > 80
    assert sorted(added.key for added in added_keys(config)) == sorted(wrong)
    for key in wrong:
        assert key in unknown_key(key)
        assert "+" not in unknown_key(key)
    with pytest.raises(HydraException) as error:  # what is said without a plus
        compose("optim.lrx=1")
    assert explain(error.value) == unknown_key("optim.lrx")


UNREAD = {
    "+lr=1": "optim.lr",
    "++lr=1": "optim.lr",
    "+optim.learning_rate=1": "optim.learning_rate",
    "+sampling.colour=0.1": "sampling.colour",
    "+sampling.psi.colour=0.1": "sampling.psi.colour",
    "+a.b.c=1": "Unknown key a.",
    "+data.path=x": "of another data",
    "+algo.curriculum.start=4": "of another algo",
    "+algo.colour=1": "algo.colour",
    "+model.ch=3": "of another model",
    "+callbacks.mine.x=3": "callbacks.mine",
    "+callbacks.grad_record.num_grads_log=3": "of another callbacks",
    "+logger.mine=3": "logger.mine",
    "+mine=3": "mine",
    "+eval.checkpoint.path=3": "eval.checkpoint",
    "+trainer.strategy=ddp": "strategy=...",
    "+trainer.logger=False": "logger=...",
    "+trainer.overfit_batches=1": "trainer.limit_train_batches",
    "+wandb.save_dir=x": "checkpointing.save_dir",
    "+lr_scheduler.optimizer=x": "optim.KEY",
}


@pytest.mark.parametrize("word", UNREAD)
def test_what_nothing_reads_is_refused(compose, word):
    config = compose("algo=mdlm", "data=openwebtext", word, tiny=False)
    key = word.lstrip("+").split("=")[0]
    refused(partial(check, config), UNREAD[word], key.split(".")[0])


# Arguments that the class does not have.
NO_ARGUMENTS = {
    "+trainer.max_epoch=2": "'max_epochs'",
    "+strategy.colour=1": "DDPStrategy",
    "+lr_scheduler.lr_min=1": "get_constant_schedule_with_warmup",
    "+callbacks.checkpoint_monitor.modes=min": "'mode'",
    "+logger.csv.colour=1": "CSVLogger",
    "+callbacks.mine={_target_: no.such.Thing, x: 1}": "no.such.Thing",
}


@pytest.mark.parametrize("word", NO_ARGUMENTS)
def test_arguments_that_there_are_not_are_refused(compose, word):
    config = compose("algo=mdlm", word)
    key = word.lstrip("+").split("=")[0]
    is_early = key.startswith("trainer.")  # without importing Lightning
    call = refuse_unread if is_early else refuse_arguments
    refused(partial(call, config), key, NO_ARGUMENTS[word])


def test_what_is_known_of_classes_is_what_they_say():
    """By version of Lightning."""
    own = inspect.signature(lightning.Trainer).parameters
    assert set(own) == ARGUMENTS[TRAINER]


FREE = [
    "+trainer.max_epochs=2",
    "+trainer.enable_progress_bar=False",
    "+trainer.deterministic=True",
    "+wandb.notes=a",
    "+report.checkpoints.duo=duo.ckpt",
    "+report.checkpoints={duo: duo.ckpt}",
    "+strategy.gradient_as_bucket_view=True",  # of DistributedDataParallel
    "+strategy.process_group_backend=gloo",
    "+callbacks.stop={_target_: lightning.pytorch.callbacks.Timer, duration: {}}",
    "+callbacks.checkpoint_monitor.save_weights_only=True",
    "+lr_scheduler.last_epoch=-1",
    "+logger.csv.flush_logs_every_n_steps=1",
    "+model.temb_strategy=adaln",  # accepted at its published value
    "++optim.lr=1",
    "++algo.loss_type=elbo",
]


@pytest.mark.parametrize("word", FREE)
def test_what_is_read_may_be_added(compose, word):
    config = compose("algo=mdlm", word)
    refuse_unread(config)
    refuse_arguments(config)


def test_a_class_of_the_users_own_has_keys_of_its_own(compose):
    config = compose("algo=mdlm", "algo._target_=mine.Mine", "+algo.reward=3")
    assert added_keys(config) == []


def test_a_key_of_which_others_are_made_is_read(compose):
    assert added_keys(compose("+my.rate=0.5", "optim.lr=${my.rate}")) == []
    config = compose("+rate=0.5")
    assert added_keys(config) == [Added("", "rate")]
    config.optim.lr = "${eval:${rate}*2}"
    assert added_keys(config) == []


def test_the_hint_never_advises_what_would_be_ignored():
    """A plus only where something takes further arguments."""
    assert "+trainer.max_epochs=" in unknown_key("trainer.max_epochs")
    assert "+report.checkpoints.duo=" in unknown_key("report.checkpoints.duo")
    assert "+callbacks.checkpoint_monitor.every=" in unknown_key(
        "callbacks.checkpoint_monitor.every"
    )
    for key in ("lr", "optim.rate", "algo.reward", "callbacks.mine", "sampling.psi.x"):
        assert "+" not in unknown_key(key)
    assert "'optim.lr'" in unknown_key("lr")


def test_what_is_taken_is_an_argument():
    """Of a class that we build, or a key of ours by another name."""
    assert not TAKEN.keys() & known_keys()


def test_words_of_scripts_and_pages_are_read(compose):
    """Every word with a plus that users are told to write."""
    root = CONFIGS.parent
    files = [root / "README.md", *root.glob("docs/*.md"), *root.glob("scripts/**/*.sh")]
    form = re.compile(r"\+\+?[a-z_]+(?:\.\w+)+=[\w.]+")
    words = {word for file in files for word in form.findall(file.read_text())}
    assert len(words) > 3
    for word in words:
        OverridesParser.create().parse_override(word)
        config = compose(f"++{word.lstrip('+')}")
        refuse_unread(config)
        refuse_arguments(config)
