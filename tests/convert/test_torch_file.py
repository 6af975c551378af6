"""Files of torch.save: their contents, damage, and hostile ones, which must not run."""

import os
import pickle
import struct
import time
import zipfile
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
import torch_writer
from torch_writer import Call, Tensor

from bitdance_jax.convert import torch_file, torch_pickle
from bitdance_jax.errors import FileError


def load(path, data: bytes, records: dict[str, bytes] | None = None):
    """The content of a file with this pickle."""
    named = {"data.pkl": data} | (records or {})
    return torch_file.load(
        torch_writer.write_zip(
            path / "x.pt", {f"x/{name}": content for name, content in named.items()}
        )
    )


def test_contents(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {
        "float": rng.standard_normal((3, 4, 5)).astype(np.float32),
        "half": rng.standard_normal(7).astype(ml_dtypes.bfloat16),
        "scalar": np.array(5),
        "empty": np.zeros((0, 3), np.float32),
    }
    args = Call(
        "argparse.Namespace",
        (),
        {"lr": 1e-4, "name": "é", "sizes": (1, [2, -300]), "flag": True, "none": None},
    )
    read = torch_file.load(
        torch_writer.save(tmp_path / "x.pt", {"ema": arrays, "args": args, "epochs": 2**40})
    )
    assert read["args"] == args.state | {"sizes": [1, [2, -300]]}
    assert read["epochs"] == 2**40
    for key, array in arrays.items():
        lazy = read["ema"][key]
        assert (lazy.shape, lazy.dtype, lazy.nbytes) == (array.shape, array.dtype, array.nbytes)
        np.testing.assert_array_equal(lazy.read(), array)


def test_views_share_a_storage(tmp_path):
    """Two tensors in one storage, one of them transposed, and a list."""
    shared = [1]
    data = torch_writer.pickle(
        {
            "a": Tensor("float32", "0", 8, 2, (3, 2), (1, 3)),
            "b": Tensor("float32", "0", 8, 7, (1,), (1,)),
            "c": shared,
        }
    )
    read = load(tmp_path, data, {"data/0": np.arange(8, dtype=np.float32).tobytes()})
    np.testing.assert_array_equal(read["a"].read(), np.arange(2, 8).reshape(2, 3).T)
    np.testing.assert_array_equal(read["b"].read(), [7])


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_namespaces_of_all_protocols(tmp_path, protocol):
    read = load(
        tmp_path, pickle.dumps({"args": SimpleNamespace(dim=768), "more": [(), {}, 1.5]}, protocol)
    )
    assert read == {"args": {"dim": 768}, "more": [[], {}, 1.5]}


class Runs:
    """Pickles as a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


STACKED = b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x04true\x85R."  # STACK_GLOBAL
# Calls the result of a call.
RETURNED = torch_writer.pickle(Call("collections.OrderedDict", ()))[:-1] + b")R."
EXTENSION = b"\x80\x02\x82\x01)R."  # a function by its number in copyreg's registry
INSTANCE = b"(X\x04\x00\x00\x00trueiposix\nsystem\n."  # INST
OBJECT = b"(cposix\nsystem\nX\x04\x00\x00\x00trueo."  # OBJ
PERSISTENT = b"Pposix.system\n."  # PERSID, text
# BUILD on a known global.
ATTRIBUTE = b"\x80\x02ctorch\nFloatStorage\n}X\x08\x00\x00\x00__call__K\x01sb."
CLASS = b"\x80\x02ccollections\nOrderedDict\n}b."
OF_ARGUMENTS = torch_writer.pickle(
    {"args": Call("argparse.Namespace", (Call("os.system", ("true",)),))}
)


@pytest.mark.parametrize(
    ("data", "named"),
    [
        (pickle.dumps({"ema": Runs(os.system, "touch HERE")}, 2), "posix.system"),
        (pickle.dumps(Runs(eval, "open('HERE', 'w')"), 4), "builtins.eval"),
        (pickle.dumps(Runs(eval, "open('HERE', 'w')"), 2), "__builtin__.eval"),
        (pickle.dumps(Runs(getattr, "", "format"), 2), "__builtin__.getattr"),
        (torch_writer.pickle(Call("copyreg._reconstructor", ())), "copyreg._reconstructor"),
        (torch_writer.pickle(Call("torch.load", ("x",))), "torch.load"),
        (torch_writer.pickle(Call("torch._utils.os.system", ("true",))), "torch._utils.os.system"),
        (
            torch_writer.pickle(Call("numpy.core.multiarray.scalar", ())),
            "numpy.core.multiarray.scalar",
        ),
        (torch_writer.pickle(Call("torch.FloatStorage", (3,))), "calls torch.FloatStorage"),
        (OF_ARGUMENTS, "os.system"),
        (STACKED, "posix.system"),
        (RETURNED, "calls dict"),
        (EXTENSION, "EXT1"),
        (INSTANCE, "INST"),
        (OBJECT, "posix.system"),
        (PERSISTENT, "PERSID"),
        (ATTRIBUTE, "sets attributes of a Global"),
        (CLASS, "sets attributes of a Global"),
    ],
)
def test_hostile_pickles_are_refused_and_nothing_runs(tmp_path, monkeypatch, data, named):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "system", lambda command: pytest.fail(f"ran {command}"))
    with pytest.raises(torch_pickle.Refused, match=r"x\.pt .*hostile, nothing was run") as error:
        load(tmp_path, data)
    assert named in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "HERE").exists()


def test_python_would_have_run_them(tmp_path, monkeypatch):
    """Python's pickle does run such a file."""
    monkeypatch.chdir(tmp_path)
    pickle.loads(pickle.dumps(Runs(os.system, "touch HERE"), 2))
    assert (tmp_path / "HERE").exists()


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (Tensor("float32", "0", 4, 0, (5,), (1,)), "outside its storage"),
        (Tensor("float32", "0", 4, 1, (4,), (1,)), "outside its storage"),
        (Tensor("float32", "0", 4, 0, (2, 2), (4, 1)), "outside its storage"),
        (Tensor("float32", "0", 4, 0, (2**40,), (2**40,)), "outside its storage"),
        (Tensor("float32", "0", 4, 3, (2,), (-1,)), "invalid"),
        (Tensor("float32", "0", 4, -1, (2,), (1,)), "invalid"),
        (Tensor("float32", "0", 4, 0, (-1,), (1,)), "invalid"),
        (Tensor("float32", "0", 4, 0, (2**70,), (1,)), "invalid"),
        (Tensor("float32", "0", 4, 0, (2, 2), (1,)), "invalid"),
        (Tensor("float32", "0", 4, 0, (2.0,), (1,)), "invalid"),
        (Tensor("float32", "0", 4, 0, 2, (1,)), "_rebuild_tensor_v2"),
        (Tensor("float32", "0", 400, 0, (2,), (1,)), "data/0"),
        (Tensor("float64", "0", 4, 0, (2,), (1,)), "data/0"),
        (Tensor("float32", "1", 4, 0, (2,), (1,)), "data/1"),
        (Tensor("float32", "../data.pkl", 4, 0, (2,), (1,)), "not a number"),
    ],
)
def test_tensors_that_point_outside_are_refused(tmp_path, tensor, message):
    with pytest.raises(FileError, match=message):
        load(tmp_path, torch_writer.pickle({"ema": tensor}), {"data/0": bytes(16)})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\x80\x02}X\x02\x00\x00\x00em", "damaged"),
        (b"\x80\x02}", r"damaged|truncated"),
        (b"\x80\x02.", "damaged"),
        (b"\x80\x02s.", "damaged"),
        (b"\x80\x02h\x05.", "damaged"),
        (b"\x80\x02u.", "damaged"),
        (b"not a pickle", "damaged"),
        (b"\x80\x02}]K\x01s.", "list"),
        (
            b"\x80\x02}(X\x01\x00\x00\x00aK\x01X\x01\x00\x00\x00aK\x02X\x01\x00\x00\x00bK\x01X\x01\x00\x00\x00bK\x01u.",
            "a, b",
        ),
    ],
)
def test_damaged_pickles(tmp_path, data, message):
    with pytest.raises(FileError, match=message):
        load(tmp_path, data)


def integer(value: int) -> bytes:
    """LONG4, of any length."""
    content = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8b" + struct.pack("<i", len(content)) + content


SIZES_OF_A_LONG_LIST = (
    b"\x80\x02](" + 20_000 * b"K\x01" + b"eq\x00" + 60_000 * b"ctorch\nSize\nh\x00\x85R" + b"."
)
SAME_HASH = (
    b"\x80\x02}(" + b"".join(integer(n * (2**61 - 1)) + b"N" for n in range(1, 30_000)) + b"u."
)
KEYS_OF_ONE_SHAPE = (
    b"\x80\x02}(" + b"".join(integer(n << 40) + b"N" for n in range(1, 30_000)) + b"u."
)
STATE = b"}(" + b"".join(b"X\x05\x00\x00\x00%05dN" % n for n in range(50_000)) + b"uq\x00"
COPIES_OF_A_STATE = b"\x80\x02" + STATE + 50_000 * b"cargparse\nNamespace\n)Rh\x00b" + b"."
NAME_OF_DOUBLED_LISTS = (
    b"\x80\x04]" + b"".join(b"q%c](h%ch%ce" % (n, n, n) for n in range(60)) + b"\x8c\x01x\x93."
)
MANY_ARGUMENTS = (
    b"\x80\x02("
    + 100_000 * b"N"
    + b"tq\x00"
    + 100_000 * b"ctorch._utils\n_rebuild_tensor_v2\nh\x00R"
    + b"."
)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (SIZES_OF_A_LONG_LIST, r"torch\.Size"),
        (SAME_HASH, r"integer|int as its key"),
        (KEYS_OF_ONE_SHAPE, "int as its key"),
        (COPIES_OF_A_STATE, "two Namespaces of one dict"),
        (NAME_OF_DOUBLED_LISTS, "not a string"),
        (MANY_ARGUMENTS, "100000 arguments"),
        (b"\x80\x02" + integer(10**6000) + b".", "an integer of 19,932 bits"),
        (b"\x80\x02L" + b"9" * 6000 + b"L\n.", "damaged"),
        (b"\x80\x02Np99999999999999999\n.", "number"),
        (
            b"\x80\x02(X\x07\x00\x00\x00storagectorch\nFloatStorage\n]X\x03\x00\x00\x00cpuK\x01tQ.",
            "storage",
        ),
        (
            torch_writer.pickle(Tensor("float32", "0", 4, 0, (2**40,), (0,))),
            "'0' too often",
        ),
        (
            torch_writer.pickle(Tensor("float32", "0", 4, 0, (1,) * 33, (0,) * 33)),
            "_rebuild_tensor_v2",
        ),
    ],
    ids=[
        "sizes",
        "hashes",
        "keys",
        "states",
        "names",
        "arguments",
        "digits",
        "text",
        "memo",
        "storage",
        "repeats",
        "dimensions",
    ],
)
def test_small_files_cost_little(tmp_path, data, message):
    """Without limits, each takes minutes or gigabytes, or ends in a traceback."""
    begin = time.process_time()
    with pytest.raises(FileError, match=message) as error:
        load(tmp_path, data, {"data/0": bytes(16)})
    assert time.process_time() - begin < 5
    assert len(str(error.value)) < 500


def test_limit_of_instructions(tmp_path, monkeypatch):
    monkeypatch.setattr(torch_pickle, "MAX_INSTRUCTIONS", 1000)
    load(tmp_path, b"\x80\x02" + 998 * b"N" + b".")
    with pytest.raises(FileError, match="1,000 instructions"):
        load(tmp_path, b"\x80\x02" + 1000 * b"N" + b".")


def test_zip_files_that_python_cannot_read(tmp_path):
    """Features that it lacks, names that are not text, sizes past the end."""
    path = torch_writer.save(tmp_path / "x.pt", {"a": np.arange(4, dtype=np.float32)})
    original = path.read_bytes()
    local = original.index(b"PK\x03\x04")
    central = original.index(b"PK\x01\x02")

    def damage(position: int, value: bytes) -> str:
        path.write_bytes(original[:position] + value + original[position + len(value) :])
        with pytest.raises(FileError, match=r"x\.pt") as error:
            torch_file.load(path)
        return str(error.value)

    assert "version" in damage(central + 6, struct.pack("<H", 99))
    for flags in (0x20, 0x40, 0x01):
        damage(central + 8, struct.pack("<H", flags))
    for name, flags in ((central + 46, central + 8), (local + 30, local + 6)):
        damage(flags, struct.pack("<H", 0x800) + original[flags + 2 : name] + b"\xff\xfe")
    damage(central + 20, struct.pack("<II", 2**31, 2**31))


def test_deep_and_circular_nesting(tmp_path):
    """Neither ends in a crash of the interpreter."""
    deep = load(tmp_path, b"\x80\x02" + 20_000 * b"]" + 19_999 * b"a" + b".")
    assert len(deep) == 1
    circle = load(tmp_path, b"\x80\x02]q\x00h\x00a.")
    assert circle[0] is circle


def test_records_outside_duplicate_or_compressed(tmp_path):
    data = torch_writer.pickle({})
    with pytest.raises(FileError, match=r"'x/\.\./\.\./etc'"):
        load(tmp_path, data, {"../../etc": b""})
    with (
        zipfile.ZipFile(tmp_path / "twice.pt", "w") as file,
        pytest.warns(UserWarning, match="Duplicate"),
    ):
        file.writestr("x/data.pkl", data)
        file.writestr("x/data.pkl", torch_writer.pickle({"other": 1}))
    with pytest.raises(FileError, match="same name"):
        torch_file.load(tmp_path / "twice.pt")
    torch_writer.write_zip(
        tmp_path / "small.pt", {"x/data.pkl": data + bytes(1000)}, zipfile.ZIP_DEFLATED
    )
    with pytest.raises(FileError, match=r"data\.pkl .*compressed"):
        torch_file.load(tmp_path / "small.pt")
    torch_writer.write_zip(tmp_path / "other.zip", {"x/readme": b""})
    with pytest.raises(FileError, match=r"torch\.save"):
        torch_file.load(tmp_path / "other.zip")
    with pytest.raises(FileError, match="big-endian"):
        load(tmp_path, data, {"byteorder": b"big"})


def test_legacy_formats(tmp_path):
    (tmp_path / "legacy.pt").write_bytes(
        pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2)
    )
    (tmp_path / "tar.pt").write_bytes(bytes(257) + b"ustar" + bytes(250))
    for name in ("legacy.pt", "tar.pt"):
        with pytest.raises(FileError, match=rf"{name} .*before 1\.6"):
            torch_file.load(tmp_path / name)


def test_truncated_and_damaged_files(tmp_path):
    path = torch_writer.save(tmp_path / "x.pt", {"a": np.arange(1000, dtype=np.float32)})
    original = path.read_bytes()
    for length in (4, 100, len(original) // 2, len(original) - 1):
        path.write_bytes(original[:length])
        with pytest.raises(FileError, match=r"x\.pt .*truncated"):
            torch_file.load(path)
    path.write_bytes(original.replace(struct.pack("<f", 500), struct.pack("<f", 501)))
    read = torch_file.load(path)["a"].read
    with pytest.raises(FileError, match=r"x\.pt .*data/0 .*CRC"):
        read()
