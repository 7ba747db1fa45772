"""From files to the mesh: each process reads only the slices that its devices hold, one tensor at
a time.

On CPU devices the buffer that receives the bytes is the array. On accelerators a stack of layers is
allocated on the device and written in pieces, so the host never holds more than about one tensor of
the file.
"""

import dataclasses
import functools
import os
import resource
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from crossin_jax.checkpoint.hf_map import summarize
from crossin_jax.checkpoint.tensors import CHUNK, Box, Reader, Tensor, volume
from crossin_jax.models.quantize import kind_of, quantize
from crossin_jax.paths import is_bucket

SINGLE = "model.safetensors"
REQUESTS = 32  # to a bucket, at a time
WORKERS = min(4, os.cpu_count() or 1)
Jobs = Iterable[Callable[[], int]]


@dataclasses.dataclass(frozen=True)
class LoadRequest:
    """An abstract array and its tensors: one, or one per index of its first dimension.

    Where the array is quantized, `scale` is the abstract array of its scales.
    """

    array: jax.ShapeDtypeStruct
    tensors: Sequence[Tensor]
    scale: jax.ShapeDtypeStruct | None = None

    # An (8, 4) weight whose rows are sharded over fsdp=2, on a mesh with data=2, has two boxes:
    #
    #     ((0, 4), (0, 4))   devices 0 and 2        ((4, 8), (0, 4))   devices 1 and 3
    @functools.cached_property
    def boxes(self) -> dict[Box, list[jax.Device]]:
        """The different slices that this process holds, each with its devices."""
        # Devices with the same slice, such as those along a "data" axis, share one buffer on the
        # host.
        boxes: dict[Box, list[jax.Device]] = {}
        for device, index in (
            sharding_of(self.array).addressable_devices_indices_map(self.array.shape).items()
        ):
            box = tuple(s.indices(n)[:2] for s, n in zip(index, self.array.shape, strict=True))
            boxes.setdefault(box, []).append(device)
        return boxes

    @property
    def is_zero_copy(self) -> bool:
        """Whether the buffers that are read into become the array: on CPU devices, unless it is
        quantized.
        """
        return self.scale is None and is_on_host(self.boxes)


# Bytes from which a load prints its memory; less is read in a moment.
WORTH_TELLING = 32 << 20


def load_arrays(
    requests: Sequence[LoadRequest], place: str, *, progress: bool = True
) -> list[tuple[jax.Array, ...]]:
    """(array,) or (codes, scales) for each request, with its shape, dtype and sharding (None:
    default device).

    Prints the predicted peak of host memory before and the measured one after, where there is much
    to read; warns about tensors with NaN.
    """
    progress = progress and jax.process_index() == 0
    largest = max((t.nbytes for request in requests for t in request.tensors), default=0)
    to_read = sum(
        volume(box) * request.tensors[0].dtype.itemsize
        for request in requests
        for box in request.boxes
    )
    progress = progress and to_read >= WORTH_TELLING
    # A request to a bucket takes long to begin, so many are under way at a time.
    is_remote = any(is_bucket(request.tensors[0].file) for request in requests)
    workers = REQUESTS if is_remote else WORKERS
    # The prediction is printed before, and the peak after: if they differ by much, report it.
    reset_peak()
    if progress:
        resident = sum(
            volume(box) * request.array.dtype.itemsize
            for request in requests
            if is_on_host(request.boxes)
            for box in request.boxes
        )
        staging = 0 if all(request.is_zero_copy for request in requests) else largest
        print(
            f"{place}: reading {_size(to_read)}; host memory will peak at about "
            f"{_size(predict_peak(resident, staging, workers))}",
            file=sys.stderr,
        )
    with (
        Reader() as reader,
        ThreadPoolExecutor(workers) as pool,
        tqdm(
            total=to_read,
            unit="B",
            unit_scale=True,
            desc="weights",
            disable=not progress,
            leave=False,
        ) as bar,
    ):
        # Threads read different parts of one tensor at a time; together they fill the bus of a fast
        # disk.
        def read(jobs: Jobs) -> None:
            for count in pool.map(lambda job: job(), jobs):
                bar.update(count)

        arrays = [_load(request, reader, read, largest) for request in requests]
    if reader.with_nan:
        warnings.warn(
            f"{place}: NaN in {', '.join(summarize(sorted(reader.with_nan)))}; the file is "
            "damaged or the training that wrote it diverged",
            stacklevel=2,
        )
    if progress:
        print(f"{place}: host memory peaked at {_size(peak_bytes())}", file=sys.stderr)
    return arrays


def sharding_of(abstract: jax.ShapeDtypeStruct) -> jax.sharding.Sharding:
    """The sharding of an abstract array; the default device where it has none."""
    return abstract.sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])


def is_on_host(boxes: dict[Box, list[jax.Device]]) -> bool:
    """Whether all devices are CPU devices."""
    return all(device.platform == "cpu" for devices in boxes.values() for device in devices)


# Three ways, from the cheapest to the most careful:
#   CPU, not quantized    the buffer that receives the bytes becomes the array: no copy at all
#   one tensor            one buffer on the host; the device casts or quantizes it
#   a stack of layers     zeros on the device, and a few layers at a time written into them
def _load(
    request: LoadRequest, reader: Reader, read: Callable[[Jobs], None], largest: int
) -> tuple[jax.Array, ...]:
    array, scale = request.array, request.scale
    tensors, boxes = request.tensors, request.boxes
    stacked = len(array.shape) == len(tensors[0].shape) + 1
    assert array.shape == ((len(tensors),) if stacked else ()) + tensors[0].shape, (
        array,
        tensors[0],
    )
    assert not stacked or all(box[0] == (0, len(tensors)) for box in boxes), (
        "layers are never sharded"
    )

    def piece(start: int, stop: int, dtype: np.dtype) -> jax.Array:
        """Rows start to stop of the first dimension of a stack, or the one tensor."""
        buffers = {
            box: _aligned_empty(((start, stop), *box[1:]) if stacked else box, dtype)
            for box in boxes
        }
        if stacked:
            read(
                job
                for i in range(start, stop)
                for job in reader.plan(
                    tensors[i], [(box[1:], out[i - start]) for box, out in buffers.items()]
                )
            )
        else:
            read(reader.plan(tensors[0], list(buffers.items())))
        parts = [
            jax.device_put(buffers[box], device)
            for box, devices in boxes.items()
            for device in devices
        ]
        shape = (stop - start, *array.shape[1:]) if stacked else array.shape
        return jax.make_array_from_single_device_arrays(shape, sharding_of(array), parts)

    if request.is_zero_copy:
        return (piece(0, len(tensors), array.dtype),)
    # The device casts, so the bus carries what is stored. Layers of different types meet in
    # float32.
    types = {tensor.dtype for tensor in tensors}
    stored = types.pop() if len(types) == 1 else np.dtype(np.float32)
    if not stacked:
        return jax.block_until_ready(
            jax.jit(
                functools.partial(_convert, scale=scale, array=array),
                out_shardings=_places(array, scale),
            )(piece(0, 1, stored))
        )
    stacks = jax.jit(
        lambda: tuple(jnp.zeros(t.shape, t.dtype) for t in (array, scale) if t is not None),
        out_shardings=_places(array, scale),
    )()
    write = make_writer(array, scale)
    # Every process runs the same programs, so the number of layers in a piece is the same
    # everywhere.
    step = layers_at_once(tensors[0].nbytes, largest)
    in_flight = 0
    for start in range(0, len(tensors), step):
        stop = min(start + step, len(tensors))
        size = (stop - start) * tensors[0].nbytes
        # The host buffers of earlier pieces are in use until their copies end. Waiting here keeps
        # them, together, below the largest tensor.
        if in_flight + size > largest:
            stacks, in_flight = jax.block_until_ready(stacks), 0
        stacks, in_flight = write(stacks, piece(start, stop, stored), start), in_flight + size
    return jax.block_until_ready(stacks)


# Llama-2-7B in bfloat16: the largest tensor is the embedding with 250 MiB, and q_proj has 32 MiB
# per layer. So a piece has 250 / 2 / 32 → 3 layers, and two pieces can be under way.
def layers_at_once(layer: int, largest: int) -> int:
    """Layers of a stack in one piece, by bytes of a layer and of the largest tensor in the
    files.
    """
    return max(1, largest // 2 // max(1, layer))


def make_writer(
    array: jax.ShapeDtypeStruct, scale: jax.ShapeDtypeStruct | None = None
) -> Callable[..., tuple]:
    """The program (stacks, piece, first layer) -> stacks that converts a piece and writes it on the
    devices.
    """

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=_places(array, scale))
    def write(stacks: tuple[jax.Array, ...], part: jax.Array, start: int) -> tuple[jax.Array, ...]:
        of_part = scale and jax.ShapeDtypeStruct((part.shape[0], *scale.shape[1:]), scale.dtype)
        return tuple(
            jax.lax.dynamic_update_slice_in_dim(stack, new, start, 0)
            for stack, new in zip(stacks, _convert(part, array, of_part), strict=True)
        )

    return write


def _convert(
    part: jax.Array, array: jax.ShapeDtypeStruct, scale: jax.ShapeDtypeStruct | None
) -> tuple[jax.Array, ...]:
    """(array,), or (codes, scales) of scales like `scale`."""
    if scale is None:
        return (part.astype(array.dtype),)
    return quantize(part, scale.shape, kind_of(array.dtype))


def _places(*targets: jax.ShapeDtypeStruct | None) -> tuple[jax.sharding.Sharding, ...]:
    return tuple(sharding_of(target) for target in targets if target is not None)


def _aligned_empty(box: Box, dtype: np.dtype) -> np.ndarray:
    """An array of a box's shape at a multiple of 64 bytes, which a CPU device adopts instead of
    copying.
    """
    count = volume(box) * np.dtype(dtype).itemsize
    # NumPy aligns to 16 bytes. JAX copies a buffer that is not aligned to 64, which would double
    # the memory.
    raw = np.empty(count + 64, np.uint8)
    offset = -raw.ctypes.data % 64
    return raw[offset : offset + count].view(dtype).reshape([stop - start for start, stop in box])


def _size(count: float) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def _status(field: str) -> int | None:
    """A size from Linux's process status, in bytes."""
    try:
        with open("/proc/self/status") as file:
            return next(
                (int(line.split()[1]) * 1024 for line in file if line.startswith(field)), None
            )
    except OSError:
        return None


def predict_peak(resident: int, staging: int, workers: int = WORKERS) -> int:
    """Host memory that a load will take: what the process holds, what stays on the host, and what
    passes through it.

    `staging` is the largest tensor where arrays go to accelerators, else 0.
    """
    return resident_bytes() + resident + staging + workers * CHUNK


def resident_bytes() -> int:
    """This process's resident memory; 0 where the system does not say."""
    return _status("VmRSS") or 0


def peak_bytes() -> int:
    """The peak of this process's resident memory: since the last load began on Linux, since its
    start elsewhere.
    """
    scale = 1 if sys.platform == "darwin" else 1024
    return _status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def reset_peak() -> None:
    """Makes `peak_bytes` count from now on, where the system can."""
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        # Not Linux, or not allowed: the peak then counts from the start of the process.
        return
