"""Older spellings of keys: on the command line, in sweeps, and in config files."""

from functools import partial

import pytest
from omegaconf import OmegaConf
from refusals import refused

from cli.commandline import arguments
from cli.known_keys import known_keys
from cli.older_keys import OLDER_KEYS, OLDER_WORDS, refuse_older_keys, translated

OLDER = "algo.gamma_min"
NEWER = "algo.curriculum.gamma_min"


@pytest.mark.parametrize("older", OLDER_KEYS)
@pytest.mark.parametrize("prefix", ["", "+", "++"])
@pytest.mark.parametrize("algo", ["duo", "distillation"])
def test_every_older_key_sets_the_newer_one(compose, caplog, older, prefix, algo):
    """Which is in the configs, and the older one is not; it is said once."""
    words = arguments([f"algo={algo}", f"{prefix}{older}=0.5", f"{older}=0.25"])
    config = compose(*words)
    value = OmegaConf.select(config, OLDER_KEYS[older])
    assert float(value) == 0.25  # a path is text
    assert OmegaConf.select(config, older) is None
    (said,) = caplog.messages
    assert said == f"{older} is an older spelling of {OLDER_KEYS[older]}"


def test_no_config_has_an_older_key():
    known = known_keys()
    names = {key.removeprefix("algo.") for key in OLDER_KEYS}
    assert (
        not {
            f"algo.{algo}.{name}" for algo in ("duo", "distillation") for name in names
        }
        & known
    )
    assert OLDER_KEYS.keys().isdisjoint(known)


def test_the_newer_spelling_wins(caplog):
    """Whatever stands first, and whatever its prefix."""
    older, newer = f"{OLDER}=-3", f"{NEWER}=-1"
    assert translated([older, newer]) == translated([newer, older]) == [newer]
    assert translated([older, f"++{newer}"]) == [f"++{newer}"]
    assert all("wins" in line for line in caplog.messages)


@pytest.mark.parametrize("word", ["+wandb.offline=False", "++wandb.offline=False"])
@pytest.mark.parametrize("base", ["experiment=eval_owt_duo", "algo=mdlm"])
def test_a_key_of_wandb_may_be_there_already(compose, word, base):
    """As in every experiment of an evaluation."""
    config = compose(base, *arguments([word, "+wandb.notes=a"]), tiny=False)
    assert (config.wandb.offline, config.wandb.notes) == (False, "a")


def test_sweeps_and_odd_values():
    words = ["seed=1", f"{OLDER}=-3,-2", "-m"]
    assert arguments(words) == ["-m", "seed=1", f"{NEWER}=-3,-2"]
    path = "algo.integral_cache_path='a=b, c.npz'"
    assert translated([path]) == [path.replace("algo.", "algo.curriculum.")]


@pytest.mark.parametrize(
    "word",
    [
        "--cfg=job",
        OLDER,
        f"{NEWER}=-1",
        "my.algo.gamma_min=3",
        "algo.gamma_minimum=3",
        "report.overrides=['algo.gamma_min=3']",
        "sampling.prompt=algo.gamma_min=3",
    ],
)
def test_other_words_stay(word, caplog):
    assert translated([word]) == [word]
    assert caplog.messages == []


def test_a_second_pass_changes_nothing(caplog):
    """As for the processes of several devices, which get the translated words."""
    once = translated([f"+{OLDER}=-3"])
    caplog.clear()
    assert translated(once) == once
    assert caplog.messages == []


def test_older_words(compose):
    assert OLDER_WORDS
    for older, newer in OLDER_WORDS.items():
        assert arguments([older]) == [newer]
        compose(newer)


def test_an_older_key_in_a_config_file_is_refused(compose):
    """With the newer one; an algorithm without curriculum may use the name."""
    config = compose("algo=duo", f"+{OLDER}=-3")
    refused(partial(refuse_older_keys, config), OLDER, NEWER)
    refuse_older_keys(compose("algo=mdlm", f"+{OLDER}=-3"))
    refuse_older_keys(compose("algo=distillation"))
