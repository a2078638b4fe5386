"""What a program compiled for a TPU moves between its memory and its cores, by its own text.

    for line in traffic(compiled.as_text())[:10]: print(line.bytes, line.times, line.text)

The text is what the compiler schedules: each instruction with the memory that its operands and
results lie in, so what goes through vector memory alone is told from what goes through HBM. A loop
over layers counts as often as it runs, which `cost_analysis` does not do; a fusion that reads one
layer of a stack counts that layer; arrays count as they are laid out, with their padding.
"""

import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

BITS = {
    "pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "s32": 32, "u32": 32,
    "s64": 64, "u64": 64, "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "token": 0,
    "f8e4m3fn": 8, "f8e5m2": 8, "c64": 64,
}  # fmt: skip

# Of what there is to run in a schedule, these move nothing.
_STILL = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "copy-done",
    "slice-done", "dynamic-slice-done", "dynamic-update-slice-done", "async-done", "async-update",
    "partition-id", "replica-id", "opt-barrier", "add-dependency", "call-done", "fusion-done",
    "custom-call-done",
}  # fmt: skip
_SLICES = {"dynamic-slice", "slice", "gather"}
_VIEWS = {
    "bitcast",
    "copy",
    "convert",
    "reshape",
}  # within a fusion: made as far as it is asked for


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


class Moved(NamedTuple):
    """What an instruction moves, each of the times that it runs."""

    bytes: int
    times: int
    text: str

    @property
    def total(self) -> int:
        return self.bytes * self.times


def traffic(
    text: str, rounds: Mapping[str, int] | None = None, reads: Mapping[str, int] | None = None
) -> list[Moved]:
    """All instructions of a program that move anything through HBM, most first.

    A kernel moves what its cost estimate says, less its operands that lie in vector memory, or all
    of its operands and results where it has no estimate.

    Args:
      text: of a compiled program, `jax.stages.Compiled.as_text()`.
      rounds: of loops, by the end of their `op_name` ("Transformer/while"), in place of what the
        text says: of a model that is deeper than the one that was compiled.
      reads: of kernels whose estimate is wrong, by the beginning of their names: how many of the
        first axis of their largest operand they read, each once.

    Raises:
      ValueError: a loop whose rounds are not in the text, a branch, or text of another form.
    """
    program = _parsed(text, rounds or {}, reads or {})
    found = [x for x in _of(program, program.entry, 1) if x.bytes]
    return sorted(found, key=lambda moved: -moved.total)


class _Program(NamedTuple):
    computations: dict[str, list[Instruction]]
    entry: str
    rounds: Mapping[str, int]
    reads: Mapping[str, int]


_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_LINE = re.compile(r"^\s+(?:ROOT )?%([\w.\-]+) = (.*)$")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](?:\{([^}]*)\})?")


def _parsed(text: str, rounds: Mapping[str, int], reads: Mapping[str, int]) -> _Program:
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
    return _Program(computations, entry, rounds, reads)


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


def _of(program: _Program, computation: str, times: int) -> Iterator[Moved]:
    own = {x.name: x for x in program.computations[computation]}
    for x in own.values():
        if x.kind in _STILL:
            continue
        if x.kind == "while":
            yield from _of(program, _called(x, "body"), times * _rounds(program, x))
        elif x.kind == "call":
            yield from _of(program, _called(x, "to_apply"), times)
        elif x.kind == "conditional":
            raise ValueError(f"which branch runs is not in the text: {x.text[:200]}")
        else:
            operands = [own[name] for name in x.operands]
            yield Moved(_bytes(program, x, operands), times, f"{x.name} = {x.text}")


def _called(x: Instruction, role: str) -> str:
    found = re.search(rf"\b{role}=%([\w.\-]+)", x.text)
    if not found:
        raise ValueError(f"no {role} in: {x.text[:200]}")
    return found[1]


def _rounds(program: _Program, loop: Instruction) -> int:
    """Of a loop that counts from 0 up to a constant, if nobody says."""
    name = re.search(r'op_name="([^"]*)"', loop.text)
    for end, count in program.rounds.items():
        if name and name[1].endswith(end):
            return count
    condition = program.computations[_called(loop, "condition")]
    own, root = {x.name: x for x in condition}, condition[-1]
    bounds = [own[name] for name in root.operands if own[name].kind == "constant"]
    if root.kind != "compare" or "direction=LT" not in root.text or len(bounds) != 1:
        raise ValueError(f"how often a loop runs is not in the text: {root.text[:200]}")
    return int(re.findall(r"constant\((\d+)\)", bounds[0].text)[0])


def _bytes(program: _Program, x: Instruction, operands: list[Instruction]) -> int:
    """What one run moves."""
    if x.kind == "custom-call":
        return _of_a_kernel(program, x, operands)
    if x.kind == "copy-start":  # what it writes, what it reads, and a flag
        return _in_hbm(x.arrays[:2])
    if x.kind in ("slice-start", "dynamic-slice-start"):  # the whole, a slice of it, a flag
        part = x.arrays[-2]
        return part.bytes * (operands[0].arrays[0].in_hbm + part.in_hbm)
    if x.kind in ("call-start", "async-start", "fusion-start", "custom-call-start"):
        return sum(_in_hbm(operand.arrays) for operand in operands) + _in_hbm(x.arrays[-1:])
    if x.kind in _SLICES:
        return sum(a.bytes for a in x.arrays) * (operands[0].arrays[0].in_hbm + x.arrays[0].in_hbm)
    if x.kind == "dynamic-update-slice":
        return sum(a.bytes for a in operands[1].arrays) * (
            operands[1].arrays[0].in_hbm + x.arrays[0].in_hbm
        )
    if x.kind == "fusion":
        body = program.computations[_called(x, "calls")]
        reads = sum(
            _read(program, body, at)
            for at, operand in enumerate(operands)
            if operand.arrays[0].in_hbm
        )
        return reads + _written(x, body)
    return sum(_in_hbm(operand.arrays) for operand in operands) + _in_hbm(x.arrays)


def _in_hbm(arrays: list[Array]) -> int:
    return sum(a.bytes for a in arrays if a.in_hbm)


def _of_a_kernel(program: _Program, x: Instruction, operands: list[Instruction]) -> int:
    sizes = [_in_hbm(operand.arrays) for operand in operands]
    for start, count in program.reads.items():
        if x.name.startswith(start):
            at = sizes.index(max(sizes))
            sizes[at] = sizes[at] // operands[at].arrays[0].dims[0] * count
            return sum(sizes) + _in_hbm(x.arrays)
    found = re.search(r'"cost_estimate":\{[^}]*"bytes_accessed":"(\d+)"', x.text)
    if not found:
        return sum(sizes) + _in_hbm(x.arrays)
    held = sum(a.bytes for o in operands for a in o.arrays if not a.in_hbm and a.dims)
    return max(int(found[1]) - held, 0)


def _read(program: _Program, body: list[Instruction], number: int) -> int:
    """What a fusion reads of a parameter: the slices that it takes, or all of it."""
    own = next(x for x in body if x.kind == "parameter" and f"parameter({number})" in x.text)
    whole, parts = own.arrays[0].bytes, 0
    names = {own.name}
    for x in body:  # users stand behind what they use
        if not names & set(x.operands):
            continue
        if x.kind in _VIEWS or "output_to_operand_aliasing" in x.text:
            names.add(x.name)
        elif x.kind in _SLICES and x.operands[0] in names:
            parts += sum(a.bytes for a in x.arrays)
        elif x.kind == "dynamic-update-slice" and x.operands[0] in names:
            continue  # written in place
        elif x.kind == "fusion":
            inner = program.computations[_called(x, "calls")]
            parts += sum(_read(program, inner, i) for i, n in enumerate(x.operands) if n in names)
        else:
            return whole
    return whole if body[-1].name in names else min(parts, whole)


def _written(x: Instruction, body: list[Instruction]) -> int:
    """What a fusion writes: its result, of an update in place that alone."""
    root = body[-1]
    if root.kind == "bitcast":
        root = next(y for y in body if y.name == root.operands[0])
    if root.kind == "dynamic-update-slice" and x.arrays[0].in_hbm:
        return next(y for y in body if y.name == root.operands[1]).arrays[0].bytes
    return _in_hbm(x.arrays)
