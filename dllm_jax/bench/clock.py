"""The time of one call: many calls in one program, so that no launch is timed.

Programs that are compared take turns, as a machine's speed changes while it is used.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

RUN = 0.05  # seconds that a run of many calls should take
_MOST_CALLS = 500
_MOST_RUNS = 20


class Times(NamedTuple):
    """Seconds of one call, of several runs."""

    median: float
    low: float
    high: float
    runs: int
    calls: int  # of a run


def calls_for(once: float, least: int = 1) -> int:
    """Calls of a run, where one alone, with its launch, takes `once` seconds."""
    return min(max(round(RUN / once), least), _MOST_CALLS)


class Program(NamedTuple):
    """What is timed."""

    run: Callable[[], object]  # returns when the device is done with all calls
    calls: int


def timed(programs: Sequence[Program], seconds: float) -> list[Times]:
    """Runs the programs in turn for about `seconds` each, so that all see the same machine.

    One that takes long runs once; no turn begins that would end too late.
    """
    for program in programs:
        program.run()  # the first may load it
    found: list[list[float]] = [[] for _ in programs]
    start, turn = time.perf_counter(), 0.0
    while not found[0] or (
        time.perf_counter() - start + turn < seconds * len(programs) and len(found[0]) < _MOST_RUNS
    ):
        begun = time.perf_counter()
        for program, own in zip(programs, found, strict=True):
            once = time.perf_counter()
            program.run()
            own.append((time.perf_counter() - once) / program.calls)
        turn = time.perf_counter() - begun
    return [
        Times(statistics.median(own), min(own), max(own), len(own), program.calls)
        for program, own in zip(programs, found, strict=True)
    ]
