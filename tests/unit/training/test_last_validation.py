"""A run ends with a validation, the sanity check is none, and what is printed says what
was measured."""

import csv
import json

import lightning
import pytest
from refusals import refused
from tiny import compose

import main
from cli.checks import check
from dataloader import check_limit

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

RUN = (
    "algo=mdlm",
    "data.num_train=24",
    "data.num_valid=9",
    "model.n_blocks=1",
    "model.hidden_size=8",
    "trainer.max_steps=3",
    "trainer.log_every_n_steps=1",
    "eval.generate_samples=False",
    "eval.gen_ppl_eval_model_name_or_path=null",
    "+trainer.enable_progress_bar=False",
    "+trainer.enable_model_summary=False",
)

EPOCHS = ("trainer.val_check_interval=1.0", "trainer.check_val_every_n_epoch=1")


@pytest.fixture
def train(tmp_path, monkeypatch):
    """train(*overrides): a tiny run in tmp_path, and what it returns."""
    monkeypatch.chdir(tmp_path)

    def train(*more: str, mode: str = "train") -> dict:
        overrides = {x.split("=")[0]: x for x in (*RUN, *more)}.values()
        config = compose(*overrides, f"checkpointing.save_dir={tmp_path}")
        config.mode = mode
        lightning.seed_everything(config.seed, verbose=False)
        return main.MODES[mode](config)

    return train


def validations(folder, process: int = 0) -> list[tuple[int, int]]:
    """(step, epoch) of each in the CSV of a process of a run."""
    with open(folder / f"csv/version_{process}/metrics.csv") as file:
        rows = [row for row in csv.DictReader(file) if row.get("val/nll")]
    return [(int(row["step"]), int(row["epoch"])) for row in rows]


@pytest.mark.parametrize(
    ("overrides", "steps"),
    [
        ([], [3]),  # the interval is 5000
        (["trainer.val_check_interval=2"], [2, 3]),
        (["trainer.val_check_interval=3"], [3]),
        ([*EPOCHS, "trainer.max_steps=7"], [6, 7]),
        ([*EPOCHS, "trainer.max_steps=6"], [6]),
        (["trainer.num_sanity_val_steps=0"], [3]),
        (["loader.batch_size=2", "trainer.val_check_interval=2"], [2, 3]),
        (["trainer.max_steps=100", "+trainer.max_epochs=1"], [6]),
        (
            [*EPOCHS[:1], "trainer.check_val_every_n_epoch=2", "trainer.max_steps=18"],
            [12, 18],
        ),
        (["trainer.max_steps=100000", "+trainer.max_time=00:00:00:01"], None),
    ],
)
def test_a_run_ends_with_one_validation(train, tmp_path, capsys, overrides, steps):
    """As any other: in the CSV, in best.ckpt; in the table with its step."""
    results = train(*overrides)
    found = validations(tmp_path)
    if steps is not None:
        assert [step + 1 for step, _ in found] == steps
        assert found[-1][1] == (steps[-1] - 1) // 6
        assert results["step"] == steps[-1]
    assert found[-1][0] + 1 == results["step"]
    assert (results["rows"], results["tokens"]) == (9, 72)
    assert results["weights"] == "EMA"
    said = " ".join(capsys.readouterr().out.split())
    title = f"validation on synthetic at step {results['step']}: 9 rows, EMA weights"
    assert title in said
    assert (tmp_path / "checkpoints/best.ckpt").exists()


@pytest.mark.parametrize("limit", ["0", "0.0"])
def test_no_validation_is_no_result(train, tmp_path, capsys, limit):
    """Not the sanity check either."""
    assert train(f"trainer.limit_val_batches={limit}") == {}
    assert "validation on" not in capsys.readouterr().out


def test_a_run_without_updates_has_no_result(train, capsys):
    assert train("trainer.limit_train_batches=0") == {}
    assert "validation on" not in capsys.readouterr().out


def test_a_finished_run_shows_its_table_again(train, tmp_path, capsys):
    first = train()
    capsys.readouterr()
    assert train() == first
    assert "at step 3: 9 rows" in capsys.readouterr().out


def test_a_longer_run_has_no_further_validation(train, tmp_path):
    """What the end of the first part was is no validation of the second."""
    train()
    assert train("trainer.max_steps=5")["step"] == 5
    assert validations(tmp_path, process=1) == [(4, 0)]


def test_a_part_of_the_rows(train, tmp_path, capsys):
    results = train("trainer.limit_val_batches=1")
    assert (results["rows"], results["tokens"]) == (4, 32)
    said = capsys.readouterr().out
    assert "at step 3: 4 of 9 rows, EMA" in said
    assert "4 of 9 (trainer.limit_val_batches=1)" in said
    for line in said.splitlines():
        if "sha256" in line or "tokens  " in line:
            assert "of all rows" in line or "measured" in line


def test_an_evaluation_of_a_part(train, tmp_path, capsys):
    """Says so in its table and its file, and of which step it is."""
    train()
    capsys.readouterr()
    path = tmp_path / "checkpoints/last.ckpt"
    results = train(
        f"eval.checkpoint_path={path}", "trainer.limit_val_batches=1", mode="ppl_eval"
    )
    assert (results["step"], results["rows"], results["weights"]) == (3, 4, "EMA")
    said = capsys.readouterr().out
    assert "at step 3: 4 of 9 rows, EMA weights" in said
    data = json.loads((tmp_path / "likelihood.json").read_text())["data"]
    assert (data["rows"], data["measured_rows"], data["measured_tokens"]) == (9, 4, 32)


def test_fast_dev_run(train, capsys):
    results = train("+trainer.fast_dev_run=True")
    assert (results["step"], results["rows"]) == (1, 4)
    assert "at step 1: 4 of 9 rows" in capsys.readouterr().out


@pytest.mark.parametrize("limit", ["0", "0.0", "False"])
def test_an_evaluation_of_nothing_is_refused(tmp_path, limit):
    config = compose("mode=ppl_eval", f"trainer.limit_val_batches={limit}")
    refused(lambda: check(config), f"trainer.limit_val_batches={limit}", "ppl_eval")


@pytest.mark.parametrize(
    ("limit", "devices", "is_refused"),
    [(0.3, 1, True), (0.34, 1, False), (0.4, 2, True), (0.5, 2, False), (1, 1, False)],
)
def test_a_share_that_has_no_batch_is_refused(limit, devices, is_refused):
    """Of three batches of four rows, or of two on each of two devices."""
    config = compose(f"trainer.limit_val_batches={limit}", f"trainer.devices={devices}")
    config.loader.eval_batch_size = 4
    if is_refused:
        refused(lambda: check_limit(config, 12), f"limit_val_batches={limit}", "1.0")
    else:
        check_limit(config, 12)


def test_samples_of_the_sanity_check_are_not_shown(train, capsys):
    train(
        "eval.generate_samples=True",
        "eval.compute_perplexity_on_sanity=True",
        "trainer.limit_train_batches=0",
    )
    assert "sample 1" not in capsys.readouterr().out
