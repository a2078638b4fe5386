"""Writes training conversations with the model itself: it asks, then it answers.

    python scripts/distill.py --out runs/smollm2/data --conversations 20000
    python scripts/distill.py --out runs/smollm2/data --conversations 512 --split heldout

The model writes the user's turn from its chat template (sampled), then the assistant's turn
(greedy by
default: what the causal mode will have to accept). Part i of a split is a function of (model,
settings, seed, split, i) alone: stop at any time, start again, and only the missing parts are
written. Many processes (scripts/launch) write the parts in turn.
"""

import dataclasses
import time
from pathlib import Path

import jax
import numpy as np
import tyro
from rich.progress import Progress

from dllm_jax import data, distributed, recipes
from dllm_jax.checkpoint import load
from dllm_jax.decode.generate import generate, pad
from dllm_jax.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Distill:
    """What to write, and where."""

    out: Path
    """Folder of the parts, `<split>-00000.npz` and so on."""
    conversations: int = 20_000
    """How many to write for this split, rounded up to whole parts."""
    split: str = "train"
    """train or heldout: each has its own seeds."""
    model: str = "smollm2-135m-instruct"
    seed: int = 0
    batch: int = 64
    """Conversations in a part."""
    user_tokens: int = 40
    """Longest question; longer ones are dropped."""
    answer_tokens: int = 160
    """Longest answer; longer ones are cut there."""
    user_temperature: float = 1.0
    answer_temperature: float = 0.0


def main(config: Distill) -> None:
    """Writes the missing parts of a split."""
    if config.split not in data.SPLITS:
        raise ValueError(f"split={config.split!r} is not one of {data.SPLITS}")
    config.out.mkdir(parents=True, exist_ok=True)
    model, params = load(config.model, adapter=None)
    opening, closing = turns(Tokenizer.load(config.model))
    parts = -(-config.conversations // config.batch)
    root = jax.random.fold_in(jax.random.key(config.seed), data.SPLITS.index(config.split))
    own = range(jax.process_index(), parts, jax.process_count())
    with Progress(disable=not distributed.is_first()) as progress:
        task = progress.add_task(f"{config.split} parts", total=len(own))
        for part in own:
            path = config.out / f"{config.split}-{part:05d}.npz"
            if not path.exists():
                start = time.perf_counter()
                rows, prompts = converse(
                    model, params, opening, closing, jax.random.fold_in(root, part), config
                )
                data.write_part(path, rows, prompts)
                tokens = sum(map(len, rows)) - sum(prompts)
                rate = tokens / (time.perf_counter() - start)
                progress.console.print(
                    f"{path.name}: {len(rows)} rows, {tokens} answer tokens, {rate:.0f}/s"
                )
            progress.advance(task)
    distributed.wait("all parts are there")  # a process that ends early ends the others


def turns(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """What the chat template puts before and behind a user's words, to the answer's start."""
    one, two = tokenizer.chat("alpha"), tokenizer.chat("Bravo")
    shared = min(len(one), len(two))
    head = next(i for i in range(shared) if one[i] != two[i])
    tail = next(i for i in range(1, shared) if one[-i] != two[-i]) - 1
    return one[:head], one[len(one) - tail :]


def converse(model, params, opening, closing, key, config: Distill):
    """One part: rows of ids (question and answer, laid out), and where each answer starts.

    Half as many questions again are asked as are wanted, since some run past their limit.
    """
    ask, answer = jax.random.split(key)
    asked = generate(
        model, params, pad([opening] * (config.batch * 3 // 2), bucket=8),
        recipe=recipes.ar(temperature=config.user_temperature),
        max_new_tokens=config.user_tokens, key=ask,
    )  # fmt: skip
    tokens, lengths = np.asarray(asked.tokens), np.asarray(asked.lengths)
    questions = [
        opening + tokens[i, : lengths[i] - 1].tolist() + closing
        for i, reason in enumerate(asked.stop_reasons)
        if reason == "end_of_turn" and lengths[i] > 1
    ][: config.batch]
    questions += [opening + closing] * (config.batch - len(questions))  # one shape for every part
    kept = sum(len(q) > len(opening) + len(closing) for q in questions)
    greedy = config.answer_temperature == 0
    answered = generate(
        model, params, pad(questions, bucket=len(opening) + config.user_tokens + len(closing)),
        recipe=recipes.ar(temperature=config.answer_temperature),
        max_new_tokens=config.answer_tokens, key=None if greedy else answer,
    )  # fmt: skip
    tokens, lengths = np.asarray(answered.tokens), np.asarray(answered.lengths)
    rows = [questions[i] + tokens[i, : lengths[i]].tolist() for i in range(kept)]
    return rows, [len(questions[i]) for i in range(kept)]


if __name__ == "__main__":
    config = tyro.cli(Distill, description=__doc__)
    distributed.initialize()
    main(config)
