"""What a one-step generator starts from: random tokens of which some are masked, and
noise on their embeddings.

One pass of a network gives independent tokens; that they fit together comes from what
it starts from.

Reference: Di[M]O (arXiv:2503.15457), token initialisation.

Shapes: B batch, L length, K vocabulary, D hidden size.
"""

import math
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor, nn

from distillation.masking import masked_count, masked_positions
from models.device import to_device, wide_dtype, widened
from training.row_streams import RowStream
from utils import ConfigError

# ---------------------------------------------------------------- how much is masked


class InitialRatio(NamedTuple):
    """Share of masked positions, one number for a whole batch: low, or U(low, high)."""

    low: float
    high: float

    @classmethod
    def of(cls, spec: str, key: str = "algo.r_init_mode") -> "InitialRatio":
        """From fix_R or random_A_B.

        Raises:
            ConfigError: If it is neither, or not within [0, 1].
        """
        number = r"(\d*\.?\d+|\d+\.)"
        pattern = "fix_N|random_N_N".replace("N", number)
        found = re.fullmatch(pattern, str(spec))
        if found is not None:
            fixed, low, high = found.groups()
            ratio = cls(float(fixed or low), float(fixed or high))
            if 0 <= ratio.low <= ratio.high <= 1:
                return ratio
        raise ConfigError(
            f"{key}={spec!r} is not fix (with algo.r_init) or random_A_B, with numbers "
            "0 <= A <= B <= 1."
        )

    @classmethod
    def of_config(cls, config: DictConfig) -> "InitialRatio":
        """`algo.r_init` where `algo.r_init_mode` is fix, else what that says."""
        ratio, mode = config.algo.r_init, config.algo.r_init_mode
        return cls(ratio, ratio) if mode == "fix" else cls.of(mode)

    def draw(self, generator: torch.Generator | None) -> float:
        """A fixed ratio draws nothing."""
        if self.low == self.high:
            return self.low
        u = torch.rand((), dtype=torch.float64, generator=generator)
        return self.low + (self.high - self.low) * float(u)


# ---------------------------------------------------------------- noise on embeddings

# By name: the level at a step, given the number behind the name.
_LEVELS: dict[str, Callable[[float, float], float]] = {
    "fix": lambda number, step: number,
    "warmup_exp": lambda number, step: 1 - math.exp(-step / number),
    "warmup_cos": lambda number, step: (
        (1 - math.cos(math.pi * min(step / number, 1))) / 2
    ),
    "warmup_linear": lambda number, step: min(step / number, 1),
}


class Perturbation(NamedTuple):
    """Level s of the noise, by step of the generator.

    fix_S: S;  warmup_exp_N: 1 - e^(-n / N);  warmup_linear_N: min(n / N, 1);
    warmup_cos_N: (1 - cos(pi min(n / N, 1))) / 2
    """

    name: str
    number: float

    @classmethod
    def of(cls, spec: str, key: str = "algo.noise_emb_perturb") -> "Perturbation":
        """Raises:
        ConfigError: If there is no such schedule, or S is not in [0, 1].
        """
        name, _, text = str(spec).rpartition("_")
        is_number = re.fullmatch(r"\d*\.?\d+|\d+\.", text) is not None
        if name in _LEVELS and is_number:
            number = float(text)
            if 0 <= number <= 1 if name == "fix" else number > 0:
                return cls(name, number)
        raise ConfigError(
            f"{key}={spec!r} is not fix_S with S from 0 to 1, warmup_exp_N, "
            "warmup_cos_N or warmup_linear_N with N updates above 0."
        )

    def level(self, step: int) -> float:
        """s, in [0, 1]."""
        return _LEVELS[self.name](self.number, step)


class Perturbed(NamedTuple):
    """Ids whose embeddings are mixed with Gaussian noise, as input of a network.

    s noise + sqrt(1 - s^2) embedding
    """

    ids: Tensor  # (B, L)
    noise: Tensor  # (B, L, D), standard normal
    level: float  # s

    def embed(self, embedding: Tensor) -> Tensor:
        rows = F.embedding(self.ids, embedding)
        noise = self.noise.to(rows.dtype)
        return self.level * noise + math.sqrt(1 - self.level**2) * rows


# ---------------------------------------------------------------- tokens

REMEMBERED = 256  # rows of text from which samples start where init_tokens=data


class InitialTokens(nn.Module):
    """x_init: tokens by `algo.init_tokens`, of which exactly max(1, round(r L)) masked.

    - uniform: each but the mask is as likely.
    - unigram: as likely as the teacher thinks of a token where it sees masks alone,
      averaged over positions; `table` is that law, (K,).
    - data: rows of the training text; `table` are the last ones, (R, L), from which
      samples start.

    With `algo.ignore_bos` the first token is bos, and masks are among the others.
    Tokens and places of masks are drawn on the host.

    Args:
        config: The run's config.
        vocab_size: K.
        mask_index: The mask's id.
        bos: Id of the first token.
    """

    table: Tensor

    def __init__(
        self, config: DictConfig, vocab_size: int, mask_index: int, bos: int
    ) -> None:
        super().__init__()
        algo, self.length = config.algo, config.model.length
        self.kind: str = algo.init_tokens
        self.ratio = InitialRatio.of_config(config)
        self.has_bos: bool = algo.ignore_bos
        self.vocab_size, self.mask_index, self.bos = vocab_size, mask_index, bos
        if self.kind == "unigram":
            self.register_buffer("table", torch.zeros(vocab_size))
        elif self.kind == "data":
            rows = torch.zeros(REMEMBERED, self.length, dtype=torch.long)
            self.register_buffer("table", rows)

    def draw(self, num_samples: int, generator: torch.Generator | None) -> Tensor:
        """x_init of samples, (B, L).

        Args:
            num_samples: B.
            generator: On any device; it seeds one on the host.
        """
        device = "cpu" if generator is None else generator.device
        seed = torch.randint(2**62, (), generator=generator, device=device)
        host = torch.Generator().manual_seed(int(seed))
        shape = (num_samples, self.length)
        if self.kind == "data":
            index = torch.randint(REMEMBERED, (num_samples,), generator=host)
            tokens = self.table[to_device(index, self.table.device)]
        else:
            tokens = self.tokens(shape, host)
        ratio = self.ratio.draw(host)
        return self.with_masks(tokens, torch.rand(shape, generator=host), ratio)

    def tokens(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Tokens that no text says, on the host or on the device of the model."""
        if self.kind != "unigram":
            ids = torch.randint(self.vocab_size - 1, shape, generator=generator)
            return self._but_mask(ids)
        u = torch.rand(shape, dtype=torch.float64, generator=generator)
        return self._by_frequency(u)

    def tokens_of(self, stream: RowStream) -> Tensor:
        """The same of rows, (B, L)."""
        if self.kind != "unigram":
            return self._but_mask(stream.integers(self.vocab_size - 1, self.length))
        return self._by_frequency(stream.uniform(self.length))

    def _but_mask(self, ids: Tensor) -> Tensor:
        """Ids among all but the mask as those of the vocabulary."""
        return ids + (ids >= self.mask_index)

    def _by_frequency(self, u: Tensor) -> Tensor:
        probs = self.table.to(wide_dtype(self.table.device), copy=True)
        probs[self.mask_index] = 0  # whatever a file says
        cdf = probs.cumsum(dim=0)
        index = torch.searchsorted(cdf, widened(u, cdf.device) * cdf[-1], right=True)
        return index.clamp(max=len(cdf) - 1)

    def with_masks(self, tokens: Tensor, u: Tensor, ratio: float) -> Tensor:
        """The tokens, on any device, with masks at places that u tells, (B, L)."""
        first = int(self.has_bos)
        count = masked_count(tokens.shape[1] - first, ratio)
        is_masked = to_device(masked_positions(u, count, first), tokens.device)
        return self.with_bos(tokens.masked_fill(is_masked, self.mask_index))

    def with_bos(self, tokens: Tensor) -> Tensor:
        """The tokens with bos in front, where it belongs there, (B, L)."""
        if not self.has_bos:
            return tokens
        return torch.cat([torch.full_like(tokens[:, :1], self.bos), tokens[:, 1:]], 1)

    def remember(self, rows: Tensor, numbers: Sequence[int]) -> None:
        """Keeps text from which samples start, in the place of the oldest.

        Args:
            rows: (B, L).
            numbers: How many rows the run had before each.
        """
        if self.kind == "data":
            places = torch.tensor(numbers) % REMEMBERED
            self.table[to_device(places, rows.device)] = rows
