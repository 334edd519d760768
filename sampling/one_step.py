"""The sampler of generators of one step, and the refinement of its samples.

Shapes: B batch, L length, K vocabulary, n tokens of a chunk.
"""

from typing import ClassVar, cast

import torch
from omegaconf import DictConfig
from torch import Tensor

from sampling.categorical import nucleus, tempered
from sampling.denoiser import Algorithm, Generator
from sampling.reverse_process import Chain
from sampling.sampler import Sampler


class OneStep(Sampler):
    """One pass of the network: initial tokens, then a draw of every token.

        x ~ p_theta(. | x_init),  each token by itself, never the mask

    `sampling.steps` and noise removal do not apply. With `sampling.refine_steps` = k
    above 0, exactly round(r n) of the n tokens that are not given are masked again, r
    being `sampling.refine_ratio`, and k ancestral steps reveal them. The share of masks
    falls from r to 0 in equal parts, whatever the noise schedule is.

    Reference: Di[M]O (arXiv:2503.15457).
    """

    removals: ClassVar[dict[str, str]] = {"ancestral": "keep"}  # no noise is left
    removal_of_true = "ancestral"
    refines = True

    def __init__(self, config: DictConfig, compat: str = "paper") -> None:
        super().__init__(config, compat)
        self.refine_steps: int = config.refine_steps
        self.refine_ratio: float = config.refine_ratio

    @classmethod
    def fits(cls, algorithm: type[Algorithm]) -> bool:
        return algorithm.is_one_step

    def run(self, chain: Chain, xt: Tensor, num_steps: int) -> Tensor:
        model = cast(Generator, chain.model)
        # What is given stands in xt already.
        initial = model.initial_tokens(len(xt), chain.generator)
        initial = chain.note(torch.where(chain.free, initial, xt))
        hidden = model.generator_hidden(model.perturbed(initial, chain.generator))
        chain.evaluations += 1
        rows, columns = chain.free.nonzero(as_tuple=True)
        x = xt.clone()
        for part in torch.arange(len(rows), device=x.device).split(chain.chunk):
            place = rows[part], columns[part]
            logits = chain.model.logits_for_loss(hidden[place])
            chain.note_logits(logits)
            logits = model.generated_logits(self.widen(logits))
            sharper = tempered(logits, self.temperature)
            probs = nucleus(sharper.softmax(dim=-1), self.p_nucleus)
            x[place] = drawn = self.draw(probs, chain.generator)
            if chain.recorder is not None:
                chain.recorder.drew_from(logits.softmax(dim=-1), drawn, *place)
        chain.note(x)
        if self.refine_steps == 0:
            return x
        with model.refining():
            return self.refine(chain, x)

    def refine(self, chain: Chain, x: Tensor) -> Tensor:
        """Masks a part of the tokens and reveals them again, (B, L) -> (B, L)."""
        u = chain.uniform(x.shape).masked_fill(~chain.free, 2)  # the last of a row
        num_free = chain.free.sum(dim=-1, keepdim=True)
        count = (self.refine_ratio * num_free).round().clamp(min=1).minimum(num_free)
        is_masked = u.argsort(dim=-1).argsort(dim=-1) < count
        x = chain.note(x.masked_fill(is_masked, chain.model.mask_index))
        k = self.refine_steps
        for step in chain.progress(range(k)):
            alpha_t, alpha_s = (
                torch.full_like(u[:, :1], 1 - self.refine_ratio * (k - s) / k)
                for s in (step, step + 1)
            )
            x = chain.note(self.reverse(chain, x, alpha_t, alpha_s, chain.free))
        return x
