"""`eval.likelihood=chain_rule`: log p(x) of absorbing states as a product of
conditionals, beside the bound.

Shapes: B batch, L length, K vocabulary, n tokens of a chunk.
"""

from collections.abc import Callable, Mapping
from typing import Any, cast

import lightning
import torch
from omegaconf import DictConfig
from torch import Tensor

from data.rows import REPEATED
from diffusion.absorbing import AbsorbingState
from metrics.likelihood import Likelihood
from models.device import to_device, wide_dtype
from sampling.ordered import level_of_masks, without_mask
from sampling.reverse_process import Chain
from utils import ConfigError

# By `eval.likelihood_order`: positions in the order in which they are revealed, (B, L),
# from the shape and a generator of the host.
ORDERS: dict[str, Callable[[tuple[int, ...], torch.Generator], Tensor]] = {
    "random": lambda shape, generator: torch.rand(
        shape, dtype=torch.float64, generator=generator
    ).argsort(dim=-1),
    "left_to_right": lambda shape, _: torch.arange(shape[1]).expand(shape),
}


def check_chain_rule(config: DictConfig, algorithm: type[Any]) -> None:
    """Refuses the chain rule where there is none.

    Raises:
        ConfigError: With the key, the value and the cure.
    """
    if config.eval.likelihood != "chain_rule":
        return
    size = config.algo.get("block_size")
    if size is not None:
        raise ConfigError(
            "eval.likelihood=chain_rule reveals tokens anywhere in a row, and with "
            f"algo.block_size={size} blocks follow one another; the only value is "
            "nelbo."
        )
    if not issubclass(algorithm, AbsorbingState) or algorithm.is_one_step:
        reason = (
            "its likelihood is exact already"
            if algorithm.is_autoregressive
            else "its network cannot be told which tokens are given"
        )
        raise ConfigError(
            "eval.likelihood=chain_rule is for masked diffusion, not for "
            f"algo={config.algo.name}: {reason}; the only value is nelbo."
        )


class ChainRule(lightning.Callback):
    """Measures, beside a validation,

        -log p(x) = - sum_b sum_{i in b} log p(x_i | x of the blocks before)

    over blocks of `eval.likelihood_block` positions, one network call each. With blocks
    of one position it is the exact likelihood of the model that reveals tokens in the
    order. In a random order, one for each row, its mean is that of all orders: for a
    network that does not know the time the same as the bound's, with less variance.
    Larger blocks are of the sampler that reveals their tokens at once, independently.

    A network that knows the time is told that of the share of masks left.

    Args:
        config: `config.eval`.
    """

    def __init__(self, config: DictConfig) -> None:
        self.order: str = config.likelihood_order
        self.block: int = config.likelihood_block
        self.likelihood = Likelihood()
        self.results: dict[str, float] = {}

    def on_validation_start(self, trainer: Any, model: Any) -> None:
        self.likelihood.to(model.device).reset()

    def on_validation_batch_end(
        self,
        trainer: Any,
        model: Any,
        outputs: Any,
        batch: Mapping[str, Tensor],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        valid = model.valid_tokens(batch["attention_mask"])
        shape = tuple(batch["input_ids"].shape)
        rows = model.row_indices(len(valid), batch_idx)
        of_rows = model.row_stream("chain_rule", rows).generators()
        of_one = (1, *shape[1:])
        order = torch.cat([ORDERS[self.order](of_one, g) for g in of_rows])
        with model.autocast():
            nll = chain_rule_nll(
                model,
                batch["input_ids"],
                to_device(order, model.device),
                self.block,
                model.condition_of(batch).get("labels"),
            )
        if REPEATED not in batch:
            self.likelihood.update((nll * valid).sum(dim=-1), valid.sum(dim=-1))

    def on_validation_end(self, trainer: Any, model: Any) -> None:
        results = self.likelihood.compute()
        self.results = {name: float(x) for name, x in results.items()}

    def record(self) -> dict[str, Any]:
        """What the file says of it."""
        exact = "exact" if self.block == 1 else "exact for blocks drawn independently"
        how = "in one random order a row" if self.order == "random" else "left to right"
        names = ("nll", "bpd", "ppl")
        return {
            "estimator": f"chain rule {how}, {exact}",
            "order": self.order,
            "block": self.block,
            **{key: self.results[key] for name in names for key in _with_error(name)},
        }


def _with_error(name: str) -> tuple[str, str]:
    return name, f"{name}_stderr"


@torch.no_grad()
def chain_rule_nll(
    model: AbsorbingState,
    x0: Tensor,
    order: Tensor,
    block: int = 1,
    labels: Tensor | None = None,
) -> Tensor:
    """-log p(x_i | x of the blocks before that of i), nats, (B, L).

    With `algo.ignore_bos` the first token is given, and its loss 0.

    Args:
        model: Of absorbing states, in evaluation mode.
        x0: Clean ids, (B, L).
        order: Positions of each row in the order of reveal, (B, L).
        block: Positions that are revealed at once.
        labels: Class of each row, (B,); None for models without classes.
    """
    free = torch.ones_like(x0, dtype=torch.bool)
    if model.ignore_bos:
        free[:, 0] = False
    xt = x0.masked_fill(free, model.mask_index)
    chain = Chain(cast(Any, model), free, None, conditions=(labels,))
    dtype = wide_dtype(x0.device)
    nll = torch.zeros(x0.shape, dtype=dtype, device=x0.device)
    total = free.sum(dim=-1, keepdim=True)
    for positions in order.split(block, dim=-1):
        where = torch.zeros_like(free).scatter(-1, positions, True) & free
        left = (xt == model.mask_index).sum(dim=-1, keepdim=True) / total
        alpha_t = level_of_masks(model.noise, left)
        for tokens in chain.tokens(xt, alpha_t, where):
            place = tokens.rows, tokens.columns
            log_p = model.denoised(
                tokens.logits.to(dtype), xt=tokens.xt, sigma=tokens.sigma
            )
            log_p = without_mask(log_p, model.mask_index)
            nll[place] = -log_p.gather(-1, x0[place][:, None]).squeeze(-1)
        xt = torch.where(where, x0, xt)
    chain.check_finite()
    return nll
