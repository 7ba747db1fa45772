"""The safetensors format: checked headers, exact byte ranges, streamed writing; never a whole file
in RAM.
"""

import dataclasses
import functools
import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from crossin_jax.config import UserError
from crossin_jax.files import allows, decode_text, join_some, parse_json
from crossin_jax.paths import as_path, is_bucket

DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
# Bytes per read: small enough for the cache, where the NaN check and the cast cost nothing more.
CHUNK = 4 << 20
MIN_REQUEST = (
    1 << 20
)  # bytes for which a bucket is asked; less is read together with what lies around
MAX_HEADER = 100_000_000  # bytes; the limit of the format's own reader
# The entry of a tensor in the header.
_ENTRY = {"dtype": str, "shape": list[int], "data_offsets": list[int]}
# the largest finite bit pattern is below infinity; a pattern above it is a NaN, of either sign
_INFINITY = {2: {"F16": 0x7C00, "BF16": 0x7F80}, 4: {"F32": 0x7F800000}}


@dataclasses.dataclass(frozen=True, slots=True)
class Tensor:
    """Where one tensor lies: `nbytes` of `dtype` from byte `start` of `file`."""

    name: str
    file: str
    code: str
    shape: tuple[int, ...]
    start: int
    nbytes: int

    @property
    def dtype(self) -> np.dtype:
        return DTYPES[self.code]

    def reshape(self, shape: Sequence[int]) -> "Tensor":
        assert math.prod(shape) == math.prod(self.shape), (
            f"{self.name}: {self.shape} cannot be read as {shape}"
        )
        return dataclasses.replace(self, shape=tuple(shape))

    def rows(self, start: int, stop: int) -> "Tensor":
        """The rows from `start` to `stop` of the first dimension."""
        size = self.nbytes // self.shape[0]
        shape = (stop - start, *self.shape[1:])
        return dataclasses.replace(
            self, shape=shape, start=self.start + start * size, nbytes=(stop - start) * size
        )


# A file is one header and then the bytes of all tensors, without gaps:
#
#     8 bytes: n │ n bytes of JSON │ data
#
#     {"norm.weight": {"dtype": "BF16", "shape": [4096], "data_offsets": [0, 8192]}, …}
#
# Offsets count from the start of the data, so this tensor begins at byte 8 + n of the file.
def read_header(path: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file by name; `UserError` where the file is cut, padded or not
    safetensors.
    """
    try:
        size = as_path(path).stat().st_size
        with as_path(path).open("rb") as file:
            start = file.read(8)
            if len(start) < 8:
                raise UserError(
                    f"{path}: {size} bytes is too short for a safetensors file; download it again"
                )
            (length,) = struct.unpack("<Q", start)
            if length > min(MAX_HEADER, size - 8):
                raise UserError(
                    f"{path}: its header claims {length} bytes but {size - 8} follow; it is cut "
                    "or not safetensors: download it again"
                )
            text = file.read(length)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    hint = "; the length in its first 8 bytes is wrong or this is not a safetensors file"
    place = f"{path}, its header"
    header = parse_json(decode_text(text, place), place, dict, "a header", hint)
    header.pop("__metadata__", None)
    tensors, faults = {}, []
    for name, entry in header.items():
        if not allows(dict[str, Any], entry) or not all(
            allows(annotation, entry.get(field)) for field, annotation in _ENTRY.items()
        ):
            faults.append(f"{name}: malformed entry {entry!r:.80}")
            continue
        code, shape, offsets = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        begin, end = offsets if len(offsets) == 2 else (-1, -1)
        if code not in DTYPES:
            faults.append(f"{name}: dtype {code}; this reads {', '.join(DTYPES)}")
        elif (
            end - begin != math.prod(shape) * DTYPES[code].itemsize
            or begin < 0
            or min(shape, default=0) < 0
        ):
            faults.append(f"{name}: {end - begin} bytes cannot hold {code} {shape}")
        elif 8 + length + end > size:
            faults.append(
                f"{name}: ends at byte {8 + length + end} of a file of {size}; it is cut, "
                "download it again"
            )
        else:
            tensors[name] = Tensor(name, path, code, shape, 8 + length + begin, end - begin)
    last = max((t.start + t.nbytes for t in tensors.values()), default=8 + length)
    if not faults and last != size:
        faults.append(
            f"{size - last} bytes after the last tensor; the header's length or offsets are wrong"
        )
    if faults:
        raise UserError(f"{path}: {join_some(faults)}")
    return tensors


Box = tuple[tuple[int, int], ...]  # (start, stop) of every dimension
Part = tuple[Box, np.ndarray]  # a box of a tensor and the array of its shape that receives it


def volume(box: Box) -> int:
    """Numbers in a box."""
    return math.prod(stop - start for start, stop in box)


class Reader:
    """Reads boxes of tensors into given arrays with a cast to their dtype; its reads may run in
    several threads.

    `with_nan` collects the names of tensors that hold a NaN.
    """

    def __init__(self) -> None:
        self._files: dict[str, int] = {}
        self.with_nan: set[str] = set()

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()

    # Two devices hold the left (x) and the right (o) half of a (4, 6) tensor:
    #
    #     x x x o o o       Their boxes fill one larger box, the hull. So whole rows are read, which
    #     x x x o o o       lie side by side in the file, and are split in memory. Box by box, every
    #     x x x o o o       row would cost two reads of three numbers.
    #     x x x o o o
    def plan(self, tensor: Tensor, parts: Sequence[Part]) -> Iterator[Callable[[], int]]:
        """Yields independent reads that fill `parts` and together touch each byte once; each
        returns its bytes.

        Boxes that tile one larger box (the shards of one host) are read as that box, so that a
        shard along the innermost dimension does not cost one read per row.
        """
        if not is_bucket(tensor.file) and tensor.file not in self._files:
            self._files[tensor.file] = os.open(tensor.file, os.O_RDONLY)
        parts = [(box, out) for box, out in parts if out.size]
        if not parts:
            return
        if not tensor.shape:
            tensor, parts = tensor.reshape((1,)), [(((0, 1),), out.reshape(1)) for _, out in parts]
        hull = tuple(
            (min(box[d][0] for box, _ in parts), max(box[d][1] for box, _ in parts))
            for d in range(len(tensor.shape))
        )
        if len(parts) > 1 and sum(out.size for _, out in parts) != volume(hull):
            for part in parts:
                yield from self.plan(tensor, [part])
            return
        # Of a bucket, rows are read whole: see `_fill`.
        row = math.prod(tensor.shape[1:]) if is_bucket(tensor.file) else volume(hull[1:])
        step = max(1, CHUNK // (row * tensor.dtype.itemsize))
        for start in range(*hull[0], step):
            rows = ((start, min(start + step, hull[0][1])), *hull[1:])
            yield functools.partial(self._read, tensor, rows, parts)

    def _read(self, tensor: Tensor, rows: Box, parts: Sequence[Part]) -> int:
        targets = []  # (where in the chunk, where it goes)
        for box, out in parts:
            low, high = max(rows[0][0], box[0][0]), min(rows[0][1], box[0][1])
            if low < high:
                inside = (
                    slice(low - rows[0][0], high - rows[0][0]),
                    *(
                        slice(b[0] - r[0], b[1] - r[0])
                        for b, r in zip(box[1:], rows[1:], strict=True)
                    ),
                )
                targets.append((inside, out[low - box[0][0] : high - box[0][0]]))
        shape = tuple(stop - start for start, stop in rows)
        direct = (
            len(targets) == 1
            and targets[0][1].shape == shape
            and targets[0][1].dtype == tensor.dtype
            and targets[0][1].flags.c_contiguous
        )
        chunk = targets[0][1] if direct else np.empty(shape, tensor.dtype)
        self._fill(tensor, rows, chunk)
        if has_nan(chunk, tensor.code):
            self.with_nan.add(tensor.name)
        if not direct:
            for inside, out in targets:
                out[...] = chunk[inside]
        return chunk.nbytes

    def _fill(self, tensor: Tensor, box: Box, chunk: np.ndarray) -> None:
        """Reads a box into a contiguous chunk, one read per contiguous run of the file."""
        shape, item = tensor.shape, tensor.dtype.itemsize
        inner = len(shape) - 1  # dimensions from `inner` on lie in one run
        while inner > 0 and box[inner] == (0, shape[inner]):
            inner -= 1
        strides = [math.prod(shape[d + 1 :]) * item for d in range(len(shape))]
        first = tensor.start + sum(
            start * stride for (start, _), stride in zip(box, strides, strict=True)
        )
        run = (box[inner][1] - box[inner][0]) * strides[inner]
        buffer = memoryview(chunk.reshape(-1).view(np.uint8))
        count = math.prod(stop - start for start, stop in box[:inner])
        if count > 1 and is_bucket(tensor.file) and run < MIN_REQUEST:
            self._fill_from_whole_rows(tensor, box, chunk)
            return
        for i, index in enumerate(np.ndindex(*(stop - start for start, stop in box[:inner]))):
            offset = first + sum(n * stride for n, stride in zip(index, strides, strict=False))
            self._pread(tensor, buffer[i * run : (i + 1) * run], offset)

    def _fill_from_whole_rows(self, tensor: Tensor, box: Box, chunk: np.ndarray) -> None:
        """Reads all between the first and the last number of a box, by one request, and keeps the
        box.
        """
        whole = ((box[0]), *((0, size) for size in tensor.shape[1:]))
        rows = np.empty([stop - start for start, stop in whole], tensor.dtype)
        self._fill(tensor, whole, rows)
        chunk[...] = rows[(slice(None), *(slice(*side) for side in box[1:]))]

    def _pread(self, tensor: Tensor, buffer: memoryview, offset: int) -> None:
        done = 0
        if is_bucket(tensor.file):
            data = as_path(tensor.file).read_range(offset, offset + len(buffer))
            if len(data) != len(buffer):
                raise UserError(
                    f"{tensor.file}: ends inside {tensor.name}; it changed while it was read"
                )
            buffer[:] = data
            return
        while done < len(buffer):
            count = os.preadv(self._files[tensor.file], [buffer[done:]], offset + done)
            if not count:
                raise UserError(
                    f"{tensor.file}: ends inside {tensor.name}; it changed while it was read"
                )
            done += count


# Read as integers, the bits of positive floats are in the order of the numbers: … < largest finite
# < infinity < NaN. So the largest integer says whether there is a NaN. As signed integers the
# positive NaNs are the largest, as unsigned ones the negative NaNs, whose first bit is 1.
def has_nan(array: np.ndarray, code: str) -> bool:
    """Whether a contiguous array of safetensors type `code` holds a NaN; two integer maxima, no
    temporary.
    """
    flat, size = array.reshape(-1), array.itemsize
    limit, sign = _INFINITY[size][code], 1 << (8 * size - 1)
    return bool(flat.view(f"i{size}").max() > limit or flat.view(f"u{size}").max() > (limit | sign))


def same_bytes(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal bit by bit."""
    if (a.code, a.shape) != (b.code, b.shape):
        return False
    with as_path(a.file).open("rb") as left, as_path(b.file).open("rb") as right:
        left.seek(a.start)
        right.seek(b.start)
        sizes = [CHUNK] * (a.nbytes // CHUNK) + [a.nbytes % CHUNK]
        return all(left.read(size) == right.read(size) for size in sizes)


def write_tensors(
    path: str,
    entries: Iterable[tuple[str, str, tuple[int, ...], Callable[[], np.ndarray]]],
    progress: Callable[[int], object] = lambda count: None,
) -> None:
    """Writes a safetensors file from (name, type code, shape, function that yields the array), one
    tensor at a time.
    """
    entries, header, end = list(entries), {"__metadata__": {"format": "pt"}}, 0
    for name, code, shape, _ in entries:
        begin, end = end, end + math.prod(shape) * DTYPES[code].itemsize
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with as_path(path).open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, code, shape, fetch in entries:
            array = np.ascontiguousarray(fetch())
            assert (array.dtype, array.size) == (DTYPES[code], math.prod(shape)), (
                f"{name}: {array.dtype} {array.shape}"
            )
            file.write(memoryview(array.reshape(-1).view(np.uint8)))
            progress(array.nbytes)
        if is_bucket(path):
            return
        file.flush()
        os.fsync(file.fileno())
