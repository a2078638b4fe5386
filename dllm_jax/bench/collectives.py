"""What the chips of a compiled program tell each other, by its own text.

for found in collectives(compiled.as_text()): print(found.kind, found.total, found.text)
"""

import math
import re
from collections.abc import Mapping
from typing import NamedTuple

from dllm_jax.bench.scheduled import Array, Instruction, Program, Run, called, parsed, walk

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


class Collective(NamedTuple):
    """One collective of a program, each of the times that it runs."""

    kind: str  # of `KINDS`
    bytes: int  # that a chip sends to others, where the algorithm is a ring
    group: int  # chips that take part together
    times: int
    text: str

    @property
    def total(self) -> int:
        return self.bytes * self.times


def collectives(
    text: str, rounds: Mapping[str, int] | None = None, *, otherwise: int | None = None
) -> list[Collective]:
    """The collectives of a program, most bytes first; loops multiplied.

    Of two branches the one that sends more counts. In a ring of n chips each sends (n - 1) / n of
    what it gathers, scatters or exchanges, twice that of what is reduced to all of them, and all
    of what it permutes.

    Args:
      text, rounds, otherwise: as of `traffic`.

    Raises:
      ValueError: a loop whose rounds are not known, or text of another form.
    """
    program = parsed(text)
    found = []
    for run in walk(program, lambda run: _told(program, run)[1], rounds, otherwise):
        kind, sent, group = _told(program, run)
        if kind:
            found.append(Collective(kind, sent, group, run.times, run.instruction.text))
    return sorted(found, key=lambda x: -x.total)


def _told(program: Program, run: Run) -> tuple[str, int, int]:
    """The kind of a collective, the bytes that a chip sends, its group; ("", 0, 1) of others."""
    x, operands, scattered = run.instruction, run.operands, False
    if x.kind in ("fusion", "async-start"):  # a sum of which a chip keeps its part is a fusion
        name = called(x, "calls")
        own = {inner.name: inner for inner in program.computations[name]}
        within = [inner for inner in own.values() if _kind(inner)]
        if not within:
            return "", 0, 1
        x, scattered = within[0], name.startswith("all-reduce-scatter")
        operands = [own[operand] for operand in x.operands]
    kind = "reduce-scatter" if scattered else _kind(x)
    if not kind:
        return "", 0, 1
    size = _size([a for operand in operands for a in operand.arrays])
    if kind == "collective-permute":
        return kind, size, 2
    group = _group(x.text, x.name)
    whole = {"all-gather": size * group, "all-reduce": 2 * size}.get(kind, size)
    return kind, round(whole * (group - 1) / group), group


def _kind(x: Instruction) -> str:
    kind = x.kind.removesuffix("-start")
    return kind if kind in KINDS else ""


def _size(arrays: list[Array]) -> int:
    """Bytes of arrays as they are sent, without padding."""
    return sum(a._replace(tile=()).bytes for a in arrays)


def _group(text: str, name: str) -> int:
    """How many devices take part together: replica groups are spelled in three ways."""
    if found := re.search(r"replica_groups=\{\{([\d,]*)\}", text):
        return len(found[1].split(","))
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]<=", text):
        return int(found[1])
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", text):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", found[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'([^']+)'", found[2]))
    raise ValueError(f"which devices take part is not in the text of {name}: {text[:300]}")
