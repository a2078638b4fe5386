"""When a block is done. None: when nothing of it is masked.

A part with a method `done(view) -> bool[B]`.
"""

from typing import NamedTuple

import jax

from dllm_jax.policies.commit import part
from dllm_jax.typing import Number


class FinishView(NamedTuple):
    """A block after a step."""

    before: jax.Array  # int32[B]: masked positions when the step began
    left: jax.Array  # int32[B]: masked positions now
    edits: jax.Array  # int32[B]: written tokens that the step changed
    steps: jax.Array  # int32[B]: steps of the block, this one included
    full_steps: jax.Array  # int32[B]: those of them that began with nothing masked
    stable: jax.Array  # bool[B]: the most probable tokens are those of the step before
    entropy: jax.Array  # float32[B]: mean over the block, nats


@part
class NoEdits:
    """When a step began with nothing masked and changed nothing, or after `limit` such steps.

    LLaDA2.1's `max_post_steps`: so long may written tokens be edited once all are written.
    """

    limit: Number = 16

    def done(self, view: FinishView) -> jax.Array:
        settled = (view.before == 0) & (view.edits == 0)
        return settled | ((view.left == 0) & (view.full_steps >= self.limit))


@part
class StableAndConfident:
    """When the most probable tokens do not change and are certain, or after `steps` steps.

    DiffusionGemma's adaptive stopping: a mean entropy below `entropy` (nats) at a repeated argmax.
    """

    entropy: Number = 0.005
    steps: Number = 48

    def done(self, view: FinishView) -> jax.Array:
        return (view.stable & (view.entropy < self.entropy)) | (view.steps >= self.steps)


@part
class AfterSteps:
    """After `steps` steps, though nothing be masked before: what is written may yet be taken back.

    With `ReMDM`.
    """

    steps: Number = 32

    def done(self, view: FinishView) -> jax.Array:
        return view.steps >= self.steps
