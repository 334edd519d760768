"""The page of trajectories: small, escaped, and read back without trust."""

import base64
import hashlib
import json
import re

import numpy as np
import pytest
from tiny import compose

from data.tokenizers import bytes_tokenizer, text8_tokenizer
from report import trajectory
from report.page_paths import check_page_path
from report.trajectory import (
    END,
    START,
    TEMPLATE,
    Shown,
    pieces_of,
    read_page,
    write_page,
)
from report.view import view
from sampling.trajectory import Trajectory
from utils import ConfigError

HOSTILE = "</script><script>alert(1)</script><!-- & \x1b[2J \u202e \x00"


def sample(length: int = 4, steps: int = 2, ids: int = 3) -> Trajectory:
    rng = np.random.default_rng(0)
    return Trajectory(
        np.full(length, 0),
        np.arange(length) == 0,
        np.full(steps, length),
        np.tile(np.arange(length), steps),
        rng.integers(0, ids, length * steps),
        rng.integers(0, 256, length * steps).astype(np.uint8),
        np.full(steps, np.nan, np.float32),
    )


def run(title: str = "mdlm", pieces=("a", " the", "\n"), **changed) -> Shown:
    found = Shown(title, {"seed": "1"}, dict(enumerate(pieces)), [2], 2, None, [])
    return found._replace(samples=[sample(), sample()])._replace(**changed)


def saved(folder, *shown: Shown, name: str = "a.html") -> str:
    path = str(folder / name)
    write_page(path, shown)
    return path


def assert_same(one: Shown, other: Shown) -> None:
    assert one[:-1] == other[:-1]
    for a, b in zip(one.samples, other.samples, strict=True):
        for x, y in zip(a, b, strict=True):
            np.testing.assert_array_equal(x, y)


# ---------------------------------------------------------------- pages


def test_a_page_is_read_back_as_it_was(tmp_path):
    image = Shown("i", {}, {}, [], 256, 2, [sample(12, ids=257)])
    runs = [run(), run("duo", ("x", [0xE2, 0x82], "z"), mask=None), image]
    for one, other in zip(runs, read_page(saved(tmp_path, *runs)), strict=True):
        assert_same(one, other)


def test_text_of_a_page_is_escaped_and_readable(tmp_path):
    shown = run(HOSTILE, (HOSTILE, "\n", "<b>"), about={HOSTILE: HOSTILE})
    path = saved(tmp_path, shown)
    page = (tmp_path / "a.html").read_text()
    assert (
        page.count("<script")
        == page.count("</script>")
        == TEMPLATE.read_text().count("<script") + 1
    )
    assert "alert(1)</script>" not in page.replace("&lt;/script&gt;", "")
    assert "\x1b" not in page
    assert "\x00" not in page
    (other,) = read_page(path)
    assert other.pieces[0].startswith("</script><script>alert(1)")
    assert other.pieces[0].endswith("\\x1b[2J \\u202e \\x00")
    assert other.pieces[1] == "\n"
    assert "\u202e" not in other.title


def test_a_page_loads_nothing_and_runs_its_own_script_alone(tmp_path):
    saved(tmp_path, run())
    page = (tmp_path / "a.html").read_text()
    assert not re.findall(r"(?:src|href)=\"(?!data:)", page)
    assert "url(" not in page
    urls = set(re.findall(r"https?://[^\"' ]+", page))
    assert urls == {"http://www.w3.org/2000/svg"}  # the name of a language
    (policy,) = re.findall(
        r'http-equiv="Content-Security-Policy" content="(.*?)"', page
    )
    assert policy.startswith("default-src 'none';")
    for kind in ("script", "style"):
        (own,) = re.findall(rf"<{kind}>(.*?)</{kind}>", page, re.S)
        digest = base64.b64encode(hashlib.sha256(own.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy
    for way in ("innerHTML", "outerHTML", "document.write", "eval(", "insertAdjacent"):
        assert way not in page


def test_a_large_page_is_below_five_megabytes(tmp_path):
    """100 steps that change each of 1024 tokens."""
    pieces = {i: f" {i}" for i in range(50_257)}
    large = sample(1024, 100, ids=50_257)
    saved(tmp_path, run(pieces=())._replace(pieces=pieces, samples=[large]))
    assert (tmp_path / "a.html").stat().st_size < 5e6


# ---------------------------------------------------------------- pages of others


def altered(change) -> str:
    """A page whose data was changed by somebody."""
    page = TEMPLATE.read_text()
    one = {**trajectory._plain(run())}
    data = {"format": trajectory.FORMAT, "version": 1, "trajectories": [one]}
    change(data, one)
    return page.replace("%data%", f"{START}{json.dumps(data)}{END}")


CHANGES = {
    "format": lambda data, one: data.update(format="another"),
    "version": lambda data, one: data.update(version=2),
    "no runs": lambda data, one: data.update(trajectories=[]),
    "many runs": lambda data, one: data.update(trajectories=[one] * 9),
    "no list": lambda data, one: data.update(trajectories={"a": 1}),
    "no samples": lambda data, one: one.update(samples=[]),
    "samples": lambda data, one: one.update(samples=[{}]),
    "title": lambda data, one: one.update(title=5),
    "about": lambda data, one: one.update(about={"a": {}}),
    "pieces": lambda data, one: one.update(pieces={"0": "a"}),
    "no piece": lambda data, one: one.update(pieces={"0": "a", "1": 7, "2": "c"}),
    "bytes": lambda data, one: one.update(pieces={"0": [999], "1": "", "2": ""}),
    "ids": lambda data, one: one.update(pieces={"x": "a"}),
    "side": lambda data, one: one.update(side=-1),
    "no image": lambda data, one: one.update(side=2),
    "mask": lambda data, one: one.update(mask="2"),
    "missing": lambda data, one: one.pop("mask"),
    "deep": lambda data, one: one.update(title=deep()),
}


def deep(depth: int = 500) -> list:
    return [] if depth == 0 else [deep(depth - 1)]


@pytest.mark.parametrize("name", CHANGES)
def test_pages_that_do_not_fit_are_refused(tmp_path, name):
    (tmp_path / "a.html").write_text(altered(CHANGES[name]))
    with pytest.raises(ConfigError, match="is no page of sampling") as refused:
        read_page(str(tmp_path / "a.html"))
    assert len(str(refused.value)) < 500


@pytest.mark.parametrize(
    "content",
    [b"", b"<html></html>", b"\xff\xfe", START.encode(), (START * 2).encode()],
)
def test_other_files_are_refused(tmp_path, content):
    (tmp_path / "a.html").write_bytes(content)
    with pytest.raises(ConfigError, match="is no page of sampling"):
        read_page(str(tmp_path / "a.html"))


def test_data_of_others_is_written_again_by_us_alone(tmp_path):
    """Their script and what they have added stay behind."""
    page = altered(lambda data, one: one.update(more="evil"))
    (tmp_path / "a.html").write_text(page.replace('"use strict";', "evil();"))
    saved(tmp_path, *read_page(str(tmp_path / "a.html")), name="b.html")
    assert "evil" not in (tmp_path / "b.html").read_text()


def test_a_file_that_is_too_large_is_refused(tmp_path, monkeypatch):
    path = saved(tmp_path, run())
    monkeypatch.setattr(trajectory, "LARGEST", 100)
    with pytest.raises(ConfigError, match="more than 0 MiB"):
        read_page(path)


# ---------------------------------------------------------------- pieces


def test_pieces_of_bytes_are_text_or_bytes():
    tokenizer = bytes_tokenizer()
    ids = tokenizer("a b\né")["input_ids"] + [tokenizer.eos_token_id]
    found = pieces_of(tokenizer, ids)
    assert [found[i] for i in ids] == ["a", " ", "b", "\n", [0xC3], [0xA9], "[EOS]"]


def test_pieces_of_characters_are_these():
    tokenizer = text8_tokenizer()
    ids = tokenizer("a b")["input_ids"]
    assert [pieces_of(tokenizer, ids)[i] for i in ids] == ["a", " ", "b"]
    assert pieces_of(tokenizer, [4, 10**6]) == {4: "[MASK]", 10**6: "1000000"}


def test_pieces_of_published_tokenizers_join_as_the_text_does(pretrained):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(pretrained)
    text = "the unbelievable duality, of 3 things"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces = pieces_of(tokenizer, ids)
    assert "".join(pieces[i] for i in ids).strip().replace(" ,", ",") == text


# ---------------------------------------------------------------- paths and mode=view


@pytest.mark.parametrize("path", ["a.htm", "a", "a.html.json", 5])
def test_other_endings_are_refused(path):
    with pytest.raises(ConfigError, match=r"^key=.* does not end in \.html"):
        check_page_path(path, "key")


def test_nothing_is_overwritten(tmp_path):
    path = saved(tmp_path, run())
    with pytest.raises(ConfigError, match="exists; it is not overwritten"):
        check_page_path(path, "key")


def viewed(tmp_path, *paths):
    config = compose("mode=view")
    config.view.paths = list(paths)
    config.view.out = str(tmp_path / "new" / "out.html")
    return view(config)


def test_pages_stand_side_by_side(tmp_path, capsys):
    one, other = saved(tmp_path, run()), saved(tmp_path, run("duo"), name="b.html")
    assert viewed(tmp_path, one, f"named={other}") == {"runs": 2}
    assert "out.html" in capsys.readouterr().out
    runs = read_page(str(tmp_path / "new" / "out.html"))
    assert [x.title for x in runs] == ["mdlm", "named"]
    assert_same(runs[0], run())


@pytest.mark.parametrize(
    ("paths", "line"),
    [
        ([], "needs the pages"),
        ([5], "needs the pages"),
        ([""], "needs the pages"),
        (["no.html"], "there is no such file"),
        (["{}"] * 9, "a page shows 8 side by side"),
    ],
)
def test_mistakes_of_a_comparison_cost_one_line(tmp_path, paths, line):
    page = saved(tmp_path, run())
    paths = [x.format(page) if isinstance(x, str) else x for x in paths]
    with pytest.raises(ConfigError, match=line):
        viewed(tmp_path, *paths)


def test_pages_of_too_many_tokens_are_not_compared(tmp_path, monkeypatch):
    page = saved(tmp_path, run())
    monkeypatch.setattr("report.view.MOST_TOKENS", 10)
    with pytest.raises(ConfigError, match="more than 10 tokens"):
        viewed(tmp_path, page, page)
