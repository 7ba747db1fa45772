"""The training step: exact under accumulation, sharding and chunking; stops at the first non-finite
loss.
"""

import dataclasses
from functools import cache, partial

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from crossin_jax.config import Lora, Mesh, Optim, UserError
from crossin_jax.models import transformer
from crossin_jax.models.attention import Kernel
from crossin_jax.models.lora import is_trainable, resolve
from crossin_jax.models.spec import spec_from_architecture
from crossin_jax.models.transformer import Transformer
from crossin_jax.parallel.mesh import batch_sharding, leaf_name, make_mesh, shardings
from crossin_jax.training import step as training_step
from crossin_jax.training.optim import decays, make_optimizer, make_schedule
from crossin_jax.training.step import (
    StepSettings,
    init_state,
    loss_sums,
    make_eval_step,
    make_train_step,
)
from tests.helpers import small_architecture

SETTINGS = StepSettings(
    accumulation=1, loss_chunk=8, remat="none", attention="reference", seed=1, num_groups=3
)
SPEC = spec_from_architecture(small_architecture(), 96)


def make_batch(seed: int, rows: int = 8, length: int = 32) -> dict[str, np.ndarray]:
    """Random rows of two segments and some padding; uneven numbers of learned tokens per row."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(3, 96, (rows, length + 1)).astype(np.int32)
    segments = np.where(np.arange(length) < 14, 1, 2)[None].repeat(rows, 0).astype(np.int32)
    segments[:, length - 3 :] = 0
    positions = np.where(
        segments == 1, np.arange(length)[None], np.arange(length)[None] - 14
    ).astype(np.int32)
    loss_mask = (rng.random((rows, length)) < rng.uniform(0.1, 0.9, (rows, 1))) & (segments > 0)
    return {
        "tokens_BT": tokens[:, :-1],
        "targets_BT": tokens[:, 1:],
        "segment_ids_BT": segments,
        "positions_BT": np.maximum(positions, 0),
        "loss_mask_BT": loss_mask,
        "group_BT": rng.integers(0, 3, (rows, length)).astype(np.int32),
    }


def make_state(lora: Lora | None = None, **options):
    """(graphdef, state, optimizer) of a small float32 model."""
    model = Transformer(
        SPEC,
        lora=lora,
        param_dtype="float32",
        frozen_dtype="float32",
        compute_dtype="float32",
        **options,
        rngs=nnx.Rngs(0),
    )
    graphdef, trainable, frozen = nnx.split(
        model, lambda p, v: is_trainable(p, v, resolve(lora, SPEC)), ...
    )
    optimizer = make_optimizer(Optim(learning_rate=1e-2, warmup_share=0.0), 10)
    return graphdef, init_state(trainable, frozen, optimizer), optimizer


def run_steps(settings=SETTINGS, mesh=None, lora=None):
    """Losses and final trained parameters after three steps."""
    graphdef, state, optimizer = make_state(lora)
    step = jax.jit(make_train_step(graphdef, optimizer, settings))
    losses = []
    with jax.set_mesh(mesh) if mesh else jax.default_device(jax.devices()[0]):
        if mesh:
            state = jax.device_put(state, shardings(state, mesh))
        for i in range(3):
            batch = make_batch(i)
            batch = (
                jax.device_put(batch, batch_sharding(mesh))
                if mesh
                else jax.tree.map(jnp.asarray, batch)
            )
            state, metrics = step(state, batch)
            losses.append(float(metrics["loss"]))
    assert step._cache_size() == 1 if not mesh else True
    return np.array(losses), state


def test_loss_is_the_mean_over_learned_targets():
    graphdef, state, _ = make_state()
    batch = make_batch(0)
    sums = jax.jit(make_eval_step(graphdef, SETTINGS))(state.trainable, state.frozen, batch)
    model = nnx.merge(graphdef, state.trainable, state.frozen)
    logits = np.asarray(
        model(batch["tokens_BT"], batch["positions_BT"], batch["segment_ids_BT"]), np.float64
    )
    logits -= logits.max(-1, keepdims=True)
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    losses = -np.take_along_axis(log_probs, batch["targets_BT"][..., None], -1)[..., 0]
    assert float(sums["count"]) == batch["loss_mask_BT"].sum()
    np.testing.assert_allclose(float(sums["loss"]), losses[batch["loss_mask_BT"]].sum(), rtol=1e-5)
    for group in range(3):
        chosen = batch["loss_mask_BT"] & (batch["group_BT"] == group)
        np.testing.assert_allclose(
            float(sums["group_loss"][group]), losses[chosen].sum(), rtol=1e-5
        )
        assert float(sums["group_count"][group]) == chosen.sum()


@pytest.fixture(scope="module")
def plain():
    """Three steps on one device with everything off."""
    return run_steps()


@pytest.mark.parametrize(
    "change", [{"accumulation": 4, "remat": "full"}, {"loss_chunk": 32}, {"loss_chunk": 1}]
)
def test_result_does_not_depend_on_how_it_is_computed(plain, change):
    expected, state = plain
    losses, other = run_steps(dataclasses.replace(SETTINGS, **change))
    np.testing.assert_allclose(losses, expected, rtol=1e-6)
    for a, b in zip(
        jax.tree.leaves(state.trainable), jax.tree.leaves(other.trainable), strict=True
    ):
        np.testing.assert_allclose(a, b, atol=2e-5)


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize(
    ("rows", "loss_mask"), [(8, None), (8, 0), (8, 1), (8, 256), (1, None), (3, 90)]
)
def test_positions_that_are_not_learned_have_no_logits_and_nothing_else_changes(
    monkeypatch, full, rows, loss_mask
):
    """`learned`: how many positions; what is skipped is counted by the chunks that are computed."""
    monkeypatch.setattr(training_step, "MASKED_CHUNK", 16)
    lora = None if full else Lora(rank=2, dropout=0.0, modules_to_save=())
    length = 32 if rows == 8 else 31  # 31 and 93 positions: no chunk of 16 divides them
    batch = make_batch(0, rows, length)
    if loss_mask is not None:
        batch["loss_mask_BT"] = (
            np.random.default_rng(1).permutation(rows * length).reshape(rows, length) < loss_mask
        )
    computed = []
    unembed = Transformer.unembed
    monkeypatch.setattr(
        Transformer,
        "unembed",
        lambda model, hidden, *rest: (
            jax.debug.callback(lambda: computed.append(hidden.shape[1])),
            unembed(model, hidden, *rest),
        )[1],
    )

    def run(skips):
        graphdef, state, _ = make_state(lora, skip_masked_logits=skips)

        def total(trainable):
            model = nnx.merge(graphdef, trainable, state.frozen)
            sums = loss_sums(model, batch, SETTINGS, None, head_trains=full)
            return sums["loss"], sums

        computed.clear()
        (_, sums), grads = jax.jit(jax.value_and_grad(total, has_aux=True))(state.trainable)
        jax.effects_barrier()
        return sum(computed), sums, grads

    (chunked, *skipping), (_, *plain) = run(True), run(False)
    count, chunk = int(batch["loss_mask_BT"].sum()), min(16, rows * SETTINGS.loss_chunk)
    assert chunked == -(-count // chunk) * chunk
    jax.tree.map(partial(np.testing.assert_allclose, atol=2e-5, rtol=1e-5), skipping, plain)


@pytest.mark.parametrize(
    ("axes", "lora", "parts"),
    [
        ({"data": 8}, None, 1),
        ({"fsdp": 8}, None, 1),
        ({"data": 2, "fsdp": 2, "tensor": 2}, None, 2),
        ({"data": 2, "fsdp": 2, "tensor": 2}, Lora(rank=4, dropout=0.1), 1),
    ],
)
def test_eight_devices_equal_one(plain, axes, lora, parts):
    expected, _ = run_steps(lora=lora) if lora else plain
    settings = dataclasses.replace(SETTINGS, accumulation=parts)
    losses, state = run_steps(settings, mesh=make_mesh(Mesh(**axes)), lora=lora)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    if axes.get("fsdp"):
        moments = state.optimizer[1][0].mu
        for tree in (state.trainable, moments):  # moments are sharded like their parameters
            leaf = tree["embed_tokens"]["weight"].get_raw_value()
            assert leaf.sharding.shard_shape(leaf.shape) == (
                96 // axes.get("tensor", 1),
                32 // axes["fsdp"],
            )


@pytest.mark.parametrize("name", ["reference", "blocks", "splash", "cudnn"])
def test_packed_and_unpacked_rows_have_the_same_losses_and_gradients(name, monkeypatch):
    monkeypatch.setattr(
        transformer, "choose_kernel", lambda *_, **__: Kernel(name, block=128, interpret=True)
    )
    graphdef, state, _ = make_state()
    rng, lengths = np.random.default_rng(0), [100, 60, 90, 30, 128, 40]
    documents = [rng.integers(3, 96, n + 1).astype(np.int32) for n in lengths]
    loss_mask = [rng.random(n) < 0.5 for n in lengths]

    def batch_of(rows):
        batch = {
            f"{name}_BT": np.zeros((len(rows), 256), bool if name == "loss_mask" else np.int32)
            for name in ("tokens", "targets", "segment_ids", "positions", "loss_mask", "group")
        }
        for r, row in enumerate(rows):
            start = 0
            for s, i in enumerate(row):
                here = (r, slice(start, start + lengths[i]))
                values = {
                    "tokens": documents[i][:-1],
                    "targets": documents[i][1:],
                    "segment_ids": s + 1,
                    "positions": np.arange(lengths[i]),
                    "loss_mask": loss_mask[i],
                    "group": i,
                }
                for field, value in values.items():
                    batch[f"{field}_BT"][here] = value
                start += lengths[i]
        return batch

    settings = dataclasses.replace(SETTINGS, num_groups=len(lengths), attention=name)

    @jax.jit
    def run(trainable, batch):
        def total(trainable):
            sums = loss_sums(nnx.merge(graphdef, trainable, state.frozen), batch, settings, None)
            return sums["loss"] / sums["count"], sums["group_loss"] / sums["group_count"]

        return jax.value_and_grad(total, has_aux=True)(trainable)

    (_, packed), gradient = run(state.trainable, batch_of([[0, 1, 2], [3, 4, 5]]))
    (_, alone), expected = run(state.trainable, batch_of([[i] for i in range(len(lengths))]))
    np.testing.assert_allclose(packed, alone, rtol=0, atol=1e-5)
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * float(jnp.abs(b).max()))


def test_frozen_weights_stay_and_have_no_moments():
    _, state = run_steps(lora=Lora(rank=4, dropout=0.0, modules_to_save=()))
    _, start, _ = make_state(Lora(rank=4, dropout=0.0, modules_to_save=()))
    for a, b in zip(jax.tree.leaves(state.frozen), jax.tree.leaves(start.frozen), strict=True):
        np.testing.assert_array_equal(a, b)
    changed = [
        not np.array_equal(a, b)
        for a, b in zip(
            jax.tree.leaves(state.trainable), jax.tree.leaves(start.trainable), strict=True
        )
    ]
    assert all(changed)
    numbers = sum(leaf.size for leaf in jax.tree.leaves(state.optimizer) if leaf.ndim)
    assert numbers == 2 * sum(leaf.size for leaf in jax.tree.leaves(state.trainable))


def test_dropout_follows_seed_and_step():
    lora = Lora(rank=4, dropout=0.5)
    first, _ = run_steps(lora=lora)
    again, _ = run_steps(lora=lora)
    other, _ = run_steps(dataclasses.replace(SETTINGS, seed=2), lora=lora)
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first[1:], other[1:])


def test_a_non_finite_gradient_changes_nothing_from_then_on():
    graphdef, state, optimizer = make_state()
    step = jax.jit(make_train_step(graphdef, optimizer, SETTINGS))
    state, _ = step(state, make_batch(0))
    bad = jax.tree.map(lambda x: x, make_batch(1))
    bad["tokens_BT"][2, 5] = 10_000  # outside the vocabulary: the embedding is NaN
    after, metrics = step(state, bad)
    assert not np.isfinite(metrics["loss"]) and not after.finite and int(after.step) == 1
    after, metrics = step(after, make_batch(2))
    assert np.isfinite(metrics["loss"]) and int(after.step) == 1
    for a, b in zip(
        jax.tree.leaves((state.trainable, state.optimizer)),
        jax.tree.leaves((after.trainable, after.optimizer)),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


def test_decay_spares_norms_and_biases():
    graphdef, state, _ = make_state()
    decayed = {
        leaf_name(path): decays(path)
        for path, _ in jax.tree_util.tree_flatten_with_path(state.trainable)[0]
    }
    assert not any(value for name, value in decayed.items() if "norm" in name)
    assert decayed["layers/q_proj/weight"] and decayed["embed_tokens/weight"]


@pytest.mark.parametrize("name", ["adamw", "adafactor", "lion", "muon"])
def test_every_optimizer_lowers_the_loss(name):
    graphdef, state, _ = make_state()
    rate = {"adamw": 1e-2, "adafactor": 1e-2, "lion": 3e-3, "muon": 1e-2}[name]
    optimizer = make_optimizer(Optim(name=name, learning_rate=rate, warmup_share=0.0), 20)
    state = init_state(state.trainable, state.frozen, optimizer)
    step = jax.jit(make_train_step(graphdef, optimizer, SETTINGS))
    batch = make_batch(0)
    losses = []
    for _ in range(8):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] - 0.3


def test_schedule_warms_up_and_decays():
    schedule = make_schedule(Optim(learning_rate=1.0, warmup_share=0.1, final_share=0.1), 100)
    rates = [float(schedule(i)) for i in range(101)]
    assert (
        rates[0] == pytest.approx(0.1)
        and rates[9] == pytest.approx(1.0)
        and rates[100] == pytest.approx(0.1)
    )
    assert all(a >= b for a, b in zip(rates[10:], rates[11:], strict=False))
    assert (
        partial(make_schedule, Optim(learning_rate=2.0, schedule="constant", warmup_share=0.0))(10)(
            7
        )
        == 2.0
    )


@cache
def small_params() -> tuple:
    """Trained parameters of a small model, and gradients that are made up."""
    _, state, _ = make_state()
    rng = np.random.default_rng(0)
    return state.trainable, jax.tree.map(
        lambda leaf: rng.normal(size=leaf.shape).astype(leaf.dtype), state.trainable
    )


def update(optim: Optim):
    """{name: (parameter, its update)} of one step of an optimizer, and its moments."""
    (params, grads), rule = small_params(), make_optimizer(optim, 10)
    moments = jax.jit(rule.init)(params)
    updates = jax.jit(rule.update)(grads, moments, params)[0]
    flat = [
        {
            leaf_name(path): np.asarray(leaf)
            for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
        }
        for tree in (params, updates)
    ]
    return {name: (value, flat[1][name]) for name, value in flat[0].items()}, moments


@pytest.mark.parametrize("name", ["adamw", "adafactor", "lion", "muon"])
def test_groups_of_parameters_have_their_own_rate_and_decay(name):
    optim = Optim(name=name, learning_rate=1e-2, warmup_share=0.0, weight_decay=0.1)
    groups = {
        "embed_tokens/*": {"rate": 0.25},
        "layers/*_proj/*": {"rate": 0.5, "weight_decay": 0.0},
        "layers/*": {"weight_decay": 0.0},
    }
    plain, _ = update(optim)
    grouped, moments = update(dataclasses.replace(optim, groups=groups))
    still, _ = update(dataclasses.replace(optim, weight_decay=0.0))
    for key, (_, change) in grouped.items():
        expected = (
            0.25 * plain[key][1]
            if key.startswith("embed")
            else 0.5 * still[key][1]
            if "_proj/" in key
            else plain[key][1]
        )
        np.testing.assert_allclose(change, expected, rtol=2e-5, atol=1e-9, err_msg=key)
    on_mesh = shardings(jax.eval_shape(lambda: moments), make_mesh(Mesh(fsdp=8)))
    split = [leaf for leaf in jax.tree.leaves(on_mesh) if any(leaf.spec)]
    # Moments in groups are sharded like their parameters; factored ones are not.
    assert split or name == "adafactor"


def test_a_group_that_names_nothing_is_refused():
    for groups in (
        {"embed_token/*": {"rate": 0.1}},
        {"*": {"rate": 0.1}, "embed_tokens/*": {"rate": 0.2}},
    ):
        with pytest.raises(
            UserError, match=r"names no trained parameter beside .*embed_tokens/weight"
        ):
            update(Optim(groups=groups))


def test_decay_moves_matrices_alone():
    decayed, _ = update(Optim(learning_rate=1e-2, warmup_share=0.0, weight_decay=0.5))
    still, _ = update(Optim(learning_rate=1e-2, warmup_share=0.0, weight_decay=0.0))
    for name, (value, change) in decayed.items():
        expected = 0 if "norm" in name else -1e-2 * 0.5 * value
        np.testing.assert_allclose(change - still[name][1], expected, atol=1e-7, err_msg=name)


@pytest.mark.parametrize("name", ["adamw", "adafactor", "lion", "muon"])
def test_decay_and_muon_spare_biases_and_magnitudes(name):
    """Of a model with biases and DoRA, everything trained; Muon's updates of matrices have singular
    values alike.
    """
    model = Transformer(
        dataclasses.replace(SPEC, qkv_bias=True),
        frozen_dtype="float32",
        compute_dtype="float32",
        lora=Lora(rank=4, use_dora=True, modules_to_save=()),
        rngs=nnx.Rngs(0),
    )
    params, rng = nnx.state(model, nnx.Param), np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: leaf + 1.0, params)  # biases start at zero
    grads = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(leaf.dtype), params)

    def updates(**changes):
        rule = make_optimizer(
            Optim(name=name, learning_rate=1e-2, warmup_share=0.0, clip_norm=None, **changes), 10
        )
        flat = jax.tree_util.tree_flatten_with_path(
            jax.jit(rule.update)(grads, jax.jit(rule.init)(params), params)[0]
        )
        return {leaf_name(path): np.asarray(leaf) for path, leaf in flat[0]}

    decayed, still = updates(weight_decay=0.5), updates(weight_decay=0.0)
    for path, value in still.items():
        spared = path.endswith(("bias", "magnitude")) or "norm" in path
        np.testing.assert_allclose(
            decayed[path] - value,
            0
            if spared
            else -1e-2
            * 0.5
            * np.asarray(dict(nnx.to_flat_state(params))[tuple(path.split("/"))].get_value()),
            atol=1e-6,
            err_msg=path,
        )
    assert sum(path.endswith(("bias", "magnitude")) for path in still) == 3 + 7
    if name == "muon":
        for path in ("layers/q_proj/bias", "layers/k_proj/magnitude", "embed_tokens/weight"):
            size = np.abs(still[path])
            # Adam's first step is as long everywhere.
            np.testing.assert_allclose(size, size.mean(), rtol=0.02)
        for path, shape in (
            ("q_proj/weight", (32, 32)),
            ("o_proj/weight", (32, 32)),
            ("up_proj/weight", (48, 32)),
            ("o_proj/lora_a", (4, 32)),
            ("k_proj/lora_b", (8, 4)),
        ):
            values = np.linalg.svd(still[f"layers/{path}"].reshape(2, *shape), compute_uv=False)
            assert values.max() < 2.5 * values.min(), path


def test_adamw_is_that_of_torch():
    """Four steps with clipping, decay off where it is to be, and a falling rate."""
    torch = pytest.importorskip("torch")
    (params, grads), optim = (
        small_params(),
        Optim(
            name="adamw",
            learning_rate=1e-2,
            warmup_share=0.0,
            schedule="linear",
            final_share=0.2,
            weight_decay=0.1,
            b1=0.8,
            b2=0.95,
            clip_norm=1.0,
        ),
    )
    rule = make_optimizer(optim, 10)
    moments = rule.init(params)
    flat, tree = jax.tree_util.tree_flatten_with_path(params)
    theirs = [torch.nn.Parameter(torch.from_numpy(np.array(leaf))) for _, leaf in flat]
    groups = [
        {
            "params": [
                p for p, (path, _) in zip(theirs, flat, strict=True) if decays(path) == wanted
            ],
            "weight_decay": 0.1 * wanted,
        }
        for wanted in (True, False)
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.8, 0.95))
    for step in range(4):
        now = jax.tree.map(lambda leaf, size=step + 1: leaf / size**2, grads)
        changes, moments = rule.update(now, moments, params)
        params = jax.tree.map(lambda a, b: a + b, params, changes)
        for parameter, gradient in zip(theirs, jax.tree.leaves(now), strict=True):
            parameter.grad = torch.from_numpy(np.array(gradient))
        torch.nn.utils.clip_grad_norm_(theirs, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (1 - 0.8 * step / 10)
        optimizer.step()
    for ours, other in zip(jax.tree.leaves(params), theirs, strict=True):
        np.testing.assert_allclose(ours, other.detach().numpy(), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("name", ["adamw", "lion", "muon"])
def test_first_moments_take_their_dtype(name):
    _, moments = update(Optim(name=name, moments_dtype="bfloat16"))
    first = [
        leaf.dtype
        for path, leaf in jax.tree_util.tree_flatten_with_path(moments)[0]
        if "/mu/" in leaf_name(path)
    ]
    assert first and set(first) == {jnp.dtype("bfloat16")}


@pytest.mark.parametrize(
    ("accumulation", "compute_dtype"), [(1, "bfloat16"), (2, "bfloat16"), (1, "float32")]
)
def test_frozen_weights_have_neither_gradients_nor_float32_copies(accumulation, compute_dtype):
    """Nothing the step computes has the shape of a frozen weight, or of a layer's slice of one, in
    float32.

    The control: products in float32 need such copies, and are found.
    """
    lora = Lora(rank=3, dropout=0.1, modules_to_save=())
    model = nnx.eval_shape(
        lambda: Transformer(
            SPEC,
            lora=lora,
            param_dtype="float32",
            frozen_dtype="bfloat16",
            compute_dtype=compute_dtype,
            rngs=nnx.Rngs(0),
        )
    )
    graphdef, trainable, frozen = nnx.split(
        model, lambda p, v: is_trainable(p, v, resolve(lora, SPEC)), ...
    )
    optimizer = make_optimizer(Optim(), 10)
    state = jax.eval_shape(lambda t, f: init_state(t, f, optimizer), trainable, frozen)
    step = make_train_step(
        graphdef, optimizer, dataclasses.replace(SETTINGS, accumulation=accumulation)
    )
    shapes = {
        leaf.shape
        for leaf in jax.tree.leaves(frozen)
        if leaf.dtype == jnp.bfloat16 and leaf.size > 100
    }
    shapes |= {shape[1:] for shape in shapes if len(shape) > 2}
    assert len(shapes) > 8 and not shapes & {leaf.shape for leaf in jax.tree.leaves(trainable)}
    shapes = {tuple(sorted(shape)) for shape in shapes}  # transposed or not
    batch = jax.eval_shape(lambda: make_batch(0, rows=10, length=24))
    copies = [
        f"{equation.primitive} {variable.aval}"
        for equation in walk(jax.make_jaxpr(step)(state, batch).jaxpr)
        for variable in equation.outvars
        if variable.aval.dtype == jnp.float32 and tuple(sorted(variable.aval.shape)) in shapes
    ]
    assert bool(copies) == (compute_dtype == "float32"), copies


@pytest.mark.parametrize("head_trains", [True, False])
def test_the_logits_of_a_large_vocabulary_never_exist_at_once(head_trains):
    """Beside copies of the matrices, nothing that the step computes is larger than one chunk's
    logits.

    The control: with rows in one chunk, all logits are found.
    """
    vocab, rows, length, chunk = 256_000, 8, 64, 8
    spec = spec_from_architecture(small_architecture(), vocab)
    lora = Lora(rank=2, dropout=0.0, modules_to_save=("lm_head",) if head_trains else ())
    model = nnx.eval_shape(lambda: Transformer(spec, lora=lora, rngs=nnx.Rngs(0)))
    graphdef, trainable, frozen = nnx.split(
        model, lambda p, v: is_trainable(p, v, resolve(lora, spec)), ...
    )
    optimizer = make_optimizer(Optim(), 10)
    state = jax.eval_shape(lambda t, f: init_state(t, f, optimizer), trainable, frozen)
    batch = jax.eval_shape(lambda: make_batch(0, rows, length))

    def largest(chunk):
        step = make_train_step(graphdef, optimizer, dataclasses.replace(SETTINGS, loss_chunk=chunk))
        return max(
            variable.aval.size
            for equation in walk(jax.make_jaxpr(step)(state, batch).jaxpr)
            for variable in equation.outvars
        )

    matrix = vocab * spec.width
    assert matrix < rows * length * vocab
    assert largest(chunk) <= max(matrix, rows * chunk * vocab)
    assert largest(length) == rows * length * vocab


def walk(jaxpr):
    """Every equation of a program, those of its loops and branches included."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from walk(inner)
