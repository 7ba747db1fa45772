"""Tensors of files onto the mesh: each process reads only the slices that its devices hold, one tensor at a time.

On CPU devices the buffer that receives the bytes is the array. On accelerators a stack of layers is allocated on the
device and written in pieces, so the host never holds more than about one tensor of the file.
"""

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

WORKERS = min(4, os.cpu_count() or 1)
Jobs = Iterable[Callable[[], int]]
# an abstract array with its tensors: one, or one per index of its first dimension
Wanted = tuple[jax.ShapeDtypeStruct, Sequence[Tensor]]


def load_arrays(wanted: Sequence[Wanted], place: str, *, progress: bool = True) -> list[jax.Array]:
    """Arrays of the wanted shapes, dtypes and shardings (None: the default device), filled from their tensors.

    Prints the predicted peak of host memory before and the measured one after; warns about tensors with NaN.
    """
    progress = progress and jax.process_index() == 0
    plans = [_boxes(abstract) for abstract, _ in wanted]
    largest = max((t.nbytes for _, tensors in wanted for t in tensors), default=0)
    to_read = sum(volume(box) * tensors[0].dtype.itemsize
                  for (_, tensors), boxes in zip(wanted, plans, strict=True) for box in boxes)
    reset_peak()
    if progress:
        resident = sum(volume(box) * abstract.dtype.itemsize
                       for (abstract, _), boxes in zip(wanted, plans, strict=True) if _is_host(boxes) for box in boxes)
        staging = 0 if all(map(_is_host, plans)) else largest
        predicted = resident_bytes() + resident + staging + WORKERS * CHUNK
        print(f"{place}: reading {_size(to_read)}; host memory will peak at about {_size(predicted)}", file=sys.stderr)
    with (Reader() as reader, ThreadPoolExecutor(WORKERS) as pool,
          tqdm(total=to_read, unit="B", unit_scale=True, desc="weights", disable=not progress, leave=False) as bar):

        def read(jobs: Jobs) -> None:
            for count in pool.map(lambda job: job(), jobs):
                bar.update(count)

        arrays = [_load(abstract, boxes, tensors, reader, read, largest)
                  for (abstract, tensors), boxes in zip(wanted, plans, strict=True)]
    if reader.with_nan:
        warnings.warn(f"{place}: NaN in {', '.join(summarize(sorted(reader.with_nan)))}; the file is damaged or the "
                      "training that wrote it diverged", stacklevel=2)
    if progress:
        print(f"{place}: host memory peaked at {_size(peak_bytes())}", file=sys.stderr)
    return arrays


def _boxes(abstract: jax.ShapeDtypeStruct) -> dict[Box, list[jax.Device]]:
    """The different slices that this process holds, each with its devices."""
    sharding = abstract.sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    boxes: dict[Box, list[jax.Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(abstract.shape).items():
        box = tuple(s.indices(n)[:2] for s, n in zip(index, abstract.shape, strict=True))
        boxes.setdefault(box, []).append(device)
    return boxes


def _is_host(boxes: dict[Box, list[jax.Device]]) -> bool:
    return all(device.platform == "cpu" for devices in boxes.values() for device in devices)


def _load(abstract: jax.ShapeDtypeStruct, boxes: dict[Box, list[jax.Device]], tensors: Sequence[Tensor],
          reader: Reader, read: Callable[[Jobs], None], largest: int) -> jax.Array:
    sharding = abstract.sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    stacked = len(abstract.shape) == len(tensors[0].shape) + 1
    assert abstract.shape == ((len(tensors),) if stacked else ()) + tensors[0].shape, (abstract, tensors[0])

    def piece(start: int, stop: int, dtype: np.dtype) -> jax.Array:
        """Rows start to stop of the first dimension of a stack, or the one tensor."""
        buffers = {box: _aligned_empty(((start, stop), *box[1:]) if stacked else box, dtype) for box in boxes}
        if stacked:
            read(job for i in range(start, stop)
                 for job in reader.plan(tensors[i], [(box[1:], out[i - start]) for box, out in buffers.items()]))
        else:
            read(reader.plan(tensors[0], list(buffers.items())))
        arrays = [jax.device_put(buffers[box], device) for box, devices in boxes.items() for device in devices]
        shape = (stop - start, *abstract.shape[1:]) if stacked else abstract.shape
        return jax.make_array_from_single_device_arrays(shape, sharding, arrays)

    stored = {tensor.dtype for tensor in tensors}
    stored = stored.pop() if len(stored) == 1 else abstract.dtype  # accelerators cast; their buses carry what is stored
    assert not stacked or all(box[0] == (0, len(tensors)) for box in boxes), "layers are never sharded"
    if _is_host(boxes):
        return piece(0, len(tensors), abstract.dtype)
    if not stacked:
        return _finish(_cast(piece(0, 1, stored), abstract.dtype, sharding))
    # the number of layers in a piece is the same on every process, which runs the same programs
    step = max(1, largest // 2 // max(1, tensors[0].nbytes))
    write = jax.jit(lambda stack, part, start: jax.lax.dynamic_update_slice_in_dim(
        stack, part.astype(stack.dtype), start, 0), donate_argnums=0, out_shardings=sharding)
    stack = jax.jit(lambda: jnp.zeros(abstract.shape, abstract.dtype), out_shardings=sharding)()
    in_flight = 0
    for start in range(0, len(tensors), step):
        stop = min(start + step, len(tensors))
        size = (stop - start) * tensors[0].nbytes
        if in_flight + size > largest:
            stack, in_flight = _finish(stack), 0
        stack, in_flight = write(stack, piece(start, stop, stored), start), in_flight + size
    return _finish(stack)


def _cast(array: jax.Array, dtype: np.dtype, sharding: jax.sharding.Sharding) -> jax.Array:
    return array if array.dtype == dtype else jax.jit(lambda x: x.astype(dtype), out_shardings=sharding)(array)


def _finish(array: jax.Array) -> jax.Array:
    """Waits until the host buffers behind an array are free again."""
    return array.block_until_ready()


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
