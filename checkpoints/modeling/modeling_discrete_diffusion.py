"""Discrete diffusion language models, and left-to-right ones of the same family.

    auto = AutoModelForMaskedLM  # AutoModelForCausalLM for left-to-right models
    model = auto.from_pretrained(folder, trust_remote_code=True)
    logits = model(input_ids, timesteps).logits
    ids = model.generate(num_samples=4, num_steps=128, seed=1)

Needs torch and transformers. Shapes: B batch, L length, K vocabulary, D hidden size,
H heads, n tokens of a chunk. alpha_t is the probability that a token is still clean at
time t, from 1 at t = 0 down to next to 0 at t = 1.
"""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput, MaskedLMOutput

from .configuration_discrete_diffusion import DiscreteDiffusionConfig

# Keys and values of earlier tokens by layer, (B, l, H, D / H) each.
Cache = dict[int, tuple[Tensor, Tensor]]

NEG_INFINITY = -1e6
TIME_EPS = 1e-5  # last time of the grid; the last draw goes from there to 0
# Bytes of a chunk's probabilities, over two. The order of draws depends on it.
CHUNK_BYTES = {"cpu": 16 * 2**20, "cuda": 512 * 2**20, "mps": 128 * 2**20}


# ---------------------------------------------------------------- network


class Embedding(nn.Module):
    def __init__(self, vocab_size: int, hidden_dim: int) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.empty(vocab_size, hidden_dim))
        nn.init.kaiming_uniform_(self.embedding, a=math.sqrt(5))

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.embedding)


class NoiseEmbedding(nn.Module):
    """Sinusoids of the noise level, then a two-layer MLP: (B,) -> (B, C)."""

    num_features = 256

    def __init__(self, cond_dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(self.num_features, cond_dim),
            nn.SiLU(),
            nn.Linear(cond_dim, cond_dim),
        )

    def forward(self, sigma: Tensor) -> Tensor:
        half = self.num_features // 2
        exponent = torch.arange(half, dtype=torch.float32, device=sigma.device) / half
        angle = sigma.float()[:, None] * torch.exp(-math.log(10_000) * exponent)
        features = torch.cat([angle.cos(), angle.sin()], dim=-1)
        return self.mlp(features.to(self.mlp[0].weight.dtype))


class Rotary(nn.Module):
    """Tables of the rotary position embedding, in float32."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.register_buffer("inv_freq", self.frequency())  # in checkpoints

    def frequency(self, device: torch.device | None = None) -> Tensor:
        """Not `inv_freq`, which a cast of the model rounds, (head_dim / 2,)."""
        steps = torch.arange(0, self.head_dim, 2, dtype=torch.float32, device=device)
        return 1.0 / 10_000.0 ** (steps / self.head_dim)

    def forward(self, length: int) -> tuple[Tensor, Tensor]:
        """cos and sin, each (L, 1, head_dim)."""
        device = self.inv_freq.device
        position = torch.arange(length, dtype=torch.float32, device=device)
        angle = torch.outer(position, self.frequency(device)).repeat(1, 2)[:, None]
        return angle.cos(), angle.sin()


def rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Rotates queries or keys by their position, (B, L, H, head_dim)."""
    cos, sin = rotary
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)


class LayerNorm(nn.Module):
    """Layer norm with a weight and no bias, in float32."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.float()
        normed = F.layer_norm(x.float(), weight.shape, weight, eps=1e-5)
        return normed.to(self.weight.dtype)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale) + shift


class Block(nn.Module):
    """Pre-norm attention and MLP; with conditioning, adaLN-Zero around both."""

    def __init__(self, config: DiscreteDiffusionConfig, layer: int) -> None:
        super().__init__()
        D = config.hidden_dim
        self.n_heads = config.n_heads
        self.dropout = config.dropout
        self.causal = config.causal
        self.layer = layer
        self.norm1 = LayerNorm(D)
        self.attn_qkv = nn.Linear(D, 3 * D, bias=False)
        self.attn_out = nn.Linear(D, D, bias=False)
        self.norm2 = LayerNorm(D)
        self.mlp = nn.Sequential(
            nn.Linear(D, 4 * D), nn.GELU(approximate="tanh"), nn.Linear(4 * D, D)
        )
        if not config.causal:
            self.adaLN_modulation = zero_linear(config.cond_dim, 6 * D)

    def forward(
        self,
        h: Tensor,
        c: Tensor | None,
        rotary: tuple[Tensor, Tensor],
        cache: Cache | None,
    ) -> Tensor:
        """(B, L, D) -> (B, L, D)."""
        if c is None:
            h = h + self._drop(self._attention(self.norm1(h), rotary, cache))
            return h + self._drop(self.mlp(self.norm2(h)))
        modulation = self.adaLN_modulation(c)[:, None].chunk(6, dim=-1)  # (B, 1, D)
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = modulation
        x = modulate(self.norm1(h), shift_attn, scale_attn)
        h = h + gate_attn * self._drop(self._attention(x, rotary, None))
        x = modulate(self.norm2(h), shift_mlp, scale_mlp)
        return h + gate_mlp * self._drop(self.mlp(x))

    def _attention(
        self, x: Tensor, rotary: tuple[Tensor, Tensor], cache: Cache | None
    ) -> Tensor:
        q, k, v = self.attn_qkv(x).unflatten(-1, (3, self.n_heads, -1)).unbind(2)
        q, k = rotate(q, rotary), rotate(k, rotary)
        if cache is not None:
            if self.layer in cache:
                past_k, past_v = cache[self.layer]
                k, v = torch.cat([past_k, k], dim=1), torch.cat([past_v, v], dim=1)
            cache[self.layer] = k, v
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, H, L, D / H)
        is_causal = self.causal and q.shape[2] > 1  # the last token sees all
        out = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)
        return self.attn_out(out.transpose(1, 2).flatten(2))

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)


class OutputLayer(nn.Module):
    """Final norm with modulation, and the linear map onto the vocabulary."""

    def __init__(self, config: DiscreteDiffusionConfig) -> None:
        super().__init__()
        self.norm_final = LayerNorm(config.hidden_dim)
        self.linear = zero_linear(config.hidden_dim, config.vocab_size)
        if not config.causal:
            self.adaLN_modulation = zero_linear(config.cond_dim, 2 * config.hidden_dim)

    def modulated_norm(self, h: Tensor, c: Tensor | None) -> Tensor:
        h = self.norm_final(h)
        if c is None:
            return h
        return modulate(h, *self.adaLN_modulation(c)[:, None].chunk(2, dim=-1))


def zero_linear(in_features: int, out_features: int) -> nn.Linear:
    """A linear map that starts at zero."""
    linear = nn.Linear(in_features, out_features)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


class Backbone(nn.Module):
    """Diffusion transformer; `causal` drops the conditioning and masks the future."""

    def __init__(self, config: DiscreteDiffusionConfig) -> None:
        super().__init__()
        self.vocab_embed = Embedding(config.vocab_size, config.hidden_dim)
        self.sigma_map = None if config.causal else NoiseEmbedding(config.cond_dim)
        self.rotary_emb = Rotary(config.hidden_dim // config.n_heads)
        blocks = (Block(config, layer) for layer in range(config.n_blocks))
        self.blocks = nn.ModuleList(blocks)
        self.output_layer = OutputLayer(config)

    def forward(
        self, ids: Tensor, sigma: Tensor | None, cache: Cache | None = None
    ) -> list[Tensor]:
        """Hidden states, (B, L, D) each: embedding, blocks, and what the head sees."""
        h = self.vocab_embed(ids)
        c = None if self.sigma_map is None else F.silu(self.sigma_map(sigma))
        start = cache[0][0].shape[1] if cache else 0
        tables = self.rotary_emb(start + ids.shape[1])
        rotary = tuple(table[start:] for table in tables)
        states = [h]
        for block in self.blocks:
            states.append(block(states[-1], c, rotary, cache))
        return [*states, self.output_layer.modulated_norm(states[-1], c)]


# ---------------------------------------------------------------- sampling

# Signal levels at times t from settings: eps, or -log(alpha_t) at t = 0 and t = 1.
ALPHAS: dict[str, Callable[..., Tensor]] = {
    "log-linear": lambda t, eps: 1 - (1 - eps) * t,
    "cosine": lambda t, eps: 1 - torch.cos(math.pi / 2 * (1 - (1 - eps) * t)),
    "cosine-mdlm": lambda t, eps: eps + (1 - eps) * torch.cos(math.pi / 2 * t),
    "cosinesqr": lambda t, eps: eps + (1 - eps) * torch.cos(math.pi / 2 * t) ** 2,
    "linear": lambda t, low, high: torch.exp(-low - t * (high - low)),
    "geometric": lambda t, low, high: torch.exp(-low * (high / low) ** t),
}


def inverse_cdf(probs: Tensor, generator: torch.Generator | None) -> Tensor:
    """Draws from the last axis with one uniform per row, (n, K) -> (n,)."""
    cdf = probs.cumsum(dim=-1)
    u = uniform((len(cdf), 1), cdf, generator)
    return torch.searchsorted(cdf, u * cdf[:, -1:], right=True).squeeze(-1)


def uniform(
    shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None
) -> Tensor:
    """U[0, 1) in the type and on the device of `like`."""
    return torch.rand(shape, dtype=like.dtype, device=like.device, generator=generator)


def nucleus(probs: Tensor, top_p: float) -> Tensor:
    """Keeps the smallest set of tokens with mass above top_p, renormalised, (n, K)."""
    if top_p >= 1:
        return probs
    values, tokens = probs.sort(dim=-1, descending=True)
    values = values.masked_fill(values.cumsum(dim=-1) - values > top_p, 0)
    values = values / values.sum(dim=-1, keepdim=True)
    return torch.zeros_like(probs).scatter(-1, tokens, values)


def without_mask(logits: Tensor, mask_index: int | None) -> Tensor:
    """Logits whose mask entry, if there is one, has next to no probability."""
    if mask_index is None:
        return logits
    is_mask = torch.arange(logits.shape[-1], device=logits.device) == mask_index
    return logits + torch.where(is_mask, NEG_INFINITY, 0.0).to(logits.dtype)


class Absorbing:
    """Each token turns into the mask with probability 1 - alpha_t."""

    def __init__(self, config: DiscreteDiffusionConfig) -> None:
        self.mask_index = config.mask_index

    def prior(self, x: Tensor, generator: torch.Generator | None) -> Tensor:
        return torch.full_like(x, self.mask_index)

    def change_bound(self, xt: Tensor, alpha_t: Tensor, alpha_s: Tensor) -> Tensor:
        """Probability with which `changed` is asked, whatever the network says."""
        return (xt == self.mask_index) * ((alpha_s - alpha_t) / (1 - alpha_t))

    def changed(
        self,
        probs: Tensor,
        xt: Tensor,
        alpha_t: Tensor,
        alpha_s: Tensor,
        generator: torch.Generator | None,
    ) -> Tensor:
        """Tokens x_s that `change_bound` let through, (n, K) and (n,) -> (n,)."""
        return inverse_cdf(probs, generator)


class Uniform:
    """Each token becomes a uniform draw over all K with probability 1 - alpha_t."""

    def __init__(self, config: DiscreteDiffusionConfig) -> None:
        self.vocab_size = config.vocab_size

    def prior(self, x: Tensor, generator: torch.Generator | None) -> Tensor:
        K, device = self.vocab_size, x.device
        return torch.randint(K, x.shape, device=device, generator=generator)

    def change_bound(self, xt: Tensor, alpha_t: Tensor, alpha_s: Tensor) -> Tensor:
        denoise, noise = self._weights(alpha_t, alpha_s)
        return (denoise + noise) / (1 - alpha_t)

    def changed(
        self,
        probs: Tensor,
        xt: Tensor,
        alpha_t: Tensor,
        alpha_s: Tensor,
        generator: torch.Generator | None,
    ) -> Tensor:
        p_xt = probs.gather(-1, xt[:, None]).squeeze(-1)
        changes = (1 - alpha_t) / (self.vocab_size * alpha_t * p_xt + 1 - alpha_t)
        denoise, noise = self._weights(alpha_t, alpha_s)
        u = uniform((2, len(xt)), probs, generator)
        is_noise = u[0] * (denoise + noise) >= denoise
        noisy = self.prior(xt, generator)
        new = torch.where(is_noise, noisy, inverse_cdf(probs, generator))
        return torch.where(u[1] < changes, new, xt)

    @staticmethod
    def _weights(alpha_t: Tensor, alpha_s: Tensor) -> tuple[Tensor, Tensor]:
        """Weights of a draw from the network and of a uniform draw."""
        return alpha_s - alpha_t, (1 - alpha_t / alpha_s) * (1 - alpha_s)


PROCESSES = {"absorbing": Absorbing, "uniform": Uniform}


class Draw:
    """Tokens from a model's hidden states, a chunk of rows at a time.

    Args:
        model: The model.
        p_nucleus: Mass of the tokens that are kept.
        generator: On the model's device; None uses torch's global one.
    """

    def __init__(
        self,
        model: "DiscreteDiffusionModel",
        p_nucleus: float,
        generator: torch.Generator | None,
    ) -> None:
        self.model, self.config = model, model.config
        self.p_nucleus = p_nucleus
        self.generator = generator
        kind = model.device.type
        self.dtype = torch.float32 if kind == "mps" else torch.float64
        budget = CHUNK_BYTES.get(kind, CHUNK_BYTES["cuda"])
        self.chunk = max(1, budget // (8 * self.config.vocab_size))

    def probs(self, hidden: Tensor) -> Tensor:
        """Probabilities of clean tokens, (n, D) -> (n, K)."""
        logits = self.model.backbone.output_layer.linear(hidden).to(self.dtype)
        logits = without_mask(logits, self.config.mask_index)
        return nucleus(logits.log_softmax(dim=-1).exp(), self.p_nucleus)

    def left_to_right(self, x: Tensor, free: Tensor) -> Tensor:
        """Fills the free positions of x (B, L), one column after the other."""
        L = x.shape[1]
        start = int((~free).all(dim=0).long().cumprod(dim=0).sum())
        cache: Cache = {}
        new = x[:, :start]
        for position in range(start, L):
            hidden = self.model.backbone(new, None, cache)[-1][:, -1]  # (B, D)
            rows = hidden.split(self.chunk)
            drawn = [inverse_cdf(self.probs(row), self.generator) for row in rows]
            x[:, position] = torch.where(
                free[:, position], torch.cat(drawn), x[:, position]
            )
            new = x[:, position : position + 1]
        return x

    def ancestral(self, x: Tensor, free: Tensor, num_steps: int) -> Tensor:
        """Draws from q(x_s | x_t, network) from t = 1 down to 0, then 0.

        Which positions may change is drawn first, from the schedule alone; the
        network runs only for sequences that have one.
        """
        process = PROCESSES[self.config.process](self.config)
        t = torch.linspace(1, TIME_EPS, num_steps + 1, dtype=torch.float64)
        alphas = ALPHAS[self.config.noise](t, *self.config.noise_settings)
        alphas = torch.cat([alphas, alphas.new_ones(1)]).to(self.dtype).to(x.device)
        xt = torch.where(free, process.prior(x, self.generator), x)
        for alpha_t, alpha_s in pairwise(alphas):
            u = uniform(xt.shape, alphas, self.generator)
            where = free & (u < process.change_bound(xt, alpha_t, alpha_s))
            rows = where.any(dim=-1).nonzero().squeeze(-1)
            if not len(rows):
                continue
            sigma = (-torch.log(alpha_t)).float().expand(len(rows))
            hidden = self.model.hidden_states(xt[rows], sigma)[-1]
            local, columns = where[rows].nonzero(as_tuple=True)
            xs = xt.clone()
            parts = local.split(self.chunk), columns.split(self.chunk)
            for row, column in zip(*parts, strict=True):
                at = rows[row], column
                probs = self.probs(hidden[row, column])
                levels = alpha_t, alpha_s
                xs[at] = process.changed(probs, xt[at], *levels, self.generator)
            xt = xs
        return xt


# ---------------------------------------------------------------- models


class DiscreteDiffusionModel(PreTrainedModel):
    """Network, logits and samples; the subclasses say what `transformers` calls it."""

    config_class = DiscreteDiffusionConfig
    _no_split_modules: ClassVar[list[str]] = ["Block"]
    _supports_sdpa = True
    output_class: type = MaskedLMOutput

    def __init__(self, config: DiscreteDiffusionConfig) -> None:
        super().__init__(config)
        self.backbone = Backbone(config)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Modules initialise themselves."""

    @classmethod
    def can_generate(cls) -> bool:
        return False  # not in the way that `transformers` means

    def get_output_embeddings(self) -> nn.Module:
        return self.backbone.output_layer.linear

    def forward(
        self,
        input_ids: Tensor,
        timesteps: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> MaskedLMOutput | CausalLMOutput | tuple:
        """Raw logits.

        Args:
            input_ids: (B, L).
            timesteps: Noise level -log(alpha_t) of each sequence, (B,). Without
                effect, and not needed, where `time_conditioning` is false.
            output_hidden_states: Whether to return all hidden states, too.
            return_dict: False returns a tuple.
        """
        states = self.hidden_states(input_ids, timesteps)
        logits = self.backbone.output_layer.linear(states[-1])
        shown = tuple(states) if output_hidden_states else None
        if return_dict is None:
            return_dict = getattr(self.config, "return_dict", True)
        if not return_dict:
            return (logits,) if shown is None else (logits, shown)
        return self.output_class(logits=logits, hidden_states=shown)

    def hidden_states(self, ids: Tensor, sigma: Tensor | None) -> list[Tensor]:
        """As `Backbone.forward`; the noise level is dropped where it is not used."""
        if not self.config.time_conditioning:
            sigma = torch.zeros(len(ids), device=ids.device)
        elif sigma is None:
            raise ValueError("this model needs timesteps, -log(alpha_t), (B,)")
        return self.backbone(ids, sigma)

    @torch.no_grad()
    def generate(
        self,
        num_samples: int = 1,
        num_steps: int = 128,
        template: Tensor | None = None,
        p_nucleus: float = 1.0,
        seed: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draws samples: ancestral sampling, or token by token from the left.

        Args:
            num_samples: B.
            num_steps: Steps from t = 1 to t = 1e-5; without effect when causal.
            template: Ids that samples hold, -1 where one is to be drawn; (L,) or
                (B, L). A causal model writes left to right whatever comes later.
            p_nucleus: Mass of the tokens that are kept.
            seed: Of a generator on the model's device.
            generator: In place of a seed; without both, torch's global one.

        Returns:
            Token ids, (B, L).
        """
        config, device = self.config, self.device
        if seed is not None:
            generator = torch.Generator(device).manual_seed(seed)
        shape = (num_samples, config.model_length)
        if template is None:
            template = torch.full((config.model_length,), -1)
        x = template.to(device).expand(shape).clone()
        if config.causal or config.ignore_bos:
            no_first = (x[:, 0] == -1) | config.causal
            x[:, 0].masked_fill_(no_first, config.bos_token_id)
        free = x == -1
        draw = Draw(self, p_nucleus, generator)
        if config.causal:
            return draw.left_to_right(x, free)
        return draw.ancestral(x, free, num_steps)


class DiscreteDiffusionForMaskedLM(DiscreteDiffusionModel):
    """For `AutoModelForMaskedLM`."""


class DiscreteDiffusionForCausalLM(DiscreteDiffusionModel):
    """For `AutoModelForCausalLM`."""

    output_class = CausalLMOutput
