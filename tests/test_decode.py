"""The decoding loops against slow twins in plain Python, and their laws."""

import dataclasses
import itertools
import re
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from dllm_jax import recipes
from dllm_jax.decode.generate import Prompt, _generate, generate, pad, stream
from dllm_jax.decode.prompt import checked, edge
from dllm_jax.decode.state import result
from dllm_jax.nn.head import logits_of
from dllm_jax.nn.transformer import forward
from dllm_jax.testing import tiny
from pallas_kernels import BlockMask

MODEL, PARAMS = tiny()
MASK = MODEL.config.mask_id
ROWS = [[3, 4, 5], [6, 7, 8, 9, 10, 11, 12], [2], [20, 21, 9, 5, 3], [13, 14, 15, 16]]
BUDGET = 21


@partial(jax.jit, static_argnames="mask")
def _apply(tokens, positions, lengths, mask):
    out = forward(MODEL, PARAMS, tokens, mask=mask, positions=positions, lengths=lengths)
    return logits_of(MODEL, PARAMS, out.hidden)


def one_pass(clean, noisy=()):
    """Logits of clean tokens, causal, and of noisy ones that see all of them. One pass, no cache.

    The clean part is padded to one size, so that few programs are compiled.
    """
    clean, noisy, room = list(clean), list(noisy), 32 + BUDGET
    size = len(clean)
    tokens = jnp.array([clean + [0] * (room - size) + noisy])
    positions = jnp.concatenate([jnp.arange(room), size + jnp.arange(len(noisy))])[None]
    mask = BlockMask.causal(room)
    if noisy:
        mask = BlockMask.dual_stream(room, len(noisy), stride=0, offset=room)
    out = np.asarray(_apply(tokens, positions, jnp.array([size]), mask))[0]
    return out[:size], out[room:]


def twin_ar(row, budget=BUDGET):
    tokens = list(row)
    while len(tokens) < len(row) + budget:
        token = int(one_pass(tokens)[0][-1].argmax())
        tokens.append(token)
        if token in MODEL.config.eos_ids:
            break
    return tokens[len(row) :]


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def twin_diffusion(row, size, threshold, budget=BUDGET):
    """Block diffusion of one row, in whole passes without a cache: the answer, and its passes."""
    eos_ids = MODEL.config.eos_ids
    tokens, ahead, limit, nfe = list(row), [MASK] * size, len(row) + budget, 0
    while True:
        clean, noisy = one_pass(tokens, ahead)
        nfe += 1
        probs = softmax(np.concatenate([clean[-1:], noisy[:-1]]))
        ends = [j for j, token in enumerate(ahead) if token in eos_ids]
        for j in range(min(ends[0] if ends else size, limit - len(tokens))):
            if ahead[j] == MASK and (j == 0 or probs[j].max() > threshold):
                ahead[j] = int(probs[j].argmax())
        while ahead and ahead[0] != MASK and len(tokens) < limit:
            tokens.append(ahead.pop(0))
            if tokens[-1] in eos_ids:
                return tokens[len(row) :], nfe
        if len(tokens) == limit:
            return tokens[len(row) :], nfe
        ahead += [MASK] * (size - len(ahead))


def answers(res):
    return [np.asarray(res.tokens[i, : int(n)]).tolist() for i, n in enumerate(res.lengths)]


@pytest.fixture(scope="module")
def ar_answers():
    return [twin_ar(row) for row in ROWS]


def test_ar_is_its_slow_twin(ar_answers):
    res = generate(MODEL, PARAMS, ROWS, recipe=recipes.ar(), max_new_tokens=BUDGET)
    assert answers(res) == ar_answers
    assert {len(a) for a in ar_answers} != {BUDGET}, "no row met an end: the test shows too little"
    np.testing.assert_array_equal(res.tokens_per_forward, 1.0)
    for row, reason in zip(ar_answers, res.stop_reasons, strict=True):
        assert reason == ("end_of_turn" if row[-1] in MODEL.config.eos_ids else "length")


@pytest.mark.parametrize("width", [1, 3])
def test_speculation_gives_the_tokens_of_ar(ar_answers, width):
    recipe = recipes.self_speculative(width=width)
    res = generate(MODEL, PARAMS, ROWS, recipe=recipe, max_new_tokens=BUDGET)
    assert answers(res) == ar_answers
    assert (res.nfe <= res.lengths).all()
    expected = width + (res.nfe - 1) * (width + 1) ** 2
    np.testing.assert_array_equal(res.queries, expected)


def test_speculation_accepts_what_the_drafter_gets_right():
    """A model that repeats itself is easy to draft for: fewer passes than tokens."""
    model, params = tiny(seed=3)
    res = generate(
        model, params, ROWS, recipe=recipes.self_speculative(width=3), max_new_tokens=BUDGET
    )
    assert (res.tokens_per_forward > 1).any()


@pytest.mark.parametrize(("size", "threshold"), [(4, 0.6), (3, 0.9)])
def test_block_diffusion_is_its_slow_twin(size, threshold):
    recipe = recipes.block_diffusion(block_size=size, threshold=threshold)
    res = generate(MODEL, PARAMS, ROWS, recipe=recipe, max_new_tokens=BUDGET)
    for i, row in enumerate(ROWS):
        expected, nfe = twin_diffusion(row, size, threshold)
        assert answers(res)[i] == expected
        assert int(res.nfe[i]) == nfe


def test_diffusion_at_threshold_one_is_ar(ar_answers):
    recipe = recipes.block_diffusion(block_size=3, threshold=1.0)
    res = generate(MODEL, PARAMS, ROWS, recipe=recipe, max_new_tokens=BUDGET)
    assert answers(res) == ar_answers
    np.testing.assert_array_equal(res.nfe, res.lengths)


@pytest.mark.parametrize(
    "recipe",
    [
        recipes.self_speculative(width=2, temperature=0.7),
        recipes.block_diffusion(block_size=4, temperature=0.7),
    ],
    ids=["speculative", "diffusion"],
)
def test_a_row_of_a_batch_decodes_as_alone_sampled_too(recipe):
    model, params = tiny(sharpness=3.0)
    keys = jax.random.split(jax.random.key(5), len(ROWS))
    together = answers(
        generate(model, params, ROWS, recipe=recipe, max_new_tokens=BUDGET, key=keys)
    )
    for i, row in enumerate(ROWS):
        alone = generate(
            model, params, [row], recipe=recipe, max_new_tokens=BUDGET, key=keys[i : i + 1]
        )
        assert answers(alone)[0] == together[i]


def test_padding_changes_nothing():
    recipe = recipes.block_diffusion(block_size=4)
    plain = generate(MODEL, PARAMS, ROWS, recipe=recipe, max_new_tokens=BUDGET)
    wide = pad(ROWS, bucket=96)
    junk = jnp.where(jnp.arange(96) < wide.lengths[:, None], wide.tokens, 17)
    padded = generate(
        MODEL, PARAMS, Prompt(junk, wide.lengths), recipe=recipe, max_new_tokens=BUDGET
    )
    np.testing.assert_array_equal(plain.tokens, padded.tokens)
    np.testing.assert_array_equal(plain.nfe, padded.nfe)


def test_speculative_samples_follow_the_autoregressive_joint():
    """Chi-square over all continuations of three tokens, in a vocabulary of four."""
    model, params = tiny(vocab_size=4, sharpness=4.0, eos_ids=())
    prompt, rows, rounds = [2, 3, 1], 512, 8
    recipe = recipes.self_speculative(width=2, temperature=1.3)
    counts, accepted = np.zeros((4, 4, 4)), 0
    for round_ in range(rounds):
        res = generate(
            model, params, [prompt] * rows, recipe=recipe, max_new_tokens=3,
            key=jax.random.key(100 + round_),
        )  # fmt: skip
        np.add.at(counts, tuple(np.asarray(res.tokens).T), 1)
        accepted += int((res.nfe < 3).sum())
    joint = np.ones((4, 4, 4))
    for prefix in itertools.chain([()], np.ndindex(4), np.ndindex(4, 4)):
        tokens = jnp.array([prompt + list(prefix)])
        hidden = forward(model, params, tokens, canvas=False).hidden[:, -1]
        logits = logits_of(model, params, hidden)[0]
        joint[prefix] *= softmax(np.asarray(logits) / 1.3).reshape([4] + [1] * (2 - len(prefix)))
    total = rows * rounds
    assert accepted > 0.1 * total, "drafts hardly ever held: the test shows too little"
    assert accepted < 0.95 * total, "drafts nearly always held: the test shows too little"
    assert joint.sum() == pytest.approx(1)
    few = joint * total < 5
    observed = np.append(counts[~few], counts[few].sum())
    expected = np.append(joint[~few], joint[few].sum()) * total
    keep = expected > 0
    expected *= observed[keep].sum() / expected[keep].sum()  # float32's rounding
    assert scipy.stats.chisquare(observed[keep], expected[keep]).pvalue > 1e-3


@pytest.mark.parametrize("more", [{}, {"top_k": 5}, {"top_p": 0.8}], ids=["free", "k", "p"])
def test_speculation_samples_the_tokens_of_ar(more):
    """Drafts change how many passes a sample takes, and nothing of the sample."""
    model, params = tiny(sharpness=3.0)
    ask = partial(generate, model, params, ROWS, max_new_tokens=BUDGET, key=jax.random.key(3))
    alone = ask(recipe=recipes.ar(temperature=0.7, **more))
    drafted = ask(recipe=recipes.self_speculative(width=2, temperature=0.7, **more))
    assert answers(drafted) == answers(alone)
    np.testing.assert_allclose(drafted.logprobs, alone.logprobs, atol=1e-4)
    assert (drafted.nfe < alone.nfe).any()


def test_temperature_zero_with_a_key_is_greedy():
    for greedy in (recipes.self_speculative(width=2), recipes.block_diffusion(block_size=4)):
        plain = generate(MODEL, PARAMS, ROWS, recipe=greedy, max_new_tokens=BUDGET)
        keyed = generate(
            MODEL, PARAMS, ROWS, recipe=greedy, max_new_tokens=BUDGET, key=jax.random.key(0)
        )
        np.testing.assert_array_equal(plain.tokens, keyed.tokens)


def test_one_trace_for_numbers_and_lengths_of_a_bucket():
    _generate.clear_cache()
    runs = ((0.5, [3, 4], 9), (1, [3] * 30, 17), (np.float32(0.9), [5] * 64, 64))
    for threshold, row, budget in (*runs, (jnp.float32(0.8), [7], 1)):
        recipe = recipes.block_diffusion(block_size=4, threshold=threshold)
        generate(MODEL, PARAMS, [row], recipe=recipe, max_new_tokens=budget)
    assert _generate._cache_size() == 1
    for temperature, top_k in ((0.5, 0), (1.0, 3), (0.0, 0)):
        recipe = recipes.self_speculative(width=2, temperature=temperature, top_k=top_k)
        generate(MODEL, PARAMS, [[3, 4]], recipe=recipe, max_new_tokens=9, key=jax.random.key(1))
    assert _generate._cache_size() == 2


def test_nothing_leaves_the_device_inside_the_loop():
    recipe = recipes.self_speculative(width=2)
    job = edge(MODEL, checked(ROWS, MODEL.config), recipe, BUDGET, None)
    lowered = _generate.lower(
        MODEL, PARAMS, job.prompt, job.recipe, job.budget, job.keys, size=job.size
    )
    text = lowered.compile().as_text()
    assert " while(" in text
    assert not re.search(r"\b(infeed|outfeed|send|recv|send-done|recv-done)\(", text)
    assert not re.search(r"custom_call_target=\"[^\"]*(callback|host)", text)


def test_stream_shows_every_step_and_ends_where_generate_does():
    recipe = recipes.block_diffusion(block_size=4)
    frames = list(stream(MODEL, PARAMS, ROWS, recipe=recipe, max_new_tokens=BUDGET))
    whole = generate(MODEL, PARAMS, ROWS, recipe=recipe, max_new_tokens=BUDGET)
    last = result(frames[-1], BUDGET)
    np.testing.assert_array_equal(last.tokens, whole.tokens)
    assert len(frames) == int(whole.nfe.max())
    prompts = pad(ROWS)
    for before, after in itertools.pairwise(frames):
        kept = np.arange(before.tokens.shape[1]) < np.asarray(before.written)[:, None]
        np.testing.assert_array_equal(
            np.where(kept, before.tokens, 0), np.where(kept, after.tokens, 0)
        )
        given = np.arange(prompts.tokens.shape[1]) < np.asarray(prompts.lengths)[:, None]
        np.testing.assert_array_equal(
            np.where(given, after.tokens[:, : prompts.tokens.shape[1]], 0), prompts.tokens
        )
        # Every running row writes at least one token a step, until it has stopped.
        assert ((after.written > before.written) | before.finished).all()


class Behind(NamedTuple):
    """A policy of one's own: the next `count` positions behind the first, however unsure."""

    count: int = 2

    def commit(self, view):
        return view.masked & (jnp.cumsum(view.masked, axis=-1) <= self.count)


def test_a_policy_of_ones_own_plugs_in():
    recipe = recipes.block_diffusion(block_size=4)
    recipe = dataclasses.replace(recipe, commit=Behind(2))
    res = generate(MODEL, PARAMS, ROWS, recipe=recipe, max_new_tokens=BUDGET)
    np.testing.assert_array_equal(res.nfe, -(-res.lengths // 3))


def test_a_mask_token_of_the_vocabulary_is_never_written():
    model, params = tiny(mask_id=7)
    params["head"] = params["head"].at[7].multiply(4.0)  # the model would love to
    plain = generate(model, params, [[3, 4, 5], [9, 8]], recipe=recipes.ar(), max_new_tokens=9)
    for recipe in (recipes.self_speculative(width=2), recipes.block_diffusion(threshold=1.0)):
        res = generate(model, params, [[3, 4, 5], [9, 8]], recipe=recipe, max_new_tokens=9)
        np.testing.assert_array_equal(res.tokens, plain.tokens)
    assert not (plain.tokens == 7).any()
    with pytest.raises(ValueError, match="not the mask token's"):
        generate(model, params, [[7]], recipe=recipes.ar())


def test_bfloat16_batches_decode():
    model, params = tiny(dtype="bfloat16", param_dtype="bfloat16")
    plain = generate(model, params, ROWS, recipe=recipes.ar(), max_new_tokens=9)
    diffused = generate(
        model, params, ROWS, recipe=recipes.block_diffusion(threshold=0.5), max_new_tokens=9
    )
    assert plain.tokens.shape == diffused.tokens.shape == (len(ROWS), 9)
    assert (diffused.lengths > 0).all()


def test_generate_can_be_jitted():
    recipe = recipes.ar()
    prompt = pad(ROWS)
    run = jax.jit(lambda p: generate(MODEL, PARAMS, p, recipe=recipe, max_new_tokens=BUDGET).tokens)
    plain = generate(MODEL, PARAMS, prompt, recipe=recipe, max_new_tokens=BUDGET)
    np.testing.assert_array_equal(run(prompt), plain.tokens)
    closed = jax.jit(
        lambda p: generate(MODEL, p, prompt, recipe=recipe, max_new_tokens=BUDGET).tokens
    )
    np.testing.assert_array_equal(closed(PARAMS), plain.tokens)


def test_bad_requests_are_told_so():
    def ask(message, recipe=None, rows=ROWS, model=MODEL, **more):
        recipe = recipe or recipes.ar()
        with pytest.raises(ValueError, match=message):
            generate(model, PARAMS, rows, recipe=recipe, **{"max_new_tokens": 4, **more})

    ask("needs a key", recipes.ar(temperature=0.5))
    ask("old-style", key=jax.random.PRNGKey(0))
    ask(r"not \[1, 2, 3\]", rows=[3, 4, 5])
    ask("id 32 cannot be part of a prompt", rows=[[3, 32]])
    ask("id -1 cannot be part of a prompt", rows=[[3, -1]])
    ask("temperature=-1", recipes.ar(temperature=-1), key=jax.random.key(0))
    ask("top_p=0", recipes.ar(top_p=0), key=jax.random.key(0))
    ask("max_new_tokens=0", max_new_tokens=0)
    ask("exceed the model's 512", max_new_tokens=510)
    ask("at least one token", rows=[[1], []])
    ask("give one key, or one for each row", key=jax.random.split(jax.random.key(0), 2))
    ask("between 1 and 64", rows=Prompt(pad([[1]]).tokens, jnp.array([65])))
    plain, _ = tiny(adapter=False, mask_id=None)
    ask("no mask token", recipes.block_diffusion(), model=plain)
    other, _ = tiny(alignment="same_position")
    ask("same_position", recipes.block_diffusion(), model=other)
    bare, _ = tiny(adapter=False)
    ask("no mask token", recipes.block_diffusion(), model=bare)
    with pytest.raises(TypeError, match="is not a recipe"):
        edge(MODEL, pad(ROWS), recipes.ar, 4, None)
    with pytest.raises(ValueError, match="at least 1"):
        recipes.self_speculative(width=0)
    with pytest.raises(ValueError, match="whole number"):
        recipes.ar(top_k=2.5)
    with pytest.raises(ValueError, match="a block of 0"):
        recipes.block_diffusion(block_size=0)
