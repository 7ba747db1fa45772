"""Programs whose cost is known in closed form, compiled for TPUs that are not there; and the parts, by hand."""

import itertools
import json
import math
import operator
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import settings as examples
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from crossin_jax import config as settings
from crossin_jax.config import UserError
from crossin_jax.parallel.cost import _window_products, count
from crossin_jax.parallel.mesh import make_mesh
from crossin_jax.parallel.topology import CHIPS, compile_program, open_topology, shard_bytes
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
"""


def test_loops_by_hand():
    cost = count(BY_HAND)
    turns = 10 * 3  # the inner counter goes -1, 1, 3
    assert cost.flops == (turns + 1) * 2 * 8 ** 3 and cost.unknown_loops == 1
    assert cost.cycles == 10 * 7 and cost.matrix_cycles == 0
    assert cost.collectives == {"all-gather": 10} and cost.sent == {"all-gather": 10 * 3 * 8 * 8 * 4}
    # a product reads its operand twice and writes; a gather reads one part and writes four; a copy reads and writes
    assert cost.bytes == 256 * ((turns + 1) * 3 + 10 * 5 + 10 * 2)


# ---- one instruction at a time


def program_of(*lines: str, beside: str = "") -> str:
    """The text of a program with these instructions, the last of which is its result."""
    body = "".join(f"  {line}\n" for line in (*lines[:-1], f"ROOT {lines[-1]}"))
    return f"HloModule m\n\n{beside}\nENTRY %main (x: f32[8]) -> f32[8] {{\n{body}}}\n"


@pytest.mark.parametrize(("kind", "bits"), [
    ("f32", 32), ("bf16", 16), ("f16", 16), ("s32", 32), ("u8", 8), ("s8", 8), ("pred", 8), ("s4", 4), ("u4", 4),
    ("f8e4m3fn", 8), ("s64", 64)])
def test_a_copy_reads_and_writes_every_number_at_its_width(kind, bits):
    """Four-bit numbers lie two in a byte; truth values take a byte each."""
    cost = count(program_of(f"%x = {kind}[6,32]{{1,0:T(8,128)}} parameter(0)",
                            f"%y = {kind}[6,32]{{1,0:T(8,128)}} copy(%x)"))
    assert cost.bytes == 2 * 6 * 32 * bits / 8


@pytest.mark.parametrize(("space", "arrays"), [("", 2), ("S(0)", 2), ("S(1)", 1), ("S(2)", 1), ("S(5)", 1)])
def test_only_what_lies_in_hbm_is_traffic(space, arrays):
    """A layout with a memory space of a number lies elsewhere: in the core or on the host."""
    cost = count(program_of("%x = f32[64]{0:T(256)} parameter(0)",
                            f"%y = f32[64]{{0:T(256){space}}} copy(%x)"))
    assert cost.bytes == arrays * 64 * 4


BIG, SMALL = "f32[32,8]{1,0:T(8,128)}", "f32[4,8]{1,0:T(8,128)}"
BIG_BYTES, SMALL_BYTES = 32 * 8 * 4, 4 * 8 * 4
TRAFFIC = [  # (instruction on %big and %small, bytes)
    (f"{SMALL} slice(%big), slice={{[0:4], [0:8]}}", 2 * SMALL_BYTES),
    (f"{SMALL} dynamic-slice(%big, %at, %at), dynamic_slice_sizes={{4,8}}", 2 * SMALL_BYTES),
    (f"{SMALL} gather(%big, %at), offset_dims={{1}}", 2 * SMALL_BYTES),
    (f"{BIG} dynamic-update-slice(%big, %small, %at, %at)", 2 * SMALL_BYTES),
    (f"{BIG} negate(%big)", 2 * BIG_BYTES),
    (f"{BIG} add(%big, %big)", 3 * BIG_BYTES),
    (f"({BIG}, {BIG[:-1]}S(1)}}, u32[]) copy-start(%big)", BIG_BYTES),
    (f"({BIG}, {BIG}, u32[]) copy-start(%big)", 2 * BIG_BYTES),
    (f"{BIG} bitcast(%big)", 0),
    (f"({BIG}, {SMALL}) tuple(%big, %small)", 0),
]


@pytest.mark.parametrize(("instruction", "expected"), TRAFFIC)
def test_an_instruction_moves_what_it_touches(instruction, expected):
    """A slice reads and writes its own bytes; an update in place those that are new; a view none."""
    cost = count(program_of(f"%big = {BIG} parameter(0)", f"%small = {SMALL} parameter(1)",
                            "%at = s32[] constant(0)", f"%y = {instruction}"))
    assert cost.bytes == expected and cost.flops == 0 and not cost.collectives


FUSIONS = [  # (what is computed of the parameters %p and %q, type of the result, bytes)
    ((f"%r = {BIG} add(%p, %p)",), BIG, BIG_BYTES + SMALL_BYTES + BIG_BYTES),
    ((f"%a = {SMALL} slice(%p), slice={{[0:4], [0:8]}}", f"%r = {SMALL} add(%a, %q)"), SMALL, 3 * SMALL_BYTES),
    ((f"%a = {SMALL} slice(%p), slice={{[0:4], [0:8]}}", f"%b = {BIG} negate(%p)",
      f"%r = {SMALL} add(%a, %q)"), SMALL, BIG_BYTES + 2 * SMALL_BYTES),
    (("%i = s32[] constant(0)", f"%r = {BIG} dynamic-update-slice(%p, %q, %i, %i)"), BIG, 2 * SMALL_BYTES),
]


@pytest.mark.parametrize(("inside", "result", "expected"), FUSIONS)
def test_a_fusion_reads_what_it_uses_and_writes_what_is_new(inside, result, expected):
    """A parameter of which only slices are used costs the slices; one updated in place costs the update."""
    parameters = f"  %p = {BIG} parameter(0)\n  %q = {SMALL} parameter(1)\n"
    body = "".join(f"  {line}\n" for line in (*inside[:-1], f"ROOT {inside[-1]}"))
    beside = f"%fused (p: f32[32,8], q: f32[4,8]) -> f32[8] {{\n{parameters}{body}}}\n"
    cost = count(program_of(f"%big = {BIG} parameter(0)", f"%small = {SMALL} parameter(1)",
                            f"%y = {result} fusion(%big, %small), kind=kLoop, calls=%fused", beside=beside))
    assert cost.bytes == expected


COLLECTIVES = [  # (instruction on %big, kind, bytes that a chip sends)
    (f"f32[128,8]{{1,0:T(8,128)}} all-gather(%big), dimensions={{0}}", "all-gather", 3 * BIG_BYTES),
    (f"({BIG}, f32[128,8]{{1,0:T(8,128)}}) all-gather-start(%big), dimensions={{0}}", "all-gather", 3 * BIG_BYTES),
    (f"{BIG} all-reduce(%big), to_apply=%sum", "all-reduce", 2 * BIG_BYTES),
    (f"{BIG} all-reduce-start(%big), to_apply=%sum", "all-reduce", 2 * BIG_BYTES),
    (f"{SMALL} reduce-scatter(%big), dimensions={{0}}, to_apply=%sum", "reduce-scatter", BIG_BYTES),
    (f"{BIG} all-to-all(%big), dimensions={{0}}", "all-to-all", BIG_BYTES),
    (f"{BIG} collective-permute(%big), source_target_pairs={{{{0,1}}}}", "collective-permute", BIG_BYTES),
]


@pytest.mark.parametrize(("instruction", "kind", "sent"), COLLECTIVES)
def test_a_collective_sends_its_bytes_once_and_a_sum_twice(instruction, kind, sent):
    """Gathering sends what others lack; a sum goes round the ring once to add up and once to spread."""
    beside = "%sum (a: f32[], b: f32[]) -> f32[] {\n  %a = f32[] parameter(0)\n  %b = f32[] parameter(1)\n" \
             "  ROOT %c = f32[] add(%a, %b)\n}\n"
    cost = count(program_of(f"%big = {BIG} parameter(0)", f"%y = {instruction}", beside=beside))
    assert cost.sent == {kind: sent} and cost.collectives == {kind: 1}


def test_a_sum_of_which_each_chip_keeps_a_slice_is_a_reduce_scatter():
    """The compiler writes it as a fusion of that name around a sum; its bytes go once."""
    beside = (f"%all-reduce-scatter.1 (p: f32[32,8]) -> f32[4,8] {{\n  %p = {BIG} parameter(0)\n"
              f"  %s = {BIG} all-reduce(%p), to_apply=%sum\n"
              f"  ROOT %r = {SMALL} slice(%s), slice={{[0:4], [0:8]}}\n}}\n")
    cost = count(program_of(f"%big = {BIG} parameter(0)",
                            f"%y = {SMALL} fusion(%big), kind=kCustom, calls=%all-reduce-scatter.1", beside=beside))
    assert cost.sent == {"reduce-scatter": BIG_BYTES} and cost.collectives == {"reduce-scatter": 1}


def test_a_collective_beside_other_work_counts_once():
    """The text of every fusion that it spans repeats it; only where it starts it counts."""
    def fusion(name: str, *more: str) -> str:
        return (f"%{name} (p: f32[32,8]) -> f32[32,8] {{\n  %p = {BIG} parameter(0)\n"
                f"  %s = {BIG} all-reduce(%p), to_apply=%sum, backend_config={{chain_id=1}}\n"
                + "".join(f"  {line}\n" for line in more) + f"  ROOT %r = {BIG} negate(%p)\n}}\n")

    start = fusion("first", f'%t = {BIG} custom-call(%s), custom_call_target="AsyncCollectiveStart"')
    cost = count(program_of(f"%big = {BIG} parameter(0)", f"%y = {BIG} fusion(%big), calls=%first",
                            f"%z = {BIG} fusion(%y), calls=%second", beside=start + fusion("second")))
    assert cost.collectives == {"all-reduce": 1} and cost.sent == {"all-reduce": 2 * BIG_BYTES}


@pytest.mark.parametrize("form", ["branch_computations={%few, %many}", "true_computation=%few, false_computation=%many",
                                  "branch_computations={%many, %few}"])
def test_of_two_branches_the_costlier_counts(form):
    """Which one runs depends on data; everything before and after counts too."""
    def branch(name: str, cycles: int, dots: int) -> str:
        lines = [f"  %p = {SMALL} parameter(0)"]
        lines += [f"  %d{i} = f32[8,8]{{1,0}} dot(%p, %p), lhs_contracting_dims={{0}}, rhs_contracting_dims={{0}}"
                  for i in range(dots)]
        lines += [f'  ROOT %r = {SMALL} copy(%p), backend_config={{"estimated_cycles":"{cycles}"}}']
        return f"%{name} (p: f32[4,8]) -> f32[4,8] {{\n" + "\n".join(lines) + "\n}\n"

    cost = count(program_of(
        f"%small = {SMALL} parameter(0)", "%which = pred[] parameter(1)",
        f'%before = {SMALL} copy(%small), backend_config={{"estimated_cycles":"5"}}',
        f"%chosen = {SMALL} conditional(%which, %before, %before), {form}",
        f'%after = {SMALL} copy(%chosen), backend_config={{"estimated_cycles":"6"}}',
        beside=branch("few", 10, 3) + branch("many", 100, 1)))
    assert cost.cycles == 5 + 100 + 6 and cost.flops == 2 * 4 * 8 * 8
    assert cost.bytes == 2 * 3 * SMALL_BYTES + (2 * SMALL_BYTES + 8 * 8 * 4)


def test_cycles_of_matrix_work_are_those_of_fusions_that_hold_a_product():
    """Also where the product lies in a fusion within the fusion; other fusions count as cycles alone."""
    inner = (f"%inner (p: f32[4,8]) -> f32[8,8] {{\n  %p = {SMALL} parameter(0)\n  ROOT %d = f32[8,8]{{1,0}} "
             "dot(%p, %p), lhs_contracting_dims={0}, rhs_contracting_dims={0}\n}\n")
    outer = (f"%outer (q: f32[4,8]) -> f32[8,8] {{\n  %q = {SMALL} parameter(0)\n"
             "  ROOT %f = f32[8,8]{1,0} fusion(%q), kind=kOutput, calls=%inner\n}\n")
    plain = f"%plain (q: f32[4,8]) -> f32[4,8] {{\n  %q = {SMALL} parameter(0)\n  ROOT %n = {SMALL} negate(%q)\n}}\n"
    cost = count(program_of(
        f"%small = {SMALL} parameter(0)",
        f'%y = {SMALL} fusion(%small), calls=%plain, backend_config={{"estimated_cycles":"7"}}',
        '%z = f32[8,8]{1,0} fusion(%y), calls=%outer, backend_config={"estimated_cycles":"40"}',
        beside=inner + outer + plain))
    assert (cost.cycles, cost.matrix_cycles, cost.flops) == (47, 40, 2 * 4 * 8 * 8)


def test_kernels_are_counted_by_name_with_their_traffic():
    """The number that the compiler puts behind a name is no part of it; other custom calls are no kernels."""
    cost = count(program_of(
        f"%small = {SMALL} parameter(0)",
        f'%splash_mha_fwd.1 = {SMALL} custom-call(%small, %small), custom_call_target="tpu_custom_call"',
        f'%splash_mha_fwd.23 = {SMALL} custom-call(%small), custom_call_target="tpu_custom_call"',
        f'%other = {SMALL} custom-call(%small), custom_call_target="Sharding"'))
    assert cost.kernels == {"splash_mha_fwd": 2} and cost.bytes == (3 + 2) * SMALL_BYTES


OPERATIONS = {"add": operator.add, "subtract": operator.sub, "multiply": operator.mul, "maximum": max, "minimum": min,
              "divide": lambda a, b: math.trunc(a / b), "remainder": lambda a, b: int(math.fmod(a, b))}


@examples(max_examples=150, deadline=None)
@given(st.integers(-20, 20), st.sampled_from(sorted(OPERATIONS)), st.integers(1, 4), st.integers(-20, 60),
       st.sampled_from(["LT", "LE", "GT", "GE", "NE", "EQ"]))
@example(-7, "divide", 2, 0, "NE")
@example(-7, "remainder", 4, -7, "EQ")
def test_loops_turn_as_often_as_their_counters_say(start, name, step, limit, direction):
    """The counter is followed as the program would: i = i OP step while i COMPARES limit."""
    turns, i = 0, start
    while getattr(operator, direction.lower())(i, limit) and turns < 100:
        turns, i = turns + 1, OPERATIONS[name](i, step)
    assume(turns < 100)  # no loop without end
    state = f"(s32[], {SMALL})"
    loop = (f"%body (s: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {{\n  %s = {state} parameter(0)\n"
            f"  %i = s32[] get-tuple-element(%s), index=0\n  %x = {SMALL} get-tuple-element(%s), index=1\n"
            f"  %step = s32[] constant({step})\n  %next = s32[] {name}(%i, %step)\n  %y = {SMALL} copy(%x)\n"
            f"  ROOT %t = {state} tuple(%next, %y)\n}}\n"
            f"%condition (c: (s32[], f32[4,8])) -> pred[] {{\n  %c = {state} parameter(0)\n"
            f"  %j = s32[] get-tuple-element(%c), index=0\n  %limit = s32[] constant({limit})\n"
            f"  ROOT %goes = pred[] compare(%j, %limit), direction={direction}\n}}\n")
    cost = count(program_of(f"%small = {SMALL} parameter(0)", f"%start = s32[] constant({start})",
                            f"%state = {state} tuple(%start, %small)",
                            f"%loop = {state} while(%state), condition=%condition, body=%body",
                            f"%out = {SMALL} get-tuple-element(%loop), index=1", beside=loop))
    assert cost.bytes == turns * 2 * SMALL_BYTES and cost.unknown_loops == 0


@pytest.mark.parametrize(("known", "turns", "unknown"), [('"known_trip_count":{"n":"7"}', 7, 0), ("", 1, 1)])
def test_a_loop_over_data_turns_as_often_as_the_compiler_says(known, turns, unknown):
    """A number of turns that the compiler wrote down is taken; else the loop counts once and is told."""
    state = f"(s32[], {SMALL})"
    loop = (f"%body (s: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {{\n  %s = {state} parameter(0)\n"
            f"  %i = s32[] get-tuple-element(%s), index=0\n  %x = {SMALL} get-tuple-element(%s), index=1\n"
            f"  %y = {SMALL} copy(%x)\n  ROOT %t = {state} tuple(%i, %y)\n}}\n"
            f"%condition (c: (s32[], f32[4,8])) -> pred[] {{\n  %c = {state} parameter(0)\n"
            f"  %j = s32[] get-tuple-element(%c), index=0\n  %limit = s32[] constant(3)\n"
            f"  ROOT %goes = pred[] compare(%j, %limit), direction=LT\n}}\n")
    cost = count(program_of(f"%small = {SMALL} parameter(0)", "%start = s32[] parameter(1)",
                            f"%state = {state} tuple(%start, %small)",
                            f"%loop = {state} while(%state), condition=%condition, body=%body, "
                            f"backend_config={{{known}}}",
                            f"%out = {SMALL} get-tuple-element(%loop), index=1", beside=loop))
    assert cost.bytes == turns * 2 * SMALL_BYTES and cost.unknown_loops == unknown


@pytest.mark.parametrize(("size", "kernel", "stride", "pad"), [(8, 1, 1, (0, 0)), (8, 3, 1, (1, 1)), (9, 3, 2, (2, 0)),
                                                               (12, 4, 4, (0, 0))])
def test_a_convolution_counts_the_products_with_input(size, kernel, stride, pad):
    """Two operations for each pair of numbers that meet; padding meets nothing."""
    batch, features, filters = 3, 5, 7
    out = (size + sum(pad) - kernel) // stride + 1
    meet = sum(0 <= o * stride - pad[0] + k < size for o in range(out) for k in range(kernel))
    cost = count(program_of(
        f"%x = f32[{batch},{size},{features}]{{2,1,0}} parameter(0)",
        f"%w = f32[{kernel},{features},{filters}]{{2,1,0}} parameter(1)",
        f"%y = f32[{batch},{out},{filters}]{{2,1,0}} convolution(%x, %w), window={{size={kernel} stride={stride} "
        f"pad={pad[0]}_{pad[1]}}}, dim_labels=b0f_0io->b0f"))
    assert cost.flops == 2 * batch * features * filters * meet



@pytest.mark.parametrize(("size", "kernel", "out", "stride", "low", "dilate", "spread"), [
    (8, 1, 8, 1, 0, 1, 1), (8, 3, 8, 1, 1, 1, 1), (5, 4, 16, 1, 3, 4, 1), (9, 3, 3, 3, 2, 1, 2)])
def test_positions_of_a_window_that_meet_an_input(size, kernel, out, stride, low, dilate, spread):
    padded = [False] * 1000  # zeros, and where inputs lie among them
    for i in range(size):
        padded[100 + i * dilate] = True
    expected = sum(padded[100 + o * stride - low + k * spread]
                   for o, k in itertools.product(range(out), range(kernel)))
    assert _window_products(size, kernel, out, stride, low, dilate, spread) == expected


def compiled(function, *shapes, name="v5e:1x1", specs=None, mesh=None):
    """A program for arrays of these shapes in bfloat16."""
    devices = list(topology(name).devices)
    mesh = mesh or make_mesh(settings.Mesh(fsdp=len(devices)), devices)
    inputs = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, spec))
              for shape, spec in zip(shapes, specs or [PartitionSpec()] * len(shapes), strict=True)]
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
    monkeypatch.setattr("crossin_jax.parallel.topology.count", lambda text: texts.append(text) or count(text))
    program, _ = compiled(chain, (M, D), (L, D, D), name="v5e:2x2",
                          specs=[PartitionSpec("fsdp"), PartitionSpec(None, "fsdp")])
    (tmp_path / "program.hlo").write_text(texts[0])
    tool = shared.parent / "tools/hlo_cost.py"
    said = json.loads(subprocess.run([sys.executable, str(tool), str(tmp_path / "program.hlo")], check=True,
                                     capture_output=True, text=True).stdout)
    cost = program.cost
    assert (cost.flops, cost.cycles, cost.matrix_cycles) == (
        said["flops"], said["est_cycles"], said["est_cycles_matmul"])
    assert cost.flops == L * PRODUCT / 4 and cost.collectives == said["coll_exec"] and cost.collectives


def test_rematerialisation_costs_one_more_forward_pass():
    def step(x, weights, remat):
        body = jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None), prevent_cse=False) if remat else None
        return jax.grad(lambda x, w: chain(x, w, *([body] if remat else [])).astype(jnp.float32).sum(),
                        argnums=(0, 1))(x, weights)

    plain, again = (compiled(lambda x, w, remat=remat: step(x, w, remat), (M, D), (L, D, D))[0].cost.flops
                    for remat in (False, True))
    assert (plain, again) == (3 * L * PRODUCT, 4 * L * PRODUCT)


def test_collectives_of_a_scan_over_sharded_weights():
    specs = [PartitionSpec("fsdp"), PartitionSpec(None, "fsdp")]
    program, _ = compiled(chain, (4 * M, D), (L, D, D), name="v5e:2x2", specs=specs)
    cost = program.cost
    assert cost.flops == L * PRODUCT  # of the M rows on each chip
    assert sum(cost.sent.values()) == L * D * D * 2 * 3 / 4  # three quarters of every weight come from others


def test_what_does_not_fit_has_the_peak_that_it_would_need():
    size = 1 << 18
    program, _ = compiled(lambda x, y: jnp.sin(x @ y) @ x, (size, 1024), (1024, size))
    slice_ = topology("v5e:1x1")
    assert program.cost is None and program.peak_bytes > 2 * size * size > slice_.hbm_limit


@pytest.mark.parametrize(("specs", "share"), [
    ((), 1), (("fsdp",), 4), ((None, "tensor"), 2), (("fsdp", "tensor"), 8), ((("fsdp", "tensor"),), 8)])
def test_a_chip_holds_its_shard_and_a_whole_copy_of_what_is_not_sharded(specs, share):
    """Bytes by hand; an axis that does not appear repeats the array, and what has no place counts nothing."""
    mesh = make_mesh(settings.Mesh(fsdp=4, tensor=2))
    tree = {"array": jax.ShapeDtypeStruct((16, 8), jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec(*specs))),
            "small": jax.ShapeDtypeStruct((3,), jnp.int8, sharding=NamedSharding(mesh, PartitionSpec())),
            "nowhere": jax.ShapeDtypeStruct((100,), jnp.float32)}
    assert shard_bytes(tree) == 16 * 8 * 2 // share + 3


@pytest.mark.parametrize(("kind", "units", "hbm", "links"), [
    ("v4", 8, 1228, 2400), ("v5e", 4, 819, 1600), ("v5p", 8, 2765, 4800), ("v6e", 16, 1640, 3200)])
def test_chips_are_those_of_the_data_sheets(kind, units, hbm, links):
    """Gigabytes per second of HBM, gigabits per second of all links, and a clock that makes up the peak."""
    chip, peak = CHIPS[kind], PEAK_FLOPS[f"TPU {kind}"]
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
    limits = {name: topology(name).hbm_limit / 2**30 for name in ("v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2")}
    assert all(0.9 * size < limits[name] < size for name, size in
               {"v4:2x2x1": 32, "v5e:2x2": 16, "v6e:2x2": 32}.items()) and 86 < limits["v5p:2x2x1"] < 96
    four = topology("v4:2x2x2")
    assert len(four.devices) == 8 and four.num_hosts == 2  # one device per chip, four chips per host


@pytest.mark.parametrize(("name", "words"), [
    ("v5e", "CHIP:SHAPE"), ("v7:2x2", "v5e:4x4"), ("v5e:3x3", "known forms"), ("h100:8", "CHIP:SHAPE")])
def test_a_topology_that_does_not_exist_is_refused_with_those_that_do(name, words):
    topology("v5e:1x1")
    with pytest.raises(UserError, match=words):
        open_topology(name)


def test_without_the_compiler_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "libtpu", None)
    with pytest.raises(UserError, match="pip install libtpu"):
        open_topology("v5e:4x4")
