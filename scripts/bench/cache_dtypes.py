"""What a cache in bfloat16 or int8 costs a real model: SmolLM2 answers, scored behind each cache.

    python scripts/bench/cache_dtypes.py --out scripts/bench/results/cache-dtypes

The model answers the first prompts of prompts.txt greedily with a float32 cache. Then each cache is
filled with the same prompts and answers, a token at a time, and what it makes the model say of
each answer token is compared with what the float32 cache makes it say: the log-probability of the
token, the Kullback-Leibler divergence, and the most probable token. Last, the model answers with
each cache by itself: the tokens up to the first that is another. Writes <out>.json and <out>.md.
Minutes on two cores.
"""

import dataclasses
import json
import os
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro

import dllm_jax as dj
from dllm_jax.bench.report import commit
from dllm_jax.cache import append
from dllm_jax.nn.head import logits_of
from dllm_jax.nn.transformer import forward

DTYPES = ("float32", "bfloat16", "int8")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What to run."""

    out: Path
    """Where the results go, without a suffix."""
    model: str = "smollm2-135m-instruct"
    prompts: int = 8
    new_tokens: int = 48


def main(options: Options) -> None:
    """Answers and scores, writes the files."""
    model, params = dj.load(options.model)
    tokenizer = dj.Tokenizer.load(options.model)
    texts = (Path(__file__).parent / "prompts.txt").read_text().splitlines()[: options.prompts]
    rows = dj.pad([tokenizer.chat(text) for text in texts])
    ask = partial(
        dj.generate, model, params, rows, recipe=dj.recipes.ar(), max_new_tokens=options.new_tokens
    )
    answers = {dtype: ask(cache_dtype=dtype) for dtype in DTYPES}
    plain = answers["float32"]
    scores = {dtype: np.asarray(said(model, params, rows, plain.tokens, dtype)) for dtype in DTYPES}
    # The first token is the prompt's own, whatever the cache.
    there = np.arange(1, options.new_tokens) < np.asarray(plain.lengths)[:, None]
    report = {
        "model": options.model,
        "prompts": options.prompts,
        "tokens": int(there.sum()),
        "caches": {
            dtype: {
                **compared(scores[dtype], scores["float32"], plain.tokens[:, 1:], there),
                "tokens_before_another": equal(answers[dtype], plain),
            }
            for dtype in DTYPES[1:]
        },
        "answer_tokens": int(plain.lengths.sum()),
        "jax": jax.__version__,
        "cores": os.cpu_count(),
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    options.out.with_suffix(".md").write_text(markdown(report))
    print(markdown(report))


@partial(jax.jit, static_argnames=("model", "dtype"))
def said(model, params, rows, answers, dtype: str) -> jax.Array:
    """Log-probabilities of the token behind each answer token, float32[B, N - 1, V]."""
    width, new = rows.tokens.shape[1], answers.shape[1]
    out = forward(model, params, rows.tokens, lengths=rows.lengths, canvas=False)
    cache = append(model.cache(len(answers), width + new, dtype), out.kv, rows.lengths)

    def step(cache, tokens):
        out = forward(model, params, tokens[:, None], cache=cache, canvas=False)
        scores = jax.nn.log_softmax(logits_of(model, params, out.hidden)[:, 0])
        return append(cache, out.kv, jnp.ones_like(tokens)), scores

    return jnp.moveaxis(jax.lax.scan(step, cache, answers.T[:-1])[1], 0, 1)


def compared(got, want, tokens, there) -> dict[str, float]:
    """Of the tokens that are there: how far apart two caches are."""
    at = np.asarray(tokens)[..., None]
    nats = np.abs(np.take_along_axis(got - want, at, axis=2)[..., 0])[there]
    divergence = (np.exp(want) * (want - got)).sum(axis=-1)[there]
    return {
        "mean": float(nats.mean()),
        "largest": float(nats.max()),
        "divergence": float(divergence.mean()),
        "agreement": float((got.argmax(axis=-1) == want.argmax(axis=-1))[there].mean()),
    }


def equal(answer, plain) -> int:
    """Tokens of all answers before the first that is another."""
    inside = np.arange(plain.tokens.shape[1]) < np.asarray(plain.lengths)[:, None]
    same = (np.asarray(answer.tokens) == np.asarray(plain.tokens)) & inside
    return int(np.cumprod(same, axis=1).sum())


def markdown(report: dict) -> str:
    """The results as a table."""
    lines = [
        f"{report['model']}, float32, {report['prompts']} prompts, {report['tokens']} answer tokens"
        f" behind the first, scored behind a cache of each dtype and compared with float32;"
        f" {report['cores']} CPU cores, jax {report['jax']}, {report['date']}, commit"
        f" {report['commit']}.",
        "",
        "| cache | bytes of float32's | log-probability: mean difference | largest | divergence |"
        " most probable token equal | greedy tokens before another one |",
        "|---|---|---|---|---|---|---|",
    ]
    share = {"bfloat16": "1/2", "int8": "1/4"}
    for dtype, found in report["caches"].items():
        lines.append(
            f"| {dtype} | {share[dtype]} | {found['mean']:.4f} | {found['largest']:.3f} |"
            f" {found['divergence']:.5f} | {found['agreement']:.1%} |"
            f" {found['tokens_before_another']} of {report['answer_tokens']} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
