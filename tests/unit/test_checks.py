"""Keys that take one of several kinds of values; numbers are in `test_main.py`."""

import pytest
from omegaconf import OmegaConf

from checks import FLAGS, check_values
from utils import ConfigError


def refused(config, *parts):
    """In one line that holds all parts."""
    with pytest.raises(ConfigError) as error:
        check_values(config)
    text = str(error.value)
    assert "\n" not in text
    for part in parts:
        assert part in text


@pytest.mark.parametrize("value", [0, -3, "many", "", "7", 1.5, float("inf"), True])
def test_a_chunk_is_auto_null_or_a_whole_number(compose, value):
    config = compose()
    config.training.loss_chunk = value
    choices = "auto, null or a whole number"
    refused(config, f"training.loss_chunk={value!r}", choices)


@pytest.mark.parametrize("override", ["auto", "null", "1", "7", "1000000"])
def test_chunks_that_are_fine(compose, override):
    check_values(compose(f"training.loss_chunk={override}"))


@pytest.mark.parametrize("key", FLAGS)
@pytest.mark.parametrize("value", ["yes", 2, None, "True"])
def test_flags_are_true_or_false(compose, key, value):
    """And each key that is checked exists."""
    config = compose()
    assert OmegaConf.select(config, key, throw_on_missing=True) in (True, False)
    for flag in (True, False):
        OmegaConf.update(config, key, flag)
        check_values(config)
    OmegaConf.update(config, key, value)
    refused(config, f"{key}={value!r}", "True", "False")


@pytest.mark.parametrize("value", ["yes", 2, None, "True"])
def test_the_loss_is_compiled_or_not_or_auto(compose, value):
    config = compose()
    for fine in (True, False, "auto"):
        config.training.loss_compile = fine
        check_values(config)
    config.training.loss_compile = value
    refused(config, f"training.loss_compile={value!r}", "auto", "True", "False")
