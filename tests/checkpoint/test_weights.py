"""How a checkpoint goes to the devices: in pieces of a bounded size, announced in bytes."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crossin_jax.checkpoint import weights as stream
from crossin_jax.checkpoint.tensors import CHUNK, CODES, read_header, write_tensors
from crossin_jax.checkpoint.weights import LoadRequest, layers_at_once, load_arrays, predict_peak
from crossin_jax.models.quantize import quantize

MIB = 1 << 20


@given(st.integers(1, 1000), st.integers(1, 100_000))
def test_a_piece_is_at_most_half_of_the_largest_tensor(layer, largest):
    """As many layers as half of it holds, and at least one."""
    layers = layers_at_once(layer, largest)
    assert layers == 1 or layers * layer <= largest / 2
    assert (layers + 1) * layer > largest // 2


def test_the_peak_is_what_is_there_stays_and_passes(monkeypatch):
    """What the process holds, the arrays, the largest tensor, and a read in every thread."""
    monkeypatch.setattr(stream, "resident_bytes", lambda: 1000)
    assert predict_peak(20, 3) == 1000 + 20 + 3 + stream.WORKERS * CHUNK


def write(path, arrays):
    """A file of arrays by name; returns its tensors."""
    entries = [
        (name, CODES[array.dtype], array.shape, lambda array=array: array)
        for name, array in arrays.items()
    ]
    write_tensors(str(path), entries)
    return read_header(str(path))


@pytest.mark.parametrize(("staged", "peak"), [(False, 4 + 2), (True, 8)])
def test_what_will_be_read_and_held_is_announced(tmp_path, monkeypatch, capfd, staged, peak):
    """On the host the arrays stay, in their precision; for a device the largest tensor passes."""
    monkeypatch.setattr(stream, "WORTH_TELLING", 0)
    monkeypatch.setattr(stream, "resident_bytes", lambda: 0)
    if staged:
        monkeypatch.setattr(stream, "is_on_host", lambda boxes: False)
    tensors = write(
        tmp_path / "x", {"a": np.ones((2, MIB), np.float32), "b": np.ones((1, MIB), np.float32)}
    )
    wanted = [
        LoadRequest(jax.ShapeDtypeStruct(tensor.shape, jnp.bfloat16), [tensor])
        for tensor in tensors.values()
    ]
    load_arrays(wanted, "here")
    first = capfd.readouterr().err.splitlines()[0]
    threads = stream.WORKERS * CHUNK // MIB
    assert first == f"here: reading 12 MiB; host memory will peak at about {peak + threads} MiB"
    load_arrays(wanted, "here", progress=False)
    assert not capfd.readouterr().err


@pytest.mark.parametrize("kind", ["int8", "nf4"])
@pytest.mark.parametrize("dtypes", [("float32", "bfloat16"), ("float16",) * 2, ("bfloat16",) * 2])
def test_layers_are_quantized_from_the_precision_that_they_are_stored_in(tmp_path, kind, dtypes):
    """Seven layers, some of them in another precision, in pieces of two."""
    layers = np.random.default_rng(0).standard_normal((7, 3, 64)).astype(np.float32)
    stored = {
        f"layer{i}": layer.astype(ml_dtypes.bfloat16 if name == "bfloat16" else name)
        for i, layer in enumerate(layers)
        for name in [dtypes[i % 2]]
    }
    tensors = write(tmp_path / "x", stored | {"large": np.zeros((12, 64), np.float32)})
    scale_shape, dtype = ((7, 3), jnp.int8) if kind == "int8" else ((7, 3, 1), jnp.uint4)
    scale = jax.ShapeDtypeStruct(scale_shape, jnp.float32 if kind == "int8" else jnp.bfloat16)
    wanted = LoadRequest(
        jax.ShapeDtypeStruct((7, 3, 64), dtype), [tensors[name] for name in stored], scale
    )
    large = LoadRequest(jax.ShapeDtypeStruct((12, 64), jnp.float32), [tensors["large"]])
    (codes, scales), (whole,) = load_arrays([wanted, large], "here", progress=False)
    exact = jnp.stack([jnp.asarray(array.astype(np.float32)) for array in stored.values()])
    expected_codes, expected_scales = quantize(exact, scale_shape, kind)
    np.testing.assert_array_equal(np.asarray(codes), np.asarray(expected_codes))
    np.testing.assert_array_equal(np.asarray(scales), np.asarray(expected_scales))
    assert not np.asarray(whole).any()
