"""Laws of the labels that training hides, so that guidance knows what is without."""

import pytest
import torch

N, CLASSES = 4000, 3
SOME = "training.class_dropout_p=0.3"


@pytest.fixture
def model_of(make_model):
    """A training model with classes."""

    def build(*overrides):
        own = ("algo=duo_base", f"data.num_classes={CLASSES}", SOME)
        return make_model(*own, *overrides).train()

    return build


@pytest.fixture
def labels(generator):
    return torch.randint(CLASSES, (N,), generator=generator)


@pytest.mark.parametrize("p", [0, 0.1, 0.5, 1])
def test_each_is_dropped_with_the_probability_given(model_of, labels, p):
    """To the class that is none; the others stay, whatever their class."""
    model = model_of(f"training.class_dropout_p={p}")
    told = model.with_dropout(labels, 0)
    is_dropped = told == CLASSES
    assert torch.equal(told[~is_dropped], labels[~is_dropped])
    assert told.dtype == labels.dtype
    for label in range(CLASSES):
        own = is_dropped[labels == label].double()
        assert abs(float(own.mean()) - p) <= 5 * (p * (1 - p) / len(own)) ** 0.5


def test_they_depend_on_seed_step_and_place_in_the_update(model_of, labels, place):
    """And on nothing that came before: a run that goes on draws what it would have.

    How often the epoch was cut before does not matter.
    """
    model = model_of()
    found = []
    for rank, step, batch in [(0, 5, 9), (1, 5, 9), (0, 6, 9)]:
        place(model, rank=rank, step=step)
        found.append(model.with_dropout(labels, batch))
        torch.rand(3)  # global states do not matter
        for i in (8, batch):
            assert torch.equal(model.with_dropout(labels, i), found[-1])
    found.append(model_of("seed=2").with_dropout(labels, 8))
    for i, told in enumerate(found):
        rate = float((told == CLASSES).double().mean())
        assert abs(rate - 0.3) < 5 * (0.3 * 0.7 / N) ** 0.5
        assert not any(torch.equal(told, other) for other in found[:i])


def test_they_are_drawn_apart_from_times_and_noise(model_of, labels):
    """Which labels are hidden says nothing of how noisy an image is."""
    model = model_of(f"loader.global_batch_size={N}", "loader.batch_size=1000")
    is_dropped = (model.with_dropout(labels, 0) == CLASSES).double()
    t = model.sample_t(1000, 0)
    both = torch.stack([is_dropped[:1000], t])
    assert abs(float(torch.corrcoef(both)[0, 1])) < 5 / 1000**0.5


@pytest.mark.parametrize("compat", ["paper", "reference"])
def test_validation_hides_none(model_of, labels, compat):
    """The published code does in validation, too."""
    model = model_of(f"algo.compat={compat}").eval()
    told = model.with_dropout(labels, 0)
    assert torch.equal(told, labels) == (compat == "paper")
    assert torch.equal(model.with_dropout(labels, 0), told)


def test_the_network_is_told_what_is_left(model_of, monkeypatch, place):
    """The trunk gets the labels of the batch after the draw; none without classes."""
    model = model_of("training.class_dropout_p=0.5")
    place(model, step=2)
    given = []
    trunk = model.backbone.trunk

    def spy(*args, labels=None, **kwargs):
        given.append(labels)
        return trunk(*args, labels=labels, **kwargs)

    monkeypatch.setattr(model.backbone, "trunk", spy)
    x0 = torch.arange(32).view(4, 8) % 6
    batch = {"input_ids": x0, "attention_mask": torch.ones_like(x0)}
    batch["labels"] = torch.tensor([0, 1, 2, 0])
    model.loss(batch, 3)
    assert torch.equal(given[0], model.with_dropout(batch["labels"], 3))
    model.eval().loss(batch, 3)
    assert torch.equal(given[1], batch["labels"])
