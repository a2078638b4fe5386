"""What a program compiled for a TPU moves between its memory and its cores, by its own text.

    for line in traffic(compiled.as_text())[:10]: print(line.bytes, line.times, line.text)

The text is what the compiler schedules: each instruction with the memory that its operands and
results lie in, so what goes through vector memory alone is told from what goes through HBM. A loop
over layers counts as often as it runs, which `cost_analysis` does not do; a fusion that reads one
layer of a stack counts that layer; arrays count as they are laid out, with their padding.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple

from dllm_jax.bench.scheduled import Array, Instruction, Program, Run, called, parsed, walk

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


class Moved(NamedTuple):
    """What an instruction moves, each of the times that it runs."""

    bytes: int
    times: int
    text: str

    @property
    def total(self) -> int:
        return self.bytes * self.times


def traffic(
    text: str,
    rounds: Mapping[str, int] | None = None,
    reads: Mapping[str, int] | None = None,
    *,
    otherwise: int | None = None,
) -> list[Moved]:
    """All instructions of a program that move anything through HBM, most first.

    A kernel moves what its cost estimate says, less its operands that lie in vector memory, or all
    of its operands and results where it has no estimate. Of two branches the one that moves more
    counts.

    Args:
      text: of a compiled program, `jax.stages.Compiled.as_text()`.
      rounds: of loops, by the end of their `op_name` ("Transformer/while"), in place of what the
        text says: of a model that is deeper than the one that was compiled.
      reads: of kernels whose estimate is wrong, by the beginning of their names: how many of the
        first axis of their largest operand they read, each once.
      otherwise: rounds of the loops whose rounds are not in the text; None: they are an error.

    Raises:
      ValueError: a loop whose rounds are not known, or text of another form.
    """
    program = parsed(text)
    weigh = lambda run: _bytes(program, run, reads or {})  # noqa: E731
    found = [
        Moved(weigh(run), run.times, f"{run.instruction.name} = {run.instruction.text}")
        for run in walk(program, weigh, rounds, otherwise)
    ]
    return sorted((x for x in found if x.bytes), key=lambda moved: -moved.total)


def _bytes(program: Program, run: Run, reads: Mapping[str, int]) -> int:
    """What one run moves."""
    x = run.instruction
    if x.kind in _STILL:
        return 0
    operands = run.operands
    if x.kind == "custom-call":
        return _of_a_kernel(x, operands, reads)
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
        body = program.computations[called(x, "calls")]
        read = sum(
            _read(program, body, at)
            for at, operand in enumerate(operands)
            if operand.arrays[0].in_hbm
        )
        return read + _written(x, body)
    return sum(_in_hbm(operand.arrays) for operand in operands) + _in_hbm(x.arrays)


def _in_hbm(arrays: list[Array]) -> int:
    return sum(a.bytes for a in arrays if a.in_hbm)


def _of_a_kernel(x: Instruction, operands: list[Instruction], reads: Mapping[str, int]) -> int:
    sizes = [_in_hbm(operand.arrays) for operand in operands]
    for start, count in reads.items():
        if x.name.startswith(start):
            at = sizes.index(max(sizes))
            sizes[at] = sizes[at] // operands[at].arrays[0].dims[0] * count
            return sum(sizes) + _in_hbm(x.arrays)
    found = re.search(r'"cost_estimate":\{[^}]*"bytes_accessed":"(\d+)"', x.text)
    if not found:
        return sum(sizes) + _in_hbm(x.arrays)
    held = sum(a.bytes for o in operands for a in o.arrays if not a.in_hbm and a.dims)
    return max(int(found[1]) - held, 0)


def _read(program: Program, body: list[Instruction], number: int) -> int:
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
            inner = program.computations[called(x, "calls")]
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
