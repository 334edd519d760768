"""The samplers of diffusion models, one class for each `sampling.predictor`; that of
the psi sampler is in `psi.py`.

Shapes: B batch, L length, K vocabulary, n tokens of a chunk.
"""

from typing import ClassVar

import torch
from torch import Tensor

from sampling.categorical import nucleus, tempered
from sampling.denoiser import Algorithm, Denoiser
from sampling.reverse_process import Chain, Step, Tokens
from sampling.sampler import Sampler


class Ancestral(Sampler):
    """Draws x_s from q(x_s | x_t, x_theta).

    Reference: D3PM (arXiv:2107.03006), section 3; MDLM (arXiv:2406.07524) for
    absorbing and UDLM (arXiv:2412.10193) for uniform states.
    """

    def step(self, chain: Chain, xt: Tensor, step: Step) -> Tensor:
        return self.reverse(chain, xt, step.alpha_t, step.alpha_s, chain.free)


class AncestralCache(Ancestral):
    """`Ancestral` that keeps the network's output of a sequence until it changes.

    A lean step evaluates the network only for what changes, so there is little left
    to keep; it is the float32 draws of `use_float64=False` that gain. A network that
    knows the time is evaluated anew at every step.

    Reference: MDLM (arXiv:2406.07524), the cached sampler.
    """

    @classmethod
    def fits(cls, algorithm: type[Algorithm]) -> bool:
        return super().fits(algorithm) and algorithm.has_mask

    def remembers(self, model: Denoiser) -> bool:
        return not model.time_conditioning


class FirstHitting(Sampler):
    """One token at a time, at the times at which masks are revealed.

    Each mask is revealed when 1 - alpha falls below its own U(0, 1 - alpha_1), so the
    order of the times is drawn first and the network runs once per token: the limit of
    `Ancestral` in many steps, exactly. `sampling.steps` does not apply.

    Reference: Masked diffusion models are secretly time-agnostic (arXiv:2409.02908),
    the first-hitting sampler.
    """

    removals: ClassVar[dict[str, str]] = {"ancestral": "keep"}  # no noise is left
    removal_of_true = "ancestral"

    @classmethod
    def fits(cls, algorithm: type[Algorithm]) -> bool:
        return super().fits(algorithm) and algorithm.has_mask

    def run(self, chain: Chain, xt: Tensor, num_steps: int) -> Tensor:
        model = chain.model
        masked = chain.free & model.undecided(xt)
        num_masked = masked.sum(dim=-1)
        alpha_1 = model.noise(torch.ones((), dtype=torch.float64)).alpha_t
        mass = (1 - float(alpha_1)) * chain.uniform(xt.shape)  # 1 - alpha at reveal
        order = mass.masked_fill(~masked, -1).argsort(dim=-1, descending=True)
        for index in chain.progress(range(int(num_masked.max()))):
            position = order[:, index : index + 1]
            where = torch.zeros_like(masked).scatter(-1, position, True)
            where &= (index < num_masked)[:, None]
            alpha_t = 1 - mass.gather(-1, position)
            xt = self.reverse(chain, xt, alpha_t, torch.ones_like(alpha_t), where)
            chain.note(xt)
        return xt


class Analytic(Sampler):
    """Tweedie tau-leaping from scores s(y) = p_t(y) / p_t(x_t), absorbing state.

        p(x_s = y) ~ staggered(y) * transition(y),  d = sigma_t - sigma_s
        staggered(y)  = e^d s(y) + [y = m] (1 - e^d) sum_z s(z)
        transition(y) = e^-d [y = x_t] + (1 - e^-d) [x_t = m]

    So tokens stay, and with S = sum_{y != m} s(y) a mask is revealed with probability
    min(1, (e^d - 1) S), as y with probability s(y) / S, on which a temperature acts.

    Reference: SEDD (arXiv:2310.16834), analytic sampling.
    """

    removal_of_true = "ancestral"

    @classmethod
    def fits(cls, algorithm: type[Algorithm]) -> bool:
        return super().fits(algorithm) and algorithm.has_score

    def step(self, chain: Chain, xt: Tensor, step: Step) -> Tensor:
        alpha_t, alpha_s, _ = step
        return self._step(chain, xt, alpha_t, torch.expm1(torch.log(alpha_s / alpha_t)))

    def remove_by_draw(self, chain: Chain, xt: Tensor, alpha_t: Tensor) -> Tensor:
        """To sigma = 0, where no mask is left."""
        return self._step(chain, xt, alpha_t, torch.full_like(alpha_t, torch.inf))

    def _step(
        self, chain: Chain, xt: Tensor, alpha_t: Tensor, expm1_d: Tensor
    ) -> Tensor:
        """Reveals at the rate e^d - 1, (B, 1); infinity reveals every mask."""
        model = chain.model

        def revealed(tokens: Tokens) -> tuple[Tensor, Tensor]:
            """The probability to reveal a mask, (n,), and as what, (n, K)."""
            log_score = self.log_scores(model, tokens)
            log_total = log_score.logsumexp(dim=-1)
            rate = tokens.pick(expm1_d).to(log_total.dtype)
            reveal = (rate.log() + log_total).exp().clamp(max=1)
            p = tempered(log_score, self.temperature).softmax(dim=-1)
            return reveal, nucleus(p, self.p_nucleus)

        def whole_row(tokens: Tokens) -> Tensor:
            reveal, probs = revealed(tokens)
            probs = probs * reveal[:, None]
            probs[:, model.mask_index] = 1 - reveal
            return probs

        def drawn(tokens: Tokens) -> Tensor:
            if not self.is_lean or chain.is_guided:
                probs = self.guided([whole_row(each) for each in tokens.each()])
                return self.draw(probs, chain.generator)
            reveal, probs = revealed(tokens)
            reveals = (chain.uniform(reveal.shape) < reveal).nonzero().squeeze(-1)
            x = tokens.xt.clone()
            x[reveals] = self.draw(probs[reveals], chain.generator)
            return x

        where = chain.free & (xt == model.mask_index)  # whatever `undecided` says
        return chain.replace(xt, alpha_t, where, drawn)

    def log_scores(self, model: Denoiser, tokens: Tokens) -> Tensor:
        """log s(y) at masks, -inf for y = m, (n, K)."""
        log_score = model.log_score(
            self.widen(tokens.logits), alpha_t=tokens.alpha_t, sigma=tokens.sigma
        )
        log_score[:, model.mask_index] = -torch.inf
        return log_score
