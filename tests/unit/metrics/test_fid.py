"""Frechet distance and Inception Score beside torchmetrics, closed forms and laws."""

import itertools
import math
from functools import partial, reduce
from operator import add

import pytest
import torch
from refusals import refused
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore

from metrics.fid import FeatureSums, frechet_distance, inception_score
from utils import NotFinite


def normal(*shape: int, seed: int = 0, dtype=torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=dtype)


class Recorded(torch.nn.Module):
    """An extractor for torchmetrics: an image's bytes name the row of its features."""

    def __init__(self, features: torch.Tensor) -> None:
        super().__init__()
        self.features = features
        self.num_features = features.shape[1]

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.features[images[:, 0, 0, 0].long()]


def named(count: int, first: int = 0) -> torch.Tensor:
    """Images whose first byte is their number."""
    images = torch.zeros(count, 3, 2, 2, dtype=torch.uint8)
    images[:, 0, 0, 0] = torch.arange(first, first + count)
    return images


def theirs(real: torch.Tensor, generated: torch.Tensor) -> float:
    extractor = Recorded(torch.cat([real, generated]))
    metric = FrechetInceptionDistance(extractor, input_img_size=(3, 2, 2))
    metric.set_dtype(torch.float64)
    metric.update(named(len(real)), real=True)
    metric.update(named(len(generated), len(real)), real=False)
    return float(metric.compute())


def ours(real: torch.Tensor, generated: torch.Tensor) -> float:
    return frechet_distance(FeatureSums.of(real), FeatureSums.of(generated))


SIZES = [(64, 48, 6), (100, 30, 1), (10, 12, 20), (2, 2, 3), (120, 100, 40)]


@pytest.mark.parametrize(("num_real", "num_generated", "width"), SIZES)
def test_distance_is_torchmetrics(num_real, num_generated, width):
    """More and fewer images than features; the sets differ in mean and covariance."""
    real = normal(num_real, width, seed=1)
    mixing = normal(width, width, seed=3)
    generated = 0.5 + normal(num_generated, width, seed=2) @ mixing
    expected = theirs(real, generated)
    assert ours(real, generated) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("num_real", "num_generated", "width"), SIZES)
def test_a_set_with_itself(num_real, num_generated, width):
    real = 3 + normal(num_real, width, seed=num_generated)
    limit = 1e-6 if num_real <= width else 1e-10  # roots of zeros that are rounded
    assert abs(ours(real, real)) < limit * width
    order = torch.randperm(num_real, generator=torch.Generator().manual_seed(0))
    assert abs(ours(real, real[order])) < limit * width


def exactly(mean: torch.Tensor, covariance: torch.Tensor) -> torch.Tensor:
    """Features whose moments are these to rounding: 2 d of them."""
    width = len(mean)
    root = torch.linalg.cholesky(covariance) * math.sqrt(width - 0.5)
    return torch.cat([mean + root.T, mean - root.T])


@pytest.mark.parametrize("width", [1, 2, 7])
def test_two_gaussians_in_closed_form(width):
    """Covariances that commute: |m1 - m2|^2 + sum_i (sqrt a_i - sqrt b_i)^2, with a
    and b the eigenvalues; and the root of two that do not, by one that is symmetric."""
    basis, _ = torch.linalg.qr(normal(width, width, dtype=torch.float64))
    a, b = normal(2, width, seed=4, dtype=torch.float64).exp()
    m1, m2 = normal(2, width, seed=5, dtype=torch.float64)
    one = exactly(m1, basis @ a.diag() @ basis.T)
    other = exactly(m2, basis @ b.diag() @ basis.T)
    expected = ((m1 - m2) ** 2).sum() + ((a.sqrt() - b.sqrt()) ** 2).sum()
    assert ours(one, other) == pytest.approx(float(expected), rel=1e-9)

    c = exactly(m2, b.diag())  # does not commute with the first
    values, vectors = torch.linalg.eigh(basis @ a.diag() @ basis.T)
    root = vectors @ values.sqrt().diag() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ b.diag() @ root).sqrt().sum()
    expected = ((m1 - m2) ** 2).sum() + a.sum() + b.sum() - 2 * cross
    assert ours(one, c) == pytest.approx(float(expected), rel=1e-9)


def test_the_moments_are_those_of_numpy():
    x = 100 + normal(50, 4, dtype=torch.float64)
    sums = FeatureSums.of(x)
    torch.testing.assert_close(sums.mean(), x.mean(dim=0))
    torch.testing.assert_close(sums.covariance(), x.T.cov(), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("cuts", [[], [1], [20, 20], [3, 7, 40], list(range(1, 50))])
def test_shards_change_nothing(cuts):
    """Whatever the shards, empty ones included, and the order in which they are added;
    so does it not matter which process has which batch."""
    x, y = normal(50, 5), normal(40, 5, seed=1)
    bounds = [0, *cuts, 50]
    shards = [FeatureSums.of(x[i:j]) for i, j in itertools.pairwise(bounds)]
    whole = frechet_distance(FeatureSums.of(x), FeatureSums.of(y))
    for order in (shards, shards[::-1], shards[1::2] + shards[::2]):
        sums = reduce(add, order)
        assert sums.count == 50
        distance = frechet_distance(sums, FeatureSums.of(y))
        assert distance == pytest.approx(whole, rel=1e-12)


def test_sums_are_wide():
    """Features of a network are float32, or half; a large mean does not eat up the
    covariance."""
    x = (1000 + normal(4000, 2)).half()
    sums = FeatureSums.of(x)
    assert sums.products.dtype == sums.total.dtype == torch.float64
    expected = x.double().T.cov()
    torch.testing.assert_close(sums.covariance(), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_images_are_refused(count):
    few, many = FeatureSums.of(normal(count, 3)), FeatureSums.of(normal(9, 3))
    for pair in ((few, many), (many, few)):
        call = partial(frechet_distance, *pair)
        refused(call, "at least 2", f"there is {count}", "eval.fid_num_images")


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_features_that_are_no_numbers_are_said(bad):
    x = normal(9, 3)
    x[4, 1] = bad
    with pytest.raises(NotFinite, match=r"eval\.fid_features .*features"):
        FeatureSums.of(x)
    with pytest.raises(NotFinite, match=r"eval\.fid_features .*logits"):
        inception_score(x, torch.arange(9))


# ---------------------------------------------------------------- Inception Score


@pytest.mark.parametrize(("count", "classes"), [(48, 5), (100, 2), (13, 30), (7, 4)])
@pytest.mark.parametrize("splits", [10, 3, 1])
def test_score_is_torchmetrics(count, classes, splits, monkeypatch):
    """On the same logits and the same permutation; its splits are as uneven."""
    logits = 2 * normal(count, classes, seed=count)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(3))
    metric = InceptionScore(Recorded(logits), splits=splits)
    metric.update(named(count))
    monkeypatch.setattr("torch.randperm", lambda n: order)
    mean, deviation = metric.compute()
    found = inception_score(logits, order, splits)
    assert found[0] == pytest.approx(float(mean), rel=1e-6)
    if len(torch.zeros(count).chunk(splits)) > 1:
        assert found[1] == pytest.approx(float(deviation), rel=1e-4, abs=1e-6)
    else:
        assert found[1] is None


def test_score_of_what_is_certain_and_of_what_is_not():
    """k where each image is surely of one of k equal classes; 1 where all are alike.
    Probabilities that are 0 to rounding add nothing."""
    certain = 1e4 * torch.eye(4).repeat(10, 1)
    order = torch.arange(40)
    assert inception_score(certain, order, splits=1)[0] == pytest.approx(4)
    for alike in (torch.zeros(40, 4), certain[:1].repeat(40, 1)):
        assert inception_score(alike, order) == pytest.approx((1, 0))


def test_score_depends_on_the_order_alone():
    logits = normal(30, 6)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    found = inception_score(logits, order)
    assert inception_score(logits[order], torch.arange(30)) == found
    other = inception_score(logits, order.roll(1))  # splits of other images
    assert other[0] != pytest.approx(found[0], rel=1e-6)
