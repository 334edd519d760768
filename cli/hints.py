"""What a newcomer may have meant by a key or a word that there is not."""

import difflib
from collections.abc import Iterable

# Words of other programs, and of one's own, for keys of this one.
MEANT = {
    "batch": ("loader.global_batch_size", "loader.batch_size"),
    "batch_size": ("loader.global_batch_size", "loader.batch_size"),
    "bs": ("loader.global_batch_size", "loader.batch_size"),
    "checkpoint": ("eval.checkpoint_path", "training.finetune_path"),
    "ckpt": ("eval.checkpoint_path", "training.finetune_path"),
    "ckpt_path": ("eval.checkpoint_path", "training.finetune_path"),
    "corpus": ("data.path",),
    "dataset": ("data",),
    "device": ("trainer.accelerator", "trainer.devices"),
    "dim": ("model.hidden_size",),
    "epochs": ("trainer.max_steps",),
    "file": ("data.path",),
    "folder": ("hydra.run.dir",),
    "gpus": ("trainer.devices",),
    "grad_clip": ("trainer.gradient_clip_val",),
    "heads": ("model.n_heads",),
    "init_from": ("training.finetune_path",),
    "judge": ("eval.gen_ppl_eval_model_name_or_path",),
    "layers": ("model.n_blocks",),
    "learning_rate": ("optim.lr",),
    "max_epochs": ("trainer.max_steps",),
    "max_len": ("model.length",),
    "max_length": ("model.length",),
    "n_layers": ("model.n_blocks",),
    "name": ("hydra.run.dir", "wandb.name"),
    "nodes": ("trainer.num_nodes",),
    "nucleus": ("sampling.p_nucleus",),
    "num_epochs": ("trainer.max_steps",),
    "num_gpus": ("trainer.devices",),
    "num_layers": ("model.n_blocks",),
    "num_samples": ("sampling.num_sample_batches", "loader.eval_batch_size"),
    "num_steps": ("trainer.max_steps", "sampling.steps"),
    "out": ("hydra.run.dir",),
    "out_dir": ("hydra.run.dir",),
    "output": ("hydra.run.dir",),
    "output_dir": ("hydra.run.dir",),
    "resume": ("checkpointing.resume_ckpt_path",),
    "run_dir": ("hydra.run.dir",),
    "run_name": ("hydra.run.dir", "wandb.name"),
    "sampler": ("sampling.predictor",),
    "save_every": ("callbacks.checkpoint_every_n_steps.every_n_train_steps",),
    "schedule": ("noise", "lr_scheduler"),
    "scheduler": ("lr_scheduler",),
    "seq_len": ("model.length",),
    "steps": ("trainer.max_steps", "sampling.steps"),
    "text": ("data.path", "sampling.prompt"),
    "tokenizer": ("data.tokenizer_name_or_path",),
    "top_p": ("sampling.p_nucleus",),
    "train_steps": ("trainer.max_steps",),
    "val_every": ("trainer.val_check_interval",),
    "warmup": ("lr_scheduler.num_warmup_steps",),
    "warmup_steps": ("lr_scheduler.num_warmup_steps",),
    "wd": ("optim.weight_decay",),
    "workers": ("loader.num_workers",),
}
# Groups in the order in which a last part is looked for; then all others.
FIRST = ("model", "loader", "trainer", "optim", "training", "sampling", "eval", "data")
MOST = 3  # keys that are named


def key_hint(key: str, known: Iterable[str]) -> str:
    """' Did you mean ...?' of keys, or nothing.

    Args:
        key: That there is not.
        known: The keys that there are, dotted.
    """
    keys = sorted(known, key=_rank)
    last = key.rpartition(".")[2]
    found = [x for x in keys if x.rpartition(".")[2] == last and "." in x]
    if "." not in key and last in MEANT:  # what is meant comes first
        found = list(dict.fromkeys((*MEANT[last], *found)))
    found = found or [x for x in MEANT.get(last, ()) if last != key]
    found = found or _alike(key, keys)
    if not found:
        return ""
    *some, one = (f"{x!r}" for x in found[:MOST])
    return f" Did you mean {' or '.join((', '.join(some), one) if some else (one,))}?"


def _rank(key: str) -> tuple[int, str]:
    group = key.partition(".")[0]
    return FIRST.index(group) if group in FIRST else len(FIRST), key


def _alike(key: str, keys: list[str]) -> list[str]:
    """The key that is spelt most alike: by its last part within its group, by its last
    part anywhere, or as a whole."""
    group, _, last = key.rpartition(".")
    within = {x.rpartition(".")[2]: x for x in keys if x.rpartition(".")[0] == group}
    anywhere: dict[str, str] = {}
    for x in keys:
        anywhere.setdefault(x.rpartition(".")[2], x)
    for names, cutoff in ((within, 0.6), (anywhere, 0.75)):
        if close := difflib.get_close_matches(last, names, n=1, cutoff=cutoff):
            return [names[close[0]]]
    return difflib.get_close_matches(key, keys, n=1, cutoff=0.8)
