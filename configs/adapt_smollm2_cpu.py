"""An hour or so on two cores: small blocks, few conversations a step."""

from pathlib import Path

from dllm_jax.adaptation import Adapt

config = Adapt(data=Path("runs/smollm2/data"), run=Path("runs/smollm2/adapt-cpu"))
