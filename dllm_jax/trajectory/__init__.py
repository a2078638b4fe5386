"""How an answer came about, pass by pass: recorded, saved, and shown on a page or a terminal.

result, trajectory = record(model, params, prompt, recipe=recipes.block_diffusion())
trajectory.html(tokenizer.decode, "answer.html")
trajectory.show(tokenizer.decode, step=7, colour="confidence")
trajectory.save("answer.json")
"""

from dllm_jax.trajectory.data import KINDS, Canvas, Row, Trajectory
from dllm_jax.trajectory.recorder import Recorder, record

__all__ = ["KINDS", "Canvas", "Recorder", "Row", "Trajectory", "record"]
