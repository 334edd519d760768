"""What the screen says of a config: what is not as it usually is, as words that can be
given again."""

import pytest
from omegaconf import OmegaConf

from cli.differences import differences
from utils import hydra_quoted


def words(config) -> list[str]:
    OmegaConf.resolve(config)
    return differences(config)


def test_the_usual_run_says_what_it_is(compose):
    (line,) = words(compose("trainer.accelerator=auto", tiny=False))
    assert line == "mode=train data=openwebtext model=small algo=duo_base"


def test_what_is_made_of_others_is_no_difference(compose):
    """Of keys that follow others only those that do not do so."""
    lines = words(compose("loader.global_batch_size=8", tiny=False))
    assert lines[1:] == ["loader.global_batch_size=8"]
    lines = words(
        compose("loader.global_batch_size=8", "loader.batch_size=2", tiny=False)
    )
    assert lines[1:] == ["loader.global_batch_size=8 loader.batch_size=2"]


@pytest.mark.parametrize(
    ("override", "word"),
    [
        ("optim.lr=1e-4", "optim.lr=0.0001"),
        ("sampling.prompt='a b, c=d'", f"sampling.prompt={hydra_quoted('a b, c=d')}"),
        ("wandb.tags=[x,y]", "wandb.tags=[x,y]"),
        ("eval.gen_ppl_eval_model_name_or_path=gpt2", None),
        ("training.ema=0", "training.ema=0"),
        ("eval.generate_samples=False", "eval.generate_samples=False"),
    ],
)
def test_words_are_those_of_a_command_line(compose, override, word):
    lines = words(compose(override, tiny=False))
    assert lines[1:] == [word or override]


def test_nothing_that_a_screen_obeys(compose):
    config = compose(tiny=False)
    config.sampling.prompt = "a\x1b[2J\nb"
    lines = words(config)
    assert not any("\x1b" in line or "\n" in line for line in lines)
    assert r"\x1b[2J" in lines[1]
