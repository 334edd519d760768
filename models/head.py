"""Head and loss in one, a few tokens at a time; reduction of token losses.

With a vocabulary of 50 000 the logits of a batch and their gradients are far larger
than everything else of a train step. `chunked_loss` maps hidden states to logits, to
losses and to gradients one chunk of tokens after the other, so that at no time more
than a chunk's logits exist. What an algorithm gives is the loss of a token as a plain
torch function of its logits (`token_loss`); nothing here knows about algorithms.

A head is a linear map, or a function without parameters (`HeadFunction`), as networks
for images have it: its logits exist for a chunk of tokens only, too.

Shapes: B batch, L length, K vocabulary, D hidden size, N tokens, n tokens of a chunk.
"""

import functools
import importlib.util
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# (*logits, one (n, K) of each head; **inputs (n,)) -> losses (n,), nats. Row i of the
# result depends on row i of the arguments only.
LossOfLogits = Callable[..., Tensor]
# Hidden states (..., D) -> logits (..., K), without parameters and row by row.
HeadFunction = Callable[[Tensor], Tensor]

# Bytes of a chunk's logits in float32. On a CPU a chunk should stay in the cache, and
# far below the 32 MiB from which glibc gives every new tensor fresh pages.
CHUNK_BYTES = {"cpu": 16 * 2**20, "cuda": 512 * 2**20, "mps": 128 * 2**20}
FEW_ROWS = 32  # on a CPU, up to which the head's product has the vocabulary first


class TokenNLL(NamedTuple):
    """Losses of a batch's tokens, nats."""

    total: Tensor  # scalar: sum of weights * nll; carries the gradient
    nll: Tensor  # (B, L), without gradient


class Loss(NamedTuple):
    """Loss of a batch; every algorithm reports in nats."""

    loss: Tensor  # scalar, per valid token
    nlls: Tensor  # (B,), summed over each sequence's valid tokens
    num_tokens: Tensor  # (B,), valid tokens

    @staticmethod
    def weights(valid_tokens: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Each token's share in the mean over the valid ones, (B, L) of a type."""
        valid_tokens = valid_tokens.to(dtype)
        return valid_tokens / valid_tokens.sum().clamp(min=1)

    @classmethod
    def reduce(cls, tokens: TokenNLL, valid_tokens: Tensor) -> "Loss":
        """Sums over each sequence's tokens whose mask (B, L) is 1.

        Args:
            tokens: Its total is of losses weighted by `Loss.weights`.
            valid_tokens: 1 for tokens that count, else 0, (B, L).
        """
        nll = tokens.nll
        valid_tokens = valid_tokens.to(nll.dtype)
        nlls = (nll * valid_tokens).sum(dim=-1)
        return cls(tokens.total, nlls, valid_tokens.sum(dim=-1))


class Head(NamedTuple):
    """Hidden states, and the linear map or the function that makes logits of them."""

    hidden: Tensor  # (N, D)
    weight: Tensor | None  # (K, D); None where there is a function
    bias: Tensor | None  # (K,)
    function: HeadFunction | None = None

    @property
    def tensors(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """What may need a gradient."""
        return self.hidden, self.weight, self.bias

    def detached(self) -> "Head":
        """The same without gradients."""
        hidden, *parameters = self.tensors
        weight, bias = (None if x is None else x.detach() for x in parameters)
        return Head(hidden.detach(), weight, bias, self.function)

    def to(self, dtype: torch.dtype) -> "Head":
        """Ready for a matrix product in a type; a function has none."""
        if self.weight is None:
            return self
        bias = None if self.bias is None else self.bias.to(dtype)
        return Head(self.hidden.to(dtype), self.weight.to(dtype), bias)

    def product(self) -> Tensor:
        """The matrix product, (N, K), or what the function takes in its place."""
        if self.weight is None:
            return self.hidden
        return F.linear(self.hidden, self.weight, self.bias)


class Precision(NamedTuple):
    """Types of the head's matrix product and of the logits that a loss sees."""

    product: torch.dtype
    logits: torch.dtype

    @classmethod
    def of(cls, loss_precision: str, weight: Tensor, wide: torch.dtype) -> "Precision":
        """What `training.loss_precision` means under the autocast in force.

        Args:
            loss_precision: bf16 (the product as autocast has it), float32, or
                float64 (of which the product is float32).
            weight: The head's weight, or another one where it has none.
            wide: The widest float of the device.
        """
        product, device = weight.dtype, weight.device.type
        if loss_precision == "bf16" and torch.is_autocast_enabled(device):
            product = torch.get_autocast_dtype(device)
        logits = torch.promote_types(product, torch.float32)
        return cls(product, wide if loss_precision == "float64" else logits)


def auto_chunk_size(vocab_size: int, device: str) -> int:
    """Tokens per chunk, as many as `CHUNK_BYTES` hold of float32 logits.

    Args:
        vocab_size: K.
        device: Type of the device.
    """
    budget = CHUNK_BYTES.get(device, CHUNK_BYTES["cuda"])
    return max(1, budget // (4 * vocab_size))


def draw_chunk_size(vocab_size: int, device: str) -> int:
    """Tokens per chunk of draws from float64 probabilities: half of a loss's."""
    return auto_chunk_size(2 * vocab_size, device)


def chunk_size(
    setting: Literal["auto"] | int | None, vocab_size: int, device: str
) -> int | None:
    """Tokens per chunk of a loss.

    Args:
        setting: A number, "auto", or None for all tokens at once.
        vocab_size, device: As for `auto_chunk_size`.
    """
    return auto_chunk_size(vocab_size, device) if setting == "auto" else setting


def is_compiled(setting: Literal["auto"] | bool, device: str) -> bool:
    """Whether to compile a token loss, as `training.loss_compile` asks for.

    "auto" is yes where that pays and cannot fail: on CUDA, with Triton and the C
    compiler that it needs.
    """
    if setting != "auto":
        return setting
    return device == "cuda" and _has_compiler()


@functools.cache  # asked at every step
def _has_compiler() -> bool:
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    return importlib.util.find_spec("triton") is not None and compiler is not None


def logits_of(head: Head, precision: Precision) -> Tensor:
    """(..., K), differentiable."""
    device = head.hidden.device.type
    with torch.autocast(device, enabled=False):
        if head.function is not None:
            return head.function(head.hidden.to(precision.logits))
        hidden, weight, bias = head.to(precision.product).tensors
        if weight is None:
            raise ValueError("a head has a weight or a function")
        is_wide = hidden.dtype.itemsize >= 4  # else bias would be rounded twice
        few = hidden.ndim == 2 and 1 < len(hidden) <= FEW_ROWS
        if device == "cpu" and is_wide and few:
            logits = (weight @ hidden.T).T.contiguous()  # up to 6 times as fast
            logits = logits if bias is None else logits + bias
        else:
            logits = F.linear(hidden, weight, bias)
        return logits.to(precision.logits)


def chunked_loss(
    heads: Sequence[Head],
    token_loss: LossOfLogits,
    inputs: Mapping[str, Tensor],
    weights: Tensor,
    *,
    precision: Precision,
    products: Sequence[torch.dtype] | None = None,
    chunk: int | None = None,
    compiled: bool = False,
) -> tuple[Tensor, Tensor]:
    """sum_i weights_i token_loss_i and its gradients; memory does not grow as N K.

    Gradients are formed together with the losses, while a chunk's logits are there,
    and handed to autograd when it asks for them; so backward can run only once.

    Args:
        heads: One, or several whose logits the loss compares (student, teacher).
        token_loss: See `LossOfLogits`.
        inputs: Further arguments of the loss, (N,) each, without gradient.
        weights: (N,), without gradient.
        precision: Types to compute in.
        products: Of each head's matrix product, if not that of `precision`.
        chunk: Tokens whose logits exist at a time. None is the plain way: all of
            them, with autograd through head and loss.
        compiled: Whether to compile `token_loss`.

    Returns:
        The sum, a scalar with gradient; and the losses (N,) without.
    """
    with torch.autocast(weights.device.type, enabled=False):  # precision says it all
        products = products or [precision.product] * len(heads)
        if chunk is None:
            logits = [
                logits_of(head, precision._replace(product=product))
                for head, product in zip(heads, products, strict=True)
            ]
            nll = token_loss(*logits, **inputs)
            return (weights * nll).sum(), nll.detach()
        evaluate = _compiled() if compiled else _evaluate
        functions = tuple(head.function for head in heads)
        evaluate = functools.partial(evaluate, token_loss, precision.logits, functions)
        scale = _scale(weights)
        plan = _Plan(evaluate, dict(inputs), weights, scale, tuple(products), chunk)
        if torch.is_grad_enabled():
            return _ChunkedLoss.apply(
                plan, functions, *(x for head in heads for x in head.tensors)
            )
        return _walk(plan, heads, [_Gradient(head, (False,) * 3) for head in heads])


class _ChunkedLoss(torch.autograd.Function):
    """`chunked_loss` for autograd."""

    @staticmethod
    def forward(
        ctx: Any,
        plan: "_Plan",
        functions: tuple[HeadFunction | None, ...],
        *tensors: Tensor,
    ) -> tuple[Tensor, Tensor]:
        thirds = zip(tensors[::3], tensors[1::3], tensors[2::3], strict=True)
        pairs = zip(thirds, functions, strict=True)
        heads = [Head(*third, function) for third, function in pairs]
        needed = ctx.needs_input_grad[2:]
        ctx.scale = plan.scale
        ctx.gradients = [
            _Gradient(head, needed[3 * i : 3 * i + 3]) for i, head in enumerate(heads)
        ]
        total, nll = _walk(plan, heads, ctx.gradients)
        ctx.mark_non_differentiable(nll)
        return total, nll

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the chunked loss can be differentiated only once")
        gradients, ctx.gradients = ctx.gradients, None
        factor = grad_total / ctx.scale
        scaled = [x for gradient in gradients for x in gradient.scaled(factor)]
        return None, None, *scaled


class _Plan(NamedTuple):
    """What to evaluate, chunk by chunk."""

    evaluate: Callable[[list[Tensor], dict[str, Tensor]], Tensor]
    inputs: dict[str, Tensor]
    weights: Tensor
    scale: Tensor  # of the weights in gradients
    products: tuple[torch.dtype, ...]  # of each head's matrix product
    chunk: int


def _walk(
    plan: _Plan, heads: Sequence[Head], gradients: list["_Gradient"]
) -> tuple[Tensor, Tensor]:
    """The weighted sum of the losses, and the losses; adds to `gradients`."""
    pairs = zip(heads, plan.products, strict=True)
    cast = [head.to(product) for head, product in pairs]
    starts = range(0, max(len(plan.weights), 1), plan.chunk)  # an empty chunk if N = 0
    chunks = [slice(start, start + plan.chunk) for start in starts]
    nll = torch.cat([_one_chunk(plan, cast, gradients, rows) for rows in chunks])
    return (plan.weights * nll).sum(), nll


def _one_chunk(
    plan: _Plan, heads: list[Head], gradients: list["_Gradient"], rows: slice
) -> Tensor:
    """Losses of the tokens `rows`, (n,); what else was formed dies on return."""
    parts = [head._replace(hidden=head.hidden[rows]) for head in heads]
    # Copies, because compiled code is specific to where a view starts.
    inputs = {name: x[rows].clone() for name, x in plan.inputs.items()}
    products = [part.product().detach() for part in parts]
    for x, gradient in zip(products, gradients, strict=True):
        x.requires_grad_(gradient.is_needed)
    leaves = [x for x in products if x.requires_grad]
    with torch.set_grad_enabled(bool(leaves)):
        nll = plan.evaluate(products, inputs)
    if leaves:
        weights = (plan.scale * plan.weights[rows]).to(nll.dtype)
        d_products = iter(torch.autograd.grad(nll, leaves, weights))
        for part, gradient in zip(parts, gradients, strict=True):
            if gradient.is_needed:
                gradient.add(next(d_products), part, rows)
    return nll.detach()


def _scale(weights: Tensor) -> Tensor:
    """A power of 2 that brings the largest weight to [1, 2).

    Weights are about 1 / N; float16 gradients would not survive a factor that small.
    """
    if len(weights) == 0:
        return weights.new_ones(())
    largest = weights.abs().amax().clamp(min=torch.finfo(weights.dtype).tiny)
    return torch.exp2(-largest.log2().floor())


class _Gradient:
    """Gradient of a weighted loss with respect to a head, times `_Plan.scale`.

    Args:
        head: As the caller gave it.
        needed: Which of hidden states, weight and bias need one.
    """

    def __init__(self, head: Head, needed: Sequence[bool]) -> None:
        self.is_needed = any(needed)
        self.hidden, self.weight, self.bias = (
            torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32))
            if x is not None and is_needed
            else None
            for x, is_needed in zip(head.tensors, needed, strict=True)
        )

    def add(self, d_product: Tensor, part: Head, rows: slice) -> None:
        """Adds a chunk's share, given the gradient of its product, (n, K) or (n, D)."""
        if self.hidden is not None:
            weight = part.weight
            self.hidden[rows] = d_product if weight is None else d_product @ weight
        if self.weight is not None:
            _add_product(self.weight, d_product.T, part.hidden)
        if self.bias is not None:
            self.bias += d_product.sum(dim=0, dtype=self.bias.dtype)

    def scaled(self, factor: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients times a factor, in place."""
        parts = (self.hidden, self.weight, self.bias)
        return tuple(None if x is None else x.mul_(factor.to(x.dtype)) for x in parts)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b; a half-precision product is added up in the type of total."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b


def _evaluate(
    token_loss: LossOfLogits,
    dtype: torch.dtype,
    functions: tuple[HeadFunction | None, ...],
    products: list[Tensor],
    inputs: dict[str, Tensor],
) -> Tensor:
    logits = [x.to(dtype) for x in products]
    for i, function in enumerate(functions):
        if function is not None:
            logits[i] = function(logits[i])
    return token_loss(*logits, **inputs)


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    # One function serves every token loss, and of each a few kinds of chunk sizes.
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, 32)
    return torch.compile(_evaluate)
