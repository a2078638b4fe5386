"""What a run needs before there is a chip to run it on: memory, collectives, time.

    found = plan("llada2-flash-100b", "v6e:8x8", mode="decode", batch=64, context=32_768)
    print(found.peak, found.fits, found.tokens_per_second)

The closed forms of `roofline` answer at once; the real compiler of the chip, which needs no chip,
then compiles the real program and says what it holds and what its devices tell each other.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from jax.sharding import Mesh

from dllm_jax import roofline
from dllm_jax.plan.architectures import NAMED, Architecture
from dllm_jax.plan.compiled import Compiled, Exchange, TooLarge, compile_program
from dllm_jax.plan.estimate import memory_of, work_of
from dllm_jax.plan.programs import Planned, program
from dllm_jax.plan.setting import MODES, Setting, setting
from dllm_jax.plan.topology import Topology, default_layouts, layout, mesh_of, topology_of
from dllm_jax.testing.aot import has_compiler

_LENGTHS = 1024  # the steps in which contexts are tried

__all__ = ["MODES", "NAMED", "Architecture", "Compiled", "Exchange", "Plan", "plan"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What is known of a run. Bytes, FLOPs and seconds are of each device, for one pass or step."""

    model: str
    topology: str
    devices: int
    mesh: dict[str, int]  # axes of more than one device
    mode: str  # "decode", "prefill" or "train"
    recipe: str
    batch: int
    context: int
    block: int
    dtype: str  # of activations and cache
    param_dtype: str
    parameters: roofline.Parameters
    memory: dict[str, int]  # bytes by role, in closed form
    limit: int  # bytes that a program may use
    compiled: Compiled | None
    reason: str | None  # why nothing was compiled, or what the compiler refused
    work: roofline.Work
    time: roofline.Time
    tokens_per_forward: float  # of a row; assumed
    fits: bool
    largest_batch: int  # at this context; 0: none
    largest_context: int  # at this batch, in steps of 1,024; 0: none

    @property
    def estimate(self) -> int:
        """The peak in closed form."""
        return sum(self.memory.values())

    @property
    def peak(self) -> int:
        """By the compiler, or else in closed form."""
        return self.compiled.peak if self.compiled else self.estimate

    @property
    def tokens_per_second(self) -> float:
        """Of all rows together, at the chips' peaks: written, read (prefill) or learnt from."""
        each = {"decode": self.tokens_per_forward}.get(self.mode, self.context)
        return self.batch * each / self.time.least

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        found = dataclasses.asdict(self)
        named = {"parameters": self.parameters, "work": self.work, "time": self.time}
        found |= {name: value._asdict() for name, value in named.items()}
        if self.compiled:
            exchanges = [x._asdict() for x in self.compiled.exchanges]
            found["compiled"] = self.compiled._asdict() | {"exchanges": exchanges}
        derived = {"bound": self.time.bound, "tokens_per_second": self.tokens_per_second}
        return found | {"estimate": self.estimate, "peak": self.peak, **derived}


def plan(
    model: str,
    topology: str,
    *,
    mode: str = "decode",
    batch: int = 1,
    context: int = 4096,
    block: int | None = None,
    mesh: Mapping[str, int] | None = None,
    recipe: str | None = None,
    dtype: str = "bfloat16",
    cache_dtype: str | None = None,
    accumulate: int = 1,
    tokens_per_forward: float | None = None,
    effort: str = "low",
    compiling: bool = True,
    told: Callable[[str], None] = lambda text: None,
) -> Plan:
    """Plans a run of a model on a topology.

    Args:
      model: a name of `NAMED`, or what `load` takes: a name, or a folder, of which the config is
        read.
      topology: "v5e:16x16", "v5p:2x2x1", "h100:8"; GPUs are answered in closed form.
      mode: "decode" (one denoising step and its cache), "prefill" or "train" (a step of AdamW on
        the dual stream, parameters and moments in float32).
      batch, context: rows, and positions of each.
      block: of the recipe, or of the noise; None is its own.
      mesh: the size of each axis, of data, fsdp, expert, context and tensor; None suits the model.
      recipe: None is the one that the model is published with.
      dtype: of activations, cache and (but in training) weights.
      cache_dtype: of the cache: "int8" with its scales, or as activations by default.
      accumulate: parts of a batch that are trained on one after the other.
      tokens_per_forward: that a row writes in a pass; None is what is reported for the model, or 1.
      effort: "low" compiles in seconds what "full" compiles as for a run. The largest batch and
        context follow from the compiled peak and the closed form; "full" compiles them too.
      compiling: False answers in closed form.
      told: is called with what is being done.

    Raises:
      FileNotFoundError, ValueError: no such model, topology, mesh, mode or recipe.
    """
    own = topology_of(topology)
    asked = setting(
        model, mode, batch=batch, context=context, block=block, recipe=recipe, dtype=dtype,
        cache_dtype=cache_dtype, accumulate=accumulate, tokens_per_forward=tokens_per_forward,
    )  # fmt: skip
    meshes = [mesh] if mesh else default_layouts(asked.config, mode, own, batch)
    needs = lambda sizes: sum(memory_of(asked, sizes).values())  # noqa: E731
    sizes = min((layout(own, each) for each in meshes), key=needs)
    memory = memory_of(asked, sizes)
    compiled, reason, devices = None, _reason(own, compiling), None
    fits = sum(memory.values()) <= own.chip.hbm
    if reason is None:
        told(f"compiling {mode} of {model} for {own.name}")
        try:
            devices = mesh_of(own, sizes)
            compiled = compile_program(program(asked, devices), devices, effort=effort)
            fits = compiled.peak <= own.chip.hbm
        except TooLarge as error:
            reason, fits = f"the compiler refuses: {error}", False
    # What the compiler holds beyond the closed form is taken to grow as that does.
    extra = compiled.peak / sum(memory.values()) if compiled else 1.0

    def changed(batch: int = batch, context: int = context) -> Setting:
        longest = max(asked.config.max_length, context)
        config = dataclasses.replace(asked.config, max_length=longest)
        return dataclasses.replace(asked, config=config, batch=batch, context=context)

    def fitting(step: int, other: Callable[[int], Setting]) -> int:
        """The most that fits, in so many steps; full effort compiles it."""
        needs = lambda n: extra * sum(memory_of(other(n * step), sizes).values())  # noqa: E731
        found = _most(needs, own.chip.hbm) * step
        if effort != "full" or devices is None or compiled is None:
            return found
        told(f"compiling the most that fits, about {found:,}")
        return _confirmed(
            found, step, lambda n: _compiles(program(other(n), devices), devices, effort)
        )

    work = work_of(asked, sizes)
    step = accumulate * math.prod(sizes[axis] for axis in ("data", "fsdp", "expert"))
    rows = fitting(step, lambda n: changed(batch=n))
    length = fitting(_LENGTHS, lambda n: changed(context=n))
    return Plan(
        model=model, topology=own.name, devices=own.devices,
        mesh={axis: size for axis, size in sizes.items() if size > 1}, mode=mode,
        recipe="dual stream" if mode == "train" else asked.recipe_name, batch=batch,
        context=context, block=asked.block, dtype=asked.config.dtype,
        param_dtype=asked.config.param_dtype, parameters=roofline.parameters(asked.config),
        memory=memory, limit=int(own.chip.hbm), compiled=compiled, reason=reason, work=work,
        time=roofline.time_of(work, own.chip), tokens_per_forward=asked.tokens_per_forward,
        fits=fits, largest_batch=rows, largest_context=length,
    )  # fmt: skip


def _compiles(planned: Planned, devices: Mesh, effort: str) -> bool:
    try:
        compile_program(planned, devices, effort=effort)
    except TooLarge:
        return False
    return True


def _reason(own: Topology, compiling: bool) -> str | None:
    """Why a program is not compiled, if it is not."""
    if not compiling:
        return "not asked for"
    if not own.is_tpu:
        return "programs are compiled for TPUs alone"
    if not has_compiler("tpu"):
        return "the TPU compiler is not installed: pip install 'dllm-jax[aot]'"
    return None


def _most(needs: Callable[[int], float], room: float) -> int:
    """The largest number whose need there is room for, up to 2 ** 24; needs grow."""
    if needs(1) > room:
        return 0
    low, high = 1, 2
    while high < 1 << 24 and needs(high) <= room:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if needs(middle) <= room else (low, middle)
    return low


def _confirmed(found: int, step: int, compiles: Callable[[int], bool]) -> int:
    """The number, or the first of a few smaller ones, that the compiler takes; 0: none."""
    for share in (100, 95, 90, 80, 60):
        number = found * share // 100 // step * step
        if number and compiles(number):
            return number
    return 0
