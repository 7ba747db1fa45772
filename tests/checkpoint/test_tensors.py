"""The safetensors reader: exact bytes, casts, NaN, and files that are not what they claim."""

import json
import os
import struct

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from crossin_jax.checkpoint import tensors
from crossin_jax.checkpoint.tensors import Reader, has_nan, read_header, same_bytes, write_tensors
from crossin_jax.config import UserError
from tests.checkpoint.checkpoints import edit_header

SHAPE = (6, 5, 8)


@pytest.fixture
def file(tmp_path):
    """One float32 tensor of 0, 1, 2, … among others."""
    save_file(
        {
            "a": np.zeros(3, np.float32),
            "b": np.arange(240, dtype=np.float32).reshape(SHAPE),
            "c": np.ones((2, 2), np.float16),
        },
        tmp_path / "x.safetensors",
    )
    return tmp_path / "x.safetensors"


def read_boxes(file, boxes, dtype=np.float32, monkeypatch=None):
    """Contents of the boxes, and the file ranges that were read."""
    ranges, preadv = [], os.preadv

    def record(descriptor, buffers, offset):
        count = preadv(descriptor, buffers, offset)
        ranges.append((offset, offset + count))
        return count

    if monkeypatch:
        monkeypatch.setattr(os, "preadv", record)
    tensor = read_header(str(file))["b"]
    outs = [np.full([b - a for a, b in box], -1, dtype) for box in boxes]
    with Reader() as reader:
        jobs = list(reader.plan(tensor, list(zip(boxes, outs, strict=True))))
        total = sum(job() for job in jobs)
    return outs, sorted((a - tensor.start, b - tensor.start) for a, b in ranges), total


BOXES = {
    "whole": [((0, 6), (0, 5), (0, 8))],
    "rows": [((2, 5), (0, 5), (0, 8))],
    "middle": [((0, 6), (1, 3), (0, 8))],
    "innermost": [((1, 4), (2, 5), (3, 5))],
    "one_number": [((5, 6), (4, 5), (7, 8))],
    "tiles": [((0, 6), (0, 5), (0, 3)), ((0, 6), (0, 5), (3, 8))],
    "grid": [
        ((0, 3), (0, 5), (0, 4)),
        ((0, 3), (0, 5), (4, 8)),
        ((3, 6), (0, 5), (0, 4)),
        ((3, 6), (0, 5), (4, 8)),
    ],
    "part_of_every_row": [((0, 3), (0, 5), (2, 4)), ((3, 6), (0, 5), (2, 4))],
    "diagonal": [((0, 3), (0, 5), (0, 4)), ((3, 6), (0, 5), (4, 8))],
    "empty": [((0, 0), (0, 5), (0, 8))],
}


@pytest.mark.parametrize("chunk", [1, 64, 1 << 20])
@pytest.mark.parametrize("name", BOXES)
def test_boxes_hold_their_bytes_and_no_other_byte_is_read(file, name, chunk, monkeypatch):
    monkeypatch.setattr(tensors, "CHUNK", chunk)
    whole = load_file(file)["b"]
    outs, ranges, total = read_boxes(file, BOXES[name], monkeypatch=monkeypatch)
    wanted = np.zeros(SHAPE, bool)
    for box, out in zip(BOXES[name], outs, strict=True):
        index = tuple(slice(*limits) for limits in box)
        np.testing.assert_array_equal(out, whole[index])
        wanted[index] = True
    touched = np.zeros(whole.nbytes, int)
    for start, stop in ranges:
        touched[start:stop] += 1
    np.testing.assert_array_equal(touched.reshape(*SHAPE, 4), wanted[..., None].repeat(4, -1))
    assert total == touched.sum()


def test_whole_rows_are_one_read_each_chunk(file, monkeypatch):
    assert len(read_boxes(file, BOXES["grid"], monkeypatch=monkeypatch)[1]) == 1


@pytest.mark.parametrize("source", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("target", ["float32", "float16", "bfloat16"])
def test_casts_round_as_numpy_does(tmp_path, source, target):
    source, target = np.dtype(source), np.dtype(target)
    values = np.random.default_rng(0).standard_normal((7, 9)).astype(np.float32).astype(source)
    write_tensors(str(tmp_path / "x"), [("b", tensors.CODES[source], (7, 9), lambda: values)])
    (out,), _, _ = read_boxes(tmp_path / "x", [((0, 7), (0, 9))], dtype=target)
    np.testing.assert_array_equal(out.view(np.uint8), values.astype(target).view(np.uint8))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_nan_of_either_sign_is_seen_and_infinity_is_not_one(dtype):
    array = np.linspace(-3, 3, 50).astype(dtype)
    array[3], array[4] = np.inf, -np.inf
    code = tensors.CODES[np.dtype(dtype)]
    assert not has_nan(array, code)
    for sign in (1.0, -1.0):
        bad = array.copy()
        bad[17] = np.copysign(np.nan, sign).astype(dtype)
        assert np.isnan(bad[17]) and has_nan(bad, code)


def test_written_files_are_read_by_safetensors(tmp_path):
    a, b = np.arange(6, dtype=np.float32).reshape(2, 3), np.array(2.5, ml_dtypes.bfloat16)
    write_tensors(
        str(tmp_path / "x"), [("a", "F32", (2, 3), lambda: a), ("b", "BF16", (), lambda: b)]
    )
    import torch
    from safetensors.torch import load_file as load_torch

    loaded = load_torch(tmp_path / "x")
    np.testing.assert_array_equal(loaded["a"].numpy(), a)
    assert (
        loaded["b"].dtype == torch.bfloat16
        and float(loaded["b"]) == 2.5
        and loaded["b"].shape == ()
    )


@pytest.mark.parametrize("name", ["a", "ab", "a much longer name of a tensor"])
def test_data_begin_where_readers_may_map_them(tmp_path, name):
    """The header is padded to a multiple of eight bytes; the data follow at once."""
    path = tmp_path / "x"
    write_tensors(str(path), [(name, "F32", (2,), lambda: np.ones(2, np.float32))])
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    assert length % 8 == 0 and len(raw) == 8 + length + 8
    assert header["__metadata__"] == {"format": "pt"}
    assert header[name] == {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def test_tensors_are_written_one_after_the_other_and_told(tmp_path):
    """Each array is asked for once, in the order given; a wrong one is a fault of ours."""
    asked, told = [], []

    def fetch(i):
        asked.append(i)
        return np.full((i, 2), i, np.float16)

    entries = [(f"t{i}", "F16", (i, 2), lambda i=i: fetch(i)) for i in (3, 1, 2)]
    write_tensors(str(tmp_path / "x"), iter(entries), told.append)
    assert asked == [3, 1, 2] and told == [12, 4, 8]
    loaded = load_file(tmp_path / "x")
    assert {name: array.tolist() for name, array in loaded.items()} == {
        f"t{i}": [[i, i]] * i for i in (1, 2, 3)
    }
    with pytest.raises(AssertionError, match="t: float64"):
        write_tensors(str(tmp_path / "y"), [("t", "F32", (2,), lambda: np.ones(2))])


@pytest.mark.parametrize("size", [5, 8, 12, 16])
@pytest.mark.parametrize("chunk", [4, 8, 1 << 20])
def test_tensors_are_equal_where_every_byte_is(tmp_path, monkeypatch, size, chunk):
    """One other byte at any place, in whatever part of the file, makes the difference."""
    monkeypatch.setattr(tensors, "CHUNK", chunk)
    first = np.arange(2 * size, dtype=np.uint8).view(np.float16)
    others = [first]
    for place in range(2 * size):
        raw = first.view(np.uint8).copy()
        raw[place] ^= 1
        others.append(raw.view(np.float16))
    entries = [
        (f"t{i:03d}", "F16", (size,), lambda array=array: array)
        for i, array in enumerate([first, *others])
    ]
    write_tensors(str(tmp_path / "x"), entries)
    found = read_header(str(tmp_path / "x"))
    assert [same_bytes(found["t000"], found[f"t{i:03d}"]) for i in range(1, len(entries))] == [
        True,
        *[False] * (2 * size),
    ]
    write_tensors(
        str(tmp_path / "y"),
        [
            ("t", "BF16", (size,), lambda: first.view(ml_dtypes.bfloat16)),
            ("u", "F16", (1, size), lambda: first[None]),
        ],
    )
    other = read_header(str(tmp_path / "y"))
    assert not same_bytes(found["t000"], other["t"]) and not same_bytes(found["t000"], other["u"])


@pytest.mark.parametrize("boxes", BOXES.values(), ids=BOXES)
@pytest.mark.parametrize("chunk", [64, 1 << 20])
def test_a_nan_is_told_where_it_is_read(tmp_path, boxes, chunk, monkeypatch):
    """A tensor with a NaN among the numbers read is named once, others and other places are not."""
    monkeypatch.setattr(tensors, "CHUNK", chunk)
    array = np.zeros(SHAPE, np.float32)
    array[2, 2, 3] = np.nan
    entries = [
        ("a", "F32", SHAPE, lambda: array),
        ("b", "F32", SHAPE, lambda: np.zeros(SHAPE, np.float32)),
    ]
    write_tensors(str(tmp_path / "x"), entries)
    found = read_header(str(tmp_path / "x"))
    with Reader() as reader:
        for name in ("a", "b"):
            parts = [(box, np.empty([b - a for a, b in box], np.float32)) for box in boxes]
            for job in reader.plan(found[name], parts):
                job()
    is_read = any(
        all(low <= at < high for (low, high), at in zip(box, (2, 2, 3), strict=True))
        for box in boxes
    )
    assert reader.with_nan == ({"a"} if is_read else set())


def test_many_faults_are_summed_up(file):
    """The first five are named, and how many more there are."""
    save_file({f"t{i}": np.zeros(2, np.float32) for i in range(8)}, file)
    edit_header(file, lambda header: {n: entry | {"dtype": "I8"} for n, entry in header.items()})
    with pytest.raises(UserError) as told:
        read_header(str(file))
    assert str(told.value).count("dtype I8") == 5 and str(told.value).endswith("; and 3 more")


@pytest.mark.parametrize("name", ["a", "ab", "abc", "abcdefgh"])
def test_the_header_is_aligned_and_says_which_library_reads_it(name, tmp_path):
    """Data begin at a multiple of eight; transformers 4 refuses files without the format."""
    from safetensors import safe_open

    write_tensors(str(tmp_path / "x"), [(name, "F32", (2,), lambda: np.ones(2, np.float32))])
    assert struct.unpack("<Q", (tmp_path / "x").read_bytes()[:8])[0] % 8 == 0
    with safe_open(tmp_path / "x", "numpy") as opened:
        assert opened.metadata() == {"format": "pt"} and list(opened.keys()) == [name]


def cut(file):
    file.write_bytes(file.read_bytes()[:-10])


def long_header(file):
    raw = file.read_bytes()
    file.write_bytes(struct.pack("<Q", len(raw)) + raw[8:])


def short_header(file):
    raw = file.read_bytes()
    file.write_bytes(struct.pack("<Q", struct.unpack("<Q", raw[:8])[0] - 9) + raw[8:])


def pickle(file):
    import torch

    torch.save({"w": torch.ones(300)}, file)


def padded(file):
    file.write_bytes(file.read_bytes() + b"\0" * 8)


def change(**entry):
    return lambda file: edit_header(file, lambda header: header["b"].update(entry))


@pytest.mark.parametrize(
    "damage, words",
    [
        (cut, ["cut", "b: ends at byte"]),
        (long_header, ["header claims", "download"]),
        (short_header, ["not JSON"]),
        (pickle, ["header claims"]),
        (padded, ["8 bytes after the last tensor"]),
        (lambda file: file.write_bytes(b"abc"), ["3 bytes is too short"]),
        (lambda file: file.unlink(), ["No such file"]),
        (change(dtype="I64"), ["b: dtype I64", "F32, F16, BF16"]),
        (change(shape=[6, 5, 9]), ["b: 960 bytes cannot hold F32"]),
        (change(data_offsets=[-4, 956]), ["b: 960 bytes cannot hold"]),
        (change(data_offsets=7), ["b: malformed entry"]),
    ],
)
def test_damaged_files_are_one_error_that_names_file_and_tensor(file, damage, words):
    # bytes after the data of "b" belong to "c"; the order in the file is by alignment, then name
    if damage is cut:
        save_file({"b": np.zeros(SHAPE, np.float32)}, file)
    damage(file)
    with pytest.raises(UserError) as error:
        read_header(str(file))
    assert str(file) in str(error.value) and all(word in str(error.value) for word in words), (
        error.value
    )


def test_a_file_that_shrinks_while_it_is_read_is_an_error(file):
    tensor = read_header(str(file))["b"]
    os.truncate(file, tensor.start + 100)
    with Reader() as reader, pytest.raises(UserError, match="ends inside b"):
        for job in reader.plan(tensor, [(((0, 6), (0, 5), (0, 8)), np.empty(SHAPE, np.float32))]):
            job()
