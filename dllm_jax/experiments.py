"""One task, four ways to learn it: the same backbone, parameters and training FLOPs.

    masked, block, tri, ar = modes(Sudoku(), flops=1e15, run=Path("runs/sudoku"))
    train(masked)

What a row computes differs (a dual stream reads it twice), so the modes differ in steps.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dllm_jax import recipes, tasks, training
from dllm_jax.corruption import MaskedBlocks, MaskNoise
from dllm_jax.data import Source
from dllm_jax.losses import Autoregressive, Diffusion, DualStream
from dllm_jax.nn.transformer import TransformerConfig
from dllm_jax.pretraining import Train
from dllm_jax.recipes import Recipe
from dllm_jax.tasks import Examples, Task
from dllm_jax.training.loop import Found
from dllm_jax.training.throughput import step_flops
from dllm_jax.typing import Params

ROWS = 1 << 30  # questions to train on: none is seen twice


class Modes(NamedTuple):
    """The four runs."""

    masked: Train  # bidirectional, all positions in any order
    block: Train  # block-causal, block after block
    tri: Train  # causal, with a diffusion mode: autoregressive, diffusion, self-speculation
    ar: Train  # causal


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskData:
    """The questions of a task, as a `pretraining.Data`."""

    task: Task
    rows: int = ROWS
    """Questions to train on."""
    heldout: int = 256
    """Questions to look at."""
    seed: int = 0
    filled: bool = False
    """Answers go on with the end token up to the longest: for models whose canvas is that long."""

    def source(self, split: str) -> Source:
        """The rows of "train" or "heldout"."""
        count = self.rows if split == "train" else self.heldout
        return Examples(self.task, split, count, self.seed, filled=self.filled)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Accuracy:
    """How many held-out questions a model answers, as a `pretraining.Evaluation`."""

    task: Task
    recipe: Recipe
    count: int = 128
    batch: int = 64
    split: str = "heldout"
    shown: int = 1
    """So many answers are kept as samples."""

    def __call__(self, model: Any, params: Params, step: int) -> Found:
        """`accuracy`, `passes`, `overhead`, and answers as words."""
        found = tasks.solve(
            model, params, self.task, recipe=self.recipe, count=self.count, split=self.split,
            batch=self.batch,
        )  # fmt: skip
        return {
            "accuracy": found.accuracy,
            "passes": found.passes,
            "overhead": found.overhead,
            "answers": [self.task.show(row) for row in found.answers[: self.shown]],
        }


def modes(
    task: Task,
    *,
    run: Path,
    flops: float,
    canvas: Task | None = None,
    layers: int = 6,
    dim: int = 128,
    heads: int = 4,
    block: int = 4,
    batch: int = 32,
    optimiser: training.Optimiser | None = None,
    evaluate_every: int = 500,
    **fit: Any,
) -> Modes:
    """The runs of a task.

    Args:
      task: in the layout "prompt".
      run: folder of their folders.
      flops: of the training of each (`training.throughput.step_flops`).
      canvas: the same in the layout "canvas", which the masked model learns, where there is one.
      layers, dim, heads: of the backbone; feed-forward layers are three times as wide.
      block: positions of a block, for the modes that have some.
      batch: rows of a step; twice as many where a row computes half as much.
      optimiser: AdamW at 2e-3 by default.
      fit: other fields of `training.Fit`.
    """
    vocabulary = task.vocabulary
    whole = canvas or task
    length = max(task.length, whole.length)
    backbone = TransformerConfig(
        vocab_size=vocabulary.size, num_layers=layers, dim=dim, num_heads=heads,
        num_kv_heads=heads, head_dim=dim // heads, ffn_dim=3 * dim, qk_norm=True,
        max_length=-(-length // block) * block + block, learned_positions=True,
        mask_id=vocabulary.mask_id, pad_id=vocabulary.pad_id, eos_ids=(vocabulary.eos_id,),
    )  # fmt: skip
    optimiser = optimiser or training.Optimiser(
        learning_rate=2e-3, warmup=200, b2=0.98, weight_decay=0.01
    )

    def made(name: str, own: Task, objective: Any, asked: Mapping[str, Recipe], **config) -> Train:
        model = dataclasses.replace(backbone, **config)
        entries = objective.entries(batch, own.length)
        work = step_flops(model, model.tree(), entries=entries, length=own.length)
        steps = max(round(flops / work), 1)
        settings: dict[str, Any] = {"log_every": 20, "save_every": 250, **fit}
        return Train(
            run=run / name,
            data=TaskData(task=own, filled=model.attention == "bidirectional"),
            model=model,
            objective=objective,
            optimiser=optimiser,
            fit=training.Fit(
                steps=steps, batch=batch, length=own.length, evaluate_every=evaluate_every,
                **settings,
            ),
            evaluations={n: Accuracy(task=own, recipe=r) for n, r in asked.items()},
            recipe=next(iter(asked.values())),
        )  # fmt: skip

    marked = Diffusion(noise=MaskNoise(weighting="flat"), divide="learnt")
    in_blocks = Diffusion(
        noise=MaskNoise(block_size=block, weighting="flat"), divide="learnt",
        longest=task.answer_length,
    )  # fmt: skip
    drafts = MaskedBlocks(block_size=block, blocks=-(-task.answer_length // block))
    return Modes(
        masked=made(
            "masked", whole, marked, {"adaptive": recipes.llada(block_size=0)},
            attention="bidirectional", alignment="same_position",
        ),
        block=made(
            "block", task, in_blocks, {"blocks": recipes.sdar(block_size=block, order="static")},
            attention="block_causal", alignment="same_position", block_size=block,
        ),
        tri=made(
            "tri", task, DualStream(noise=drafts, ar_weight=1.0),
            {"ar": recipes.ar(), "blocks": recipes.block_diffusion(block_size=block)},
        ),
        ar=made("ar", task, Autoregressive(), {"ar": recipes.ar()}, mask_id=None),
    )  # fmt: skip
