"""What a recorder keeps: the states of every sampler, without a change to them."""

import numpy as np
import pytest
import torch
from tiny import SAMPLING

from sampling.prompts import Given
from sampling.recording import Recorder, code_of
from sampling.reverse_process import Chain
from sampling.trajectory import NO_PROBABILITY, NOTHING, packed

B = 3
KAPPA = [f"sampling.psi.{x}_mode=constant-0.5" for x in ("high", "middle", "low")]
FURTHER = [
    ("algo=dimo", "sampling.refine_steps=2"),
    ("algo=dimo", "sampling.predictor=one_step"),
    ("algo=mdlm", "sampling.predictor=psi", *KAPPA),
    ("algo=duo_base", "sampling.predictor=psi", *KAPPA),
    ("algo=duo_base", "sampling.corrector=gibbs", "sampling.corrector_parallel=2"),
    (
        *("algo=duo_base", "sampling.corrector=gibbs"),
        "sampling.corrector_select=lowest_max",
    ),
    ("algo=mdlm", "sampling.noise_removal=greedy"),
    ("algo=duo_base", "sampling.noise_removal=none"),
    ("algo=mdlm", "data.num_classes=2", "sampling.guid_weight=2"),
    ("algo=mdlm", "sampling.temperature=0", "sampling.p_nucleus=0.8"),
    ("algo=mdlm", "sampling.use_float64=False"),
    ("algo=duo_base", "sampling.use_float64=False"),
    ("algo=ar", "sampling.use_float64=False"),
]
# Every sampler; those of masks with one algorithm, but for its scores.
CASES = [
    (f"sampling.predictor={x}", f"algo={name}")
    for x, name in SAMPLING
    if name not in ("d3pm", "sedd") or x == "analytic"
] + FURTHER


def draw(model, recorder=None, num_samples=B):
    seeded = torch.Generator().manual_seed(3)
    options = {}
    if model.num_classes is not None:
        options["labels"] = torch.tensor([0, 1, 1])
    return model.generate_samples(num_samples, seeded, recorder=recorder, **options)


@pytest.mark.parametrize("overrides", CASES, ids="-".join)
def test_every_sampler_is_recorded_and_stays_as_it_is(
    make_model, overrides, monkeypatch
):
    model = make_model(*overrides)
    expected = draw(model).tokens
    noted, note = [], Recorder.note
    monkeypatch.setattr(
        Recorder, "note", lambda self, xt: (noted.append(xt.clone()), note(self, xt))
    )
    recorder = Recorder()
    samples = draw(model, recorder)
    assert torch.equal(samples.tokens, expected)
    for row, one in enumerate(recorder.trajectories()):
        states = one.states()
        assert states[-1].tolist() == expected[row].tolist()
        assert len(states) == len(noted) + 1
        for state, xt in zip(states[1:], noted, strict=True):
            assert state[: xt.shape[1]].tolist() == xt[row].tolist()
        is_drawn = one.codes != NO_PROBABILITY
        assert is_drawn.any()
        noises_again = any(x.endswith(("=psi", "=gibbs")) for x in overrides)
        assert noises_again or is_drawn.all() or model.is_one_step


@pytest.mark.parametrize(
    "overrides",
    [
        ("algo=mdlm",),
        ("algo=mdlm", "sampling.predictor=first_hitting", "sampling.num_blocks=6"),
        ("algo=duo_base", "sampling.predictor=psi", *KAPPA),
        ("algo=duo_base", "sampling.num_blocks=7", "sampling.stop_at_eos=True"),
    ],
    ids="-".join,
)
def test_blocks_are_recorded_from_left_to_right(make_model, overrides):
    """Each changes in its own steps alone; at the end it is the sample."""
    model = make_model(*overrides, "algo.block_size=2")
    expected = draw(model)
    recorder = Recorder()
    samples = draw(model, recorder)
    assert torch.equal(samples.tokens, expected.tokens)
    L = samples.tokens.shape[1]
    for row, one in enumerate(recorder.trajectories()):
        end = L if samples.lengths is None else int(samples.lengths[row])
        states = np.stack(one.states())
        assert states[-1].tolist() == samples.tokens[row].tolist()
        changed = [step.nonzero()[0] for step in states[1:] != states[:-1]]
        blocks = [np.unique(x // 2) for x in changed if len(x) and x.min() < end]
        assert all(len(x) == 1 for x in blocks)
        order = [int(x[0]) for x in blocks]
        assert order == sorted(order)
        assert set(order) == set(range((end + 1) // 2))


@pytest.mark.parametrize("name", ["mdlm", "duo_base"])
def test_a_recording_is_the_sampler_by_hand(make_model, name):
    model = make_model(f"algo={name}")
    recorder = Recorder()
    draw(model, recorder)
    sampler, seeded = model.sampler, torch.Generator().manual_seed(3)
    with torch.no_grad():
        given = model.with_bos(Given.nothing(B, model.num_tokens, model.device))
        chain = Chain(model, ~given.known, seeded)
        states = [given.put(model.prior_sample(B, seeded))]
        plan = [x.to(states[0]) for x in sampler.plan(model.noise, sampler.num_steps)]
        for step in plan:
            states.append(sampler.step(chain, states[-1], step))
        states.append(sampler.remove_noise(chain, states[-1], plan[-1].alpha_s))
    for row, one in enumerate(recorder.trajectories()):
        found = [x.tolist() for x in one.states()]
        found += found[-1:] * (len(states) - len(found))  # nothing was left to remove
        assert found == [x[row].tolist() for x in states]


@pytest.mark.parametrize("name", ["mdlm", "duo_base", "ar"])
def test_probabilities_and_entropies_are_the_models_own(make_model, give_logits, name):
    """Before temperature and nucleus."""
    model = make_model(f"algo={name}", "sampling.temperature=0.7")
    p = torch.rand(model.vocab_size, generator=torch.Generator().manual_seed(0))
    if model.mask_index is not None:
        p[model.mask_index] = 0
    p = (p / p.sum()).double()
    logits = p.log().clamp(min=-1e6).float()
    give_logits(model, lambda x, *_: logits.expand(*x.shape, -1))
    recorder = Recorder()
    draw(model, recorder)
    H = float(torch.special.entr(p).sum())
    for one in recorder.trajectories():
        assert len(one.codes)
        error = one.codes - code_of(p)[one.tokens].numpy().astype(int)
        assert abs(error).max() <= 1  # of rounding
        known = one.entropy[np.isfinite(one.entropy)]
        np.testing.assert_allclose(known, H, rtol=1e-4)


def test_codes_are_of_factors_of_two():
    p = torch.tensor([1, 0.5, 2**-10, 1e-9, 0], dtype=torch.float64)
    assert code_of(p).tolist() == [0, 16, 160, 254, 254]


def test_nothing_is_there_before_it_is_written(make_model):
    """From left to right."""
    recorder = Recorder()
    draw(make_model("algo=ar"), recorder)
    one = recorder.trajectories()[0]
    assert one.first[0] != NOTHING
    assert (one.first[1:] == NOTHING).all()
    assert one.positions.tolist() == list(range(1, 8))
    assert one.given.tolist() == [True] + [False] * 7


def test_windows_are_recorded_one_after_the_other(make_model):
    """With a prompt that reaches into the second one."""
    stride = ("sampling.stride_length=4", "sampling.num_strides=2")
    model = make_model("algo=mdlm", "sampling.semi_ar=True", *stride)
    given = Given.nothing(B, 16, model.device)
    given.tokens[:, [1, 9]], given.known[:, [1, 9]] = 3, True
    recorder = Recorder()
    seeded = torch.Generator().manual_seed(3)
    drawn = model.generate_samples(B, seeded, given=given, recorder=recorder)
    for row, one in enumerate(recorder.trajectories()):
        states = one.states()
        assert (one.first[8:] != NOTHING).nonzero()[0].tolist() == [1]  # is given
        assert one.given.nonzero()[0].tolist() == [1, 9]
        assert states[-1].tolist() == drawn.tokens[row].tolist()
        begun = [int((x != NOTHING).sum()) for x in states]
        assert sorted(set(begun)) == [9, 12, 16]


def test_some_of_the_samples_may_go_on(make_model):
    """Block by block, and what is set behind an end."""
    recorder, free = Recorder(), torch.ones(2, 2, dtype=torch.bool)
    p = torch.tensor([[0.5, 0.25, 0.25]])
    recorder.begin_samples(torch.tensor([[1, 0, 0, 0]] * 2), free.new_zeros(2, 4))
    recorder.move(0)
    recorder.begin(torch.tensor([[2, 2], [2, 2]]), free, lambda tokens: p)
    recorder.drew_from(p, *torch.tensor([[0], [1], [0]]))
    recorder.note(torch.tensor([[0, 2], [0, 2]]))
    recorder.move(2, torch.tensor([1]))
    recorder.begin(torch.tensor([[2, 2]]), free[:1], lambda tokens: p)
    recorder.note(torch.tensor([[1, 1]]))
    recorder.end(torch.tensor([[1, 1]]))
    tokens = torch.tensor([[0, 2, 2, 2], [0, 2, 1, 1]])
    recorder.end_samples(tokens)
    assert tokens.tolist() == [[0, 2, 2, 2], [0, 2, 1, 1]]
    one, other = recorder.trajectories()
    assert [x.tolist() for x in one.states()] == [
        [2, 2, NOTHING, NOTHING],
        *[[0, 2, NOTHING, NOTHING]] * 3,
        [0, 2, 2, 2],
    ]
    assert other.states()[2].tolist() == [0, 2, 2, 2]
    assert other.states()[-1].tolist() == [0, 2, 1, 1]
    assert one.codes.tolist() == [NO_PROBABILITY] * 3
    assert other.codes.tolist()[0] == 16
    assert np.isfinite(other.entropy).tolist() == [True] + [False] * 3


def test_noise_again_has_no_probability(make_model):
    model = make_model("algo=mdlm", "sampling.predictor=psi", *KAPPA)
    recorder = Recorder()
    draw(model, recorder)
    some = [
        one.codes[one.tokens == model.mask_index] for one in recorder.trajectories()
    ]
    codes = np.concatenate(some)
    assert len(codes)
    assert (codes == NO_PROBABILITY).all()


def test_what_is_kept_does_not_grow_with_the_vocabulary(make_model, stub_tokenizer):
    sizes = []
    for vocab_size in (6, 600):
        model = make_model("algo=mdlm", tokenizer=stub_tokenizer(vocab_size))
        recorder = Recorder()
        draw(model, recorder)
        sizes.append([len(str(packed(x))) for x in recorder.trajectories()])
    assert max(sizes[1]) <= max(sizes[0])
