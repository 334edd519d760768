"""Lightning files of MDLM's code, small: its config dialect, pickled as there."""

from pathlib import Path

import torch
from omegaconf import OmegaConf
from released import SIZES, random_weights

from data.tokenizers import bytes_tokenizer

CONFIG = {
    "mode": "train",
    "diffusion": "absorbing_state",
    "backbone": "dit",
    "parameterization": "subs",
    "time_conditioning": False,
    "T": 0,
    "subs_masking": False,
    "seed": 1,
    "loader": {"global_batch_size": 512, "batch_size": 64},
    "sampling": {"predictor": "ddpm_cache", "steps": 128, "noise_removal": True},
    "training": {"ema": 0.9999, "importance_sampling": False},
    "data": {
        "train": "openwebtext-train",
        "valid": "openwebtext-valid",
        "tokenizer_name_or_path": "gpt2",
        "cache_dir": "/share/cache",
        "wrap": True,
        "streaming": False,
    },
    "model": {
        "name": "small",
        "type": "ddit",
        "hidden_size": SIZES["hidden_dim"],
        "cond_dim": SIZES["cond_dim"],
        "length": 16,
        "n_blocks": SIZES["n_blocks"],
        "n_heads": SIZES["n_heads"],
        "scale_by_sigma": True,
        "dropout": SIZES["dropout"],
        "tie_word_embeddings": False,
    },
    "noise": {"type": "loglinear", "sigma_min": 1e-4, "sigma_max": 20},
    "checkpointing": {"save_dir": "${cwd:}", "resume_from_ckpt": True},
    "wandb": {"id": "${.name}_${seed}", "name": None},
}


def write_file(path: Path, vocab_size: int, *, raw: float = 1.0, **changes) -> dict:
    """Writes a file; what it holds is returned.

    Args:
        raw: Factor of the raw weights to those of the EMA.
        changes: Of CONFIG, whose nodes are merged.
    """
    config = OmegaConf.merge(CONFIG, changes)
    causal = config.parameterization == "ar"
    ema = random_weights(vocab_size, causal)
    buffers = {name for name in ema if name.endswith("inv_freq")}
    more = "backbone." if config.backbone == "hf_dit" else ""
    weights = {
        more + name: x if name in buffers else raw * x for name, x in ema.items()
    }
    shadow = [x for name, x in ema.items() if name not in buffers]
    optimizer = torch.optim.AdamW([x.clone().requires_grad_() for x in shadow])
    content = {
        "epoch": 2,
        "global_step": 1_000_000,
        "pytorch-lightning_version": "2.2.1",
        "state_dict": weights,
        "loops": {"fit_loop": {"epoch_progress": {"current": {"completed": 2}}}},
        "callbacks": {},
        "optimizer_states": [optimizer.state_dict()],
        "lr_schedulers": [{"last_epoch": 1_000_000}],
        "hyper_parameters": {"config": config, "tokenizer": bytes_tokenizer()},
        "ema": {
            "decay": 0.9999,
            "num_updates": 1_000_000,
            "shadow_params": shadow,
        },
        "sampler": {"random_state": None},
    }
    torch.save(content, path)
    return content
