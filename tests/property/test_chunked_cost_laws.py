"""What the loss in chunks costs: no tensor of N x K elements, forward or backward; no
compilation per batch. Operations are watched as they are dispatched.
"""

import itertools
import shutil
import weakref

import pytest
import torch
from chunking import chunks_of, loss_and_gradients, random_batch
from torch._dynamo.backends.registry import lookup_backend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from models import head

# ---------------------------------------------------------------- memory


class Sizes(TorchDispatchMode):
    """Elements of the largest tensor that any operation returned, and of those with a
    vocabulary axis that are still there: K, or K - 1 without the mask."""

    def __init__(self, K):
        super().__init__()
        self.K, self.largest = K, 0
        self.results = weakref.WeakValueDictionary()  # in-place results come twice

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        for x in tree_leaves(results):
            if isinstance(x, torch.Tensor):
                self.largest = max(self.largest, x.numel())
                if x.dim() > 1 and x.shape[-1] in (self.K - 1, self.K):
                    self.results[id(x)] = x
        return results

    def alive(self):
        return sum(x.numel() for x in self.results.values())


K, L, B, D, CHUNK = 3000, 32, 4, 32, 4  # N = B L = 128


@pytest.fixture
def large_vocabulary(make_model, stub_tokenizer, algo_name, monkeypatch):
    """128 tokens, K = 3000; in training mode. Soft inputs come in chunks, too."""
    monkeypatch.setitem(head.CHUNK_BYTES, "cpu", 4 * CHUNK * K)
    overrides = (f"algo={algo_name}", f"model.length={L}")
    return make_model(*overrides, tokenizer=stub_tokenizer(K - 1, 1)).train()


def sizes_of_a_step(model, chunk):
    """(largest forward and backward, alive between the two), elements."""
    batch = random_batch(model, B)
    with chunks_of(model, chunk), Sizes(K) as sizes:
        loss = model.loss(batch).loss
        alive = sizes.alive()
        loss.backward()
    return sizes.largest, alive


def num_scored(model):
    """Tokens whose logits the plain way has at once."""
    if model.is_autoregressive:
        return B * (L - 1)
    x0 = random_batch(model, B)["input_ids"]
    if model.is_one_step:
        masks = (model.masks(x0.shape, x, "linear", 0) for x in model.PURPOSES)
        return max(len(x.masked) for x in masks)
    scored = model.corrupt(x0, model.sample_t(B)).scored
    if scored is None or hasattr(model, "reconstruction_nll"):
        return B * L
    return len(scored)


def test_no_tensor_of_tokens_times_vocabulary(large_vocabulary):
    """The largest tensor is a weight of the vocabulary, K D; between forward and
    backward no logits are left."""
    largest, alive = sizes_of_a_step(large_vocabulary, CHUNK)
    assert CHUNK * K < K * D < num_scored(large_vocabulary) * K
    assert largest == K * D
    assert alive == 0


def test_the_probe_sees_all_logits_of_the_plain_way(large_vocabulary):
    """So that the test above can fail."""
    largest, alive = sizes_of_a_step(large_vocabulary, None)
    assert largest == num_scored(large_vocabulary) * K
    assert alive >= num_scored(large_vocabulary) * K


def test_larger_chunks_are_larger(large_vocabulary):
    """Three quarters of the tokens at a time: that many logits, and no more."""
    chunk = num_scored(large_vocabulary) * 3 // 4
    largest, alive = sizes_of_a_step(large_vocabulary, chunk)
    assert largest == chunk * K
    assert alive == 0


# ---------------------------------------------------------------- compilation


@pytest.fixture
def compiled(monkeypatch):
    """Has token losses compiled by a backend; returns the list of compilations.

    Every compilation must be one that dynamo still takes: past its limit it would
    quietly go back to the plain function.
    """
    compilations, compile_with = [], torch.compile

    def use(backend):
        compiler = lookup_backend(backend)

        def counting(graph, inputs, **options):
            compilations.append(len(graph.graph.nodes))
            return compiler(graph, inputs, **options)

        def compile_counting(function, **options):
            return compile_with(function, **options | {"backend": counting})

        monkeypatch.setattr(torch, "compile", compile_counting)
        return compilations

    def forget():
        torch._dynamo.reset()
        head._compiled.cache_clear()

    forget()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield use
    forget()


def losses_of_changing_sizes(model, chunk):
    """Training and validation on batches of several sizes: losses, gradients."""
    found = []
    for B, batch_idx in itertools.product((4, 3, 2, 4), (0, 1)):
        batch = random_batch(model, B, seed=B)
        model.train()
        found.append(loss_and_gradients(model, batch, chunk, batch_idx))
        model.eval()
        with torch.inference_mode(), chunks_of(model, chunk):  # as Lightning does
            found.append(model.loss(batch, batch_idx))
    return found


def check_compiled(make_model, algo_name, compiled, backend):
    model = make_model(f"algo={algo_name}", "training.loss_precision=float64").double()
    model.config.training.loss_compile = False
    expected = losses_of_changing_sizes(model, 5)
    compilations = compiled(backend)
    model.config.training.loss_compile = True
    got = losses_of_changing_sizes(model, 5)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
    return len(compilations)


def test_compiled_losses_are_the_same(make_model, algo_name, compiled):
    """Chunks of 5 with a smaller last one, in training and validation. Each token loss
    is compiled for the first size, for others and for 1, with and without gradient; not
    for each size. Traced and run without code generation (`aot_eager`), which would
    take seconds for each algorithm."""
    num_compilations = check_compiled(make_model, algo_name, compiled, "aot_eager")
    # The reconstruction's, too; the auxiliary model's, and its bound in validation.
    num_losses = {"d3pm": 2, "dimo": 3}.get(algo_name, 1)
    assert 1 <= num_compilations <= 6 * num_losses


def test_the_next_model_is_compiled_as_well(make_model, compiled):
    """A sweep trains one model after the other in one process."""
    for _ in range(3):
        check_compiled(make_model, "duo_base", compiled, "aot_eager")


@pytest.mark.slow
@pytest.mark.skipif(
    not any(shutil.which(name) for name in ("g++", "clang++")),
    reason="torch.compile needs a C++ compiler on a CPU",
)
def test_generated_code_computes_the_same_losses(make_model, algo_name, compiled):
    check_compiled(make_model, algo_name, compiled, "inductor")
