"""Host memory while a checkpoint of more than a gigabyte is loaded, measured in a process of its
own.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from crossin_jax.checkpoint.hf import read_tensors
from crossin_jax.checkpoint.hf_map import weight_keys
from crossin_jax.checkpoint.save import write_json, write_leaves
from crossin_jax.models.spec import spec_from_hf
from tests.checkpoint.checkpoints import LLAMA

BIG = {
    **LLAMA,
    "vocab_size": 16_000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 10,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 64,
}

LOAD = """
import json, sys, tracemalloc
import jax
from crossin_jax.checkpoint import weights as stream
from crossin_jax.checkpoint.hf import load_weights, read_spec
from crossin_jax.config import Lora, Mesh
from crossin_jax.parallel.mesh import make_mesh
from tests.checkpoint.abstract import abstract_transformer
folder, way, dtype = sys.argv[1:]
if way == "staged":
    stream.is_on_host = lambda boxes: False
jax.numpy.zeros(3).block_until_ready()
mesh = make_mesh(Mesh(fsdp=4, tensor=2)) if way == "sharded" else None
_, state = abstract_transformer(read_spec(folder), mesh, param_dtype=dtype, frozen_dtype=dtype)
if way == "staged":
    # these CPU devices stand for accelerators: what counts is what the loader allocates itself
    tracemalloc.start()
before = stream.resident_bytes()
state = load_weights(folder, state, progress=False)
shards = [shard.data for leaf in jax.tree.leaves(state) for shard in leaf.addressable_shards]
# replicas share a buffer
shards = {shard.unsafe_buffer_pointer(): shard.nbytes for shard in shards}
above = stream.peak_bytes() - before - sum(shards.values())
if way == "staged":
    above = tracemalloc.get_traced_memory()[1]
print(json.dumps({"above": above, "shards": sum(shards.values())}))
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A sharded bfloat16 checkpoint."""
    folder, spec = tmp_path_factory.mktemp("big"), spec_from_hf(BIG, "config.json")
    keys, rng = weight_keys(spec), np.random.default_rng(0)
    block = rng.integers(0, 0x3F80, 1 << 20, np.uint16).view(ml_dtypes.bfloat16)
    leaves = {
        path: np.resize(block, (10, *key.shape) if key.stacked else key.shape)
        for path, key in keys.items()
    }
    write_leaves(folder, leaves, keys, 10, shard_bytes=400_000_000, progress=False)
    write_json(folder / "config.json", BIG)
    tensors = read_tensors(folder)
    assert sum(tensor.nbytes for tensor in tensors.values()) > 1_000_000_000
    return folder, max(tensor.nbytes for tensor in tensors.values())


@pytest.mark.long
@pytest.mark.skipif(
    not os.path.exists("/proc/self/clear_refs"), reason="needs Linux's peak of resident memory"
)
@pytest.mark.parametrize(
    "way, dtype",
    [
        ("one_device", "bfloat16"),
        ("one_device", "float32"),
        ("sharded", "bfloat16"),
        ("staged", "bfloat16"),
    ],
)
def test_host_memory_above_the_shards_stays_within_one_and_a_half_tensors(checkpoint, way, dtype):
    folder, largest = checkpoint
    run = subprocess.run(
        [sys.executable, "-c", LOAD, str(folder), way, dtype],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).resolve().parents[2],
    )
    sizes = json.loads(run.stdout)
    assert sizes["shards"] > (2 if dtype == "float32" else 1) * 1_000_000_000
    print(f"{sizes['above'] / largest:.2f} x the largest tensor")
    assert sizes["above"] <= 1.5 * largest
