"""Which classes samples are drawn from."""

import numpy as np
import pytest

from evaluation.sample_file import settings_of
from sampling.classes import classes_of, labels_at

OF_DATA = np.array([2, 0, 2, 1, 1])


@pytest.fixture
def config(compose):
    def build(*overrides):
        return compose(
            *("data=images", "data.size=4", "model.length=12", "data.num_classes=3"),
            *("sampling.guid_weight=1", *overrides),
        )

    return build


@pytest.mark.parametrize(
    ("override", "of_data", "expected"),
    [
        ("sampling.labels=null", None, [0, 1, 2]),
        ("sampling.labels=null", OF_DATA, [2, 0, 2, 1, 1]),
        ("sampling.labels=data", OF_DATA, [2, 0, 2, 1, 1]),
        ("sampling.labels=[2,0]", OF_DATA, [2, 0]),
        ("sampling.labels=[1]", None, [1]),
    ],
)
def test_classes_take_turns(config, override, of_data, expected):
    classes = classes_of(config(override), of_data)
    assert classes.tolist() == expected
    turns = (expected * 20)[:20]
    assert labels_at(classes, 0, 20).tolist() == turns
    parts = [labels_at(classes, first, 5).tolist() for first in range(0, 20, 5)]
    assert [label for part in parts for label in part] == turns


@pytest.mark.parametrize(
    "override",
    ["sampling.guid_weight=null", "sampling.guid_weight=0", "data.num_classes=null"],
)
def test_without_guidance_or_classes_there_are_none(config, override):
    assert classes_of(config(override), OF_DATA) is None
    assert labels_at(None, 0, 4) is None


def test_a_run_goes_on_with_the_same_classes_only(config):
    found = [settings_of(config(), x) for x in (None, np.arange(3), np.arange(2))]
    assert found[0] != found[1] != found[2] != found[0]
