"""Trajectories as plain data: small, exact, and refused where they do not fit."""

import json

import numpy as np
import pytest

from sampling.trajectory import NOTHING, Trajectory, packed, unpacked


def example(length: int = 9, steps: int = 4, largest: int = 70_000) -> Trajectory:
    rng = np.random.default_rng(0)
    counts = rng.integers(0, length, steps)
    changes = int(counts.sum())
    first = rng.integers(NOTHING, largest, length)
    entropy = rng.random(steps).astype(np.float32)
    entropy[0] = np.nan
    return Trajectory(
        first,
        rng.random(length) < 0.5,
        counts,
        np.concatenate([rng.permutation(length)[:n] for n in counts]),
        rng.integers(0, largest, changes),
        rng.integers(0, 256, changes).astype(np.uint8),
        entropy,
    )


@pytest.mark.parametrize("largest", [7, 70_000])
@pytest.mark.parametrize(("length", "steps"), [(9, 4), (1, 0), (17, 30)])
def test_a_trajectory_is_read_back_as_it_was(length, steps, largest):
    one = example(length, steps, largest) if steps else still(length)
    other = unpacked(json.loads(json.dumps(packed(one))))
    for x, y in zip(one, other, strict=True):
        np.testing.assert_array_equal(x, y)


def still(length: int) -> Trajectory:
    none = np.zeros(0, np.int64)
    known = np.ones(length, bool)
    return Trajectory(
        known.astype(np.int64), known, none, none, none, none.astype(np.uint8), none
    )


def test_states_are_what_the_changes_lead_to():
    one = Trajectory(
        np.array([5, 5, NOTHING]),
        np.zeros(3, bool),
        np.array([1, 0, 2]),
        np.array([1, 1, 2]),
        np.array([7, 8, 9]),
        np.zeros(3, np.uint8),
        np.zeros(3, np.float32),
    )
    states = [[5, 5, NOTHING], [5, 7, NOTHING], [5, 7, NOTHING], [5, 8, 9]]
    assert [x.tolist() for x in one.states()] == states
    assert one.ids() == {5, 7, 8, 9}


def test_a_change_takes_seven_bytes_at_most():
    """In base64, which makes four of three; of a vocabulary as GPT-2's five."""
    one = example(length=1000, steps=50)
    changes = int(one.counts.sum())
    fixed = 1000 * 4 + 1000 / 8 + 50 * 8
    size = len(json.dumps(packed(one)))
    assert size < 300 + (fixed + 7 * changes) * 4 / 3
    small = example(length=1000, steps=50, largest=50_257)
    assert len(json.dumps(packed(small))) < 300 + (fixed + 5 * changes) * 4 / 3


@pytest.mark.parametrize(
    "changed",
    [
        {"length": 8},
        {"length": 0},
        {"length": True},
        {"length": "9"},
        {"length": 10**12},
        {"steps": 10**9},
        {"steps": -1},
        {"counts": "////////////////////"},
        {"positions": "!"},
        {"positions": "AAAA"},
        {"positions": 5},
        {"codes": None},
        {"first": ""},
        {"entropy": "AAAA"},
    ],
    ids=str,
)
def test_arrays_that_do_not_fit_are_refused(changed):
    with pytest.raises(ValueError, match=r"it is no trajectory|do not fit"):
        unpacked(packed(example()) | changed)


@pytest.mark.parametrize("data", [None, [], {}, "text", {"length": 3}])
def test_other_data_is_refused(data):
    with pytest.raises(ValueError, match="it is no trajectory"):
        unpacked(data)


def test_positions_outside_are_refused():
    one = example()
    outside = one._replace(positions=one.positions + 5)
    with pytest.raises(ValueError, match="do not fit"):
        unpacked(packed(outside))
