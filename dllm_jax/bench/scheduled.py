"""The text of a compiled program, as its compiler schedules it: instructions, loops and branches.

`traffic` and `collectives` walk it; both take `jax.stages.Compiled.as_text()`.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

BITS = {
    "pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "s32": 32, "u32": 32,
    "s64": 64, "u64": 64, "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "token": 0,
    "f8e4m3fn": 8, "f8e5m2": 8, "c64": 64,
}  # fmt: skip


class Array(NamedTuple):
    """A type as the text has it."""

    dtype: str
    dims: tuple[int, ...]
    order: tuple[int, ...]  # axes, the innermost one first
    tile: tuple[int, ...]  # what the innermost axes are padded to, the last one the innermost
    in_hbm: bool

    @property
    def bytes(self) -> int:
        """As it lies in memory."""
        sizes = [self.dims[axis] for axis in self.order]
        for at, step in zip(range(len(sizes)), reversed(self.tile), strict=False):
            sizes[at] = -(-sizes[at] // step) * step
        return math.prod(sizes) * BITS[self.dtype] // 8


class Instruction(NamedTuple):
    name: str
    arrays: list[Array]  # its result, or the parts of a tuple
    kind: str
    operands: list[str]
    text: str


class Program(NamedTuple):
    computations: dict[str, list[Instruction]]
    entry: str


class Run(NamedTuple):
    """An instruction that is run."""

    instruction: Instruction
    own: dict[str, Instruction]  # its computation, by name
    times: int

    @property
    def operands(self) -> list[Instruction]:
        return [self.own[name] for name in self.instruction.operands]


def walk(
    program: Program,
    weigh: Callable[[Run], int],
    rounds: Mapping[str, int] | None = None,
    otherwise: int | None = None,
) -> list[Run]:
    """Every instruction that is run, loops and calls replaced by what is in them.

    Args:
      weigh: of two branches the heavier one counts.
      rounds: of loops, by the end of their `op_name`, in place of what the text says.
      otherwise: of loops whose rounds are not in the text; None: they are an error.

    Raises:
      ValueError: a loop whose rounds are not known.
    """

    def inside(computation: str, times: int) -> Iterator[Run]:
        own = {x.name: x for x in program.computations[computation]}
        for x in own.values():
            if x.kind == "while":
                count = _rounds(program, x, rounds or {}, otherwise)
                yield from inside(called(x, "body"), times * count)
            elif x.kind == "call":
                yield from inside(called(x, "to_apply"), times)
            elif x.kind == "conditional":
                ways = [list(inside(name, times)) for name in _branches(x)]
                yield from max(ways, key=lambda way: sum(weigh(run) * run.times for run in way))
            else:
                yield Run(x, own, times)

    return list(inside(program.entry, 1))


def parsed(text: str) -> Program:
    """The computations of a program.

    Raises:
      ValueError: the text is of another form.
    """
    computations: dict[str, list[Instruction]] = {}
    entry, own = "", None
    for line in text.splitlines():
        if head := _HEAD.match(line):
            own = computations.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif line == "}":
            own = None
        elif own is not None and (found := _LINE.match(line)):
            own.append(_instruction(found[1], found[2]))
    if not entry:
        raise ValueError("there is no ENTRY in it: this is not the text of a compiled program")
    return Program(computations, entry)


_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_LINE = re.compile(r"^\s+(?:ROOT )?%([\w.\-]+) = (.*)$")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](?:\{([^}]*)\})?")


def _instruction(name: str, rest: str) -> Instruction:
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    kind, _, _ = rest[end:].strip().partition("(")
    start = rest.index("(", end)
    operands = re.findall(r"%([\w.\-]+)", rest[start : _closing(rest, start)])
    arrays = [_array(*found) for found in _ARRAY.findall(rest[:end])]
    return Instruction(name, arrays, kind, operands, rest)


def _closing(text: str, start: int) -> int:
    """The place of the parenthesis that ends the one at `start`."""
    depth = 0
    for at in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[at], 0)
        if not depth:
            return at
    raise ValueError(f"unbalanced: {text[:200]}")


def _array(dtype: str, dims: str, layout: str) -> Array:
    sizes = tuple(map(int, filter(None, dims.split(","))))
    order, _, rest = layout.partition(":")
    axes = tuple(map(int, filter(None, order.split(","))))
    tile = re.match(r"T\(([\d,]+)\)", rest)
    space = re.search(r"S\((\d+)\)", rest)
    tiles = tuple(map(int, tile[1].split(","))) if tile else ()
    in_hbm = bool(sizes) and (space is None or space[1] == "0")  # a scalar is in a register
    return Array(dtype, sizes, axes or tuple(reversed(range(len(sizes)))), tiles, in_hbm)


def called(x: Instruction, role: str) -> str:
    """The computation that an instruction runs as its `role`."""
    found = re.search(rf"\b{role}=%([\w.\-]+)", x.text)
    if not found:
        raise ValueError(f"no {role} in: {x.text[:200]}")
    return found[1]


def _branches(x: Instruction) -> list[str]:
    if found := re.search(r"branch_computations=\{([^}]*)\}", x.text):
        return re.findall(r"%([\w.\-]+)", found[1])
    return [called(x, "true_computation"), called(x, "false_computation")]


def _rounds(
    program: Program, loop: Instruction, rounds: Mapping[str, int], otherwise: int | None
) -> int:
    """Of a loop that counts from 0 up to a constant, if nobody says."""
    name = re.search(r'op_name="([^"]*)"', loop.text)
    for end, count in rounds.items():
        if name and name[1].endswith(end):
            return count
    if found := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.text):
        return int(found[1])
    condition = program.computations[called(loop, "condition")]
    own, root = {x.name: x for x in condition}, condition[-1]
    bounds = [own[name] for name in root.operands if own[name].kind == "constant"]
    if root.kind == "compare" and "direction=LT" in root.text and len(bounds) == 1:
        return int(re.findall(r"constant\((\d+)\)", bounds[0].text)[0])
    if otherwise is None:
        raise ValueError(f"how often a loop runs is not in the text: {root.text[:200]}")
    return otherwise
