"""What a compiled TPU program costs per chip; the body of a loop counts as often as it runs.

XLA's own cost analysis counts the body of a loop once, so that a model of 32 scanned layers would
cost as much as one of 2. This module reads the text of the optimised program and counts matrix
FLOPs, bytes to and from HBM, bytes that collectives send, and the compiler's estimate of cycles,
which covers neither Pallas kernels nor collectives nor asynchronous copies.
"""

import dataclasses
import functools
import math
import operator
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from crossin_jax.models.attention import Kernel, tile
from crossin_jax.models.spec import ModelSpec
from crossin_jax.plan.hlo import Computation, Instruction, parse
from crossin_jax.plan.schedule import (
    BETWEEN_SLICES,
    Event,
    Timeline,
    chain_key,
    done_key,
    rendezvous_key,
    sent_between_slices,
)

_COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "collective-permute",
    "all-to-all",
    "ragged-all-to-all",
)
_MATRIX = ("convolution", "dot")
# Instructions that move nothing themselves. The bodies of loops and calls are counted on their own.
_NO_TRAFFIC = (
    "parameter",
    "constant",
    "get-tuple-element",
    "tuple",
    "bitcast",
    "while",
    "conditional",
    "call",
    "copy-done",
    "slice-done",
    "async-done",
    "async-update",
    "send-done",
    "recv-done",
    "partition-id",
    "opt-barrier",
    "custom-call",
)
# A loop whose counter is followed for more turns counts as one of unknown length.
_MOST_TURNS = 1 << 17

_ARITHMETIC = {
    "add": operator.add,
    "subtract": operator.sub,
    "multiply": operator.mul,
    "and": operator.and_,
    "or": operator.or_,
    "maximum": max,
    "minimum": min,
    # As in XLA: a quotient is rounded towards zero, and a remainder has the sign of a.
    "divide": lambda a, b: math.trunc(a / b) if b else None,
    "remainder": lambda a, b: int(math.fmod(a, b)) if b else None,
}


@dataclasses.dataclass
class Cost:
    """Sums over one run of a program, per chip."""

    # of matrix products, without Pallas kernels
    flops: float = 0.0
    # between HBM and the chip's cores
    bytes: float = 0.0
    # the compiler's estimate, and its part for fusions with a matrix product
    cycles: float = 0.0
    matrix_cycles: float = 0.0
    # by kind of collective: bytes that a chip sends, and how often
    sent: Counter[str] = dataclasses.field(default_factory=Counter)
    collectives: Counter[str] = dataclasses.field(default_factory=Counter)
    # by kind: those of the bytes that are sent while other work runs
    beside: Counter[str] = dataclasses.field(default_factory=Counter)
    # of every computation with a collective: what happens in which order
    timelines: list[Timeline] = dataclasses.field(default_factory=list)
    # by name: how often a Pallas kernel is called
    kernels: Counter[str] = dataclasses.field(default_factory=Counter)
    # loops whose length depends on data; they count once
    unknown_loops: int = 0


def count(text: str) -> Cost:
    """The cost of a program from its optimised text with the compiler's annotations."""
    computations, entry = parse(text)
    counter = _Counter(computations)
    counter.walk(entry, 1, None)
    return counter.cost


class _Counter:
    def __init__(self, computations: dict[str, Computation]):
        self.computations, self.cost = computations, Cost()
        self.roots = {
            name: next(i for i in body.values() if i.is_root) for name, body in computations.items()
        }

    def walk(
        self,
        name: str,
        times: float,
        state: Any,
        *,
        fused: bool = False,
        caller: tuple[str, list[Event]] | None = None,
    ) -> None:
        """Adds a computation that runs `times` times; `state` is what is known of its parameter.

        A collective in a fusion, or in an asynchronous call, is a step of the `caller`: its name
        and its steps.
        """
        body, cost, values = self.computations[name], self.cost, {}
        events = caller[1] if caller else []
        # A collective that runs beside other work is in the text of every fusion that it spans.
        # Only the one that starts it counts.
        starts = {
            o
            for i in body.values()
            if 'custom_call_target="AsyncCollectiveStart"' in i.attributes
            for o in i.operands
        }
        for one in body.values():
            base, before = one.op.removesuffix("-start"), cost.cycles
            if one.op in _MATRIX:
                cost.flops += times * self._matrix_flops(body, one)
            elif base in _COLLECTIVES and not (
                fused and "chain_id=" in one.attributes and one.name not in starts
            ):
                key = one.name if one.op != base else None
                if fused:
                    key = chain_key(one) if one.name in starts else None
                elif caller:
                    key = caller[0]
                self._collect(*self._sent(name, body, one, base), times, events, key)
            elif one.op == "send" and (between := sent_between_slices(body, one)):
                self._collect(*between, times, events, rendezvous_key(one))
            elif one.op == "custom-call" and '"tpu_custom_call"' in one.attributes:
                cost.kernels[re.sub(r"[.\d]+$", "", one.name)] += times
                cost.bytes += times * self._traffic(body, one)
            elif (key := done_key(body, one)) is not None:
                events.append(Event("done", key=key))
            if not fused:
                cost.bytes += times * self._traffic(body, one) if one.op not in _NO_TRAFFIC else 0
                cycles = re.search(r'"estimated_cycles":"?(\d+)', one.attributes)
                if cycles:
                    cost.cycles += times * int(cycles.group(1))
                    is_matrix = one.op == "fusion" and self._has_matrix(one.attribute("calls"))
                    cost.matrix_cycles += times * int(cycles.group(1)) * is_matrix
            self._walk_called(body, one, times, state, values, events, fused)
            if caller is None and times and cost.cycles > before:
                events.append(Event("work", (cost.cycles - before) / times))
        if caller is None and any(event.kind == "start" for event in events):
            cost.timelines.append((times, events))

    def _walk_called(
        self,
        body: Computation,
        one: Instruction,
        times: float,
        state: Any,
        values: dict[str, Any],
        events: list[Event],
        fused: bool,
    ) -> None:
        """Adds the computations that an instruction calls."""
        if one.op == "while":
            turns, kept = self._turns(one, self._value(body, one.operands[0], state, values))
            self.cost.unknown_loops += turns is None
            self.walk(one.attribute("body"), times * (1 if turns is None else turns), kept)
        elif one.op == "conditional":
            self._walk_costliest(one, times)
        elif one.op in ("fusion", "call", "async-start"):
            called = (
                one.attribute("calls")
                or one.attribute("to_apply")
                or one.attribute("called_computation")
            )
            fused = fused or one.op == "fusion"
            caller = None if one.op == "call" and not fused else (one.name, events)
            self.walk(called, times, None, fused=fused, caller=caller)

    def _collect(
        self, kind: str, sent: float, times: float, events: list[Event], key: str | None
    ) -> None:
        """Adds a collective; without a key nothing runs beside it."""
        self.cost.collectives[kind] += times
        self.cost.sent[kind] += times * sent
        self.cost.beside[kind] += 0 if key is None else times * sent
        events.append(Event("start", sent, key or "", kind.endswith(BETWEEN_SLICES)))
        if key is None:
            events.append(Event("done"))

    def _walk_costliest(self, one: Instruction, times: float) -> None:
        """Adds the branch with the most cycles: which one runs depends on data."""
        branches = re.search(r"branch_computations=\{([^}]*)\}", one.attributes)
        names = (
            re.findall(r"%([\w.\-]+)", branches.group(1))
            if branches
            else [one.attribute("true_computation"), one.attribute("false_computation")]
        )
        # Each branch is counted into a cost of its own.
        before, options = self.cost, []
        for name in names:
            self.cost = Cost()
            self.walk(name, times, None)
            options.append(self.cost)
        best = max(options, key=lambda cost: (cost.cycles, cost.flops, cost.bytes))
        # The same object as before, because callers of this method continue to add to it.
        self.cost = before
        for field in dataclasses.fields(Cost):
            setattr(before, field.name, getattr(before, field.name) + getattr(best, field.name))

    # ---- Loops
    #
    # The compiler knows the length of most loops (known_trip_count). For the others, the scalars of
    # the loop's state are computed turn by turn, until the condition is false:
    #
    #   state [i=0, n=32, array]  →  condition i < n: true  →  body: [i=1, n=32, array]  →  …
    #
    # An array is None: nothing that depends on it is known.

    def _turns(self, loop: Instruction, state: Any) -> tuple[int | None, Any]:
        """How often a loop runs from a first state, and the part of the state that is constant."""
        known = re.search(r"known_trip_count\W+n\W+(\d+)", loop.attributes)
        if not isinstance(state, list):
            return (int(known.group(1)) if known else None), None
        body, condition = (
            self.computations[loop.attribute(name)] for name in ("body", "condition")
        )
        body_root, condition_root = (
            self.roots[loop.attribute(name)].name for name in ("body", "condition")
        )
        kept, turns = list(state), 0
        while turns < _MOST_TURNS:
            goes_on = self._value(condition, condition_root, state, {})
            if goes_on is None:
                turns = None
            if not goes_on:
                break
            state = self._value(body, body_root, state, {})
            kept = [a if a == b else None for a, b in zip(kept, state, strict=True)]
            turns += 1
        if known:
            turns = int(known.group(1))
        return (None if turns == _MOST_TURNS else turns), kept

    def _value(self, body: Computation, name: str, state: Any, values: dict[str, Any]) -> Any:
        """The scalar, or the list of scalars, of an instruction; None if it depends on data."""
        # Remembered, so that a value with many uses is not computed for each of them.
        if name not in values:
            values[name] = self._evaluate(body, body[name], state, values)
        return values[name]

    def _evaluate(
        self, body: Computation, one: Instruction, state: Any, values: dict[str, Any]
    ) -> Any:
        if not (one.is_scalar or one.is_tuple):
            return None
        if one.op == "constant":
            text = one.text.strip()
            return int(text) if re.fullmatch(r"-?\d+", text) else {"true": 1, "false": 0}.get(text)
        if one.op == "parameter":
            return state[int(one.text)] if isinstance(state, tuple) else state
        if one.op == "get-tuple-element":
            whole = self._value(body, one.operands[0], state, values)
            return whole[int(one.attribute("index"))] if isinstance(whole, list) else None
        if one.op in ("fusion", "call"):
            inputs = tuple(self._value(body, o, state, values) for o in one.operands)
            called = one.attribute("calls") or one.attribute("to_apply")
            return self._value(self.computations[called], self.roots[called].name, inputs, {})
        if one.op == "tuple":
            return [self._value(body, o, state, values) for o in one.operands]
        if one.op in ("copy", "copy-done", "bitcast", "convert", "reshape", "opt-barrier"):
            return self._value(body, one.operands[0], state, values)
        if one.op in _ARITHMETIC or one.op == "compare":
            a, b = (self._value(body, o, state, values) for o in one.operands)
            if not (isinstance(a, int) and isinstance(b, int)):
                return None
            if one.op == "compare":
                return int(getattr(operator, one.attribute("direction").lower())(a, b))
            return _ARITHMETIC[one.op](a, b)
        return None

    # ---- The cost of one instruction

    def _has_matrix(self, name: str) -> bool:
        return any(
            i.op in _MATRIX or i.op == "fusion" and self._has_matrix(i.attribute("calls"))
            for i in self.computations[name].values()
        )

    def _matrix_flops(self, body: Computation, one: Instruction) -> float:
        left, right = (body[o].shapes[0].dims for o in one.operands[:2])
        out = one.shapes[0].dims
        if one.op == "dot":
            contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", one.attributes).group(1)
            return (
                2.0 * math.prod(out) * math.prod(left[int(d)] for d in contracted.split(",") if d)
            )
        # The TPU compiler writes most matrix products as convolutions: dim_labels=bf_io->bf.
        in_labels, kernel_labels, out_labels = re.search(
            r"dim_labels=(\w+)_(\w+)->(\w+)", one.attributes
        ).groups()
        window = re.search(r"window=\{([^}]*)\}", one.attributes)
        options = dict(part.split("=") for part in window.group(1).split()) if window else {}
        flops = (
            2.0
            * right[kernel_labels.index("i")]
            * out[out_labels.index("b")]
            * out[out_labels.index("f")]
        )
        for i, label in enumerate(sorted(set(in_labels) - {"b", "f"}, key=int)):

            def option(name, default, i=i):
                return options[name].split("x")[i] if name in options else default

            low = int(option("pad", "0_0").split("_")[0])
            flops *= _window_products(
                left[in_labels.index(label)],
                right[kernel_labels.index(label)],
                out[out_labels.index(label)],
                int(option("stride", 1)),
                low,
                int(option("lhs_dilate", 1)),
                int(option("rhs_dilate", 1)),
            )
        return flops

    def _sent(self, name: str, body: Computation, one: Instruction, kind: str) -> tuple[str, float]:
        """The kind of a collective and the bytes that each chip sends for it, on a ring."""
        # all-gather of n chips: each sends n - 1 times its share. all-reduce: a reduce-scatter and
        # an all-gather, so about twice the input.
        inputs = sum(body[o].shapes[0].bytes for o in one.operands)
        if kind == "all-gather":
            shapes = (
                one.shapes[len(one.operands) : 2 * len(one.operands)]
                if one.op.endswith("-start")
                else one.shapes
            )
            return kind, sum(shape.bytes for shape in shapes) - inputs
        # The compiler's name for a sum of which each chip keeps a slice.
        if kind == "all-reduce" and "all-reduce-scatter" in name:
            return "reduce-scatter", inputs
        return kind, 2 * inputs if kind == "all-reduce" else inputs

    def _traffic(self, body: Computation, one: Instruction) -> float:
        """Bytes that an instruction moves between HBM and the cores."""
        shapes = [body[o].shapes for o in one.operands if o in body]
        if one.op in ("dynamic-slice", "slice", "gather", "slice-start"):
            out = [one.shapes[1]] if one.op == "slice-start" else one.shapes
            return sum(s.bytes for s in out) * (shapes[0][0].in_hbm + out[0].in_hbm)
        if one.op == "dynamic-update-slice":
            return shapes[1][0].bytes * (shapes[1][0].in_hbm + one.shapes[0].in_hbm)
        if one.op == "copy-start":  # its shapes are the target and the source
            return one.shapes[0].bytes * sum(shape.in_hbm for shape in one.shapes[:2])
        total = sum(s.bytes for s in one.shapes if s.in_hbm)
        if one.op != "fusion":
            return total + sum(s.bytes for group in shapes for s in group if s.in_hbm)
        inner = self.computations[one.attribute("calls")]
        root = self.roots[one.attribute("calls")]
        updated = None
        # An update happens in place: only the new slice is written, and the old array is not read.
        if root.op == "dynamic-update-slice":
            updated = root.operands[0]
            total = inner[root.operands[1]].shapes[0].bytes if one.shapes[0].in_hbm else 0
        for parameter in (i for i in inner.values() if i.op == "parameter"):
            group = shapes[int(parameter.text)]
            if parameter.name == updated or not group or not group[0].in_hbm:
                continue
            # A fusion that only slices a parameter reads the slices, not the whole of it.
            uses = [i for i in inner.values() if parameter.name in i.operands]
            if uses and all(i.op in ("dynamic-slice", "slice", "gather") for i in uses):
                total += sum(i.shapes[0].bytes for i in uses)
            else:
                total += sum(s.bytes for s in group)
        return total


@functools.cache
def _window_products(
    size: int, kernel: int, out: int, stride: int, low: int, dilate: int, spread: int
) -> int:
    """Pairs of output and kernel positions of a convolution that meet an input element.

    Along one dimension. Positions in the padding, and between dilated elements, need no product.
    """
    starts, total = np.arange(out) * stride - low, 0
    for k in range(kernel):
        at = starts + k * spread
        total += int(((at >= 0) & (at % dilate == 0) & (at // dilate < size)).sum())
    return total


def kernel_flops(
    spec: ModelSpec, kernel: Kernel, calls: Mapping[str, float], rows: int, length: int, shards: int
) -> float:
    """FLOPs of splash calls (counted by name) on one device: tiles that the mask does not empty.

    A tile has 2 products in the forward kernel, 4 in that of dk and dv, 3 in that of dq; where
    layers differ in their window, calls are taken to be spread over them evenly.
    """
    products = sum(
        number * next(n for part, n in (("_fwd", 2), ("_dkv", 4), ("_dq", 3)) if part in name)
        for name, number in calls.items()
        if name.startswith("splash")
    )
    if not products:
        return 0.0
    # Tile (i, j) is computed where some of its queries see some of its keys:
    #
    #     x . . .      back[i, j] = (i − j) · block is 0 on the diagonal. With a window of one block
    #     x x . .      two tiles per row are computed, the one on the diagonal and the one before.
    #     . x x .
    block = tile(kernel, length)
    back = np.subtract.outer(np.arange(length // block), np.arange(length // block)) * block

    def tiles(window: int | None) -> int:
        return int(((back >= 0) & (back - block + 1 < (window or length))).sum())

    local = spec.local_layers or (False,)
    mean = sum(tiles(spec.window if is_local else None) for is_local in local) / len(local)
    heads = spec.num_heads // shards if spec.num_heads % shards == 0 else spec.num_heads
    return products * 2.0 * mean * block * block * spec.head_width * rows * heads
