"""A program through the real compiler: what it holds, moves and sends on each chip."""

import math
import re
import time
from collections import Counter
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from dllm_jax.bench.collectives import collectives
from dllm_jax.bench.traffic import traffic
from dllm_jax.plan.programs import Planned


class Exchange(NamedTuple):
    """The collectives of a kind, in one run of the program."""

    kind: str
    count: int  # that run, loops multiplied
    bytes: int  # that a chip sends


class Compiled(NamedTuple):
    """What the compiler says of a program, for each device."""

    peak: int  # bytes
    arguments: dict[str, int]  # bytes, by role, without padding
    temporary: int  # bytes at the peak beside arguments and results
    exchanges: list[Exchange]
    moved: int  # bytes between memory and cores in one run; at low effort more than at full
    seconds: float  # that compiling took


class TooLarge(RuntimeError):
    """A program that does not fit its chips."""


def compile_program(planned: Planned, mesh: Mesh, *, effort: str = "low") -> Compiled:
    """Compiles a program for the devices of a mesh, which need not be there.

    Args:
      effort: "low" compiles in seconds what "full" may compile in minutes; its programs hold and
        move about the same, but are scheduled with less care.

    Raises:
      TooLarge: the program does not fit, in the compiler's words.
    """
    start = time.monotonic()
    names, places = list(planned.arguments), None
    if planned.donated:  # its like lies where it does: it is written in its place
        places = [x.sharding for name in planned.donated for x in planned.arguments[name]]
        places = places if planned.alone else (places, None)
    function = jax.jit(
        planned.function,
        donate_argnums=tuple(names.index(name) for name in planned.donated),
        out_shardings=places,
    )
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        lowered = function.trace(*planned.arguments.values()).lower(lowering_platforms=("tpu",))
    try:
        program = lowered.compile(compiler_options=_options(effort))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise TooLarge(_said(str(error))) from error
    memory, text = program.memory_analysis(), program.as_text() or ""
    assert memory is not None
    found = collectives(text, otherwise=1)
    count, sent = Counter(), Counter()
    for x in found:
        count[x.kind] += x.times
        sent[x.kind] += x.total
    return Compiled(
        peak=memory.peak_memory_in_bytes,
        arguments={name: size_of(tree) for name, tree in planned.arguments.items()},
        temporary=memory.temp_size_in_bytes,
        exchanges=[Exchange(kind, count[kind], sent[kind]) for kind, _ in sent.most_common()],
        moved=sum(x.total for x in traffic(text, otherwise=1)),
        seconds=time.monotonic() - start,
    )


def _said(words: str) -> str:
    """The sentences of a refusal that say how much there is, and how much is asked for."""
    sentences = re.split(r"(?<=[.!]) +|\n+", words)
    told = [s.strip() for s in sentences if re.search(r"\d[GMK]\b", s)]
    return " ".join(told[:3]) or words[:300]


def size_of(tree: Any) -> int:
    """Bytes of a tree of placed arrays on one device."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )


def _options(effort: str) -> dict[str, Any]:
    if effort == "full":
        return {}
    if effort != "low":
        raise ValueError(f"effort {effort!r} is neither low nor full")
    if jax.__version_info__ < (0, 11):
        return {"exec_time_optimization_effort": -1.0}
    return {"optimization_level": "O0"}
