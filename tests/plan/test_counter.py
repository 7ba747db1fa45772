"""The counter of a program's cost, one instruction at a time, against sums by hand."""

import math
import operator

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from crossin_jax.plan.cost import count
from crossin_jax.plan.schedule import Event, Speed, waiting_seconds

BIG, SMALL = "f32[32,8]{1,0:T(8,128)}", "f32[4,8]{1,0:T(8,128)}"
BIG_BYTES, SMALL_BYTES = 32 * 8 * 4, 4 * 8 * 4
PRODUCT = "f32[8,8]{1,0} dot(%p, %p), lhs_contracting_dims={0}, rhs_contracting_dims={0}"
PRODUCT_FLOPS, PRODUCT_BYTES = 2 * 4 * 8 * 8, 2 * SMALL_BYTES + 8 * 8 * 4
SLICE = "slice={[0:4], [0:8]}"


def computation(name: str, *lines: str) -> str:
    """The text of a computation; the last line is its result."""
    body = "".join(f"  {line}\n" for line in (*lines[:-1], f"ROOT {lines[-1]}"))
    return f"%{name} (x: f32[8]) -> f32[8] {{\n{body}}}\n\n"


def program(*lines: str, beside: str = "") -> str:
    """The text of a program with these instructions and the computations that they call."""
    return f"HloModule m\n\n{beside}ENTRY {computation('main', *lines)}"


def annotated(cycles: int) -> str:
    """The compiler's estimate, as it stands behind an instruction."""
    return f'backend_config={{"estimated_cycles":"{cycles}"}}'


WIDTHS = dict(f32=32, bf16=16, f16=16, s32=32, u8=8, s8=8, pred=8, s4=4, u4=4, f8e4m3fn=8, s64=64)


@pytest.mark.parametrize(("kind", "bits"), WIDTHS.items())
def test_a_copy_reads_and_writes_every_number_at_its_width(kind, bits):
    """Four-bit numbers lie two in a byte; truth values take a byte each."""
    array = f"{kind}[6,32]{{1,0:T(8,128)}}"
    cost = count(program(f"%x = {array} parameter(0)", f"%y = {array} copy(%x)"))
    assert cost.bytes == 2 * 6 * 32 * bits / 8


@pytest.mark.parametrize(
    ("space", "arrays"), [("", 2), ("S(0)", 2), ("S(1)", 1), ("S(2)", 1), ("S(5)", 1)]
)
def test_only_what_lies_in_hbm_is_traffic(space, arrays):
    """A layout with a memory space of a number lies elsewhere: in the core or on the host."""
    target = f"f32[64]{{0:T(256){space}}}"
    cost = count(program("%x = f32[64]{0:T(256)} parameter(0)", f"%y = {target} copy(%x)"))
    assert cost.bytes == arrays * 64 * 4


TRAFFIC = [  # (instruction on %big and %small, bytes)
    (f"{SMALL} slice(%big), {SLICE}", 2 * SMALL_BYTES),
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
    """A slice costs its own bytes, an update in place what is new, a view nothing."""
    parameters = f"%big = {BIG} parameter(0)", f"%small = {SMALL} parameter(1)"
    cost = count(program(*parameters, "%at = s32[] constant(0)", f"%y = {instruction}"))
    assert cost.bytes == expected and cost.flops == 0 and not cost.collectives


FUSIONS = [  # (type of the result, bytes, what is computed of the parameters %p and %q)
    (BIG, 2 * BIG_BYTES + SMALL_BYTES, [f"%r = {BIG} add(%p, %p)"]),
    (SMALL, 3 * SMALL_BYTES, [f"%a = {SMALL} slice(%p), {SLICE}", f"%r = {SMALL} add(%a, %q)"]),
    (
        SMALL,
        BIG_BYTES + 2 * SMALL_BYTES,
        [f"%a = {SMALL} slice(%p), {SLICE}", f"%b = {BIG} negate(%p)", f"%r = {SMALL} add(%a, %q)"],
    ),
    (
        BIG,
        2 * SMALL_BYTES,
        ["%i = s32[] constant(0)", f"%r = {BIG} dynamic-update-slice(%p, %q, %i, %i)"],
    ),
]


@pytest.mark.parametrize(("result", "expected", "inside"), FUSIONS)
def test_a_fusion_reads_what_it_uses_and_writes_what_is_new(result, expected, inside):
    """A parameter of which slices are used costs the slices; one updated in place the update."""
    parameters = f"%p = {BIG} parameter(0)", f"%q = {SMALL} parameter(1)"
    cost = count(
        program(
            f"%big = {BIG} parameter(0)",
            f"%small = {SMALL} parameter(1)",
            f"%y = {result} fusion(%big, %small), kind=kLoop, calls=%fused",
            beside=computation("fused", *parameters, *inside),
        )
    )
    assert cost.bytes == expected


GATHERED = "f32[128,8]{1,0:T(8,128)}"
COLLECTIVES = [  # (instruction on %big, kind, bytes that a chip sends)
    (f"{GATHERED} all-gather(%big), dimensions={{0}}", "all-gather", 3 * BIG_BYTES),
    (f"({BIG}, {GATHERED}) all-gather-start(%big), dimensions={{0}}", "all-gather", 3 * BIG_BYTES),
    (f"{BIG} all-reduce(%big), to_apply=%sum", "all-reduce", 2 * BIG_BYTES),
    (f"{BIG} all-reduce-start(%big), to_apply=%sum", "all-reduce", 2 * BIG_BYTES),
    (f"{SMALL} reduce-scatter(%big), to_apply=%sum", "reduce-scatter", BIG_BYTES),
    (f"{BIG} all-to-all(%big), dimensions={{0}}", "all-to-all", BIG_BYTES),
    (f"{BIG} collective-permute(%big)", "collective-permute", BIG_BYTES),
]


@pytest.mark.parametrize(("instruction", "kind", "sent"), COLLECTIVES)
def test_a_collective_sends_its_bytes_once_and_a_sum_twice(instruction, kind, sent):
    """Gathering sends what others lack; a sum goes round once to add up and once to spread."""
    two = "%a = f32[] parameter(0)", "%b = f32[] parameter(1)"
    total = computation("sum", *two, "%c = f32[] add(%a, %b)")
    cost = count(program(f"%big = {BIG} parameter(0)", f"%y = {instruction}", beside=total))
    assert cost.sent == {kind: sent} and cost.collectives == {kind: 1}


def test_a_sum_of_which_each_chip_keeps_a_slice_is_a_reduce_scatter():
    """The compiler writes it as a fusion of that name around a sum; its bytes go once."""
    fused = computation(
        "all-reduce-scatter.1",
        f"%p = {BIG} parameter(0)",
        f"%s = {BIG} all-reduce(%p), to_apply=%sum",
        f"%r = {SMALL} slice(%s), {SLICE}",
    )
    call = f"%y = {SMALL} fusion(%big), kind=kCustom, calls=%all-reduce-scatter.1"
    cost = count(program(f"%big = {BIG} parameter(0)", call, beside=fused))
    assert cost.sent == {"reduce-scatter": BIG_BYTES}
    assert cost.collectives == {"reduce-scatter": 1}


def test_a_collective_beside_other_work_counts_once():
    """The text of every fusion that it spans repeats it; only where it starts it counts."""
    parameter, result = f"%p = {BIG} parameter(0)", f"%r = {BIG} negate(%p)"
    total = f"%s = {BIG} all-reduce(%p), to_apply=%sum, backend_config={{chain_id=1}}"
    start = f'%t = {BIG} custom-call(%s), custom_call_target="AsyncCollectiveStart"'
    cost = count(
        program(
            f"%big = {BIG} parameter(0)",
            f"%y = {BIG} fusion(%big), calls=%first",
            f"%z = {BIG} fusion(%y), calls=%second",
            beside=computation("first", parameter, total, start, result)
            + computation("second", parameter, total, result),
        )
    )
    assert cost.collectives == {"all-reduce": 1} and cost.sent == {"all-reduce": 2 * BIG_BYTES}


@pytest.mark.parametrize(
    "branches",
    [
        "branch_computations={%few, %many}",
        "branch_computations={%many, %few}",
        "true_computation=%few, false_computation=%many",
    ],
)
def test_of_two_branches_the_costlier_counts(branches):
    """Which one runs depends on data; everything before and after it counts too."""

    def branch(name: str, cycles: int, products: int) -> str:
        lines = [f"%d{i} = {PRODUCT}" for i in range(products)]
        result = f"%r = {SMALL} copy(%p), {annotated(cycles)}"
        return computation(name, f"%p = {SMALL} parameter(0)", *lines, result)

    cost = count(
        program(
            f"%small = {SMALL} parameter(0)",
            "%which = pred[] parameter(1)",
            f"%before = {SMALL} copy(%small), {annotated(5)}",
            f"%chosen = {SMALL} conditional(%which, %before, %before), {branches}",
            f"%after = {SMALL} copy(%chosen), {annotated(6)}",
            beside=branch("few", 10, products=3) + branch("many", 100, products=1),
        )
    )
    assert cost.cycles == 5 + 100 + 6 and cost.flops == PRODUCT_FLOPS
    assert cost.bytes == 3 * 2 * SMALL_BYTES + PRODUCT_BYTES


def test_cycles_of_matrix_work_are_those_of_fusions_that_hold_a_product():
    """Also where the product lies in a fusion within the fusion; other fusions count apart."""
    parameter = f"%p = {SMALL} parameter(0)"
    inner = computation("inner", parameter, f"%d = {PRODUCT}")
    outer = computation("outer", parameter, "%f = f32[8,8]{1,0} fusion(%p), calls=%inner")
    plain = computation("plain", parameter, f"%n = {SMALL} negate(%p)")
    cost = count(
        program(
            f"%small = {SMALL} parameter(0)",
            f"%y = {SMALL} fusion(%small), calls=%plain, {annotated(7)}",
            f"%z = f32[8,8]{{1,0}} fusion(%y), calls=%outer, {annotated(40)}",
            beside=inner + outer + plain,
        )
    )
    assert (cost.cycles, cost.matrix_cycles, cost.flops) == (47, 40, PRODUCT_FLOPS)


def test_kernels_are_counted_by_name_with_their_traffic():
    """The number behind a name is no part of it; other custom calls are no kernels."""
    pallas = 'custom_call_target="tpu_custom_call"'
    cost = count(
        program(
            f"%small = {SMALL} parameter(0)",
            f"%splash_mha_fwd.1 = {SMALL} custom-call(%small, %small), {pallas}",
            f"%splash_mha_fwd.23 = {SMALL} custom-call(%small), {pallas}",
            f'%other = {SMALL} custom-call(%small), custom_call_target="Sharding"',
        )
    )
    assert cost.kernels == {"splash_mha_fwd": 2} and cost.bytes == (3 + 2) * SMALL_BYTES


# ---- loops

PAIR = f"(s32[], {SMALL})"


def loop(start: str, update: str, goes_on: str, more: str = "") -> str:
    """A program whose loop copies a small array once a turn; %i counts, from an instruction."""
    unpacked = f"%s = {PAIR} parameter(0)", "%i = s32[] get-tuple-element(%s), index=0"
    body = computation(
        "body",
        *unpacked,
        f"%x = {SMALL} get-tuple-element(%s), index=1",
        *update.split("; "),
        f"%y = {SMALL} copy(%x)",
        f"%t = {PAIR} tuple(%next, %y)",
    )
    condition = computation("condition", *unpacked, *goes_on.split("; "))
    return program(
        f"%small = {SMALL} parameter(0)",
        f"%start = s32[] {start}",
        f"%state = {PAIR} tuple(%start, %small)",
        f"%loop = {PAIR} while(%state), condition=%condition, body=%body{more}",
        f"%out = {SMALL} get-tuple-element(%loop), index=1",
        beside=body + condition,
    )


OPERATIONS = {
    "add": operator.add,
    "subtract": operator.sub,
    "multiply": operator.mul,
    "maximum": max,
    "minimum": min,
    "divide": lambda a, b: math.trunc(a / b),
    "remainder": lambda a, b: int(math.fmod(a, b)),
}


@settings(max_examples=150, deadline=None)
@given(
    start=st.integers(-20, 20),
    name=st.sampled_from(sorted(OPERATIONS)),
    step=st.integers(1, 4),
    limit=st.integers(-20, 60),
    direction=st.sampled_from(["LT", "LE", "GT", "GE", "NE", "EQ"]),
)
@example(start=-7, name="divide", step=2, limit=0, direction="NE")
@example(start=-7, name="remainder", step=4, limit=-7, direction="EQ")
def test_loops_turn_as_often_as_their_counters_say(start, name, step, limit, direction):
    """The counter is followed as the program would: i = i OP step while i COMPARES limit."""
    turns, i = 0, start
    while getattr(operator, direction.lower())(i, limit) and turns < 100:
        turns, i = turns + 1, OPERATIONS[name](i, step)
    assume(turns < 100)  # no loop without end
    update = f"%step = s32[] constant({step}); %next = s32[] {name}(%i, %step)"
    goes_on = f"%n = s32[] constant({limit}); %go = pred[] compare(%i, %n), direction={direction}"
    cost = count(loop(f"constant({start})", update, goes_on))
    assert cost.bytes == turns * 2 * SMALL_BYTES and cost.unknown_loops == 0


@pytest.mark.parametrize(
    ("told", "turns", "unknown"),
    [(', backend_config={"known_trip_count":{"n":"7"}}', 7, 0), ("", 1, 1)],
)
def test_a_loop_over_data_turns_as_often_as_the_compiler_says(told, turns, unknown):
    """Turns that the compiler wrote down are taken; else the loop counts once and is told."""
    goes_on = "%n = s32[] constant(3); %go = pred[] compare(%i, %n), direction=LT"
    cost = count(loop("parameter(1)", "%next = s32[] negate(%i)", goes_on, told))
    assert cost.bytes == turns * 2 * SMALL_BYTES and cost.unknown_loops == unknown


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "pad"),
    [(8, 1, 1, (0, 0)), (8, 3, 1, (1, 1)), (9, 3, 2, (2, 0)), (12, 4, 4, (0, 0))],
)
def test_a_convolution_counts_the_products_with_input(size, kernel, stride, pad):
    """Two operations for each pair of numbers that meet; padding meets nothing."""
    batch, features, filters = 3, 5, 7
    out = (size + sum(pad) - kernel) // stride + 1
    meet = sum(0 <= o * stride - pad[0] + k < size for o in range(out) for k in range(kernel))
    window = f"window={{size={kernel} stride={stride} pad={pad[0]}_{pad[1]}}}"
    cost = count(
        program(
            f"%x = f32[{batch},{size},{features}]{{2,1,0}} parameter(0)",
            f"%w = f32[{kernel},{features},{filters}]{{2,1,0}} parameter(1)",
            f"%y = f32[{batch},{out},{filters}]{{2,1,0}} convolution(%x, %w), {window}, "
            "dim_labels=b0f_0io->b0f",
        )
    )
    assert cost.flops == 2 * batch * features * filters * meet


# ---- waiting for the links

# 1,000 cycles per second, 100 bytes per second over links and 10 between slices
SPEED = Speed(1e3, 100.0, 10.0, 0.5, 0.25)


def wait(*events: Event, times: float = 1, speed: Speed = SPEED) -> float:
    """Seconds that a chip waits in a computation."""
    return waiting_seconds([(times, list(events))], speed)


def test_a_chip_waits_for_what_is_not_done_by_then():
    """600 bytes take 6 seconds and half a one; two collectives share the links, and the network is
    another way.
    """
    start, done = Event("start", 600, "a"), Event("done", key="a")
    assert wait(start, done) == 6.5 and wait(start, done, times=3) == 19.5
    assert wait(start, Event("work", 5000), done) == 1.5
    assert wait(Event("work", 100), start, Event("work", 9000), done, Event("work", 100)) == 0
    # The second starts when the first is done, and then has 1.5 seconds to go.
    both = start, Event("start", 100, "b"), Event("work", 6500), done, Event("done", key="b")
    assert wait(*both) == 1.5
    between = start, Event("start", 50, "b", True), Event("work", 6500), done
    assert wait(*between, Event("done", key="b")) == 0
    assert wait(Event("start", 50, "b", True), Event("done", key="b")) == 5.25
    assert wait(Event("done", key="a copy")) == 0


CHAIN = f'%s = {BIG} all-reduce(%p), to_apply=%sum, frontend_attributes={{chain_id="1"}}'
BESIDE = {  # how a collective of BIG_BYTES * 2 runs beside 300 cycles: (instructions, computations)
    "fusions": (
        [
            f"%y = {BIG} fusion(%big), calls=%first",
            f"%w = {BIG} fusion(%big), calls=%plain, {annotated(300)}",
            f"%z = {BIG} fusion(%y), calls=%last",
        ],
        computation(
            "first",
            f"%p = {BIG} parameter(0)",
            CHAIN,
            f'%t = {BIG} custom-call(%s), custom_call_target="AsyncCollectiveStart"',
        )
        + computation("plain", f"%p = {BIG} parameter(0)", f"%n = {BIG} negate(%p)")
        + computation(
            "last",
            f"%p = {BIG} parameter(0)",
            CHAIN,
            f'%t = {BIG} custom-call(%p, %s), custom_call_target="AsyncCollectiveDone"',
        ),
    ),
    "start and done": (
        [
            f"%y = {BIG} all-reduce-start(%big), to_apply=%sum",
            f"%w = {BIG} copy(%big), {annotated(300)}",
            f"%z = {BIG} all-reduce-done(%y)",
        ],
        "",
    ),
    "asynchronous call": (
        [
            f"%y = (({BIG}), {BIG}) async-start(%big), calls=%call",
            f"%w = {BIG} copy(%big), {annotated(300)}",
            f"%z = {BIG} async-done(%y)",
        ],
        computation(
            "call", f"%p = {BIG} parameter(0)", f"%s = {BIG} all-reduce(%p), to_apply=%sum"
        ),
    ),
}


@pytest.mark.parametrize("form", BESIDE)
def test_work_between_start_and_done_hides_a_collective(form):
    """The three forms in which the compiler writes it; nothing is hidden without them."""
    lines, beside = BESIDE[form]
    cost = count(program(f"%big = {BIG} parameter(0)", *lines, beside=beside))
    assert cost.sent == cost.beside == {"all-reduce": 2 * BIG_BYTES} and cost.cycles == 300
    speed = Speed(1e3, BIG_BYTES, 1.0)
    assert waiting_seconds(cost.timelines, speed) == pytest.approx(2 - 0.3)
    alone = count(
        program(
            f"%big = {BIG} parameter(0)",
            f"%y = {BIG} all-reduce(%big), to_apply=%sum",
            f"%w = {BIG} copy(%big), {annotated(300)}",
        )
    )
    assert alone.beside["all-reduce"] == 0
    assert waiting_seconds(alone.timelines, speed) == 2


def test_a_loop_is_work_for_what_spans_it_and_waits_every_turn():
    """Seven turns of 10 cycles hide 70 cycles of the outer one; the inner sum stands alone."""
    body = computation(
        "body",
        f"%s = {PAIR} parameter(0)",
        "%i = s32[] get-tuple-element(%s), index=0",
        f"%x = {SMALL} get-tuple-element(%s), index=1",
        f"%y = {SMALL} all-reduce(%x), to_apply=%sum",
        f"%c = {SMALL} copy(%y), {annotated(10)}",
        f"%t = {PAIR} tuple(%i, %c)",
    )
    told = 'backend_config={"known_trip_count":{"n":"7"}}'
    cost = count(
        program(
            f"%small = {SMALL} parameter(0)",
            "%start = s32[] parameter(1)",
            f"%a = {SMALL} all-reduce-start(%small), to_apply=%sum",
            f"%state = {PAIR} tuple(%start, %small)",
            f"%loop = {PAIR} while(%state), condition=%body, body=%body, {told}",
            f"%b = {SMALL} all-reduce-done(%a)",
            beside=body,
        )
    )
    speed = Speed(1e3, 2 * SMALL_BYTES, 1.0)
    assert waiting_seconds(cost.timelines, speed) == pytest.approx(7 * 1 + 1 - 0.07)


@pytest.mark.parametrize(
    ("target", "kind", "share"),
    [
        ("{1,2}x{0:3}", "ALL_REDUCE", 1),
        ("{1:4}x{0:3}", "ALL_REDUCE", 1.5),
        ("{1:3}x{0:3}", "ALL_GATHER", 2),
        ("{1,2}x{0:3}", "ALL_TO_ALL", 0.5),
    ],
)
def test_what_goes_between_slices_is_counted_apart(target, kind, share):
    """Of two slices each sends half of a sum to the other, and the other half's result."""
    meets = '_xla_host_transfer_rendezvous="sum.5"'
    cost = count(
        program(
            f"%big = {BIG} parameter(0)",
            "%token = token[] after-all()",
            f"%s = ({BIG}, u32[], token[]) send(%big, %token), channel_id=2, "
            f'frontend_attributes={{{meets},_xla_megascale_target="{target}",'
            f'_xla_megascale_transfer_type="{kind}"}}',
            f"%r = ({BIG}, u32[], token[]) recv(%token), channel_id=1, "
            f'frontend_attributes={{{meets},_xla_megascale_transfer_type="{kind}"}}',
            f"%w = {BIG} copy(%big), {annotated(300)}",
            f"%d = ({BIG}, token[]) recv-done(%r), channel_id=1",
        )
    )
    name = kind.lower().replace("_", "-") + " between slices"
    assert cost.sent == cost.beside == {name: share * BIG_BYTES}
    assert cost.collectives == {name: 1}
    speed = Speed(1e3, 1.0, BIG_BYTES)
    assert waiting_seconds(cost.timelines, speed) == pytest.approx(share - 0.3)
