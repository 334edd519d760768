"""Files made to cost time or memory, to lie about tensors, or to nest without end: one
line within a second, and never much more memory than the file has bytes.
"""

import io
import pickle
import resource
import struct
import subprocess
import sys
import time
import zipfile
import zlib
from pathlib import Path

import pytest
import torch
from refusals import refused

from checkpoints.reading import read_checkpoint
from data.pickles import MAX_DEPTH, check_extent, read_pickle
from integral.tables import read_table

ROOT = Path(__file__).parents[3]
KEY = "eval.checkpoint_path"


def text(value: str) -> bytes:
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def called(module: str, name: str, args: bytes) -> bytes:
    return f"c{module}\n{name}\n".encode() + b"(" + args + b"tR"


def big(number: int) -> bytes:
    return b"\x8a\x08" + struct.pack("<q", number)


def in_dict(value: bytes) -> bytes:
    return b"}" + text("a") + value + b"s"


def shared(leaf: bytes, pair: bytes, levels: int = 60) -> bytes:
    """A value that holds the one before twice, and so on."""
    code = leaf
    for i in range(1, levels):
        code += b"q" + bytes([i]) + pair.replace(b"@", b"h" + bytes([i]))
    return code


def tensor(size: bytes, stride: bytes, offset: int = 0, key: str = "0") -> bytes:
    """_rebuild_tensor_v2 of four floats in the file."""
    kind = text("storage") + b"ctorch\nFloatStorage\n" + text(key) + text("cpu")
    storage = b"(" + kind + b"K\x04tQ"
    args = storage + big(offset) + size + stride + b"\x89" + b"}"
    return called("torch._utils", "_rebuild_tensor_v2", args)


COPY = b"cbuiltins\nlist\nh\x01\x85R0"
BODIES = {
    "a bytearray of 4 GB": in_dict(called("builtins", "bytearray", big(4 << 30))),
    "bytes of 4 GB": in_dict(called("builtins", "bytes", big(4 << 30))),
    "a list of a number": in_dict(called("builtins", "list", big(4 << 30))),
    "an int of 4 GB": in_dict(called("builtins", "int", b"U\x021" + b"0")),
    "a key of pairs of pairs": b"}" + shared(b"K\x01", b"@\x86") + b"K\x01s",
    "a set of pairs of pairs": in_dict(
        called("builtins", "set", b"](" + shared(b"K\x01", b"@\x86") + b"e")
    ),
    "text of pairs of pairs": in_dict(
        called("builtins", "str", shared(b"K\x01", b"@\x86"))
    ),
    "pairs of pairs": in_dict(shared(b"K\x01", b"@\x86")),
    "lists of lists": in_dict(shared(b"]", b"](@@e")),
    "dicts of dicts": in_dict(
        shared(b"}", b"}(" + text("x") + b"@" + text("y") + b"@u")
    ),
    "a list in itself": in_dict(b"]q\x01(h\x01h\x01e"),
    "a dict in itself": b"}q\x01" + text("a") + b"h\x01s",
    "20,000 deep": in_dict(b"]" * 20_000 + b"a" * 19_999),
    "copies of copies": in_dict(
        b"]("
        + b"K\x01" * 1000
        + b"eq\x01"
        + b"cbuiltins\nlist\nh\x01\x85R0" * 1000
        + b"]"
    ),
    "a large number": in_dict(b"\x8b" + struct.pack("<i", 10**5) + b"\x01" * 10**5),
    "a long number in text": in_dict(b"L" + b"9" * 10**5 + b"L\n"),
    "more text than there is": b"}\x8d" + struct.pack("<Q", 1 << 60) + b"x",
    "more bytes than there are": b"}\x96" + struct.pack("<Q", 1 << 60) + b"x",
    "nothing on the stack": b"0000",
    "a mark alone": b"(",
    "no mark": b"}u",
    "a registered class": b"}\x82\x01",
    "a tensor with a stride of 0": in_dict(
        tensor(big(1 << 40) + b"\x85", b"K\x00\x85")
    ),
    "a tensor beyond its data": in_dict(tensor(b"K\x05\x85", b"K\x01\x85")),
    "a tensor from far away": in_dict(tensor(b"K\x01\x85", b"K\x01\x85", 1 << 40)),
    "a tensor of negative size": in_dict(tensor(big(-4) + b"\x85", b"K\x01\x85")),
    "a tensor of negative stride": in_dict(tensor(b"K\x02\x85", big(-1) + b"\x85")),
    "a tensor from before": in_dict(tensor(b"K\x01\x85", b"K\x01\x85", -1)),
    "a tensor with a stride less": in_dict(tensor(b"K\x02K\x02\x86", b"K\x01\x85")),
    "a tensor of 999 axes": in_dict(
        tensor(b"(" + b"K\x01" * 999 + b"t", b"(" + b"K\x01" * 999 + b"t")
    ),
    "a tensor of no data": in_dict(tensor(b"K\x01\x85", b"K\x01\x85", key="7")),
    "a tensor of another record": in_dict(
        tensor(b"K\x01\x85", b"K\x01\x85", key="../data.pkl")
    ),
    "a tensor of a dict": in_dict(
        called("torch._utils", "_rebuild_tensor_v2", b"}K\x00K\x01\x85K\x01\x85\x89}")
    ),
    "a tensor without data": in_dict(
        called("torch._utils", "_rebuild_meta_tensor_no_storage", b"K\x01")
    ),
}


def archive(path: Path, body: bytes, **records: bytes) -> str:
    """A checkpoint with this pickle and the data of four floats."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a/data.pkl", b"\x80\x02" + body + b".")
        file.writestr("a/byteorder", "little")
        file.writestr("a/version", "3\n")
        file.writestr("a/data/0", bytes(16))
        for name, content in records.items():
            file.writestr(name, content)
    return str(path)


def check_refused(path: str) -> None:
    start = time.process_time()
    refused(lambda: read_checkpoint(path, KEY), f"{KEY}={path!r} cannot be read safely")
    assert time.process_time() - start < 1.0


@pytest.mark.parametrize("name", BODIES)
def test_crafted_pickles(tmp_path, name):
    check_refused(archive(tmp_path / "a.ckpt", BODIES[name]))


@pytest.mark.parametrize("name", BODIES)
def test_crafted_pickles_of_the_older_format(tmp_path, name):
    """Whose pickles are read from the file, not from memory."""
    path = tmp_path / "a.ckpt"
    parts = [pickle.dumps(0x1950A86A20F9469CFC6C, 2), pickle.dumps(1001, 2)]
    parts += [pickle.dumps({"little_endian": True}, 2)]
    parts += [b"\x80\x02" + BODIES[name] + b"."]
    path.write_bytes(b"".join(parts))
    check_refused(str(path))


def test_all_of_them_cost_no_memory(tmp_path):
    """In a process that cannot have much."""
    paths = [
        archive(tmp_path / f"{number}.ckpt", body)
        for number, body in enumerate(BODIES.values())
    ]
    code = (
        "import resource, sys\n"
        "from utils import ConfigError\n"
        "from checkpoints.reading import read_checkpoint\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "for path in sys.argv[1:]:\n"
        "    try: read_checkpoint(path, 'x')\n"
        "    except ConfigError: pass\n"
        "    else: sys.exit(path)\n"
        "after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "sys.exit(after - before > 100_000 and f'{after - before} kB')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *paths], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------- archives

GOOD = in_dict(tensor(b"K\x04\x85", b"K\x01\x85"))


def test_a_file_by_hand_is_read(tmp_path):
    found = read_checkpoint(archive(tmp_path / "a.ckpt", GOOD), KEY).lightning
    assert torch.equal(found["a"], torch.zeros(4))


def bombs(path: Path) -> dict[str, bytes]:
    archive(path, GOOD)
    plain = path.read_bytes()
    deflated = io.BytesIO()
    with zipfile.ZipFile(deflated, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("a/data.pkl", b"\x80\x02}" + bytes(10**7) + b".")
    at = plain.index(b"PK\x01\x02")
    end = plain.index(b"PK\x05\x06")
    twice = plain[:end] + plain[at:end] * 99
    count = struct.pack("<HH", 99, 99)
    twice += plain[end : end + 8] + count + struct.pack("<I", 99 * (end - at))
    twice += plain[end + 16 :]
    checksum = struct.pack("<I", zlib.crc32(bytes(16)))
    wrong = plain.replace(checksum, struct.pack("<I", 7))
    return {
        "deflated zeros": deflated.getvalue(),
        "one record many times": twice,
        "a wrong checksum": wrong,
        "no files": b"PK\x03\x04" + bytes(99) + b"PK\x05\x06" + bytes(18),
        "an archive in front": plain + plain,
    }


BOMBS = (
    *("deflated zeros", "one record many times", "a wrong checksum", "no files"),
    "an archive in front",
)


@pytest.mark.parametrize("name", BOMBS)
def test_archives_that_lie(tmp_path, name):
    path = tmp_path / "a.ckpt"
    path.write_bytes(bombs(path)[name])
    if name == "an archive in front":  # the last one counts
        assert read_checkpoint(str(path), KEY).lightning.keys() == {"a"}
    else:
        check_refused(str(path))


@pytest.mark.parametrize(
    "records",
    [
        {"a/data.pkl": b"\x80\x02}."},
        {"b/data.pkl": b"\x80\x02}."},
        {"a/data/0": bytes(16)},
        {"a/byteorder": b"big"},
    ],
)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_records_there_twice(tmp_path, records):
    check_refused(archive(tmp_path / "a.ckpt", GOOD, **records))


# ---------------------------------------------------------------- what is read


def test_torch_s_own_files_are_read_as_torch_reads_them(tmp_path):
    """Views, types, names, and what shares data."""
    base = torch.arange(24.0)
    content = {
        "view": base.view(4, 6)[1:3, ::2],
        "turned": base.view(4, 6).T,
        "same": base,
        "empty": torch.empty(0, 3),
        "number": torch.tensor(1.5, dtype=torch.float64),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "int": 1 << 63,
        "nested": [(1, None, True), {"a": {2: "x"}}, {1, 2}],
        "bytes": b"\x00\xff",
        "state": torch.nn.Linear(2, 3).state_dict(),
    }
    kinds = (
        *(torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16),
        *(torch.int8, torch.uint8, torch.bool, torch.complex64, torch.uint16),
    )
    content["kinds"] = [torch.ones(3, 2).to(kind) for kind in kinds]
    for zipped in (True, False):
        for protocol in (2, 4):
            path = tmp_path / "a.ckpt"
            options = {"_use_new_zipfile_serialization": zipped}
            torch.save(content, path, pickle_protocol=protocol, **options)
            found = read_checkpoint(str(path), KEY).lightning
            assert same(content, found), (zipped, protocol)
            data = found["view"].untyped_storage().data_ptr()
            assert data == found["same"].untyped_storage().data_ptr()


def same(one, two) -> bool:
    if isinstance(one, torch.Tensor):
        return one.dtype == two.dtype and torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[k], two[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(two) and all(map(same, one, two))
    return one == two


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize(
    "value",
    [
        *(
            None,
            True,
            -1,
            1 << 100,
            0.5,
            "é\n",
            b"\x00",
            [],
            (),
            {},
            [1, [2]],
            (1, 2, 3),
        ),
        *({"a": {"b": (1,)}}, {(1, "x"): 2}, [[1]] * 3, "x" * 300, list(range(300))),
    ],
)
def test_plain_values_of_every_protocol(value, protocol):
    if value == b"\x00" and protocol < 3:
        return  # by a name, which is not for this reader to know
    raw = io.BytesIO(pickle.dumps(value, protocol))
    assert read_pickle(raw, lambda name: None) == value
    assert raw.read() == b""


def test_what_is_deep_and_what_is_shared():
    deep: list = []
    for _ in range(MAX_DEPTH - 1):
        deep = [deep]
    check_extent(deep)
    with pytest.raises(ValueError, match="deep"):
        check_extent([[deep]])
    pair = (0, 0)
    for _ in range(30):
        pair = (pair, pair)
    with pytest.raises(ValueError, match="memory"):
        check_extent(pair)


# ---------------------------------------------------------------- tables

TABLES = {
    **{name: body for name, body in BODIES.items() if "tensor" not in name},
    "a buffer of a number": in_dict(
        called("numpy._core.numeric", "_frombuffer", big(4 << 30) + b"NK\x01\x85U\x01C")
    ),
}


@pytest.mark.parametrize("name", TABLES)
def test_crafted_tables(tmp_path, name):
    path = tmp_path / "table.pkl"
    path.write_bytes(b"\x80\x02" + TABLES[name] + b".")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    refused(lambda: read_table(str(path), KEY), f"{KEY}='{path}'", "no table")
    assert time.process_time() - start < 1.0
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000


def test_a_table_that_is_a_bomb(tmp_path):
    path = tmp_path / "table.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("pt.npy", bytes(10**8))
    refused(lambda: read_table(str(path), KEY), "larger than the file")
