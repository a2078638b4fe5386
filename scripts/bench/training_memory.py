"""What a training step holds, by what its backward pass computes again: from the compiled program.

    python scripts/bench/training_memory.py                 # compiled for this CPU
    python scripts/bench/training_memory.py --chip v5e      # by the TPU compiler (extra `aot`)

The dual stream of a model of SmolLM2's shape (all parameters trained, AdamW in float32, activations
in bfloat16 on a chip), nothing of it is run. Adds a section to <out>.md and <out>.json.
"""

import dataclasses
import json
import platform
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import tyro

from dllm_jax import training
from dllm_jax.corruption import MaskedBlocks
from dllm_jax.losses import DualStream
from dllm_jax.nn.transformer import Transformer, TransformerConfig
from dllm_jax.nn.tree import param_shapes
from dllm_jax.testing.aot import compile_for

CASES = (
    ("none", 1, 1), ("dots", 1, 1), ("dots_no_batch", 1, 1), ("full", 1, 1), ("offload", 1, 1),
    ("none", 2, 1), ("full", 2, 1), ("none", 1, 4), ("full", 1, 4), ("full", 2, 4),
)  # fmt: skip
"""remat, phases, accumulate."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """What to compile."""

    chip: str = "cpu"
    """cpu, or one of `testing.aot.CHIPS`."""
    layers: int = 30
    batch: int = 8
    length: int = 1024
    block: int = 8
    out: Path = Path(__file__).parent / "results" / "training-memory"


def main(config: Memory) -> list[dict]:
    """Compiles every case, and writes the files."""
    rows: list[dict] = []
    for remat, phases, accumulate in CASES:
        if remat == "offload" and config.chip == "cpu":
            continue  # its memory is the host's
        start = time.perf_counter()
        step, arguments = case(config, remat, phases, accumulate)
        compiled = (
            step.lower(*arguments).compile()
            if config.chip == "cpu"
            else compile_for(config.chip, step, *arguments, options=options())
        )
        memory = compiled.memory_analysis()
        assert memory is not None
        rows.append({
            "remat": remat, "phases": phases, "accumulate": accumulate,
            "temporary": memory.temp_size_in_bytes, "host": memory.host_temp_size_in_bytes,
            "seconds": time.perf_counter() - start,
        })  # fmt: skip
        print(rows[-1], flush=True)
        write(config, rows)
    return rows


def options() -> dict[str, Any]:
    """Of a TPU's compiler: little effort, for seconds instead of minutes."""
    if jax.__version_info__ < (0, 11):
        return {"exec_time_optimization_effort": -1.0}
    return {"optimization_level": "O0"}


def case(config: Memory, remat: str, phases: int, accumulate: int) -> tuple[Any, tuple]:
    """A jitted step and the shapes of its arguments."""
    settings = TransformerConfig(
        vocab_size=49_152, num_layers=config.layers, dim=576, num_heads=9, num_kv_heads=3,
        head_dim=64, ffn_dim=1536, tied_head=True, mask_id=0, remat=remat,
        dtype="float32" if config.chip == "cpu" else "bfloat16",
    )  # fmt: skip
    model, tx = Transformer(settings), training.Optimiser().build(1000)
    noise = MaskedBlocks(block_size=config.block, blocks=config.length // config.block)
    objective = DualStream(noise=noise, ar_weight=1.0, phases=phases)
    params = param_shapes(settings)
    state = jax.eval_shape(lambda p: training.TrainState(jnp.int32(0), p, tx.init(p)), params)
    rows = jax.ShapeDtypeStruct((config.batch,), jnp.int32)
    tokens = jax.ShapeDtypeStruct((config.batch, config.length), jnp.int32)
    batch = {"tokens": tokens, "lengths": rows, "prompts": rows}
    step = training.make_train_step(model, objective, tx, accumulate=accumulate)
    assert isinstance(step, partial)
    return (
        jax.jit(lambda state, batch, key: step(state, {}, batch, key), donate_argnums=0),
        (state, batch, jax.eval_shape(lambda: jax.random.key(0))),
    )


def write(config: Memory, rows: list[dict]) -> None:
    """Puts the rows into the files, in place of those of the same chip."""
    file = config.out.with_suffix(".json")
    held = json.loads(file.read_text()) if file.exists() else {}
    fields = dataclasses.asdict(config)
    held[config.chip] = {
        "settings": {name: fields[name] for name in ("layers", "batch", "length", "block")},
        "rows": rows,
        "versions": {"python": platform.python_version(), "jax": jax.__version__},
        "date": time.strftime("%Y-%m-%d"),
    }
    config.out.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(held, indent=1) + "\n")
    config.out.with_suffix(".md").write_text(page(held))


def page(held: dict) -> str:
    """The results as Markdown."""
    text = [
        "# What a training step holds",
        "",
        "`scripts/bench/training_memory.py`: temporary bytes of the compiled step, beside"
        " parameters and optimiser; the dual stream of SmolLM2's shape, every parameter trained."
        " TPU programs are compiled with little effort. On the CPU `phases=2` saves nothing.",
    ]
    for chip, part in held.items():
        text += [
            "",
            f"## {chip}",
            "",
            "{layers} layers, batch {batch}, {length} clean and {length} noisy tokens a row, blocks"
            " of {block}; ".format(**part["settings"])
            + f"jax {part['versions']['jax']}, {part['date']}.",
            "",
            "| remat | phases | accumulate | GB | of the first | GB on the host |",
            "|---|---|---|---|---|---|",
        ]
        first = part["rows"][0]["temporary"]
        for row in part["rows"]:
            size = row["temporary"]
            text.append(
                f"| {row['remat']} | {row['phases']} | {row['accumulate']} | {size / 1e9:.2f} | "
                f"{size / first:.2f} | {row['host'] / 1e9:.2f} |"
            )
    return "\n".join(text) + "\n"


if __name__ == "__main__":
    main(tyro.cli(Memory, description=__doc__))
