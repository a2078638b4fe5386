"""Trains a diffusion mode into SmolLM2: an adapter that only mask tokens feel.

    python scripts/distill.py --out runs/smollm2/data --conversations 20000
    python scripts/distill.py --out runs/smollm2/data --conversations 128 --split heldout
    python scripts/adapt_smollm2.py cpu --minutes 60

`cpu`, `gpu` and `tpu` are the settings of configs/adapt_smollm2.py; any of them can be changed on
the command line. (`dllm-jax adapt configs/adapt_smollm2.py:cpu` does the same.) Give it a budget in
minutes; it saves and stops there, or on Ctrl-C or SIGTERM, and the same command goes on. At its
last step, or at any time with --export, it writes the adapter for `load(adapter=...)`. On many
hosts the same command runs on each (scripts/launch).
"""

from pathlib import Path

import tyro

from dllm_jax import distributed
from dllm_jax.adaptation import Adapt
from dllm_jax.adaptation import adapt as main
from dllm_jax.cli.training import load_config

CONFIG = Path(__file__).parents[1] / "configs" / "adapt_smollm2.py"


def presets() -> dict[str, tuple[str, Adapt]]:
    """What and which settings `configs/adapt_smollm2.py` has, by name."""
    return {
        name: (f"{config.steps} steps of {config.batch} rows", config)
        for name in ("cpu", "gpu", "tpu")
        if (config := load_config(f"{CONFIG}:{name}", Adapt))
    }


if __name__ == "__main__":
    config = tyro.extras.overridable_config_cli(presets(), description=__doc__)
    distributed.initialize()
    main(config)
