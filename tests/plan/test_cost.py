"""Programs whose cost is known in closed form, compiled for TPUs that are not there; and the parts,
by hand.
"""

import itertools
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from crossin_jax import config as settings
from crossin_jax.config import UserError
from crossin_jax.parallel.mesh import make_mesh
from crossin_jax.plan.cost import _window_products, count
from crossin_jax.plan.topology import CHIPS, compile_program, open_topology, shard_bytes
from crossin_jax.training.telemetry import PEAK_FLOPS
from tests.parallel.tpu import topology

L, M, D = 5, 256, 384
PRODUCT = 2 * M * D * D

BY_HAND = """HloModule by_hand

%inner_body (s: (s32[], f32[8,8])) -> (s32[], f32[8,8]) {
  %s = (s32[], f32[8,8]{1,0:T(8,128)}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %two = s32[] constant(2)
  %next = s32[] add(%i, %two)
  %x = f32[8,8]{1,0:T(8,128)} get-tuple-element(%s), index=1
  %y = f32[8,8]{1,0:T(8,128)} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %t = (s32[], f32[8,8]{1,0:T(8,128)}) tuple(%next, %y)
}

%inner_condition (s.1: (s32[], f32[8,8])) -> pred[] {
  %s.1 = (s32[], f32[8,8]{1,0:T(8,128)}) parameter(0)
  %i.1 = s32[] get-tuple-element(%s.1), index=0
  %limit = s32[] constant(5)
  ROOT %less = pred[] compare(%i.1, %limit), direction=LT
}

%outer_body (s.2: (s32[], s32[], f32[8,8])) -> (s32[], s32[], f32[8,8]) {
  %s.2 = (s32[], s32[], f32[8,8]{1,0:T(8,128)}) parameter(0)
  %i.2 = s32[] get-tuple-element(%s.2), index=0
  %one = s32[] constant(1)
  %down = s32[] subtract(%i.2, %one)
  %start = s32[] get-tuple-element(%s.2), index=1
  %x.2 = f32[8,8]{1,0:T(8,128)} get-tuple-element(%s.2), index=2
  %first = (s32[], f32[8,8]{1,0:T(8,128)}) tuple(%start, %x.2)
  %inner = (s32[], f32[8,8]{1,0:T(8,128)}) while(%first), condition=%inner_condition, body=%inner_body
  %y.2 = f32[8,8]{1,0:T(8,128)} get-tuple-element(%inner), index=1
  %gathered = f32[32,8]{1,0:T(8,128)} all-gather(%y.2), dimensions={0}, channel_id=1
  %copied = f32[8,8]{1,0:T(8,128)} copy(%y.2), backend_config={"window_config":{"estimated_cycles":"7"}}
  ROOT %t.2 = (s32[], s32[], f32[8,8]{1,0:T(8,128)}) tuple(%down, %start, %copied)
}

%outer_condition (s.3: (s32[], s32[], f32[8,8])) -> pred[] {
  %s.3 = (s32[], s32[], f32[8,8]{1,0:T(8,128)}) parameter(0)
  %i.3 = s32[] get-tuple-element(%s.3), index=0
  %zero = s32[] constant(0)
  ROOT %more = pred[] compare(%i.3, %zero), direction=GT
}

ENTRY %main (x.4: f32[8,8], unknown: s32[]) -> f32[8,8] {
  %x.4 = f32[8,8]{1,0:T(8,128)} parameter(0)
  %unknown = s32[] parameter(1)
  %ten = s32[] constant(10)
  %minus = s32[] constant(-1)
  %state = (s32[], s32[], f32[8,8]{1,0:T(8,128)}) tuple(%ten, %minus, %x.4)
  %outer = (s32[], s32[], f32[8,8]{1,0:T(8,128)}) while(%state), condition=%outer_condition, body=%outer_body
  %state.1 = (s32[], f32[8,8]{1,0:T(8,128)}) tuple(%unknown, %x.4)
  %once = (s32[], f32[8,8]{1,0:T(8,128)}) while(%state.1), condition=%inner_condition, body=%inner_body
  ROOT %out = f32[8,8]{1,0:T(8,128)} get-tuple-element(%outer), index=2
}
"""  # noqa: E501 - HLO has one instruction per line


def test_loops_by_hand():
    cost = count(BY_HAND)
    turns = 10 * 3  # the inner counter goes -1, 1, 3
    assert cost.flops == (turns + 1) * 2 * 8**3 and cost.unknown_loops == 1
    assert cost.cycles == 10 * 7 and cost.matrix_cycles == 0
    assert cost.collectives == {"all-gather": 10} and cost.sent == {
        "all-gather": 10 * 3 * 8 * 8 * 4
    }
    # a product reads its operand twice and writes; a gather reads one part and writes four; a copy
    # reads and writes
    assert cost.bytes == 256 * ((turns + 1) * 3 + 10 * 5 + 10 * 2)


@pytest.mark.parametrize(
    ("size", "kernel", "out", "stride", "low", "dilate", "spread"),
    [(8, 1, 8, 1, 0, 1, 1), (8, 3, 8, 1, 1, 1, 1), (5, 4, 16, 1, 3, 4, 1), (9, 3, 3, 3, 2, 1, 2)],
)
def test_positions_of_a_window_that_meet_an_input(size, kernel, out, stride, low, dilate, spread):
    padded = [False] * 1000  # zeros, and where inputs lie among them
    for i in range(size):
        padded[100 + i * dilate] = True
    expected = sum(
        padded[100 + o * stride - low + k * spread]
        for o, k in itertools.product(range(out), range(kernel))
    )
    assert _window_products(size, kernel, out, stride, low, dilate, spread) == expected


def compiled(function, *shapes, name="v5e:1x1", specs=None, mesh=None):
    """A program for arrays of these shapes in bfloat16."""
    devices = list(topology(name).devices)
    mesh = mesh or make_mesh(settings.Mesh(fsdp=len(devices)), devices)
    inputs = [
        jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, spec))
        for shape, spec in zip(shapes, specs or [PartitionSpec()] * len(shapes), strict=True)
    ]
    with jax.set_mesh(mesh):
        return compile_program(jax.jit(function), *inputs), shard_bytes(inputs)


def chain(x, weights, body=lambda x, w: (jnp.tanh(x @ w), None)):
    return jax.lax.scan(body, x, weights)[0]


def test_a_scan_counts_every_layer_and_a_nested_one_every_turn():
    program, arguments = compiled(chain, (M, D), (L, D, D))
    assert program.cost.flops == L * PRODUCT
    assert program.argument_bytes == arguments == 2 * (M * D + L * D * D)
    assert program.peak_bytes >= arguments and program.cost.bytes >= 2 * L * D * D
    assert 0 < program.cost.matrix_cycles <= program.cost.cycles and not program.cost.sent

    def nested(x, weights):
        return jax.lax.fori_loop(0, 3, lambda _, x: chain(x, weights), x)

    assert compiled(nested, (M, D), (L, D, D))[0].cost.flops == 3 * L * PRODUCT


def test_the_counter_that_peers_were_counted_with_says_the_same(shared, tmp_path, monkeypatch):
    """A sharded scan: FLOPs, cycles, those of products, and collectives to the last digit."""
    texts = []
    monkeypatch.setattr(
        "crossin_jax.plan.topology.count", lambda text: texts.append(text) or count(text)
    )
    program, _ = compiled(
        chain,
        (M, D),
        (L, D, D),
        name="v5e:2x2",
        specs=[PartitionSpec("fsdp"), PartitionSpec(None, "fsdp")],
    )
    (tmp_path / "program.hlo").write_text(texts[0])
    tool = shared.parent / "tools/hlo_cost.py"
    said = json.loads(
        subprocess.run(
            [sys.executable, str(tool), str(tmp_path / "program.hlo")],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
    )
    cost = program.cost
    assert (cost.flops, cost.cycles, cost.matrix_cycles) == (
        said["flops"],
        said["est_cycles"],
        said["est_cycles_matmul"],
    )
    assert (
        cost.flops == L * PRODUCT / 4 and cost.collectives == said["coll_exec"] and cost.collectives
    )


def test_rematerialisation_costs_one_more_forward_pass():
    def step(x, weights, remat):
        body = (
            jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None), prevent_cse=False)
            if remat
            else None
        )
        return jax.grad(
            lambda x, w: chain(x, w, *([body] if remat else [])).astype(jnp.float32).sum(),
            argnums=(0, 1),
        )(x, weights)

    plain, again = (
        compiled(lambda x, w, remat=remat: step(x, w, remat), (M, D), (L, D, D))[0].cost.flops
        for remat in (False, True)
    )
    assert (plain, again) == (3 * L * PRODUCT, 4 * L * PRODUCT)


def test_collectives_of_a_scan_over_sharded_weights():
    specs = [PartitionSpec("fsdp"), PartitionSpec(None, "fsdp")]
    program, _ = compiled(chain, (4 * M, D), (L, D, D), name="v5e:2x2", specs=specs)
    cost = program.cost
    assert cost.flops == L * PRODUCT  # of the M rows on each chip
    # Three quarters of every weight come from others.
    assert sum(cost.sent.values()) == L * D * D * 2 * 3 / 4


def test_slices_add_their_gradients_over_the_network():
    """Within a slice each chip has added up its share of the weights; only that goes between."""
    name = "v5e:2x2x2slices"
    devices = list(topology(name).devices)
    assert len(devices) == 8 and topology(name).num_hosts == 2
    mesh = make_mesh(settings.Mesh(fsdp=4), devices)
    batch, weights = PartitionSpec(("data", "fsdp")), PartitionSpec(None, "fsdp")

    def gradient(x, weights):
        return jax.grad(lambda weights: chain(x, weights).astype(jnp.float32).sum())(weights)

    shapes, specs = ((8 * M, D), (L, D, D)), [batch, weights]
    program, _ = compiled(gradient, *shapes, name=name, specs=specs, mesh=mesh)
    assert program.cost.sent["all-reduce between slices"] == L * D * D * 2 / 4
    assert program.cost.collectives["all-reduce between slices"] == L


def test_what_does_not_fit_has_the_peak_that_it_would_need():
    size = 1 << 18
    program, _ = compiled(lambda x, y: jnp.sin(x @ y) @ x, (size, 1024), (1024, size))
    slice_ = topology("v5e:1x1")
    assert program.cost is None and program.peak_bytes > 2 * size * size > slice_.hbm_limit
    assert program.argument_bytes == 2 * 2 * size * 1024
    assert program.temporary_bytes == program.peak_bytes - program.argument_bytes


@pytest.mark.parametrize(
    ("specs", "share"),
    [
        ((), 1),
        (("fsdp",), 4),
        ((None, "tensor"), 2),
        (("fsdp", "tensor"), 8),
        ((("fsdp", "tensor"),), 8),
    ],
)
def test_a_chip_holds_its_shard_and_a_whole_copy_of_what_is_not_sharded(specs, share):
    """Bytes by hand; an axis that does not appear repeats the array, and what has no place counts
    nothing.
    """
    mesh = make_mesh(settings.Mesh(fsdp=4, tensor=2))
    tree = {
        "array": jax.ShapeDtypeStruct(
            (16, 8), jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec(*specs))
        ),
        "small": jax.ShapeDtypeStruct(
            (3,), jnp.int8, sharding=NamedSharding(mesh, PartitionSpec())
        ),
        "nowhere": jax.ShapeDtypeStruct((100,), jnp.float32),
    }
    assert shard_bytes(tree) == 16 * 8 * 2 // share + 3


@pytest.mark.parametrize(
    ("kind", "units", "hbm", "links", "num_links", "network"),
    [
        ("v4", 8, 1228, 2400, 6, None),
        ("v5e", 4, 819, 1600, 4, 6400 / 256),
        ("v5p", 8, 2765, 4800, 6, 50),
        ("v6e", 16, 1640, 3200, 4, 25_600 / 256),
    ],
)
def test_chips_are_those_of_the_data_sheets(kind, units, hbm, links, num_links, network):
    """Gigabytes per second of HBM, gigabits per second of all links and of the network, and a clock
    that makes up the peak.
    """
    chip, peak = CHIPS[kind], PEAK_FLOPS[f"TPU {kind}"]
    assert (chip.num_links, chip.network) == (num_links, network and network * 1e9 / 8)
    assert (chip.hbm, chip.links) == pytest.approx((hbm * 1e9, links * 1e9 / 8), rel=1e-3)
    assert chip.clock * 2 * 128 * 128 * units == pytest.approx(peak, rel=5e-3)
    assert set(CHIPS) == {"v4", "v5e", "v5p", "v6e"}


@pytest.mark.parametrize("name", ["v5e:1x1", "v5e:3x3"])
def test_flags_and_the_cache_are_as_before(name, monkeypatch):
    """Neither a slice nor a refused one takes XLA_FLAGS away, and jax's cache stays switched on."""
    topology("v5e:1x1")
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false")
    before = jax.config.jax_enable_compilation_cache
    try:
        found = open_topology(name)
        device = jax.sharding.SingleDeviceSharding(found.devices[0])
        compile_program(jax.jit(jnp.sin), jax.ShapeDtypeStruct((8,), jnp.float32, sharding=device))
    except UserError:
        assert name == "v5e:3x3"
    assert os.environ["XLA_FLAGS"] == "--xla_cpu_use_fusion_emitters=false"
    assert jax.config.jax_enable_compilation_cache == before


def test_limits_are_the_compilers():
    limits = {
        name: topology(name).hbm_limit / 2**30
        for name in ("v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2")
    }
    assert (
        all(
            0.9 * size < limits[name] < size
            for name, size in {"v4:2x2x1": 32, "v5e:2x2": 16, "v6e:2x2": 32}.items()
        )
        and 86 < limits["v5p:2x2x1"] < 96
    )
    four = topology("v4:2x2x2")
    # One device per chip, four chips per host.
    assert len(four.devices) == 8 and four.num_hosts == 2


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("v5e", "CHIP:SHAPE"),
        ("v7:2x2", "v5e:4x4"),
        ("v5e:3x3", "known forms"),
        ("h100:8", "CHIP:SHAPE"),
        ("v5e:4x4x2", "two sides"),
        ("v5e:4x4x2slice", "v5e:4x4x2slices"),
    ],
)
def test_a_topology_that_does_not_exist_is_refused_with_those_that_do(name, words):
    topology("v5e:1x1")
    with pytest.raises(UserError, match=words):
        open_topology(name)


def test_without_the_compiler_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "libtpu", None)
    with pytest.raises(UserError, match="pip install libtpu"):
        open_topology("v5e:4x4")
