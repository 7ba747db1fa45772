"""The splash kernel, forward and backward, under the TPU compiler, with what each family asks of
it.
"""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from crossin_jax import config as settings
from crossin_jax.models.attention import Kernel, attend, choose_kernel
from crossin_jax.models.spec import spec_from_hf
from crossin_jax.models.transformer import with_remat
from crossin_jax.parallel.mesh import BATCH, make_mesh
from crossin_jax.plan.cost import kernel_flops
from crossin_jax.plan.topology import compile_program
from tests.models.published import CHECKPOINTS
from tests.parallel.tpu import topology

B, T = 4, 512


@pytest.mark.parametrize(
    ("name", "N", "K", "H"),
    [
        ("mistralai/Mistral-7B-v0.1", 4, 2, 128),  # every layer has the window
        ("google/gemma-2-9b", 4, 2, 256),  # windows in every other layer, soft cap
        # Windows in five of six; one key head over two shards of heads.
        (
            "google/gemma-3-1b-pt",
            4,
            1,
            256,
        ),
        ("Qwen/Qwen2.5-0.5B", 6, 3, 64),  # three key heads do not divide over two shards
        ("google/gemma-2b", 3, 1, 256),  # nor do three query heads
    ],
)
def test_compiles_with_what_the_family_asks(name, N, K, H):
    config = CHECKPOINTS[name][0] | {
        "num_attention_heads": N,
        "num_key_value_heads": K,
        "head_dim": H,
        "sliding_window": 200,
    }
    spec = spec_from_hf(config, name)
    slice_ = topology("v5e:2x2")
    mesh = make_mesh(settings.Mesh(fsdp=2, tensor=2), list(slice_.devices))
    assert choose_kernel("auto", spec, T, "bfloat16", "tpu").name == "splash"
    kernel, mixed = Kernel("splash", block=128), spec.local_layers and not all(spec.local_layers)

    def loss(q, k, v, positions, segments, is_local):
        out = attend(
            q,
            k,
            v,
            positions,
            segments,
            kernel=kernel,
            window=spec.window,
            is_local=is_local if mixed else None,
            soft_cap=spec.attention_soft_cap,
        )
        return out.astype(jnp.float32).sum()

    def arrays(shape, dtype, spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    rows = PartitionSpec(BATCH)
    q, k, v = (arrays((B, T, heads, H), jnp.bfloat16, rows) for heads in (N, K, K))
    ids = arrays((B, T), jnp.int32, rows)
    with jax.set_mesh(mesh):
        program = compile_program(
            jax.jit(jax.grad(loss, argnums=(0, 1, 2))),
            q,
            k,
            v,
            ids,
            ids,
            arrays((), bool, PartitionSpec()),
        )
    kernels = program.cost.kernels
    assert sorted(n.split("_segmented")[0] for n in kernels) == [
        "splash_mha_dkv",
        "splash_mha_dq",
        "splash_mha_fwd",
    ]
    assert set(kernels.values()) == {1}, "of two branches, one runs"

    # tiles of 128 x 128 in rows of four: all ten on and below the diagonal, or those that a window
    # of 200 reaches
    tiles = {True: 4 + 3 + 2, False: 10}
    mean = (
        sum(map(tiles.get, spec.local_layers)) / len(spec.local_layers) if spec.local_layers else 10
    )
    heads = N // 2 if N % 2 == 0 else N
    flops = kernel_flops(spec, kernel, kernels, B // 2, T, 2)
    assert flops == pytest.approx((2 + 4 + 3) * 2 * 128 * 128 * mean * H * (B // 2) * heads)


@pytest.mark.parametrize(("remat", "times"), [("attention", 1), ("dots", 1), ("full", 2)])
def test_a_policy_that_keeps_attention_runs_the_kernel_once(remat, times):
    """Where the context is not kept, the backward pass runs the kernel of a layer forward again."""
    mesh = make_mesh(settings.Mesh(), list(topology("v5e:1x1").devices))
    whole = NamedSharding(mesh, PartitionSpec())
    x = jax.ShapeDtypeStruct((1, 256, 2, 128), jnp.bfloat16, sharding=whole)
    ids = jax.ShapeDtypeStruct((1, 256), jnp.int32, sharding=whole)

    def loss(x, ids):
        def body(x, _):
            return jnp.sin(
                attend(
                    x,
                    x,
                    x,
                    ids,
                    ids,
                    kernel=Kernel("splash", block=128),
                    window=None,
                    is_local=None,
                    soft_cap=None,
                )
            ), None

        return jax.lax.scan(with_remat(body, remat), x, None, length=3)[0].astype(jnp.float32).sum()

    with jax.set_mesh(mesh):
        kernels = compile_program(jax.jit(jax.grad(loss)), x, ids).cost.kernels
    found = {name.split("_segmented")[0]: number for name, number in kernels.items()}
    assert found == {"splash_mha_fwd": 3 * times, "splash_mha_dkv": 3, "splash_mha_dq": 3}


def test_what_runs_in_the_kernel_is_counted_by_layer_share():
    spec = spec_from_hf(CHECKPOINTS["meta-llama/Llama-2-7b-hf"][0], "llama")
    count = functools.partial(kernel_flops, spec, rows=1, length=2048, shards=1)
    whole = count(Kernel("splash", block=2048), {"splash_mha_fwd_segmented": 1.0})
    assert whole == 2 * 2 * 2048**2 * 128 * 32  # one tile: nothing is skipped
    assert count(Kernel("splash", block=512), {"splash_mha_fwd": 1.0}) == whole * 10 / 16
    assert count(Kernel("reference"), {}) == 0
