"""What a run says while it goes."""

import logging
from types import SimpleNamespace

import pytest
import torch

from training import progress
from training.progress import Progress, ProgressBar
from training.sample_logging import SampleLogging


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass when the test says so."""
    now = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(progress.time, "monotonic", lambda: now.seconds)
    return now


@pytest.fixture
def trainer():
    metrics = {"trainer/loss": torch.tensor(2.5)}
    return SimpleNamespace(
        is_global_zero=True,
        global_step=0,
        max_steps=100,
        world_size=1,
        precision="32-true",
        sanity_checking=False,
        callback_metrics=metrics,
        callbacks=[],
        state=SimpleNamespace(fn="fit"),
        num_predict_batches=[10],
    )


def model(**results):
    parameters = [torch.nn.Parameter(torch.zeros(1000, 3))]
    return SimpleNamespace(
        parameters=lambda: parameters,
        device=torch.device("cpu"),
        bound="val/",
        valid_results=results,
    )


def test_the_first_update_has_a_line_and_later_ones_now_and_then(
    clock, trainer, caplog
):
    caplog.set_level(logging.INFO)
    lines = Progress(counts=True)
    lines.on_train_start(trainer, model())
    for step in range(1, 101):
        clock.seconds += 1
        trainer.global_step = step
        lines.on_train_batch_end(trainer, model())
    first, *said = caplog.messages
    assert first == (
        "training 3,000 parameters on cpu, precision 32-true, from step 0 of 100"
    )
    assert said[0] == "step 1 of 100: loss 2.5, 1 steps/s"
    assert said[1] == "step 6 of 100: loss 2.5, 1 steps/s, 0:01:34 left"
    assert 8 <= len(said) <= 20


def test_a_bar_replaces_lines_of_updates(clock, trainer, caplog):
    caplog.set_level(logging.INFO)
    lines = Progress(counts=False)
    lines.on_train_start(trainer, model())
    trainer.global_step = 1
    lines.on_train_batch_end(trainer, model())
    assert len(caplog.messages) == 1


def test_gradients_that_accumulate_are_no_update(clock, trainer, caplog):
    caplog.set_level(logging.INFO)
    lines = Progress(counts=True)
    lines.on_train_start(trainer, model())
    lines.on_train_batch_end(trainer, model())
    assert len(caplog.messages) == 1


def test_a_validation_has_a_line_with_its_errors(trainer, caplog):
    caplog.set_level(logging.INFO)
    trainer.global_step = 7
    trainer.callback_metrics["val/sample_entropy"] = torch.tensor(3.25)
    results = {"nll": 2.751, "nll_stderr": 0.081, "ppl": 15.6, "ppl_stderr": 1.26}
    lines = Progress(counts=False)
    lines.on_validation_end(trainer, model(**results, step=7))
    assert caplog.messages == [
        "step 7: val/nll 2.75 ± 0.08, val/ppl 15.6 ± 1.3, val/sample_entropy 3.25"
    ]
    lines.on_validation_end(trainer, model(**results, step=5))  # of before
    trainer.sanity_checking = True
    lines.on_validation_end(trainer, model(**results, step=7))
    assert len(caplog.messages) == 1


def test_long_drawing_has_lines(clock, trainer, caplog):
    caplog.set_level(logging.INFO)
    lines = Progress(counts=True)
    lines.on_predict_start(trainer, model())
    for batch in range(10):
        clock.seconds += 3
        lines.on_predict_batch_end(trainer, model(), None, None, batch)
    assert caplog.messages[0] == "drew batch 2 of 10: 0:00:24 left"
    assert len(caplog.messages) == 5


def test_a_validation_shows_a_sample(trainer, caplog):
    """Cut to what a line holds, and escaped."""
    caplog.set_level(logging.INFO)
    samples = SampleLogging()
    trainer.callbacks = [samples]
    results = {"nll": 2.751, "nll_stderr": 0.081, "step": 0}
    lines = Progress(counts=False)
    lines.on_validation_end(trainer, model(**results))
    samples.texts = ["one\n\x1b[31mtwo" + 200 * "x", "other"]
    lines.on_validation_end(trainer, model(**results))
    (said,) = [x for x in caplog.messages if "sample" in x]
    assert said.startswith(r"a sample: 'one\n\x1b[31mtwoxx")
    assert len(said) < 130


# ---------------------------------------------------------------- the bar


@pytest.fixture
def drawn(clock, trainer, monkeypatch):
    """A bar of a run, and the counts with which it is drawn."""
    bar = ProgressBar()
    counts = []
    monkeypatch.setattr(ProgressBar, "trainer", trainer, raising=False)
    monkeypatch.setattr(ProgressBar, "get_metrics", lambda *_: {})

    def start(max_steps=1000, step=0):
        trainer.max_steps, trainer.global_step = max_steps, step
        trainer.current_epoch, trainer.num_training_batches = 0, 3
        bar.on_train_start(trainer, model())
        bar.on_train_epoch_start(trainer, model())
        one = bar.train_progress_bar
        monkeypatch.setattr(one, "refresh", lambda *_, **__: counts.append(one.n))
        return bar

    return start, counts


def test_the_bar_is_drawn_with_the_first_update_however_long_it_takes(
    drawn, clock, trainer
):
    start, counts = drawn
    bar = start()
    for step in range(1, 4):
        clock.seconds += 60
        trainer.global_step = step
        bar.on_train_batch_end(trainer, model(), None, None, 0)
    assert counts == [1, 2, 3]


def test_the_bar_is_not_drawn_more_than_twice_a_second(drawn, clock, trainer):
    start, counts = drawn
    bar = start()
    for step in range(1, 1001):
        clock.seconds += 0.01
        trainer.global_step = step
        if step % 3 == 0:  # epochs of three updates
            bar.on_train_epoch_end(trainer, model())
            trainer.current_epoch += 1
            bar.on_train_epoch_start(trainer, model())
        bar.on_train_batch_end(trainer, model(), None, None, 0)
    assert 15 <= len(counts) <= 22
    assert counts[0] == 1
    assert counts[-1] == 1000  # the end is shown
    assert bar.train_progress_bar.total == 1000


def test_the_bar_of_a_run_that_goes_on_begins_where_it_was(drawn):
    start, _ = drawn
    bar = start(step=400).train_progress_bar
    assert (bar.n, bar.initial, bar.total) == (400, 400, 1000)


def test_without_a_last_update_the_bar_is_that_of_an_epoch(drawn, trainer):
    start, _ = drawn
    trainer.max_epochs = 5
    bar = start(max_steps=-1)
    bar.on_train_batch_end(trainer, model(), None, None, 1)
    assert (bar.train_progress_bar.n, bar.train_progress_bar.total) == (2, 3)


def test_a_bar_shows_the_loss_alone(monkeypatch):
    bar = progress.ProgressBar()
    said = {"v_num": 0, "trainer/loss": "2.5"}
    monkeypatch.setattr(progress.TQDMProgressBar, "get_metrics", lambda *_: dict(said))
    assert bar.get_metrics(None, None) == {"loss": "2.5"}
