"""Every kernel equals the reference, packed equals unpacked, and a kernel that cannot serve is refused by name."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from crossin_jax import config as settings
from crossin_jax.config import UserError
from crossin_jax.models.attention import KERNELS, SMALLEST, Kernel, attend, choose_kernel, cut
from crossin_jax.parallel.mesh import make_mesh
from tests.models.models import GEMMA, LLAMA, make_rows

REFERENCE, SPLASH = Kernel("reference"), Kernel("splash", block=128, interpret=True)
BLOCKS = Kernel("blocks")
T, H = 256, 16


def make_inputs(N, K, batch=2, seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    q, k, v = (jax.random.normal(key, (batch, T, heads, H)) for key, heads in zip(keys, (N, K, K), strict=True))
    return q * H ** -0.5, k, v, *make_rows(batch, T, seed)


def plain_attention(q, k, v, positions, segments, window, soft_cap):
    """Written out token by token in numpy float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out, group = np.zeros_like(q), q.shape[2] // k.shape[2]
    for b, t, n in np.ndindex(q.shape[:3]):
        seen = [s for s in range(q.shape[1]) if segments[b, s] == segments[b, t]
                and 0 <= positions[b, t] - positions[b, s] < (window or 10 ** 9)]
        scores = k[b, seen, n // group] @ q[b, t, n]
        scores = soft_cap * np.tanh(scores / soft_cap) if soft_cap else scores
        weights = np.exp(scores - scores.max())
        out[b, t, n] = weights / weights.sum() @ v[b, seen, n // group]
    return out


@pytest.mark.parametrize(("window", "soft_cap"), [(None, None), (7, 0.8)])
def test_reference_is_attention_written_out(window, soft_cap):
    q, k, v, positions, segments = (x[:, :24] for x in make_inputs(4, 2))
    positions, segments = make_rows(2, 24)
    got = attend(q, k, v, positions, segments, kernel=REFERENCE, window=window, is_local=None, soft_cap=soft_cap)
    np.testing.assert_allclose(got, plain_attention(q, k, v, positions, segments, window, soft_cap), atol=1e-5)


@pytest.mark.parametrize("kernel", [SPLASH, BLOCKS])
@pytest.mark.parametrize(("N", "K", "window", "is_local", "soft_cap"), [
    (4, 4, None, None, None), (4, 2, None, None, 0.8), (4, 1, 40, None, None), (2, 1, 40, True, 0.8),
    (2, 1, 40, False, None)])
def test_kernels_and_their_gradients_equal_the_reference_on_packed_rows(kernel, N, K, window, is_local, soft_cap):
    q, k, v, positions, segments = make_inputs(N, K)
    local = None if is_local is None else jnp.asarray(is_local)

    @functools.partial(jax.jit, static_argnames="kernel")
    def run(q, k, v, kernel):
        def total(*qkv):
            out = attend(*qkv, positions, segments, kernel=kernel, window=window, is_local=local, soft_cap=soft_cap)
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
        assert window is not None or length <= SMALLEST or met.mean() < 0.8  # keys after a block are not met
    q, k, v, *_ = make_inputs(2, 1, batch=1)
    q, k, v = (jnp.tile(x, (1, 5, 1, 1))[:, :length] for x in (q, k, v))
    got, expected = (attend(q, k, v, *make_rows(1, length), kernel=kernel, window=90, is_local=None, soft_cap=None)
                     for kernel in (BLOCKS, REFERENCE))
    np.testing.assert_allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize(("N", "K", "window", "is_local"), [(4, 2, None, None), (4, 1, 40, None), (2, 1, 40, True)])
def test_the_options_given_to_cudnn_mean_the_reference_on_packed_rows(N, K, window, is_local):
    q, k, v, positions, segments = make_inputs(N, K)
    rules = {"window": window, "is_local": None if is_local is None else jnp.asarray(is_local), "soft_cap": None}
    got, expected = (attend(q, k, v, positions, segments, kernel=kernel, **rules)
                     for kernel in (Kernel("cudnn", interpret=True), REFERENCE))
    np.testing.assert_allclose(np.asarray(got)[segments > 0], expected[segments > 0], atol=2e-5)


def test_splash_on_a_mesh_equals_the_reference_and_repeats_heads_that_do_not_divide():
    mesh = make_mesh(settings.Mesh(data=2, fsdp=2, tensor=2))
    for K in (2, 1):
        q, k, v, positions, segments = make_inputs(4, K, batch=4)
        q = jax.device_put(q, NamedSharding(mesh, PartitionSpec(("data", "fsdp"), None, "tensor")))
        rules = {"window": None, "is_local": None, "soft_cap": None}
        with jax.set_mesh(mesh):
            got = jax.jit(functools.partial(attend, kernel=SPLASH, **rules))(q, k, v, positions, segments)
        expected = attend(q, k, v, positions, segments, kernel=REFERENCE, **rules)
        documents = segments > 0  # what padding sees differs between kernels, and nothing reads it
        np.testing.assert_allclose(np.asarray(got)[documents], expected[documents], atol=2e-5)


def test_auto_takes_the_kernel_of_the_platform_where_it_can_serve():
    wide = dataclasses.replace(LLAMA, head_width=64)
    gemma2 = dataclasses.replace(GEMMA, head_width=64)
    cases = [(wide, 256, "tpu", "splash"), (wide, 250, "tpu", "reference"), (wide, 256, "gpu", "cudnn"),
             (gemma2, 256, "gpu", "reference"), (gemma2, 256, "tpu", "splash"), (wide, 250, "cpu", "blocks")]
    for spec, length, platform, name in cases:
        assert choose_kernel("auto", spec, length, "bfloat16", platform).name == name
    assert choose_kernel("auto", wide, 256, "float32", "gpu").name == "reference"


@pytest.mark.parametrize(("name", "platform", "changes", "words"), [
    ("splash", "cpu", {}, "runs on TPU"), ("cudnn", "tpu", {}, "NVIDIA"), ("splash", "tpu", {"length": 200}, "128"),
    ("cudnn", "gpu", {"soft_cap": 30.0}, "soft cap"), ("cudnn", "gpu", {"dtype": "float32"}, "bfloat16"),
    ("splsh", "tpu", {}, "did you mean splash")])
def test_a_kernel_asked_for_that_cannot_serve_is_refused(name, platform, changes, words):
    spec = dataclasses.replace(LLAMA, head_width=64, attention_soft_cap=changes.get("soft_cap"))
    choose = functools.partial(choose_kernel, name, spec, changes.get("length", 256), changes.get("dtype", "bfloat16"),
                               platform)
    with pytest.raises(UserError, match=words):
        choose()
    if name in KERNELS:
        assert choose(required=False) == REFERENCE
