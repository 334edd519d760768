"""What a checkpoint is and how it fits a run: lines that describe it, where it differs
from the command line, and what a config takes over from it.
"""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

from checkpoints.checkpoint import Checkpoint
from checkpoints.keys import check_sizes, sizes_of
from checkpoints.schema import is_reference
from utils import choices_of

# ---------------------------------------------------------------- what a file is

# Algorithms whose networks mean the same; a distilled one has its own line.
ALIKE = ({"duo", "duo_base", "distillation"}, {"mdlm", "sdtt", "dimo"})
DISTILLED = ("distillation", "sdtt", "dimo")
# By which the network is told another time.
TOLD = "training.change_of_variables"
BLOCKS = "algo.block_size"  # of which null is a value, too: whole rows
# Keys in which a run should be as the one that made its checkpoint.
COMPARED = (
    "algo.name",
    "algo.time_conditioning",
    BLOCKS,
    TOLD,
    "data.tokenizer_name_or_path",
    "model.length",
)


def adopt(config: DictConfig, checkpoint: Checkpoint, keys: Iterable[str]) -> None:
    """Gives keys of a run's config the values that a checkpoint states.

    Args:
        config: Changed in place.
        checkpoint: One that may state them.
        keys: Those that the checkpoint does not state, or states by a reference to
            other values, stay as they are.

    Raises:
        ConfigError: If it states sizes that are not those of its weights.
    """
    taken = {}
    for key in keys:
        value = checkpoint.setting(key)
        if value is not None and not isinstance(value, dict) and is_plain(value):
            OmegaConf.update(config, key, value, force_add=True)
            taken[key] = value
    if checkpoint.shapes and config.algo.backbone in TRANSFORMERS:
        sizes = {key.removeprefix("model."): x for key, x in taken.items()}
        check_sizes(checkpoint.shapes, sizes, "the checkpoint")


def is_plain(value: Any) -> bool:
    """Whether a config may hold it as it is: numbers, texts and lists of these.

    Nothing of a checkpoint is interpolated: what would be is not taken over.
    """
    if isinstance(value, (list, tuple)):
        return all(map(is_plain, value))
    is_value = value is None or isinstance(value, (bool, int, float, str))
    return is_value and not is_reference(value)


TRANSFORMERS = ("dit", "hf_dit")  # values of algo.backbone
# What `algo.backbone=hf_dit` takes from a checkpoint.
NETWORK = (
    "model.hidden_size",
    "model.cond_dim",
    "model.n_blocks",
    "model.n_heads",
    "model.dropout",
)

# Names of the rows of tokens, (K, D), by the kind of network.
EMBEDDINGS = (
    "backbone.vocab_embed.embedding",
    "backbone.model.bimamba.backbone.embeddings.word_embeddings.weight",
)
# Ends of names of what is no parameter, or one that has another name, too.
UNCOUNTED = ("inv_freq", "mamba_rev.in_proj.weight", "mamba_rev.out_proj.weight")


def describe(checkpoint: Checkpoint) -> dict[str, str]:
    """What a checkpoint is, as lines of a table."""
    weights = checkpoint.weights or {}
    embedding = next((weights[name] for name in EMBEDDINGS if name in weights), None)
    shape = () if embedding is None else embedding.shape
    sizes = [x.numel() for name, x in weights.items() if not name.endswith(UNCOUNTED)]
    has_optimizer = checkpoint.optimizer_states not in (None, [])
    ema, teacher = checkpoint.ema, checkpoint.teacher
    algo = checkpoint.setting("algo.name")
    lines = {
        "format": checkpoint.format,
        "algorithm": algo,
        "likelihood": checkpoint.likelihood or likelihood(algo),
        "tokenizer": checkpoint.setting("data.tokenizer_name_or_path"),
        "training data": checkpoint.setting("data.train"),
        "length": checkpoint.setting("model.length"),
        "blocks": blocks_of(checkpoint),
        "vocabulary": shape[0] if len(shape) == 2 else None,
        "parameters": f"{sum(sizes):,}" if sizes else None,
        "step": checkpoint.step,
        "epoch": checkpoint.epoch,
        "EMA": "none" if ema is None else _ema(ema),
        "weights": checkpoint.weights_kind,
        "not finite": checkpoint.not_finite(),
        "distillation round": teacher.get("round") if teacher else None,
        "optimiser state": "yes" if has_optimizer else "no",
        "plug-ins": ", ".join(plugins_of(checkpoint)) or None,
        "lightning": checkpoint.lightning_version,
    }
    always = ("algorithm", "tokenizer", "length", "vocabulary", "parameters", "step")
    return {
        name: "not stated" if value is None else str(value)
        for name, value in lines.items()
        if value is not None or name in always
    }


def blocks_of(checkpoint: Checkpoint) -> str | None:
    """The tokens of its blocks, in words; None: it has none, or does not say."""
    size = checkpoint.setting(BLOCKS)
    if isinstance(size, (list, tuple)):
        return f"of {', '.join(map(str, size))} tokens, drawn by row"
    return None if size is None else f"of {size} tokens"


def describe_network(checkpoint: Checkpoint) -> dict[str, str]:
    """Kind and sizes of its network, and its noise, as lines of a table."""
    weights = checkpoint.weights or {}
    rest = (x for name, x in weights.items() if not name.endswith(UNCOUNTED))
    count = sum(x.numel() for x in rest)
    embedding = next((weights[x].numel() for x in EMBEDDINGS if x in weights), None)
    lines = {
        "network": _network(checkpoint),
        "without embedding": None if embedding is None else f"{count - embedding:,}",
        "classes": checkpoint.setting("data.num_classes"),
        "noise": checkpoint.setting("noise.type"),
    }
    return {name: str(x) for name, x in lines.items() if x is not None}


def _network(checkpoint: Checkpoint) -> str | None:
    """Its kind and sizes, as the file states them; else as its weights have them."""
    kind = checkpoint.setting("model.type") or checkpoint.setting("algo.backbone")
    found = sizes_of(checkpoint.shapes)
    values = {key: checkpoint.setting(f"model.{key}") for key in SIZES}
    values = {key: found.get(key) if x is None else x for key, x in values.items()}
    words = [f"{SIZES[key]} {x}" for key, x in values.items() if x is not None]
    words = [str(kind), *words] if kind is not None else words
    return ", ".join(words) or None


SIZES = {
    "hidden_size": "hidden size",
    "n_blocks": "blocks",
    "n_heads": "heads",
    "cond_dim": "conditioning",
    "ch": "channels",
    "num_scales": "levels",
}


def likelihood(algo: str | None) -> str | None:
    """What the likelihood of an algorithm's models is worth."""
    if algo is None:
        return None
    if algo in DISTILLED:
        return "not comparable: distilled for few steps"
    return "exact" if algo == "ar" else "an upper bound, comparable"


def plugins_of(checkpoint: Checkpoint) -> list[str]:
    """Names of the plug-ins that it states; nothing is imported by them."""
    stated = checkpoint.setting("plugins")
    names = [stated] if isinstance(stated, str) else stated
    names = names if isinstance(names, list) else []
    return [name for name in names if isinstance(name, str) and name]


def _ema(ema: Mapping[str, Any]) -> str:
    return f"decay {ema['decay']}, {ema['num_updates']} updates"


def missing_plugins(checkpoint: Checkpoint, config: DictConfig) -> str:
    """What to add to a refusal of a checkpoint that was made with plug-ins which the
    command line does not name; nothing if there are none.

    They are named and not imported: a file does not say which code is run.
    """
    given = [config.plugins] if isinstance(config.plugins, str) else config.plugins
    missing = [name for name in plugins_of(checkpoint) if name not in given]
    if not missing:
        return ""
    return (
        f" It was made with plugins=[{','.join(missing)}], which this command does not "
        "name: add them, if you trust their code, which is then run."
    )


def own_algorithms() -> list[str]:
    """Names of the algorithms of `configs/algo` and of plug-ins; others are unknown."""
    return choices_of("algo")


def disagreements(
    checkpoint: Checkpoint, config: DictConfig, known: Collection[str] = ()
) -> list[str]:
    """Where a checkpoint's own config says other things than a run's, one line each.

    Args:
        checkpoint: From `read_checkpoint`.
        config: The run's config.
        known: Keys of which it is known otherwise whether they agree.
    """
    lines = []
    for key in COMPARED:
        if key in known:
            continue
        if key == TOLD and not config.algo.time_conditioning:
            continue  # the network is told nothing
        theirs, ours = checkpoint.setting(key), OmegaConf.select(config, key)
        alike = theirs == ours or any({theirs, ours} <= names for names in ALIKE)
        alike |= ours == checkpoint.source  # the tokenizer in its folder
        if theirs is not None and not alike:
            shown = key.removesuffix(".name")
            lines.append(f"the file was made with {shown}={theirs}, not {ours}")
    distilled = checkpoint.setting("algo.name") in DISTILLED
    if distilled and config.mode == "ppl_eval":
        lines.append(
            "the file is of a distilled model, whose likelihood is not comparable with "
            "that of other models"
        )
    return lines
