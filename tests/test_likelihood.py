"""Likelihoods against enumeration: of all texts, all orders, and all noise."""

import dataclasses
import itertools
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dllm_jax import recipes
from dllm_jax.corruption import MaskNoise, MixedNoise, UniformNoise
from dllm_jax.decode.generate import infill, pad
from dllm_jax.likelihood import bound, is_greedy, log_likelihood, score_choices
from dllm_jax.likelihood.bounds import _levels, _stderr, _values
from dllm_jax.nn.head import logits_of
from dllm_jax.nn.transformer import forward
from dllm_jax.policies import ConfidenceThreshold, Quota
from dllm_jax.testing import tiny
from pallas_kernels import BlockMask

MASK = 3  # in a vocabulary of four: there are 81 texts of four tokens


@cache
def model_of(attention: str, alignment: str, block_size: int = 1):
    return tiny(
        vocab_size=4, mask_id=MASK, adapter=False, sharpness=8.0, attention=attention,
        alignment=alignment, block_size=block_size,
    )  # fmt: skip


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    """Buffers of eight positions, not 64: the texts are short."""
    monkeypatch.setattr("dllm_jax.likelihood.texts.BUCKET", 8)
    monkeypatch.setattr("dllm_jax.likelihood.bounds.BUCKET", 8)


CANVAS = model_of("bidirectional", "same_position")
SHIFTED = model_of("bidirectional", "shifted")
BLOCKS = model_of("block_causal", "same_position", 2)
SHIFTED_BLOCKS = model_of("block_causal", "shifted", 4)
CAUSAL = model_of("causal", "shifted")
ADAPTED = tiny(vocab_size=3, sharpness=8.0)  # its mask token is outside the vocabulary
PROMPT = [2, 0, 1]  # blocks of two and four begin in it


def all_texts(length: int, tokens: int = 3) -> list[tuple[int, ...]]:
    return list(itertools.product(range(tokens), repeat=length))


def exactly(pair, prompt, answers, recipe) -> np.ndarray:
    found = log_likelihood(*pair, [prompt] * len(answers), answers, recipe=recipe)
    return np.asarray(found.total, np.float64)


# The exact likelihood


DETERMINISTIC = {
    "ar": (CAUSAL, recipes.ar()),
    "block_diffusion-0.6": (ADAPTED, recipes.block_diffusion(threshold=0.6)),
    "block_diffusion-0": (ADAPTED, recipes.block_diffusion(block_size=3, threshold=0.0)),
    "block_diffusion-1": (CAUSAL, recipes.block_diffusion(threshold=1.0)),
    "llada": (CANVAS, recipes.llada(block_size=0, steps_per_block=3)),
    "llada-guided": (CANVAS, recipes.llada(block_size=2, guidance=0.7)),
    "fast_dllm": (CANVAS, recipes.fast_dllm(cache="none", block_size=3, threshold=0.6)),
    "fast_dllm-factor": (CANVAS, recipes.fast_dllm(cache="none", block_size=3, factor=1.0)),
    "prefix": (CANVAS, recipes.fast_dllm_prefix(block_size=3, threshold=0.6)),
    "dual": (CANVAS, recipes.fast_dllm_dual(block_size=3, threshold=0.6)),
    "dual-factor": (CANVAS, recipes.fast_dllm_dual(block_size=3, factor=1.0)),
    "dream": (SHIFTED, recipes.dream(steps=3)),
    "dream-margin": (SHIFTED, recipes.dream(steps=4, alg="topk_margin")),
    "dream-prefix": (SHIFTED, recipes.dream_cached(cache="prefix", block_size=3, threshold=0.6)),
    "dream-dual": (SHIFTED, recipes.dream_cached(cache="dual", block_size=3, threshold=0.6)),
    "sdar-dynamic": (BLOCKS, recipes.sdar(block_size=2, threshold=0.6)),
    "sdar-static": (BLOCKS, recipes.sdar(block_size=2, order="static")),
    "sdar-sequential": (BLOCKS, recipes.sdar(block_size=2, order="sequential")),
    "sdar-entropy": (BLOCKS, recipes.sdar(block_size=2, order="entropy_bound", bound=0.5)),
    "llada2": (BLOCKS, recipes.llada2(block_size=2, threshold=0.6)),
    "v2": (SHIFTED_BLOCKS, recipes.fast_dllm_v2(block_size=4, sub_block=2, threshold=0.6)),
    "v2-cached": (
        SHIFTED_BLOCKS,
        recipes.fast_dllm_v2(block_size=4, sub_block=2, threshold=0.6, block_cache=True),
    ),
    "d2f": (CANVAS, recipes.d2f(block_size=2, blocks=2, threshold=0.6)),
    "d2f-shifted": (SHIFTED_BLOCKS, recipes.d2f(block_size=2, blocks=3, threshold=0.6)),
}


QUICK = (
    "ar", "block_diffusion-0.6", "llada-guided", "prefix", "dream-dual", "sdar-dynamic",
    "v2-cached",
)  # fmt: skip


def slow_but(quick: tuple[str, ...], names) -> list:
    """All of `names` as parameters; those that are not `quick` compile programs of their own."""
    mark = lambda name: () if name in quick else pytest.mark.slow  # noqa: E731
    return [pytest.param(name, marks=mark(name)) for name in names]


@pytest.mark.parametrize("name", slow_but(QUICK, DETERMINISTIC))
def test_a_recipe_is_a_distribution(name: str):
    """Over all texts of a length, whatever it caches; the last block may reach behind the text."""
    pair, recipe = DETERMINISTIC[name]
    total = exactly(pair, PROMPT, all_texts(4), recipe)
    assert np.exp(total).sum() == pytest.approx(1, abs=1e-5)
    assert total.max() < -0.1, "one text has all the mass: the test shows too little"


GREEDY = ("llada", "sdar-dynamic", "v2", "block_diffusion-0.6")


@pytest.mark.parametrize("name", slow_but(GREEDY[:1], GREEDY))
def test_the_greedy_text_scores_as_it_was_decoded(name: str):
    pair, recipe = DETERMINISTIC[name]
    recipe = dataclasses.replace(recipe, ending="never")
    rows = [[2, 0, 1] + [None] * 5, [1, 2] + [None] * 6]  # whole blocks of two, and of four
    found = infill(*pair, pad(rows, bucket=8), recipe=recipe)
    answers = [np.asarray(found.tokens[r, len(row) - row.count(None) : len(row)]).tolist()
               for r, row in enumerate(rows)]  # fmt: skip
    scored = log_likelihood(*pair, rows, answers, recipe=recipe)
    for r, row in enumerate(rows):
        given = len(row) - row.count(None)
        np.testing.assert_allclose(
            scored.logprobs[r, : row.count(None)], found.logprobs[r, given : len(row)], atol=1e-5
        )
    assert is_greedy(*pair, rows, answers, recipe=recipe).all()
    answers[0][2] = (answers[0][2] + 1) % 3
    assert is_greedy(*pair, rows, answers, recipe=recipe).tolist() == [False, True]


def plainly(model, params, tokens: np.ndarray, mask: BlockMask) -> np.ndarray:
    """The scores of one pass without a cache, float64[B, Q, V]."""
    return np.asarray(_plainly(model, params, jnp.asarray(tokens, jnp.int32), mask), np.float64)


@partial(jax.jit, static_argnums=(0, 3))
def _plainly(model, params, tokens, mask):
    return logits_of(model, params, forward(model, params, tokens, mask=mask).hidden)


@cache
def restored(which: str, prompt: tuple[int, ...], length: int) -> np.ndarray:
    """log p(x_i | the visible ones), float64[subsets, texts, length, V], in plain passes.

    Bit i of a subset's number says that position i of the answer is visible.
    """
    model, params = {"same": CANVAS, "shifted": SHIFTED}[which]
    texts = np.array(all_texts(length))
    visible = (np.arange(2**length)[:, None] >> np.arange(length)) & 1 == 1
    shown = np.where(visible[:, None], texts, MASK).reshape(-1, length)
    tokens = np.concatenate([np.tile(prompt, (len(shown), 1)), shown], axis=1)
    logits = plainly(model, params, tokens, BlockMask.bidirectional(tokens.shape[1]))
    if which == "shifted":
        logits = np.concatenate([logits[:, :1], logits[:, :-1]], axis=1)
    return logits[:, len(prompt) :].reshape(2**length, len(texts), length, 4)


def logprobs_of(logits: np.ndarray, texts: np.ndarray) -> np.ndarray:
    """Of the texts' tokens [X, N], without the mask token."""
    allowed = logits[..., :MASK]
    index = np.broadcast_to(texts, allowed.shape[:-1])[..., None]
    picked = np.take_along_axis(allowed, index, axis=-1)[..., 0]
    return picked - np.log(np.exp(allowed).sum(axis=-1))


def test_llada_is_its_slow_twin():
    """The most confident position in every pass, by a mask token's share as well."""
    logits = restored("same", tuple(PROMPT), 4)
    texts = np.array(all_texts(4))
    expected = np.zeros(len(texts))
    for x, text in enumerate(texts):
        subset, order = 0, []
        while len(order) < 4:
            scores = logits[subset, x]
            sure = np.exp(scores[:, :MASK].max(axis=-1)) / np.exp(scores).sum(axis=-1)
            sure[order] = -1
            order.append(int(sure.argmax()))
            expected[x] += logprobs_of(scores[order[-1]], text[order[-1]])
            subset |= 1 << order[-1]
    got = exactly(CANVAS, PROMPT, all_texts(4), recipes.llada(block_size=0))
    np.testing.assert_allclose(got, expected, atol=1e-4)


def test_a_causal_text_is_the_sum_of_its_log_softmax():
    model, params = tiny()
    rows, answers = [[3, 4, 5], [6]], [[7, 8], [9, 10, 11, 12]]  # texts of five
    found = log_likelihood(model, params, rows, answers, recipe=recipes.ar())
    same = log_likelihood(model, params, rows, answers, recipe=recipes.self_speculative())
    np.testing.assert_array_equal(found.total, same.total)
    for r, (row, answer) in enumerate(zip(rows, answers, strict=True)):
        scores = plainly(model, params, np.array([row + answer]), BlockMask.causal(5))[0]
        scores = jax.nn.log_softmax(scores)
        expected = [float(scores[len(row) + i - 1, t]) for i, t in enumerate(answer)]
        np.testing.assert_allclose(found.logprobs[r, : len(answer)], expected, atol=1e-5)
        assert not found.logprobs[r, len(answer) :].any()


FILLED = [[2, None, 1, None], [0, 1, 1, 2, None, 0, None, None], [1, 1]]
TOKENS = [[0, 1], [2, 2, 0], [0, 1, 0, 2, 1]]


@pytest.mark.parametrize("name", slow_but(("ar",), ("ar", "prefix", "v2-cached")))
def test_a_row_scores_as_alone(name: str):
    pair, recipe = DETERMINISTIC[name]
    rows = [[2], [1, 0, 0, 1, 2, 1], [1, 1]] if name == "ar" else FILLED
    together = log_likelihood(*pair, rows, TOKENS, recipe=recipe)
    for r, (row, answer) in enumerate(zip(rows, TOKENS, strict=True)):
        alone = log_likelihood(*pair, [row], [answer], recipe=recipe)
        np.testing.assert_allclose(together.total[r], alone.total[0], rtol=1e-5)


def test_infilling_is_a_distribution_too():
    pair, recipe = DETERMINISTIC["dual"]
    total = exactly(pair, [2, None, 1, None, None, 0], all_texts(3), recipe)
    assert np.exp(total).sum() == pytest.approx(1, abs=1e-5)


def test_what_has_no_exact_likelihood_is_told_so():
    def refused(message, recipe, pair=CANVAS, rows=([2],), answers=([1],)):
        with pytest.raises(ValueError, match=message):
            log_likelihood(*pair, rows, answers, recipe=recipe)

    plain = recipes.llada()
    refused("FirstHitting picks positions at random", recipes.bd3lm(temperature=0.0))
    refused("Ancestral picks", recipes.bd3lm(sampler="ancestral", temperature=0.0))
    refused("Ancestral picks", recipes.dream(alg="origin"))
    refused("ReMDM picks", recipes.remdm(temperature=0.0))
    refused("Quota picks positions at random", recipes.llada(remasking="random"))
    quota = ConfidenceThreshold(0.9, Quota(4, "random"))
    refused("Quota picks positions at random", dataclasses.replace(plain, commit=quota))
    noisy = recipes.dream(alg_temp=0.1)
    refused("TimeGrid picks positions at random", noisy)
    refused("Quota picks positions at random", recipes.llada(remasking="random", distrust=(1,)))
    refused("Replace changes tokens", recipes.llada2_edit())
    refused("temperature=1.0 draws", recipes.diffusion_gemma())
    renoise = dataclasses.replace(recipes.diffusion_gemma(), sampling=plain.sampling)
    refused("ReNoise writes nothing", renoise)
    refused("temperature=0.5 draws", recipes.llada(temperature=0.5))
    refused("cannot fill in", recipes.ar(), CAUSAL, [[2, None, 1]])
    refused("a token before", recipes.ar(), CAUSAL, [[]])
    refused("causal, shifted model", recipes.ar())
    refused("2 positions to fill, and 1 answer", plain, rows=[[None, None]])
    refused("1 prompts for 2 answers", plain, answers=[[1], [2]])
    refused("at least one token", plain, answers=[[]])
    refused("id 3 cannot be", plain, answers=[[3]])
    refused("exceeds the model's 512", plain, rows=[[1] * 512])


# Bounds


def enumerated(which: str, length: int = 4) -> np.ndarray:
    """The bound of all texts: the mean over all orders of the log-likelihood in that order."""
    texts = np.array(all_texts(length))
    table = logprobs_of(restored(which, tuple(PROMPT), length), texts)  # [subsets, X, N]
    orders = list(itertools.permutations(range(length)))
    total = np.zeros((len(orders), len(texts)))
    for o, order in enumerate(orders):
        subset = 0
        for place in order:
            total[o] += table[subset, :, place]
            subset |= 1 << place
    np.testing.assert_allclose(np.exp(total).sum(axis=1), 1, atol=1e-5)
    return total.mean(axis=0)


def check_estimate(found, expected: np.ndarray) -> None:
    """Within four standard errors, which are about as large as they say."""
    error = (np.asarray(found.mean) - expected) / np.maximum(np.asarray(found.stderr), 1e-6)
    assert np.abs(error).max() < 4
    assert np.median(found.stderr) < 1
    assert 0.3 < np.sqrt((error**2).mean()) < 1.3


ESTIMATES = {
    "exact": ("same", MaskNoise(), "stratified"),
    "shifted": ("shifted", MaskNoise(), "stratified"),
    "antithetic": ("same", MaskNoise(), "antithetic"),
    "independent": ("same", MaskNoise(counts="independent"), "independent"),
    "mixed": ("same", MixedNoise(uniform=0.0), "stratified"),
}


@pytest.mark.parametrize("name", slow_but(("exact",), ESTIMATES))
def test_the_bound_is_the_mean_over_all_orders(name: str):
    which, noise, times = ESTIMATES[name]
    pair = {"same": CANVAS, "shifted": SHIFTED}[which]
    texts = all_texts(4)
    found = bound(
        *pair, [PROMPT] * len(texts), texts, key=jax.random.key(0), noise=noise, times=times,
        samples={"mixed": 128, "independent": 512}.get(name, 64), chunk=16,
    )  # fmt: skip
    check_estimate(found, enumerated(which))


@pytest.mark.slow
def test_the_bound_of_mixed_noise_is_below():
    """A model of masks alone makes little of random tokens: the sum is far below one."""
    texts = all_texts(4)
    found = bound(
        *CANVAS, [PROMPT] * len(texts), texts, key=jax.random.key(0), samples=512, chunk=16,
        noise=MixedNoise(uniform=0.2),
    )  # fmt: skip
    assert 0 < np.exp(np.asarray(found.mean)).sum() < 1


@pytest.mark.parametrize(
    ("which", "name"), [("same", "llada"), ("same", "dual"), ("shifted", "dream")]
)
def test_the_bound_is_below(which: str, name: str):
    """Of exp(bound) there is at most one, so no distribution lies below it on its own average.

    By Jensen, the mean of orders' log-likelihoods is at most the log of q, their mixture, which
    sums to one. For any p then E_p[log p - bound] >= E_p[log p - log q] = KL(p | q) >= 0.
    """
    below = enumerated(which)
    assert 0.5 < np.exp(below).sum() < 1
    pair, recipe = DETERMINISTIC[name]
    exact = exactly(pair, PROMPT, all_texts(4), recipe)
    gap = (np.exp(exact) * (exact - below)).sum()
    assert 0 < gap < 1
    assert (exact < below).any(), "the bound is below on average, not for every text"


@pytest.mark.parametrize("alignment", slow_but(("shifted",), ("shifted", "same_position")))
def test_the_bound_in_blocks_is_the_mean_over_their_orders(alignment: str):
    """Blocks of two, [2 0] [1 .] [. .] [. -]: each in a pass of its own, without a cache."""
    shifted = alignment == "shifted"
    model, params = model_of("block_causal", alignment, 2)
    texts = np.array(all_texts(4))
    whole = np.concatenate([np.tile(PROMPT, (len(texts), 1)), texts], axis=1)
    behind = np.full((len(texts), 1), MASK)  # the last block's second, of which nothing is known

    def nats(begin: int, hidden: tuple[int, ...], place: int) -> np.ndarray:
        """Of the token at `place`, where those of `hidden` in the block from `begin` are masks."""
        tokens = np.concatenate([whole, behind], axis=1)
        tokens[:, list(hidden)] = MASK
        tokens[:, begin + 2 :] = 0  # later blocks are not seen
        logits = plainly(model, params, tokens, BlockMask.block_causal(8, 2))
        return logprobs_of(logits[:, place - shifted], whole[:, place])

    first = nats(4, (4, 5), 4) + nats(4, (5,), 5)
    second = nats(4, (4, 5), 5) + nats(4, (4,), 4)
    expected = nats(2, (3,), 3) + (first + second) / 2 + nats(6, (6,), 6)
    found = bound(
        model, params, [PROMPT] * len(texts), texts.tolist(), key=jax.random.key(1), samples=64,
        noise=MaskNoise(block_size=2),
    )  # fmt: skip
    check_estimate(found, expected)


WHOLE = MaskNoise(block_size=1, counts="independent", beta=1.0)
SINGLE = {
    "causal": (CAUSAL, WHOLE, recipes.ar()),
    "adapted": (ADAPTED, MaskNoise(block_size=1), recipes.ar()),
    "block-causal": (model_of("block_causal", "same_position"), WHOLE, recipes.sdar(block_size=1)),
}


@pytest.mark.parametrize("name", slow_but(("causal",), SINGLE))
def test_blocks_of_one_are_exact(name: str):
    """Of either count, all masked: the autoregressive likelihood, with no variance."""
    pair, noise, recipe = SINGLE[name]
    texts = all_texts(4)
    rows = [PROMPT] * len(texts)
    found = bound(*pair, rows, texts, key=jax.random.key(0), noise=noise, samples=2)
    np.testing.assert_allclose(found.mean, exactly(pair, PROMPT, texts, recipe), atol=1e-4)
    np.testing.assert_allclose(found.stderr, 0, atol=1e-5)


# Uniform noise


UNIFORM = tiny(
    vocab_size=3, mask_id=None, adapter=False, sharpness=4.0, attention="bidirectional",
    alignment="same_position",
)  # fmt: skip


@cache
def predictions(length: int) -> np.ndarray:
    """p(x_i | noisy text), float64[noisy texts, length, V]."""
    noisy = np.array(all_texts(length))
    tokens = np.concatenate([np.tile(PROMPT, (len(noisy), 1)), noisy], axis=1)
    logits = plainly(*UNIFORM, tokens, BlockMask.bidirectional(tokens.shape[1]))
    return np.asarray(jax.nn.softmax(logits[:, len(PROMPT) :]), np.float64)


def chance_of(noisy: np.ndarray, texts: np.ndarray, time: float) -> np.ndarray:
    """q(noisy [Z] | text [X]) at a time, [X, Z]."""
    alpha = 1 - time
    same = (noisy == texts[:, None]).astype(float)
    return (alpha * same + time / 3).prod(axis=-1)


def quadrature(length: int, points: int = 60) -> np.ndarray:
    """The bound of all texts by the score of the noise process, over all noisy texts."""
    texts = np.array(all_texts(length))
    logits = jnp.log(jnp.asarray(predictions(length), jnp.float32))
    score = jax.vmap(UniformNoise().score, (0, 0, 0, None))  # positions
    score = jax.vmap(jax.vmap(score, (0, None, 0, None)), (None, 0, None, None))  # noisy, texts
    score = jax.jit(score)
    nodes, weights = np.polynomial.legendre.leggauss(points)
    total = np.zeros(len(texts))
    for u, w in zip((nodes + 1) / 2, weights / 2, strict=True):
        rates = score(logits, jnp.asarray(texts), jnp.asarray(texts), jnp.float32(u * u))
        chances = chance_of(texts, texts, u * u)
        total += 2 * u * w * (chances * np.asarray(rates, np.float64).sum(axis=-1)).sum(axis=1)
    return total


def discrete(length: int, steps: int) -> np.ndarray:
    """The bound of all texts in discrete time: KL(q(s | t, text) | q(s | t, prediction)), summed.

    Posteriors by Bayes' rule, out of the transition matrices; the last step scores the text.
    """
    texts, eye = np.array(all_texts(length)), np.eye(3)
    total = np.zeros(len(texts))
    for i in range(steps, 0, -1):
        t, s = (i / steps) ** 2, ((i - 1) / steps) ** 2
        kept = (1 - t) / (1 - s)
        step = kept * eye + (1 - kept) / 3  # [s, t]
        until = (1 - s) * eye + s / 3  # [0, s]
        joint = until[:, :, None] * step  # [0, s, t]
        post = joint / joint.sum(axis=1, keepdims=True)
        target = np.moveaxis(post[:, :, texts], 1, -1)[texts.T]  # [N, X, Z, N, s]
        target = np.stack([target[n, :, :, n] for n in range(length)], axis=2)  # [X, Z, N, s]
        # The model's posterior is q(s | t, prediction): the mixture of clean tokens at time 0,
        # p(s | t) ~ (sum over x of p[x] q(s | x)) q(t | s).
        mixed = np.einsum("znx,xs,szn->zns", predictions(length), until, step[:, texts])
        mixed /= mixed.sum(axis=-1, keepdims=True)
        ratio = np.log(np.where(target > 0, target, 1)) - np.log(mixed)[None]
        divergence = np.where(target > 0, target * ratio, 0).sum(axis=(-1, -2))
        total -= (chance_of(texts, texts, t) * divergence).sum(axis=1)
    return total


def test_uniform_noise_is_the_limit_of_small_steps():
    continuous = quadrature(2)
    coarse, fine = (np.abs(discrete(2, steps) - continuous).max() for steps in (100, 400))
    assert fine < 0.02
    assert fine < coarse / 3


def test_uniform_noise_is_estimated_and_below():
    texts = all_texts(3)
    expected = quadrature(3)
    assert 0.05 < np.exp(expected).sum() < 1
    found = bound(
        *UNIFORM, [PROMPT] * len(texts), texts, key=jax.random.key(3), samples=512, chunk=64
    )
    check_estimate(found, expected)


@pytest.mark.slow
def test_uniform_noise_in_blocks():
    """A block's canvas behind causal text, as DiffusionGemma's; here against a canvas alone."""
    causal = tiny(
        vocab_size=3, mask_id=None, adapter=False, sharpness=4.0, alignment="same_position"
    )
    texts = all_texts(2)
    estimate = partial(bound, *causal, key=jax.random.key(3), samples=256, chunk=64)
    one = estimate([PROMPT] * 9, texts, noise=UniformNoise(block_size=2))
    assert np.exp(np.asarray(one.mean) - 3 * np.asarray(one.stderr)).sum() < 1
    # Two blocks of one: the second's canvas sees the first one clean.
    two = estimate([PROMPT] * 9, texts, noise=UniformNoise(block_size=1))
    first = estimate([PROMPT] * 9, [t[:1] for t in texts], noise=UniformNoise(block_size=1))
    second = estimate(
        [[*PROMPT, t[0]] for t in texts], [t[1:] for t in texts], noise=UniformNoise(block_size=1)
    )
    error = np.hypot(np.hypot(two.stderr, first.stderr), second.stderr)
    assert (np.abs(two.mean - first.mean - second.mean) < 4 * error).all()


# Laws of the estimate


def test_an_error_leaves_out_what_strata_take_away():
    """Of values that are their level, to a tenth: it is of that tenth, and the spread of levels."""
    count, rows, noise = 32, 500, 0.1
    keys = jax.random.split(jax.random.key(0), rows)
    levels = partial(_levels, "stratified", keys, samples=count, blocks=1)
    levels = np.stack([levels(jnp.full(rows, s))[:, 0] for s in range(count)])
    np.testing.assert_array_equal(np.sort((levels * count).astype(int), axis=0)[:, 0], range(count))
    values = levels + np.random.default_rng(0).normal(scale=noise, size=levels.shape)
    squared = {
        x: np.square(_stderr(jnp.asarray(values), x)).mean() for x in ("stratified", "independent")
    }
    error = values.mean(axis=0) - 0.5
    assert 0.9 < squared["stratified"] / error.var() < 1.5
    assert squared["independent"] / error.var() > 8


PAIRS = {"canvas": CANVAS, "blocks": BLOCKS, "uniform": UNIFORM}


@pytest.mark.parametrize("which", slow_but(("blocks",), PAIRS))
def test_neither_neighbours_nor_chunks_change_an_estimate(which: str):
    keys = jax.random.split(jax.random.key(7), 3)
    estimate = partial(bound, *PAIRS[which], samples=12)
    together = estimate(FILLED, TOKENS, key=keys, chunk=12)
    for r in range(3):
        alone = estimate(FILLED[r : r + 1], TOKENS[r : r + 1], key=keys[r : r + 1], chunk=5)
        np.testing.assert_allclose(together.mean[r], alone.mean[0], rtol=1e-5)
        np.testing.assert_allclose(together.stderr[r], alone.stderr[0], rtol=1e-4, atol=1e-6)


def test_numbers_and_lengths_of_a_bucket_share_a_program():
    _values.clear_cache()
    estimate = partial(bound, *ADAPTED, samples=4)
    for beta, row in ((0.0, [2]), (0.25, [2, 0, 1]), (0.5, [1] * 6)):
        noise = MaskNoise(block_size=1, counts="independent", beta=beta, omega=0.75)
        estimate([row], [[1, 2]], key=jax.random.key(0), noise=noise)
    assert _values._cache_size() == 1


def test_bad_bounds_are_told_so():
    def refused(message, pair=CANVAS, **options):
        with pytest.raises(ValueError, match=message):
            bound(*pair, [[2]], [[1]], **{"key": jax.random.key(0), **options})

    refused("must be even", samples=3, times="antithetic")
    refused("none of stratified", times="random")
    refused("at least 1", samples=0)
    refused("restores the whole text", noise=MaskNoise(block_size=2))
    refused("restores the whole text", CAUSAL, noise=MaskNoise())
    refused("is not for this model", noise=UniformNoise())
    refused("is not for this model", UNIFORM, noise=MaskNoise())
    refused("no mask token", tiny(adapter=False), noise=MaskNoise(block_size=2))
    refused("is an objective", noise=MaskNoise(weighting="flat"))
    refused("is an objective", noise=MaskNoise(counts="independent", beta=0.3, omega=0.8))
    refused("old-style", key=jax.random.PRNGKey(0))
    refused("give one key", key=jax.random.split(jax.random.key(0), 2))
    for wrong, message in (
        (dict(counts="some"), "neither exact"),
        (dict(beta=0.5), "independent"),
        (dict(counts="independent", beta=0.5, omega=0.2), "beta <= omega"),
        (dict(block_size=-1), "positive"),
    ):
        with pytest.raises(ValueError, match=message):
            MaskNoise(**wrong)
    with pytest.raises(ValueError, match="positive"):
        UniformNoise(block_size=-1)


# Multiple choice


def test_choices_are_scored_and_normalised():
    prompts, choices = [[2, 0], [1]], [[[1], [0, 2, 1], [2, 2]], [[0, 0, 0, 1], [2]]]
    score = partial(score_choices, *CAUSAL, prompts, choices, batch_size=3)
    plain = score(recipe=recipes.ar())
    for p, answers in enumerate(choices):
        exact = exactly(CAUSAL, prompts[p], answers, recipes.ar())
        np.testing.assert_allclose(plain.scores[p], exact, rtol=1e-5)
        assert plain.best[p] == exact.argmax()
    token = score(recipe=recipes.ar(), normalize="token")
    byte = score(recipe=recipes.ar(), normalize="byte", sizes=[[3, 7, 5], [9, 2]])
    np.testing.assert_allclose(token.scores[0], np.array(plain.scores[0]) / [1, 3, 2], rtol=1e-5)
    np.testing.assert_allclose(byte.scores[1], np.array(plain.scores[1]) / [9, 2], rtol=1e-5)
    single = score(key=jax.random.key(0), noise=MaskNoise(block_size=1), samples=1)
    np.testing.assert_allclose(single.scores[0], plain.scores[0], rtol=1e-4)

    for message, wrong in (
        ("one of them", dict()),
        ("one of them", dict(recipe=recipes.ar(), key=jax.random.key(0))),
        ("needs the `sizes`", dict(recipe=recipes.ar(), normalize="byte")),
        ("none of none", dict(recipe=recipes.ar(), normalize="char")),
    ):
        with pytest.raises(ValueError, match=message):
            score(**wrong)
