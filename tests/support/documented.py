"""What README.md and the pages of docs/ state: commands, links, keys, names.

A command is a line of a ```bash block, or an inline code span that begins as one. Each
is of one of KINDS, and `tests/integration/test_readme.py` runs or checks every kind.
"""

import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import torch
from command_line import ROOT, run
from evaluated import compute, images, likelihood, samples
from released import SIZES, random_weights, write_released
from stand_ins import write_documents
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from data.tokenizers import bytes_tokenizer
from report.trajectory import Shown, write_page
from sampling.trajectory import Trajectory

PATHS = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "benchmarks" / "README.md",
]
PAGES = {str(path.relative_to(ROOT)): path.read_text() for path in PATHS}
KINDS = {
    "main": r"python main\.py .|discrete-diffusion .",
    "utils": r"python utils\.py .",
    "harness": r"(python -m evaluation\.harness|discrete-diffusion-harness) .",
    "script": r"(\w+=\S+ )*bash scripts/\S+\.sh",
    "sbatch": r"(\w+=\S+ )*sbatch .",
    "torchrun": r"torchrun .",
    "make": r"make [a-z]",
    "pip": r"pip install .",
    "benchmark": r"python benchmarks/.",
    "torch": r"python -c .",
    "activate": r"\. \.venv/bin/activate",
    "clone": r"git clone URL \S+ && cd ",
    "copy": r"cp examples/\w+\.py \w+\.py$",
}


def shell_lines(text: str) -> list[str]:
    """Lines of the ```bash blocks, without comments."""
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.M | re.S)
    lines = (re.sub(r"\s+#.*$", "", line) for b in blocks for line in b.splitlines())
    return [line for line in lines if line]


def code_spans(text: str) -> list[str]:
    """Inline code, which may go on in the next line."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]


def blocks(text: str, language: str) -> list[str]:
    """Contents of the fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


def kinds_of(line: str) -> list[str]:
    """The names of KINDS that a command is of: one, if all is well."""
    return [name for name, start in KINDS.items() if re.match(start, line)]


def commands(kind: str, *pages: str) -> list[str]:
    """The different commands of a kind, sorted.

    Args:
        kind: A key of KINDS.
        pages: Keys of PAGES; none: all of them.
    """
    texts = [PAGES[page] for page in pages or PAGES]
    lines = (line for text in texts for line in (*shell_lines(text), *code_spans(text)))
    return sorted({line for line in lines if kind in kinds_of(line)})


def overrides_of(line: str) -> list[str]:
    """What a command gives to main.py; of `sbatch --wrap` what it wraps."""
    wrapped = re.search(r"--wrap[ =](['\"])srun (.+)\1", line)
    words = shlex.split(wrapped[2] if wrapped else line)
    start = {"main.py", "discrete-diffusion"} & set(words)
    return words[words.index(start.pop()) + 1 :]


def main_commands() -> list[str]:
    """Every command of main.py on every page, but once if it is there twice."""
    lines = commands("main") + [x for x in commands("sbatch") if "main.py" in x]
    different = {tuple(overrides_of(line)): line for line in lines}
    return sorted(different.values())


# ---------------------------------------------------------------- what they expect

GPT2 = 50257  # tokens of GPT-2
# For networks and runs of a few seconds.
SMALLER = (
    "model.n_blocks=1",
    "model.n_heads=2",
    "model.hidden_size=32",
    "trainer.accelerator=cpu",
)
SHORT = (
    "trainer.max_steps=2",
    "trainer.val_check_interval=2",
    "trainer.log_every_n_steps=1",
    "sampling.steps=2",
    "sampling.num_sample_batches=1",
    "loader.eval_batch_size=16",
)
# The checkpoint that most commands name: last.ckpt is a small one of these settings.
CHECKPOINT = ("algo=mdlm", "data=docstrings", "model=tiny", "model.length=64")


def write_workplace(folder: Path) -> Path:
    """A folder with what the commands expect: a corpus, data, evaluations, a checkpoint
    and the example of README.md."""
    (folder / "corpus").mkdir()
    (folder / "corpus" / "a.txt").write_text("to be or not to be, that is it. " * 400)
    (folder / "prompts.txt").write_text("return the\ncreate a\n")
    write_documents(folder / "FILES")
    for name in ("openwebtext-valid", "ptb"):  # of two tables
        (folder / "outputs" / name).mkdir(parents=True)
        content = json.dumps(likelihood(name))
        (folder / "outputs" / name / "likelihood.json").write_text(content)
    for name in ("outputs/run", "runs/mine", "runs/duo", "runs/mdlm"):
        (folder / name / "csv/version_0").mkdir(parents=True)
        (folder / name / "likelihood.json").write_text(json.dumps(likelihood()))
        log = folder / name / "csv/version_0/metrics.csv"
        log.write_text("step,train/nll,val/ppl,val/ppl_stderr\n9,3.0,,\n9,,8.0,0.5\n")
    (folder / "outputs" / "samples").mkdir()
    (folder / "outputs" / "samples" / "samples.json").write_text(json.dumps(samples()))
    for size in (1, 2, 4):
        (folder / "outputs" / f"size{size}").mkdir()
        trained = json.dumps(compute(1e12, 1e5 * size, 2.0 + (size - 2) ** 2))
        (folder / "outputs" / f"size{size}" / "compute.json").write_text(trained)
    (folder / "outputs" / "images").mkdir()
    (folder / "outputs" / "images" / "fid.json").write_text(json.dumps(images()))
    for name in ("before", "after"):
        write_page(str(folder / f"{name}.html"), [watched()])
    readme = PAGES["README.md"]
    (folder / "my_algo.py").write_text(blocks(readme, "python")[0])
    for name, more in (("mdlm", ()), ("duo", ("algo=duo_base",))):
        run(
            *CHECKPOINT,
            *more,
            *SMALLER,
            *SHORT,
            "data.valid_fraction=0.01",
            "loader.global_batch_size=16",
            "eval.generate_samples=False",
            f"hydra.run.dir=trained-{name}",
            cwd=folder,
        )
        (folder / name).mkdir()
        trained = folder / f"trained-{name}/checkpoints/last.ckpt"
        trained.rename(folder / name / "last.ckpt")
    shutil.copy(folder / "mdlm/last.ckpt", folder / "last.ckpt")
    return folder


def watched() -> Shown:
    """One token that a step has revealed."""
    x = np.zeros(1, np.int64)
    one = Trajectory(x + 1, x > 0, x + 1, x, x, x.astype(np.uint8), x.astype("f4"))
    return Shown("mdlm", {}, {0: "a", 1: "[MASK]"}, [1], 1, None, [one])


def write_released_models(folder: Path) -> Path:
    """The hub's models and tokenizer and the authors' file, small, under their names;
    nobody has downloaded anything."""
    write_released(folder / "s-sahoo/duo", "DUO", GPT2 + 1, length=1024)
    write_released(folder / "kuleshov-group/mdlm-owt", "mdlm", GPT2 + 1, length=1024)
    weights = random_weights(GPT2 + 1)
    names = {"hidden_dim": "hidden_size"}
    config = {
        "algo": {"name": "duo", "time_conditioning": True},
        "model": {names.get(x, x): y for x, y in SIZES.items()} | {"length": 1024},
        "data": {"tokenizer_name_or_path": "gpt2"},
    }
    content = {"state_dict": weights, "hyper_parameters": {"config": config}}
    torch.save(content | {"global_step": 1}, folder / "duo.ckpt")
    core = bytes_tokenizer().backend_tokenizer
    vocab = sorted(core.get_vocab(), key=core.get_vocab().get)[:256]
    vocab += [f"<{index}>" for index in range(256, GPT2 - 1)] + ["<|endoftext|>"]
    ids = {token: index for index, token in enumerate(vocab)}
    gpt2 = Tokenizer(models.BPE(vocab=ids, merges=[]))
    gpt2.pre_tokenizer, gpt2.decoder = core.pre_tokenizer, core.decoder
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), vocab[-1])
    fast = PreTrainedTokenizerFast(tokenizer_object=gpt2, **special)
    fast.save_pretrained(folder / "gpt2")
    return folder
