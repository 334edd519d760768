"""A generator of samples in one pass, of which some tokens are masked again: what of a
distillation to one step is drawn.

Reference: Di[M]O (arXiv:2503.15457).

Shapes: B batch, L length, K vocabulary, D hidden size, N tokens.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig
from torch import Tensor

from algo import MDLM
from diffusion.base import flat_positions
from distillation.initial import InitialRatio, InitialTokens, Perturbation, Perturbed
from distillation.masking import RATIO_LAWS, masked_count, masked_positions
from models.device import to_device, widened
from models.head import draw_chunk_size
from models.network import Network
from sampling.categorical import at_quantile


class Draws(NamedTuple):
    """What one pass of the generator is given at random."""

    x_init: Tensor | Perturbed  # (B, L)
    u: Tensor  # U(0, 1) of the draw of each token, (B, L)


class Drawn(NamedTuple):
    """One pass of the generator."""

    hidden: Tensor  # (B, L, D)
    u: Tensor  # as in `Draws`


class Masks(NamedTuple):
    """Which tokens of samples are masked."""

    where: Tensor  # (B, L) bool
    masked: Tensor  # flat positions of these tokens, (N,)
    others: Tensor  # of the others
    share: float  # of one masked token in the mean over those of an update


class Generator(MDLM):
    """A network that makes a sample in one pass, each token by itself.

        x_i ~ softmax(z_i(x_init) / gen_temp),  never the mask

    It may change every token of x_init: none is carried over. In training, what is
    drawn for a row depends on its place in the global batch alone, so that however
    that is cut into parts, the same is drawn.
    """

    is_discrete_time = False
    has_estimators = False
    has_blocks = False
    loss_types = ("elbo",)
    is_one_step = True

    def __init__(self, config: DictConfig, tokenizer: Any) -> None:
        super().__init__(config, tokenizer)
        bos = tokenizer.bos_token_id
        self.initial = InitialTokens(config, self.vocab_size, self.mask_index, bos)
        self.perturbation = Perturbation.of(config.algo.noise_emb_perturb)
        self.steps_read = 0  # updates of the weights that were read
        self._networks: list[Network] = []  # the last is in the place of `backbone`

    @classmethod
    def validate_config(cls, config: DictConfig) -> None:
        super().validate_config(config)
        InitialRatio.of_config(config)
        Perturbation.of(config.algo.noise_emb_perturb)

    @classmethod
    def needs_soft_inputs(cls, config: DictConfig) -> bool:
        return Perturbation.of(config.algo.noise_emb_perturb) != ("fix", 0)

    @property
    def network(self) -> Network:
        return self._networks[-1] if self._networks else self.backbone

    @contextmanager
    def through(self, network: Network) -> Iterator[None]:
        """Has another network, with its head, denoise."""
        self._networks.append(network)
        try:
            yield
        finally:
            self._networks.pop()

    # ---- one pass of the generator

    def generator_hidden(self, x_init: Tensor | Perturbed) -> Tensor:
        """Hidden states of theta at x_init, (B, L) -> (B, L, D)."""
        ids = x_init if isinstance(x_init, Tensor) else x_init.ids
        return self.backbone.trunk(x_init, self.condition(no_noise(ids)))

    def perturbed(
        self,
        ids: Tensor,
        generator: torch.Generator | None,
        of_rows: Iterable[torch.Generator] = (),
    ) -> Tensor | Perturbed:
        """Initial tokens (B, L) with noise on their embeddings.

        Args:
            ids: The tokens.
            generator: On their device.
            of_rows: Those of each row, in the place of one for all.
        """
        level = self.perturbation.level(self.steps_done)
        if level == 0:
            return ids
        shape = (*ids.shape, self.backbone.input_embedding.shape[1])
        if not of_rows:
            noise = torch.randn(shape, generator=generator, device=ids.device)
        else:
            noise = torch.empty(shape, device=ids.device)
            for row, its in zip(noise, of_rows, strict=True):
                row.normal_(generator=its)
        return Perturbed(ids, noise, level)

    @property
    def steps_done(self) -> int:
        """Updates of the generator, those of weights that were read included."""
        return max(self.global_step, self.steps_read)

    def generated_logits(self, logits: Tensor) -> Tensor:
        """z_theta / `algo.gen_temp`, and no mask, (..., K)."""
        is_mask = torch.arange(logits.shape[-1], device=logits.device)
        scaled = logits / self.config.algo.gen_temp
        return scaled.masked_fill(is_mask == self.mask_index, -torch.inf)

    @torch.no_grad()
    def tokens(self, drawn: Drawn, where: Tensor | None = None) -> Tensor:
        """x ~ p_theta(. | x_init), a chunk of tokens at a time, (B, L).

        Args:
            drawn: A pass of theta.
            where: Flat positions to draw, (N,); the others are 0. None is all.
        """
        hidden, u = drawn.hidden.flatten(0, 1), drawn.u.flatten()
        x = torch.zeros(len(hidden), dtype=torch.long, device=hidden.device)
        if where is None:
            where = torch.arange(len(hidden), device=hidden.device)
        for part in where.split(self._chunk()):
            logits = self.logits_for_loss(hidden[part]).to(u.dtype)
            probs = self.generated_logits(logits).softmax(dim=-1)
            x[part] = at_quantile(probs, u[part])
        return self.initial.with_bos(x.view(drawn.u.shape))

    def _chunk(self) -> int:
        return draw_chunk_size(self.vocab_size, self.device.type)

    def draws(self, x0: Tensor, purpose: str, batch_idx: int) -> Draws:
        """What a pass of theta in training is given.

        Args:
            x0: Text, (B, L); only `algo.init_tokens=data` looks at it.
            purpose: Of the draws.
            batch_idx: Position in the epoch.
        """
        (B, L), device = x0.shape, x0.device
        rows = self.row_indices(B, batch_idx)
        ratio = self.initial.ratio.draw(self.shared_generator(f"{purpose}/ratio"))
        stream = self.row_stream(purpose, rows)
        positions, u = stream.uniform(L), stream.uniform(L)
        if self.initial.kind == "data":
            tokens = x0
        else:
            tokens = to_device(self.initial.tokens_of(stream), device)
        ids = self.initial.with_masks(tokens, positions, ratio)
        of_rows = self.row_stream(f"{purpose}/noise", rows).generators(device)
        return Draws(self.perturbed(ids, None, of_rows), widened(u, device))

    def run_generator(self, draws: Draws) -> Drawn:
        """One pass of theta."""
        return Drawn(self.generator_hidden(draws.x_init), draws.u)

    def masks(self, shape: torch.Size, purpose: str, law: str, batch_idx: int) -> Masks:
        """Masks of samples (B, L), exactly max(1, round(r L)) at drawn ratios r.

        Args:
            shape: Of the samples.
            purpose: Of the draws.
            law: Of the ratios, a name of `RATIO_LAWS`.
            batch_idx: Position in the epoch.
        """
        (B, L), algo, device = shape, self.config.algo, self.device
        first = int(self.ignore_bos)
        rows = self.row_indices(B, batch_idx)
        whole = range(self.config.loader.global_batch_size) if self.training else rows
        u = self.uniforms(f"{purpose}/share", whole)
        ratio = RATIO_LAWS[law](u).clamp(algo.ratio_min, algo.ratio_max)
        counts = masked_count(L - first, ratio)  # of the whole global batch
        positions = self.row_stream(f"{purpose}/masks", rows).uniform(L)
        own = counts[[row - whole.start for row in rows], None]
        # Gradients of the parts of a global batch are averaged.
        share = len(counts) / (B * int(counts.sum()))
        where = masked_positions(positions, own, first)
        masked, others = (flat_positions(x, device) for x in (where, ~where))
        return Masks(to_device(where, device), masked, others, share)

    def initial_tokens(
        self, num_samples: int, generator: torch.Generator | None = None
    ) -> Tensor:
        """x_init of samples, (B, L)."""
        return to_device(self.initial.draw(num_samples, generator), self.device)


def no_noise(ids: Tensor) -> Tensor:
    """Noise levels for a network that is told none, (B, L) -> (B, 1)."""
    return torch.zeros(len(ids), 1, device=ids.device)
