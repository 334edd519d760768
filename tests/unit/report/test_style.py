"""How pictures look: one look a model, labels that do not collide, legends below."""

import itertools
from pathlib import Path

import pytest
from matplotlib import image

from report import style
from report.style import COLOURS, KNOWN, MARKERS, SAMPLERS, Look, looks


def grey(colour: str) -> float:
    """Luminance from 0 to 1."""
    red, green, blue = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    return 0.299 * red + 0.587 * green + 0.114 * blue


@pytest.mark.parametrize("name", ["Duo", "MDLM", "AR", "SEDD Absorb", "My method"])
@pytest.mark.parametrize("others", [(), ("x", "y"), ("Duo", "MDLM", "Duo+DCD")])
def test_a_look_does_not_depend_on_who_else_is_there(name, others):
    """Of a known model; of another one as long as its colour is free."""
    alone, together = looks([name])[name], looks([*others, name])[name]
    taken = {look.color for look in looks(others).values()}
    if name.casefold() in KNOWN or not others:
        assert together == alone
    else:
        assert together.color not in taken
    assert looks([name, *others]) == looks([*others, name])


def test_no_two_models_look_the_same():
    names = [*KNOWN, *(f"run {i}" for i in range(30))]
    assert len(set(looks(names).values())) == len(names)
    few = looks([f"run {i}" for i in range(len(COLOURS))])
    assert len({look.color for look in few.values()}) == len(COLOURS)
    assert len(looks(f"run {i}" for i in range(100))) == 100  # then they repeat


def test_names_of_the_command_line_mean_published_models():
    assert looks(["duo_base"])["duo_base"] == looks(["Duo"])["Duo"]
    both = looks(["duo", "duo_base"])
    assert both["duo"] == looks(["Duo"])["Duo"] != both["duo_base"]


def test_looks_differ_in_grey():
    """By their markers where their colours are about as dark; all show on white."""
    assert all(grey(colour) < 0.75 for colour in COLOURS)
    for together in (KNOWN, SAMPLERS):
        for a, b in itertools.combinations(together.values(), 2):
            assert a != b
            dark = [grey(COLOURS[x[0]]) for x in (a, b)]
            assert a[1] != b[1] or abs(dark[0] - dark[1]) > 0.08


# ---------------------------------------------------------------- figures

LOOK = Look(COLOURS[0], MARKERS[0])


@pytest.fixture
def figure():
    with style.drawing() as pyplot:
        made = pyplot.figure(figsize=(style.WIDTH, 4), layout="constrained")
        yield made
        pyplot.close(made)


@pytest.mark.parametrize(
    ("line", "lines"),
    [
        ("a; b; c", ["a; b; c"]),
        ("models; data set; judge: x", ["models; data set", "judge: x"]),
        ("many words that go on; x", ["many words that", "go on", "x"]),
        ("a" * 20, ["a" * 16, "a" * 4]),
        ("", []),
    ],
)
def test_titles_are_folded_at_semicolons_if_they_can_be(line, lines):
    assert style.folds(line, 16) == lines


def boxes(texts) -> list:
    return [text.get_window_extent().extents for text in texts]


def test_labels_do_not_collide(figure):
    """Not with one another, nor with points and bars; some may be left out."""
    (axes,) = style.panels(figure, 1)
    places = [(str(2**i), 1 + 0.01 * i, 2 + 0.01 * i) for i in range(12)]
    x, y = [p[1] for p in places], [p[2] for p in places]
    style.points(axes, x, y, LOOK, x_errors=[0.02] * 12, y_errors=[0.02] * 12)
    style.label_points(figure, axes, places)
    assert axes.texts
    found = boxes(axes.texts)
    for a, b in itertools.combinations(found, 2):
        assert not style._overlap(a, b)
    for box in found:
        for point in axes.transData.transform(list(zip(x, y, strict=True))):
            assert not style._overlap(box, (*point, *point))


def test_ticks_of_steps_do_not_collide(figure):
    axes = style.panels(figure, 2)[0]
    style.steps_axis(axes, [1, 2, 3, 4, 5, 6, 7, 8, 16, 64, 1000, 1024])
    figure.canvas.draw()
    labels = boxes(axes.get_xticklabels())
    assert len(labels) >= 5
    assert axes.get_xticks()[0] == 1024 or axes.get_xticks()[-1] == 1024
    for a, b in itertools.combinations(labels, 2):
        assert not style._overlap(a, b)


def test_a_single_number_of_steps_is_one_tick(figure):
    axes = style.panels(figure, 1)[0]
    style.steps_axis(axes, [8, 8])
    assert [text.get_text() for text in axes.get_xticklabels()] == ["8"]


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_the_legend_is_outside_of_the_data(figure, count):
    grid = style.panels(figure, count)
    names = ["_hidden", "$5", "a rather long name of some model, greedy tail", "Duo"]
    of = looks(names)
    for axes in grid:
        style.points(axes, [1, 2], [3, 4], LOOK, y_errors=[0.1, None])
    style.title(figure, "title", "models and data " * 12)
    style.legend(figure, of, [style.PAPER, style.HOLLOW, style.BARS])
    figure.canvas.draw()
    (legend,) = figure.legends
    texts = [text.get_text() for text in legend.get_texts()]
    assert [text.strip() for text in texts] == [
        *names,
        *(style.PAPER, style.HOLLOW, style.BARS),
    ]
    box = legend.get_window_extent().extents
    assert box[0] >= 0
    assert box[2] <= figure.bbox.width
    for axes in grid:
        assert not style._overlap(box, axes.get_tightbbox().extents)
    title = figure._suptitle.get_window_extent().extents
    assert title[0] >= 0
    assert title[2] <= figure.bbox.width


def test_bars_are_of_two_standard_errors(figure):
    (axes,) = style.panels(figure, 1)
    style.points(axes, [1], [3], LOOK, y_errors=[0.5])
    (bars,) = axes.containers[0].lines[2]
    assert bars.get_segments()[0][:, 1].tolist() == [2, 4]
    assert "2 standard errors" in style.BARS


@pytest.mark.parametrize(
    ("values", "scale"),
    [
        ([1, 10], "log"),
        ([3, 4], "linear"),
        ([0, 10], "linear"),
        ([], "linear"),
        ([1, float("nan")], "linear"),
    ],
)
def test_numbers_that_differ_much_are_logarithmic(figure, values, scale):
    (axes,) = style.panels(figure, 1)
    style.numbers_axis(axes, "y", values)
    assert axes.get_yscale() == scale


def test_every_picture_goes_through_the_style():
    """No other file of the project sets matplotlib up."""
    root = Path(__file__).parents[3]
    environments = {x.parent for x in root.glob("*/pyvenv.cfg")}
    folders = {x for x in root.iterdir() if x.is_dir()}
    folders -= environments | {root / "tests"}
    files = {*root.glob("*.py"), *(x for p in folders for x in p.rglob("*.py"))}
    drawing = {x for x in files if "matplotlib" in x.read_text()}
    assert drawing == {root / "report" / "style.py"}


FIGURES = ("report", "likelihood", "sweep", "training", "demo", "schedules", "operator")


@pytest.mark.parametrize("name", FIGURES)
def test_pictures_of_the_documentation_fit_a_narrow_page(name):
    """Small files, no wider than 8 inches at the resolution of all."""
    path = Path(__file__).parents[3] / "docs" / "figures" / f"{name}.png"
    assert path.stat().st_size < 150_000
    assert image.imread(path).shape[1] <= style.WIDTH * style.DPI


def test_both_files_are_written(tmp_path):
    with style.drawing() as pyplot:
        paths = style.save(pyplot.figure(), str(tmp_path / "a"))
        assert not pyplot.get_fignums()
    assert paths == [str(tmp_path / "a.png"), str(tmp_path / "a.pdf")]
    assert image.imread(paths[0]).shape[2] >= 3
    assert (tmp_path / "a.pdf").read_bytes().startswith(b"%PDF")
