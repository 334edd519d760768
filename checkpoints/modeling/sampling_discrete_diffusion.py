"""How `modeling_discrete_diffusion.py` draws samples.

Shapes: B batch, L length, L' tokens of a block, K vocabulary, D hidden size, n tokens
of a chunk. alpha_t is the probability that a token is still clean at time t, from 1 at
t = 0 down to next to 0 at t = 1.
"""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from .network_discrete_diffusion import Glance

NEG_INFINITY = -1e6
TIME_EPS = 1e-5  # last time of the grid; the last draw goes from there to 0
# Bytes of a chunk's probabilities, over two. The order of draws depends on it.
CHUNK_BYTES = {"cpu": 16 * 2**20, "cuda": 512 * 2**20, "mps": 128 * 2**20}

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


def tempered(log_p: Tensor, temperature: float) -> Tensor:
    """log p / temperature, normalised, (n, K); 0 leaves the most likely token."""
    if temperature == 1:
        return log_p
    if temperature == 0:
        best = log_p.argmax(dim=-1, keepdim=True)
        return torch.full_like(log_p, -torch.inf).scatter(-1, best, 0.0)
    return ((log_p - log_p.amax(dim=-1, keepdim=True)) / temperature).log_softmax(-1)


def without_mask(logits: Tensor, mask_index: int | None) -> Tensor:
    """Logits whose mask entry, if there is one, has next to no probability."""
    if mask_index is None:
        return logits
    is_mask = torch.arange(logits.shape[-1], device=logits.device) == mask_index
    return logits + torch.where(is_mask, NEG_INFINITY, 0.0).to(logits.dtype)


class Absorbing:
    """Each token turns into the mask with probability 1 - alpha_t."""

    def __init__(self, config: Any) -> None:
        self.mask_index = config.mask_index

    def prior(self, x: Tensor, generator: torch.Generator | None) -> Tensor:
        return torch.full_like(x, self.mask_index)

    def undecided(self, xt: Tensor) -> Tensor:
        """Positions whose clean token is not known, (B, L) bool."""
        return xt == self.mask_index

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

    def __init__(self, config: Any) -> None:
        self.vocab_size = config.vocab_size

    def prior(self, x: Tensor, generator: torch.Generator | None) -> Tensor:
        K, device = self.vocab_size, x.device
        return torch.randint(K, x.shape, device=device, generator=generator)

    def undecided(self, xt: Tensor) -> Tensor:
        return torch.ones_like(xt, dtype=torch.bool)

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


class Context:
    """The clean tokens before a block, of which keys and values are kept.

    Args:
        model: A model with blocks.
    """

    def __init__(self, model: Any) -> None:
        self.model, self.begin, self.cache = model, 0, DynamicCache()

    def see(self, tokens: Tensor) -> None:
        """Takes in all that there is before the next block, (B, l).

        A block sees at most L - L' tokens. A window that has moved is seen anew: its
        tokens saw some that are gone.
        """
        config = self.model.config
        begin = max(0, tokens.shape[1] + config.block_size - config.model_length)
        if begin > self.begin:
            self.begin, self.cache = begin, DynamicCache()
        new = tokens[:, begin + self.cache.get_seq_length() :]
        if new.shape[1]:
            self.model.hidden_states(new, cache=self.cache)

    def of(self, rows: Tensor) -> Glance:
        """What a noisy block of some sequences (b,) sees."""
        return Glance(self.cache, rows)

    def select(self, rows: Tensor) -> None:
        """Only these sequences (b,) are left."""
        if self.cache.get_seq_length():
            self.cache.reorder_cache(rows)


class Draw:
    """Tokens from a model's hidden states, a chunk of rows at a time.

    Args:
        model: The model.
        temperature: Divides log-probabilities; 0 takes the most likely token.
        p_nucleus: Mass of the tokens that are kept.
        generator: On the model's device; None uses torch's global one.
    """

    def __init__(
        self,
        model: Any,
        temperature: float,
        p_nucleus: float,
        generator: torch.Generator | None,
    ) -> None:
        self.model, self.config = model, model.config
        self.temperature, self.p_nucleus = temperature, p_nucleus
        self.generator = generator
        self.context: Context | None = None  # what is before the tokens, if any
        kind = model.device.type
        self.dtype = torch.float32 if kind == "mps" else torch.float64
        budget = CHUNK_BYTES.get(kind, CHUNK_BYTES["cuda"])
        self.chunk = max(1, budget // (8 * self.config.vocab_size))

    def probs(self, hidden: Tensor) -> Tensor:
        """Probabilities of clean tokens, (n, D) -> (n, K)."""
        logits = self.model.get_output_embeddings()(hidden).to(self.dtype)
        logits = without_mask(logits, self.config.mask_index)
        log_p = tempered(logits.log_softmax(dim=-1), self.temperature)
        return nucleus(log_p.exp(), self.p_nucleus)

    def left_to_right(self, x: Tensor, free: Tensor) -> Tensor:
        """Fills the free positions of x (B, L), one column after the other."""
        L = x.shape[1]
        start = int((~free).all(dim=0).long().cumprod(dim=0).sum())
        cache, new = DynamicCache(), x[:, :start]
        for position in range(start, L):
            hidden = self.model.hidden_states(new, cache=cache)[-1][:, -1]  # (B, D)
            rows = hidden.split(self.chunk)
            drawn = [inverse_cdf(self.probs(row), self.generator) for row in rows]
            x[:, position] = torch.where(
                free[:, position], torch.cat(drawn), x[:, position]
            )
            new = x[:, position : position + 1]
        return x

    def by_blocks(
        self, x: Tensor, free: Tensor, stops_at_eos: bool, *options: Any
    ) -> Tensor:
        """Fills the free positions of x (B, N L'), a block after the other, each as
        `diffusion` does with these options, given the clean ones before it.

        With `stops_at_eos` a sequence ends at its first eos behind the first token and
        all that is given: from there on it is eos, and it leaves the batch.
        """
        size, eos = self.config.block_size, self.config.eos_token_id
        L, device = x.shape[1], x.device
        position = torch.arange(L, device=device)
        may_end = position > (~free * position).amax(dim=-1, keepdim=True)
        ends = torch.full_like(x[:, 0], L)
        there = torch.arange(len(x), device=device)  # sequences that go on
        self.context = Context(self.model)
        are_free = free.unflatten(1, (-1, size)).any(dim=2).any(dim=0)
        for index in are_free.nonzero().flatten().tolist():
            start = index * size
            block = slice(start, start + size)
            self.context.see(x[there, :start])
            drawn = self.diffusion(x[there, block], free[there, block], *options)
            x[there, block] = drawn
            if not stops_at_eos:
                continue
            is_end = (drawn == eos) & may_end[there, block]
            end, has_end = start + is_end.int().argmax(dim=-1), is_end.any(dim=-1)
            ends[there] = torch.where(has_end, end, L)
            stay = (~has_end).nonzero().squeeze(-1)
            if not len(stay):
                break
            if len(stay) < len(there):
                there = there[stay]
                self.context.select(stay)
        if not stops_at_eos:
            return x
        return x.masked_fill(position >= ends[:, None], eos)

    def diffusion(
        self, x: Tensor, free: Tensor, num_steps: int, predictor: str, removal: str
    ) -> Tensor:
        """Fills the free positions of x (B, L), from the prior at t = 1 down to 0."""
        process = PROCESSES[self.config.process](self.config)
        xt = torch.where(free, process.prior(x, self.generator), x)
        if predictor == "first_hitting":
            return self._first_hitting(process, xt, free)
        t = torch.linspace(1, TIME_EPS, num_steps + 1, dtype=torch.float64)
        alphas = self._alphas(t).to(self.dtype).to(x.device)
        columns = alphas[:, None, None].expand(-1, len(x), 1)
        for alpha_t, alpha_s in pairwise(columns):
            xt = self._reverse(process, xt, alpha_t, alpha_s, free)
        if removal == "greedy":
            where = free & process.undecided(xt)
            return self._replace(
                xt, columns[-1], where, lambda probs, *_: probs.argmax(dim=-1)
            )
        one = torch.ones_like(columns[-1])
        return self._reverse(process, xt, columns[-1], one, free)

    def _alphas(self, t: Tensor) -> Tensor:
        return ALPHAS[self.config.noise](t, *self.config.noise_settings)

    def _first_hitting(self, process: Any, xt: Tensor, free: Tensor) -> Tensor:
        """Reveals one mask of each sequence at a time, in the order of the times.

        Reference: arXiv:2409.02908, the first-hitting sampler.
        """
        masked = free & process.undecided(xt)
        num_masked = masked.sum(dim=-1)
        alpha_1 = float(self._alphas(torch.ones((), dtype=torch.float64)))
        like = xt.new_empty(0, dtype=self.dtype)
        mass = (1 - alpha_1) * uniform(xt.shape, like, self.generator)
        order = mass.masked_fill(~masked, -1).argsort(dim=-1, descending=True)
        for index in range(int(num_masked.max())):
            position = order[:, index : index + 1]
            where = torch.zeros_like(masked).scatter(-1, position, True)
            where &= (index < num_masked)[:, None]
            alpha_t = 1 - mass.gather(-1, position)
            xt = self._reverse(process, xt, alpha_t, torch.ones_like(alpha_t), where)
        return xt

    def _reverse(
        self, process: Any, xt: Tensor, alpha_t: Tensor, alpha_s: Tensor, where: Tensor
    ) -> Tensor:
        """Draws from q(x_s | x_t, network) at some positions, (B, L) -> (B, L).

        Which positions may change is drawn first, from the levels (B, 1) alone; the
        network runs only for sequences that have one.
        """
        u = uniform(xt.shape, alpha_t, self.generator)
        where = where & (u < process.change_bound(xt, alpha_t, alpha_s))

        def changed(probs: Tensor, x: Tensor, rows: Tensor) -> Tensor:
            levels = alpha_t[rows, 0], alpha_s[rows, 0]
            return process.changed(probs, x, *levels, self.generator)

        return self._replace(xt, alpha_t, where, changed)

    def _replace(
        self,
        xt: Tensor,
        alpha_t: Tensor,
        where: Tensor,
        choose: Callable[[Tensor, Tensor, Tensor], Tensor],
    ) -> Tensor:
        """x_t with other tokens at some positions, chosen from the network's
        probabilities (n, K), the tokens (n,) and their sequences (n,)."""
        wanted = where.any(dim=-1).nonzero().squeeze(-1)
        if not len(wanted):
            return xt
        sigma = (-torch.log(alpha_t[wanted, 0])).float()
        seen = None if self.context is None else self.context.of(wanted)
        hidden = self.model.hidden_states(xt[wanted], sigma, cache=seen)[-1]
        local, columns = where[wanted].nonzero(as_tuple=True)
        xs = xt.clone()
        parts = local.split(self.chunk), columns.split(self.chunk)
        for row, column in zip(*parts, strict=True):
            rows = wanted[row]
            probs = self.probs(hidden[row, column])
            xs[rows, column] = choose(probs, xt[rows, column], rows)
        return xs


# ---------------------------------------------------------------- what is asked for

PREDICTORS = {
    "absorbing": ("ancestral", "first_hitting"),
    "uniform": ("ancestral",),
    "autoregressive": ("ancestral",),
}
REMOVALS = ("ancestral", "greedy")


def check_options(
    config: Any,
    num_samples: int,
    num_steps: int,
    temperature: float,
    p_nucleus: float,
    predictor: str,
    noise_removal: str,
) -> None:
    """Refuses options of `generate` that make no sense for a model.

    Raises:
        ValueError: With the name, the value and what is possible.
    """
    check_number("num_samples", num_samples)
    check_number("num_steps", num_steps)
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature={temperature}; give a number from 0 up.")
    if not 0 < p_nucleus <= 1:
        raise ValueError(f"p_nucleus={p_nucleus}; give a number above 0, at most 1.")
    fitting = PREDICTORS[config.process]
    given = (
        ("predictor", predictor, fitting),
        ("noise_removal", noise_removal, REMOVALS),
    )
    for name, value, choices in given:
        if value not in choices:
            raise ValueError(
                f"{name}={value!r}; a model of algo={config.algorithm} has "
                f"{' and '.join(choices)}."
            )


def check_number(name: str, value: Any) -> None:
    """Refuses what is no whole number above 0.

    Raises:
        ValueError: With the name and the value.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        shown = f"a tensor of shape {shape_of(value)}"
        shown = shown if isinstance(value, Tensor) else repr(value)
        raise ValueError(f"{name} is {shown}; give a whole number above 0.")


def length_of(config: Any, num_blocks: int | None, stop_at_eos: bool) -> int:
    """Tokens of a sample of so many blocks; None: as many as a row of the model has.

    Raises:
        ValueError: If these options make no sense for a model.
    """
    size = config.block_size
    given = ("num_blocks", num_blocks, None), ("stop_at_eos", stop_at_eos, False)
    for name, value, only in given:
        if size is None and value is not only:
            raise ValueError(
                f"{name}={value!r} is for models that write block by block, and this "
                f"one has no block_size; the only value is {only}."
            )
    if stop_at_eos and config.eos_token_id is None:
        raise ValueError(
            "stop_at_eos=True: eos_token_id of config.json is null, so no text ends; "
            "the only value is False."
        )
    if num_blocks is None:
        return config.model_length
    check_number("num_blocks", num_blocks)
    if num_blocks > 1 and size >= config.model_length:
        raise ValueError(
            f"num_blocks={num_blocks}: no block of {size} tokens would see the one "
            f"before it, as model_length={config.model_length} has room for one; the "
            "only values are None and 1."
        )
    return num_blocks * size


def template_of(
    config: Any, template: Tensor | None, prompt: Any, num_samples: int, length: int
) -> Tensor:
    """Ids that samples hold, -1 where one is to be drawn, (B, L).

    Args:
        config: The model's.
        template: (L,) or (B, L), or None.
        prompt: Ids behind bos that samples begin with, (n,) or (B, n), or None.
        num_samples: B.
        length: L.

    Raises:
        ValueError: If they do not fit the model.
    """
    shape = (num_samples, length)
    if template is not None and prompt is not None:
        raise ValueError("template and prompt are both given; give one of them.")
    if prompt is not None:
        template = _after_bos(config, torch.as_tensor(prompt).cpu(), shape)
    if template is None:
        template = torch.full(shape[1:], -1)
    template = torch.as_tensor(template).cpu()
    is_whole = not template.is_floating_point() and template.dtype != torch.bool
    if not is_whole or template.shape not in (shape, shape[1:]):
        raise ValueError(
            f"template has shape {shape_of(template)} and type {template.dtype}; "
            f"give whole numbers of shape ({shape[1]},), the tokens of a sample, or "
            f"({shape[0]}, {shape[1]}), num_samples of them, with -1 where a token is "
            "to be drawn."
        )
    if (template < -1).any() or (template >= config.vocab_size).any():
        raise ValueError(
            f"template holds ids from {int(template.min())} to {int(template.max())}; "
            f"those of the model are 0 to {config.vocab_size - 1}, and -1 is for a "
            "token to be drawn."
        )
    x = template.long().expand(shape).clone()
    if not config.causal and not config.ignore_bos:
        return x
    bos = config.bos_token_id
    others = x[(x[:, 0] != -1) & (x[:, 0] != bos), 0]
    if config.causal and len(others):
        raise ValueError(
            f"template begins with token {int(others[0])}; samples of a left-to-right "
            f"model begin with bos, {bos}. Put {bos} or -1 in front, or give the "
            "tokens as prompt=."
        )
    x[:, 0].masked_fill_(x[:, 0] == -1, bos)
    return x


def _after_bos(config: Any, prompt: Tensor, shape: tuple[int, int]) -> Tensor:
    """Bos, the prompt, and -1, (L,) or (B, L)."""
    num_samples, length = shape
    bos = config.bos_token_id
    given = prompt.long()
    if given.ndim in (1, 2) and given.numel() and (given[..., 0] == bos).all():
        given = given[..., 1:]
    is_fitting = given.ndim == 1 or given.shape[:-1] == (num_samples,)
    if not is_fitting or given.shape[-1] >= length:
        raise ValueError(
            f"prompt has shape {shape_of(prompt)}; give ids of shape (n,), or "
            f"({num_samples}, n) with a prompt for each sample, where n is at most "
            f"{length - 1}: the length of a sample without bos."
        )
    template = torch.full((*given.shape[:-1], length), -1)
    template[..., 0] = bos
    template[..., 1 : 1 + given.shape[-1]] = given
    return template


def shape_of(x: Any) -> str:
    """A tensor's shape as it is written."""
    return str(tuple(getattr(x, "shape", ())))
