"""Samplers from left to right: token by token, or window by window.

Shapes: B batch, L length, K vocabulary, D hidden size.
"""

from typing import Any, cast

import torch
from omegaconf import DictConfig
from torch import Tensor

from models.attention import KVCache
from sampling.categorical import nucleus, tempered
from sampling.denoiser import Algorithm, LeftToRight, Model
from sampling.prompts import Given
from sampling.recording import Recorder
from sampling.reverse_process import Chain, Samples
from sampling.sampler import Sampler
from utils import ConfigError


class AutoRegressive(Sampler):
    """Token by token from bos, with a cache of keys and values.

    `sampling.steps` and noise removal do not apply.
    """

    starts_from_noise = False

    @classmethod
    def fits(cls, algorithm: type[Algorithm]) -> bool:
        return algorithm.is_autoregressive

    def run(self, chain: Chain, xt: Tensor, num_steps: int) -> Tensor:
        model, length = cast(LeftToRight, chain.model), xt.shape[1]
        x = xt.clone()
        given = (~chain.free).all(dim=0).long().cumprod(dim=0).sum()
        start = int(given)  # what every sequence begins with goes in at once
        cache, new = KVCache(length), x[:, :start]
        for position in chain.progress(range(start, length)):
            hidden = model.hidden(new, cache)[:, -1]  # (B, D)
            rows = torch.arange(len(x), device=x.device).split(chain.chunk)
            drawn = [self._draw(chain, hidden[part], part, position) for part in rows]
            free = chain.free[:, position]
            x[:, position] = torch.where(free, torch.cat(drawn), x[:, position])
            new = x[:, position : position + 1]
            chain.note(x[:, : position + 1])
        chain.evaluations += length - start
        return x

    def _draw(
        self, chain: Chain, hidden: Tensor, rows: Tensor, position: int
    ) -> Tensor:
        """Next tokens of some rows, (n, D) -> (n,)."""
        model = cast(LeftToRight, chain.model)
        logits = model.logits_for_loss(hidden)
        chain.note_logits(logits)
        log_p = model.process_logits(self.widen(logits))
        p = nucleus(tempered(log_p, self.temperature).exp(), self.p_nucleus)
        x = self.draw(p, chain.generator)
        if chain.recorder is not None:
            columns = torch.full_like(rows, position)
            chain.recorder.drew_from(log_p.exp(), x, rows, columns)
        return x


class SemiAutoRegressive:
    """Windows from left to right: each keeps the last L - S tokens of the one before
    and draws S new ones, K = `sampling.num_strides` times after the first window.

    Nothing that was drawn is drawn again; samples have L + K S tokens.

    Args:
        sampler: Draws a window, given its left part.
        stride: S, with 0 < S < L.
        num_strides: K.

    Reference: MDLM (arXiv:2406.07524), semi-autoregressive generation; SSD-LM.
    """

    def __init__(self, sampler: Sampler, stride: int, num_strides: int) -> None:
        self.sampler = sampler
        self.stride = stride
        self.num_strides = num_strides

    @classmethod
    def validate_config(cls, config: DictConfig, algorithm: type[Algorithm]) -> None:
        """Refuses settings that make no sense window by window.

        Args:
            config: The run's config.
            algorithm: The class of the model that samples are drawn from.
        """
        sampling = config.sampling
        if algorithm.is_autoregressive:
            raise ConfigError(
                "sampling.semi_ar=True is for diffusion models, not "
                f"algo={config.algo.name}; the only value is False."
            )
        if sampling.noise_removal in ("none", False):
            raise ConfigError(
                f"sampling.noise_removal={sampling.noise_removal!r} would leave noise "
                "in the windows of sampling.semi_ar=True; choose ancestral or greedy."
            )
        if not 0 < sampling.stride_length < config.model.length:
            raise ConfigError(
                f"sampling.stride_length={sampling.stride_length} is not above 0 and "
                f"below model.length={config.model.length}."
            )

    def length(self, num_tokens: int) -> int:
        return num_tokens + self.num_strides * self.stride

    def draw_dtype(self, device: torch.device) -> torch.dtype:
        return self.sampler.draw_dtype(device)

    def __call__(
        self,
        model: Model,
        num_samples: int,
        *,
        given: Given | None = None,
        recorder: Recorder | None = None,
        **options: Any,
    ) -> Samples:
        """Draws samples; arguments as for `Sampler`, `given` of (B, L + K S)."""
        L, S = model.num_tokens, self.stride
        if given is None:
            length = self.length(L)
            given = Given.nothing(num_samples, length, model.device)
        given = given.to(model.device)
        if recorder is not None:
            recorder.begin_samples(*given)
        tokens, known = given.tokens.clone(), given.known.clone()
        evaluations = torch.zeros_like(known[:, 0], dtype=torch.long)
        for start in range(0, self.num_strides * S + 1, S):
            window = Given(tokens, known).window(start, L)
            if recorder is not None:
                recorder.move(start)
            samples = self.sampler(
                model, num_samples, given=window, recorder=recorder, **options
            )
            tokens[:, start : start + L] = samples.tokens
            known[:, start : start + L] = True
            evaluations += samples.evaluations
        return Samples(tokens, evaluations)
