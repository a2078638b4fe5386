"""One task or corpus, several ways to learn it: the same backbone, parameters and training FLOPs.

    masked, block, tri, ar = modes(Sudoku(layout="prompt"), flops=1e15, run=Path("runs/sudoku"))
    train(masked)

What a row computes differs (a dual stream reads it twice), so the ways differ in steps.
"""

import dataclasses
import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tyro.conf import Fixed

from dllm_jax import distributed, recipes, training
from dllm_jax.corruption import MaskedBlocks, MaskNoise
from dllm_jax.data import CorpusData
from dllm_jax.likelihood import bound, log_likelihood
from dllm_jax.losses import Autoregressive, Diffusion, DualStream
from dllm_jax.nn.transformer import TransformerConfig
from dllm_jax.pretraining import Data, Evaluation, TaskAccuracy, TaskData, Train
from dllm_jax.recipes import Recipe
from dllm_jax.tasks import Task
from dllm_jax.training.loop import Found
from dllm_jax.training.throughput import step_flops
from dllm_jax.typing import Params

ROWS = 1 << 30  # questions to train on: none is seen twice

LOOKUP: Mapping[str, Any] = {
    "grid": True, "heads": 4,
    "optimiser": training.Optimiser(
        learning_rate=2e-3, warmup=100, b2=0.98, weight_decay=0.01
    ),
}  # fmt: skip
"""Arguments of `modes` for tasks that look things up: path-star, recall, repair.

Masked diffusion, small instances (`tests/learning_config.py`), one seed, with these and without:
two paths of three nodes 100% and 77%, recall of three pairs 100% and 45% (a guess among the three
values is a third).
"""


class Modes(NamedTuple):
    """The runs of a task."""

    masked: Train  # bidirectional, all positions in any order
    block: Train  # block-causal, block after block
    tri: Train  # causal, with a diffusion mode: autoregressive, diffusion, self-speculation
    ar: Train  # causal


def modes(
    task: Task,
    *,
    run: Path,
    flops: float,
    canvas: Task | None = None,
    layers: int = 4,
    dim: int = 64,
    heads: int = 2,
    block: int = 4,
    grid: bool = False,
    batch: int = 32,
    optimiser: training.Optimiser | None = None,
    **fit: Any,
) -> Modes:
    """The runs of a task.

    Small models by Muon, and positions by RoPE alone whose slowest wave is about two rows long,
    learn sums soonest. Masked diffusion, 8 digits, 8e12 FLOPs, one seed: 96% of 128 sums; by AdamW
    at 2e-3 85%; with a vector for each position and slow waves (`grid`) 74%; by six times the
    parameters 12% of 256, and with such vectors 2%. Grids need them: of Sudoku 9x9 it solves 97%
    of 128 after 1e13 FLOPs, and without them (and 32 rows a step instead of 8) none.

    Blocks learn one noisy text a row. With its complement beside it (`Diffusion.complementary`, as
    prose has them) blocks of 4 got 82.8 ± 1.7% of sums instead of 79.4 ± 1.3% and 44.7 ± 2.2% of
    brackets instead of 40.5 ± 1.6% (8e12 FLOPs, one seed; seeds without it deviate by 6.5 and 9.0).

    Args:
      task: in the layout "prompt".
      run: folder of their folders.
      flops: of the training of each (`training.throughput.step_flops`).
      canvas: the same in the layout "canvas", which the masked model learns, where there is one.
      layers, dim, heads: of the backbone; feed-forward layers are three times as wide.
      block: positions of a block, for the modes that have some.
      grid: positions are places of a grid, each with a vector of its own beside RoPE, whose waves
        are slow then.
      batch: rows of a step.
      optimiser: Muon at 1e-2 by default.
      fit: other fields of `training.Fit`.
    """
    whole, vocabulary = canvas or task, task.vocabulary
    backbone = _backbone(
        vocabulary.size, -(-max(task.length, whole.length) // block) * block + block, layers, dim,
        heads, mask_id=vocabulary.mask_id, pad_id=vocabulary.pad_id, eos_ids=(vocabulary.eos_id,),
        grid=grid,
    )  # fmt: skip
    budget = _Budget(run, flops, batch, optimiser, fit)
    marked = Diffusion(noise=MaskNoise(weighting="flat"), divide="learnt")
    in_blocks = Diffusion(
        noise=MaskNoise(block_size=block, weighting="flat"), divide="learnt",
        longest=task.answer_length,
    )  # fmt: skip
    drafts = MaskedBlocks(block_size=block, blocks=-(-task.answer_length // block))

    def made(
        name: str, own: Task, objective: Any, ways: Mapping[str, Any], **changes: Any
    ) -> Train:
        config = dataclasses.replace(backbone, **changes)
        data = TaskData(task=own, rows=ROWS, filled=config.attention == "bidirectional")
        asked = {way: TaskAccuracy(recipe=recipe) for way, recipe in ways.items()}
        made = budget.run(name, data, config, objective, own.length, asked)
        return dataclasses.replace(made, recipe=next(iter(ways.values())))

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


class TextModes(NamedTuple):
    """The runs of a corpus."""

    ar: Train
    tri: Train  # causal, with a diffusion mode of blocks of 4; its bits are of its causal mode
    block_4: Train
    block_16: Train
    masked: Train


def text_modes(
    data: CorpusData,
    *,
    run: Path,
    flops: float,
    layers: int = 6,
    dim: int = 192,
    heads: int = 6,
    batch: int = 16,
    optimiser: training.Optimiser | None = None,
    **fit: Any,
) -> TextModes:
    """The runs of a corpus, packed into rows; what is measured is the bound, or exact.

    Arguments as of `modes`. Held-out bits a character are exact for causal models, and an upper
    bound for the others. A dual stream reads a row twice, so that modes in blocks read fewer rows.
    They read it a third time, with the other tokens masked, for one clean pass serves both
    (`_masked`): blocks of 16 come to 2.86 instead of 2.88 bits after 4e12 FLOPs in steps of four
    rows, 2.82 instead of 2.86 in steps of two, and after 2e13 to 2.53 instead of 2.55; blocks of 4
    to 2.65 instead of 2.68 (4e12, two rows). One seed, as all figures here. Few rows a step are
    best where FLOPs are few: masked diffusion 2.78 in steps of two, 2.80 of four (4e12).

    Whole rows first, at half the price, as BD3-LM's training has them (`Train.phases`; 85% of the
    steps), gave blocks of 16 2.83 (by Muon at 1.2e-2) instead of 2.91 bits a character after 4e12
    FLOPs, and after 2e13 nothing (2.55), and cost blocks of 4 a quarter of a bit there (2.55
    instead of 2.30).

    Muon at 1e-2 by default learns prose faster than AdamW at 2e-3: blocks of 16 come to 2.91
    instead of 3.14 bits after 4e12 FLOPs, masked diffusion (at 1.2e-2) to 2.79 instead of 3.04.

    Positions are told by RoPE alone, whose slowest wave is about two rows long: with learned ones
    beside it, or slow waves, attention to neighbours is found late (3.29 bits a character in blocks
    of 16 after 4e12 FLOPs of AdamW; 3.34 with `rope_theta=10_000`; with both of them 3.58).
    """
    length = data.length
    if length is None or length % 16:
        raise ValueError(f"length={length}: rows must be packed, in blocks of 16")
    backbone = _backbone(
        -(-data.vocab_size // 64) * 64, length, layers, dim, heads, mask_id=1, pad_id=0,
        eos_ids=(2,),
    )  # fmt: skip
    budget = _Budget(run, flops, batch, optimiser, fit)

    def made(name: str, objective: Any, **changes: Any) -> Train:
        config = dataclasses.replace(backbone, **changes)
        asked = {"bits": Bits()}
        return budget.run(name, data, config, objective, length, asked)

    def in_blocks(size: int) -> Train:
        return made(
            f"block_{size}", _masked(size),
            attention="block_causal", alignment="same_position", block_size=size,
        )  # fmt: skip

    drafts = MaskedBlocks(block_size=4, blocks=length // 4)
    return TextModes(
        ar=made("ar", Autoregressive(), mask_id=None),
        tri=made("tri", DualStream(noise=drafts, ar_weight=1.0)),
        block_4=in_blocks(4),
        block_16=in_blocks(16),
        masked=made(
            "masked", _masked(0),
            attention="bidirectional", alignment="same_position",
        ),
    )  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bits:
    """Bits a character of held-out rows, as a `pretraining.Evaluation`.

    Each row given its prompt, or its first token. Characters are counted by the mean of the
    held-out store, `characters_per_token`.
    """

    data: Fixed[Any] = None
    """A `CorpusData` or `StoreData`; None: the run's own."""
    rows: int = 32
    """From the start of the held-out ones, as far as the model reads; those that have nothing to
    learn are left out."""
    samples: int = 16
    """Draws of noise a row."""
    batch: int = 16
    seed: int = 0
    recipe: Fixed[Recipe | None] = None
    """Exactly, of texts that this recipe writes (`likelihood.log_likelihood`). None: exactly token
    after token for a causal model, else the bound (`likelihood.bound`)."""

    def of(self, data: Any) -> "Bits":
        """With a run's data, where it has none of its own."""
        return self if self.data is not None else dataclasses.replace(self, data=data)

    def __call__(self, model: Any, params: Params, step: int) -> Found:
        """`per_character`, its `stderr` (of the draws of noise), and the number of `characters`.

        Where they are exact, also the `passes` that writing a row takes, and the `overhead`:
        entries processed in them for a token.

        Raises:
          ValueError: rows have given tokens behind a prompt, or several documents, or nothing to
            learn; or there is no data.
        """
        if self.data is None:
            raise ValueError("bits need data: give some, or ask of(data)")
        source, store = self.data.source("heldout"), self.data.store("heldout")
        rows = [source[i] for i in range(min(self.rows, len(source)))]
        if any(row.given is not None or row.segments is not None for row in rows):
            raise ValueError(
                "bits are of one text a row, behind its prompt: these have other given tokens, or"
                " several documents"
            )
        most = model.config.max_length
        cuts = [(row.tokens[:most].tolist(), max(row.prompt, 1)) for row in rows]
        pairs = [(ids[:cut], ids[cut:]) for ids, cut in cuts if cut < len(ids)]
        if not pairs:
            raise ValueError(f"none of the first {len(rows)} held-out rows has anything to learn")
        recipe = self.recipe
        if (model.config.attention, model.config.alignment) == ("causal", "shifted"):
            recipe = recipe or recipes.ar()
        found, key = [], jax.random.key(self.seed)
        for first in range(0, len(pairs), self.batch):
            given, rest = zip(*pairs[first : first + self.batch], strict=True)
            if recipe is not None:
                own = log_likelihood(model, params, given, rest, recipe=recipe)
                each = own.total, jnp.zeros(len(rest)), own.nfe, own.queries
            else:
                rows = np.arange(first, first + len(rest))
                keys = jax.vmap(partial(jax.random.fold_in, key))(rows)
                each = bound(model, params, given, rest, key=keys, samples=self.samples)
            found.append([x.astype(np.float64) for x in distributed.fetched(tuple(each))])
        nats, spread, *cost = (np.concatenate(each) for each in zip(*found, strict=True))
        count = sum(len(rest) for _, rest in pairs)
        characters = count * store.characters_per_token
        scale = 1 / math.log(2) / characters
        told = {
            "per_character": float(-nats.sum() * scale),
            "stderr": float(np.sqrt((spread**2).sum()) * scale),
            "characters": characters,
        }
        if cost:
            told |= {"passes": float(cost[0].mean()), "overhead": float(cost[1].sum() / count)}
        return told


def _masked(size: int) -> Diffusion:
    """Masks of blocks of `size`, every token once a step, or of whole texts (0).

    In bands of shares, for clipped schedules vary less (BD3-LM, 2503.09573, section 5.3): of whole
    texts in its band of blocks of 16 (bits a character after 4e12 FLOPs of AdamW, one seed: 3.04;
    with the whole bound 3.44), of blocks in one whose complements lie in it too: [0.2, 0.8] (of
    16, by Muon, 2.86; [0.1, 0.9] 2.88).
    """
    if not size:
        return Diffusion(noise=MaskNoise(counts="independent", beta=0.3, omega=0.8))
    noise = MaskNoise(block_size=size, counts="independent", beta=0.2, omega=0.8)
    return Diffusion(noise=noise, complementary=True)


def _optimiser(steps: int) -> training.Optimiser:
    return training.Optimiser(
        kind="muon", learning_rate=1e-2, warmup=max(steps // 10, 1), b2=0.98, weight_decay=0.01
    )


def _backbone(
    vocab_size: int,
    length: int,
    layers: int,
    dim: int,
    heads: int,
    grid: bool = False,
    **other: Any,
) -> TransformerConfig:
    return TransformerConfig(
        vocab_size=vocab_size, num_layers=layers, dim=dim, num_heads=heads, num_kv_heads=heads,
        head_dim=dim // heads, ffn_dim=3 * dim, qk_norm=True, max_length=length,
        learned_positions=grid, rope_theta=10_000.0 if grid else length / 2.56, **other,
    )  # fmt: skip


class _Budget(NamedTuple):
    """What the runs of an experiment share."""

    folder: Path
    flops: float
    batch: int
    optimiser: training.Optimiser | None  # None: `_optimiser`
    fit: dict[str, Any]

    def run(
        self, name: str, data: Data, model: TransformerConfig, objective: Any, length: int,
        evaluations: Mapping[str, Evaluation],
    ) -> Train:  # fmt: skip
        """A run of as many steps as the FLOPs are good for."""
        work = step_flops(model, model.tree(), objective, self.batch, length)
        steps = max(round(self.flops / work), 1)
        settings: dict[str, Any] = {
            "log_every": 20, "save_every": 250, "evaluate_every": -(-steps // 4), **self.fit
        }  # fmt: skip
        optimiser = self.optimiser or _optimiser(steps)
        fit = training.Fit(steps=steps, batch=self.batch, length=length, **settings)
        return Train(
            run=self.folder / name, data=data, model=model, objective=objective,
            optimiser=optimiser, fit=fit, evaluations=evaluations,
        )  # fmt: skip
