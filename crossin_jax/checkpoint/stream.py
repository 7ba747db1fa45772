"""Tensors of files onto the mesh: each process reads only the slices that its devices hold, one tensor at a time.

On CPU devices the buffer that receives the bytes is the array. On accelerators a stack of layers is allocated on the
device and written in pieces, so the host never holds more than about one tensor of the file.
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

WORKERS = min(4, os.cpu_count() or 1)
Jobs = Iterable[Callable[[], int]]


@dataclasses.dataclass(frozen=True)
class Wanted:
    """An abstract array and its tensors: one, or one per index of its first dimension.

    Where the array is quantized, `scale` is the abstract array of its scales.
    """

    array: jax.ShapeDtypeStruct
    tensors: Sequence[Tensor]
    scale: jax.ShapeDtypeStruct | None = None

    @functools.cached_property
    def boxes(self) -> dict[Box, list[jax.Device]]:
        """The different slices that this process holds, each with its devices."""
        boxes: dict[Box, list[jax.Device]] = {}
        for device, index in sharding_of(self.array).addressable_devices_indices_map(self.array.shape).items():
            box = tuple(s.indices(n)[:2] for s, n in zip(index, self.array.shape, strict=True))
            boxes.setdefault(box, []).append(device)
        return boxes

    @property
    def is_adopted(self) -> bool:
        """Whether the buffers that are read into become the array: on CPU devices, unless it is quantized."""
        return self.scale is None and is_on_host(self.boxes)


WORTH_TELLING = 32 << 20  # bytes; less is read in a moment


def load_arrays(wanted: Sequence[Wanted], place: str, *, progress: bool = True) -> list[tuple[jax.Array, ...]]:
    """(array,) or (codes, scales) for each of the wanted, with its shape, dtype and sharding (None: default device).

    Prints the predicted peak of host memory before and the measured one after, where there is much to read; warns about
    tensors with NaN.
    """
    progress = progress and jax.process_index() == 0
    largest = max((t.nbytes for want in wanted for t in want.tensors), default=0)
    to_read = sum(volume(box) * want.tensors[0].dtype.itemsize for want in wanted for box in want.boxes)
    progress = progress and to_read >= WORTH_TELLING
    reset_peak()
    if progress:
        resident = sum(volume(box) * want.array.dtype.itemsize
                       for want in wanted if is_on_host(want.boxes) for box in want.boxes)
        staging = 0 if all(want.is_adopted for want in wanted) else largest
        print(f"{place}: reading {_size(to_read)}; host memory will peak at about "
              f"{_size(predict_peak(resident, staging))}", file=sys.stderr)
    with (Reader() as reader, ThreadPoolExecutor(WORKERS) as pool,
          tqdm(total=to_read, unit="B", unit_scale=True, desc="weights", disable=not progress, leave=False) as bar):

        def read(jobs: Jobs) -> None:
            for count in pool.map(lambda job: job(), jobs):
                bar.update(count)

        arrays = [_load(want, reader, read, largest) for want in wanted]
    if reader.with_nan:
        warnings.warn(f"{place}: NaN in {', '.join(summarize(sorted(reader.with_nan)))}; the file is damaged or the "
                      "training that wrote it diverged", stacklevel=2)
    if progress:
        print(f"{place}: host memory peaked at {_size(peak_bytes())}", file=sys.stderr)
    return arrays


def sharding_of(abstract: jax.ShapeDtypeStruct) -> jax.sharding.Sharding:
    """The sharding of an abstract array; the default device where it has none."""
    return abstract.sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])


def is_on_host(boxes: dict[Box, list[jax.Device]]) -> bool:
    """Whether all devices are CPU devices."""
    return all(device.platform == "cpu" for devices in boxes.values() for device in devices)


def _load(want: Wanted, reader: Reader, read: Callable[[Jobs], None], largest: int) -> tuple[jax.Array, ...]:
    array, tensors, boxes = want.array, want.tensors, want.boxes
    stacked = len(array.shape) == len(tensors[0].shape) + 1
    assert array.shape == ((len(tensors),) if stacked else ()) + tensors[0].shape, (array, tensors[0])
    assert not stacked or all(box[0] == (0, len(tensors)) for box in boxes), "layers are never sharded"

    def piece(start: int, stop: int, dtype: np.dtype) -> jax.Array:
        """Rows start to stop of the first dimension of a stack, or the one tensor."""
        buffers = {box: _aligned_empty(((start, stop), *box[1:]) if stacked else box, dtype) for box in boxes}
        if stacked:
            read(job for i in range(start, stop)
                 for job in reader.plan(tensors[i], [(box[1:], out[i - start]) for box, out in buffers.items()]))
        else:
            read(reader.plan(tensors[0], list(buffers.items())))
        parts = [jax.device_put(buffers[box], device) for box, devices in boxes.items() for device in devices]
        shape = (stop - start, *array.shape[1:]) if stacked else array.shape
        return jax.make_array_from_single_device_arrays(shape, sharding_of(array), parts)

    if want.is_adopted:
        return (piece(0, len(tensors), array.dtype),)
    stored = {tensor.dtype for tensor in tensors}
    stored = stored.pop() if len(stored) == 1 else np.dtype(np.float32)  # devices cast; the bus carries what is stored
    if not stacked:
        return jax.block_until_ready(jax.jit(functools.partial(_convert, scale=want.scale, array=array),
                                             out_shardings=_places(array, want.scale))(piece(0, 1, stored)))
    stacks = jax.jit(lambda: tuple(jnp.zeros(t.shape, t.dtype) for t in (array, want.scale) if t is not None),
                     out_shardings=_places(array, want.scale))()
    write = make_writer(array, want.scale)
    # the number of layers in a piece is the same on every process, which runs the same programs
    step = layers_at_once(tensors[0].nbytes, largest)
    in_flight = 0
    for start in range(0, len(tensors), step):
        stop = min(start + step, len(tensors))
        size = (stop - start) * tensors[0].nbytes
        if in_flight + size > largest:  # until then the host buffers of earlier pieces are in use
            stacks, in_flight = jax.block_until_ready(stacks), 0
        stacks, in_flight = write(stacks, piece(start, stop, stored), start), in_flight + size
    return jax.block_until_ready(stacks)


def layers_at_once(layer: int, largest: int) -> int:
    """Layers of a stack in one piece, by bytes of a layer and of the largest tensor in the files."""
    return max(1, largest // 2 // max(1, layer))


def make_writer(array: jax.ShapeDtypeStruct, scale: jax.ShapeDtypeStruct | None = None) -> Callable[..., tuple]:
    """The program (stacks, piece, first layer) -> stacks that converts a piece and writes it on the devices."""

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=_places(array, scale))
    def write(stacks: tuple[jax.Array, ...], part: jax.Array, start: int) -> tuple[jax.Array, ...]:
        of_part = scale and jax.ShapeDtypeStruct((part.shape[0], *scale.shape[1:]), scale.dtype)
        return tuple(jax.lax.dynamic_update_slice_in_dim(stack, new, start, 0)
                     for stack, new in zip(stacks, _convert(part, array, of_part), strict=True))

    return write


def _convert(part: jax.Array, array: jax.ShapeDtypeStruct, scale: jax.ShapeDtypeStruct | None) -> tuple[jax.Array, ...]:
    """(array,), or (codes, scales) of scales like `scale`."""
    if scale is None:
        return (part.astype(array.dtype),)
    return quantize(part, scale.shape, kind_of(array.dtype))


def _places(*targets: jax.ShapeDtypeStruct | None) -> tuple[jax.sharding.Sharding, ...]:
    return tuple(sharding_of(target) for target in targets if target is not None)


def _aligned_empty(box: Box, dtype: np.dtype) -> np.ndarray:
    """An array of a box's shape at a multiple of 64 bytes, which a CPU device adopts instead of copying."""
    count = volume(box) * np.dtype(dtype).itemsize
    raw = np.empty(count + 64, np.uint8)
    offset = -raw.ctypes.data % 64
    return raw[offset:offset + count].view(dtype).reshape([stop - start for start, stop in box])


def _size(count: float) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def _status(field: str) -> int | None:
    """A size from Linux's process status, in bytes."""
    try:
        with open("/proc/self/status") as file:
            return next((int(line.split()[1]) * 1024 for line in file if line.startswith(field)), None)
    except OSError:
        return None


def predict_peak(resident: int, staging: int) -> int:
    """Host memory that a load will take: what the process holds, what stays on the host, and what passes through it.

    `staging` is the largest tensor where arrays go to accelerators, else 0.
    """
    return resident_bytes() + resident + staging + WORKERS * CHUNK


def resident_bytes() -> int:
    """This process's resident memory; 0 where the system does not say."""
    return _status("VmRSS") or 0


def peak_bytes() -> int:
    """The peak of this process's resident memory: since the last load began on Linux, since its start elsewhere."""
    scale = 1 if sys.platform == "darwin" else 1024
    return _status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def reset_peak() -> None:
    """Makes `peak_bytes` count from now on, where the system can."""
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:  # not Linux, or not allowed: the peak then counts from the start of the process
        return
