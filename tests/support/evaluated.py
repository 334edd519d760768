"""Contents of likelihood.json, samples.json and fid.json as evaluations of the papers'
models with the papers' settings would leave them; overrides are paths with slashes."""

import json
from pathlib import Path
from typing import Any

from checkpoints.about import DISTILLED
from report.runs import Evaluation, evaluation


def _with(content: dict, overrides: dict[str, Any]) -> dict:
    for dotted, value in overrides.items():
        *groups, name = dotted.split("/")
        node = content
        for group in groups:
            node = node[group]
        node[name] = value
    return content


def _checkpoint(algo: str) -> dict:
    is_distilled = algo in DISTILLED
    return {
        "path": "some.ckpt",
        "algo": algo,
        "distilled": is_distilled,
        "step": 50_000 if is_distilled else 1_000_000,
        "update_teacher_every": 10_000 if is_distilled else None,
        "teacher_ema": False if algo == "distillation" else None,
        "weights": "EMA",
    }


def likelihood(
    valid: str = "openwebtext-valid", ppl: float = 25.2, algo: str = "duo_base", **other
) -> dict:
    """likelihood(..., **{"data/wrap": False}); zero-shot where `valid` is no OWT."""
    return _with(
        {
            "mode": "ppl_eval",
            "algo": algo,
            "seed": 1,
            "checkpoint": _checkpoint(algo),
            "data": {
                "valid": valid,
                "tokenizer": "gpt2",
                "length": 1024,
                "wrap": True,
                "insert_valid_eos": valid == "openwebtext-valid",
                "limit_val_batches": 1.0,
                "documents": 8_013_769,
                "published_documents": 8_013_769,
                "rows": 100,
                "tokens": 102_400,
                "sha256": "ab" * 32,
                "expected_sha256": None,
            },
            "nll": 3.2,
            "nll_stderr": 0.002,
            "bpd": 4.6,
            "bpd_stderr": 0.003,
            "ppl": ppl,
            "ppl_stderr": 0.05,
        },
        other,
    )


def samples(
    steps: int = 32,
    ppl: float | None = 96.19,
    entropy: float = 5.57,
    algo: str = "duo_base",
    trained_as: str | None = None,
    **other,
) -> dict:
    """samples(..., **{"settings/sampling/noise_removal": "greedy"})."""
    return _with(
        {
            "generative_ppl": ppl,
            "generative_ppl_stderr": None if ppl is None else 0.5,
            "entropy": entropy,
            "entropy_stderr": 0.005,
            "num_samples": 800,
            "checkpoint": _checkpoint(trained_as or algo),
            "complete": True,
            "settings": {
                "algo": {"name": algo},
                "model": {"length": 1024},
                "seed": 1,
                "sampling": {
                    "steps": steps,
                    "predictor": "ancestral",
                    "noise_removal": "ancestral",
                    "use_float64": True,
                    "p_nucleus": 1.0,
                    "semi_ar": False,
                    "prompt": None,
                    "prompt_file": None,
                    "infill": None,
                },
                "data.tokenizer_name_or_path": "gpt2",
                "eval.checkpoint_path": "some.ckpt",
                "eval.gen_ppl_eval_model_name_or_path": "gpt2-large",
            },
            "generated_seqs": ["a", "b"],
        },
        other,
    )


def images(steps: int = 64, fid: float = 20.5, algo: str = "duo_base", **other) -> dict:
    """images(..., **{"sampling/guid_weight": 2.0})."""
    return _with(
        {
            "mode": "fid_eval",
            "algo": algo,
            "seed": 1,
            "checkpoint": _checkpoint(algo),
            "data": {"train": "cifar10", "length": 3072, "num_classes": 10},
            "sampling": {
                "steps": steps,
                "refine_steps": 0,
                "predictor": "ancestral",
                "guid_weight": 1.0,
                "noise_removal": "ancestral",
                "p_nucleus": 1.0,
                "use_float64": True,
                "noise": "cosine",
                "batch_size": 500,
                "processes": 2,
                "global_batch_size": 1000,
            },
            "extractor": {"path": "a.pth", "sha256": "ab" * 32, "kind": "Inception"},
            "fid": fid,
            "inception_score": 8.5,
            "inception_score_std": 0.1,
            "num_images": 50_000,
            "num_real": 50_000,
            "num_features": 2048,
            "evaluations": 64.0,
            "sampling_seconds": 10.0,
            "seconds": 12.0,
            "images": "images.npz",
            "picture": "images.png",
        },
        other,
    )


def read(content: dict, model: str | None = None) -> Evaluation:
    """What a report takes a file's content for."""
    mode = content.get("mode", "sample_eval")
    return evaluation("some.json", mode, content)._replace(model=model)


def write(path: Path, content: Any) -> str:
    """A file of a text, or of anything else as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def compute(budget: float, size: float, nll: float, **other) -> dict:
    """compute.json of a run of mode=train."""
    tokens = budget / (6 * size)
    return {
        "mode": "train",
        "algo": "mdlm",
        "loss_type": "elbo",
        "data": "docstrings",
        "train_data": "docstrings",
        "tokenizer": "text8",
        "length": 64,
        "global_batch_size": 16,
        "model": "tiny",
        "seed": 1,
        "budget": budget,
        "flops": budget,
        "flops_per_token": 6 * size,
        "parameters": size,
        "steps": 10,
        "tokens": tokens,
        "nll": nll,
        "nll_stderr": 0.01,
        "weights": "raw",
        **other,
    }
