"""`mode=export`: a checkpoint as a Hugging Face folder, for us and for `transformers`.

The folder is a function of the checkpoint and of the files in `checkpoints/modeling`
alone, so that exporting what was exported gives the same bytes.
"""

import copy
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from checkpoints.about import (
    BLOCKS,
    NETWORK,
    TOLD,
    TRANSFORMERS,
    adopt,
    is_plain,
    likelihood,
    missing_plugins,
    own_algorithms,
)
from checkpoints.card import card
from checkpoints.checkpoint import Checkpoint
from checkpoints.huggingface import (
    CONFIG,
    OWN,
    OWN_VALUES,
    SIZES,
    TOKENIZER_FILES,
    VALUES,
    WEIGHTS,
)
from checkpoints.keys import key_report
from checkpoints.locating import is_hub_id
from checkpoints.reading import read_checkpoint
from data.tokenizers import PIXELS, get_tokenizer
from models.noise import SCHEDULES, settings_of
from models.registry import block_size_of, build_backbone
from utils import ADDED, CONFIGS, ConfigError, first_line, hub_answers

log = logging.getLogger(__name__)

HERE = Path(__file__).parent
MODELLING = "modeling_discrete_diffusion"
CONFIGURATION = "configuration_discrete_diffusion"
# Files of `checkpoints/modeling` that go along.
CODE = (
    MODELLING,
    CONFIGURATION,
    "network_discrete_diffusion",
    "sampling_discrete_diffusion",
)
TOKENIZER = "data.tokenizer_name_or_path"
CHECKPOINT = "eval.checkpoint_path"
# Keys of ours that a checkpoint may state; what it states wins over the command line.
STATED = (
    *NETWORK,
    "model.length",
    "data.vocab_size",  # of the synthetic tokenizer
    "data.bos_token",
    *VALUES.values(),
    *OWN_VALUES.values(),
)


def export(
    config: DictConfig, algorithm_class: Callable[[DictConfig], type[Any]]
) -> dict[str, str]:
    """Writes the folder, and puts it on the hub if asked to.

    Args:
        config: The run's config; what the checkpoint states of `algo`, `model`,
            `noise` and the tokenizer holds instead.
        algorithm_class: Gives the class of the config's `algo`.

    Returns:
        What was written, as lines of a table.

    Raises:
        ConfigError: If the folder is taken, or the checkpoint does not fit.
    """
    folder = _free_folder(config)
    _check_repository(config.export.push_to_hub)
    trusted = config.checkpointing.trusted_classes
    checkpoint = read_checkpoint(config.eval.checkpoint_path, CHECKPOINT, trusted)
    config = _as_stated(config, checkpoint)
    algorithm = algorithm_class(config)
    backbone, num_classes = config.algo.backbone, config.data.get("num_classes")
    if backbone not in TRANSFORMERS or num_classes is not None:
        raise ConfigError(
            f"algo.backbone={backbone}, data.num_classes={num_classes}: the models of "
            "a folder are transformers without classes, and there is no other form; "
            "mode=sample_eval and mode=fid_eval take the checkpoint itself."
        )
    if config.noise.type in ADDED.get("noise", {}):
        raise ConfigError(
            f"noise.type={config.noise.type!r} is of a plug-in, and the models of a "
            "folder stand alone; mode=sample_eval takes the checkpoint itself."
        )
    if algorithm.is_one_step:
        raise ConfigError(
            f"{CHECKPOINT}={config.eval.checkpoint_path!r} is a generator of one step, "
            "which the models of a folder cannot sample from; mode=sample_eval can."
        )
    tokenizer, tokenizer_folder = _tokenizer(config, checkpoint)
    vocab_size, mask_index = algorithm.vocabulary(tokenizer)
    model, weights = _network(config, checkpoint, vocab_size)
    fields = {
        **_hub_fields(algorithm),
        **_stated_fields(config, checkpoint),
        "vocab_size": vocab_size,
        "mask_index": mask_index,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "step": checkpoint.step,
        "val_ppl": None if config.eval.disable_ema else checkpoint.val_ppl,
        "weights": weights,
        "likelihood": checkpoint.likelihood or likelihood(config.algo.name),
    }
    with _whole_folder(folder) as partial:
        _save_weights(model, partial / WEIGHTS)
        _save_tokenizer(tokenizer, tokenizer_folder, partial)
        fields["tokenizer_class"] = _tokenizer_class(partial)
        _write_fields(partial / CONFIG, fields)
        for name in CODE:
            shutil.copyfile(HERE / "modeling" / f"{name}.py", partial / f"{name}.py")
        size = sum(parameter.numel() for parameter in model.parameters())
        has_mask = tokenizer.mask_token_id is not None
        has_mask &= mask_index == tokenizer.mask_token_id
        (partial / "README.md").write_text(card(fields, size, has_mask))
        _open_up(partial)
    if config.export.push_to_hub:
        _push(folder, config.export.push_to_hub)
    return {
        "folder": str(folder),
        "algorithm": config.algo.name,
        "weights": weights,
        "parameters": f"{size:,}",
        "hub": config.export.push_to_hub or "not asked for (export.push_to_hub)",
    }


# ---------------------------------------------------------------- what can be refused


def _free_folder(config: DictConfig) -> Path:
    path = config.export.path
    if not path or "://" in path:
        raise ConfigError(
            f"export.path={path!r} is no local folder: give one to write to."
        )
    folder = Path(path)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(
            f"export.path={path!r} exists; it is not overwritten. Move it away or give "
            "another path."
        )
    return folder


def _check_repository(name: str | None) -> None:
    if name is None:
        return
    if not is_hub_id(name):
        raise ConfigError(f"export.push_to_hub={name!r} is not of the form owner/name.")
    if not hub_answers():
        raise ConfigError(
            f"export.push_to_hub={name!r}: the Hugging Face hub is out of reach; null "
            "writes the folder alone."
        )


# ---------------------------------------------------------------- what is exported


def _as_stated(config: DictConfig, checkpoint: Checkpoint) -> DictConfig:
    """A copy of the config that is the checkpoint's, as far as that tells."""
    config = copy.deepcopy(config)
    OmegaConf.set_readonly(config, False)
    name = checkpoint.setting("algo.name")
    if name is None:
        log.warning(
            "%s does not tell its algorithm; taken for algo=%s, as on the command line",
            config.eval.checkpoint_path,
            config.algo.name,
        )
    elif name != config.algo.name:
        config.algo = _algo_config(name, missing_plugins(checkpoint, config))
    keys = set(STATED) - {BLOCKS}  # of which null is a value, too
    _take_blocks(config, checkpoint)
    if checkpoint.setting("noise.type") not in SCHEDULES:
        keys -= {x for x in keys if x.startswith("noise.")}
    tokenizer = checkpoint.setting(TOKENIZER)
    if tokenizer and os.path.isabs(tokenizer) and not os.path.exists(tokenizer):
        keys.remove(TOKENIZER)  # a folder on the machine of the training
    adopt(config, checkpoint, keys)
    if (name := config.noise.type) in SCHEDULES:  # of the command line's schedule
        kept = ("type", *settings_of(SCHEDULES[name]))
        config.noise = {key: x for key, x in config.noise.items() if key in kept}
    if checkpoint.setting(TOLD) and config.algo.time_conditioning:
        raise ConfigError(
            f"{CHECKPOINT}={config.eval.checkpoint_path!r} was trained with "
            f"{TOLD}=True and algo.time_conditioning=True: its network is told another "
            "time than models of a folder are; modes of main.py take the checkpoint "
            "itself."
        )
    return config


def _take_blocks(config: DictConfig, checkpoint: Checkpoint) -> None:
    """Gives `algo.block_size` the checkpoint's value, if that tells its algorithm.

    Of several sizes the command line may choose one.
    """
    size, ours = checkpoint.setting(BLOCKS), config.algo.get("block_size")
    is_chosen = isinstance(size, (list, tuple)) and ours in size
    if checkpoint.setting("algo.name") is None or is_chosen or not is_plain(size):
        return
    if size is not None or ours is not None:
        OmegaConf.update(config, BLOCKS, size, force_add=True)


def _algo_config(name: str, advice: str = "") -> DictConfig:
    """`configs/algo/NAME.yaml`, or that of a plug-in, with what it builds upon."""
    if name not in own_algorithms():
        raise ConfigError(
            f"{CHECKPOINT} is of algo={name}, which is not among ours; give "
            f"algo={name} with the config it was trained with.{advice}"
        )
    added = ADDED.get("algo", {}).get(name)
    path = CONFIGS / "algo" / f"{name}.yaml"
    content = OmegaConf.load(path) if added is None else OmegaConf.create(added)
    node = cast(DictConfig, content)  # no file there holds a list
    parents = [x for x in node.pop("defaults", []) if x != "_self_"]
    return cast(DictConfig, OmegaConf.merge(*(_algo_config(x) for x in parents), node))


def _tokenizer(config: DictConfig, checkpoint: Checkpoint) -> tuple[Any, Path | None]:
    """The tokenizer, and the folder of the checkpoint if it has one of its own."""
    folder, name = checkpoint.folder, config.data.tokenizer_name_or_path
    if name in PIXELS:
        raise ConfigError(
            f"{CHECKPOINT}={config.eval.checkpoint_path!r} is a model of images "
            f"({TOKENIZER}={name}), and the models of a folder are of text; modes of "
            "main.py take the checkpoint itself."
        )
    if folder is None or not (folder / "tokenizer_config.json").exists():
        return get_tokenizer(config), None
    _check_links(folder)
    own = OmegaConf.create({"data": {"tokenizer_name_or_path": str(folder)}})
    return get_tokenizer(own), folder


def _check_links(folder: Path) -> None:
    """Refuses links out of a folder: what they lead to would be copied and uploaded.

    Files in the cache of the hub are links to its `blobs`.
    """
    real = folder.resolve()
    places = (real, real.parent.parent / "blobs")
    for name in TOKENIZER_FILES:
        target = (folder / name).resolve()
        if not any(target.is_relative_to(place) for place in places):
            raise ConfigError(
                f"{CHECKPOINT}={str(folder)!r}: {name} is a link out of the folder; "
                "put the file itself there."
            )


def _network(
    config: DictConfig, checkpoint: Checkpoint, vocab_size: int
) -> tuple[nn.Module, str]:
    """The network under its name in checkpoints, and whether its weights are EMA."""
    model = nn.ModuleDict({"backbone": build_backbone(config, vocab_size)})
    where = f"{CHECKPOINT}={config.eval.checkpoint_path!r}"
    weights = checkpoint.weights or {}
    advice = missing_plugins(checkpoint, config)
    key_report(model, weights).raise_if_any(where, advice)
    model.load_state_dict(weights)
    ema = checkpoint.ema
    kind = "raw" if ema is None or config.eval.disable_ema else "EMA"
    if found := checkpoint.not_finite([kind]):
        raise ConfigError(f"{where} is of a run that has diverged: {found}.")
    if ema is None or config.eval.disable_ema:
        return model, checkpoint.weights_kind or "raw"
    parameters: list[Tensor] = list(model.parameters())
    shadow: list[Tensor] = ema["shadow_params"]
    if [p.shape for p in parameters] != [x.shape for x in shadow]:
        raise ConfigError(
            f"{where} has EMA weights of another network; eval.disable_ema=True "
            "exports the raw ones."
        )
    with torch.no_grad():
        torch._foreach_copy_(parameters, shadow)
    return model, "EMA"


def _hub_fields(algorithm: type[Any]) -> dict[str, Any]:
    """What `transformers` needs to know, and how samples are drawn."""
    causal = algorithm.is_autoregressive
    head = "ForCausalLM" if causal else "ForMaskedLM"
    other = "absorbing" if algorithm.has_mask else "uniform"
    return {
        "model_type": OWN,
        "architectures": [f"DiscreteDiffusion{head}"],
        "auto_map": {
            "AutoConfig": f"{CONFIGURATION}.DiscreteDiffusionConfig",
            "AutoModel": f"{MODELLING}.DiscreteDiffusionModel",
            f"AutoModel{head}": f"{MODELLING}.DiscreteDiffusion{head}",
        },
        "process": "autoregressive" if causal else other,
        "tie_word_embeddings": False,
    }


def _stated_fields(config: DictConfig, checkpoint: Checkpoint) -> dict[str, Any]:
    """Fields that are values of our config."""
    keys = {**SIZES, **VALUES, **OWN_VALUES}
    fields = {name: OmegaConf.select(config, key) for name, key in keys.items() if key}
    del fields["block_size"]
    if (size := block_size_of(config)) is not None:
        fields["block_size"] = size
    # Not what a default says; and a path is of no use elsewhere.
    fields["training_data"] = checkpoint.setting("data.train")
    fields["validation_data"] = checkpoint.setting("data.valid")
    if checkpoint.folder is not None:
        fields["tokenizer"] = checkpoint.setting(TOKENIZER)
    elif os.path.isabs(fields["tokenizer"]):
        fields["tokenizer"] = None
    return fields


# ---------------------------------------------------------------- files


@contextmanager
def _whole_folder(folder: Path) -> Iterator[Path]:
    """A folder to write to that appears under its name when it is complete."""
    partial = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.rename(folder)  # takes the place of an empty folder
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _open_up(folder: Path) -> None:
    """Gives all files the mode that the umask says; some are written for us alone."""
    mode = (folder / "README.md").stat().st_mode
    for path in folder.iterdir():
        path.chmod(mode)


def _write_fields(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def _save_weights(model: nn.Module, path: Path) -> None:
    from safetensors.torch import save_file

    weights = {name: x.contiguous() for name, x in model.state_dict().items()}
    save_file(weights, path, metadata={"format": "pt"})


def _save_tokenizer(tokenizer: Any, source: Path | None, folder: Path) -> None:
    """Its files as they were, or as any version of `transformers` reads them."""
    if source is not None:
        for name in TOKENIZER_FILES:
            if (source / name).exists():
                shutil.copyfile(source / name, folder / name)
        return
    tokenizer.save_pretrained(folder)
    core = folder / "tokenizer.json"
    if not core.exists():
        return
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    for name in ("backend", "is_local", "local_files_only", "name_or_path"):
        settings.pop(name, None)
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    settings["model_input_names"] = ["input_ids", "attention_mask"]  # no segments
    _write_fields(folder / "tokenizer_config.json", settings)
    content = json.loads(core.read_text(encoding="utf-8"))
    merges = content["model"].get("merges")
    if merges and not any(" " in part for pair in merges for part in pair):
        content["model"]["merges"] = [" ".join(pair) for pair in merges]  # before 4.45
        text = json.dumps(content, ensure_ascii=False, indent=2)
        core.write_text(text, encoding="utf-8")


def _tokenizer_class(folder: Path) -> str | None:
    """Without it in config.json, pipelines of old versions look for no tokenizer."""
    path = folder / "tokenizer_config.json"
    if not path.exists():
        return None
    name = json.loads(path.read_text()).get("tokenizer_class")
    return name if isinstance(name, str) else None


def _push(folder: Path, name: str) -> None:
    """Uploads the folder; a repository that is not there yet is made private."""
    from huggingface_hub import HfApi

    try:
        HfApi().create_repo(name, private=True, exist_ok=True)
        HfApi().upload_folder(repo_id=name, folder_path=folder)
    except Exception as error:  # of many kinds: no account, no right, no network
        raise ConfigError(
            f"export.push_to_hub={name!r} failed ({first_line(error)}); the folder is "
            f"complete: {folder}."
        ) from None
