"""Prompts, prompt files and templates with gaps: what becomes of text, what is
refused."""

import json
from functools import partial

import fsspec
import pytest
import torch
from refusals import refused
from transformers import AutoTokenizer

from data.tokenizers import bytes_tokenizer, text8_tokenizer
from sampling.prompts import Given, Prompt, check_prompts, given_tokens, read_prompts

NAMES = ("prompt", "prompt_file", "infill")


def byte_ids(text: str) -> list[int]:
    """Of the byte tokenizer, one character at a time."""
    vocab = bytes_tokenizer().get_vocab()
    return [vocab["Ġ" if character == " " else character] for character in text]


@pytest.fixture
def ask(compose):
    """A config of mode=sample_eval that asks for something: ask(prompt="...")."""

    def build(*overrides, **keys):
        config = compose("mode=sample_eval", *overrides)
        for name, value in keys.items():
            assert name in NAMES
            config.sampling[name] = value
        return config

    return build


def read(config, length=64, tokenizer=None) -> list[Prompt]:
    """As a run does: the early check, then the tokens."""
    check_prompts(config, config.algo.name == "ar")
    return read_prompts(config, tokenizer or bytes_tokenizer(), length)


def write(folder, name: str, *lines: str) -> str:
    path = folder / name
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


# ---------------------------------------------------------------- text to tokens


def test_without_a_key_there_is_no_prompt(ask):
    assert read(ask()) == []


def test_a_prompt_is_its_tokens(ask):
    """No special tokens, whatever the tokenizer adds elsewhere."""
    assert read(ask(prompt="Once upon")) == [Prompt("Once upon", byte_ids("Once upon"))]


def test_an_empty_prompt_is_no_token(ask):
    assert read(ask(prompt="")) == [Prompt("", [])]


@pytest.mark.parametrize(
    ("template", "parts"),
    [
        ("The [MASK:3] sat", ["The ", 3, " sat"]),
        ("[MASK]", [1]),
        ("[MASK:2][MASK]x", [3, "x"]),
        ("a[MASK:12]", ["a", 12]),
        ("[MASK:4]. [MASK:02]!", [4, ". ", 2, "!"]),
        ("[MASK:] [mask] [MASK:1]", ["[MASK:] [mask] ", 1]),
    ],
)
def test_a_template_is_its_pieces_and_its_gaps(ask, template, parts):
    """[MASK] is one token, [MASK:12] is twelve; every other character stands."""
    expected = []
    for part in parts:
        expected += byte_ids(part) if isinstance(part, str) else [None] * part
    (prompt,) = read(ask(infill=template))
    assert prompt == Prompt(template, expected)


def test_published_tokenizers_read_prompts_as_always(ask, pretrained):
    tokenizer = AutoTokenizer.from_pretrained(pretrained)
    (prompt,) = read(ask(prompt="The cat sat down."), tokenizer=tokenizer)
    expected = tokenizer("The cat sat down.", add_special_tokens=False)["input_ids"]
    assert prompt.ids == expected


def test_the_blank_before_a_gap_belongs_to_the_gap(ask, pretrained):
    """Where blanks are part of the word after them: the text of the other tokens is
    what was given, and no blank is left over before the gap."""
    tokenizer = AutoTokenizer.from_pretrained(pretrained)
    (prompt,) = read(ask(infill="The [MASK:3] sat on [MASK:2]."), tokenizer=tokenizer)
    pieces = [
        tokenizer(text, add_special_tokens=False)["input_ids"]
        for text in ("The", " sat on", ".")
    ]
    expected = [*pieces[0], None, None, None, *pieces[1], None, None, *pieces[2]]
    assert prompt.ids == expected
    assert len(expected) == 1 + 3 + 2 + 2 + 1


def test_a_row_is_bos_then_the_prompt():
    """Known where there is a token; free in gaps and after the text."""
    prompts = [Prompt("", [7, None, 8]), Prompt("", []), Prompt("", [5, 5, 5, 5])]
    given = given_tokens(prompts, bos=3, length=5)
    known = [[1, 1, 0, 1, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 1]]
    assert given.known.long().tolist() == known
    tokens = given.tokens.masked_fill(~given.known, -1).tolist()
    assert tokens == [[3, 7, -1, 8, -1], [3, -1, -1, -1, -1], [3, 5, 5, 5, 5]]


def test_given_tokens_replace_what_stands_there(generator):
    known = torch.rand(3, 6, generator=generator) < 0.5
    given = Given(torch.full((3, 6), 9), known)
    x = torch.zeros(3, 6, dtype=torch.long)
    assert torch.equal(given.put(x), known.long() * 9)
    window = given.window(2, 3)
    assert torch.equal(window.known, known[:, 2:5])
    assert window.tokens.shape == (3, 3)


# ---------------------------------------------------------------- files


def test_lines_of_a_text_file_are_prompts(ask, tmp_path):
    """Empty lines are passed over; blanks at the ends of others stay."""
    path = write(tmp_path, "a.txt", "one", "", "   ", " two ", "[MASK:3] stays")
    texts = [prompt.text for prompt in read(ask(prompt_file=path))]
    assert texts == ["one", " two ", "[MASK:3] stays"]


def test_windows_line_ends_and_umlauts(ask, tmp_path):
    (tmp_path / "a.txt").write_bytes("eins\r\nzwölf\r\n".encode())
    prompts = read(ask(prompt_file=str(tmp_path / "a.txt")))
    assert [prompt.text for prompt in prompts] == ["eins", "zwölf"]
    assert bytes_tokenizer().decode(prompts[1].ids) == "zwölf"


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "[a].txt"])
def test_a_byte_order_mark_is_no_text(ask, tmp_path, name):
    line = '"ab"' if name.endswith("jsonl") else "ab"
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + f"{line}\r\n{line}\n".encode())
    prompts = read(ask(prompt_file=str(tmp_path / name)))
    assert [prompt.text for prompt in prompts] == ["ab", "ab"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_lines_of_a_json_file(ask, tmp_path, name):
    """A string, an object with a prompt, an object with a template."""
    entries = ["a\nb", {"prompt": "c", "id": 4}, {"infill": "d[MASK:2]"}]
    path = write(
        tmp_path, name, *map(json.dumps, entries[:2]), "", json.dumps(entries[2])
    )
    prompts = read(ask(prompt_file=path))
    assert [prompt.text for prompt in prompts] == ["a\nb", "c", "d[MASK:2]"]
    assert prompts[2].ids == [*byte_ids("d"), None, None]


def test_a_file_on_another_filesystem(ask):
    with fsspec.open("memory://prompts/a.txt", "wt") as file:
        file.write("far away\n")
    (prompt,) = read(ask(prompt_file="memory://prompts/a.txt"))
    assert prompt.text == "far away"


@pytest.mark.parametrize(
    "line", ["{", "3", "null", '["a"]', '{"text": "a"}', '{"prompt": 3}']
)
def test_a_broken_line_is_named(ask, tmp_path, line):
    path = write(tmp_path, "a.jsonl", '"fine"', "", line)
    call = partial(read, ask(prompt_file=path))
    refused(call, f"sampling.prompt_file={path!r}, line 3", "prompt", "infill")


def test_files_that_cannot_be_read_are_refused(ask, tmp_path):
    missing = str(tmp_path / "none.txt")
    refused(
        partial(read, ask(prompt_file=missing)),
        f"sampling.prompt_file={missing!r}",
        "no such file",
    )
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00\x81" * 9)
    binary = str(tmp_path / "binary.txt")
    refused(
        partial(read, ask(prompt_file=binary)),
        f"sampling.prompt_file={binary!r}",
        "not a text file",
    )
    empty = write(tmp_path, "empty.txt", "", "  ")
    refused(
        partial(read, ask(prompt_file=empty)),
        f"sampling.prompt_file={empty!r}",
        "no prompt",
    )


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("name", "text"), [("prompt", "a" * 8), ("infill", "ab[MASK:6]")]
)
def test_text_must_leave_room_for_bos(ask, name, text):
    """A sample of 9 tokens takes 8; one of 8 does not."""
    config = ask(**{name: text})
    (prompt,) = read(config, length=9)
    assert len(prompt.ids) == 8
    refused(
        partial(read, config, length=8),
        f"sampling.{name}={text!r}",
        "8 tokens",
        "room for 7",
        "model.length",
    )


def test_a_long_line_of_a_file_is_named(ask, tmp_path):
    path = write(tmp_path, "a.txt", "short", "b" * 30)
    refused(partial(read, ask(prompt_file=path), length=16), f"{path!r}, line 2", "30")


@pytest.mark.parametrize(
    ("name", "text"), [("prompt", "a [MASK] b"), ("prompt", "[MASK]")]
)
def test_the_mask_token_is_no_text(ask, name, text):
    """Of a tokenizer that has one; it would be filled in as if it were a gap."""
    for tokenizer in (bytes_tokenizer(), text8_tokenizer()):
        call = partial(read, ask(**{name: text}), tokenizer=tokenizer)
        refused(call, f"sampling.{name}={text!r}", "mask token", "sampling.infill")


def test_unknown_characters_are_refused(ask):
    call = partial(read, ask(prompt="a-b"), tokenizer=text8_tokenizer())
    refused(call, "sampling.prompt='a-b'", "does not know")
    call = partial(read, ask(infill="a[MASK:2]9"), tokenizer=text8_tokenizer())
    refused(call, "sampling.infill='a[MASK:2]9'", "does not know")


@pytest.mark.parametrize("text", ["no gap", "", "[MASK:x]", "[mask:3]"])
def test_a_template_needs_a_gap(ask, text):
    refused(partial(read, ask(infill=text)), f"sampling.infill={text!r}", "[MASK:12]")


def test_a_template_of_a_file_needs_a_gap(ask, tmp_path):
    path = write(tmp_path, "a.jsonl", '{"infill": "none"}')
    refused(partial(read, ask(prompt_file=path)), f"{path!r}, line 1='none'", "no gap")


def test_a_model_that_writes_left_to_right_fills_no_gaps(ask, tmp_path):
    call = partial(read, ask("algo=ar", infill="a [MASK:2]"))
    refused(call, "sampling.infill='a [MASK:2]'", "algo=ar", "sampling.prompt")
    path = write(tmp_path, "a.jsonl", '"fine"', '{"infill": "[MASK]"}')
    call = partial(read, ask("algo=ar", prompt_file=path))
    refused(call, f"sampling.prompt_file={path!r}, line 2", "algo=ar")
    (prompt,) = read(ask("algo=ar", prompt="a"))
    assert prompt.text == "a"


@pytest.mark.parametrize(
    "pair", [("prompt", "infill"), ("prompt", "prompt_file"), ("prompt_file", "infill")]
)
def test_of_the_three_keys_one_is_set(ask, pair):
    call = partial(read, ask(**dict.fromkeys(pair, "[MASK:2]")))
    refused(call, *(f"sampling.{name}" for name in pair), "one of them")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mode", ["train", "ppl_eval"])
def test_other_modes_start_from_nothing(ask, name, mode):
    """A prompt that would be ignored is refused."""
    call = partial(read, ask(f"mode={mode}", **{name: "a"}))
    refused(call, f"sampling.{name}", "mode=sample_eval", f"mode={mode}")
