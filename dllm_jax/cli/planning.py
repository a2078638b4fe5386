"""The plan command: a table of what a run needs."""

import json
from collections.abc import Iterator

from dllm_jax.cli import terminal
from dllm_jax.cli.background import background
from dllm_jax.cli.options import Plan as Command
from dllm_jax.plan import Plan, plan


def planning(command: Command) -> None:
    """Plans, and prints what was found."""
    with terminal.status(f"planning {command.mode} of {command.model} on {command.topology}"):
        (found,) = background(lambda: [_planned(command)])
    if command.json:
        print(json.dumps(found.to_dict(), indent=1))
    else:
        print("\n".join(table(found)))
    if found.reason is not None:
        terminal.note(f"nothing is compiled: {found.reason}; these are the closed forms")


def _planned(command: Command) -> Plan:
    return plan(
        command.model, command.topology, mode=command.mode, batch=command.batch,
        context=command.context, block=command.block, mesh=command.sizes(), recipe=command.recipe,
        dtype=command.dtype, cache_dtype=command.cache_dtype,
        accumulate=command.accumulate, tokens_per_forward=command.tokens_per_forward,
        effort="low" if command.effort == "none" else command.effort,
        compiling=command.effort != "none",
    )  # fmt: skip


def table(found: Plan) -> Iterator[str]:
    """The plan in lines."""
    mesh = " x ".join(f"{axis} {size}" for axis, size in found.mesh.items()) or "one device"
    p = found.parameters
    yield f"{found.model}, {found.mode} on {found.topology}: {found.devices} devices, {mesh}"
    yield from _rows(
        ("parameters", f"{_count(p.total)}, active {_count(p.active)}, in {found.param_dtype}"),
        ("batch", f"{found.batch} of {found.context:,} positions, blocks of {found.block}"),
        ("recipe", found.recipe),
    )
    yield ""
    yield "memory of a device"
    roles = [(role, _bytes(size)) for role, size in found.memory.items()]
    yield from _rows(*roles, ("closed form", _bytes(found.estimate)))
    if c := found.compiled:
        effort = f"compiled in {c.seconds:.0f} s"
        yield from _rows(
            ("compiler's peak", f"{_bytes(c.peak)} ({effort})"),
            *((f"of it {role}", _bytes(size)) for role, size in c.arguments.items()),
            ("temporary", _bytes(c.temporary)),
        )
    verdict = "fits" if found.fits else "does NOT fit"
    yield from _rows(("", f"{verdict} in {_bytes(found.limit)}"))
    most = "the most that fits: batch {:,} at this context, context {:,} at this batch"
    yield from _rows(("", most.format(found.largest_batch, found.largest_context)))
    yield ""
    yield from _exchanges(found)
    yield "roofline of a " + ("step" if found.mode == "train" else "pass")
    t, w = found.time, found.work
    yield from _rows(
        ("compute", f"{_seconds(t.compute):>12}   {w.flops / 1e12:.4g} TFLOP a device"),
        ("memory", f"{_seconds(t.memory):>12}   {_bytes(int(w.bytes))}"),
        ("network", f"{_seconds(t.network):>12}   {_bytes(int(w.sent))}"),
        ("least", f"{_seconds(t.least):>12}   bound by {t.bound}"),
        ("tokens/s", f"{found.tokens_per_second:>12,.0f}   {_meaning(found)}"),
    )


def _exchanges(found: Plan) -> Iterator[str]:
    if found.compiled is None or found.devices == 1:
        return
    yield "collectives of a " + ("step" if found.mode == "train" else "pass")
    rows = [(x.kind, f"{x.count:>8,} times, {_bytes(x.bytes)} sent by a device")
            for x in found.compiled.exchanges]  # fmt: skip
    yield from _rows(*(rows or [("none", "")]))
    yield ""


def _meaning(found: Plan) -> str:
    """Of which tokens, and what is assumed."""
    if found.mode == "train":
        return "learnt from, by all rows"
    if found.mode == "prefill":
        return "read, by all rows"
    alone = found.batch / found.time.least
    each = f"{found.tokens_per_forward:.3g} tokens a pass and row"
    return f"written, by all rows, at {each}; {alone:,.0f} at one"


def _rows(*rows: tuple[str, str]) -> Iterator[str]:
    for name, value in rows:
        yield f"  {name:<18}{value}".rstrip()


def _count(number: int) -> str:
    return f"{number / 1e9:.2f} B" if number >= 1e9 else f"{number / 1e6:.1f} M"


def _seconds(time: float) -> str:
    return f"{time:.3g} s" if time >= 1 else f"{1e3 * time:.4g} ms"


def _bytes(count: int) -> str:
    return f"{count / (1 << 30):.2f} GiB" if count >= 1 << 27 else f"{count / (1 << 20):.1f} MiB"
