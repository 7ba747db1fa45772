"""Every kernel equals the reference, packed equals unpacked, and a kernel that cannot serve is
refused by name.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from crossin_jax import config as settings
from crossin_jax.config import UserError
from crossin_jax.models.attention import (
    KERNELS,
    Kernel,
    attend,
    attend_cached,
    choose_kernel,
    tile,
)
from crossin_jax.models.cpu import MIN_BLOCK_QUERIES, cut
from crossin_jax.parallel.mesh import make_mesh
from crossin_jax.plan.cost import kernel_flops
from tests.models.models import GEMMA, LLAMA, make_rows

REFERENCE, SPLASH = Kernel("reference"), Kernel("splash", block=128, interpret=True)
BLOCKS = Kernel("blocks")
T, H = 256, 16


def make_inputs(N, K, batch=2, seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    q, k, v = (
        jax.random.normal(key, (batch, T, heads, H))
        for key, heads in zip(keys, (N, K, K), strict=True)
    )
    return q * H**-0.5, k, v, *make_rows(batch, T, seed)


def plain_attention(q, k, v, positions, segments, window, soft_cap):
    """Written out token by token in numpy float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out, group = np.zeros_like(q), q.shape[2] // k.shape[2]
    for b, t, n in np.ndindex(q.shape[:3]):
        seen = [
            s
            for s in range(q.shape[1])
            if segments[b, s] == segments[b, t]
            and 0 <= positions[b, t] - positions[b, s] < (window or 10**9)
        ]
        scores = k[b, seen, n // group] @ q[b, t, n]
        scores = soft_cap * np.tanh(scores / soft_cap) if soft_cap else scores
        weights = np.exp(scores - scores.max())
        out[b, t, n] = weights / weights.sum() @ v[b, seen, n // group]
    return out


@pytest.mark.parametrize(("window", "soft_cap"), [(None, None), (7, 0.8)])
def test_reference_is_attention_written_out(window, soft_cap):
    q, k, v, positions, segments = (x[:, :24] for x in make_inputs(4, 2))
    positions, segments = make_rows(2, 24)
    got = attend(
        q,
        k,
        v,
        positions,
        segments,
        kernel=REFERENCE,
        window=window,
        is_local=None,
        soft_cap=soft_cap,
    )
    np.testing.assert_allclose(
        got, plain_attention(q, k, v, positions, segments, window, soft_cap), atol=1e-5
    )


@pytest.mark.parametrize("kernel", [SPLASH, BLOCKS])
@pytest.mark.parametrize(
    ("N", "K", "window", "is_local", "soft_cap"),
    [
        (4, 4, None, None, None),
        (4, 2, None, None, 0.8),
        (4, 1, 40, None, None),
        (2, 1, 40, True, 0.8),
        (2, 1, 40, False, None),
    ],
)
def test_kernels_and_their_gradients_equal_the_reference_on_packed_rows(
    kernel, N, K, window, is_local, soft_cap
):
    q, k, v, positions, segments = make_inputs(N, K)
    local = None if is_local is None else jnp.asarray(is_local)

    @functools.partial(jax.jit, static_argnames="kernel")
    def run(q, k, v, kernel):
        def total(*qkv):
            out = attend(
                *qkv,
                positions,
                segments,
                kernel=kernel,
                window=window,
                is_local=local,
                soft_cap=soft_cap,
            )
            return jnp.sum(jnp.sin(out)), out

        (_, out), grads = jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True)(q, k, v)
        return out, grads

    same = functools.partial(np.testing.assert_allclose, atol=2e-5)
    jax.tree.map(same, run(q, k, v, kernel), run(q, k, v, REFERENCE))


@pytest.mark.parametrize("length", [100, 128, 300, 1100])
def test_blocks_cover_every_key_once_whatever_the_length(length):
    for window in (None, 1, 50, 129, 5000):
        back = np.subtract.outer(np.arange(length), np.arange(length))
        met = np.zeros((length, length), int)
        for queries, keys in cut(length, window):
            met[queries, keys] += 1
        assert met.max() == 1 and met[(back >= 0) & (back < (window or length))].all()
        # Keys after a block are not met.
        assert window is not None or length <= MIN_BLOCK_QUERIES or met.mean() < 0.8
    q, k, v, *_ = make_inputs(2, 1, batch=1)
    q, k, v = (jnp.tile(x, (1, 5, 1, 1))[:, :length] for x in (q, k, v))
    got, expected = (
        attend(
            q, k, v, *make_rows(1, length), kernel=kernel, window=90, is_local=None, soft_cap=None
        )
        for kernel in (BLOCKS, REFERENCE)
    )
    np.testing.assert_allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("N", "K", "window", "is_local"), [(4, 2, None, None), (4, 1, 40, None), (2, 1, 40, True)]
)
def test_the_options_given_to_cudnn_mean_the_reference_on_packed_rows(N, K, window, is_local):
    q, k, v, positions, segments = make_inputs(N, K)
    rules = {
        "window": window,
        "is_local": None if is_local is None else jnp.asarray(is_local),
        "soft_cap": None,
    }
    got, expected = (
        attend(q, k, v, positions, segments, kernel=kernel, **rules)
        for kernel in (Kernel("cudnn", interpret=True), REFERENCE)
    )
    np.testing.assert_allclose(np.asarray(got)[segments > 0], expected[segments > 0], atol=2e-5)


def test_splash_on_a_mesh_equals_the_reference_and_repeats_heads_that_do_not_divide():
    mesh = make_mesh(settings.Mesh(data=2, fsdp=2, tensor=2))
    for K in (2, 1):
        q, k, v, positions, segments = make_inputs(4, K, batch=4)
        q = jax.device_put(q, NamedSharding(mesh, PartitionSpec(("data", "fsdp"), None, "tensor")))
        rules = {"window": None, "is_local": None, "soft_cap": None}
        with jax.set_mesh(mesh):
            got = jax.jit(functools.partial(attend, kernel=SPLASH, **rules))(
                q, k, v, positions, segments
            )
        expected = attend(q, k, v, positions, segments, kernel=REFERENCE, **rules)
        documents = segments > 0  # what padding sees differs between kernels, and nothing reads it
        np.testing.assert_allclose(np.asarray(got)[documents], expected[documents], atol=2e-5)


@pytest.mark.parametrize(
    ("window", "is_local", "soft_cap"),
    [(None, None, None), (6, None, None), (6, True, 0.8), (6, False, None)],
)
def test_a_cache_is_attended_to_by_the_positions_that_it_stores(window, is_local, soft_cap):
    """In whatever order slots lie: what is stored, not later, and within the window."""
    rng = np.random.default_rng(0)
    slots, new = 20, 3
    q, k, v = (
        rng.standard_normal(shape).astype(np.float32)
        for shape in ((2, new, 4, 8), (2, 2, slots, 8), (2, 2, slots, 8))
    )
    stored = np.stack([rng.permutation([*range(12), *[-1] * 8]), rng.permutation([*range(20)])])
    at = np.array([[11, 12, 13], [4, 5, 0]])
    local = None if is_local is None else jnp.asarray(is_local)
    got = attend_cached(q, k, v, at, stored, window=window, is_local=local, soft_cap=soft_cap)
    reach = window if window and is_local is not False else 10**9
    for b, t, n in np.ndindex(2, new, 4):
        seen = [
            s for s in range(slots) if stored[b, s] >= 0 and 0 <= at[b, t] - stored[b, s] < reach
        ]
        scores = k[b, n // 2, seen].astype(np.float64) @ q[b, t, n]
        scores = soft_cap * np.tanh(scores / soft_cap) if soft_cap else scores
        weights = np.exp(scores - scores.max())
        expected = weights / weights.sum() @ v[b, n // 2, seen]
        np.testing.assert_allclose(np.asarray(got)[b, t, n], expected, atol=1e-5)


@pytest.mark.parametrize(
    ("block", "length", "expected"),
    [
        (512, 256, 256),
        (512, 512, 512),
        (512, 768, 384),
        (512, 640, 128),
        (256, 1024, 256),
        (1024, 2048, 1024),
        (300, 1536, 256),
        (64, 256, 128),
        (2048, 1920, 1920),
    ],
)
def test_a_tile_divides_the_row(block, length, expected):
    """The largest multiple of 128 up to the kernel's own that does."""
    assert tile(Kernel("splash", block=block), length) == expected


def test_a_tile_that_the_row_makes_smaller_gives_the_same(monkeypatch):
    """Rows of 384 under a kernel of 256: three tiles of 128."""
    q, k, v, *_ = make_inputs(2, 1, batch=1)
    q, k, v = (jnp.tile(x, (1, 2, 1, 1))[:, :384] for x in (q, k, v))
    positions, segments = make_rows(1, 384, 3)
    rules = {"window": None, "is_local": None, "soft_cap": None}
    kernel = Kernel("splash", block=256, interpret=True)
    got, expected = (
        attend(q, k, v, positions, segments, kernel=which, **rules) for which in (kernel, REFERENCE)
    )
    np.testing.assert_allclose(got, expected, atol=2e-5)


def test_flops_of_a_kernel_are_those_of_the_tiles_that_it_visits():
    """Tiles on or below the diagonal that the window reaches, by hand, for every layer's rule."""
    local = dataclasses.replace(
        GEMMA, head_width=64, num_heads=4, window=200, local_layers=(True, False, True)
    )
    calls = {
        "splash_mha_fwd_residuals": 6.0,
        "splash_mha_dkv": 3.0,
        "splash_mha_dq": 3.0,
        "other": 9.0,
    }
    products = 6 * 2 + 3 * 4 + 3 * 3
    for block, length in ((128, 512), (256, 1024), (128, 384)):

        def visited(window, block=block, length=length):
            return sum(
                any(
                    0 <= q - k < window
                    for q in range(i * block, (i + 1) * block)
                    for k in range(j * block, (j + 1) * block)
                )
                for i in range(length // block)
                for j in range(length // block)
            )

        for spec, tiles in (
            (local, (2 * visited(200) + visited(length)) / 3),
            (dataclasses.replace(local, local_layers=(True,) * 3), visited(200)),
            (dataclasses.replace(local, local_layers=(), window=None), visited(length)),
        ):
            for shards, heads in ((1, 4), (2, 2), (3, 4)):  # heads that do not divide stay whole
                found = kernel_flops(spec, Kernel("splash", block=block), calls, 5, length, shards)
                assert found == pytest.approx(products * 2 * tiles * block**2 * 64 * 5 * heads)


def test_auto_takes_the_kernel_of_the_platform_where_it_can_serve():
    wide = dataclasses.replace(LLAMA, head_width=64)
    gemma2 = dataclasses.replace(GEMMA, head_width=64)
    cases = [
        (wide, 256, "tpu", "splash"),
        (wide, 250, "tpu", "reference"),
        (wide, 256, "gpu", "cudnn"),
        (gemma2, 256, "gpu", "reference"),
        (gemma2, 256, "tpu", "splash"),
        (wide, 250, "cpu", "blocks"),
    ]
    for spec, length, platform, name in cases:
        assert choose_kernel("auto", spec, length, "bfloat16", platform).name == name
    assert choose_kernel("auto", wide, 256, "float32", "gpu").name == "reference"
    assert choose_kernel("auto", wide, 256, "bfloat16", "rocm").name == "reference"
    widest = dataclasses.replace(LLAMA, head_width=256)
    for spec, length in ((wide, 2), (widest, 256)):  # the limits themselves are within
        assert choose_kernel("auto", spec, length, "bfloat16", "cuda") == Kernel("cudnn")
    for asked in ("auto", "cudnn"):
        too_wide = dataclasses.replace(LLAMA, head_width=264)
        assert choose_kernel(asked, too_wide, 256, "bfloat16", "gpu", required=False) == REFERENCE
    assert choose_kernel("splash:384", wide, 768, "float32", "tpu") == Kernel("splash", 384)
    assert choose_kernel("splash", wide, 768, "float32", "tpu") == Kernel("splash", 512)
    for platform in ("cpu", "tpu", "gpu"):
        assert choose_kernel("reference", wide, 251, "float32", platform) == REFERENCE
        assert choose_kernel("blocks", wide, 251, "float32", platform) == BLOCKS


@pytest.mark.parametrize(
    ("name", "platform", "changes", "words"),
    [
        ("splash", "cpu", {}, "runs on TPU"),
        ("cudnn", "tpu", {}, "NVIDIA"),
        ("splash", "tpu", {"length": 200}, "128"),
        ("cudnn", "gpu", {"soft_cap": 30.0}, "soft cap"),
        ("cudnn", "gpu", {"dtype": "float32"}, "bfloat16"),
        ("splsh", "tpu", {}, "did you mean splash"),
        ("splash:100", "tpu", {}, "multiple of 128"),
        ("splash:0", "tpu", {}, "multiple of 128"),
        ("blocks:128", "cpu", {}, "is not one of"),
        ("splash:256", "gpu", {}, "runs on TPU"),
        ("splash:256", "tpu", {"length": 200}, "128"),
        ("cudnn", "gpu", {"width": 264}, "head width 264"),
        ("cudnn", "gpu", {"width": 12}, "head width 12"),
        ("cudnn", "gpu", {"length": 255}, "row length 255"),
        ("cudnn", "cpu", {}, "NVIDIA"),
        ("splash", "cuda", {}, "runs on TPU"),
    ],
)
def test_a_kernel_asked_for_that_cannot_serve_is_refused(name, platform, changes, words):
    spec = dataclasses.replace(
        LLAMA, head_width=changes.get("width", 64), attention_soft_cap=changes.get("soft_cap")
    )
    choose = functools.partial(
        choose_kernel,
        name,
        spec,
        changes.get("length", 256),
        changes.get("dtype", "bfloat16"),
        platform,
    )
    with pytest.raises(UserError, match=words):
        choose()
    if name in KERNELS:
        assert choose(required=False) == REFERENCE
