"""Command lines of MDLM's code: every word, what it means, and contradictions."""

from functools import partial

import pytest
from omegaconf import OmegaConf
from refusals import refused

from checkpoints.mdlm import (
    ALGORITHMS,
    MODELS,
    MOVED,
    NOISES,
    OTHER_NOISES,
    OWN_PARAMETERIZATIONS,
)
from cli.commandline import arguments
from cli.known_keys import known_keys
from cli.mdlm import from_mdlm
from sampling.registry import ALIASES
from utils import CONFIGS

SUBS = "parameterization=subs"
# A word of MDLM's in a command that names its algorithm, and the word here.
WORDS = {
    "backbone=dit": "algo.backbone=dit",
    "backbone=hf_dit": "algo.backbone=hf_dit",
    "backbone=dimamba": "algo.backbone=dimamba",
    "backbone=ar": "algo.backbone=dit",
    "+backbone=dit": "algo.backbone=dit",
    "++T=5": "algo.T=5",
    "T=0": "algo.T=0",
    "time_conditioning=True": "algo.time_conditioning=True",
    "subs_masking=False": "algo.subs_masking=False",
    "noise=loglinear": "noise=log-linear",
    "noise.type=loglinear": "noise.type=log-linear",
    "model=small-ar": "model=small",
    "model=tiny-ar": "model=tiny",
    "sampling.predictor=ddpm": "sampling.predictor=ancestral",
    "sampling.predictor=ddpm_cache": "sampling.predictor=ancestral_cache",
    "sampling.noise_removal=True": "sampling.noise_removal=greedy",
    "sampling.noise_removal=true": "sampling.noise_removal=greedy",
    "sampling.noise_removal=False": "sampling.noise_removal=none",
    "'backbone=dit'": None,
    "model=small": None,
    "noise=cosine": None,
    "sampling.predictor=analytic": None,
    "sampling.noise_removal=greedy": None,
    "sampling.prompt=parameterization=sedd": None,
    "my.backbone=dit": None,
    "backbone": None,
    "~backbone": None,
    "--cfg=job": None,
}


@pytest.mark.parametrize("word", WORDS)
def test_a_word(word, caplog):
    """Of a command that says which algorithm it means; what is translated is said."""
    algo = "algo=ar" if "ar" in word.replace("=", "-").split("-") else "algo=mdlm"
    own = WORDS[word]
    assert from_mdlm([algo, word]) == [algo, own or word]
    said = [] if own is None else [f"{word.lstrip('+')} is MDLM's spelling: {own}"]
    assert caplog.messages == said


def test_the_tables_name_what_is_there():
    known = known_keys()
    assert {f"algo.{key}" for key in MOVED} <= known
    assert not {*MOVED, "parameterization", "diffusion"} & known
    for name in ALGORITHMS.values():
        config = OmegaConf.load(CONFIGS / "algo" / f"{name}.yaml")
        assert config.parameterization == OWN_PARAMETERIZATIONS[name]
    for name in MODELS.values():
        assert (CONFIGS / "model" / f"{name}.yaml").exists()
    for name in {*NOISES.values(), *OTHER_NOISES.values()}:
        assert (CONFIGS / "noise" / f"{name}.yaml").exists()


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["parameterization=subs"], ["algo=mdlm"]),
        (["parameterization=ar"], ["algo=ar"]),
        (["parameterization=sedd"], ["algo=sedd", "algo.time_conditioning=False"]),
        (["parameterization=d3pm"], ["algo=d3pm", "algo.time_conditioning=False"]),
        (
            ["parameterization=sedd", "time_conditioning=True"],
            ["algo=sedd", "algo.time_conditioning=True"],
        ),
        (
            ["parameterization=sedd", "algo.time_conditioning=True"],
            ["algo=sedd", "algo.time_conditioning=True"],
        ),
        (["backbone=hf_dit"], ["algo.backbone=hf_dit", "algo=mdlm"]),
        (["T=4"], ["algo.T=4", "algo=mdlm"]),
        (["diffusion=absorbing_state"], ["algo=mdlm"]),
        (["backbone=ar"], ["algo.backbone=dit", "algo=ar"]),
        (["model=small-ar"], ["model=small", "algo=ar"]),
        (
            ["model=tiny-ar"],
            ["model=tiny", "algo=ar", "model.hidden_size=512"],
        ),
        (
            ["model=tiny", SUBS],
            ["model=tiny", "algo=mdlm", "model.hidden_size=512"],
        ),
        (
            ["model=tiny", "model.hidden_size=32", SUBS],
            ["model=tiny", "model.hidden_size=32", "algo=mdlm"],
        ),
        (["model=tiny", "algo=mdlm"], ["model=tiny", "algo=mdlm"]),
        (["model=tiny"], ["model=tiny"]),
        (
            ["noise=cosine", SUBS],
            ["noise=cosine-mdlm", "algo=mdlm"],
        ),
        (
            ["noise.type=cosine", "T=0"],
            ["noise.type=cosine-mdlm", "algo.T=0", "algo=mdlm"],
        ),
        (
            ["noise=cosine", "algo=mdlm", "T=0"],
            ["noise=cosine", "algo=mdlm", "algo.T=0"],
        ),
        (["noise=cosine"], ["noise=cosine"]),
        (["noise=loglinear", "noise.sigma_max=20"], ["noise=log-linear", "algo=mdlm"]),
        (
            ["noise=linear", "noise.sigma_max=20", SUBS],
            ["noise=linear", "noise.sigma_max=20", "algo=mdlm"],
        ),
        (["experiment=demo", "T=4"], ["experiment=demo", "algo.T=4"]),
        (
            ["parameterization=ar", "sampling.predictor=ddpm_cache"],
            ["algo=ar", "sampling.predictor=ancestral"],
        ),
        (
            ["sampling.predictor=analytic", "model=small-ar"],
            ["sampling.predictor=ancestral", "model=small", "algo=ar"],
        ),
        (
            ["experiment=eval_owt_mdlm", "model=small-ar"],
            ["experiment=eval_owt_mdlm", "model=small", "algo=ar"],
        ),
        (["experiment=demo", SUBS], ["experiment=demo", "algo=mdlm"]),
        (["algo=mdlm", SUBS], ["algo=mdlm"]),
        (["algo=mdlm", "T=3", "algo.T=3"], ["algo=mdlm", "algo.T=3"]),
        (
            ["algo=d3pm", "time_conditioning=false", "algo.time_conditioning=False"],
            ["algo=d3pm", "algo.time_conditioning=False"],
        ),
        (
            ["sampling.predictor=ddpm_cache"],
            ["sampling.predictor=ancestral_cache", "algo=mdlm"],
        ),
    ],
)
def test_what_a_command_means(words, meant):
    assert from_mdlm(words) == meant


@pytest.mark.parametrize("predictor", [None, *ALIASES, "analytic", "psi"])
@pytest.mark.parametrize(("flag", "rest"), [("True", None), ("False", "none")])
def test_noise_removal_depends_on_the_predictor(predictor, flag, rest):
    words = ["algo=mdlm", f"sampling.noise_removal={flag}"]
    words += [f"sampling.predictor={predictor}"] if predictor else []
    name = rest or ("ancestral" if predictor == "analytic" else "greedy")
    assert f"sampling.noise_removal={name}" in from_mdlm(words)


def test_noise_removal_of_an_experiment_is_left_to_its_predictor():
    words = ["experiment=demo_samples", "sampling.noise_removal=True"]
    assert from_mdlm(words) == words


CONTRADICTIONS = [
    (["algo=duo", SUBS], ["algo=duo", SUBS]),
    (["algo=sedd", "parameterization=d3pm"], ["algo=sedd", "=d3pm"]),
    (["T=4", "algo.T=5"], ["T=4", "algo.T=5"]),
    (["backbone=dit", "algo.backbone=unet"], ["backbone=dit", "algo.backbone=unet"]),
    (
        ["time_conditioning=True", "algo.time_conditioning=False"],
        ["time_conditioning=True", "algo.time_conditioning=False"],
    ),
    (["model=small-ar", SUBS], ["model=small-ar", SUBS]),
    (["model=small-ar", "algo=mdlm"], ["model=small-ar", "algo=mdlm"]),
    (["backbone=ar", "parameterization=sedd"], ["backbone=ar", "=sedd"]),
    (["backbone=ar", "algo=duo_base"], ["backbone=ar", "algo=duo_base"]),
    (
        ["parameterization=sedd", "algo.parameterization=mean"],
        ["parameterization=sedd", "algo.parameterization=mean"],
    ),
    (["parameterization=sub"], ["parameterization='sub'", "subs"]),
    (["diffusion=uniform_state"], ["diffusion='uniform_state'", "absorbing_state"]),
]


@pytest.mark.parametrize(("words", "named"), CONTRADICTIONS)
def test_contradictions_are_refused(words, named):
    """In either order, with both words in the line."""
    refused(partial(from_mdlm, words), *named)
    refused(partial(from_mdlm, words[::-1]), *named)


def test_sweeps(caplog):
    """A word may have the values of several jobs."""
    words = ["-m", "parameterization=subs,sedd", "noise=loglinear,linear", "T=0,5"]
    assert arguments(words) == [
        "-m",
        "algo=mdlm,sedd",
        "noise=log-linear,linear",
        "algo.T=0,5",
        "algo.time_conditioning=False",
    ]
    assert len(caplog.messages) == 4


def test_each_spelling_is_said_once(caplog):
    from_mdlm([SUBS, "T=0", "T=0", "noise=loglinear", "diffusion=absorbing_state"])
    assert caplog.messages == [
        "parameterization=subs is MDLM's spelling: algo=mdlm",
        "T=0 is MDLM's spelling: algo.T=0",
        "noise=loglinear is MDLM's spelling: noise=log-linear",
        "diffusion=absorbing_state is MDLM's spelling: nothing here reads it",
    ]


@pytest.mark.parametrize("words", [[SUBS, "T=5"], ["backbone=ar"], ["model=tiny-ar"]])
def test_a_second_pass_changes_nothing(words, caplog):
    """As for the processes of several devices, which get the translated words."""
    once = from_mdlm(words)
    caplog.clear()
    assert from_mdlm(once) == once
    assert caplog.messages == []
