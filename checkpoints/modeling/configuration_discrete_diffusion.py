"""Configuration of `modeling_discrete_diffusion.py`."""

from typing import Any, ClassVar

from transformers import PretrainedConfig


class DiscreteDiffusionConfig(PretrainedConfig):
    """Sizes of the network, and what sampling from it has to know.

    Args:
        vocab_size: K, a mask entry included where there is one.
        model_length: L, tokens of a sample.
        causal: Left-to-right attention and no noise conditioning.
        hidden_dim: D; a multiple of 2 n_heads.
        cond_dim: Width of the noise conditioning; unused when causal.
        n_blocks: Number of transformer blocks.
        n_heads: H.
        dropout: Rate on both residual branches, in training.
        algorithm: What the model was trained with.
        parameterization: What the raw logits mean in training.
        process: absorbing, uniform or autoregressive.
        time_conditioning: Whether the network is told the noise level.
        ignore_bos: Whether the first token is never noised.
        noise: Schedule, such as log-linear or cosine.
        noise_eps: Keeps alpha_1 above 0; None for schedules without.
        noise_sigma_min, noise_sigma_max: Total noise -log(alpha_t) at t = 0 and t = 1,
            of the schedules linear and geometric; None for others.
        mask_index: Id of the mask; None without one.
        block_size: L', tokens of the blocks that a text is written in, each given the
            clean ones before it; None: whole rows.
        kwargs: As for every config; ids of special tokens among them.
    """

    model_type = "discrete_diffusion"
    # Names that parts of `transformers` look for.
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "hidden_dim",
        "num_hidden_layers": "n_blocks",
        "num_attention_heads": "n_heads",
        "max_position_embeddings": "model_length",
    }

    def __init__(
        self,
        vocab_size: int = 50258,
        model_length: int = 1024,
        causal: bool = False,
        hidden_dim: int = 768,
        cond_dim: int = 128,
        n_blocks: int = 12,
        n_heads: int = 12,
        dropout: float = 0.1,
        algorithm: str = "mdlm",
        parameterization: str = "subs",
        process: str = "absorbing",
        time_conditioning: bool = False,
        ignore_bos: bool = False,
        noise: str = "log-linear",
        noise_eps: float | None = 1e-3,
        noise_sigma_min: float | None = None,
        noise_sigma_max: float | None = None,
        mask_index: int | None = None,
        block_size: int | None = None,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.model_length = model_length
        self.causal = causal
        self.hidden_dim = hidden_dim
        self.cond_dim = cond_dim
        self.n_blocks = n_blocks
        self.n_heads = n_heads
        self.dropout = dropout
        self.algorithm = algorithm
        self.parameterization = parameterization
        self.process = process
        self.time_conditioning = time_conditioning
        self.ignore_bos = ignore_bos
        self.noise = noise
        self.noise_eps = noise_eps
        self.noise_sigma_min = noise_sigma_min
        self.noise_sigma_max = noise_sigma_max
        self.mask_index = mask_index
        self.block_size = block_size
        kwargs.setdefault("tie_word_embeddings", False)
        super().__init__(**kwargs)

    @property
    def noise_settings(self) -> tuple[float, ...]:
        """What the schedule's levels are made of: sigma_min and sigma_max, or eps."""
        ends = (self.noise_sigma_min, self.noise_sigma_max)
        return (self.noise_eps,) if None in ends else ends  # type: ignore[return-value]
