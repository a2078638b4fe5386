"""Whether eight devices answer as one: every recipe, a prefill and a training step, on meshes.

    XLA_FLAGS=--xla_force_host_platform_device_count=8 JAX_PLATFORMS=cpu \\
        python scripts/bench/mesh.py --out scripts/bench/results/mesh-cpu

Tiny models, decoded on one device and on each mesh, with Auto axes and with Explicit ones: tokens,
lengths, passes and stop reasons must be equal, log-probabilities nearly so. Writes OUT.json after
each row, and goes on from what it holds of this version of JAX; and OUT.md, with a table of each
version. About fifteen minutes on two cores.
"""

import argparse
import dataclasses
import functools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from dllm_jax import generate, make_mesh
from dllm_jax.bench.report import commit
from dllm_jax.corruption import MaskedBlocks
from dllm_jax.losses import DualStream
from dllm_jax.nn.transformer import forward
from dllm_jax.nn.tree import param_axes, param_shapes
from dllm_jax.sharding import shardings
from dllm_jax.testing.systems import MODELS, SYSTEMS, prompts
from dllm_jax.training import create, make_train_step

MESHES = {
    "8x1": dict(data=1, fsdp=8),
    "4x2": dict(data=1, fsdp=4, tensor=2),
    "2x2x2": dict(data=1, expert=2, context=2, tensor=2),
}
LAYOUTS = [(name, explicit) for explicit in (False, True) for name in MESHES]
ROWS, LONGEST, BUDGET = 8, 70, 16  # long enough for pieces over "context"
EXACT = ("tokens", "lengths", "stop", "nfe", "queries")


def main() -> int:
    """Runs what is missing; 1 where anything differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("programs", nargs="*", help="some of them; all by default")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=60, help="begin no row after so long")
    arguments = parser.parse_args()
    if jax.device_count() < 8:
        parser.error("this needs 8 devices; see the XLA_FLAGS above")
    jax.config.update("jax_disable_most_optimizations", True)  # it is compiling that takes long
    file = arguments.out.with_suffix(".json")
    held = json.loads(file.read_text()) if file.exists() else {}
    own = held.setdefault(jax.__version__, {"commit": commit(), "rows": {}})
    deadline = time.monotonic() + 60 * arguments.minutes
    for name in arguments.programs or PROGRAMS:
        if name in own["rows"] or time.monotonic() > deadline:
            continue
        own["rows"][name] = compared(PROGRAMS[name])
        print(name, own["rows"][name], flush=True)
        file.write_text(json.dumps(held, indent=1) + "\n")
        arguments.out.with_suffix(".md").write_text(tables(held))
        jax.clear_caches()  # a process may have so many programs
    cells = [cell for row in own["rows"].values() for cell in row.values()]
    return 0 if all(cell["equal"] and cell["difference"] < 1e-3 for cell in cells) else 1


Program = Callable[[Callable[[Any, Any], Any]], tuple[Any, Any]]
"""From a way to place a model's parameters to what must be equal, and what nearly so."""


def compared(run: Program) -> dict[str, dict[str, Any]]:
    """What each layout makes of a program, beside one device."""
    exact, near = jax.device_get(run(lambda model, params: params))
    found = {}
    for name, explicit in LAYOUTS:
        mesh, started = make_mesh(**MESHES[name], explicit=explicit), time.monotonic()

        def place(model, params, mesh=mesh):
            axes, shapes = param_axes(model.config), param_shapes(model.config)
            return jax.device_put(params, shardings(axes, mesh, shapes=shapes))

        with jax.set_mesh(mesh):
            own_exact, own_near = jax.device_get(run(place))
        equal = all(map(np.array_equal, jax.tree.leaves(exact), jax.tree.leaves(own_exact)))
        far = [
            float(np.abs(x - y).max())
            for x, y in zip(jax.tree.leaves(near), jax.tree.leaves(own_near), strict=True)
        ]
        found[f"{name}, Explicit" if explicit else name] = {
            "equal": equal, "difference": max(far), "seconds": round(time.monotonic() - started, 1),
        }  # fmt: skip
    return found


@functools.cache
def model_of(name: str) -> tuple[Any, Any]:
    """Made once, by the run on one device."""
    return MODELS[name]()


def decoding(name: str) -> Program:
    """A recipe's answers to ragged prompts."""

    def run(place):
        system = SYSTEMS[name]
        model, params = model_of(system.model)
        out = generate(
            model, place(model, params), prompts(ROWS, LONGEST), recipe=system.recipe,
            max_new_tokens=BUDGET, key=jax.random.key(3) if system.draws else None,
        )  # fmt: skip
        return [getattr(out, field) for field in EXACT], out.logprobs

    return run


def prefill(name: str) -> Program:
    """Hidden states, keys and values of a text of 128 tokens."""

    def run(place):
        model, params = model_of(name)
        tokens = np.array(prompts(ROWS, 128)[:1] * ROWS)
        lengths = np.arange(ROWS) + 120
        run = jax.jit(lambda params, tokens, lengths: forward(
            model, params, tokens, lengths=lengths, canvas=False
        ))  # fmt: skip
        return (), run(place(model, params), tokens, lengths)

    return run


def training(name: str) -> Program:
    """The loss of a step of the dual stream, and the parameters after it."""

    def run(place):
        model, params = model_of(name)
        model = dataclasses.replace(model.config, remat=True).build()
        params = place(model, params)
        tokens = np.random.default_rng(0).integers(3, 30, (ROWS, 128)).astype(np.int32)
        batch = {
            "tokens": tokens, "lengths": np.full(ROWS, 120), "prompts": np.arange(ROWS) + 2
        }  # fmt: skip
        objective = DualStream(noise=MaskedBlocks(block_size=8, blocks=16), ar_weight=0.5)
        tx = optax.sgd(1.0)  # a difference in parameters is one in gradients
        state = create(params, tuple(params), tx)
        step = make_train_step(model, objective, tx)
        state, figures = step(state, params, batch, jax.random.key(1))
        return (), (figures["loss"], figures["grad_norm"], state.trainable)

    return run


PROGRAMS: dict[str, Program] = {
    "prefill": prefill("causal"),
    "prefill, experts": prefill("llada2"),
    "training": training("causal"),
    "training, experts": training("llada2"),
    **{name: decoding(name) for name in SYSTEMS},
}


def tables(held: dict[str, Any]) -> str:
    """The largest differences, as Markdown."""
    meshes = ["8x1: fsdp 8", "4x2: fsdp 4, tensor 2", "2x2x2: expert 2, context 2, tensor 2"]
    lines = [
        "Tiny models on eight virtual CPU devices against one: the largest difference in",
        "log-probabilities (decoding), in hidden states, keys and values (prefill), in loss and",
        "gradients (training). Tokens, lengths, passes and stop reasons are equal but where it",
        f"says otherwise. Meshes: {'; '.join(meshes)}.",
    ]
    layouts = [f"{name}, Explicit" if explicit else name for name, explicit in LAYOUTS]
    for version, own in held.items():
        lines += ["", f"JAX {version} ({own['commit']})", ""]
        lines += [f"| | {' | '.join(layouts)} |", "|---" * (len(layouts) + 1) + "|"]
        for name, row in own["rows"].items():
            cells = [
                f"{cell['difference']:.1e}{'' if cell['equal'] else ', other tokens'}"
                for cell in (row[layout] for layout in layouts)
            ]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
