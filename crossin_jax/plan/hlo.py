"""The text of a compiled TPU program, instruction by instruction. Part of such a text:

%body (p: (s32[], bf16[8,64])) -> (s32[], bf16[8,64]) {
  %p = (s32[], bf16[8,64]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  ROOT %t = (s32[], bf16[8,64]{1,0}) tuple(%next, %dot.1)
}
"""

import dataclasses
import math
import re

# Other types have their width in their name: s32, f8e4m3.
_BITS = {"pred": 8, "s4": 4, "u4": 4, "token": 0, "bf16": 16}
_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%([\w.\-]+) = (.*)")
_SHAPE = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](\{[^}]*\})?")


@dataclasses.dataclass(frozen=True)
class Shape:
    """Of an array of the program, and whether it lies in HBM."""

    bytes: float
    dims: tuple[int, ...]
    in_hbm: bool


@dataclasses.dataclass
class Instruction:
    """One line of the program."""

    name: str
    shapes: list[Shape]
    is_tuple: bool
    op: str
    operands: list[str]
    # between the parentheses: a constant's value, a parameter's number
    text: str
    attributes: str
    is_root: bool

    @property
    def is_scalar(self) -> bool:
        """Whether its result is one number."""
        return len(self.shapes) == 1 and not self.shapes[0].dims and not self.is_tuple

    def attribute(self, name: str) -> str | None:
        """The value of an attribute such as body=%region.1; None if there is none."""
        found = re.search(name + r"=\{?%?([\w.\-]+)", self.attributes)
        return found and found.group(1)


Computation = dict[str, Instruction]


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """The computations of a program by name, and the name of the one that it starts with."""
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in text.splitlines():
        if not line.startswith(" "):
            header = _HEADER.match(line)
            if header:
                current = computations[header.group(2)] = {}
                entry = header.group(2) if header.group(1) else entry
        elif current is not None and (found := _INSTRUCTION.match(line)):
            current[found.group(2)] = _read(found)
    return computations, entry


def _read(found: re.Match) -> Instruction:
    rest = found.group(3)
    end = _closing(rest, 0) + 1 if rest[0] == "(" else rest.index(" ")
    kind, rest = rest[:end], rest[end:].lstrip()
    start = rest.index("(")
    end = _closing(rest, start)
    inside = rest[start + 1 : end]
    return Instruction(
        found.group(2),
        _shapes(kind),
        kind[0] == "(",
        rest[:start],
        re.findall(r"%([\w.\-]+)", inside),
        inside,
        rest[end + 1 :],
        bool(found.group(1)),
    )


def _closing(text: str, start: int) -> int:
    depth = 0
    for found in re.finditer(r"[()]", text[start:]):
        depth += 1 if found.group() == "(" else -1
        if not depth:
            return start + found.start()
    raise ValueError(f"unbalanced: {text[:80]}")


def _shapes(text: str) -> list[Shape]:
    shapes = []
    for dtype, dims, layout in _SHAPE.findall(text):
        sizes = tuple(int(size.lstrip("<=")) for size in dims.split(",") if size)
        bits = _BITS.get(dtype) if dtype in _BITS else int(re.search(r"\d+", dtype).group())
        # A scalar is in the core, and so is an array whose layout names a memory space: {1,0:S(1)}.
        in_hbm = bool(sizes) and not re.search(r"S\([1-9]", layout)
        shapes.append(Shape(math.prod(sizes) * bits / 8, sizes, in_hbm))
    return shapes
