"""Every key takes values of its kind, and any other ends in one line."""

import random
from functools import partial

import hydra
import pytest
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from refusals import refused

import main
from cli.checks import check
from cli.commandline import arguments, no_choice, quoted
from cli.known_keys import ARGUMENTS, TRAINER
from cli.settle import check_devices, prepare, settle
from cli.values import (
    CHOICES,
    FLAGS,
    NULLABLE,
    NUMBERS,
    PARTS,
    SEVERAL,
    SEVERAL_OR_NULL,
    TEXTS,
    TEXTS_OR_NULL,
    check_kinds,
    check_numbers,
    check_parts,
    check_values,
)
from training.processes import check_tasks
from utils import ConfigError

# What has to be chosen for every key to be there.
VARIANTS = {
    "duo": ("algo=duo",),
    "distillation": ("algo=distillation",),
    "through time": ("algo=sdtt",),
    "one step": ("algo=dimo",),
    "mamba": ("algo=mdlm", "algo.backbone=dimamba", "model=tiny-dimamba"),
    "files": ("data=text_files",),
    "ends of the noise": ("noise=linear",),
    "cosine": ("lr_scheduler=cosine_decay_warmup",),
    "halving": ("lr_scheduler=step_scheduler",),
    "gradients": ("callbacks=[grad_record]",),
    "loggers": ("logger=[csv,tensorboard,wandb]",),
    "curriculum off": ("algo=mdlm", "data=openwebtext"),
    "images": ("data=cifar10", "model=unet", "algo.backbone=unet"),
    "shards": ("strategy=fsdp",),
}
MODES = ("train", "ppl_eval", "sample_eval", "export", "inspect", "prepare_data")


def composed(compose, words):
    """Without the tiny sizes of a transformer where there is none."""
    return compose(*words, tiny="model=unet" not in words)


def with_key(compose, key: str):
    """A config that has the key."""
    for words in VARIANTS.values():
        config = composed(compose, words)
        try:
            if OmegaConf.select(config, key, throw_on_missing=True) is not None:
                return config
        except OmegaConfBaseException:
            continue
    return compose(f"++{key}=null") if key.startswith("trainer.") else compose()


def leaves(node, prefix: str = "") -> list[str]:
    names = []
    for name in node:
        key = f"{prefix}{name}"
        child = None if OmegaConf.is_missing(node, name) else node[name]
        is_node = OmegaConf.is_dict(child) and len(child)
        names += leaves(child, f"{key}.") if is_node else [key]
    return names


# ---------------------------------------------------------------- tables

# Keys whose values others check, when and where they are used.
ELSEWHERE = {
    "wandb": "what wandb.init takes",
    "hydra": "Hydra's own",
    "logger.wandb": "Hydra's",
    "report.checkpoints": "report.mode says what is no path",
    "training.loss_chunk": "check_loss_chunk",
    "training.time_range": "check_time_range",
    "algo.block_size": "check_blocks",
    "training.nonfinite": "its own check",
    "sampling.labels": "check_labels",
    "algo.curriculum.gamma": "a number or auto: DUO's own check",
    "callbacks": "the class that is built, which raises",
    "strategy.timeout._target_": "Hydra's",
    "lr_scheduler.lr_lambda._target_": "Hydra's",
    "prior": "only one value",
    "data.insert_train_spacial": "only one value",
    "model.ch_mult": "check_unet",
    "model.data_min_max": "only one value",
    "model.input_channels": "only one value",
    "model.output_channels": "only one value",
    "model.time_conditioning": "only one value",
    "model.scale_by_sigma": "only one value",
    "model.temb_strategy": "only one value",
    "model.tie_word_embeddings": "only one value",
    "model.vocab_lookup": "only one value",
    "algo.posterior_loss_weight": "only one value",
    "logger.csv._target_": "Hydra's",
    "logger.tensorboard._target_": "Hydra's",
}


def test_every_key_has_a_kind(compose):
    tables = (NUMBERS, PARTS, CHOICES, TEXTS, TEXTS_OR_NULL, SEVERAL, SEVERAL_OR_NULL)
    known = {key for table in tables for key in table}
    keys = {
        key for words in VARIANTS.values() for key in leaves(composed(compose, words))
    }
    missing = {x for x in keys - known if not x.startswith(tuple(ELSEWHERE))}
    assert missing == set()
    of_lightning = {f"trainer.{name}" for name in ARGUMENTS[TRAINER]}
    missing = known - keys - of_lightning
    assert {x for x in missing if not x.startswith("data.")} == set()


@pytest.mark.parametrize("key", sorted(NUMBERS))
def test_numbers_are_numbers_in_their_range(compose, key):
    config = with_key(compose, key)
    kind, low, high = NUMBERS[key]
    wrong = ["ten", True, float("nan"), float("inf"), low - 1, high * 2 + 1]
    wrong += [low + 0.5] if kind is int else []
    wrong += [] if key in NULLABLE else [None]
    for value in wrong:
        OmegaConf.update(config, key, value)
        refused(partial(check_numbers, config), f"{key}={value!r}", f"at least {low}")
    for value in [low, high, *([None] if key in NULLABLE else [])]:
        OmegaConf.update(config, key, value)
        check_numbers(config)


@pytest.mark.parametrize("key", FLAGS)
@pytest.mark.parametrize("value", ["yes", 2, None, "True"])
def test_flags_are_true_or_false(compose, key, value):
    config = with_key(compose, key)
    for flag in (True, False):
        OmegaConf.update(config, key, flag)
        check_values(config)
    OmegaConf.update(config, key, value)
    refused(partial(check_values, config), f"{key}={value!r}", "True", "False")


@pytest.mark.parametrize("key", sorted({*TEXTS, *TEXTS_OR_NULL}))
def test_texts_are_texts(compose, key):
    config = with_key(compose, key)
    for value in (3, 2.5, True, [], ["a"]):
        OmegaConf.update(config, key, value, force_add=True)
        refused(partial(check_kinds, config), key, "is no text")
    OmegaConf.update(config, key, None, force_add=True)
    if key in TEXTS:
        refused(partial(check_kinds, config), f"{key}=None")
    else:
        check_kinds(config)


def test_nodes_are_no_values(compose):
    for key in (
        "optim",
        "sampling",
        "sampling.psi",
        "eval",
        "algo.curriculum",
        "wandb",
    ):
        for value in (None, 3, "x", [1]):
            config = compose("algo=duo")
            OmegaConf.update(config, key, value, merge=False)
            if key != "wandb":
                refused(partial(check_kinds, config), key, "group of keys")


def test_seeds_end_where_numpys_do(compose):
    check_values(compose(f"seed={2**32 - 1}"))
    for seed in (2**32, 20261130013000, -1):
        refused(partial(check_values, compose(f"seed={seed}")), f"seed={seed}")


@pytest.mark.parametrize("value", [0, -1, 0.0, 1.5, True, None, "5", float("nan")])
def test_intervals_are_counts_or_parts(compose, value):
    config = compose()
    config.trainer.val_check_interval = value
    refused(partial(check_parts, config), f"val_check_interval={value!r}", "at least 1")


def test_validations_by_epoch_or_by_update(compose):
    config = compose("trainer.val_check_interval=0.5")
    refused(partial(check_parts, config), "check_val_every_n_epoch=1")
    for every in ("1.0", "0.25", "6"):
        words = (
            "trainer.check_val_every_n_epoch=2",
            f"trainer.val_check_interval={every}",
        )
        check_parts(compose(*words))


def test_precisions_of_a_cpu(compose):
    for name in ("bf16-true", "16", "16-mixed"):
        config = compose("trainer.accelerator=cpu", f"trainer.precision={name}")
        refused(partial(check_devices, config), f"precision='{name}'", "CUDA")
    for name in ("32", "bf16", "bf16-mixed"):
        check_devices(compose("trainer.accelerator=cpu", f"trainer.precision={name}"))
    config = compose()
    config.trainer.precision = "bf17"
    refused(partial(check_values, config), "trainer.precision='bf17'", "bf16")


def test_tasks_of_a_slurm_job():
    refused(lambda: check_tasks({"SLURM_NTASKS": "2"}), "SLURM_NTASKS=2", "per-node")
    for fine in (
        {},
        {"SLURM_NTASKS": "1"},
        {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2"},
        {"SLURM_NTASKS": "2", "SLURM_JOB_NAME": "bash"},
    ):
        check_tasks(fine)


# ---------------------------------------------------------------- the command line


@pytest.mark.parametrize("group", ["data", "model", "algo", "noise", "strategy"])
def test_a_group_of_nothing_is_one_line(compose, group):
    for value in ("null", "3"):
        with pytest.raises(ValueError, match="group override") as error:
            compose(f"{group}={value}", tiny=False)
        line = no_choice(["seed=1", f"{group}={value}"], error.value)
        assert f"Unknown {group}={value!r}" in line
        assert "Choose from" in line
    empty = compose(f"{group}=[]", tiny=False)
    refused(partial(check_kinds, empty), group, "choose")


def test_no_callbacks_are_none():
    assert arguments(["callbacks=null"]) == ["callbacks=[]"]
    assert no_choice(["a=b"], ValueError("something else")) == ""


PATHS = [
    "eval.checkpoint_path",
    "+report.checkpoints.duo",
    "hydra.run.dir",
    "data.path",
    "checkpointing.save_dir",
    "callbacks.checkpoint_monitor.dirpath",
]


@pytest.mark.parametrize("key", PATHS)
@pytest.mark.parametrize(
    "path", ["epoch=3-step=400.ckpt", "a b,c.ckpt", "a(1).ckpt", "12", "{x}.pt", "1e3"]
)
def test_paths_survive_the_command_line(key, path):
    parser = hydra.core.override_parser.overrides_parser.OverridesParser.create()
    word = quoted(f"{key}={path}")
    assert parser.parse_override(word).value() == path
    assert quoted(word) == word


def test_paths_of_a_sweep_and_lists_stay():
    parser = hydra.core.override_parser.overrides_parser.OverridesParser.create()
    for values in (["a.txt", "b.txt"], ["x=1.ckpt", "y=2.ckpt"]):
        flag, word = arguments(["-m", f"data.path={','.join(values)}"])
        found = parser.parse_override(word).sweep_iterator()
        assert flag == "-m"
        assert [getattr(x, "text", x) for x in found] == values
    for word in ("data.path=[a.txt,b.txt]", "data.path=null", "data.path=${x}/a"):
        assert quoted(word) == word


# ---------------------------------------------------------------- every key


def outcome(words: list[str], key: str, value: object, compose) -> str:
    """What a run's preparation says of a value: the error's line, or nothing.

    Anything but a mistake that is named, which main.py makes one line of, is raised.
    """
    config = composed(compose, words)
    OmegaConf.update(config, key, value, merge=False, force_add=True)
    try:
        main.choose(main.MODES, config.mode, "mode")
        check(config)
        settle(config)
        if config.mode in ("train", "ppl_eval", "sample_eval", "prepare_data"):
            prepare(config)
    except (ConfigError, OmegaConfBaseException) as error:
        return str(error)
    return ""


VALUES = (None, 0, -1, 2**70, 0.5, -1e30, 1e30, float("nan"), True, "", "x", "a=b,[c")
VALUES += ([], ["x"], {"x": 1})


@pytest.fixture
def quiet(monkeypatch, tmp_path):
    """No config is printed; a checkpoint is there."""
    monkeypatch.setattr("cli.settle.report_config", lambda *_: None)
    monkeypatch.setattr("data.tokenizers.hub_answers", lambda: False, raising=False)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("abc\n" * 10)
    (tmp_path / "last.ckpt").touch()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    "count", [4, pytest.param(None, marks=pytest.mark.slow)], ids=["some", "all"]
)
def test_any_value_of_any_key_is_right_or_one_line(
    compose, quiet, mode, variant, count
):
    words = [*VARIANTS[variant], f"mode={mode}"]
    words += ["eval.checkpoint_path=last.ckpt"] * (mode != "train")
    if variant == "files":
        words += ["data.path=a.txt", "data.tokenizer_name_or_path=bytes"]
    cases = [(key, x) for key in leaves(composed(compose, words)) for x in VALUES]
    nodes = ("optim", "model", "algo", "data", "callbacks", "logger", "sampling.psi")
    cases += [(key, x) for key in nodes for x in (None, 3, "x", [], {})]
    cases = random.Random(f"{mode} {variant}").sample(cases, count or len(cases))
    for key, value in cases:
        try:
            outcome(words, key, value, compose)
        except Exception as error:
            raise AssertionError(f"{key}={value!r}") from error
