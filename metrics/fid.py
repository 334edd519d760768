"""Frechet distance between two sets of features, and the Inception Score of logits.

What makes features and logits of images is no business of this file. All sums and
results are float64, on the CPU.

Shapes: n images, d features, k classes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from utils import ConfigError, NotFinite

FEWEST = 2  # images of which there is a covariance, and a deviation over splits
SPLITS = 10  # of the Inception Score, where there are as many images


@dataclass(frozen=True)
class FeatureSums:
    """What the mean and the covariance of features are made of.

    Sums of parts add up to the sums of all, whatever the parts and their order.
    """

    count: int  # n
    total: Tensor  # sum of the features, (d,)
    products: Tensor  # sum of their outer products, (d, d)

    @classmethod
    def of(cls, features: Tensor) -> "FeatureSums":
        """The sums of some images' features, (n, d).

        Raises:
            NotFinite: If there are numbers among them that are none.
        """
        check_finite(features, "features")
        x = features.detach().cpu().double()
        return cls(len(x), x.sum(dim=0), x.T @ x)

    def __add__(self, other: "FeatureSums") -> "FeatureSums":
        return FeatureSums(
            self.count + other.count,
            self.total + other.total,
            self.products + other.products,
        )

    def mean(self) -> Tensor:
        """(d,)."""
        return self.total / self.count

    def covariance(self) -> Tensor:
        """Over n - 1, (d, d).

        Raises:
            ConfigError: If there are too few images.
        """
        if self.count < FEWEST:
            raise ConfigError(
                f"FID needs at least {FEWEST} generated and {FEWEST} real images, and "
                f"there is {self.count}: raise eval.fid_num_images, or give more data."
            )
        mean = self.mean()
        return (self.products - self.count * torch.outer(mean, mean)) / (self.count - 1)


def check_finite(x: Tensor, what: str) -> None:
    """Refuses what an extractor gives that is no number, which would spoil all.

    Raises:
        NotFinite: If there is one.
    """
    if not x.isfinite().all():
        raise NotFinite(
            f"The extractor of eval.fid_features gives images {what} that are not "
            "finite, so there is no FID: its weights are damaged."
        )


def frechet_distance(one: FeatureSums, other: FeatureSums) -> float:
    """Squared Frechet distance of two Gaussians with the features' moments.

        |m1 - m2|^2 + tr S1 + tr S2 - 2 sum_i Re sqrt(l_i),   l_i eigenvalues of S1 S2

    Reference: Heusel et al. (arXiv:1706.08500), equation 6.

    Raises:
        ConfigError: If one has too few images for a covariance.
    """
    difference = one.mean() - other.mean()
    s1, s2 = one.covariance(), other.covariance()
    roots = torch.linalg.eigvals(s1 @ s2).sqrt().real
    distance = difference @ difference + s1.trace() + s2.trace() - 2 * roots.sum()
    return max(0.0, float(distance))  # rounding, where the sets are alike


def inception_score(
    logits: Tensor, permutation: Tensor, splits: int = SPLITS
) -> tuple[float, float | None]:
    """Inception Score: mean and deviation over splits of the images.

        exp(mean_i KL(p(y | x_i) || mean_j p(y | x_j)))   of each split

    Args:
        logits: Of generated images, (n, k).
        permutation: Order of the images in which they are split, (n,). The score
            depends on it.
        splits: How many; their sizes are those of `torch.chunk`, so that there may be
            fewer.

    Returns:
        The mean, and the deviation over one less than the number of splits; None if
        there is one split only.

    Reference: Salimans et al. (arXiv:1606.03498), section 4.
    """
    check_finite(logits, "logits")
    probs = logits.detach().cpu().double()[permutation].softmax(dim=-1)
    scores = torch.stack([_score(part) for part in probs.chunk(splits)])
    deviation = float(scores.std()) if len(scores) > 1 else None
    return float(scores.mean()), deviation


def _score(probs: Tensor) -> Tensor:
    """Of one split, (n, k) -> ()."""
    mean = probs.mean(dim=0, keepdim=True)
    kl = torch.xlogy(probs, probs) - torch.xlogy(probs, mean)
    return kl.sum(dim=-1).mean().exp()
