"""Metrics of likelihood (val/nll, val/bpd, val/ppl with standard errors) and of
samples (entropy, generative perplexity), and the unigram baseline.

Nothing here knows about algorithms. Units: nats per token unless a name says bits.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import torchmetrics
from torch import Tensor

from utils import ConfigError, first_line, hub_options, wide_dtype


class Likelihood(torchmetrics.Metric):
    """Corpus negative log-likelihood per token, with its standard error.

        nll = sum_i x_i / sum_i n_i,   bpd = nll / log 2,   ppl = exp(nll)

    for sequences i with summed loss x_i (nats) and n_i valid tokens. The standard
    error is that of a ratio estimator over independent sequences (delta method):

        se^2 = N / (N - 1) * sum_i (x_i - nll n_i)^2 / (sum_i n_i)^2

    It covers the choice of sequences and the draw of one time per sequence. Times
    are stratified within a batch, so for diffusion models it errs on the safe side.
    """

    full_state_update = False
    _STATES = ("nll_sum", "token_sum", "nll_sq", "nll_token", "token_sq", "count")

    def __init__(self) -> None:
        super().__init__()
        for name in self._STATES:
            zero = torch.zeros((), dtype=wide_dtype())
            self.add_state(name, default=zero, dist_reduce_fx="sum")

    def update(self, nlls: Tensor, num_tokens: Tensor) -> None:
        """Adds sequences.

        Args:
            nlls: Loss of each sequence summed over its valid tokens, nats, (N,).
            num_tokens: Valid tokens of each sequence, (N,).
        """
        x, n = nlls.detach().to(self.nll_sum), num_tokens.to(self.nll_sum)
        self.nll_sum += x.sum()
        self.token_sum += n.sum()
        self.nll_sq += (x * x).sum()
        self.nll_token += (x * n).sum()
        self.token_sq += (n * n).sum()
        self.count += x.numel()

    def compute(self) -> dict[str, Tensor]:
        """nll, bpd, ppl and the standard error of each (NaN below two sequences)."""
        nll = self.nll_sum / self.token_sum
        residual = self.nll_sq - 2 * nll * self.nll_token + nll**2 * self.token_sq
        variance = self.count / (self.count - 1) * residual.clamp(min=0)
        stderr = variance.sqrt() / self.token_sum
        ppl = nll.exp()
        return {
            "nll": nll,
            "bpd": nll / math.log(2),
            "ppl": ppl,
            "nll_stderr": stderr,
            "bpd_stderr": stderr / math.log(2),
            "ppl_stderr": ppl * stderr,
        }


def sample_entropy(x: Tensor) -> Tensor:
    """Entropy of each sample's own token histogram, (N, L) -> (N,), nats.

    Low values betray repetitive samples, which a judge model scores too well.
    """
    _, num_tokens = x.shape
    entropies = []
    for sample in x:
        _, counts = sample.unique(return_counts=True)
        p = counts.to(wide_dtype(x.device)) / num_tokens
        entropies.append(-(p * p.log()).sum())
    return torch.stack(entropies)


def unigram_nll(train: np.ndarray, valid: np.ndarray, vocab_size: int) -> float:
    """Nats per token of a unigram model with add-one smoothing.

    The floor that any language model must beat clearly.

    Args:
        train, valid: Token ids, any shape.
        vocab_size: K.
    """
    counts = np.bincount(train.ravel(), minlength=vocab_size) + 1.0
    log_p = np.log(counts / counts.sum())
    return float(-log_p[valid.ravel()].mean())


class GenerativePerplexity:
    """Perplexity of generated texts under a judge language model.

    The judge is loaded once. A text is tokenised by the judge's tokenizer, cut to
    `max_length` tokens and padded with eos to the longest text of its batch. A token
    counts if it is not eos, or if it is the first eos of its text, padding included;
    every text counts, the last batch included.

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
        self.model = self.model.eval().requires_grad_(False).to(device)
        self.nll_sum = 0.0
        self.num_tokens = 0

    def __call__(self, texts: Sequence[str]) -> float | None:
        """Perplexity of these texts alone."""
        self.nll_sum, self.num_tokens = 0.0, 0
        self.update(texts)
        return self.compute()

    def update(self, texts: Sequence[str]) -> None:
        """Scores texts and adds them to the average."""
        eos = self.tokenizer.eos_token_id
        for start in range(0, len(texts), self.batch_size):
            batch = self.tokenizer(
                list(texts[start : start + self.batch_size]),
                return_tensors="pt",
                padding=True,
                truncation=True,
                max_length=self.max_length,
                return_token_type_ids=False,
            ).to(self.model.device)
            if batch["input_ids"].shape[1] > 1:
                self.add(batch["input_ids"], batch["attention_mask"], eos)

    @torch.no_grad()
    def add(self, ids: Tensor, attention_mask: Tensor, eos: int) -> None:
        """Adds tokenised texts, (N, L); see `counted_tokens` for what counts."""
        logits = self.model(ids, attention_mask=attention_mask).logits[:, :-1]
        nll = F.cross_entropy(
            logits.float().transpose(1, 2), ids[:, 1:], reduction="none"
        )
        counted = counted_tokens(ids, eos)[:, 1:]
        self.nll_sum += float((nll.to(wide_dtype(nll.device)) * counted).sum())
        self.num_tokens += int(counted.sum())

    def compute(self) -> float | None:
        """Perplexity of all texts so far; None if no token counted."""
        if not self.num_tokens:
            return None
        return math.exp(self.nll_sum / self.num_tokens)


def counted_tokens(ids: Tensor, eos: int) -> Tensor:
    """True where a token is not eos or is its text's first eos, (N, L)."""
    is_eos = ids == eos
    return ~is_eos | (is_eos.cumsum(dim=-1) == 1)


def _load_judge(name_or_path: str) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        options = hub_options(name_or_path)
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, **options)
        model = AutoModelForCausalLM.from_pretrained(name_or_path, **options)
    except (OSError, ValueError) as error:
        reason = first_line(error)
        raise ConfigError(
            f"eval.gen_ppl_eval_model_name_or_path={name_or_path!r} cannot be loaded "
            f"({reason}). Set it to the folder of a causal language model, or to null "
            "to do without generative perplexity."
        ) from None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    return tokenizer, model
