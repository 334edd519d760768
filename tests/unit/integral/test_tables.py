"""Tables of the operator: what is written and read, what is refused, the command.

A file from elsewhere is only ever data: every attempt to have code run is shown to work
on an ordinary `pickle.load` before it is shown to fail here.
"""

import io
import os
import pickle
import pickletools
import random
import re
import struct
import subprocess
import sys
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from numpy._core import multiarray
from refusals import refused

from integral import __main__ as command
from integral.tables import (
    Interpolated,
    Nearest,
    Table,
    build_table,
    read_table,
    write_table,
)
from integral.transform import GammaRange, Spectral, quadrature, suggest_gammas

ROOT = Path(__file__).parents[3]
KEY = "algo.curriculum.integral_cache_path"
WIDE = GammaRange(-5.0, -1.0)
DEFAULT = GammaRange(-3.5, -1.75)


@pytest.fixture(scope="module")
def table() -> Table:
    return build_table(35, WIDE, 101)


def save(path: Path, content: object) -> str:
    """Bytes as they are, anything else pickled; gives the path."""
    raw = content if isinstance(content, bytes) else pickle.dumps(content)
    path.write_bytes(raw)
    return str(path)


def npz(**content: object) -> bytes:
    file = io.BytesIO()
    np.savez(file, **content)
    return file.getvalue()


def same(ours: Table, theirs: Table) -> bool:
    """Equal to the last bit."""
    assert [ours.pt.dtype, ours.grad_pt.dtype] == [np.float64] * 2
    return all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))


# ---------------------------------------------------------------- tables


def test_table_holds_the_operator():
    table = build_table(50257, WIDE, 1001)
    P, dP = quadrature(np.linspace(-5, -1, 1001), 50257)
    np.testing.assert_allclose(table.pt, P, rtol=0, atol=1e-13)
    np.testing.assert_allclose(table.grad_pt, dP, rtol=0, atol=1e-11)
    assert table[:4] == (50257, -5.0, -1.0, 1001)
    np.testing.assert_array_equal(table.grid(), np.linspace(-5, -1, 1001))


@pytest.mark.parametrize("rows", [slice(0, 40), slice(40, 101), slice(7, 7)])
def test_rows_of_a_table(table, rows):
    part = build_table(35, WIDE, 101, rows)
    assert part.num_points == 101
    assert np.array_equal(part.pt, table.pt[rows])
    assert np.array_equal(part.grad_pt, table.grad_pt[rows])


def test_round_trip(table, tmp_path):
    path = tmp_path / "new" / "folder" / "a.npz"
    write_table(path, table)
    assert [*path.parent.iterdir()] == [path]
    assert same(read_table(str(path), KEY), table)


def test_failed_write_leaves_the_old_table(table, tmp_path, monkeypatch):
    path = tmp_path / "a.npz"
    write_table(path, table)

    def full(file, **content) -> None:
        file.write(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(OSError, match="no space"):
        write_table(path, table._replace(pt=table.grad_pt))
    assert same(read_table(str(path), KEY), table)


@pytest.mark.parametrize(
    "protocol",
    [
        3,
        4,
        5,  # what Python 3.14 writes
    ],
)
def test_published_pickle(table, tmp_path, protocol):
    """A dict of plain numbers and two arrays; further keys do not matter."""
    content = table._asdict() | {"gamma_min": -5, "gamma_max": -1, "note": "x"}
    path = save(tmp_path / "a.pkl", pickle.dumps(content, protocol))
    assert same(read_table(path, KEY), table)


def test_pickle_from_older_numpy(table, tmp_path):
    """Before numpy 2 the module was numpy.core; numpy scalars count as numbers."""
    content = table._asdict() | {
        "vocab_size": np.int64(35),
        "gamma_min": np.float64(-5.0),
    }
    raw = pickle.dumps(content, 3)
    old = raw.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")
    names = {arg for op, arg, _ in pickletools.genops(old) if op.name == "GLOBAL"}
    expected = {"numpy.core.multiarray _reconstruct", "numpy.core.multiarray scalar"}
    assert expected <= names
    assert same(read_table(save(tmp_path / "a.pkl", old), KEY), table)


@pytest.mark.parametrize("dtype", [np.float32, ">f8"])
def test_other_types_of_float(table, tmp_path, dtype):
    values = {name: getattr(table, name).astype(dtype) for name in ("pt", "grad_pt")}
    expected = table._replace(**{k: v.astype(np.float64) for k, v in values.items()})
    content = table._asdict() | values
    for name, raw in {"a.pkl": content, "a.npz": npz(**content)}.items():
        assert same(read_table(save(tmp_path / name, raw), KEY), expected)


@pytest.mark.parametrize("suffix", ["pkl", "npz"])
def test_remote_path(table, suffix):
    path = f"memory://test_integral_tables/a.{suffix}"
    content = table._asdict()
    raw = pickle.dumps(content) if suffix == "pkl" else npz(**content)
    with fsspec.open(path, "wb") as file:
        file.write(raw)
    try:
        assert same(read_table(path, KEY), table)
        missing = path.replace("/a.", "/b.")
        refused(lambda: read_table(missing, KEY), f"{KEY}='{missing}'", "no such file")
    finally:
        fsspec.filesystem("memory").rm("/test_integral_tables", recursive=True)


# ---------------------------------------------------------------- between the points


@pytest.mark.parametrize("vocab_size", [35, 50258])
@pytest.mark.parametrize(
    ("num_points", "error", "slope_error"),
    [(100_000, 1e-12, 1e-9), (1000, 1e-10, 1e-6), (100, 1e-6, 1e-4)],
)
def test_cubic_through_the_points(vocab_size, num_points, error, slope_error):
    t = torch.linspace(0, 1, 1777, dtype=torch.float64)[:, None]
    operator = Interpolated(build_table(vocab_size, WIDE, num_points), DEFAULT, KEY)
    alpha, dalpha = Spectral(vocab_size, DEFAULT)(t)
    ours = operator(t)
    torch.testing.assert_close(ours.alpha_t, alpha, rtol=0, atol=error)
    torch.testing.assert_close(ours.dalpha_t, dalpha, rtol=0, atol=slope_error)
    single = operator(t[5].float())
    assert [value.dtype for value in single] == [torch.float32] * 2
    torch.testing.assert_close(single.alpha_t, alpha[5].float(), rtol=0, atol=1e-5)


def test_cubic_uses_the_numbers_of_the_table(table):
    """Values and slopes alike: those of another curve, 1 - gamma^2 / 100."""
    gamma = table.grid()
    parabola = table._replace(pt=1 - gamma**2 / 100, grad_pt=-gamma / 50)
    t = torch.linspace(0, 1, 333, dtype=torch.float64)
    alpha, dalpha = Interpolated(parabola, DEFAULT, KEY)(t)
    g = DEFAULT.gamma(t)
    torch.testing.assert_close(alpha, (35 * (1 - g**2 / 100) - 1) / 34)
    torch.testing.assert_close(
        dalpha, 35 / 34 * (-g / 50) * (DEFAULT.high - DEFAULT.low)
    )


@pytest.mark.parametrize("ends", [(-5.01, -1.0), (-5.0, -0.99)])
def test_cubic_stays_in_the_table(table, ends):
    gammas = GammaRange(*ends)
    refused(lambda: Interpolated(table, gammas, "the key"), "the key", *map(str, ends))
    whole = Interpolated(table, WIDE, KEY)
    ends = whole(torch.tensor([0.0, 1.0], dtype=torch.float64)).alpha_t
    np.testing.assert_allclose(ends, (35 * table.pt[[0, -1]] - 1) / 34, rtol=1e-14)


# ---------------------------------------------------------------- the published look-up


def looked_up(table: Table, gamma: float) -> float:
    """alpha of the nearest entry, by the definition."""
    gamma = min(max(gamma, table.gamma_min), table.gamma_max)
    place = (gamma - table.gamma_min) / (table.gamma_max - table.gamma_min)
    distances = abs(np.arange(table.num_points) - place * (table.num_points - 1))
    K = table.vocab_size
    return (K * table.pt[distances.argmin()] - 1) / (K - 1)


@pytest.mark.parametrize(("num_points", "gammas"), [(101, DEFAULT), (3001, DEFAULT)])
def test_nearest_entry(num_points, gammas, generator):
    """Away from the middle between two entries, where float32 may round either way."""
    table = build_table(35, WIDE, num_points)
    t = torch.rand(2000, generator=generator, dtype=torch.float64)
    width = (WIDE.high - WIDE.low) / (num_points - 1)
    gamma = gammas.gamma(t)
    both = torch.stack([gamma, gamma + 1e-3])
    t = t[((((both - WIDE.low) / width) % 1 - 0.5).abs() > 2e-2).all(0)]
    alpha_t, dalpha_t = Nearest(table, gammas)(t)
    gamma = gammas.gamma(t).tolist()
    alpha = np.array([looked_up(table, g) for g in gamma])
    later = np.array([looked_up(table, g + 1e-3) for g in gamma])
    np.testing.assert_allclose(alpha_t, alpha, rtol=0, atol=0)
    slope = (later - alpha) / 1e-3 * (gammas.high - gammas.low)
    np.testing.assert_allclose(dalpha_t, slope, rtol=1e-9, atol=0)
    if num_points == 101:  # entries 0.04 apart: mostly no slope at all
        assert float((dalpha_t == 0).double().mean()) > 0.9


def test_nearest_entry_clips(table):
    """Beyond the table it repeats the end, without a word and without a slope."""
    gammas = GammaRange(-7.0, 1.0)
    t = torch.tensor([[0.0], [0.1], [0.9], [1.0]], dtype=torch.float64)
    alpha_t, dalpha_t = Nearest(table, gammas)(t)
    assert alpha_t.shape == dalpha_t.shape == t.shape
    ends = (35 * table.pt[[0, 0, -1, -1]] - 1) / 34
    assert alpha_t[:, 0].tolist() == ends.tolist()
    assert dalpha_t.tolist() == [[0.0]] * 4


def test_slope_of_a_large_table_is_nearly_right():
    """The difference over 0.001 of gamma: off by a part in 1000, as published."""
    operator = Nearest(build_table(50257, WIDE, 100_000), DEFAULT)
    t = torch.linspace(0.05, 0.95, 99, dtype=torch.float64)
    exact = Spectral(50257, DEFAULT)(t).dalpha_t
    error = (operator(t).dalpha_t / exact - 1).abs()
    assert 1e-4 < float(error.median()) < 1e-2


# ---------------------------------------------------------------- files of other kinds


def broken(table: Table) -> dict[str, object]:
    """Contents that a reader could stumble over; bytes are a whole file."""
    good = table._asdict()
    contents: dict[str, object] = {
        "empty": b"",
        "text": b"gamma,pt\n-5,1\n",
        "binary": bytes(range(256)) * 40,
    }
    changes = {
        "one value less": {"pt": table.pt[:-1]},
        "one slope more": {"grad_pt": np.append(table.grad_pt, 0)},
        "two axes": {"pt": table.pt[None]},
        "no values": {"pt": table.pt[:0], "grad_pt": table.pt[:0], "num_points": 0},
        "one point": {"pt": table.pt[:1], "grad_pt": table.pt[:1], "num_points": 1},
        "wrong num_points": {"num_points": 100},
        "a number for values": {"pt": 0.5},
        "nan": {"pt": np.where(np.arange(101) == 50, np.nan, table.pt)},
        "inf": {"grad_pt": np.where(np.arange(101) == 50, np.inf, table.grad_pt)},
        "vocabulary of one": {"vocab_size": 1},
        "empty range": {"gamma_max": -5.0},
        "range of nan": {"gamma_min": float("nan")},
        "words": {"vocab_size": "many"},
        "none": {"gamma_min": None},
        "an array for a number": {"gamma_min": table.pt},
    }
    for name, change in changes.items():
        contents[name] = good | change
        if name != "none":  # npz would pickle it
            contents[f"{name} in npz"] = npz(**(good | change))
    for name, raw in {"pkl": pickle.dumps(good), "npz": npz(**good)}.items():
        for part in (0.02, 0.3, 0.6, 0.95, 1 - 1.5 / len(raw)):
            contents[f"{part:.2f} of {name}"] = raw[: int(part * len(raw))]
    return contents


BROKEN = broken(build_table(35, WIDE, 101))


@pytest.mark.parametrize("name", BROKEN)
def test_broken_file(tmp_path, name):
    path = save(tmp_path / "a.pkl", BROKEN[name])
    refused(lambda: read_table(path, KEY), f"{KEY}='{path}'", "no table")


@pytest.mark.parametrize("suffix", ["pkl", "npz"])
@pytest.mark.parametrize("field", Table._fields)
def test_table_without_a_field(table, tmp_path, field, suffix):
    """The line says what a table holds."""
    less = table._asdict()
    del less[field]
    path = save(tmp_path / "a.pkl", less if suffix == "pkl" else npz(**less))
    refused(lambda: read_table(path, KEY), f"{KEY}='{path}'", *Table._fields)


@pytest.mark.parametrize("content", [[1, 2, 3], 7, "x" * 9, np.zeros(9)])
def test_pickle_of_something_else(tmp_path, content):
    path = save(tmp_path / "a.pkl", content)
    refused(lambda: read_table(path, KEY), f"{KEY}='{path}'", *Table._fields)


@pytest.mark.parametrize("end", ["gamma_min", "gamma_max"])
def test_infinite_range(table, tmp_path, end):
    infinite = {"gamma_min": -np.inf, "gamma_max": np.inf}[end]
    path = save(tmp_path / "a.pkl", table._asdict() | {end: infinite})
    refused(lambda: read_table(path, KEY), path, "no table")


def test_paths_without_a_file(tmp_path):
    for path in (str(tmp_path / "none.npz"), str(tmp_path / "no" / "a.pkl")):
        refused(lambda path=path: read_table(path, KEY), f"{KEY}='{path}'", "null")
    refused(lambda: read_table(str(tmp_path), KEY), f"{KEY}='{tmp_path}'", "no table")


def test_path_of_unknown_protocol():
    refused(lambda: read_table("what://a.npz", KEY), f"{KEY}='what://a.npz'")


# ---------------------------------------------------------------- files that attack


class Call:
    """Unpickling it calls a function, then gives the result a state, if any."""

    def __init__(self, function: object, *args: object, state: object = None) -> None:
        self.call = (function, args) if state is None else (function, args, state)

    def __reduce__(self) -> tuple:
        return self.call


def attacks(table: Table, marker: Path) -> dict[str, bytes]:
    """Files that make `marker` when an ordinary unpickler reads them."""
    shell, python = f"touch {marker}", f"open({str(marker)!r}, 'w').close()"
    good = table._asdict()
    objects = np.empty(101, dtype=object)
    objects[:] = 0.5
    objects[7] = Call(os.system, shell)
    contents = {
        "os.system": Call(os.system, shell),
        "eval": Call(eval, python),
        "exec": Call(exec, python),
        "subprocess": Call(subprocess.call, ["touch", str(marker)]),
        "numpy.save": Call(np.save, str(marker), 1),
        "numpy.memmap": Call(np.memmap, str(marker), "u1", "w+", 0, (1,)),
        "a method of an array": Call(np.ndarray.tofile, table.pt, str(marker)),
        "inside the dict": good | {"note": [{"deep": Call(os.system, shell)}]},
        "in place of a number": good | {"vocab_size": Call(eval, f"{python} or 35")},
        "as a key": {**good, Call(eval, f"{python} or 'x'"): 1},
        "array of objects": good | {"pt": objects},
        "arguments of an array": Call(np.dtype, Call(eval, f"{python} or 'f8'")),
    }
    raw = {name: pickle.dumps(content) for name, content in contents.items()}
    raw["os.system by hand"] = f"cos\nsystem\n(S'{shell}'\ntR.".encode()
    raw["os.system as an instance"] = f"(S'{shell}'\nios\nsystem\n.".encode()
    raw["eval, old protocol"] = pickle.dumps(contents["eval"], 0)
    raw["a good table first"] = (
        pickle.dumps(good)[:-1] + b"0" + raw["os.system by hand"]
    )
    return raw


ATTACKS = sorted(attacks(build_table(35, WIDE, 101), Path("/tmp/none")))


@pytest.mark.parametrize("name", ATTACKS)
def test_no_code_runs(table, tmp_path, name):
    marker = tmp_path / "marker.npy"
    raw = attacks(table, marker)[name]
    pickle.loads(raw)
    assert marker.exists(), "an attack that does nothing shows nothing"
    marker.unlink()
    path = save(tmp_path / "a.pkl", raw)
    refused(lambda: read_table(path, KEY), f"{KEY}='{path}'", "no table")
    assert not marker.exists()


@pytest.mark.parametrize("field", ["pt", "grad_pt", "gamma_min", "vocab_size"])
def test_no_code_runs_from_npz(table, tmp_path, field):
    marker = tmp_path / "marker"
    evil = np.array([Call(os.system, f"touch {marker}")], dtype=object)
    path = save(tmp_path / "a.npz", npz(**(table._asdict() | {field: evil})))
    np.load(path, allow_pickle=True)[field]
    assert marker.exists()
    marker.unlink()
    refused(lambda: read_table(path, KEY), f"{KEY}='{path}'", "no table")
    assert not marker.exists()


class Witness:
    """Its `__float__` is code that must not run."""

    ran = 0

    def __float__(self) -> float:
        type(self).ran += 1
        return 0.5


def as_objects(addresses: bytes) -> Call:
    """The buffer of an array of objects."""
    return Call(np.ndarray, (2,), "O", addresses)


def behind_flags(addresses: bytes) -> Call:
    """The state of an array whose dtype is 'O' but says that it holds no objects."""
    dtype = Call(np.dtype, "O", False, True, state=(3, "|", None, None, None, 8, 8, 0))
    state = (1, (2,), dtype, False, addresses)
    return Call(multiarray._reconstruct, np.ndarray, (0,), b"b", state=state)


@pytest.mark.parametrize("forged", [as_objects, behind_flags])
def test_bytes_are_never_addresses(table, tmp_path, forged):
    """Here the address is that of a live object; elsewhere it is a crash, or worse."""
    witness = Witness()
    alive = [witness] * 100  # whatever numpy does to the count of references
    Witness.ran = 0
    values = forged(struct.pack("P", id(witness)) * 2)
    content = table._asdict() | {"num_points": 2, "grad_pt": table.pt[:2], "pt": values}
    path = save(tmp_path / "a.pkl", content)
    try:
        refused(lambda: read_table(path, KEY), path, "no table")
    finally:
        assert not Witness.ran, f"code ran, of which there are {len(alive)} references"


def test_numpy_stays_as_it_was(tmp_path, monkeypatch):
    """Else arrays that this process pickles later name another module."""
    name = "__module__"
    monkeypatch.setattr(multiarray._reconstruct, name, "numpy._core.multiarray")
    raw = b"cnumpy._core.multiarray\n_reconstruct\n(N(S'__module__'\nS'os'\ndtb."
    path = save(tmp_path / "a.pkl", raw)
    refused(lambda: read_table(path, KEY), path, "no table")
    assert getattr(multiarray._reconstruct, name) == "numpy._core.multiarray"


# ---------------------------------------------------------------- the command


def run(*args: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *args], cwd=ROOT, capture_output=True, text=True
    )


def failure(capsys, *args: str) -> str:
    """The one line on stderr of a command that ends with status 2."""
    with pytest.raises(SystemExit) as stop:
        command.main(args)
    out, err = capsys.readouterr()
    assert stop.value.code == 2
    assert out == ""
    assert re.fullmatch(r"error: [^\n]+\n", err)
    return err


def test_command_writes_a_table(tmp_path):
    done = run(
        "utils.py", "--vocab_size=11", "--log10_num_points=3", f"--folder={tmp_path}"
    )
    assert (done.returncode, done.stderr) == (0, "")
    path = tmp_path / "vocab_11.npz"
    assert f"algo.curriculum.integral_cache_path={path}\n" in done.stdout
    assert [*tmp_path.iterdir()] == [path]
    assert same(read_table(str(path), KEY), build_table(11, WIDE, 1000))


def test_command_says_what_is_wrong():
    done = run("-m", "integral", "--vocab_size=1")
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"error: --vocab_size=1 [^\n]+\n", done.stderr)


@pytest.mark.parametrize(
    ("args", "part"),
    [
        ([], "--vocab_size"),
        (["--vocab_size=x"], "'x'"),
        (["--vocab_size=0"], "--vocab_size=0"),
        (["--vocab_size=9", "--tokenizer=text8"], "--tokenizer"),
        (["--tokenizer=/nowhere/x"], "/nowhere/x"),
        (["--vocab_size=9", "--gamma_min=-1"], "--gamma_min=-1.0"),
        (["--vocab_size=9", "--gamma_min=nan"], "--gamma_min=nan"),
        (["--vocab_size=9", "--log10_num_points=0"], "--log10_num_points=0"),
        (["--vocab_size=9", "--log10_num_points=8"], "--log10_num_points=8"),
        (["--vocab_size=9", "--partition_index=-1"], "--partition_index=-1"),
        (["--vocab_size=9", "--num_partitions=0"], "--num_partitions=0"),
        (
            ["--vocab_size=9", "--num_partitions=3", "--partition_index=3"],
            "--partition_index=3",
        ),
        (["--vocab_size=9", "--suggests"], "--suggests"),
        (["--vocab=9"], "--vocab"),
    ],
)
def test_mistakes_on_the_command_line(capsys, tmp_path, args, part):
    assert part in failure(capsys, *args, f"--folder={tmp_path}")
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("args", [[], ["--suggest"], ["--num_partitions=2"]])
def test_folder_that_is_a_file(capsys, tmp_path, args):
    (tmp_path / "file").touch()
    args = ["--vocab_size=9", "--log10_num_points=1", *args]
    assert "file" in failure(capsys, *args, f"--folder={tmp_path / 'file'}")


@pytest.mark.parametrize("end", ["5e4", "1e9", "inf"])
def test_range_that_is_too_wide_for_a_table(capsys, tmp_path, end):
    args = ["--vocab_size=50258", "--log10_num_points=1", f"--gamma_max={end}"]
    assert "--gamma_max" in failure(capsys, *args, f"--folder={tmp_path}")


@pytest.mark.parametrize(("points", "partitions"), [(2, 7), (1, 23)])
def test_partitions_in_any_order(tmp_path, capsys, points, partitions):
    """More of them than points, too; the last one puts them together."""
    common = ["--vocab_size=50", f"--log10_num_points={points}", f"--folder={tmp_path}"]
    order = list(range(partitions))
    random.Random(3).shuffle(order)
    path = tmp_path / "vocab_50.npz"
    for index in order:
        assert not path.exists()
        split = [f"--num_partitions={partitions}", f"--partition_index={index}"]
        command.main([*common, *split])
        out = capsys.readouterr().out
        if index == order[0]:
            missing = re.search(r"missing are \[(.*)\]", out)[1]
            assert len(missing.split(",")) == partitions - 1
    assert str(path) in out
    assert [*tmp_path.iterdir()] == [path]
    joined = read_table(str(path), KEY)
    path.unlink()
    command.main(common)
    assert same(joined, read_table(str(path), KEY))
    assert same(joined, build_table(50, WIDE, 10**points))


@pytest.mark.parametrize(
    "other", ["--log10_num_points=2", "--gamma_min=-4", "--vocab_size=51"]
)
def test_partitions_of_another_table_stay_apart(tmp_path, other):
    common = ["--log10_num_points=1", f"--folder={tmp_path}", "--num_partitions=2"]
    command.main(["--vocab_size=50", *common, "--partition_index=0"])
    command.main(["--vocab_size=50", *common, "--partition_index=1", other])
    assert not [*tmp_path.glob("*.npz")]
    assert len([*tmp_path.iterdir()]) == 2
    command.main(["--vocab_size=50", *common, "--partition_index=1"])
    written = read_table(str(tmp_path / "vocab_50.npz"), KEY)
    assert same(written, build_table(50, WIDE, 10))


def test_suggestion(tmp_path, capsys):
    """For a tokenizer: its vocabulary, a range with alpha from 0.97 to 0.03, a plot."""
    folder = tmp_path / "new"
    command.main(["--tokenizer=text8", "--suggest", f"--folder={folder}"])
    out = capsys.readouterr().out
    low, high = suggest_gammas(35)
    assert "35 tokens" in out
    found = dict(re.findall(r"gamma_(min|max)[^-\d\n]+(-?[\d.]+)", out))
    assert found == {"min": f"{low:.2f}", "max": f"{high:.2f}"}
    plot, pdf = sorted(folder.iterdir(), reverse=True)
    assert (plot.suffix, pdf.suffix) == (".png", ".pdf")
    assert plot.read_bytes().startswith(b"\x89PNG\r\n")
    assert plot.stat().st_size > 5000
