"""Draws by row: of the right law, independent, and the same for any cut of the rows."""

import itertools

import pytest
import torch
from scipy import stats

from training.row_streams import RowStream, seeded

ROWS = 4000
CUTS = {
    "one by one": [range(i, i + 1) for i in range(12)],
    "blocks": [range(5), range(5, 12)],
    "strides": [range(i, 12, 3) for i in range(3)],
}


def draws(stream: RowStream) -> list[torch.Tensor]:
    found = [stream.uniform(5, 3), stream.uniform(), stream.integers(7, 4)]
    found.append(stream.normal(9))
    host = [torch.rand(2, generator=g) for g in stream.generators()]
    return [*found, torch.stack(host), torch.tensor(stream.seeds())]


@pytest.mark.parametrize("cut", CUTS)
def test_any_cut_gives_the_same_draws(cut):
    whole = draws(RowStream([1, 2, 3], range(12)))
    parts = [draws(RowStream([1, 2, 3], rows)) for rows in CUTS[cut]]
    order = [row for rows in CUTS[cut] for row in rows]
    for expected, *own in zip(whole, *parts, strict=True):
        assert torch.equal(torch.cat(own), expected[order])


def test_laws():
    """Uniform, normal, integers that are as likely; 64 of each in 4000 rows."""
    stream = RowStream([1], range(ROWS))
    u, z, n = stream.uniform(64), stream.normal(64), stream.integers(5, 64)
    assert u.dtype == z.dtype == torch.float64
    assert 0 <= u.min() < u.max() < 1
    assert z.isfinite().all()
    counts = n.flatten().bincount(minlength=5)
    p_values = [
        stats.kstest(u.flatten().numpy(), "uniform").pvalue,
        stats.kstest(z.flatten().numpy(), "norm").pvalue,
        stats.chisquare(counts.numpy()).pvalue,
        stats.kstest(u[:, 0].numpy(), "uniform").pvalue,
        stats.kstest(u[1000].numpy(), "uniform").pvalue,
    ]
    assert min(p_values) * len(p_values) > 1e-3


def test_rows_calls_and_keys_are_independent():
    """No two of them go together: neighbours, calls, keys that differ in a number."""
    first = RowStream([1, 7], range(ROWS))
    u = first.uniform(64)
    others = {
        "next row": u.roll(1, 0),
        "next number": u.roll(1, 1),
        "next call": first.uniform(64),
        "another key": RowStream([1, 8], range(ROWS)).uniform(64),
        "rows behind": RowStream([1, 7], range(ROWS, 2 * ROWS)).uniform(64),
    }
    limit = 5 / u.numel() ** 0.5
    for one, other in itertools.combinations([u, *others.values()], 2):
        pair = torch.stack([one.flatten(), other.flatten()])
        assert abs(float(pair.corrcoef()[0, 1])) < limit


def test_seeds_are_of_63_bits_and_differ():
    seeds = RowStream([3], range(ROWS)).seeds()
    assert len(set(seeds)) == ROWS
    assert 0 <= min(seeds) < 2**57 < 2**62 < max(seeds) < 2**63


def test_one_generator_has_each_seed_in_turn():
    found = [torch.rand(3, generator=g) for g in seeded([4, 5], "cpu")]
    for seed, x in zip((4, 5), found, strict=True):
        assert torch.equal(x, torch.rand(3, generator=torch.manual_seed(seed)))
