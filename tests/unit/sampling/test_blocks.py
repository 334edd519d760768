"""Settings of samplers that write block by block, and how their samples are kept."""

import pytest
import torch
from refusals import refused
from tiny import compose, tiny_model

from cli.settle import algorithm_class
from cli.values import check_values
from sampling.reverse_process import Samples
from utils import ConfigError

BLOCKS = ("algo=mdlm", "algo.block_size=2")


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        ((*BLOCKS, "sampling.semi_ar=True"), ("semi_ar=True", "num_blocks")),
        (
            (*BLOCKS, "sampling.noise_removal=none"),
            ("sampling.noise_removal='none'", "ancestral", "greedy"),
        ),
        (
            ("algo=mdlm", "algo.block_size=8", "sampling.num_blocks=2"),
            ("sampling.num_blocks=2", "model.length=8", "null", "1"),
        ),
        *(
            (
                (f"algo={name}", f"sampling.{setting}"),
                (
                    f"sampling.{setting}",
                    "algo.block_size",
                    "the only value is " + value,
                ),
            )
            for name in ("mdlm", "ar")
            for setting, value in (
                ("num_blocks=2", "null"),
                ("stop_at_eos=True", "False"),
                ("block_cache=False", "True"),
            )
        ),
    ],
    ids=lambda x: "-".join(x) if "=" in x[0] else "",
)
def test_what_makes_no_sense_is_refused(overrides, parts):
    """In one line, when a config is checked and when a model is built."""
    config = compose(*overrides)
    for build in (
        lambda: algorithm_class(config).validate_config(config),
        lambda: tiny_model(*overrides),
    ):
        refused(build, *parts)


@pytest.mark.parametrize("value", ["0", "-1", "2.5", "x"])
def test_a_number_of_blocks_is_one(value):
    with pytest.raises(ConfigError, match=r"sampling\.num_blocks="):
        check_values(compose(*BLOCKS, f"sampling.num_blocks={value}"))


@pytest.mark.parametrize(("number", "length"), [("null", 8), ("1", 2), ("9", 18)])
def test_how_long_a_text_is(number, length):
    model = tiny_model(*BLOCKS, f"sampling.num_blocks={number}")
    assert model.sampler.length(model.num_tokens) == length


def test_what_belongs_to_a_text():
    """Up to its end; of texts without one, all."""
    x = torch.arange(6).view(2, 3)
    samples = Samples(x, torch.ones(2))
    assert samples.up_to_end(x) is x
    samples = samples._replace(lengths=torch.tensor([1, 3]))
    assert [row.tolist() for row in samples.up_to_end(x)] == [[0], [3, 4, 5]]
    assert all(
        torch.equal(*both) for both in zip(samples.to_host(), samples, strict=True)
    )
