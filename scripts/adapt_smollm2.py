"""Trains a diffusion mode into SmolLM2: an adapter that only mask tokens feel.

    python scripts/distill.py --out runs/smollm2/data --conversations 20000
    python scripts/distill.py --out runs/smollm2/data --conversations 128 --split heldout
    python scripts/adapt_smollm2.py cpu --minutes 60

`cpu`, `gpu` and `tpu` are the settings of configs/adapt_smollm2_*.py; any of them can be changed on
the command line. Give it a budget in minutes; it saves and stops there, or on Ctrl-C or SIGTERM,
and the same command goes on. At its last step, or at any time with --export, it writes the adapter
for `load(adapter=...)`. On many hosts the same command runs on each (scripts/launch).
"""

import importlib.util
from pathlib import Path

import tyro

from dllm_jax import distributed
from dllm_jax.adaptation import Adapt
from dllm_jax.adaptation import adapt as main

CONFIGS = Path(__file__).parents[1] / "configs"


def presets() -> dict[str, tuple[str, Adapt]]:
    """What and which settings each `configs/adapt_smollm2_<name>.py` holds, by name."""
    found = {}
    for path in sorted(CONFIGS.glob("adapt_smollm2_*.py")):
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        found[path.stem.removeprefix("adapt_smollm2_")] = (module.__doc__ or "", module.config)
    return found


if __name__ == "__main__":
    config = tyro.extras.overridable_config_cli(presets(), description=__doc__)
    distributed.initialize()
    main(config)
