"""Objectives against slow references: every noisy text of a tiny vocabulary, one by one."""

import dataclasses
import itertools
import json
from functools import partial
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from dllm_jax.cache import KVCache
from dllm_jax.checkpoint import load
from dllm_jax.corruption import (
    Cosine,
    Linear,
    MaskNoise,
    MixedNoise,
    NoisyText,
    Polynomial,
    UniformNoise,
)
from dllm_jax.losses import (
    Autoregressive,
    Diffusion,
    Distillation,
    DualStream,
    least_variance,
)
from dllm_jax.nn.adapters import AdapterConfig
from dllm_jax.nn.head import logits_of
from dllm_jax.testing import tiny
from pallas_kernels import BlockMask

V, L, T = 5, 6, 2  # ids 0..4 (4 is the mask), tokens of a row, of a block
MASK = V - 1
PROMPTS, LENGTHS = np.array([1, 2]), np.array([5, 6])
TOKENS = np.array([[0, 3, 1, 1, 2, 0], [2, 0, 0, 3, 1, 2]], np.int32)
BATCH = {
    "tokens": jnp.asarray(TOKENS),
    "lengths": jnp.asarray(LENGTHS),
    "prompts": jnp.asarray(PROMPTS),
}


def model_of(attention: str, alignment: str = "same_position", seed: int = 2):
    return tiny(
        vocab_size=V, adapter=False, attention=attention, alignment=alignment, mask_id=MASK,
        block_size=T if attention == "block_causal" else 1, seed=seed, sharpness=5.0,
    )  # fmt: skip


@partial(jax.jit, static_argnums=(0, 3))
def scores(model, params, tokens, mask, positions=None, lengths=None):
    out = model.apply({"params": params}, tokens, mask=mask, positions=positions, lengths=lengths)
    return logits_of(model, params, out.hidden)


def nats_of(logits, token: int, bar: bool = True) -> float:
    """Minus the log-probability of a token; the mask token has none."""
    logits = np.asarray(logits, np.float64)[: MASK if bar else None]
    return float(np.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[token])


def cost(objective, model, params, batch, key):
    """The loss and its figures, compiled: op by op they take longer than the rest of a test."""
    return jax.jit(partial(objective.loss, model))(params, batch, key)


def moved(params, by):
    """Along the parameters themselves: every one has a part in the slope."""
    return jax.tree.map(lambda x: x * (1 + by), params)


def check_slope(loss, reference, params) -> None:
    """A loss (traced) and its slope against a reference (a number) and its differences."""
    value, slope = jax.jit(jax.value_and_grad(lambda by: loss(moved(params, by))))(0.0)
    np.testing.assert_allclose(value, reference(params), rtol=1e-4)
    rise = float(reference(moved(params, 0.01)) - reference(moved(params, -0.01)))
    np.testing.assert_allclose(slope, rise / 0.02, rtol=5e-3, atol=1e-3)
    assert abs(rise) > 1e-3, "a reference that stands still tells nothing"


# What each row's noise can be, and what a row costs then: plainly, one pass a noisy text


def learnt(row: int) -> list[int]:
    return list(range(PROMPTS[row], LENGTHS[row]))


def plain_canvas(model, params, row: int, masked: tuple[int, ...], bar: bool = True):
    """Nats of each masked token of a row, {place: nats}."""
    tokens = TOKENS[row].copy()
    tokens[list(masked)] = MASK
    tokens[LENGTHS[row] :] = MASK
    logits = np.asarray(scores(
        model, params, tokens[None], BlockMask.bidirectional(L), lengths=LENGTHS[row : row + 1]
    ))[0]  # fmt: skip
    shift = model.config.alignment == "shifted"
    return {i: nats_of(logits[max(i - shift, 0)], TOKENS[row, i], bar) for i in masked}


def plain_blocks(model, params, row: int, masked: tuple[int, ...]):
    """The same, of blocks that each see the clean text before them and themselves."""
    found, shift = {}, model.config.alignment == "shifted"
    causal = model.config.attention == "causal"
    start = PROMPTS[row] if causal else 0
    for begin in range(start, LENGTHS[row], T):
        tokens = np.full(begin + T, MASK)
        tokens[: min(begin + T, LENGTHS[row])] = TOKENS[row, : begin + T][: LENGTHS[row]]
        own = [i for i in masked if begin <= i < begin + T]
        tokens[own] = MASK
        tokens[LENGTHS[row] :] = MASK
        # Clean before `begin`; then one noisy group that sees all of it.
        mask = BlockMask.dual_stream(
            begin, T, stride=0, offset=begin, clean_block=1 if causal else T
        )
        logits = np.asarray(scores(model, params, tokens[None], mask))[0]
        found |= {i: nats_of(logits[max(i - shift, 0)], TOKENS[row, i]) for i in own}
    return found


def subsets(places):
    for count in range(len(places) + 1):
        yield from itertools.combinations(places, count)


def expected_by_enumeration(model, params, plain, noise: MaskNoise, divide: str):
    """The mean of the loss over every set of masks, with the exact probability of each."""
    size = noise.block_size or L
    total = 0.0
    own = [len(learnt(row)) for row in range(2)]
    for row in range(2):
        start = 0
        if size < L and model.config.attention == "causal":
            start = PROMPTS[row]
        share = {"tokens": 1 / sum(own), "rows": 1 / (2 * own[row])}[divide]
        for begin in range(start, LENGTHS[row], size):
            places = [i for i in learnt(row) if begin <= i < begin + size]
            for masked in subsets(places):
                if masked:
                    weight = expected_weight(noise, len(places), len(masked))
                    total += share * weight * sum(plain(model, params, row, masked).values())
    return total


def expected_weight(noise: MaskNoise, n: int, k: int) -> float:
    """E[weight; exactly these k of n tokens are masked], by quadrature over the time."""
    if noise.counts == "exact":
        share = 1 / n / len(list(itertools.combinations(range(n), k)))
        return share * (n / k if noise.weighting == "bound" else 1.0)
    t = (np.arange(20_000) + 0.5) / 20_000
    p = {
        Linear(): t, Cosine(): np.cos(np.pi / 2 * (1 - t)), Polynomial(2.0): t**2,
    }[noise.schedule]  # fmt: skip
    grows = {
        Linear(): np.ones_like(t), Cosine(): np.pi / 2 * np.sin(np.pi / 2 * (1 - t)),
        Polynomial(2.0): 2 * t,
    }[noise.schedule]  # fmt: skip
    p = noise.beta + (noise.omega - noise.beta) * p
    weight = grows / p if noise.weighting == "bound" else 1.0
    return float((p**k * (1 - p) ** (n - k) * weight).mean())


CANVAS = partial(MaskNoise, counts="independent")
BLOCKS = partial(MaskNoise, counts="independent", block_size=T)
CASES = {
    "LLaDA": ("bidirectional", "same_position", CANVAS(), "tokens"),
    "LLaDA, tuned": ("bidirectional", "same_position", CANVAS(beta=1e-3), "rows"),
    "exact counts": ("bidirectional", "same_position", MaskNoise(), "tokens"),
    "Dream": ("bidirectional", "shifted", CANVAS(), "tokens"),
    "MD4, cosine": ("bidirectional", "same_position", CANVAS(schedule=Cosine()), "tokens"),
    "MD4, square": ("bidirectional", "same_position", CANVAS(schedule=Polynomial()), "tokens"),
    "BD3-LM": ("block_causal", "same_position", BLOCKS(beta=0.3, omega=0.8), "tokens"),
    "LLaDA2": (
        "block_causal", "same_position", BLOCKS(beta=0.3, omega=0.8, weighting="flat"), "tokens"
    ),
    "Fast-dLLM v2": ("block_causal", "shifted", BLOCKS(weighting="flat"), "tokens"),
    "joint": ("causal", "shifted", MaskNoise(block_size=T), "tokens"),
    "complements": ("block_causal", "same_position", BLOCKS(beta=0.2, omega=0.8), "tokens"),
}  # fmt: skip


def slow_but(quick: tuple[str, ...]) -> list:
    return [n if n in quick else pytest.param(n, marks=pytest.mark.slow) for n in CASES]


QUICK = ("LLaDA", "MD4, cosine", "Fast-dLLM v2")


@pytest.mark.parametrize("name", slow_but(QUICK))
def test_the_mean_loss_is_that_of_all_noisy_texts(name: str):
    """Value and gradient: over many draws, within four standard errors; the reference is exact."""
    attention, alignment, noise, divide = CASES[name]
    model, params = model_of(attention, alignment)
    plain = plain_canvas if attention == "bidirectional" else plain_blocks
    objective = Diffusion(
        noise=noise, divide=divide, stratified=False, complementary=name == "complements"
    )
    reference = lambda by: expected_by_enumeration(model, moved(params, by), plain, noise, divide)  # noqa: E731
    value, slope = reference(0.0), (reference(0.02) - reference(-0.02)) / 0.04

    @jax.jit
    def draw(keys):
        def one(key):
            loss = lambda by: objective.loss(model, moved(params, by), BATCH, key)[0]  # noqa: E731
            return jax.value_and_grad(loss)(0.0)

        return jax.lax.map(one, keys, batch_size=64)

    count = 1024 if name in QUICK else 8192
    values, slopes = draw(jax.random.split(jax.random.key(1), count))
    for found, expected in ((values, value), (slopes, slope)):
        error = float(found.std()) / count**0.5
        assert abs(float(found.mean()) - float(expected)) < 4 * error + 2e-3 * abs(float(expected))
        assert error < 0.1 * abs(float(expected)), "too noisy to tell"


@pytest.mark.parametrize("folder", ["llada", "bd3lm"])
def test_losses_match_the_published_code(goldens: Path, folder: str):
    model, params = load(goldens / folder)
    case = goldens / f"{folder}_more"
    given = np.load(case / "inputs.npz")
    clean, masked = given["loss_x0"].astype(np.int32), given["loss_mask"]
    time = np.broadcast_to(given["loss_t"], clean.shape).astype(np.float32)
    blocks = folder == "bd3lm"
    objective = Diffusion(
        noise=MaskNoise(block_size=model.config.block_size if blocks else 0, counts="independent"),
        predict_mask=not blocks,
    )
    batch = {
        "tokens": jnp.asarray(clean),
        "lengths": jnp.full(len(clean), clean.shape[1]),
        "prompts": jnp.zeros(len(clean), jnp.int32),
    }
    mask_id = json.loads((case / "case.json").read_text())["mask_id"]
    noisy = NoisyText(
        *(jnp.asarray(x)[:, None] for x in (np.where(masked, mask_id, clean), time, masked / time))
    )
    loss, _ = jax.jit(
        lambda params: objective.score(model, params, objective.given(model, batch, noisy))
    )(params)
    np.testing.assert_allclose(loss, np.load(case / "outputs.npz")["loss"], rtol=1e-5)


def test_autoregressive_is_its_definition():
    model, params = model_of("causal", "shifted")
    places = [(r, i) for r in range(2) for i in learnt(r)]

    def reference(params):
        logits = scores(model, params, TOKENS, BlockMask.causal(L))
        return np.mean([nats_of(logits[r, i - 1], TOKENS[r, i], False) for r, i in places])

    key = jax.random.key(0)
    check_slope(lambda p: Autoregressive().loss(model, p, BATCH, key)[0], reference, params)
    _, figures = cost(Autoregressive(), model, params, BATCH, key)
    assert figures["tokens"] == len(places)


def test_the_joint_loss_is_its_parts():
    model, params = model_of("causal", "shifted")
    noise, key = MaskNoise(block_size=T), jax.random.key(3)
    both, figures = cost(Diffusion(noise=noise, ar_weight=0.5), model, params, BATCH, key)
    alone, _ = cost(Diffusion(noise=noise), model, params, BATCH, key)
    ar, _ = cost(Autoregressive(), model, params, BATCH, key)
    np.testing.assert_allclose(figures["ar"], ar, rtol=1e-5)
    np.testing.assert_allclose(both, alone + 0.5 * ar, rtol=1e-5)

    def slopes(objective):
        return jax.jit(jax.grad(lambda p: objective.loss(model, p, BATCH, key)[0]))(params)

    chex.assert_trees_all_close(
        slopes(Diffusion(noise=noise, ar_weight=0.5)),
        jax.tree.map(
            lambda x, y: x + 0.5 * y, slopes(Diffusion(noise=noise)), slopes(Autoregressive())
        ),
        rtol=1e-4, atol=1e-6,
    )  # fmt: skip


def test_complements_learn_every_token_once():
    model, params = model_of("block_causal", "shifted")
    noise = MaskNoise(block_size=T, counts="independent", weighting="flat")
    objective = Diffusion(noise=noise, complementary=True, divide="learnt")
    drawn = jax.jit(partial(objective.draw, model))(BATCH, jax.random.key(0))
    weights = np.asarray(drawn.rows.noisy.weights)  # [B, 2, Q]
    index = np.asarray(drawn.rows.index)
    for row in range(2):
        there = np.isin(index[row], [i for i in learnt(row) if i > 0])
        np.testing.assert_array_equal(weights[row].sum(axis=0), there)
    loss, figures = cost(objective, model, params, BATCH, jax.random.key(0))
    assert np.isfinite(loss)
    assert figures["tokens"] == sum(len(learnt(row)) for row in range(2))


def test_a_text_and_its_complement_cost_the_mean_of_both():
    model, params = model_of("block_causal")
    plain = Diffusion(noise=BLOCKS(beta=0.2, omega=0.8))
    objective = dataclasses.replace(plain, complementary=True)
    noisy = jax.jit(partial(objective.draw, model))(BATCH, jax.random.key(3)).rows.noisy

    def loss(objective, noisy):
        score = lambda p: objective.score(model, p, objective.given(model, BATCH, noisy))[0]  # noqa: E731
        return jax.jit(jax.value_and_grad(score))(params)

    each = [loss(plain, jax.tree.map(lambda x, i=i: x[:, i : i + 1], noisy)) for i in range(2)]
    mean = jax.tree.map(lambda x, y: (x + y) / 2, *each)
    chex.assert_trees_all_close(loss(objective, noisy), mean, rtol=1e-4, atol=1e-6)
    assert each[0][0] != each[1][0]


def test_confidence_counts_the_entropy_where_the_model_is_right():
    model, params = model_of("bidirectional")
    key, noise = jax.random.key(5), MaskNoise()
    objective = Diffusion(noise=noise, confidence_weight=3.0)
    loss, figures = cost(objective, model, params, BATCH, key)
    plain, _ = cost(Diffusion(noise=noise), model, params, BATCH, key)
    noisy = jax.jit(partial(Diffusion(noise=noise).draw, model))(BATCH, key).rows.noisy
    places = [(r, i) for r in range(2) for i in np.flatnonzero(np.asarray(noisy.weights[r, 0]))]

    def entropy(params) -> float:
        logits = scores(
            model, params, noisy.tokens[:, 0], BlockMask.bidirectional(L), lengths=LENGTHS
        )[..., :MASK]
        right = [at for at in places if logits[at].argmax() == TOKENS[at]]
        assert right
        spread = [scipy.stats.entropy(np.asarray(jax.nn.softmax(logits[at]))) for at in right]
        return sum(spread) / len(places)

    np.testing.assert_allclose(figures["entropy"], entropy(params), rtol=1e-5)
    np.testing.assert_allclose(loss, plain + 3 * entropy(params), rtol=1e-5)

    def added(params):
        loss, figures = objective.loss(model, params, BATCH, key)
        return loss - figures["diffusion"]

    check_slope(added, lambda params: 3 * entropy(params), params)


@pytest.mark.parametrize("focus", [0.5, 2.0])
def test_focus_weighs_a_token_by_how_little_it_is_known(focus: float):
    """Value and gradient, against the definition; the figure is the plain cost."""
    model, params = model_of("bidirectional")
    key, plain = jax.random.key(5), Diffusion(divide="rows")
    objective = dataclasses.replace(plain, focus=focus)
    noisy = jax.jit(partial(plain.draw, model))(BATCH, key).rows.noisy
    shown, weights = np.asarray(noisy.tokens[:, 0]), np.asarray(noisy.weights[:, 0])

    def slow(params):
        logits = scores(model, params, shown, BlockMask.bidirectional(L), lengths=LENGTHS)
        total = 0.0
        for row in range(2):
            for place in np.flatnonzero(weights[row]):
                p = jax.nn.softmax(logits[row, place, :MASK])[TOKENS[row, place]]
                cost = weights[row, place] * (1 - p) ** focus * -jnp.log(p)
                total += cost / len(learnt(row)) / 2
        return total

    fast = jax.jit(jax.value_and_grad(partial(objective.loss, model), has_aux=True))
    (loss, figures), grads = fast(params, BATCH, key)
    expected, slopes = jax.jit(jax.value_and_grad(slow))(params)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), grads, slopes)
    np.testing.assert_allclose(figures["diffusion"], cost(plain, model, params, BATCH, key)[0])


def test_given_tokens_are_neither_noised_nor_learnt():
    model, params = model_of("bidirectional")
    given = np.zeros((2, L), bool)
    given[:, 3] = True
    batch = {**BATCH, "given": jnp.asarray(given)}
    objective = Diffusion(noise=MaskNoise(counts="independent", beta=1.0))
    noisy = jax.jit(partial(objective.draw, model))(batch, jax.random.key(0)).rows.noisy
    np.testing.assert_array_equal(noisy.tokens[:, 0, 3], TOKENS[:, 3])
    assert not np.asarray(noisy.weights)[:, 0, 3].any()
    _, figures = cost(objective, model, params, batch, jax.random.key(0))
    assert figures["tokens"] == sum(len(learnt(row)) for row in range(2)) - 2


@pytest.mark.parametrize(
    ("attention", "noise"),
    [
        ("bidirectional", MaskNoise(counts="independent", beta=1.0)),
        ("bidirectional", MixedNoise(uniform=0.2)),
        ("block_causal", MaskNoise(block_size=T, weighting="flat")),
    ],
)
def test_a_mask_token_in_a_text_is_given(attention: str, noise):
    """It is outside the softmax: its cost would have no lower bound."""
    model, params = model_of(attention)
    batch = {**BATCH, "tokens": BATCH["tokens"].at[:, 3].set(MASK)}
    given = {**batch, "given": jnp.zeros((2, L), bool).at[:, 3].set(True)}
    objective = Diffusion(noise=noise)
    (loss, figures), (expected, same) = (
        cost(objective, model, params, rows, jax.random.key(0)) for rows in (batch, given)
    )
    assert 0 < loss == expected
    assert figures["tokens"] == same["tokens"] == sum(len(learnt(row)) for row in range(2)) - 2
    inside = Diffusion(noise=noise, predict_mask=True) if attention == "block_causal" else None
    if inside is not None:  # LLaDA's softmax has it, and it is learnt like any other
        _, figures = cost(inside, model, params, batch, jax.random.key(0))
        assert figures["tokens"] == sum(len(learnt(row)) for row in range(2))


@pytest.mark.parametrize("attention", ["bidirectional", "block_causal", "causal"])
@pytest.mark.parametrize("alignment", ["same_position", "shifted"])
def test_documents_of_a_row_cost_what_they_cost_alone(attention: str, alignment: str):
    """Two texts of four tokens in one row, and each in a row of its own; all is masked."""
    model, params = model_of(attention, alignment)
    size = 0 if attention == "bidirectional" else T
    noise = MaskNoise(block_size=size, counts="independent", beta=1.0, weighting="flat")
    objective = Diffusion(noise=noise, divide="tokens")
    texts = np.random.default_rng(0).integers(0, MASK, (2, 4)).astype(np.int32)
    apart = {
        "tokens": jnp.asarray(texts), "lengths": jnp.full(2, 4), "prompts": jnp.zeros(2, jnp.int32),
        "segments": jnp.zeros((2, 4), jnp.int32),
    }  # fmt: skip
    together = {
        "tokens": jnp.asarray(texts.reshape(1, 8)), "lengths": jnp.array([8]),
        "prompts": jnp.zeros(1, jnp.int32), "segments": jnp.array([[0] * 4 + [1] * 4]),
    }  # fmt: skip
    both, _ = cost(objective, model, params, together, jax.random.key(0))
    each, _ = cost(objective, model, params, apart, jax.random.key(0))
    np.testing.assert_allclose(both, each, rtol=1e-5)
    if attention == "block_causal" and alignment == "same_position":  # without documents too
        del apart["segments"]
        plain, _ = cost(objective, model, params, apart, jax.random.key(0))
        np.testing.assert_allclose(plain, each, rtol=1e-5)
    if attention == "causal":
        for ar in (Autoregressive(), dataclasses.replace(objective, ar_weight=1.0)):
            both, _ = cost(ar, model, params, together, jax.random.key(0))
            each, _ = cost(ar, model, params, apart, jax.random.key(0))
            np.testing.assert_allclose(both, each, rtol=1e-5)


@pytest.mark.parametrize("attention", ["block_causal", "causal"])
@pytest.mark.parametrize("alignment", ["same_position", "shifted"])
def test_several_noisy_texts_of_packed_documents_share_a_clean_one(attention: str, alignment: str):
    """Three samples of each token: together, apart, and apart without the segments."""
    model, params = model_of(attention, alignment)
    objective = Diffusion(noise=MaskNoise(block_size=T), divide="tokens")
    rng = np.random.default_rng(0)
    texts = rng.integers(0, MASK, (2, 4)).astype(np.int32)
    masks = rng.random((2, 3, 4)) < 0.6
    weights = masks * rng.random((2, 3, 4), np.float32)
    if alignment == "shifted":  # nothing predicts a document's first token
        weights[..., 0] = 0
    shown = np.where(masks, MASK, texts[:, None])
    noisy = NoisyText(shown, rng.random((2, 3, 4), np.float32), weights)
    apart = {
        "tokens": texts, "lengths": np.full(2, 4), "prompts": np.zeros(2, np.int32),
        "segments": np.zeros((2, 4), np.int32),
    }  # fmt: skip
    together = {
        "tokens": texts.reshape(1, 8), "lengths": np.array([8]), "prompts": np.zeros(1, np.int32),
        "segments": np.array([[0] * 4 + [1] * 4]),
    }  # fmt: skip
    beside = NoisyText(*(np.moveaxis(x, 0, 1).reshape(1, 3, 8) for x in noisy))
    plain = {name: x for name, x in apart.items() if name != "segments"}

    @jax.jit
    def run(params, batch, noisy):
        return objective.score(model, params, objective.given(model, batch, noisy))[0]

    wanted, slopes = jax.value_and_grad(run)(params, *jax.tree.map(jnp.asarray, (apart, noisy)))
    for each in ((together, beside), (plain, noisy)):
        found, own = jax.value_and_grad(run)(params, *jax.tree.map(jnp.asarray, each))
        np.testing.assert_allclose(found, wanted, rtol=1e-5)
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-6), own, slopes)


def test_a_noise_level_that_no_entry_has_is_no_number():
    """Levels 1 and 3 alone, each in one row: a part without a level adds nothing to its mean."""
    objective, (model, params) = Diffusion(), model_of("bidirectional")
    text = NoisyText(
        jnp.full((2, 1, L), MASK), jnp.array([[[0.3] * L], [[0.8] * L]]),
        jnp.asarray(np.isin(np.arange(L), (2, 3)), jnp.float32) * jnp.ones((2, 1, 1)),
    )  # fmt: skip
    drawn = objective.given(model, BATCH, text)
    score = jax.jit(lambda drawn: objective.score(model, params, drawn)[1])
    found = score(drawn)
    assert [bool(np.isnan(found[f"level_{i}"])) for i in range(4)] == [True, False, True, False]
    parts = [
        score(drawn.with_rows(jax.tree.map(lambda x, i=i: x[i : i + 1], drawn.rows)))
        for i in range(2)
    ]
    assert (parts[0]["level_3"], parts[1]["level_1"]) == (0, 0)
    for i in (1, 3):
        total = parts[0][f"level_{i}"] + parts[1][f"level_{i}"]
        np.testing.assert_allclose(total, found[f"level_{i}"], rtol=1e-6)


@pytest.mark.parametrize(
    "objective",
    [
        Autoregressive(),
        Diffusion(),
        Diffusion(noise=MaskNoise(block_size=T), confidence_weight=1.0),
        Diffusion(focus=0.5),
    ],
    ids=["ar", "masked", "confident", "focused"],
)
def test_a_batch_with_nothing_to_learn_costs_nothing_and_has_no_accuracy(objective):
    causal = isinstance(objective, Autoregressive) or bool(objective.noise.block_size)
    kind = ("causal", "shifted") if causal else ("bidirectional",)
    model, params = model_of(*kind)
    empty = {**BATCH, "prompts": BATCH["lengths"]}
    run = jax.jit(jax.value_and_grad(partial(objective.loss, model), has_aux=True))
    (loss, figures), grads = run(params, empty, jax.random.key(0))
    assert loss == 0
    assert np.isnan(figures["accuracy"])
    assert all(bool((x == 0).all()) for x in jax.tree.leaves(grads))


def test_noise_levels_are_spread_over_a_batch():
    model, _ = model_of("block_causal")
    noise = MaskNoise(block_size=T, counts="independent")
    wide = {
        "tokens": jnp.zeros((8, L), jnp.int32), "lengths": jnp.full(8, L),
        "prompts": jnp.zeros(8, jnp.int32),
    }  # fmt: skip
    drawn = jax.jit(partial(Diffusion(noise=noise).draw, model))(wide, jax.random.key(0))
    times = np.sort(np.asarray(drawn.rows.noisy.times)[:, 0, ::T].ravel())
    np.testing.assert_array_equal(np.floor(times * 24), np.arange(24))


@pytest.mark.parametrize("alignment", ["same_position", "shifted"])
def test_distillation_is_its_definition(alignment: str):
    """Each row plainly: the teacher reads all, a block of the student what is before and itself."""
    student, params = tiny(
        vocab_size=V, adapter=AdapterConfig(rank=2, gated=False), attention="bidirectional",
        alignment=alignment, mask_id=MASK, sharpness=5.0,
    )  # fmt: skip
    model = dataclasses.replace(student.config, adapter=None).build()
    objective = Distillation(block_size=T, low=0.5, high=0.9)
    key = jax.random.key(1)
    loss, figures = cost(objective, student, params, BATCH, key)
    rows = jax.jit(partial(objective.draw, student))(BATCH, key).rows
    shift = alignment == "shifted"

    def reference(moved) -> float:
        """The student's parameters move; the teacher's are those that it has."""
        total, masks, nats = 0.0, 0, [[] for _ in range(4)]
        for row in range(2):
            shown, prompt, length = np.asarray(rows.noisy[row]), PROMPTS[row], LENGTHS[row]
            told = scores(
                model, params, shown[None], BlockMask.bidirectional(L), lengths=LENGTHS[[row]]
            )[0]
            # The prompt is a part of its own, and so is each block of the answer.
            part = np.where(np.arange(L) < prompt, 0, (np.arange(L) - prompt) // T + 1)
            own = plainly_in_parts(student, moved, shown[:length], part[:length])
            for place in np.flatnonzero(np.asarray(rows.weights[row])):
                masks += 1
                at = max(place - shift, 0)
                expected = np.asarray(jax.nn.softmax(told[at, :MASK]))
                logs = np.asarray(jax.nn.log_softmax(own[at, :MASK]))
                weight = float(rows.weights[row, place])
                nats[min(int(4 / weight), 3)].append(-(expected * logs).sum())
                total -= weight * (expected * logs).sum()
        assert masks > 3
        if moved is params:
            for i, each in enumerate(nats):
                level = np.mean(each) if each else np.nan
                np.testing.assert_allclose(figures[f"level_{i}"], level, rtol=1e-4)
        return total / masks

    check_slope(lambda p: objective.loss(student, p, BATCH, key)[0], reference, params)
    np.testing.assert_allclose(loss, reference(params), rtol=1e-4)
    assert 0 <= figures["agreement"] <= 1


def plainly_in_parts(model, params, tokens: np.ndarray, part: np.ndarray) -> jax.Array:
    """Scores of a text whose parts see those before them: part by part, each behind a cache."""
    scores, cache = [], None
    for number in range(part.max() + 1):
        own = tokens[part == number]
        if not len(own):
            continue
        out = model.apply(
            {"params": params}, jnp.asarray(own[None]), mask=BlockMask.bidirectional(len(own)),
            cache=cache,
        )  # fmt: skip
        scores.append(logits_of(model, params, out.hidden)[0])
        kv = out.kv if cache is None else jnp.concatenate([cache.kv, out.kv], axis=3)
        cache = KVCache(kv, jnp.array([kv.shape[3]]))
    return jnp.concatenate(scores)


def test_mixed_noise_is_masks_where_nothing_is_random():
    noise = MixedNoise(uniform=0.0)
    logits = jnp.array([0.3, -1.0, 2.0, 0.1, -jnp.inf])
    for time in (0.1, 0.5, 0.9):
        masked = noise.score(logits, jnp.int32(2), jnp.int32(MASK), jnp.float32(time))
        expected = jax.nn.log_softmax(logits)[2] / time
        np.testing.assert_allclose(masked, expected, rtol=1e-4)
        kept = noise.score(logits, jnp.int32(2), jnp.int32(2), jnp.float32(time))
        np.testing.assert_allclose(kept, 0.0, atol=1e-5)


@pytest.mark.parametrize("uniform", [0.2, 0.5])
def test_mixed_noise_is_the_limit_of_small_steps(uniform: float):
    """One token of four and a mask: the exact bound of a chain of 4,000 steps, and the integral."""
    noise = MixedNoise(uniform=uniform)
    logits = jnp.array([0.3, -1.0, 1.0, 0.1, -jnp.inf])
    clean, steps = 2, 4000
    guess = np.asarray(jax.nn.softmax(logits), np.float64)
    times = np.linspace(1e-3, 1 - 1e-3, steps + 1)

    def marginal(t, x):
        stays, masks, random = (float(s) for s in noise.shares(jnp.float32(t)))
        u = np.array([*[random / 4] * 4, masks])
        return stays * x + u, stays, u

    x = np.eye(5)[clean]
    total = 0.0
    for before, after in itertools.pairwise(times):
        q0, a0, u0 = marginal(before, x)
        q1, a1, u1 = marginal(after, x)
        p0, p1 = marginal(before, guess)[0], marginal(after, guess)[0]
        keep = a1 / a0
        jump = u1 - keep * u0  # to each token, from any
        for z in range(5):
            step = keep * np.eye(5)[z] + jump[z]  # P(z | from)
            true, model = q0 * step / q1[z], p0 * step / p1[z]
            there = true > 0
            total += q1[z] * (true[there] * np.log(true[there] / model[there])).sum()

    @jax.jit
    def rate(t):
        stays, masks, random = noise.shares(t)
        each = jnp.where(jnp.arange(5) == MASK, masks, random / 4)
        shown = each + stays * jnp.asarray(x)
        costs = jax.vmap(noise.score, (None, None, 0, None))(
            logits, jnp.int32(clean), jnp.arange(5), t
        )
        return -(shown * costs).sum()

    middles = (times[1:] + times[:-1]) / 2
    integral = float(
        (jax.lax.map(rate, jnp.asarray(middles, jnp.float32))).mean() * (times[-1] - times[0])
    )
    np.testing.assert_allclose(integral, total, rtol=5e-3)


def test_mixed_noise_draws_what_it_says():
    noise, count = MixedNoise(uniform=0.5), 20_000
    config = model_of("bidirectional")[0].config
    shape = (count, 1, 1)
    chance = lambda stream: jax.random.uniform(jax.random.key(stream), shape)  # noqa: E731
    true, false = jnp.ones(shape, bool), jnp.zeros(shape, bool)
    noisy = noise.draw(
        chance, jnp.full((count, 1), 0.3**0.25), jnp.full(shape, 2), true, false, config
    ).tokens
    stays, masks, random = (float(x) for x in noise.shares(jnp.float32(0.3)))
    counts = np.bincount(np.asarray(noisy).ravel(), minlength=V)
    expected = np.array([random / 4, random / 4, random / 4 + stays, random / 4, masks])
    assert scipy.stats.chisquare(counts, count * expected).pvalue > 1e-3


NOISES = {
    "uniform": UniformNoise(), "uniform, flat": UniformNoise(weighting="flat"),
    "mixed": MixedNoise(), "mixed, flat": MixedNoise(weighting="flat"),
}  # fmt: skip


@pytest.mark.parametrize("name", NOISES)
def test_noise_of_tokens_costs_at_every_position(name: str):
    """Entry by entry, the scores (which have tests of their own) of outputs of a plain pass."""
    noise = NOISES[name]
    mask_id = MASK if isinstance(noise, MixedNoise) else None
    model, params = tiny(vocab_size=V, adapter=False, attention="bidirectional", mask_id=mask_id,
                         alignment="same_position", sharpness=5.0)  # fmt: skip
    objective, key = Diffusion(noise=noise), jax.random.key(2)
    noisy = jax.jit(partial(objective.draw, model))(BATCH, key).rows.noisy
    shown, times, weights = (np.asarray(x[:, 0]) for x in noisy)
    places = [(r, i) for r in range(2) for i in learnt(r)]
    flat = noise.weighting == "flat"

    def reference(params) -> float:
        logits = scores(model, params, shown, BlockMask.bidirectional(L), lengths=LENGTHS)
        if mask_id is not None:
            logits = logits.at[..., mask_id].set(-jnp.inf)
        total = 0.0
        for at in places:
            if flat:
                assert weights[at] == 1
                total += nats_of(logits[at], TOKENS[at], mask_id is not None)
            else:
                one = noise.score(logits[at], *(jnp.asarray(x[at]) for x in (TOKENS, shown, times)))
                total -= float(weights[at] * one)
        return total / len(places)

    check_slope(lambda p: objective.loss(model, p, BATCH, key)[0], reference, params)


@pytest.mark.slow
def test_the_interval_of_least_variance_is_found():
    """Against the variances of 200 losses of each interval, drawn with other keys."""
    model, params = model_of("block_causal")
    objective = Diffusion(noise=MaskNoise(block_size=T, counts="independent"), stratified=False)
    intervals = ((0.0, 1.0), (0.45, 0.95), (0.9, 1.0))
    found, variances = least_variance(
        model, params, [BATCH] * 60, objective=objective, key=jax.random.key(0), intervals=intervals
    )
    plain = {}
    for low, high in intervals:
        noise = MaskNoise(block_size=T, counts="independent", beta=low, omega=high)
        own = dataclasses.replace(objective, noise=noise)
        keys = jax.random.split(jax.random.key(9), 200)
        loss = jax.jit(lambda key, own=own: own.loss(model, params, BATCH, key)[0])
        plain[low, high] = np.var(jax.lax.map(loss, keys), ddof=1)
    assert (found.noise.beta, found.noise.omega) == min(plain, key=plain.get)
    assert list(variances) == list(intervals)
    for interval, variance in list(variances.items())[1:]:  # that of [0, 1] is infinite
        assert 0.4 < variance / plain[interval] < 2.5
    with pytest.raises(ValueError, match="independent"):
        least_variance(model, params, [], objective=Diffusion(), key=jax.random.key(0))
    with pytest.raises(ValueError, match="at least two"):
        least_variance(
            model, params, [BATCH], objective=objective, key=jax.random.key(0), intervals=intervals
        )


def test_complements_of_the_bound_are_tuned_about_a_half():
    model, params = model_of("block_causal")
    noise = MaskNoise(block_size=T, counts="independent", beta=0.2, omega=0.8)
    objective = Diffusion(noise=noise, complementary=True)
    tune = partial(least_variance, model, params, [BATCH] * 2, key=jax.random.key(0))
    found, variances = tune(objective=objective)
    assert found.complementary
    assert list(variances) == [(0.2, 0.8), (0.1, 0.9), (0.0, 1.0)]
    with pytest.raises(ValueError, match="no interval to try"):
        tune(objective=objective, intervals=((0.3, 0.8),))


def test_bad_settings_are_told_so():
    for wrong, said in (
        (dict(divide="batch"), "divide"),
        (dict(complementary=True, noise=UniformNoise()), "MaskNoise"),
        (dict(ar_weight=1.0), "block_size"),
        (dict(longest=4), "in blocks"),
        (dict(self_conditioning=0.5), "in blocks"),
        (dict(self_conditioning=2.0), "share"),
        (dict(confidence_weight=-1.0), "negative"),
        (dict(focus=-1.0), "negative"),
        (dict(focus=1.0, noise=MixedNoise()), "MaskNoise"),
        (dict(predict_mask=True, confidence_weight=1.0), "cross-entropy"),
    ):
        with pytest.raises(ValueError, match=said):
            Diffusion(**wrong)
    with pytest.raises(ValueError, match="schedule"):
        MaskNoise(schedule=Cosine())
    with pytest.raises(ValueError, match="weighting"):
        MaskNoise(weighting="none")
    with pytest.raises(ValueError, match="uniform"):
        MixedNoise(uniform=1.0)
    key = jax.random.key(0)
    for pair, noise, said in (
        (model_of("bidirectional"), MaskNoise(block_size=2), "restores the whole text"),
        (model_of("causal"), MaskNoise(), "block after block"),
        (model_of("bidirectional"), UniformNoise(), "is not for this model"),
        (tiny(adapter=False, attention="bidirectional", mask_id=None), MaskNoise(), "not for this"),
        (tiny(adapter=False), MaskNoise(block_size=2), "no mask token"),
    ):
        with pytest.raises(ValueError, match=said):
            Diffusion(noise=noise).loss(*pair, BATCH, key)
    for pair, said in (
        (model_of("causal"), "bidirectional"),
        (model_of("bidirectional"), "adapter"),
    ):
        with pytest.raises(ValueError, match=said):
            Distillation().loss(*pair, BATCH, key)
    blocks, plain = model_of("block_causal"), MaskNoise(block_size=T)
    for objective, said in (
        (Diffusion(noise=plain, ar_weight=1.0), "of a causal model"),
        (Diffusion(noise=MaskNoise(block_size=3)), "must be the same"),
        (Diffusion(noise=plain, complementary=True), "no sample"),
    ):
        with pytest.raises(ValueError, match=said):
            objective.loss(*blocks, BATCH, key)
    for attention in ("bidirectional", "block_causal"):
        with pytest.raises(ValueError, match=f"causal models .*; this one is {attention}"):
            DualStream().loss(*model_of(attention, "shifted"), BATCH, key)
    with pytest.raises(ValueError, match="causal, its outputs same_position"):
        DualStream().loss(*model_of("causal"), BATCH, key)
    outside = tiny(adapter=True, vocab_size=V)
    with pytest.raises(ValueError, match="within the vocabulary"):
        Diffusion(noise=MixedNoise(block_size=2)).loss(*outside, BATCH, key)
    with pytest.raises(ValueError, match="one text a row"):
        DualStream().loss(*outside, {**BATCH, "given": jnp.zeros((2, L), bool)}, key)
    conditioned = Diffusion(noise=MaskNoise(block_size=T), self_conditioning=0.5)
    with pytest.raises(ValueError, match="cannot be told"):
        conditioned.loss(*model_of("causal"), BATCH, key)
