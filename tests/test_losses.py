"""The joint loss against a slow definition, its gradient, and the figures beside it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dllm_jax.corruption import MaskedBlocks
from dllm_jax.losses import DualStream
from dllm_jax.nn.head import logits_of
from dllm_jax.testing import tiny
from pallas_kernels import BlockMask

MODEL, PARAMS = tiny(vocab_size=4, seed=5)  # so few tokens that some drafts are right
L, T, G = 14, 4, 7
# Seven places to start from, seven blocks, and 4 and 7 share no factor: each place is drawn once,
# so that a row's blocks, in order, are a dual stream of stride 1.
PROMPTS = np.array([2, 4])
LENGTHS = PROMPTS + G + 1
# Every token twice: a row of masks draws much the same token everywhere.
TOKENS = np.repeat(np.random.default_rng(2).integers(0, 4, (2, L // 2)), 2, axis=1).astype(np.int32)
BATCH = {
    "tokens": jnp.asarray(TOKENS),
    "lengths": jnp.asarray(LENGTHS),
    "prompts": jnp.asarray(PROMPTS),
}
KEY = jax.random.key(4)
NOISE = MaskedBlocks(block_size=T, blocks=G, whole=0.6, decay=0.7)
OBJECTIVE = DualStream(noise=NOISE, ar_weight=0.5)
TRAINED = {name: PARAMS[name] for name in ("adapter", "layers")}


class Parts(NamedTuple):
    loss: jax.Array
    figures: dict
    noisy_grad: dict
    ar_grad: dict


@jax.jit
def parts(trained) -> Parts:
    """The loss, its figures, and the gradients of its two parts."""

    def loss(trained):
        total, figures = OBJECTIVE.loss(MODEL, {**PARAMS, **trained}, BATCH, KEY)
        return (figures["diffusion"], figures["ar"]), (total, figures)

    _, pull, (total, figures) = jax.vjp(loss, trained, has_aux=True)
    one, zero = jnp.ones(()), jnp.zeros(())
    return Parts(total, figures, pull((one, zero))[0], pull((zero, one))[0])


class Row(NamedTuple):
    """A row's noisy blocks by their starts [G, T, ...], and its clean logits [L, V]."""

    tokens: np.ndarray
    targets: np.ndarray
    weights: np.ndarray
    whole: np.ndarray
    times: np.ndarray
    logits: np.ndarray
    clean: np.ndarray


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    """One forward pass a row, [clean ; noisy], no cache."""
    noisy = NOISE.draw(KEY, *BATCH.values(), MODEL.config.mask_id)

    def one_pass(tokens, positions, lengths, mask):
        out = MODEL.apply(
            {"params": PARAMS}, tokens, mask=mask, positions=positions, lengths=lengths
        )
        return logits_of(MODEL, PARAMS, out.hidden)

    one_pass = jax.jit(one_pass, static_argnames="mask")
    found = []
    for row, prompt in enumerate(PROMPTS):
        blocks = type(noisy)(*(np.asarray(x[row]).reshape(G, T) for x in noisy))
        order = np.argsort(blocks.prefix[:, 0])
        blocks = type(noisy)(*(x[order] for x in blocks))
        np.testing.assert_array_equal(blocks.prefix[:, 0], prompt + np.arange(G))
        logits = one_pass(
            jnp.concatenate([TOKENS[row], blocks.tokens.ravel()])[None],
            jnp.concatenate([np.arange(L), blocks.positions.ravel()])[None],
            BATCH["lengths"][row : row + 1],
            BlockMask.dual_stream(L, T, stride=1, offset=int(prompt)),
        )[0]
        found.append(
            Row(
                blocks.tokens, blocks.targets, blocks.weights, blocks.whole, blocks.times,
                np.asarray(logits[L:]).reshape(G, T, -1), np.asarray(logits[:L]),
            )
        )  # fmt: skip
    return found


def nats(logits: np.ndarray, target: int) -> float:
    """Minus the log of a token's share, in float64."""
    e = np.exp(logits.astype(np.float64) - logits.max())
    return -np.log(e[target] / e.sum())


def test_the_loss_is_its_definition(rows):
    total = weight = 0.0
    levels = [[] for _ in range(4)]
    for row in rows:
        for block in range(G):
            for place in range(T):
                cost = nats(row.logits[block, place], row.targets[block, place])
                total += row.weights[block, place] * cost
                weight += row.weights[block, place]
                if row.weights[block, place]:
                    share = 1.0 if row.whole[block, place] else row.times[block, place]
                    levels[min(int(4 * share), 3)].append(cost)
    diffusion = total / weight
    causal = [
        nats(row.clean[i - 1], TOKENS[r, i])
        for r, row in enumerate(rows)
        for i in range(PROMPTS[r], LENGTHS[r])
    ]
    found = parts(TRAINED)
    np.testing.assert_allclose(found.figures["diffusion"], diffusion, rtol=1e-5)
    np.testing.assert_allclose(found.figures["ar"], np.mean(causal), rtol=1e-5)
    np.testing.assert_allclose(found.loss, diffusion + 0.5 * np.mean(causal), rtol=1e-5)
    assert found.figures["tokens"] == len(causal)
    assert sum(map(bool, levels)) > 1
    for i, each in enumerate(levels):
        expected = np.mean(each) if each else np.nan
        np.testing.assert_allclose(found.figures[f"level_{i}"], expected, rtol=1e-5)


def test_accuracy_and_accepted_are_counts_over_whole_blocks(rows):
    right, counted, prefix = np.zeros(T), np.zeros(T), np.zeros(T)
    for row in rows:
        for block in np.flatnonzero(row.whole[:, 0]):
            so_far = True
            for place in range(T):
                if row.weights[block, place] == 0:
                    break  # behind the end of the text
                hit = row.logits[block, place].argmax() == row.targets[block, place]
                so_far = so_far and hit
                counted[place] += 1
                right[place] += hit
                prefix[place] += so_far
    figures = parts(TRAINED).figures
    assert counted.all()
    assert prefix[1] > 0, "no two drafts in a row are right: the test shows too little"
    for place in range(T):
        np.testing.assert_allclose(figures[f"accuracy_{place}"], right[place] / counted[place])
    np.testing.assert_allclose(figures["accepted"], (prefix / counted).sum(), rtol=1e-6)


@pytest.mark.parametrize(
    "names",
    [
        ("adapter", "mask_embedding"),
        ("adapter", "q", "in"),
        ("adapter", "v", "out"),
        ("adapter", "down", "out"),
        ("layers", "attention", "k"),  # felt through the clean stream's keys as well
        ("layers", "mlp", "up"),
    ],
    ids="/".join,
)
def test_gradients_are_finite_differences(names):
    """At the entry where the gradient of the diffusion loss says that it is steepest."""
    step, here = 0.01, parts(TRAINED)

    def at(tree):
        for name in names:
            tree = tree[name]
        return tree

    index = np.unravel_index(np.abs(at(here.noisy_grad)).argmax(), at(TRAINED).shape)

    def moved(by: float) -> Parts:
        tree = jax.tree.map(lambda x: x, TRAINED)
        inner = tree
        for name in names[:-1]:
            inner = inner[name]
        inner[names[-1]] = inner[names[-1]].at[index].add(by)
        return parts(tree)

    ahead, behind = moved(step), moved(-step)
    for part, gradient in (("diffusion", here.noisy_grad), ("ar", here.ar_grad)):
        slope = (ahead.figures[part] - behind.figures[part]) / (2 * step)
        np.testing.assert_allclose(at(gradient)[index], slope, rtol=0.03, atol=2e-3)
        if part == "diffusion":
            assert abs(slope) > 5e-3, "too flat a place to tell"


def test_the_adapter_has_no_part_in_the_causal_loss():
    found = parts(TRAINED)
    assert not any(leaf.any() for leaf in jax.tree.leaves(found.ar_grad["adapter"]))
    assert all(leaf.any() for leaf in jax.tree.leaves(found.noisy_grad["adapter"]))
    assert all(leaf.any() for leaf in jax.tree.leaves(found.ar_grad["layers"]))


def test_the_parts_of_a_batch_add_up_to_it(rows):
    """Shares of the whole batch's counts: the two rows learn different numbers of tokens."""
    drawn = OBJECTIVE.draw(MODEL, BATCH, KEY)
    score = jax.jit(lambda drawn: OBJECTIVE.score(MODEL, PARAMS, drawn))
    one = [
        score(drawn.with_rows(jax.tree.map(lambda x, i=i: x[i : i + 1], drawn.rows)))
        for i in range(2)
    ]
    found = jax.tree.map(jnp.add, *one)
    expected = parts(TRAINED)
    np.testing.assert_allclose(found[0], expected.loss, rtol=1e-6)
    assert found[1].keys() == expected.figures.keys()
    for name, value in expected.figures.items():
        np.testing.assert_allclose(found[1][name], value, rtol=1e-6, err_msg=name)
    learnt = [float(row.weights.sum()) for row in rows]
    assert learnt[0] != learnt[1]


def test_a_batch_with_nothing_to_learn_costs_nothing():
    batch = {**BATCH, "prompts": BATCH["lengths"]}
    loss, figures = jax.jit(
        lambda b: DualStream(noise=MaskedBlocks(block_size=2, blocks=1)).loss(MODEL, PARAMS, b, KEY)
    )(batch)
    assert loss == 0
    assert np.isnan([figures[name] for name in ("accuracy_0", "accuracy_1", "accepted")]).all()
    assert "ar" not in figures


def test_drafts_are_counted_in_the_parts_that_have_some_and_at_the_places_that_do():
    """Row 0 has an answer of two tokens behind its prompt's last one, row 1 none."""
    batch = {**BATCH, "prompts": BATCH["lengths"] - jnp.array([3, 0])}
    whole = DualStream(noise=MaskedBlocks(block_size=T, blocks=2, whole=1.0))
    drawn = whole.draw(MODEL, batch, KEY)
    score = jax.jit(lambda drawn: whole.score(MODEL, PARAMS, drawn)[1])
    expected = score(drawn)
    ends = [float(expected[f"accuracy_{i}"]) for i in range(T)]
    assert np.isfinite(ends[:2]).all()
    assert np.isnan(ends[2:]).all()
    assert np.isfinite(expected["accepted"])
    one, other = (
        score(drawn.with_rows(jax.tree.map(lambda x, i=i: x[i : i + 1], drawn.rows)))
        for i in range(2)
    )
    assert other["accuracy_0"] == other["accepted"] == 0
    for name, value in expected.items():
        np.testing.assert_allclose(one[name] + other[name], value, rtol=1e-6, err_msg=name)
