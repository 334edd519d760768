"""Discrete diffusion language models, and left-to-right ones of the same family.

    auto = AutoModelForMaskedLM  # AutoModelForCausalLM for left-to-right models
    model = auto.from_pretrained(folder, trust_remote_code=True)
    logits = model(input_ids, timesteps).logits
    ids = model.generate(num_samples=4, num_steps=128, seed=1)

Needs torch and transformers. Shapes: B batch, L length, l tokens in a cache, L' tokens
of a block, K vocabulary, D hidden size. alpha_t is the probability that a token is
still clean at time t.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    MaskedLMOutput,
)

from .configuration_discrete_diffusion import DiscreteDiffusionConfig
from .network_discrete_diffusion import Backbone, Glance
from .sampling_discrete_diffusion import (
    ALPHAS,
    Draw,
    check_options,
    length_of,
    shape_of,
    template_of,
    without_mask,
)

# What `transformers` calls a cache in arguments and outputs: `cache` from 5.24 on.
IS_CACHE = "cache" in CausalLMOutputWithPast.__dataclass_fields__
CACHE = "cache" if IS_CACHE else "past_key_values"


class DiscreteDiffusionModel(PreTrainedModel):
    """The network without its last linear map, for `AutoModel`."""

    config_class = DiscreteDiffusionConfig
    _no_split_modules: ClassVar[list[str]] = ["Block"]
    _supports_sdpa = True
    _supports_cache_class = True  # of transformers before 4.56
    supports_gradient_checkpointing = True

    def __init__(self, config: DiscreteDiffusionConfig) -> None:
        super().__init__(config)
        self.backbone = Backbone(config)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Modules initialise themselves, but for embeddings of added tokens."""
        if type(module) is nn.Embedding:
            module.weight.data.normal_(std=0.02)

    @classmethod
    def can_generate(cls) -> bool:
        return False  # not in the way that `transformers` means

    def get_input_embeddings(self) -> nn.Module:
        return self.backbone.vocab_embed

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Takes the rows of a module; names in checkpoints stay."""
        if value is not self.backbone.vocab_embed:
            self.backbone.vocab_embed.take(value.weight)

    def get_output_embeddings(self) -> nn.Module:
        return self.backbone.output_layer.linear

    def get_submodule(self, target: str) -> nn.Module:
        """By name; peft asks for the embedding by the name of its weight."""
        return super().get_submodule(target.removesuffix(".embedding"))

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.backbone.output_layer.linear = new_embeddings

    def forward(
        self,
        input_ids: Tensor | None = None,
        timesteps: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: DynamicCache | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        cache: DynamicCache | None = None,
    ) -> BaseModelOutputWithPast | tuple:
        """Hidden states; arguments as for `DiscreteDiffusionForMaskedLM`."""
        past = past_key_values if cache is None else cache
        seen = self._cache_of(past, use_cache)
        if output_attentions:
            raise ValueError("output_attentions=True: the kernel returns no attention.")
        states = self.hidden_states(
            input_ids,
            timesteps,
            inputs_embeds=inputs_embeds,
            mask=_mask_of(attention_mask, token_type_ids),
            cache=seen,
        )
        if return_dict is None:
            return_dict = getattr(self.config, "return_dict", True)
        out = BaseModelOutputWithPast(
            last_hidden_state=states[-1],
            hidden_states=tuple(states) if output_hidden_states else None,
            **{CACHE: seen.whole if isinstance(seen, Glance) else seen},
        )
        return out if return_dict else out.to_tuple()

    def _cache_of(
        self, past: Any, use_cache: bool | None
    ) -> DynamicCache | Glance | None:
        causal = self.config.causal
        has_cache = causal or self.config.block_size is not None
        if past is None and not (use_cache and has_cache):
            return None
        if not has_cache:
            raise ValueError(
                "past_key_values: a model that sees both sides has no cache."
            )
        if getattr(past, "is_compileable", False):
            raise ValueError(
                "past_key_values is a cache of a fixed length; these models take a "
                "DynamicCache, which is the default of generate."
            )
        cache = DynamicCache() if past is None else _as_cache(past)
        return cache if causal or use_cache else Glance(cache)

    def hidden_states(
        self,
        ids: Tensor | None,
        sigma: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        mask: Tensor | None = None,
        cache: DynamicCache | Glance | None = None,
    ) -> list[Tensor]:
        """As `Backbone.forward`; the noise level is dropped where it is not used, and
        that of t = 0 in a pass which a cache of blocks keeps.

        Raises:
            ValueError: If shapes do not fit each other, or the noise level is missing.
        """
        if (ids is None) == (inputs_embeds is None):
            raise ValueError("give input_ids or inputs_embeds, and not both.")
        if ids is not None and ids.ndim != 2:
            raise ValueError(
                f"input_ids has shape {shape_of(ids)}; give (B, L): sequences, tokens."
            )
        h = self.backbone.vocab_embed(ids) if inputs_embeds is None else inputs_embeds
        length = h.shape[1] + (0 if cache is None else cache.get_seq_length())
        if mask is not None and mask.shape != (len(h), length):
            raise ValueError(
                f"attention_mask has shape {shape_of(mask)}; give "
                f"({len(h)}, {length}): one number for each token, those in the cache "
                "among them."
            )
        if mask is not None and mask.all():
            mask = None
        if self.config.causal:
            return self.backbone(h, None, mask, cache)
        if cache is not None:
            self._check_blocks(h, sigma, mask, cache)
        if not self.config.time_conditioning:
            sigma = torch.zeros(len(h), device=h.device)
        elif isinstance(cache, DynamicCache):
            sigma = self._clean_level().to(h.device).expand(len(h))
        elif sigma is None:
            sigma = self._noise_level(ids, mask)
        if sigma.shape != (len(h),):
            raise ValueError(
                f"timesteps has shape {shape_of(sigma)}; give ({len(h)},): "
                "-log(alpha_t) of each sequence."
            )
        return self.backbone(h, sigma, mask, cache)

    def _check_blocks(
        self,
        h: Tensor,
        sigma: Tensor | None,
        mask: Tensor | None,
        cache: DynamicCache | Glance,
    ) -> None:
        """Refuses what is not behind whole blocks, or not to be kept."""
        size, past = self.config.block_size, cache.get_seq_length()
        is_kept = isinstance(cache, DynamicCache)
        if is_kept and sigma is not None:
            raise ValueError(
                "use_cache=True keeps clean tokens, which are seen at t = 0: leave "
                "timesteps out, or use_cache of a pass over noisy ones."
            )
        if past % size or (is_kept and h.shape[1] % size):
            raise ValueError(
                f"a cache of this model holds whole blocks of {size} tokens: it has "
                f"{past}, and {h.shape[1]} are given."
            )
        if mask is not None:
            raise ValueError(
                "attention_mask has zeros: beside a cache of blocks there is no "
                "padding."
            )

    def _clean_level(self) -> Tensor:
        """-log(alpha_0), with which clean blocks are seen."""
        t = torch.zeros((), dtype=torch.float64)
        alpha_0 = ALPHAS[self.config.noise](t, *self.config.noise_settings)
        return (-torch.log(alpha_0)).float()

    def _noise_level(self, ids: Tensor | None, mask: Tensor | None) -> Tensor:
        """-log of the share of tokens that are no masks, (B,)."""
        if self.config.process != "absorbing" or ids is None:
            raise ValueError(
                "this model is told the noise level, which cannot be seen from its "
                "tokens: give timesteps, -log(alpha_t) of each sequence, (B,)."
            )
        there = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
        clean = (there & (ids != self.config.mask_index)).sum(dim=-1)
        share = clean / there.sum(dim=-1).clamp(min=1)
        return -torch.log(share.clamp(min=1e-3))

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        past_key_values: DynamicCache | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        token_type_ids: Tensor | None = None,
        cache: DynamicCache | None = None,
        **_: Any,
    ) -> dict[str, Any]:
        """What `forward` gets at each step of `generate`; peft asks for it, too."""
        cache = _as_cache(past_key_values if cache is None else cache)
        past = 0 if cache is None else cache.get_seq_length()
        inputs: dict[str, Any] = {"input_ids": input_ids[:, past:]}
        if inputs_embeds is not None and not past:
            inputs = {"inputs_embeds": inputs_embeds}
        elif inputs_embeds is not None:  # its tokens are in the cache, not in the ids
            inputs = {"input_ids": input_ids[:, -1:]}
        return inputs | {
            CACHE: cache,
            "attention_mask": attention_mask,
            "use_cache": use_cache,
        }

    @staticmethod
    def _reorder_cache(past_key_values: DynamicCache, beam_idx: Tensor) -> DynamicCache:
        """Of beam search in transformers before 4.56."""
        past_key_values.reorder_cache(beam_idx)
        return past_key_values

    @torch.no_grad()
    def generate(
        self,
        num_samples: int = 1,
        num_steps: int = 128,
        template: Tensor | None = None,
        p_nucleus: float = 1.0,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        *,
        prompt: Any = None,
        temperature: float = 1.0,
        predictor: str = "ancestral",
        noise_removal: str = "ancestral",
        num_blocks: int | None = None,
        stop_at_eos: bool = False,
        **others: Any,
    ) -> Tensor:
        """Draws samples: by a sampler of diffusion, or token by token from the left.

        With `block_size` = L' this is done block by block, each given the clean ones
        before it, at most L - L' tokens, whose keys and values are kept. The network
        is evaluated without dropout, whatever mode the model is in.

        Args:
            num_samples: B.
            num_steps: Steps from t = 1 to t = 1e-5, of each block if there are such;
                without effect when causal, and for first_hitting.
            template: Ids that samples hold, -1 where one is to be drawn; (L,) or
                (B, L). A causal model writes left to right whatever comes later.
            p_nucleus: Mass of the tokens that are kept.
            seed: Of a generator on the model's device.
            generator: In place of a seed; without both, torch's global one.
            prompt: Ids behind bos that samples begin with, (n,) or (B, n), in the
                place of a template.
            temperature: Divides log-probabilities, before the nucleus; 0 takes the
                most likely token.
            predictor: ancestral or, of masked models, first_hitting.
            noise_removal: The end of ancestral: ancestral, or greedy for the most
                likely tokens.
            num_blocks: Blocks of a sample, also more than `model_length` has room for;
                None: as many as that has.
            stop_at_eos: With blocks, whether a sample ends at its first eos behind the
                first token and all that is given: the rest is eos.
            others: Not possible; named in the message.

        Returns:
            Token ids, (B, L); L is num_blocks L' where that is given.

        Raises:
            ValueError: If an argument makes no sense for this model.
        """
        config, device = self.config, self.device
        if others:
            raise ValueError(
                f"generate({', '.join(sorted(others))}): there are no such arguments; "
                "this model draws whole samples, and takes ids that these begin with "
                "as prompt= and ids with gaps as template=."
            )
        options = temperature, p_nucleus, predictor, noise_removal
        check_options(config, num_samples, num_steps, *options)
        length = length_of(config, num_blocks, stop_at_eos)
        x = template_of(config, template, prompt, num_samples, length).to(device)
        if seed is not None:
            generator = torch.Generator(device).manual_seed(seed)
        free = x == -1
        draw = Draw(self, temperature, p_nucleus, generator)
        with evaluated(self):
            if config.causal:
                return draw.left_to_right(x, free)
            steps = num_steps, predictor, noise_removal
            if config.block_size is not None:
                return draw.by_blocks(x, free, stop_at_eos, *steps)
            return draw.diffusion(x, free, *steps)


# What `generate` of these models takes, and that of `transformers` does not.
OWN_ARGUMENTS = {
    "num_samples", "num_steps", "template", "p_nucleus", "seed", "generator", "prompt",
    "predictor", "noise_removal", "num_blocks", "stop_at_eos",
}  # fmt: skip


@contextmanager
def evaluated(model: nn.Module) -> Iterator[None]:
    """Without dropout; afterwards every module is in the mode that it was in."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _as_cache(past: Any) -> DynamicCache | None:
    """A cache; transformers before 4.56 makes tuples of it where it is cut."""
    is_old = isinstance(past, (tuple, list))
    return DynamicCache.from_legacy_cache(past) if is_old else past


def _mask_of(attention_mask: Tensor | None, types: Tensor | None) -> Tensor | None:
    """Which tokens there are, (B, L) bool; None where nothing is said.

    Raises:
        ValueError: If these models cannot do what is asked for.
    """
    if types is not None and (types != types[..., :1]).any():
        raise ValueError(
            "token_type_ids tell segments apart, which these models do not know; "
            "leave them out."
        )
    if attention_mask is None:
        return None
    if (
        attention_mask.ndim != 2
        or ((attention_mask != 0) & (attention_mask != 1)).any()
    ):
        raise ValueError(
            f"attention_mask has shape {shape_of(attention_mask)}; give (B, L), 1 for "
            "a token and 0 for padding."
        )
    return attention_mask.bool()


class _WithLoss(DiscreteDiffusionModel):
    """Logits, and a loss where there are labels."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        timesteps: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: DynamicCache | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        cache: DynamicCache | None = None,
    ) -> MaskedLMOutput | CausalLMOutputWithPast | tuple:
        """Raw logits, (B, L, K).

        With `block_size` = L', `input_ids` are the tokens behind those of a cache. A
        pass with `use_cache=True` is kept: its tokens are clean ones of whole blocks,
        seen at t = 0, and the cache that is returned holds them. Any other pass leaves
        the cache as it is, such as one over a noisy block. Several blocks, with a cache
        or without, see those before them; one block alone is what the network sees as
        a whole.

        Args:
            input_ids: (B, L).
            timesteps: Noise level -log(alpha_t) of each sequence, (B,). Without
                effect, and not needed, where `time_conditioning` is false. A masked
                model that is told the noise level takes the share of its masks for it
                where it is missing.
            output_hidden_states: Whether to return all hidden states, too.
            return_dict: False returns a tuple.
            attention_mask: 0 for padding, (B, l + L): the logits of the other tokens
                are as if it were not there.
            token_type_ids: One segment only.
            labels: Clean tokens, (B, L), -100 where there is no loss. The loss is the
                mean cross entropy in nats, in which the mask has no probability. That
                of a causal model is of each token given those before it; that of the
                others of each label at its own position. It has no weights of the
                diffusion bound in it.
            inputs_embeds: (B, L, D) in the place of `input_ids`.
            past_key_values: Keys and values of the l tokens before, if causal or with
                blocks.
            use_cache: Whether to return such, with these tokens.
            output_attentions: Not possible.
            cache: Another name of `past_key_values`, that of new transformers.
        """
        out = super().forward(
            input_ids,
            timesteps,
            output_hidden_states,
            True,
            attention_mask,
            token_type_ids,
            inputs_embeds,
            past_key_values,
            use_cache,
            output_attentions,
            cache,
        )
        logits = self.get_output_embeddings()(out.last_hidden_state)
        fields = {"logits": logits, "hidden_states": out.hidden_states}
        if labels is not None:
            fields["loss"] = self._loss(logits, labels)
        past = getattr(out, CACHE)
        has_past = self.config.causal or past is not None
        if has_past:
            fields[CACHE] = past
        if return_dict is None:
            return_dict = getattr(self.config, "return_dict", True)
        kind = CausalLMOutputWithPast if has_past else MaskedLMOutput
        return kind(**fields) if return_dict else kind(**fields).to_tuple()

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        if labels.shape != logits.shape[:-1]:
            raise ValueError(
                f"labels has shape {shape_of(labels)}; give "
                f"{shape_of(logits[..., 0])}, one for each token."
            )
        labels = labels.to(logits.device)
        if self.config.causal:
            logits, labels = logits[:, :-1], labels[:, 1:]
        logits = without_mask(logits.float(), self.config.mask_index)
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())  # but for -100


class DiscreteDiffusionForMaskedLM(_WithLoss):
    """For `AutoModelForMaskedLM`."""


class DiscreteDiffusionForCausalLM(_WithLoss, GenerationMixin):
    """For `AutoModelForCausalLM`."""

    @classmethod
    def can_generate(cls) -> bool:
        return True

    @torch.no_grad()
    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Draws samples of `model_length` tokens, or continues `input_ids`.

        With nothing, or with arguments of `DiscreteDiffusionModel.generate` alone,
        that; with others `generate` of `transformers`.

        Raises:
            ValueError: If arguments of both are given.
        """
        own = OWN_ARGUMENTS & kwargs.keys()
        is_own = not args or isinstance(args[0], int)
        if is_own and kwargs.keys() <= OWN_ARGUMENTS | {"temperature"}:
            return super().generate(*args, **kwargs)
        if own:
            raise ValueError(
                f"generate({', '.join(sorted(own))}) draws whole samples, and the "
                "other arguments are those of transformers' generate, which continues "
                "input_ids; give one kind."
            )
        with evaluated(self):
            return GenerationMixin.generate(self, *args, **kwargs)
