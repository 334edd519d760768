"""Every data config through the real command line, on local files."""

import csv
import json
import os
import signal
import tempfile
import time
from pathlib import Path

import command_line
import pytest
from nursery import nursery
from stand_ins import CONFIGS, stand_in, tokenizer_of, write_documents

from utils import PARTIAL

SMALL = (
    "algo=mdlm",
    "model=tiny",
    "model.length=64",
    "model.n_blocks=1",
    "model.n_heads=1",
    "model.hidden_size=16",
    "model.cond_dim=8",
    "loader.global_batch_size=4",
    "loader.eval_global_batch_size=4",
    "trainer.accelerator=cpu",
    "trainer.limit_val_batches=1",
    "trainer.max_steps=2",
    "trainer.val_check_interval=2",
    "trainer.num_sanity_val_steps=0",
    "eval.generate_samples=False",
    "eval.gen_ppl_eval_model_name_or_path=null",
    "callbacks.checkpoint_every_n_steps.every_n_train_steps=100",
    "data.num_proc=2",
    "logger=none",
)


def start(folder: Path, config: str, *overrides: str, status: int = 0):
    cache = f"data.cache_dir={folder}/cache"
    every = [*SMALL, *stand_in(config, folder), cache, f"hydra.run.dir={folder}/run"]
    return command_line.run(*every, *overrides, cwd=folder, status=status)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny checkpoint for the vocabulary of a data config, trained once."""
    trained = {}

    def of(config: str) -> Path:
        vocabulary = str(tokenizer_of(config))
        if vocabulary not in trained:
            folder = tmp_path_factory.mktemp("trained")
            start(folder, config, "data.streaming=False")
            trained[vocabulary] = folder / "run" / "checkpoints" / "last.ckpt"
        return trained[vocabulary]

    return of


# Of sets that differ from another one in their name alone, but for the last, which has
# more documents than the others here.
ALIKE = ("lm1b-streaming", "openwebtext-streaming", "scientific_papers_pubmed")
ALIKE += ("wikitext103", "text8-crop", "lm1b-gpt2", "lm1b-wrap", "openwebtext-split")
ALIKE += ("scientific_papers_arxiv", "lm1b", "ag_news", "slimpajama-streaming")


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(name, marks=pytest.mark.slow if name in ALIKE else ())
        for name in CONFIGS
    ],
)
def test_a_data_config_evaluates(tmp_path, checkpoint, config):
    """With the published tokenizer, from files on this machine."""
    start(
        tmp_path, config, "mode=ppl_eval", f"eval.checkpoint_path={checkpoint(config)}"
    )
    record = json.loads((tmp_path / "run" / "likelihood.json").read_text())
    assert record["data"]["documents"] > 0
    (rows,) = (tmp_path / "cache" / "rows").glob("*/description.json")
    description = json.loads(rows.read_text())
    assert description["rows"] > 0
    assert description["layout"]["length"] == 64


STREAMED = [
    config for config in CONFIGS if "streaming" in config or "fineweb" in config
]


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(name, marks=() if "lm1b" in name else pytest.mark.slow)
        for name in STREAMED
    ],
)
def test_a_stream_trains_and_goes_on_where_it_stopped(tmp_path, config):
    """The weights after a stop and a restart are those of a run without."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder in (whole, parts):
        folder.mkdir()
    every = ("trainer.limit_val_batches=0", "data.shuffle_rows=8", "logger=csv")
    every += ("trainer.log_every_n_steps=1", "loader.num_workers=2")
    start(whole, config, *every, "trainer.max_steps=6")
    start(parts, config, *every, "trainer.max_steps=3")
    start(parts, config, *every, "trainer.max_steps=6")
    assert losses(parts) == losses(whole)
    assert len(losses(whole)) == 6


@pytest.mark.slow
def test_a_stream_of_two_processes_goes_on(tmp_path):
    """A checkpoint holds the readers of all ranks; more readers start an epoch."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder in (whole, parts):
        folder.mkdir()
    every = ("trainer.limit_val_batches=0", "data.shuffle_rows=4", "logger=csv")
    every += ("trainer.log_every_n_steps=1", "loader.num_workers=2")
    two = ("trainer.devices=2", "data.source=" + str(write_documents(tmp_path / "x")))
    config = "openwebtext-streaming"
    start(whole, config, *every, *two, "trainer.max_steps=6")
    start(parts, config, *every, *two, "trainer.max_steps=3")
    start(parts, config, *every, *two, "trainer.max_steps=6")
    assert losses(parts) == losses(whole)
    more = ("trainer.max_steps=8", "loader.num_workers=1")
    assert "with a new epoch" in start(parts, config, *every, *two, *more).stdout


def losses(folder: Path) -> list[str]:
    files = sorted((folder / "run" / "csv").glob("version_*/metrics.csv"))
    found = []
    for path in files:
        with open(path) as file:
            rows = csv.DictReader(file)
            found += [row["train/nll"] for row in rows if row.get("train/nll")]
    return found


def test_data_are_prepared_without_a_model(tmp_path):
    """And then found by a run that has no documents any more."""
    documents = write_documents(tmp_path / "mine")
    where = (f"data.source={documents}", "data.tokenizer_name_or_path=bytes")
    first = start(tmp_path, "ptb", "mode=prepare_data", *where)
    made = written(tmp_path / "cache")
    again = start(tmp_path, "ptb", "mode=prepare_data", *where)
    assert made
    assert written(tmp_path / "cache") == made
    for done in (first, again):
        said = "data.valid=ptb: 60 documents, the published set has 3370"
        assert said in done.stdout + done.stderr
    for split in ("train", "valid"):
        (line,) = [
            x for x in first.stdout.splitlines() if f"{split} " in x and "sha" in x
        ]
        assert line in again.stdout


def written(folder: Path) -> dict[str, int]:
    """When each file of rows in a cache was written."""
    return {str(x): x.stat().st_mtime_ns for x in folder.rglob("rows.arrow")}


def prepare(folder: Path, *overrides: str) -> list[str]:
    """The command line of packing PTB into a cache of `folder`."""
    cache = f"data.cache_dir={folder}/cache"
    every = [*SMALL, *stand_in("ptb", folder), cache, "mode=prepare_data", *overrides]
    return [*every, f"hydra.run.dir={folder}/run"]


def fingerprints(stdout: str) -> list[str]:
    return [line for line in stdout.splitlines() if "sha256" in line]


@pytest.mark.slow
def test_the_rows_are_the_same_however_they_are_made(tmp_path):
    """By 1, 2 and 5 processes, after a kill, and by two jobs at once."""
    found = []
    for number in (1, 2, 5):
        folder = tmp_path / str(number)
        folder.mkdir()
        done = command_line.run(*prepare(folder, f"data.num_proc={number}"), cwd=folder)
        found.append(fingerprints(done.stdout))
    left = []
    while not left:  # they are few rows: some attempts may come too late
        folder = Path(tempfile.mkdtemp(dir=tmp_path))
        pid = begin(folder, "killed")
        while not list(folder.glob(f"cache/rows/*{PARTIAL}")):
            time.sleep(0.001)
        os.killpg(pid, signal.SIGKILL)
        nursery().wait(pid)
        left = list(folder.glob(f"cache/rows/*{PARTIAL}"))
    found.append(fingerprints(command_line.run(*prepare(folder), cwd=folder).stdout))
    assert not list(folder.glob(f"cache/rows/*{PARTIAL}"))
    folder = tmp_path / "at once"
    folder.mkdir()
    jobs = {name: begin(folder, name) for name in ("a", "b")}
    for name, pid in jobs.items():
        assert nursery().wait(pid) == 0
        found.append(fingerprints((folder / f"{name}.out").read_text()))
    assert len(found[0]) == 2
    assert all(lines == found[0] for lines in found)


def begin(folder: Path, name: str) -> int:
    """The pid of a job that packs into the folder's cache."""
    run = f"hydra.run.dir={folder}/{name}"
    files = folder / f"{name}.out", folder / f"{name}.err"
    return nursery().start([*prepare(folder)[:-1], run], folder, *files)


def test_what_cannot_be_loaded_says_what_was_tried(tmp_path):
    """Every source and its reason, and the key that helps."""
    done = command_line.run(
        *(*SMALL, "data=ptb", "data.tokenizer_name_or_path=bytes"),
        f"data.cache_dir={tmp_path}/cache",
        cwd=tmp_path,
        status=2,
    )
    (line,) = [x for x in done.stderr.splitlines() if x.startswith("error: ")]
    assert "ptb-text-only/ptb_text_only@refs/convert/parquet (" in line
    assert "ptb.train.txt" in line
    assert line.endswith(
        "data.source=FOLDER (parquet, jsonl or txt, called train* and validation*)."
    )
    assert "Traceback" not in done.stderr


LOCAL = ("data=text_files", "data.tokenizer_name_or_path=bytes", "data.num_proc=1")


def test_a_stream_stops_at_a_row_and_goes_on(tmp_path):
    """One line names it; with data.on_bad_row=skip, or mended, the run goes on."""
    rows = [json.dumps({"text": f"a text of number {n} " * 5}) for n in range(300)]
    (tmp_path / "valid.jsonl").write_text("\n".join(rows[:40]) + "\n\n")
    rows[120] = '{"text": "cut of'
    (tmp_path / "train.jsonl").write_text("\n".join(rows))
    args = [*SMALL, *LOCAL, "data.streaming=True", "data.shuffle_rows=4"]
    args += ["data.path=train.jsonl", "data.valid_path=valid.jsonl"]
    args += ["trainer.max_steps=80", "trainer.val_check_interval=80"]
    args += ["callbacks.checkpoint_every_n_steps.every_n_train_steps=5"]
    args += ["hydra.run.dir=run", f"data.cache_dir={tmp_path}/cache"]
    done = command_line.run(*args, cwd=tmp_path, status=2)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert f"data.path: {tmp_path}/train.jsonl, line 121 cannot be read" in errors[0]
    assert "Traceback" not in done.stdout + done.stderr
    assert (tmp_path / "run/checkpoints/last.ckpt").exists()
    done = command_line.run(*args, "data.on_bad_row=skip", cwd=tmp_path)
    assert "line 121 cannot be read" in done.stdout
    assert "passed over (1 so far)" in done.stdout


def test_local_data_ask_no_host(tmp_path):
    """Neither for data nor to count that they have been loaded."""
    import pyarrow
    import pyarrow.parquet

    texts = ["a short text"] * 40
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet")
    (tmp_path / "b.txt").write_text("another text " * 40)
    (tmp_path / "sitecustomize.py").write_text(
        "import socket\n"
        "def note(host, *args, **options):\n"
        f"    open({str(tmp_path / 'asked')!r}, 'a').write(f'{{host}}\\n')\n"
        "    raise OSError('no network')\n"
        "socket.getaddrinfo = note\n"
    )
    hub = dict.fromkeys(("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"), "0")
    hub["HF_DATASETS_OFFLINE"] = "0"
    args = ("mode=prepare_data", "model=tiny", "model.length=16", *LOCAL)
    args += (f"data.cache_dir={tmp_path}/cache",)
    paths = "data.path=[a.parquet,b.txt]"
    options = {"cwd": tmp_path, "pythonpath": tmp_path, "env": hub, "fresh": True}
    command_line.run(*args, paths, "hydra.run.dir=run", **options)
    assert not (tmp_path / "asked").exists()
