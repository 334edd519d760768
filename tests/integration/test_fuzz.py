"""Damaged, crafted and strange files of every kind that is read: each is read as what
it says, or refused in one line; nothing outside of the run's folder and the cache is
written, moved or deleted.

With FUZZ_REPORT the counts are written to a file; FUZZ_SEED gives other mutations.
"""

import contextlib
import hashlib
import io
import json
import os
import pickle
import random
import shutil
from pathlib import Path

import evaluated
import numpy as np
import pytest
import torch
from exported import export, save_tiny
from fuzz import Fuzz, Watch, mutated, mutated_bytes, mutated_record, saved
from hydra.utils import instantiate
from image_files import images_of, labels_of, write_both
from short_run import short_run, train_in
from tiny import compose

from checkpoints.about import describe
from checkpoints.keys import key_report
from checkpoints.reading import read_checkpoint
from cli.settle import adopt_network, algorithm_class
from data.registry import DATASETS
from data.tokenizers import get_tokenizer
from evaluation.sample_file import SampleFile, summarise
from integral.tables import build_table, read_table
from integral.transform import GammaRange
from models.registry import build_backbone
from report.runs import read_runs
from training.callback_states import fit_callbacks
from training.identity import refuse_other_settings
from training.resume import Resumed, _check_resumable, adapt, check_state

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3600),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
SEED = int(os.environ.get("FUZZ_SEED", "0"))
GOLDEN = Path(os.environ.get("GOLDEN_DIR", Path(__file__).parents[1] / "golden/cases"))
KEY = "eval.checkpoint_path"
OF_RUN = ("trainer.max_steps=3", "trainer.val_check_interval=1")


@pytest.fixture(scope="module")
def watch() -> Watch:
    return Watch()


@pytest.fixture(scope="module")
def fuzz(tmp_path_factory, watch):
    """Counts over all tests of this file, which are written down at the end."""
    fuzz = Fuzz(tmp_path_factory.mktemp("fuzz"), watch)
    yield fuzz
    if path := os.environ.get("FUZZ_REPORT"):
        Path(path).write_text(REPORT.format(table=fuzz.table(), seed=SEED))


REPORT = """\
# Robustness: what becomes of damaged and crafted files

Written by

```bash
FUZZ_REPORT=benchmarks/robustness.md GOLDEN_DIR=../shared/golden \\
    python -m pytest -m slow tests/integration/test_fuzz.py
```

with seed {seed}. A mutation cuts a file off, flips bits, overwrites, doubles or leaves
out bytes; or it leaves out, renames, adds or replaces an entry of what the file holds,
by another type, a huge, negative or infinite number, a path, a tensor of another shape.
"Read" means that the file was read as what it says; for bytes of checkpoints, sample
files and rows, which have checksums, that is what it said before. "Failed" is all else:
a traceback, several lines, a crash. An audit hook watches what is deleted, moved or
written meanwhile: outside of the run's folder and the cache there was nothing.

{table}
"""


def test_the_watch_sees(watch, tmp_path):
    """Writing, moving and deleting, also through an open folder; reading is none."""
    inside, outside = tmp_path / "in", tmp_path / "out"
    for folder in (inside, outside):
        (folder / "a").mkdir(parents=True)
        (folder / "b").write_text("x")
    with watch.on(inside):
        (outside / "b").read_text()
        for folder in (inside, outside):
            (folder / "a/c").write_text("x")
            (folder / "b").rename(folder / "d")
            (folder / "d").unlink()
            shutil.rmtree(folder / "a")
    found = {x.replace(str(outside), "") for x in watch.found}
    watch.found.clear()
    assert {"open /a/c", "os.rename /b", "os.remove /d", "os.remove /a/c"} <= found
    assert not any(str(tmp_path) in x for x in found)


def check_all(fuzz: Fuzz, watch: Watch, kind: str) -> None:
    failures = [x for x in fuzz.failures if x.startswith(kind)]
    assert failures == [], "\n".join(failures)
    assert watch.found == set()


def go_on(folder: Path, *overrides: str) -> None:
    train_in(folder, *OF_RUN, *overrides)


@pytest.fixture(scope="module")
def own(tmp_path_factory) -> Path:
    """Folder of a run of three updates."""
    folder = tmp_path_factory.mktemp("own")
    go_on(folder)
    return folder


def plain(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def test_entries_of_a_checkpoint_that_is_resumed(fuzz, watch, own):
    """Its run has a folder with files that a hostile one could name."""
    content = plain(own / "checkpoints/last.ckpt")
    draw = random.Random(f"resumed {SEED}")
    run = fuzz.folder / "run"
    kind = "entries of a checkpoint that is resumed"
    for number in range(150):
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(own / "checkpoints", run / "checkpoints")
        changed, about = mutated(content, draw)
        if draw.random() < 0.3:
            changed, more = mutated(changed, draw)
            about += f"; {more}"
        (run / "checkpoints/last.ckpt").write_bytes(saved(changed))
        for path in run.glob("checkpoints/*-*.ckpt"):
            path.unlink()
        fuzz.read(kind, f"{number}: {about}", lambda: go_on(run, "trainer.max_steps=5"))
    check_all(fuzz, watch, kind)


def test_entries_up_to_the_first_update(fuzz, watch, own):
    """All that is done with the state of a file before training, many times."""
    content = plain(own / "checkpoints/last.ckpt")
    draw = random.Random(f"state {SEED}")
    config = compose(*short_run(*OF_RUN), f"checkpointing.save_dir={own}")
    model = algorithm_class(config)(config, get_tokenizer(config))
    path, kind = fuzz.folder / "a.ckpt", "entries of a checkpoint, before it trains"

    def use() -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            found = read_checkpoint(str(path), KEY)
            resumed = Resumed(str(path), found)
            _check_resumable(str(path), found)
            refuse_other_settings(resumed, config)
            model.check_weights(found, KEY)
            check_state(resumed, model)
            callbacks = [instantiate(x) for x in config.callbacks.values()]
            fit_callbacks(found.lightning["callbacks"], callbacks, KEY)
            for callback in callbacks:
                if state := found.lightning["callbacks"].get(callback.state_key):
                    callback.load_state_dict(state)
            optimizer = model.make_optimizer()
            schedule = model.make_schedule(optimizer)
            adapt(found.lightning, config, optimizer.param_groups)
            optimizer.load_state_dict(found.lightning["optimizer_states"][0])
            for state in found.lightning["lr_schedulers"]:
                schedule.load_state_dict(state)
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
            schedule.step()

    for number in range(600):
        changed, about = mutated(content, draw)
        path.write_bytes(saved(changed))
        fuzz.read(kind, f"{number}: {about}", use)
    check_all(fuzz, watch, kind)


# ---------------------------------------------------------------- reading


def reference() -> list[Path]:
    return sorted(GOLDEN.glob("checkpoint_*/checkpoint.ckpt"))


def used(path: Path, fits: bool = True) -> dict:
    """Reads it, says what it is, loads it where it fits; gives what it holds."""
    found = read_checkpoint(str(path), KEY)
    for line in describe(found).values():
        assert isinstance(line, str)
    if fits:
        model = algorithm_class(MODEL)(MODEL, get_tokenizer(MODEL))
        model.load_weights(found, KEY)
    return found.lightning


def text_of(content: object) -> str:
    """What a checkpoint holds, to the bit; objects that it names by their names."""
    if isinstance(content, torch.Tensor):
        raw = content.contiguous().numpy().tobytes()
        return f"{content.dtype} {content.shape} {hashlib.sha256(raw).hexdigest()}"
    if isinstance(content, dict):
        return str([(repr(key), text_of(x)) for key, x in content.items()])
    if isinstance(content, (list, tuple)):
        return str([type(content).__name__, *map(text_of, content)])
    return repr(content) if type(content).__repr__ is not object.__repr__ else "object"


MODEL = compose(*short_run(*OF_RUN))


@pytest.mark.parametrize("kind", ["bytes", "records"])
def test_checkpoints(fuzz, watch, own, kind):
    """Bytes of files, and bytes of records whose checksums are right."""
    draw = random.Random(f"{kind} {SEED}")
    change = {"bytes": mutated_bytes, "records": mutated_record}[kind]
    sources = [own / "checkpoints/last.ckpt", *reference()]
    whole = [text_of(used(x, fits=x is sources[0])) for x in sources]
    path = fuzz.folder / "a.ckpt"
    name = f"{kind} of checkpoints"

    def use(at: int) -> None:
        found = used(path, fits=at == 0)
        assert kind == "records" or text_of(found) == whole[at]  # by its checksums

    for number in range(400):
        at = number % len(sources)
        path.write_bytes(change(sources[at].read_bytes(), draw))
        fuzz.read(name, f"{number} {sources[at]}", lambda at=at: use(at))
    check_all(fuzz, watch, name)


def test_entries_of_checkpoints(fuzz, watch, own):
    draw = random.Random(f"entries {SEED}")
    content = plain(own / "checkpoints/last.ckpt")
    path, name = fuzz.folder / "a.ckpt", "entries of checkpoints"
    for number in range(300):
        changed, about = mutated(content, draw)
        path.write_bytes(saved(changed))
        fuzz.read(name, f"{number}: {about}", lambda: used(path))
    check_all(fuzz, watch, name)


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    byte = "data.tokenizer_name_or_path=bytes"
    save_tiny(folder / "a.ckpt", "algo=mdlm", byte)
    with contextlib.redirect_stdout(io.StringIO()):
        export(folder / "a.ckpt", folder / "hub")
    return folder / "hub"


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_folders(fuzz, watch, exported, name):
    """Read, and made a network of, as by algo.backbone=hf_dit."""
    draw = random.Random(f"{name} {SEED}")
    folder = fuzz.folder / "hub"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(exported, folder)
    raw = (exported / name).read_bytes()

    def use() -> None:
        if name == "tokenizer.json":
            overrides = f"data.tokenizer_name_or_path={folder}"
            tokenizer = get_tokenizer(compose(overrides))
            tokenizer.batch_decode([tokenizer("one two").input_ids])
            return
        about = read_checkpoint(str(folder), KEY)
        describe(about)
        config = compose("mode=ppl_eval", "algo=mdlm", f"{KEY}={folder}")
        config.algo.backbone = "hf_dit"
        adopt_network(config)
        network = torch.nn.ModuleDict({"backbone": build_backbone(config, 260)})
        key_report(network, about.weights).raise_if_any(KEY)

    use()  # as it is
    for number in range(300):
        if name.endswith(".json") and number % 2:
            changed, about = mutated(json.loads(raw), draw, tensors=False)
            content = json.dumps(changed, default=str).encode()
        else:
            content, about = mutated_bytes(raw, draw), "bytes"
        (folder / name).write_bytes(content)
        fuzz.read(name, f"{number}: {about}", use)
    check_all(fuzz, watch, name)


def test_tables(fuzz, watch):
    draw = random.Random(f"tables {SEED}")
    table = build_table(35, GammaRange(-5.0, -1.0), 33)._asdict()
    npz = io.BytesIO()
    np.savez(npz, **table)
    raws = [pickle.dumps(table, 3), pickle.dumps(table, 5), npz.getvalue()]
    small = GOLDEN / "integral_small_pickle/table.pkl"
    raws += [small.read_bytes()] if small.exists() else []
    path, name = fuzz.folder / "table", "tables of the operator"
    for number in range(300):
        if number % 3:
            content, about = mutated_bytes(raws[number % len(raws)], draw), "bytes"
        else:
            changed, about = mutated(table, draw, tensors=False)
            content = pickle.dumps(changed)
        path.write_bytes(content)
        fuzz.read(name, f"{number}: {about}", lambda: read_table(str(path), KEY))
    check_all(fuzz, watch, name)


# ---------------------------------------------------------------- samples


def batch(first: int) -> dict:
    numbers = [float(first), first + 0.5]
    names = ("entropy", "distinct_1", "distinct_2", "distinct_3", "evaluations")
    about = {"seconds": 0.5, "devices": 1, "generated_seqs": ["one", "two"]}
    return about | dict.fromkeys(names, numbers)


def test_sample_files(fuzz, watch):
    """Parts of a run that is gone on with: none is used that was not written so."""
    draw = random.Random(f"samples {SEED}")
    path, name = fuzz.folder / "s/samples.json", "parts of sample files"
    settings = {"seed": 1, "sampling": {"num_sample_batches": 3, "steps": 8}}
    first = SampleFile(str(path), settings)
    first.begin()
    for index in range(3):
        first.add(index, batch(index))
    parts = sorted(path.with_name("samples.json.parts").iterdir())
    raws = {part: part.read_bytes() for part in parts}

    def use() -> None:
        file = SampleFile(str(path), settings)
        done = file.check()
        batches = file.batches()
        assert len(batches) == done
        assert all(x in [batch(i) for i in range(3)] for x in batches)
        summarise(batches)

    for number in range(300):
        part = parts[number % len(parts)]
        if number % 2:
            changed, about = mutated(json.loads(raws[part]), draw, tensors=False)
            content = json.dumps(changed, default=str).encode()
        else:
            content, about = mutated_bytes(raws[part], draw), "bytes"
        part.write_bytes(content)
        fuzz.read(name, f"{number} {part.name}: {about}", use)
        part.write_bytes(raws[part])
    check_all(fuzz, watch, name)


def test_rows_of_the_cache(fuzz, watch):
    """Those that are used are those that were written; others are made again."""
    draw = random.Random(f"rows {SEED}")
    folder, name = fuzz.folder / "rows", "rows of the cache"
    folder.mkdir()
    (folder / "a.txt").write_text("one two three\n" * 99)
    config = compose(
        "data=text_files",
        f"data.path={folder}/a.txt",
        f"data.valid_path={folder}/a.txt",
        "data.tokenizer_name_or_path=bytes",
        f"data.cache_dir={folder}/cache",
    )
    tokenizer = get_tokenizer(config)

    def load() -> np.ndarray:
        rows = DATASETS[config.data.train].load(config, tokenizer, "train")
        return np.array(rows.ids)

    good = load()
    files = sorted(x for x in (folder / "cache/rows").glob("*/*") if x.is_file())
    assert len(files) >= 3
    raws = {file: file.read_bytes() for file in files}

    def use() -> None:
        assert np.array_equal(load(), good)

    for number in range(150):
        for file, raw in raws.items():
            file.write_bytes(raw)
        file = files[number % len(files)]
        file.write_bytes(mutated_bytes(raws[file], draw))
        fuzz.read(name, f"{number} {file.name}", use)
    check_all(fuzz, watch, name)


@pytest.mark.parametrize("kind", ["folder", "parquet", "npz", "unpacked", "archive"])
def test_images(fuzz, watch, kind):
    """Of a folder, tables, arrays, and the pickles of CIFAR-10's archive."""
    draw = random.Random(f"{kind} {SEED}")
    folder, name = fuzz.folder / f"images-{kind}", f"images ({kind})"
    sets = [(images_of(10, seed=seed), labels_of(10)) for seed in (0, 1)]
    source = write_both(kind, folder, *sets)
    config = compose(
        *("data=images", f"data.source={source}", "data.size=16", "data.length=48"),
        *("model.length=48", "data.num_classes=3", f"data.cache_dir={folder}/cache"),
    )
    tokenizer = get_tokenizer(config)
    files = [x for x in sorted(folder.rglob("*")) if x.is_file()]
    raws = {file: file.read_bytes() for file in files if "cache" not in file.parts}

    def use() -> None:
        for split in ("train", "valid"):
            rows = DATASETS["images"].load(config, tokenizer, split)
            assert len(np.asarray(rows.ids)) == len(rows.labels) > 0

    use()
    for number in range(200):
        file = draw.choice(list(raws))
        file.write_bytes(mutated_bytes(raws[file], draw))
        fuzz.read(name, f"{number} {file.name}", use)
        file.write_bytes(raws[file])
    check_all(fuzz, watch, name)


def test_results_for_a_report(fuzz, watch):
    """The JSON of mode=ppl_eval, of mode=sample_eval and of mode=fid_eval."""
    draw = random.Random(f"results {SEED}")
    path, name = fuzz.folder / "results.json", "results for a report"
    wholes = (evaluated.likelihood(), evaluated.samples(), evaluated.images())

    def use() -> None:
        read_runs([(None, str(path))])

    for one in wholes:
        path.write_text(json.dumps(one))
        use()
    for number in range(300):
        one = wholes[number % 2]
        if number % 3:
            changed, what = mutated(one, draw, tensors=False)
            content = json.dumps(changed, default=str).encode()
        else:
            content, what = mutated_bytes(json.dumps(one).encode(), draw), "bytes"
        path.write_bytes(content)
        fuzz.read(name, f"{number}: {what}", use)
    check_all(fuzz, watch, name)
