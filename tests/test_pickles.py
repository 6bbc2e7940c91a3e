"""Pickles of arrays, sound and forged, and programs in files."""

import argparse
import os
import pickle
import struct
import time

import numpy as np
import pytest
import torch
from conftest import (
    DEEP,
    assert_refused,
    small,
)
from foreign import (
    AFFINE,
    backbone_file,
)

import fcos
from fcos import UserError


class Program:
    """An object whose unpickling creates a file or folder."""

    def __init__(self, function, argument):
        self.call = function, (argument,)

    def __reduce__(self):
        return self.call


def touch(path):
    open(path, "w").close()


@pytest.mark.parametrize("suffix", ["pt", "pth", "pkl"])
def test_a_program_in_a_file_is_refused_by_name_and_not_run(suffix, tmp_path):
    for number, (function, argument, name) in enumerate(
        [
            (os.system, f"touch {tmp_path}/ran", r"(posix|nt)\.system"),
            (os.mkdir, str(tmp_path / "ran"), r"(posix|nt|os)\.mkdir"),
            (eval, f"open({str(tmp_path / 'ran')!r}, 'w')", "eval"),
            (touch, str(tmp_path / "ran"), r"test_pickles\.touch"),
            (np.load, str(tmp_path / "ran"), r"numpy.*load"),
            (None, None, r"argparse\.Namespace"),
        ]
    ):
        path = tmp_path / f"{number}.{suffix}"
        program = Program(function, argument) if function else argparse.Namespace(lr=0.1)
        content = {"conv1_w": program, "res_conv1_bn_s": 1}
        if suffix == "pkl":
            path.write_bytes(pickle.dumps(content, protocol=2))
        else:
            torch.save({"model": content}, path)
        with pytest.raises(UserError, match=rf"{path.name}: refused.*{name}.*state dict"):
            fcos.load(path)
        assert not (tmp_path / "ran").exists()


SOUND = {
    "float32": np.arange(6, dtype=np.float32).reshape(2, 3),
    "Fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "permuted": np.arange(24.0).reshape(2, 3, 4).transpose(1, 2, 0),
    "big-endian": np.arange(3, dtype=">f4"),
    "half": np.zeros((1, 2), np.float16),
    "bytes": np.arange(3, dtype=np.uint8)[::-1],
    "bool": np.array([True, False]),
    "empty": np.zeros((0, 3)),
    "no axis": np.array(5),
    "scalar": np.float32(1),
    "text": np.array(["text", "ü"]),
    "byte strings": np.array([b"text"]),
    "plain": [1, -1, 10**30, "x", b"y", b"", None, 2.5, True, (1, (2, "a")), {"a": 0, 1: None}],
}


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("package", ["numpy._core", "numpy.core"])
def test_sound_pickles_are_read(protocol, package, tmp_path):
    """Of numpy 1 and 2; the package is written with its length in the later protocols."""
    content = SOUND | {"again": SOUND["float32"]}
    pickled = pickle.dumps(content, protocol)
    if package == "numpy.core" and protocol < 4:
        pickled = pickled.replace(b"numpy._core", b"numpy.core")
    (tmp_path / "arrays.pkl").write_bytes(pickled)
    read = fcos.read_checkpoint(tmp_path / "arrays.pkl")
    assert list(read) == list(content)
    assert read["again"] is read["float32"]
    for name, value in content.items():
        if name != "plain":
            assert type(read[name]) is type(value) and read[name].dtype == value.dtype, name
            assert read[name].shape == value.shape and (read[name] == value).all(), name
    assert read["plain"] == content["plain"]


# Instructions of a pickle, and what numpy makes of them.


def text(value):
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def raw(value):
    return b"B" + struct.pack("<I", len(value)) + value


def whole(value):
    return b"\x8a\x08" + struct.pack("<q", value)


def group(*parts):
    return b"(" + b"".join(parts) + b"t"


def shape(*sides):
    return group(*map(whole, sides))


def called(module, name, *parts):
    return f"c{module}\n{name}\n".encode() + group(*parts) + b"R"


NO, MULTIARRAY = b"\x89", "numpy._core.multiarray"
CREATED = called(MULTIARRAY, "_reconstruct", b"cnumpy\nndarray\n", shape(0), raw(b"b"))


def kind(code="f4", order="<", parts=b"NNN", size=-1):
    state = whole(3) + text(order) + parts + whole(size) + whole(-1) + whole(0)
    return called("numpy", "dtype", text(code), NO, b"\x88") + group(state) + b"b"


TWO, FLOAT, ZEROS, ONE = shape(2), kind(), raw(bytes(8)), whole(1)


def array(shape=TWO, kind=FLOAT, content=ZEROS, fortran=NO, version=ONE):
    return CREATED + group(version, shape, kind, fortran, content) + b"b"


def buffer(shape=TWO, kind=FLOAT, content=ZEROS):
    return called("numpy._core.numeric", "_frombuffer", content, kind, shape, text("C"))


def scalar(kind, content):
    return called(MULTIARRAY, "scalar", kind, content)


def sized(instruction, size):
    return instruction + struct.pack("<Q", size)


WIDE, KEY = b")" + b"2\x86" * 60, text("key") + b"s"
FORGED = {
    # ---- element types
    "objects in a buffer": buffer(kind=kind("O8", "|"), shape=shape(1)),
    "objects in an array": array(kind=kind("O8", "|"), shape=shape(1)),
    "list of objects": array(kind=kind("O8", "|"), content=b"](NNe"),
    "object as scalar": scalar(kind("O8", "|"), ZEROS),
    "dates": array(kind=kind("M8")),
    "records": array(kind=kind("V8", "|")),
    "long double": array(kind=kind("f16"), content=raw(bytes(32))),
    "list of types": array(kind=kind("f4,f4"), shape=shape(1)),
    "type of nothing": array(kind=kind("S0", "|"), content=raw(b"")),
    "huge strings": array(kind=kind("S999999999", "|")),
    "subarray": array(kind=kind(parts=group(kind(), shape(10**9)) + b"NN")),
    "fields": array(kind=kind(parts=b"N" + group(text("a")) + b"}")),
    "no byte order": array(kind=kind(order="?")),
    "type by number": array(kind=called("numpy", "dtype", whole(1), NO, NO)),
    "type without a name": array(kind=called("numpy", "dtype")),
    "type named by a type": array(kind=called("numpy", "dtype", kind(), NO, NO)),
    "state is a number": array(kind=called("numpy", "dtype", text("f4"), NO, NO) + whole(3) + b"b"),
    "state is too short": array(kind=called("numpy", "dtype", text("f4"), NO, NO) + b")b"),
    "sizes are text": array(kind=kind().replace(whole(-1), text("x"))),
    "no text": array(kind=kind("U1"), content=raw(b"\xff" * 8)),
    # ---- shapes and bytes
    "huge": array(shape(10**9, 10**9)),
    "2**62 elements": array(shape(2**31, 2**31), kind("b1", "|"), raw(b"")),
    "negative": array(shape(-1)),
    "two negative sides": array(shape(-1, -2)),
    "a side of text": array(group(text("2"))),
    "a side of 2.0": array(group(b"G" + struct.pack(">d", 2))),
    "a true side": array(group(b"\x88", whole(2))),
    "a shape in a list": array(b"](" + whole(2) + b"e"),
    "100 axes": array(shape(*[1] * 100), content=raw(bytes(4))),
    "too few bytes": array(shape(3)),
    "too many bytes": buffer(shape(1)),
    "no bytes": array(content=b"N"),
    "a number of bytes": scalar(kind(), whole(4)),
    "text beyond latin1": array(content=text("\u0100" * 8)),
    "another version": array(version=whole(2)),
    "Fortran in a list": array(fortran=b"]"),
    "no type": array(kind=b"N"),
    "an array as type": array(kind=array()),
    "filled twice": array() + group(ONE, TWO, FLOAT, NO, ZEROS) + b"b",
    "array in itself": CREATED + b"q\x07" + group(ONE, b"h\x07", FLOAT, NO, raw(b"")) + b"b",
    "never filled": CREATED,
    "other axes": called(
        "numpy._core.numeric", "_frombuffer", ZEROS, FLOAT, TWO, text("K"), shape(7)
    ),
    "a subclass": called(MULTIARRAY, "_reconstruct", b"cnumpy\ndtype\n", shape(0), raw(b"b")),
    "starts with a size": called(
        MULTIARRAY, "_reconstruct", b"cnumpy\nndarray\n", shape(10**12), raw(b"b")
    ),
    # ---- names and calls
    "system": called("posix", "system", text("false")),
    "another function of numpy": called(MULTIARRAY, "fromfile", text("/dev/zero")),
    "a path in a name": b"cnumpy\nndarray.dtype\n",
    "a name with an escape code": b"cnumpy\x1b[31m\nload\n",
    "a very long name": b"c" + b"n" * 10**6 + b"\nload\n",
    "a name of numbers": whole(1) + whole(2) + b"\x93",
    "a function as value": b"cnumpy\ndtype\n",
    "a call of text": text("f") + b")R",
    "a call of an array": array() + b")R",
    "a call with a number": b"cnumpy\ndtype\n" + whole(3) + b"R",
    "a call without arguments": called(MULTIARRAY, "scalar"),
    "compressed bytes": called("_codecs", "encode", text("a" * 99), text("zlib")),
    "INST": b"(iposix\nsystem\n",
    "INST of numpy": b"(" + text("O8") + b"inumpy\ndtype\n",
    "OBJ": b"(cnumpy\ndtype\n" + text("O8") + b"o",
    "NEWOBJ": b"cnumpy\nndarray\n" + group(shape(10**12)) + b"\x81",
    "NEWOBJ_EX": b"cnumpy\nndarray\n" + group(shape(10**12)) + b"}\x92",
    "EXT1": b"\x82\x01",
    "EXT4": b"\x84" + struct.pack("<i", 2**31 - 1),
    "PERSID": b"Pstorage\n",
    "BINPERSID": text("storage") + b"Q",
    "NEXT_BUFFER": b"\x97",
    "READONLY_BUFFER": raw(b"") + b"\x98",
    "state of a dict": b"}}b",
    "state of text": text("a") + b"}b",
    # ---- keys, nesting, sizes
    "deep key": b"}" + DEEP + KEY,
    "wide key": b"}" + WIDE + KEY,
    "list as key": b"}]" + KEY,
    "array as key": b"}" + array() + KEY,
    "deep key of many": b"}(" + DEEP + b"Nu",
    "deep key of a literal": b"(" + DEEP + b"Nd",
    "deep element of a set": b"\x8f(" + DEEP + b"\x90",
    "deep element of a frozen set": b"(" + DEEP + b"\x91",
    "items of a list": b"](NNu",
    "odd items": b"}(Nu",
    "2**40 bytes": sized(b"\x8e", 2**40),
    "2**63 bytes": sized(b"\x8e", 2**63),
    "2**36 bytes to change": sized(b"\x96", 2**36),
    "2**40 letters": sized(b"\x8d", 2**40),
    "2**40 digits": b"\x8b" + struct.pack("<i", 2**31 - 1),
    "a frame of 2**40": sized(b"\x95", 2**40),
    "a negative length": b"T" + struct.pack("<i", -1),
    "sides of a million digits": text("a")
    + b"0\x8b"
    + struct.pack("<i", 10**6)
    + b"\x01" * 10**6
    + b"q\x020"
    + array(b"(" + b"h\x02" * 32 + b"t"),
    "a key of a million digits": b"\x8b"
    + struct.pack("<i", 10**6)
    + b"\x01" * 10**6
    + b"q\x020}("
    + b"h\x02N" * 300_000
    + b"u",
    "a million digits": b"L" + b"9" * 10**6 + b"L\n",
    "an array 3000 times": text("a" * 10**6)
    + b"q\x010]("
    + array(shape(10**6), kind("b1", "|"), b"h\x01") * 3000
    + b"e",
    "nothing on the stack": b"0000000",
    "no mark": b"e",
    "an unknown memo": b"h\x63",
    "an unknown instruction": b"\xff",
}


@pytest.mark.parametrize("name", FORGED)
def test_forged_pickles_are_refused(name, tmp_path):
    """One value of a dict is forged, the other would be read."""
    sound = text("res_conv1_bn_s") + array() + b"s"
    path = tmp_path / "forged.pkl"
    path.write_bytes(b"\x80\x02}" + sound + b".")
    assert fcos.read_checkpoint(path)["res_conv1_bn_s"].tolist() == [0, 0]
    path.write_bytes(b"\x80\x02}" + text("conv1_w") + FORGED[name] + b"s" + sound + b".")
    start = time.process_time()
    assert_refused(lambda: fcos.read_checkpoint(path), path)
    assert time.process_time() - start < 10


@pytest.mark.parametrize(
    "value",
    [
        np.array([{}, []], dtype=object),
        np.array(["a", "b"]),
        "text",
        3,
        None,
        [1, 2],
    ],
    ids=["objects", "strings", "text", "number", "none", "list"],
)
def test_values_that_are_no_numbers(tmp_path, value):
    model, path = small("fcos_R_50_FPN"), tmp_path / "weights.pkl"
    path.write_bytes(pickle.dumps(backbone_file(model, AFFINE, res2_0_branch2a_w=value)))
    said = "res2_0_branch2a_w: expected (an array of numbers|a dense floating-point tensor)"
    with pytest.raises(UserError, match=said):
        fcos.load_weights(model, path)
