"""Samplers that choose which masks to reveal by how sure the model is of them.

They leave the law that the model defines: the order in which tokens are revealed then
depends on the tokens. Samples look better to a judge, and their entropy falls.

Shapes: B batch, L length, K vocabulary, n tokens of a chunk.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor

from models.device import wide_dtype
from models.noise import Noise
from sampling.denoiser import Algorithm, Denoiser
from sampling.reverse_process import Chain, Tokens
from sampling.sampler import Sampler
from utils import choose

# From the model's probabilities (n, K) and the tokens drawn (n,) to scores (n,).
Score = Callable[[Tensor, Tensor], Tensor]


def without_mask(log_p: Tensor, mask_index: int) -> Tensor:
    """Log-probabilities given that it is a token, not the mask, (..., K)."""
    is_mask = torch.arange(log_p.shape[-1], device=log_p.device) == mask_index
    return log_p.masked_fill(is_mask, -torch.inf).log_softmax(dim=-1)


def level_of_masks(noise: Noise, share: Tensor) -> Tensor:
    """The signal level that a network is told of where this share of the tokens that
    are drawn is masked: 1 at none, alpha_1 at all."""
    alpha_1 = noise(torch.ones((), dtype=torch.float64)).alpha_t
    return 1 - (1 - float(alpha_1)) * share.to(wide_dtype(share.device))


def entropy(p: Tensor) -> Tensor:
    """In nats, (n, K) -> (n,); exactly 0 where one token is certain."""
    return torch.special.entr(p).sum(dim=-1)


def margin(p: Tensor) -> Tensor:
    """The most likely token's probability less the next one's, (n, K) -> (n,)."""
    first, second = p.topk(2, dim=-1).values.unbind(dim=-1)
    return first - second


# By `sampling.order`: the highest are revealed first.
ORDERS: dict[str, Score] = {
    "top_prob": lambda p, x: p.gather(-1, x[:, None]).squeeze(-1),
    "margin": lambda p, x: margin(p),
    "entropy": lambda p, x: -entropy(p),
}


class Ordered(Sampler):
    """Skeleton: every mask proposes a token, and some of them take it for good.

    Scores are of the model's own probabilities, before temperature and nucleus: at
    temperature 0 all would be 1.
    """

    removals: ClassVar[dict[str, str]] = {"ancestral": "keep"}  # no noise is left
    removal_of_true = "ancestral"

    @classmethod
    def fits(cls, algorithm: type[Algorithm]) -> bool:
        return super().fits(algorithm) and algorithm.has_mask

    def log_x_theta(self, model: Denoiser, tokens: Tokens) -> Tensor:
        """Whatever the model believes of the mask: a proposal is a token."""
        return without_mask(super().log_x_theta(model, tokens), model.mask_index)

    def masked(self, chain: Chain, xt: Tensor) -> Tensor:
        """What is still to be revealed, (B, L) bool; not all that `undecided` says."""
        return chain.free & (xt == chain.model.mask_index)

    def propose(
        self, chain: Chain, xt: Tensor, alpha_t: Tensor, where: Tensor, score: Score
    ) -> tuple[Tensor, Tensor]:
        """Tokens for the masks in `where` and their scores, (B, L) each.

        Args:
            chain: Model and generator.
            xt: Noisy ids, (B, L).
            alpha_t: (B, 1).
            where: (B, L) bool; the scores of other positions are 0.
            score: Of probabilities and of the tokens drawn.
        """
        scores = torch.zeros_like(xt, dtype=alpha_t.dtype)

        def drawn(tokens: Tokens) -> Tensor:
            x_theta = self.guided(self.x_thetas(chain.model, tokens))
            x = self.draw(x_theta, chain.generator)
            found = score(self.belief(chain.model, tokens), x)
            scores[tokens.rows, tokens.columns] = found.to(scores.dtype)
            return x

        return chain.replace(xt, alpha_t, where, drawn), scores


class Confidence(Ordered):
    """Each step reveals the masks with the highest scores.

    How many: as many as `Ancestral` would in expectation, rounded so that all are
    revealed in `sampling.steps` steps. `sampling.order` is the score and
    `sampling.order_noise` a factor of Gumbel noise that is added to it.
    """

    keys: ClassVar[dict[str, Any]] = {"order": "top_prob", "order_noise": 0}

    def __init__(self, config: DictConfig, compat: str = "paper") -> None:
        super().__init__(config, compat)
        self.score = ORDERS[config.order]
        self.order_noise: float = config.order_noise

    @classmethod
    def validate_config(cls, config: DictConfig) -> None:
        super().validate_config(config)
        choose(ORDERS, config.order, "sampling.order")

    def run(self, chain: Chain, xt: Tensor, num_steps: int) -> Tensor:
        plan = [step.to(xt) for step in self.plan(chain.model.noise, num_steps)]
        left = self.masked(chain, xt).sum(dim=-1, keepdim=True)  # (B, 1)
        per_noise = left / (1 - plan[0].alpha_t)
        for index, step in enumerate(chain.progress(plan)):
            is_last = index == len(plan) - 1
            stay = (per_noise * (1 - step.alpha_s)).round() * (not is_last)
            xt = chain.note(self.reveal(chain, xt, step.alpha_t, left - stay))
            left = stay
        return xt

    def reveal(
        self, chain: Chain, xt: Tensor, alpha_t: Tensor, count: Tensor
    ) -> Tensor:
        """x_t with `count` (B, 1) more of its tokens revealed."""
        where = self.masked(chain, xt) & (count > 0)
        new, scores = self.propose(chain, xt, alpha_t, where, self.score)
        if self.order_noise:
            scores = scores + self.order_noise * chain.gumbel(xt.shape)
        scores = scores.masked_fill(~where, -torch.inf)
        order = scores.argsort(dim=-1, descending=True, stable=True)
        chosen = where & (order.argsort(dim=-1) < count)
        return torch.where(chosen, new, xt)


class EntropyBound(Ordered):
    """Reveals at once what the model is sure of: masks in the order of the entropies
    H of their predictions, as many as keep

        sum_{i in U} H_i - max_{i in U} H_i  <=  gamma

    which bounds what is lost by drawing them independently; at least one. How many
    steps that takes is an outcome: `sampling.steps` does not apply, and `evaluations`
    says it. A network that knows the time is told that of the share of masks left.

    Reference: arXiv:2505.24857, entropy-bounded unmasking.
    """

    keys: ClassVar[dict[str, Any]] = {"gamma": 0.1}

    def __init__(self, config: DictConfig, compat: str = "paper") -> None:
        super().__init__(config, compat)
        self.gamma: float = config.gamma

    def run(self, chain: Chain, xt: Tensor, num_steps: int) -> Tensor:
        total = self.masked(chain, xt).sum(dim=-1, keepdim=True)  # (B, 1)
        for _ in chain.progress(range(int(total.max()))):
            where = self.masked(chain, xt)
            if not where.any():
                break
            left = where.sum(dim=-1, keepdim=True) / total.clamp(min=1)
            alpha_t = level_of_masks(chain.model.noise, left)
            xt = chain.note(self.reveal(chain, xt, alpha_t, where))
        return xt

    def reveal(
        self, chain: Chain, xt: Tensor, alpha_t: Tensor, where: Tensor
    ) -> Tensor:
        """x_t with the largest set of its masks revealed that the bound lets."""
        new, H = self.propose(chain, xt, alpha_t, where, lambda p, x: entropy(p))
        H, order = H.masked_fill(~where, torch.inf).sort(dim=-1, stable=True)
        # In this order the largest of a set is its last: the others come before it.
        before = F.pad(H.cumsum(dim=-1)[:, :-1], (1, 0))
        within = torch.zeros_like(where).scatter(-1, order, before <= self.gamma)
        return torch.where(where & within, new, xt)
