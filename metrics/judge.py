"""Samples judged by a language model: generative perplexity, and MAUVE.

Units: nats unless a name says bits.
"""

import functools
import importlib.util
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from metrics.likelihood import Likelihood
from models.device import wide_dtype
from utils import ConfigError, NotFinite, first_line, hub_options


class TextScores(NamedTuple):
    """What a judge says of texts."""

    nll: Tensor  # summed over the tokens that count, nats, (N,) float64
    num_tokens: Tensor  # that count, (N,)

    def perplexity(self) -> tuple[float, float] | None:
        """Of all texts, with its standard error; None if no token counts."""
        if not self.num_tokens.sum():
            return None
        likelihood = Likelihood()
        likelihood.update(*self)
        results = likelihood.compute()
        return float(results["ppl"]), float(results["ppl_stderr"])


class GenerativePerplexity:
    """Perplexity of generated texts under a judge language model.

    The judge is loaded once. A text is tokenised by the judge's tokenizer, cut to
    `max_length` tokens and padded with eos to the longest text of its batch. A token
    counts if it is not eos, or if it is the first eos of its text, padding included;
    every text counts, the last batch included. Texts longer than the judge's context
    are scored a context at a time, each on its own.

    Args:
        name_or_path: Folder or hub id of any causal language model.
        batch_size: Texts scored at a time.
        max_length: Longest text, in the judge's tokens.
        device: Where the judge runs.

    Raises:
        ConfigError: If the judge cannot be loaded; the line says what to set.
    """

    def __init__(
        self,
        name_or_path: str,
        *,
        batch_size: int,
        max_length: int,
        device: torch.device | str = "cpu",
    ) -> None:
        self.batch_size = batch_size
        self.max_length = max_length
        self.tokenizer, self.model = _load_judge(name_or_path)
        self.model = self.model.eval().requires_grad_(False)
        positions = getattr(self.model.config, "max_position_embeddings", None)
        self.context: int = positions or max_length
        self.to(device)

    def to(self, device: torch.device | str) -> None:
        self.model = self.model.to(device)

    def __call__(self, texts: Sequence[str]) -> float | None:
        """Perplexity of these texts; None if no token counts."""
        result = self.score(texts).perplexity()
        return None if result is None else result[0]

    def score(self, texts: Sequence[str]) -> TextScores:
        """Each text's likelihood."""
        scores = [self.score_ids(**batch) for batch in self._batches(texts)]
        empty = TextScores(torch.zeros(0, dtype=torch.float64), torch.zeros(0))
        return TextScores(*map(torch.cat, zip(empty, *scores, strict=True)))

    @torch.no_grad()
    def score_ids(self, input_ids: Tensor, attention_mask: Tensor) -> TextScores:
        """Each tokenised text's likelihood, (N, L); see `counted_tokens`."""
        nll = torch.zeros(len(input_ids), dtype=wide_dtype(input_ids.device))
        num_tokens = torch.zeros(len(input_ids))
        for ids, mask in zip(
            input_ids.split(self.context, dim=1),
            attention_mask.split(self.context, dim=1),
            strict=True,
        ):
            if ids.shape[1] < 2:  # nothing is left to predict
                continue
            logits = self.model(ids, attention_mask=mask).logits[:, :-1]
            losses = F.cross_entropy(
                logits.float().transpose(1, 2), ids[:, 1:], reduction="none"
            )
            counted = counted_tokens(ids, self.tokenizer.eos_token_id)[:, 1:]
            nll += (losses.to(nll.dtype) * counted).sum(dim=-1).cpu()
            num_tokens += counted.sum(dim=-1).cpu()
        if not nll.isfinite().all():
            raise NotFinite(
                "The judge gives samples a likelihood that is not finite, so there are "
                "no numbers: its weights are damaged. Give another one by "
                "eval.gen_ppl_eval_model_name_or_path, or null for none."
            )
        return TextScores(nll, num_tokens)

    @torch.no_grad()
    def features(self, texts: Sequence[str]) -> np.ndarray:
        """The judge's last hidden state at each text's last token, (N, D): MAUVE's."""
        rows = []
        for batch in self._batches(texts):
            ids, mask = (x[:, : self.context] for x in batch.values())
            hidden = self.model(ids, attention_mask=mask, output_hidden_states=True)
            last = mask.sum(dim=-1).clamp(min=1) - 1
            state = hidden.hidden_states[-1][torch.arange(len(ids)), last]
            rows.append(state.float().cpu().numpy())
        return np.concatenate(rows)

    def _batches(self, texts: Sequence[str]) -> Iterator[dict[str, Tensor]]:
        for start in range(0, len(texts), self.batch_size):
            batch = self.tokenizer(
                list(texts[start : start + self.batch_size]),
                return_tensors="pt",
                padding=True,
                truncation=True,
                max_length=self.max_length,
                return_token_type_ids=False,
            ).to(self.model.device)
            names = ("input_ids", "attention_mask")
            yield {name: batch[name].long() for name in names}


def require_mauve() -> None:
    """Refuses to compare with references where the package is not installed.

    Raises:
        ConfigError: With the command that installs it.
    """
    if importlib.util.find_spec("mauve") is None:
        raise ConfigError(
            "eval.mauve_references is set, but MAUVE is not installed; run pip install "
            "mauve-text, or set it to null."
        )


def mauve_score(references: np.ndarray, samples: np.ndarray, seed: int) -> float:
    """MAUVE between two sets of features, (N, D) each; 1 if they are alike.

    Reference: MAUVE (arXiv:2102.01454), with its package's defaults.
    """
    import mauve  # optional

    result = mauve.compute_mauve(
        p_features=references, q_features=samples, seed=seed, verbose=False
    )
    return float(result.mauve)


def counted_tokens(ids: Tensor, eos: int) -> Tensor:
    """True where a token is not eos or is its text's first eos, (N, L)."""
    is_eos = ids == eos
    return ~is_eos | (is_eos.cumsum(dim=-1) == 1)


@functools.lru_cache(maxsize=1)  # the runs of a sweep share it
def _load_judge(name_or_path: str) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        options = hub_options(name_or_path) | {"trust_remote_code": False}
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, **options)
        model = AutoModelForCausalLM.from_pretrained(name_or_path, **options)
    except (OSError, ValueError) as error:
        reason = first_line(error)
        raise ConfigError(
            f"eval.gen_ppl_eval_model_name_or_path={name_or_path!r} cannot be loaded "
            f"({reason}). Set it to the folder of a causal language model, or to null "
            "to do without generative perplexity."
        ) from None
    if tokenizer.eos_token is not None:  # which of them count is the eos rule's to say
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    return tokenizer, model
