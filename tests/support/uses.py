"""What people do with a model of `transformers`, done with exported folders.

    python -I uses.py FOLDERS.json RESULTS.json

Isolated, so that nothing of this repository can be imported. FOLDERS holds folders of a
masked model, one from left to right, one of uniform states and one of blocks ("masked",
"causal", "uniform", "blocks"), and a folder to write to ("work"). RESULTS holds the
versions of packages, and for each use "ok", "no PACKAGE", or the error.
"""

import copy
import importlib.util
import json
import sys
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModel, AutoTokenizer

TEXT = "the cat"
LENGTH, SIZE = 32, 8
AUTO = {
    "masked": transformers.AutoModelForMaskedLM,
    "uniform": transformers.AutoModelForMaskedLM,
    "causal": transformers.AutoModelForCausalLM,
    "blocks": transformers.AutoModelForMaskedLM,
}
TRUST = {"trust_remote_code": True}
folders: dict[str, str] = {}
USES: dict[str, tuple[Callable[[], None], tuple[str, ...]]] = {}


def use(title: str, *packages: str) -> Callable:
    """Names a use, which needs packages beside torch and transformers."""

    def named(function: Callable[[], None]) -> Callable[[], None]:
        USES[title] = function, packages
        return function

    return named


def load(kind: str, **options: Any) -> Any:
    return AUTO[kind].from_pretrained(folders[kind], **TRUST, **options)


def tokenizer_of(kind: str) -> Any:
    return AutoTokenizer.from_pretrained(folders[kind], **TRUST)


def encoded(kind: str, text: str = TEXT) -> dict[str, torch.Tensor]:
    return tokenizer_of(kind)(text, return_tensors="pt")


def ids_of(rows: int = 2, length: int = LENGTH) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randint(97, 122, (rows, length))  # letters


def work(name: str) -> str:
    return str(Path(folders["work"]) / name)


def close(one: torch.Tensor, two: torch.Tensor, atol: float = 1e-4) -> None:
    torch.testing.assert_close(one, two, rtol=0, atol=atol)


def refused(words: str, call: Callable, *args: Any, **kwargs: Any) -> None:
    """Whether a call ends with such a message."""
    message = "nothing"
    try:
        call(*args, **kwargs)
    except ValueError as error:
        message = str(error)
    assert words in message, f"{words!r} is not in: {message}"


# ---------------------------------------------------------------- the network


@use("`AutoConfig`, `AutoTokenizer`, `model(**tokenizer(text))`")
def _() -> None:
    for kind in "masked", "causal":
        config = AutoConfig.from_pretrained(folders[kind], **TRUST)
        out = load(kind)(**encoded(kind))
        assert out.logits.shape == (1, len(TEXT), config.vocab_size)
        assert "token_type_ids" not in encoded(kind)
    with_level = encoded("uniform") | {"timesteps": torch.ones(1)}
    assert load("uniform")(**with_level).logits.isfinite().all()
    refused("give timesteps", load("uniform"), **encoded("uniform"))


@use("`AutoModel`: hidden states without the head")
def _() -> None:
    for kind in "masked", "causal":
        model = AutoModel.from_pretrained(folders[kind], **TRUST).eval()
        whole = load(kind).eval()
        hidden = model(**encoded(kind)).last_hidden_state
        close(whole.get_output_embeddings()(hidden), whole(**encoded(kind)).logits)


@use("a padded batch, on either side, gives the logits of each text alone")
def _() -> None:
    texts = ["a", "the cat sat"]
    for kind in "masked", "causal":
        model = load(kind).eval()
        for side in "left", "right":
            tokenizer = tokenizer_of(kind)
            tokenizer.padding_side = side
            batch = tokenizer(texts, return_tensors="pt", padding=True)
            logits = model(**batch).logits
            for row, text in enumerate(texts):
                there = batch["attention_mask"][row].bool()
                close(logits[row][there], model(**encoded(kind, text)).logits[0])
    refused(
        "attention_mask has shape",
        lambda: model(ids_of(), None, attention_mask=ids_of()),
    )


@use("`token_type_ids` of one segment; others are refused")
def _() -> None:
    ids = ids_of()
    for kind in "masked", "causal":
        model, zeros = load(kind).eval(), torch.zeros_like(ids)
        close(model(ids, token_type_ids=zeros).logits, model(ids).logits, 0)
        zeros[0, 3] = 1
        refused("segments", model, ids, token_type_ids=zeros)


@use("`inputs_embeds` in the place of ids")
def _() -> None:
    for kind in "masked", "causal":
        model, ids = load(kind).eval(), ids_of()
        embeds = model.get_input_embeddings()(ids)
        close(model(inputs_embeds=embeds).logits, model(ids).logits, 0)


def log_probs(model: Any, logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Of tokens, in nats, where the mask has no probability, (B, L)."""
    is_mask = torch.arange(logits.shape[-1]) == model.config.mask_index
    log_p = logits.masked_fill(is_mask, -torch.inf).log_softmax(-1)
    return log_p.gather(-1, ids[..., None]).squeeze(-1)


@use("`labels`: cross entropy at the labels of a masked model")
def _() -> None:
    model, ids = load("masked").eval(), ids_of()
    labels = ids.masked_fill(torch.rand(ids.shape) < 0.5, -100)
    out = model(ids, labels=labels)
    log_p = log_probs(model, out.logits, ids)
    close(out.loss, -log_p[labels != -100].mean(), 1e-5)
    refused("labels has shape (2, 31)", model, ids, labels=ids[:, 1:])


@use("`labels`: shifted cross entropy of a left-to-right model")
def _() -> None:
    model, ids = load("causal").eval(), ids_of()
    out = model(ids, labels=ids)
    log_p = log_probs(model, out.logits[:, :-1], ids[:, 1:])
    close(out.loss, -log_p.mean(), 1e-5)
    with_tuple = model(ids, labels=ids, return_dict=False)
    close(with_tuple[0], out.loss, 0)


# ---------------------------------------------------------------- its parts


@use("`get_input_embeddings`, `set_input_embeddings`, output embeddings")
def _() -> None:
    for kind in AUTO:
        model = load(kind)
        old = model.get_input_embeddings()
        assert old.weight is model.backbone.vocab_embed.embedding
        new = torch.nn.Embedding(*old.weight.shape)
        model.set_input_embeddings(new)
        assert model.get_input_embeddings().weight is new.weight
        head = model.get_output_embeddings()
        model.set_output_embeddings(copy.deepcopy(head))
        assert model.get_output_embeddings() is not head


@use("`resize_token_embeddings`, saved and loaded")
def _() -> None:
    for kind in "masked", "causal":
        model, ids = load(kind).eval(), ids_of()
        before, K = model(ids).logits, model.config.vocab_size
        model.resize_token_embeddings(K + 3)
        close(model(ids).logits[..., :K], before)
        names = set(model.state_dict())
        model.save_pretrained(work(f"resized-{kind}"))
        again = AUTO[kind].from_pretrained(work(f"resized-{kind}"), **TRUST).eval()
        assert set(again.state_dict()) == names == set(load(kind).state_dict())
        close(again(ids).logits, model(ids).logits, 0)
        assert again.config.vocab_size == K + 3


@use("gradient checkpointing: the same gradients")
def _() -> None:
    for kind in "masked", "causal":
        gradients = []
        for checkpointed in False, True:
            model, ids = load(kind), ids_of()
            if checkpointed:
                model.gradient_checkpointing_enable({"use_reentrant": False})
            model.train()
            for module in model.modules():
                module.dropout = 0.0
            model(ids, labels=ids).loss.backward()
            gradients.append([p.grad for p in model.parameters()])
        for one, two in zip(*gradients, strict=True):
            close(one, two, 1e-6)


@use("`save_pretrained` and `from_pretrained`, also in shards")
def _() -> None:
    for kind in AUTO:
        model, out = load(kind), work(f"saved-{kind}")
        model.save_pretrained(out, max_shard_size="50KB")
        assert len(list(Path(out).glob("*.safetensors"))) > 1
        assert len(list(Path(out).glob("*_discrete_diffusion.py"))) == 4
        again = AUTO[kind].from_pretrained(out, **TRUST)
        for name, x in model.state_dict().items():
            assert torch.equal(x, again.state_dict()[name]), name


@use("bfloat16 and float16, `deepcopy`")
def _() -> None:
    for kind in "masked", "causal":
        for dtype in torch.bfloat16, torch.float16:
            model = load(kind, torch_dtype=dtype).eval()
            assert model.get_input_embeddings().weight.dtype == dtype
            logits = copy.deepcopy(model)(ids_of()).logits
            close(logits.float(), load(kind).eval()(ids_of()).logits, 0.5)


# ---------------------------------------------------------------- to write


@use("`generate` of transformers: greedy, with its cache as without")
def _() -> None:
    model, ids = load("causal").eval(), ids_of(2, 5)
    ids_only = {"attention_mask": torch.ones_like(ids), "pad_token_id": 0}
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False} | ids_only
    lengths = []
    model.backbone.register_forward_pre_hook(lambda _, x: lengths.append(x[0].shape[1]))
    with_cache = model.generate(ids, **options)
    assert lengths == [5, 1, 1, 1, 1, 1]  # tokens that the network is given
    assert with_cache.shape == (2, 11)
    assert torch.equal(with_cache, model.generate(ids, use_cache=False, **options))
    for _ in range(6):
        logits = model(ids).logits[:, -1]
        logits[:, model.config.eos_token_id] = -torch.inf  # of min_new_tokens
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(with_cache, ids)


@use("`generate` of transformers: sampling arguments, a batch with padding")
def _() -> None:
    model, tokenizer = load("causal"), tokenizer_of("causal")
    tokenizer.padding_side = "left"
    batch = tokenizer(["a", "the cat sat"], return_tensors="pt", padding=True)
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "pad_token_id": 0}
    drawn = model.generate(
        **batch, do_sample=True, top_k=20, top_p=0.9, temperature=0.7,
        num_return_sequences=3, repetition_penalty=1.1, **options,
    )  # fmt: skip
    assert drawn.shape == (6, 15)
    both = model.generate(**batch, do_sample=False, **options)
    alone = model.generate(**encoded("causal", "a"), do_sample=False, **options)
    assert torch.equal(both[0, -4:], alone[0, -4:])


@use("a cache by hand, several tokens at a time")
def _() -> None:
    model, ids = load("causal").eval(), ids_of()
    name = "cache" if "cache" in model(ids, use_cache=True) else "past_key_values"
    cache, parts = None, []
    for part in ids.split(5, dim=1):
        out = model(part, past_key_values=cache, use_cache=True)
        cache = out[name]
        parts.append(out.logits)
    close(torch.cat(parts, dim=1), model(ids).logits)
    mask = torch.ones(2, LENGTH + 1)
    mask[0, :3] = 0
    last = model(ids[:, :1], attention_mask=mask, **{name: cache}).logits
    refused("attention_mask has shape", model, ids, attention_mask=mask)
    assert last.shape[:2] == (2, 1)
    refused("has no cache", load("masked"), ids, past_key_values=cache)


@use("`generate` of transformers: `inputs_embeds`, prompt lookup, an assistant")
def _() -> None:
    model, assistant = load("causal"), load("causal")
    options = {"max_new_tokens": 5, "pad_token_id": 0, "do_sample": False}
    for seed in range(3):
        torch.manual_seed(seed)
        ids = torch.randint(97, 122, (1, 4)).repeat(1, 3)
        plain = model.generate(ids, **options)
        there = torch.ones_like(ids)
        embeds = model.get_input_embeddings()(ids)
        others = {"inputs_embeds": embeds, "attention_mask": there}
        assert torch.equal(model.generate(**others, **options), plain[:, 12:])
        for own in {"prompt_lookup_num_tokens": 3}, {"assistant_model": assistant}:
            assert torch.equal(model.generate(ids, **own, **options), plain)


@use("`generate` of transformers: beams")
def _() -> None:
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "pad_token_id": 0}
    beams = {"num_beams": 3, "do_sample": False} | options
    model = load("causal")
    drawn = model.generate(**encoded("causal"), **beams)
    assert drawn.shape == (1, len(TEXT) + 5)
    assert torch.equal(
        drawn, model.generate(**encoded("causal"), use_cache=False, **beams)
    )


@use("`pipeline('text-generation')` of a left-to-right model")
def _() -> None:
    write = transformers.pipeline("text-generation", model=folders["causal"], **TRUST)
    (out,) = write(TEXT, max_new_tokens=3, do_sample=True)
    assert out["generated_text"].startswith(TEXT)


@use("`pipeline('fill-mask')` of a masked model")
def _() -> None:
    fill = transformers.pipeline("fill-mask", model=folders["masked"], **TRUST)
    found = fill(f"the {fill.tokenizer.mask_token}at")
    assert len(found) == 5
    assert all(0 <= x["score"] <= 1 for x in found)


@use("`pipeline('feature-extraction')`")
def _() -> None:
    for kind in "masked", "causal":
        options = {"model": folders[kind], "tokenizer": folders[kind]} | TRUST
        features = transformers.pipeline("feature-extraction", **options)(TEXT)
        assert len(features[0]) == len(TEXT)


@use("`generate` of these models: steps, nucleus, temperature, predictor, seed")
def _() -> None:
    common = {"num_samples": 2, "num_steps": 3, "seed": 1}
    for kind in AUTO:
        model = load(kind)
        model.train()
        one = model.generate(**common, p_nucleus=0.9, temperature=0.8)
        two = model.generate(**common, p_nucleus=0.9, temperature=0.8)
        assert torch.equal(one, two)
        assert one.shape == (2, LENGTH)
        assert model.training  # without dropout, but as it was
        model.generate(**common, noise_removal="greedy")
    causal = load("causal").eval()
    ids = torch.full((1, 1), causal.config.bos_token_id)
    while ids.shape[1] < LENGTH:
        logits = causal(ids).logits[:, -1]
        logits[:, causal.config.mask_index] = -torch.inf
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(causal.generate(temperature=0.0), ids)
    model = load("masked")
    drawn = model.generate(2, predictor="first_hitting", seed=1)
    assert (drawn != model.config.mask_index).all()
    refused("predictor='psi'", model.generate, predictor="psi")
    refused("num_samples is a tensor of shape (2, 32)", model.generate, ids_of())


@use("`generate` of these models: a template, a prompt")
def _() -> None:
    for kind in AUTO:
        model, given = load(kind), encoded(kind)["input_ids"][0]
        drawn = model.generate(2, 3, prompt=given)
        assert (drawn[:, 1 : 1 + len(given)] == given).all()
        template = torch.full((LENGTH,), -1)
        template[1 : 1 + len(given)] = given
        drawn = model.generate(2, 3, template)
        assert (drawn[:, 1 : 1 + len(given)] == given).all()
        short = torch.full((5,), -1)
        refused("template has shape (5,)", model.generate, template=short)
    template = torch.cat([given, template[len(given) :]])
    refused("begins with token", load("causal").generate, template=template)


@use("a model with blocks: a cache by hand, of clean blocks alone")
def _() -> None:
    model, ids = load("blocks").eval(), ids_of()
    expected = model(ids).logits  # each block sees those before it
    cache = transformers.DynamicCache()
    for begin in range(0, LENGTH, SIZE):
        block = ids[:, begin : begin + SIZE]
        for _ in range(2):  # as a noisy block is seen, many times
            logits = model(block, past_key_values=cache).logits
        close(logits, expected[:, begin : begin + SIZE])
        model(block, past_key_values=cache, use_cache=True)
        assert cache.get_seq_length() == begin + SIZE
    several = model(ids, use_cache=True)
    name = "cache" if "cache" in several else "past_key_values"
    assert several[name].get_seq_length() == LENGTH
    refused("whole blocks of 8", model, ids[:, :5], use_cache=True)


@use("`generate` of a model with blocks: any number of them, up to eos")
def _() -> None:
    model, given = load("blocks"), encoded("blocks")["input_ids"][0]
    eos, options = model.config.eos_token_id, {"seed": 1, "temperature": 3.0}
    long = {"num_blocks": 7, "prompt": given} | options
    drawn = model.generate(4, 3, **long)
    assert drawn.shape == (4, 7 * SIZE)
    assert torch.equal(drawn, model.generate(4, 3, **long))
    with torch.no_grad():  # an end is likely
        model.get_output_embeddings().bias[eos] += 5
    ended = model.generate(4, 3, stop_at_eos=True, **long)
    assert (ended[:, 1 : 1 + len(given)] == given).all()
    rest = ended[:, 1 + len(given) :]
    is_end = rest == eos
    assert is_end.any(dim=-1).any()
    assert torch.equal(is_end, is_end.cummax(dim=-1).values)
    refused("num_blocks=2 is for models", load("masked").generate, num_blocks=2)


# ---------------------------------------------------------------- to train


def trained(model: Any, rows: list, collator: Any, **options: Any) -> None:
    """Two updates by the Trainer, and a checkpoint of it."""
    out = work(f"trainer-{len(list(Path(folders['work']).iterdir()))}")
    arguments = transformers.TrainingArguments(
        out, max_steps=2, per_device_train_batch_size=2, report_to=[], save_steps=2,
        use_cpu=True, disable_tqdm=True, remove_unused_columns=False, **options,
    )  # fmt: skip
    before = [p.detach().clone() for p in model.parameters()]
    trainer = transformers.Trainer(
        model=model, args=arguments, train_dataset=rows, data_collator=collator
    )
    assert trainer.train().training_loss > 0
    now = [p.detach() for p in model.parameters() if p.requires_grad]
    assert any((x != y).any() for x in now for y in before if x.shape == y.shape)
    assert list(Path(out).glob("checkpoint-2/*.safetensors"))


def rows_of(kind: str) -> list[dict]:
    lengths = 5, 9, 7, 9
    return [{"input_ids": ids_of(1, n)[0].tolist()} for n in lengths]


@use("`Trainer` with the collator of masks", "accelerate")
def _() -> None:
    mask = transformers.DataCollatorForLanguageModeling(tokenizer_of("masked"))
    trained(load("masked"), rows_of("masked"), mask)


@use("`Trainer` of a left-to-right model, with gradient checkpointing", "accelerate")
def _() -> None:
    shift = transformers.DataCollatorForLanguageModeling(
        tokenizer_of("causal"), mlm=False
    )
    model = load("causal")
    trained(model, rows_of("causal"), shift, gradient_checkpointing=True)


@use("`Trainer` of uniform states, with `timesteps` in the data", "accelerate")
def _() -> None:
    rows = [{"input_ids": x, "labels": x, "timesteps": 0.5} for x in ids_of(4)]
    trained(load("uniform"), rows, transformers.default_data_collator)


@use("accelerate: `Accelerator.prepare`, `device_map`, weights on disk", "accelerate")
def _() -> None:
    from accelerate import Accelerator, cpu_offload, disk_offload

    for kind in "masked", "causal":
        model, ids = load(kind, device_map={"": "cpu"}), ids_of()
        expected = model.eval()(ids).logits
        close(cpu_offload(load(kind).eval(), "cpu")(ids).logits, expected)
        disk_offload(model, work(f"offload-{kind}"), "cpu")
        close(model(ids).logits, expected)
        accelerator = Accelerator(cpu=True)
        model = load(kind)
        optimizer = torch.optim.AdamW(model.parameters())
        model, optimizer = accelerator.prepare(model, optimizer)
        accelerator.backward(model(ids, labels=ids).loss)
        optimizer.step()
        accelerator.unwrap_model(model).save_pretrained(work(f"accelerated-{kind}"))


def lora(model: Any, **options: Any) -> Any:
    import peft

    options = {"r": 2, "target_modules": ["attn_qkv", "attn_out"]} | options
    return peft.get_peft_model(model, peft.LoraConfig(**options))


@use("peft without a task: LoRA, merged and saved", "peft")
def _() -> None:
    import peft

    for kind in "masked", "causal":
        model, ids = lora(load(kind)), ids_of()
        model(input_ids=ids, labels=ids).loss.backward()
        model.generate(num_samples=1, num_steps=2)
        model.save_pretrained(work(f"lora-{kind}"))
        loaded = peft.PeftModel.from_pretrained(load(kind), work(f"lora-{kind}"))
        close(loaded.eval()(ids).logits, model.eval()(ids).logits, 0)
        merged = model.merge_and_unload()
        merged.save_pretrained(work(f"merged-{kind}"))
        assert set(merged.state_dict()) == set(load(kind).state_dict())


@use("peft: `target_modules='all-linear'`", "peft")
def _() -> None:
    for kind in "masked", "causal":
        model, ids = lora(load(kind), target_modules="all-linear"), ids_of()
        model(input_ids=ids, labels=ids).loss.backward()


@use(
    "peft: `task_type` CAUSAL_LM and others, embeddings, preparation for k bits",
    "peft",
)
def _() -> None:
    import peft

    model, ids = lora(load("causal"), task_type="CAUSAL_LM"), ids_of(2, 6)
    model(
        input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids
    ).loss.backward()
    drawn = model.generate(input_ids=ids, max_new_tokens=3, min_new_tokens=3)
    assert drawn.shape == (2, 9)
    for task in "FEATURE_EXTRACTION", "CAUSAL_LM":
        targets = ["attn_qkv", "vocab_embed"]
        model = lora(load("masked"), task_type=task, target_modules=targets)
        model(input_ids=ids, labels=ids).loss.backward()
    model = peft.prepare_model_for_kbit_training(load("causal"))
    lora(model, task_type="CAUSAL_LM")(input_ids=ids, labels=ids).loss.backward()


@use("peft: prompt tuning", "peft")
def _() -> None:
    import peft

    ids, sizes = ids_of(2, 6), {"token_dim": 32, "num_layers": 2}
    config = peft.PromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=3, num_attention_heads=2, **sizes
    )
    model = peft.get_peft_model(load("causal"), config)
    model(input_ids=ids, labels=ids).loss.backward()


# ---------------------------------------------------------------- all of it


def result_of(function: Callable[[], None], packages: tuple[str, ...]) -> str:
    missing = [x for x in packages if importlib.util.find_spec(x) is None]
    if missing:
        return f"no {missing[0]}"
    try:
        function()
    except BaseException as error:
        lines = str(error).strip().splitlines() or [""]
        return f"{type(error).__name__}: {lines[0][:200]}"
    return "ok"


def main(inputs: str, outputs: str, *wanted: str) -> None:
    for name in ("models", "checkpoints", "diffusion"):
        assert importlib.util.find_spec(name) is None, name
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    folders.update(json.loads(Path(inputs).read_text()))
    packages = ("transformers", "torch", "accelerate", "peft")
    there = [name for name in packages if importlib.util.find_spec(name)]
    results = {
        title: result_of(*how)
        for title, how in USES.items()
        if not wanted or any(x in title for x in wanted)
    }
    found = {"versions": {x: version(x) for x in there}, "results": results}
    Path(outputs).write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main(*sys.argv[1:])
