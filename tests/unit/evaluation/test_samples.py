"""The JSON of `mode=sample_eval` and the batches behind it: what is kept, gone on with,
refused; the numbers that are made of them; what a run's samples depend on."""

import json
import math
import os
from functools import partial
from types import SimpleNamespace

import fsspec
import numpy as np
import pytest
from omegaconf import OmegaConf
from refusals import refused

from evaluation import sample_file as files
from evaluation.sample_file import SETTINGS, SampleFile, settings_of, summarise
from evaluation.samples import Drawing, stopped
from sampling.prompts import Prompt
from utils import path_exists

SETTINGS_OF_THREE = {"seed": 1, "sampling": {"num_sample_batches": 3, "steps": 8}}


def batch(first: int, size: int = 2, **more) -> dict:
    """A finished batch of samples `first`, `first` + 1, ..."""
    samples = range(first, first + size)
    numbers = {
        name: [float(i + k) for i in samples] for k, name in enumerate(files.PER_SAMPLE)
    }
    texts = [f"text {i}" for i in samples]
    basic = {"seconds": 0.5, "devices": 1, "generated_seqs": texts}
    return basic | numbers | more


@pytest.fixture(params=["local", "memory"])
def path(request, tmp_path) -> str:
    """Of a JSON that does not exist, on a local disk and behind fsspec."""
    if request.param == "local":
        return str(tmp_path / "new folder" / "samples.json")
    fsspec.filesystem("memory").store.clear()
    return f"memory://{tmp_path.name}/samples.json"


def read(path: str) -> dict:
    with fsspec.open(path) as file:
        return json.load(file)


def sample_file(path: str, **settings) -> SampleFile:
    return SampleFile(path, SETTINGS_OF_THREE | settings)


# ---------------------------------------------------------------- the life of a file


def test_a_run_from_its_beginning_to_its_end(path):
    """Every finished batch is on disk at once; the end leaves one file."""
    file = sample_file(path)
    assert file.check() == 0
    assert not path_exists(file.parts)  # a check takes nothing
    file.begin()
    for index, first in ((0, 0), (2, 4), (1, 2)):
        file.add(index, batch(first))
        assert index in sample_file(path).done()
    file.write({"complete": True, "mauve": 0.5})
    file.close()
    results = read(path)
    assert results["generated_seqs"] == [f"text {i}" for i in range(6)]
    assert (results["complete"], results["mauve"]) == (True, 0.5)
    assert results["settings"] == SETTINGS_OF_THREE
    assert results["num_samples"] == 6
    assert not path_exists(file.parts)


def test_batches_in_order_of_their_index(path):
    """Whichever rank finished first; also those that were there before."""
    sample_file(path).add(2, batch(4))
    file = sample_file(path)
    file.add(0, batch(0))
    firsts = [part["generated_seqs"][0] for part in file.batches()]
    assert firsts == ["text 0", "text 4"]


def test_lists_that_only_some_runs_have(path):
    file = sample_file(path)
    file.begin()
    file.add(0, batch(0, prompts=["a", "b"], sequence_lengths=[3, 4]))
    file.add(1, batch(2, prompts=["a", "b"], sequence_lengths=[5, 6]))
    file.write({})
    assert read(path)["prompts"] == ["a", "b", "a", "b"]
    assert read(path)["sequence_lengths"] == [3, 4, 5, 6]


def test_lists_that_are_empty_are_left_out(path):
    file = sample_file(path)
    file.begin()
    file.write({})
    results = read(path)
    assert results["generated_seqs"] == []
    assert not {"prompts", "sequence_lengths"} & results.keys()


def test_the_json_grows_while_the_run_goes_on(path, monkeypatch):
    """At most every REFRESH seconds, and then says that there is more to come."""
    file = sample_file(path)
    file.begin()
    file.add(0, batch(0))
    assert not path_exists(path)
    monkeypatch.setattr(files, "REFRESH", 0.0)
    file.add(1, batch(2))
    results = read(path)
    assert results["complete"] is False
    assert len(results["generated_seqs"]) == 4


def test_an_interrupted_run_is_gone_on_with(path):
    first = sample_file(path)
    first.begin()
    first.add(1, batch(2))
    first.interrupt()
    assert read(path)["complete"] is False
    assert read(path)["generated_seqs"] == ["text 2", "text 3"]
    again = sample_file(path)
    assert again.check() == 1
    assert again.done() == {1}


def test_a_run_that_was_killed_is_gone_on_with(path):
    """No JSON yet, only parts."""
    killed = sample_file(path)
    killed.begin()
    killed.add(0, batch(0))
    killed.add(2, batch(4))
    assert sample_file(path).check() == 2


def test_an_interruption_before_the_first_batch_leaves_nothing(path):
    file = sample_file(path)
    file.begin()
    file.interrupt()
    assert not path_exists(path)
    assert not path_exists(file.parts)
    assert sample_file(path, seed=2).check() == 0


# ---------------------------------------------------------------- damaged parts


def damages(raw: bytes) -> dict[str, bytes]:
    """What may become of a part on a disk."""
    text = raw.decode()
    return {
        "empty": b"",
        "cut off": raw[:100],
        "one bit": raw.replace(b"text 2", b"text 3"),
        "a number": text.replace("2.0", "2.5").encode(),
        "no JSON": b"\x00" * len(raw),
        "a list": b"[1]",
        "a number alone": b"7",
        "nothing in it": b"{}",
        "deep": b"[" * 10**5,
        "no hash": text.replace('"sha256"', '"sha255"').encode(),
        "no text": b"\xff\xfe" + raw,
        "huge": b"9" * 5000,
    }


DAMAGES = sorted(damages(b""))


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_part_is_named_and_drawn_again(path, name, caplog):
    """In one line, once, and the others stay."""
    first = sample_file(path)
    first.begin()
    first.add(0, batch(0))
    first.add(1, batch(2))
    filesystem, inner = fsspec.core.url_to_fs(first._part(1))
    filesystem.pipe(inner, damages(filesystem.cat(inner))[name])
    again = sample_file(path)
    assert again.check() == 1
    assert again.done() == {0}
    (line,) = [record.getMessage() for record in caplog.records]
    assert f"{path}.parts/batch_000001.json" in line
    assert "\n" not in line
    again.add(1, batch(2))
    assert sample_file(path).done() == {0, 1}


def test_a_part_of_other_settings_is_not_taken(path, caplog):
    """Whoever put it there; nor one under another number."""
    file, other = sample_file(path), sample_file(path, seed=2)
    file.begin()
    other.add(0, batch(0))
    file.add(1, batch(2))
    filesystem, inner = fsspec.core.url_to_fs(file._part(1))
    filesystem.copy(inner, inner.replace("000001", "000002"))
    assert sample_file(path).done() == {1}
    assert len(caplog.records) == 2


@pytest.mark.parametrize("content", [b"", b"{", b"[" * 10**5, b"\xff"])
def test_damaged_settings_are_refused(path, content):
    """Whose batches these are is then not known."""
    file = sample_file(path)
    file.begin()
    file.add(0, batch(0))
    filesystem, inner = fsspec.core.url_to_fs(f"{file.parts}/settings.json")
    filesystem.pipe(inner, content)
    refused(sample_file(path).check, "settings.json", "damaged", file.parts)


def test_only_its_own_files_go_at_the_end(tmp_path):
    file = sample_file(str(tmp_path / "a.json"))
    file.begin()
    file.add(0, batch(0))
    (tmp_path / "a.json.parts" / "notes.txt").write_text("mine")
    file.close()
    assert [x.name for x in (tmp_path / "a.json.parts").iterdir()] == ["notes.txt"]


def test_the_content_of_a_checkpoint_is_a_setting(compose, tmp_path):
    """Whatever its size and time are: of a file, and of a folder's files."""
    path, folder = tmp_path / "a.ckpt", tmp_path / "hub"
    folder.mkdir()
    found = []
    for content in ("one", "two"):
        for file in (path, folder / "model.safetensors"):
            file.write_text(content)
            os.utime(file, (1e9, 1e9))
        found += [
            settings_of(compose(f"eval.checkpoint_path={x}")) for x in (path, folder)
        ]
    assert found[0] != found[2]
    assert found[1] != found[3]


# ---------------------------------------------------------------- refusals


def test_a_finished_file_is_never_overwritten(path):
    file = sample_file(path)
    file.begin()
    file.add(0, batch(0))
    file.write({"complete": True})
    file.close()
    where = f"eval.generated_samples_path={path!r}"
    refused(sample_file(path).check, where, "not overwritten")
    assert read(path)["complete"] is True


def test_a_file_of_somebody_elses_is_refused(path):
    folder = path.rsplit("/", 1)[0]
    fsspec.core.url_to_fs(path)[0].makedirs(folder, exist_ok=True)
    with fsspec.open(path, "wt") as file:
        file.write("precious")
    refused(sample_file(path).check, f"eval.generated_samples_path={path!r}")
    with fsspec.open(path, "rt") as file:
        assert file.read() == "precious"


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"seed": 2}, ["another seed", "1 there", "2 now"]),
        (
            {"sampling": {"num_sample_batches": 3, "steps": 16}},
            ["another sampling.steps", "8 there", "16 now"],
        ),
        (
            {"sampling": {"num_sample_batches": 3, "steps": 8, "prompt": "a"}},
            ["another sampling.prompt", "None there", "'a' now"],
        ),
    ],
)
def test_a_run_with_other_settings_is_refused(path, settings, parts):
    """The line names the key and both values, and the beginning stays."""
    file = sample_file(path)
    file.begin()
    file.add(0, batch(0))
    other = SampleFile(path, SETTINGS_OF_THREE | settings)
    refused(other.check, f"eval.generated_samples_path={path!r}", file.parts, *parts)
    assert sample_file(path).check() == 1


# ---------------------------------------------------------------- numbers


def test_summary_is_plain_numpy():
    """Over samples, not over batches; batches may differ in size."""
    batches = [batch(0, 3), batch(3, 1), batch(4, 4)]
    batches[1] |= {"seconds": 3.0, "devices": 2}
    results = summarise(batches)
    for k, name in enumerate(files.PER_SAMPLE):
        values = np.arange(8) + k
        assert results[name] == pytest.approx(values.mean())
        error = values.std(ddof=1) / math.sqrt(8)
        assert results[f"{name}_stderr"] == pytest.approx(error)
    assert results["num_samples"] == 8
    # Two devices work at a time, so their seconds count half.
    assert results["samples_per_second"] == pytest.approx(8 / (0.5 + 1.5 + 0.5))
    assert results["generative_ppl"] is None
    assert results["generative_ppl_stderr"] is None


def test_generative_perplexity_is_over_all_tokens():
    nll, tokens = np.array([2.0, 5.0, 3.0, 9.0]), np.array([1, 2, 2, 3])
    batches = [
        batch(0, nll=[2.0, 5.0], num_tokens=[1, 2]),
        batch(2, nll=[3.0, 9.0], num_tokens=[2, 3]),
    ]
    results = summarise(batches)
    mean = nll.sum() / tokens.sum()
    spread = ((nll - mean * tokens) ** 2).sum() * 4 / 3
    error = math.exp(mean) * math.sqrt(spread) / tokens.sum()
    assert results["generative_ppl"] == pytest.approx(math.exp(mean))
    assert results["generative_ppl_stderr"] == pytest.approx(error)


def test_numbers_that_do_not_exist_are_null():
    """One sample has no standard error, no sample no mean, no token no perplexity:
    JSON has no NaN."""
    one = summarise([batch(0, 1, nll=[2.0], num_tokens=[2])])
    assert one["generative_ppl"] == pytest.approx(math.e)
    assert one["generative_ppl_stderr"] is None
    assert (one["entropy"], one["entropy_stderr"]) == (0.0, None)
    assert (
        summarise([batch(0, nll=[0.0, 0.0], num_tokens=[0, 0])])["generative_ppl"]
        is None
    )
    none = summarise([])
    assert none.pop("num_samples") == 0
    assert set(none.values()) == {None}
    for results in (one, none):
        json.dumps(results, allow_nan=False)


# ---------------------------------------------------------------- settings

OTHER_RUNS = (
    "algo=mdlm",
    "model.hidden_size=64",
    "noise=cosine",
    "seed=2",
    "sampling.steps=9",
    "sampling.predictor=psi",
    "sampling.p_nucleus=0.9",
    "sampling.temperature=0.9",
    "sampling.corrector=gibbs",
    "sampling.use_float64=False",
    "sampling.num_sample_batches=5",
    "sampling.prompt=a",
    "sampling.psi.high_mode=pure-pc",
    "loader.eval_batch_size=3",
    "trainer.precision=bf16",
    "data.tokenizer_name_or_path=bytes",
    "eval.checkpoint_path=b.ckpt",
    "eval.disable_ema=True",
    "eval.gen_ppl_eval_model_name_or_path=gpt2",
    "eval.mauve_references=a.txt",
)


@pytest.mark.parametrize("override", OTHER_RUNS)
def test_whatever_changes_samples_changes_the_settings(compose, override):
    """As plain data that JSON gives back unchanged."""
    settings = settings_of(compose())
    assert json.loads(json.dumps(settings)) == settings
    assert settings_of(compose()) == settings
    assert settings_of(compose(override)) != settings


def test_ema_that_is_off_changes_the_settings(compose):
    """training.ema=0 leaves a checkpoint's EMA weights unread."""
    assert settings_of(compose("training.ema=0")) != settings_of(compose())


def test_what_is_only_shown_is_no_setting(compose):
    settings = settings_of(compose())
    for override in (
        "sampling.num_sample_log=7",
        "eval.generated_samples_path=b.json",
        "trainer.max_steps=3",
    ):
        assert settings_of(compose(override)) == settings


def test_a_recording_is_gone_on_with_at_any_path(compose):
    """Its batches have what others lack; to a report they are the same samples."""
    one, other = (
        settings_of(compose(f"sampling.save_trajectory={x}.html")) for x in "ab"
    )
    assert one == other != settings_of(compose())
    assert one["sampling"] == settings_of(compose())["sampling"]


def test_every_setting_is_a_key(compose):
    config = compose()
    for key in SETTINGS:
        assert OmegaConf.select(config, key, default="absent") != "absent"


# ---------------------------------------------------------------- shares


class Attached(Drawing):
    """Where the trainer would put it."""

    trainer = SimpleNamespace(world_size=2)
    global_rank = 0


def drawing(file, rank=0, prompts=()):
    loader = SimpleNamespace(eval_batch_size=2)
    model = SimpleNamespace(config=SimpleNamespace(loader=loader))
    placed = type("Placed", (Attached,), {"global_rank": rank})
    return placed(model, file, None, list(prompts))


def test_devices_share_the_batches_that_are_missing(path):
    """Every batch once; those that are there already are not drawn again."""
    file = SampleFile(path, {"sampling": {"num_sample_batches": 7}})
    file.begin()
    shares = [[*drawing(file, rank).predict_dataloader()] for rank in (0, 1)]
    assert [[int(i) for i in share] for share in shares] == [[0, 2, 4, 6], [1, 3, 5]]
    file.add(2, batch(0))
    file.add(5, batch(0))
    shares = [[*drawing(file, rank).predict_dataloader()] for rank in (0, 1)]
    assert [[int(i) for i in share] for share in shares] == [[0, 4, 6], [1, 3]]


def test_a_device_may_have_nothing_to_draw(path):
    """Fewer batches than devices, or a run gone on with whose rest is another's."""
    drawn = drawing(sample_file(path))
    assert drawn.allow_zero_length_dataloader_with_multiple_devices


def test_prompts_take_turns(tmp_path):
    """Sample i starts from prompt i mod their number, whatever its batch."""
    prompts = [Prompt(text, []) for text in "abcde"]
    file = sample_file(str(tmp_path / "a.json"))
    drawn = drawing(file, prompts=prompts)
    texts = [prompt.text for i in range(3) for prompt in drawn._prompts_of(i)]
    assert texts == list("abcdea")
    assert list(drawing(file)._prompts_of(0)) == []


def test_more_prompts_than_samples_are_refused(tmp_path):
    """None would be passed over in silence."""
    file = sample_file(str(tmp_path / "a.json"))
    prompts = [Prompt("a", [])] * 7
    refused(
        partial(drawing, file, prompts=prompts),
        "sampling.prompt_file holds 7",
        "sampling.num_sample_batches",
        "loader.eval_batch_size",
        "3 x 2 = 6",
    )


# ---------------------------------------------------------------- a signal


@pytest.mark.parametrize(
    ("error", "name", "status"),
    [
        (KeyboardInterrupt(), "SIGINT", 130),
        (SystemExit(1), "SIGINT", 130),  # what Lightning makes of Ctrl-C
        (SystemExit(143), "SIGTERM", 143),
    ],
)
@pytest.mark.parametrize("count", [0, 2])
def test_a_stopped_run_says_where_its_batches_are(error, name, status, count):
    there = {0, 1} if count else set()
    file = SimpleNamespace(
        path="/a.json", parts="/a.json.parts", num_batches=5, done=lambda: there
    )
    line = stopped(error, file)
    assert str(line).startswith(f"stopped by {name}; {count} of 5 batches are there")
    assert ("/a.json.parts" in str(line)) is bool(count)
    assert line.status == status
    assert line.can_go_on
