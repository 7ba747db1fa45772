"""Two processes: each reads only its part of the bytes, and together they write the whole model."""

import json
import socket
import subprocess
import sys
from pathlib import Path

from crossin_jax.checkpoint.hf import read_tensors, same_bytes
from tests.checkpoint.checkpoints import write_checkpoint

HOST = """
import json, os, sys
process, port, source, target = int(sys.argv[1]), *sys.argv[2:]
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
import jax
jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=process)
from crossin_jax.checkpoint import weights as stream
from crossin_jax.checkpoint.hf import load_weights, read_spec, state_leaves
from crossin_jax.checkpoint.save import save_model
from crossin_jax.config import Mesh
from crossin_jax.parallel.mesh import make_mesh
from tests.checkpoint.abstract import abstract_transformer
counts, preadv = [], os.preadv
os.preadv = lambda *args: counts.append(preadv(*args)) or counts[-1]
spec = read_spec(source)
totals = {}
for way in ("adopted", "staged"):
    if way == "staged":
        stream.is_on_host = lambda boxes: False
    _, state = abstract_transformer(spec, make_mesh(Mesh(fsdp=4)), param_dtype="bfloat16")
    counts.clear()
    state = load_weights(source, state, progress=False)
    totals[way] = sum(counts)
    save_model(os.path.join(target, way), spec, state, source=source, progress=False)
shared = sum(leaf.nbytes for path, leaf in state_leaves(state).items() if leaf.is_fully_replicated)
print(json.dumps({"read": totals, "replicated": shared}))
"""


def test_two_hosts(tmp_path):
    write_checkpoint(tmp_path / "m", shard_bytes=9000)
    before = read_tensors(tmp_path / "m")
    total = sum(tensor.nbytes for tensor in before.values())
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", HOST, str(i), str(port), str(tmp_path / "m"), str(tmp_path)],
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).resolve().parents[2],
        )
        for i in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0]
    for output in outputs:
        sizes = json.loads(output.splitlines()[-1])
        assert 0 < sizes["replicated"] < total / 50
        for read in sizes["read"].values():  # half of what is sharded, all of what is not
            assert read == (total - sizes["replicated"]) // 2 + sizes["replicated"]
    for way in ("adopted", "staged"):
        after = read_tensors(tmp_path / way)
        assert after.keys() == before.keys() and all(
            same_bytes(before[name], after[name]) for name in before
        )
