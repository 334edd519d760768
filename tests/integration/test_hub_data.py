"""Published data sets by the real libraries from a hub that this machine serves: its
parquet copies beside scripts that no longer load, fallbacks, commits, streams, and what
is left without a network.
"""

import io
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import command_line
import pyarrow
import pyarrow.parquet
import pytest
from servers import commit_of, hub, listening
from stand_ins import SHARED

from data.fingerprints import FINGERPRINTS
from data.published import CONVERTED

pytestmark = pytest.mark.skipif(
    not SHARED.is_dir(), reason=f"{SHARED} is not on this machine"
)

SCRIPT = {"README.md": b"---\nlicense: other\n---\n"}
PULL_REQUEST = "refs/pr/22"


def read(path: str) -> bytes:
    return (SHARED / path).read_bytes()


def table(texts: list[str]) -> bytes:
    """A parquet file."""
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), file)
    return file.getvalue()


def wikitext() -> dict[str, bytes]:
    """WikiText-103 has the validation set of WikiText-2."""
    name = "wikitext-103-raw-v1"
    lines = ["---", "configs:", f"- config_name: {name}", "  data_files:"]
    lines += ["  - split: validation", f"    path: {name}/validation-*", "---", ""]
    file = read("wikitext2/wikitext/wikitext-2-raw-v1/validation.parquet")
    return {
        "README.md": "\n".join(lines).encode(),
        f"{name}/validation-00000-of-00001.parquet": file,
    }


def cifar10() -> dict[str, bytes]:
    """A part of it, where the hub has it."""
    name = "plain_text"
    lines = ["---", "configs:", f"- config_name: {name}", "  data_files:"]
    files = {}
    for split in ("train", "test"):
        lines += [f"  - split: {split}", f"    path: {name}/{split}-*"]
        path = f"{name}/{split}-00000-of-00001.parquet"
        files[path] = read(f"cifar10/cifar10/{split}.parquet")
    return files | {"README.md": "\n".join([*lines, "---", ""]).encode()}


SHARDS = {
    f"data/train-{n:05d}-of-00003.parquet": table(
        [f"document {n}.{i} . " * 9 for i in range(10)]
    )
    for n in (2, 0, 1)
}


@pytest.fixture(scope="module", name="hub")
def _hub() -> Iterator[str]:
    """Its address."""
    ptb = "ptb/ptb_text_only"
    converted = {
        f"penn_treebank/{split}/0000.parquet": read(f"{ptb}/{split}.parquet")
        for split in ("train", "validation", "test")
    }
    repositories = {
        "ptb-text-only/ptb_text_only": {
            "main": SCRIPT | {"ptb_text_only.py": b"raise SystemExit"},
            CONVERTED: converted,
        },
        "EleutherAI/lambada_openai": {
            "main": {"data/test.parquet": read("lambada/lambada_openai/test.parquet")}
        },
        "fancyzhx/ag_news": {
            "main": {"data/test.parquet": read("ag_news/ag_news/test.parquet")}
        },
        "Salesforce/wikitext": {"main": wikitext()},
        "uoft-cs/cifar10": {"main": cifar10()},
        "me/documents": {
            "main": SCRIPT | {"documents.py": b"raise SystemExit"},
            PULL_REQUEST: SHARDS,
        },
    }
    with listening(hub(repositories)) as address:
        yield address


OWN = ("trainer.accelerator=cpu", "logger=none")
OWN += (f"data.tokenizer_name_or_path={SHARED}/gpt2",)


def start(folder: Path, hub: str, *overrides: str, status: int = 0, **env: str):
    """main.py in a process of its own, as HF_ENDPOINT is read once by each."""
    folder.mkdir(exist_ok=True)
    cache = folder.parent / "cache"
    own = [f"hydra.run.dir={folder}", f"data.cache_dir={cache}", *OWN]
    places = {"HF_ENDPOINT": hub, "HF_HOME": str(cache / "hf"), "HF_HUB_OFFLINE": "0"}
    return command_line.run(
        *own, *overrides, cwd=folder, status=status, env=places | env, fresh=True
    )


NOBODY = "http://127.0.0.1:9"


@pytest.mark.slow
def test_ptb_comes_from_the_hubs_copy_and_stays(hub, tmp_path):
    """With the published rows; once packed they need neither hub nor documents."""
    asked = ("mode=prepare_data", "data=ptb", "data.insert_valid_eos=False")
    first = start(tmp_path / "a", hub, *asked)
    line = f"ptb: {FINGERPRINTS['ptb', False].line()}"
    assert line in first.stdout
    again = start(tmp_path / "b", NOBODY, *asked)
    assert line in again.stdout
    assert "tokenizing" not in again.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lambada", "ag_news", "wikitext2"])
def test_published_rows(hub, tmp_path, name):
    """Of LAMBADA from the hub, as OpenAI's file is out of reach here."""
    valid = "wikitext103" if name == "wikitext2" else name
    asked = ("data=lambada", f"data.valid={valid}", "data.insert_valid_eos=False")
    done = start(tmp_path / "a", hub, "mode=prepare_data", *asked)
    assert f"{valid}: {FINGERPRINTS[name, False].line()}" in done.stdout


def source(commit: str) -> str:
    return f"data.source=hf://datasets/me/documents@{commit}"


BYTES = "data.tokenizer_name_or_path=bytes"
SPLIT = ("mode=prepare_data", "data=openwebtext-split", "data.valid_documents=4")
SPLIT += (BYTES, "model.length=64")


@pytest.mark.slow
def test_a_commit_by_its_first_digits(hub, tmp_path):
    """The rows of the same shards in a folder, the end of which is held out."""
    for path, content in SHARDS.items():
        file = tmp_path / path
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(content)
    local = (f"data.source={tmp_path}/data", f"data.cache_dir={tmp_path}/local")
    expected = command_line.run(*SPLIT, *local, cwd=tmp_path).stdout
    digits = commit_of("me/documents", PULL_REQUEST)[:7]
    found = start(tmp_path / "a", hub, *SPLIT, source(digits)).stdout
    rows = r"openwebtext-\w+: .* sha256 \w+"
    assert len(re.findall(rows, found)) == 2
    assert re.findall(rows, found) == re.findall(rows, expected)


@pytest.mark.slow
def test_digits_that_no_commit_has(hub, tmp_path):
    done = start(tmp_path / "a", hub, *SPLIT, source("abcdef0"), status=2)
    assert "no commit begins with abcdef0" in done.stderr


TINY = (
    *("algo=mdlm", "model=tiny", "model.n_blocks=1", "model.n_heads=1"),
    *("model.hidden_size=16", "model.cond_dim=8", "loader.global_batch_size=2"),
    *("trainer.max_steps=2", "trainer.limit_val_batches=1", "model.length=16"),
    *("trainer.num_sanity_val_steps=0", "eval.generate_samples=False"),
    *("trainer.val_check_interval=2", "loader.num_workers=0"),
)


@pytest.mark.slow
def test_a_stream_from_the_hub(hub, tmp_path):
    """Trains, and validates on another set of the hub."""
    commit = source(commit_of("me/documents", PULL_REQUEST)[:10])
    asked = ("data=openwebtext-streaming", "data.shuffle_rows=8", commit)
    done = start(tmp_path / "a", hub, *TINY, *asked, BYTES)
    assert "validation on wikitext103" in done.stdout
    assert (tmp_path / "a" / "checkpoints" / "last.ckpt").exists()


@pytest.mark.slow
def test_what_the_library_has_kept_needs_no_hub(hub, tmp_path):
    """Loaded once by the library itself, as people do before they go offline."""
    code = "import datasets; datasets.load_dataset('EleutherAI/lambada_openai')"
    places = {"HF_ENDPOINT": hub, "HF_HOME": str(tmp_path / "hf")}
    subprocess.run([sys.executable, "-c", code], env=os.environ | places, check=True)
    offline = places | {"HF_HUB_OFFLINE": "1"}
    asked = ("mode=prepare_data", "data=lambada", "data.insert_valid_eos=False")
    done = start(tmp_path / "a", hub, *asked, **offline)
    assert f"lambada: {FINGERPRINTS['lambada', False].line()}" in done.stdout


IMAGES = ("mode=prepare_data", "data=cifar10", "data.tokenizer_name_or_path=pixels")
IMAGES += ("model.length=3072",)


@pytest.mark.slow
def test_images_of_the_hub(hub, tmp_path):
    """The rows of the same files in a folder, which are found again without a hub."""
    name = "uoft-cs/cifar10"
    folder = SHARED / "cifar10" / "cifar10"
    local = (f"data.source={folder}", f"data.cache_dir={tmp_path}/local")
    expected = command_line.run(*IMAGES, *local, cwd=tmp_path).stdout
    rows = r"cifar10: .* sha256 \w+"
    assert len(re.findall(rows, expected)) == 2
    asked = (*IMAGES, f"data.source=hf://datasets/{name}")
    for number, place in enumerate((hub, NOBODY)):
        found = start(tmp_path / str(number), place, *asked).stdout
        assert re.findall(rows, found) == re.findall(rows, expected)


@pytest.mark.slow
def test_a_part_of_cifar10_is_not_taken_for_it(hub, tmp_path):
    done = start(tmp_path / "a", hub, *IMAGES, status=2)
    assert "200 images instead of 50000" in done.stderr
    assert "cifar-10-python.tar.gz" in done.stderr
