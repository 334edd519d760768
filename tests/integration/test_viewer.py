"""The page of trajectories in a real browser; make test-browser."""

import re
import time
from pathlib import Path

import numpy as np
import pytest
from browser import DESKTOP, PHONE, reason_to_skip, running

from report.trajectory import Shown, read_page, write_page
from sampling.trajectory import NO_PROBABILITY, NOTHING, Trajectory

REASON = reason_to_skip()
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(REASON is not None, reason=str(REASON)),
]

MASK = 5
PIECES = {
    0: "a",
    1: "</script><b>&",
    2: "\n",
    3: [0xC3],
    4: [0xA9],
    MASK: "[MASK]",
    6: "[BOS]",
}


def trajectory(first, given, *steps, entropy=None) -> Trajectory:
    """Each step is a list of (position, token, code)."""
    changes = [x for step in steps for x in step]
    positions, tokens, codes = np.array(changes).reshape(-1, 3).T
    H = [float(i) for i in range(len(steps))] if entropy is None else entropy
    return Trajectory(
        np.array(first),
        np.array(given, bool),
        np.array([len(step) for step in steps]),
        positions,
        tokens,
        codes.astype(np.uint8),
        np.array(H, np.float32),
    )


MASKED = trajectory(
    [6, 0, *[MASK] * 5],
    [1, 1, 0, 0, 0, 0, 0],
    [(2, 0, 0), (3, 2, 16)],
    [],
    [(4, 1, 100), (2, MASK, NO_PROBABILITY)],
    [(2, 0, 254), (5, 3, 0), (6, 4, 0)],
    entropy=[1.0, np.nan, 2.0, 3.0],
)
WRITTEN = trajectory([6, NOTHING, NOTHING], [1, 0, 0], [(1, 0, 3)], [(2, 0, 4)])
IMAGE = trajectory(
    [256] * 12, [0] * 12, [(0, 255, 16), (4, 10, 16), (8, 0, 16)], [(1, 1, 9)]
)


def text(title: str, *samples: Trajectory) -> Shown:
    return Shown(title, {"seed": "1"}, PIECES, [MASK, 6], MASK, None, list(samples))


PAGES = {
    "one.html": [text("mdlm", MASKED, MASKED._replace(given=MASKED.given & False))],
    "two.html": [text("mdlm <i>", MASKED), text("ar", WRITTEN)],
    "image.html": [Shown("pixels", {}, {}, [], 256, 2, [IMAGE])],
}


def large(is_worst: bool) -> Shown:
    """100 steps of 1024 tokens: each is changed in each step, or once."""
    L, steps, rng = 1024, 100, np.random.default_rng(0)
    pieces = {i: f" t{i}" for i in range(50_258)}
    positions = np.tile(np.arange(L), steps) if is_worst else rng.permutation(L)
    one = Trajectory(
        np.full(L, 50_257),
        np.zeros(L, bool),
        np.diff(np.linspace(0, len(positions), steps + 1).astype(int)),
        positions,
        rng.integers(0, 50_257, len(positions)),
        np.zeros(len(positions), np.uint8),
        np.ones(steps, np.float32),
    )
    kept = {i: pieces[i] for i in one.ids()}
    return Shown("large", {}, kept, [], 50_257, None, [one])


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pages")
    for name, shown in PAGES.items():
        write_page(str(folder / name), shown)
    return folder


@pytest.fixture(scope="module")
def browser():
    with running() as found:
        yield found


@pytest.fixture
def visit(browser, folder):
    """Opens a page; in the end nothing was complained of, and nothing asked for."""
    contexts, complaints, asked = [], [], []

    def open_page(name: str, **options):
        context = browser.new_context(**({"viewport": DESKTOP} | options))
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        path = name if "/" in name else str(folder / name)
        page.goto(f"file://{path}")
        page.wait_for_selector("section.pane")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []
    assert [x for x in asked if not x.startswith(("file://", "data:"))] == []


def classes(page, pane: int = 0) -> list[str]:
    return page.evaluate(
        "pane => [...document.querySelectorAll('.tokens')[pane].children]"
        ".map(x => x.className)",
        pane,
    )


def letters(page, pane: int = 0) -> list[str]:
    return page.evaluate(
        "pane => [...document.querySelectorAll('.tokens')[pane].children]"
        ".map(x => x.textContent)",
        pane,
    )


def where(page) -> str:
    return page.inner_text("#where")


def slide(page, step: int) -> None:
    page.fill("#step", str(step))


# ---------------------------------------------------------------- one run


def test_the_slider_shows_the_state_of_each_step(visit):
    page = visit("one.html")
    assert where(page) == "start, 4 steps"
    assert classes(page) == ["given name", "given", *["kept noise mask"] * 5]
    slide(page, 1)
    new = ["changed", "changed", *["kept noise mask"] * 3]
    assert classes(page)[2:] == new
    assert letters(page)[:4] == ["[BOS]", "a", "a", "↵\n"]
    slide(page, 3)
    assert classes(page)[2:5] == ["changed noise mask", "kept", "changed"]
    assert letters(page)[4] == "</script><b>&"
    slide(page, 4)
    assert letters(page)[5:] == ["", "é"]  # two bytes, one letter
    slide(page, 0)
    assert classes(page)[2:] == ["kept noise mask"] * 5
    assert page.inner_text(".pane p:nth-of-type(2)") == "the start"
    assert page.locator("b, i").count() == 0


def test_states_differ_in_more_than_colour(visit):
    page = visit("one.html")
    slide(page, 3)
    seen = page.evaluate(
        "[...document.querySelectorAll('.tokens span')].map(x => {"
        "const s = getComputedStyle(x);"
        "return [x.className, s.backgroundColor, s.borderBottomStyle +"
        " s.borderBottomWidth + s.borderBottomColor + s.fontWeight + s.fontStyle]})"
    )
    kinds = {name.split()[0] + ("noise" in name) * "noise": x for name, *x in seen}
    assert kinds.keys() == {"given", "kept", "changed", "changednoise", "keptnoise"}
    assert len({colour for colour, _ in kinds.values()}) >= 4
    assert len({shape for _, shape in kinds.values()}) == 5
    labels = page.locator("#legend li").all_inner_texts()
    assert [x.split("ab")[1].strip() for x in labels] == [
        "noise or mask",
        "changed in this step",
        "made noise again in this step",
        "unchanged",
        "given by the prompt",
    ]


def test_pointing_tells_probability_and_last_change(visit):
    page = visit("one.html")
    slide(page, 4)
    tokens, details = page.locator(".tokens span"), page.locator(".details")
    said = {
        1: "position 2 of 7 “a”: given by the prompt",
        2: "“a”: last changed in step 4 of 4, when the model gave it 0.0017\xa0% or",
        3: "“↵”: last changed in step 1 of 4, when the model gave it 50\xa0%",
        4: "“</script><b>&”: last changed in step 3 of 4, when the model gave it 1.3",
    }
    for index, text_of in said.items():
        tokens.nth(index).hover()
        assert text_of in details.inner_text()
        assert tokens.nth(index).get_attribute("class").endswith("cursor")
    slide(page, 3)
    tokens.nth(2).hover()
    assert "mask, last changed in step 3 of 4" in details.inner_text()


def test_it_plays_to_the_end_and_can_be_stopped(visit):
    page = visit("one.html")
    page.select_option("#speed", "4")
    page.click("#play")
    assert page.inner_text("#play") == "Pause"
    page.locator("#where", has_text="step 4 of 4").wait_for()
    page.locator("#play", has_text="Play").wait_for()
    page.select_option("#speed", "0.25")
    page.click("#play")  # from the start again
    assert where(page) == "start, 4 steps"
    page.click("#play")
    assert page.get_attribute("#play", "aria-pressed") == "false"


def test_another_sample_of_the_same_run(visit):
    page = visit("one.html")
    page.select_option("#sample", label="2")
    assert classes(page)[:2] == ["kept noise name", "kept noise"]  # nothing is given
    assert page.locator("#sample option").count() == 2


def test_the_keyboard_does_all(visit):
    page = visit("one.html")
    for key, step in (("ArrowRight", "step 1 of 4"), ("End", "step 4 of 4")):
        page.keyboard.press(key)
        assert where(page) == step
    page.keyboard.press("ArrowLeft")
    assert where(page) == "step 3 of 4"
    page.keyboard.press("Home")
    assert where(page) == "start, 4 steps"
    page.keyboard.press("Space")
    assert page.inner_text("#play") == "Pause"
    page.keyboard.press("Space")
    assert page.inner_text("#play") == "Play"
    page.focus("#step")
    page.keyboard.press("End")
    assert where(page) == "step 4 of 4"
    page.keyboard.press("Home")
    for _ in range(3):  # sample, speed, tokens
        page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "tokens"
    page.keyboard.press("ArrowRight")
    assert "position 2 of 7" in page.inner_text(".details")
    assert where(page) == "start, 4 steps"
    page.keyboard.press("ArrowDown")
    assert where(page) == "step 1 of 4"
    assert "position 2 of 7" in page.inner_text(".details")


def test_a_screen_reader_is_told(visit):
    page = visit("one.html")
    page.keyboard.press("ArrowRight")
    said = page.locator("#said")
    assert said.get_attribute("aria-live") == "polite"
    line = "the sample: 2 of 7 tokens changed, entropy of its predictions 1.00 nats"
    assert said.inner_text() == f"step 1 of 4. {line}"
    assert page.get_attribute("#step", "aria-valuetext") == "step 1 of 4"
    assert line in page.get_attribute("#chart svg", "aria-label")
    names = page.evaluate(
        "[...document.querySelectorAll('button, input, select, [tabindex]')]"
        ".map(x => x.getAttribute('aria-label') || x.textContent ||"
        " (x.labels && x.labels[0].textContent))"
    )
    assert all(names)
    assert page.get_attribute("html", "lang") == "en"


def test_the_chart_leads_to_a_step(visit):
    page = visit("one.html")
    assert page.locator("#chart path.data").count() == 2
    box = page.locator("#chart svg").bounding_box()
    page.mouse.click(box["x"] + box["width"] - 9, box["y"] + 40)
    assert where(page) == "step 4 of 4"
    x = page.get_attribute("#chart line.now", "x1")
    assert abs(float(x) - (box["width"] - 8)) < 2


# ---------------------------------------------------------------- several


def test_runs_stand_side_by_side_at_the_same_share_of_their_steps(visit):
    page = visit("two.html")
    titles = page.locator("section.pane h2").all_inner_texts()
    assert [x.split(None, 1) for x in titles] == [["A", "mdlm <i>"], ["B", "ar"]]
    left, right = (x.bounding_box() for x in page.locator("section.pane").all())
    assert left["y"] == right["y"]
    assert classes(page, 1) == ["given name", "empty", "empty"]
    slide(page, 2)
    assert classes(page, 1) == ["given name", "changed", "empty"]
    assert "its step 1 of 2" in page.locator("section.pane").nth(1).inner_text()
    slide(page, 4)
    assert letters(page, 1) == ["[BOS]", "a", "a"]
    assert classes(page, 0)[2] == "changed"
    assert page.locator("#chart path.data").count() == 4
    dashes = page.evaluate(
        "[...document.querySelectorAll('#chart path.data')]"
        ".map(x => getComputedStyle(x).strokeDasharray)"
    )
    assert len(set(dashes)) == 2


def test_a_page_that_was_read_and_written_is_the_same(visit, folder, tmp_path):
    again = tmp_path / "again.html"
    shown = read_page(str(folder / "one.html")) + read_page(str(folder / "two.html"))
    write_page(str(again), shown)
    page = visit(str(again))
    assert page.locator("section.pane").count() == 3
    slide(page, 4)
    assert letters(page, 0) == letters(page, 1)


# ---------------------------------------------------------------- images


def test_images_come_to_be_step_by_step(visit):
    page = visit("image.html")
    pixels = (
        "() => { const copy = document.createElement('canvas').getContext('2d',"
        " { willReadFrequently: true });"
        " copy.drawImage(document.querySelector('canvas'), 0, 0);"
        " return [...copy.getImageData(0, 0, 2, 2).data]; }"
    )
    assert page.evaluate(pixels) == [128, 128, 128, 255] * 4
    slide(page, 1)
    assert page.evaluate(pixels)[:8] == [255, 10, 0, 255, 128, 128, 128, 255]
    states = page.evaluate(pixels.replace("('canvas'),", "('figure + figure canvas'),"))
    assert len({tuple(states[i : i + 3]) for i in range(0, 16, 4)}) >= 2
    page.focus("canvas")
    said = page.inner_text(".details")
    assert "row 1, column 1: red 255 (last changed in step 1 of 2" in said
    page.keyboard.press("ArrowRight")
    assert "row 1, column 2: red (mask" in page.inner_text(".details")


# ---------------------------------------------------------------- sizes, colours


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_needs_no_scrolling_sideways(visit, name, scheme):
    page = visit(name, viewport=PHONE, color_scheme=scheme, has_touch=True)
    slide(page, 1)
    widths = "[document.documentElement.scrollWidth, innerWidth]"
    assert page.evaluate(widths) == [390, 390]
    if name == "two.html":
        above, below = (x.bounding_box() for x in page.locator("section.pane").all())
        assert below["y"] > above["y"] + above["height"]
        page.locator(".tokens span").first.tap()
        assert "given by the prompt" in page.locator(".details").first.inner_text()


CONTRAST = """() => {
  const light = (text) => {
    const [r, g, b] = text.match(/[\\d.]+/g).map(x => x / 255)
      .map(x => x <= 0.03928 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (x) => {
    for (; x; x = x.parentElement) {
      const colour = getComputedStyle(x).backgroundColor;
      if (!/rgba.*, 0\\)$/.test(colour)) return colour;
    }
    return 'rgb(255, 255, 255)';
  };
  return [...document.querySelectorAll('.tokens span:not(.mask), .swatch, p, h1, h2')]
    .filter(x => x.textContent).map(x => {
      const [a, b] = [light(getComputedStyle(x).color), light(behind(x))];
      return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    });
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_letters_are_read_on_what_is_behind_them(visit, scheme):
    """At least 4.5 : 1 in brightness, as WCAG 2.2 has it."""
    page = visit("one.html", color_scheme=scheme)
    slide(page, 3)
    assert min(page.evaluate(CONTRAST)) >= 4.5
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (int(re.findall(r"\d+", background)[0]) < 128) == (scheme == "dark")


@pytest.mark.parametrize("is_worst", [False, True])
def test_a_hundred_steps_of_1024_tokens(visit, tmp_path, is_worst, record_property):
    """The numbers of docs/viewer.md: `--junitxml=FILE` keeps them."""
    path = tmp_path / "large.html"
    write_page(str(path), [large(is_worst)])
    size = path.stat().st_size / 1e6
    start = time.perf_counter()
    page = visit(str(path))
    seconds = time.perf_counter() - start
    slide(page, 100)
    steps = page.evaluate(
        "() => { const start = performance.now();"
        " for (let i = 0; i <= 100; i++) go(i);"
        " return (performance.now() - start) / 101; }"
    )
    record_property("MB", round(size, 2))
    record_property("seconds", round(seconds, 2))
    record_property("ms a step", round(steps, 1))
    assert size < 5
    assert seconds < 2
