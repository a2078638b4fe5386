"""Every recipe on the goldens' weights: as published, and a row of a batch as alone."""

import dataclasses
import itertools
import json
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dllm_jax import checkpoint, policies, recipes
from dllm_jax.decode.generate import generate, infill, run, stream
from dllm_jax.decode.prompt import checked, edge, pad
from dllm_jax.decode.state import result
from dllm_jax.nn.head import logits_of
from dllm_jax.nn.transformer import forward
from dllm_jax.ops.sampling import Sampling, draw_with, keys_at, probabilities
from dllm_jax.testing import tiny
from dllm_jax.testing.replay import replay
from pallas_kernels import BlockMask

LENGTHS = (3, 16, 7, 21, 12)
BUDGET = 27  # no multiple of any block

EDITING = recipes.llada2_edit(block_size=8, threshold=0.2, edit_threshold=0.2)
RECIPES = {
    "ar": ("sdar", recipes.ar()),
    "llada": ("llada", recipes.llada(block_size=16, steps_per_block=8)),
    "llada-whole": ("llada", recipes.llada(block_size=0, steps_per_block=9)),
    "llada-guided": ("llada", recipes.llada(block_size=8, steps_per_block=4, guidance=0.5)),
    "llada-random": ("llada", recipes.llada(block_size=8, remasking="random", temperature=0.7)),
    "llada-moe": ("llada_moe", recipes.llada(block_size=16, steps_per_block=8)),
    "fast_dllm": ("llada", recipes.fast_dllm(cache="none", block_size=16, threshold=0.15)),
    "fast_dllm_prefix": ("llada", recipes.fast_dllm_prefix(block_size=8, threshold=0.15)),
    "fast_dllm_dual": ("llada", recipes.fast_dllm_dual(block_size=8, factor=0.8)),
    "fast_dllm-guided": ("llada", recipes.fast_dllm_dual(block_size=8, guidance=1.0)),
    "dream": ("dream", recipes.dream(steps=12)),
    "dream-origin": ("dream", recipes.dream(steps=12, alg="origin", temperature=0.5)),
    "dream-prefix": ("dream", recipes.dream_cached(cache="prefix", block_size=8, threshold=0.3)),
    "dream-dual": ("dream", recipes.dream_cached(cache="dual", block_size=8, threshold=0.3)),
    "remdm": ("llada", recipes.remdm(steps=12, eta=0.3, schedule="rescale")),
    "remdm-confidence": ("llada", recipes.remdm(steps=12, eta=0.5, by_confidence=True)),
    "bd3lm": ("bd3lm", recipes.bd3lm(block_size=4)),
    "bd3lm-ancestral": ("bd3lm", recipes.bd3lm(block_size=4, sampler="ancestral", steps=6)),
    "sdar": ("sdar", recipes.sdar(block_size=8, threshold=0.2)),
    "sdar-sampled": ("sdar", recipes.sdar(block_size=4, temperature=0.8, top_k=5)),
    "sdar-static": ("sdar", recipes.sdar(block_size=8, order="static", steps_per_block=4)),
    "sdar-sequential": ("sdar", recipes.sdar(block_size=8, order="sequential", steps_per_block=3)),
    "sdar-entropy": ("sdar", recipes.sdar(block_size=8, order="entropy_bound", bound=3.0)),
    "fast_dllm_v2": ("fast_dllm_v2", recipes.fast_dllm_v2(block_size=16, threshold=0.3)),
    "fast_dllm_v2-cached": (
        "fast_dllm_v2", recipes.fast_dllm_v2(block_size=16, sub_block=4, block_cache=True),
    ),
    "d2f": ("d2f", recipes.d2f(block_size=8, blocks=3, add=0.3, complete=0.6, threshold=0.2)),
    "d2f-dream": ("dream", recipes.d2f(block_size=8, blocks=2, threshold=0.2)),
    "llada2": ("llada2", recipes.llada2(block_size=8, threshold=0.2)),
    "llada2_edit": ("llada21", EDITING),
    # Two steps a canvas: on random weights self-conditioning makes rounding 20 times larger a step.
    "diffusion_gemma": (
        "diffusion_gemma", recipes.diffusion_gemma(canvas=16, steps=2, bound=2.0, entropy=4.0),
    ),
}  # fmt: skip


@pytest.fixture(scope="session")
def model_of(goldens):
    loaded = {}

    def load(folder):
        if folder not in loaded:
            loaded[folder] = checkpoint.load(goldens / folder, dtype="float32")
        return loaded[folder]

    return load


def prompts(vocab):
    rng = np.random.default_rng(7)
    return [rng.integers(3, vocab - 10, n).tolist() for n in LENGTHS]


def key_of(recipe):
    return jax.random.split(jax.random.key(3), len(LENGTHS)) if _draws(recipe) else None


def _draws(recipe):
    return recipe.sampling.temperature > 0


# Each takes seconds; these differ from a quick one by a part that has tests of its own.
SIBLINGS = {
    "llada-whole", "fast_dllm_prefix", "dream-prefix", "remdm-confidence", "bd3lm-ancestral",
    "sdar-static", "sdar-sequential", "sdar-entropy", "d2f-dream", "llada-moe",
}  # fmt: skip


@pytest.mark.parametrize(
    "name", [pytest.param(x, marks=[pytest.mark.slow] * (x in SIBLINGS)) for x in RECIPES]
)
def test_a_row_of_a_ragged_batch_decodes_as_alone(name, model_of):
    folder, recipe = RECIPES[name]
    model, params = model_of(folder)
    if folder == "bd3lm":
        model = dataclasses.replace(model.config, max_length=512).build()
    if name == "ar":
        model = dataclasses.replace(model.config, attention="causal", alignment="shifted").build()
    rows, keys = prompts(model.config.vocab_size), key_of(recipe)
    together = generate(model, params, rows, recipe=recipe, max_new_tokens=BUDGET, key=keys)
    assert (together.lengths > 0).all()
    for i, row in enumerate(rows):
        own = None if keys is None else keys[i : i + 1]
        alone = generate(model, params, [row], recipe=recipe, max_new_tokens=BUDGET, key=own)
        for field in ("tokens", "lengths", "stop", "nfe", "queries"):
            np.testing.assert_array_equal(
                getattr(alone, field)[0], getattr(together, field)[i], err_msg=f"row {i}, {field}"
            )
        np.testing.assert_allclose(alone.logprobs[0], together.logprobs[i], atol=1e-3)
    if model.config.mask_id is not None:
        answers = np.asarray(together.tokens)
        assert not (answers == model.config.mask_id).any()


def test_every_named_recipe_is_among_them():
    """The table's names, but for the modes of the shipped adapter, which test_decode.py covers."""
    covered = {name.split("-")[0] for name in RECIPES} | {"dream_cached"}
    assert set(recipes.TABLE) - covered == {"self_speculative", "block_diffusion"}


@pytest.mark.parametrize(
    "name", ["llada", "fast_dllm_dual", "dream-prefix", "remdm", "d2f", "llada2_edit",
             "fast_dllm_v2-cached"],
)  # fmt: skip
def test_stream_ends_where_generate_does(name, model_of):
    folder, recipe = RECIPES[name]
    model, params = model_of(folder)
    rows, keys = prompts(model.config.vocab_size), key_of(recipe)
    whole = generate(model, params, rows, recipe=recipe, max_new_tokens=BUDGET, key=keys)
    states = list(stream(model, params, rows, recipe=recipe, max_new_tokens=BUDGET, key=keys))
    last = result(states[-1], BUDGET)
    for field in ("tokens", "lengths", "stop", "nfe", "queries"):
        np.testing.assert_array_equal(getattr(last, field), getattr(whole, field), err_msg=field)
    for before, after in itertools.pairwise(states):
        served = np.asarray(after.nfe - before.nfe)
        assert served.max() == 1
        assert not (served.astype(bool) & np.asarray(before.finished)).any()
        given = ~np.asarray(before.free)
        np.testing.assert_array_equal(
            np.where(given, before.tokens, 0), np.where(given, after.tokens, 0)
        )
        if recipe.revise is None:  # a step writes, unless its pass was to cache a block
            fewer = np.asarray((before.open & ~after.open).sum(axis=1))
            stored = np.asarray(after.blocks > before.blocks)
            assert ((fewer > 0) | stored | (served == 0)).all()


@pytest.mark.parametrize(("confidence", "threshold"), [("sampled", 0.3), ("model", 0.1)])
def test_the_confidence_of_a_drawn_token(confidence, threshold, model_of):
    """A block in plain Python: what is drawn, how sure it is, and what passes the threshold."""
    model, params = model_of("sdar")
    sampling = Sampling(0.6, 7, 0.9)
    recipe = dataclasses.replace(
        recipes.sdar(block_size=8, threshold=threshold, steps_per_block=8),
        sampling=sampling, confidence=confidence, ending="never",
    )  # fmt: skip
    prompt = prompts(model.config.vocab_size)[1][:8]
    keys = jax.random.split(jax.random.key(5), 1)
    out = generate(model, params, [prompt], recipe=recipe, max_new_tokens=8, key=keys)

    mask, at, step = model.config.mask_id, jnp.arange(8, 16)[None], 0
    tokens = prompt + [mask] * 8
    while mask in tokens:
        hidden = forward(
            model, params, jnp.array([tokens]), mask=BlockMask.block_causal(16, 8)
        ).hidden[:, 8:]
        logits = logits_of(model, params, hidden)
        drawn_from = probabilities(logits.at[..., mask].set(-jnp.inf), sampling)
        noise = keys_at(keys, at, 1, jnp.array([step + 1]))
        drawn = np.asarray(draw_with(noise, drawn_from))[0]
        probs = drawn_from if confidence == "sampled" else jax.nn.softmax(logits)
        sure = np.asarray(probs)[0, np.arange(8), drawn]
        masked = [i for i in range(8) if tokens[8 + i] == mask]
        chosen = [i for i in masked if sure[i] > threshold] or [max(masked, key=lambda i: sure[i])]
        for i in chosen:
            tokens[8 + i] = int(drawn[i])
        step += 1
    assert np.asarray(out.tokens[0, :8]).tolist() == tokens[8:]
    assert int(out.nfe[0]) == step
    assert 1 < step < 8, "the threshold told nothing apart"


INFILL = ("llada", "llada-whole", "fast_dllm_prefix", "fast_dllm_dual", "dream", "dream-dual",
          "sdar", "fast_dllm_v2", "d2f", "llada2_edit")  # fmt: skip


@pytest.mark.parametrize("name", INFILL)
def test_infilling_keeps_what_is_given_and_fills_the_rest(name, model_of):
    folder, recipe = RECIPES[name]
    model, params = model_of(folder)
    rng = np.random.default_rng(11)
    rows = prompts(model.config.vocab_size)
    holes = [[None if rng.random() < 0.5 else token for token in row] for row in rows]
    # Not all of a row: without any text every position is like every other, and rounding decides.
    holes[0], holes[1][:4] = [None, 9, None], [5, None, None, 6]
    out = infill(model, params, holes, recipe=recipe)
    np.testing.assert_array_equal(out.lengths, LENGTHS)
    for i, row in enumerate(holes):
        filled = np.asarray(out.tokens[i, : len(row)]).tolist()
        assert [t for t, h in zip(filled, row, strict=True) if h is not None] == [
            h for h in row if h is not None
        ]
        assert model.config.mask_id not in filled
        alone = infill(model, params, [row], recipe=recipe)
        assert np.asarray(alone.tokens[0, : len(row)]).tolist() == filled
        assert int(alone.nfe[0]) == int(out.nfe[i])


def test_infilling_a_canvas_is_its_slow_twin(model_of):
    """LLaDA's quota over the whole canvas with text on both sides, in plain Python."""
    model, params = model_of("llada")
    row = [7, None, 9, None, None, 30, 31, None, None, 44, None, 60]
    steps = 3
    out = infill(model, params, [row], recipe=recipes.llada(block_size=0, steps_per_block=steps))
    mask = model.config.mask_id
    tokens = [mask if token is None else token for token in row]
    total = tokens.count(mask)
    for step in range(steps):
        hidden = forward(model, params, jnp.array([tokens])).hidden
        probs = np.asarray(jax.nn.softmax(logits_of(model, params, hidden)))[0]
        left = [i for i, token in enumerate(tokens) if token == mask]
        left.sort(key=lambda i: -probs[i].max())
        for i in left[: total // steps + (step < total % steps)]:
            tokens[i] = int(probs[i].argmax())
    assert np.asarray(out.tokens[0, : len(row)]).tolist() == tokens
    assert int(out.nfe[0]) == steps


def test_an_end_of_turn_does_not_end_an_infilled_row():
    model, params = tiny(vocab_size=3, sharpness=8.0, seed=2)
    rows = [[2, 0, 1] + [None] * 5, [1, 2] + [None] * 6]
    out = infill(model, params, rows, recipe=recipes.block_diffusion(threshold=0.6))
    assert (np.asarray(out.tokens)[:, :8] < 3).all()
    assert (np.asarray(out.tokens)[:, 3:7] == 1).any(), "no end-of-turn was drawn"


def test_long_given_text_in_a_sliding_canvas():
    """A hole, more given tokens than the canvas holds, and holes again."""
    model, params = tiny()
    row = [5, 6, None, *range(7, 17), None, None, 20]
    ask = lambda size: infill(  # noqa: E731
        model,
        params,
        [row, [3, None]],
        recipe=recipes.block_diffusion(block_size=size, threshold=1),
    )
    tokens = np.asarray(ask(4).tokens[0, : len(row)]).tolist()
    expected = []
    for token in row:  # at a threshold of 1, the causal mode's own choice at each hole
        if token is None:
            hidden = forward(model, params, jnp.array([expected]), canvas=False).hidden
            token = int(logits_of(model, params, hidden[0, -1]).argmax())
        expected.append(token)
    assert tokens == expected


def test_canvases_of_uniform_noise_begin_afresh(model_of):
    """Neither the step before nor the conditioning of one canvas is felt in the next."""
    model, params = model_of("diffusion_gemma")
    recipe = recipes.diffusion_gemma(canvas=16, steps=5, entropy=1e-9)
    out = generate(
        model, params, [[5, 6, 7]], recipe=recipe, max_new_tokens=40, key=jax.random.key(0)
    )
    assert int(out.nfe[0]) <= 3 * 5
    states = stream(
        model, params, [[5, 6, 7]], recipe=recipe, max_new_tokens=40, key=jax.random.key(0)
    )
    for before, after in itertools.pairwise(states):
        if int(after.start[0]) != int(before.start[0]):
            assert (after.previous == -1).all()
            assert (after.carry == 0).all()


def test_ends_are_forbidden_or_written_last(model_of):
    """LLaDA's two ways against answers that end before they begin, for half of the vocabulary."""
    model, params = model_of("llada")
    row = [*prompts(model.config.vocab_size)[1], *[None] * 16]
    some = tuple(range(128))

    def ask(**options):
        recipe = recipes.llada(block_size=0, **options)
        return np.asarray(infill(model, params, [row], recipe=recipe).tokens[0, 16:32])

    assert (ask() < 128).any()
    assert (ask(forbid=some) >= 128).all()

    mask = model.config.mask_id
    tokens = [mask if token is None else token for token in row]
    while mask in tokens:
        hidden = forward(model, params, jnp.array([tokens])).hidden
        logits = logits_of(model, params, hidden)[0]
        best = np.asarray(logits.argmax(axis=-1))
        trusted = np.asarray(jax.nn.softmax(logits.at[:, :128].set(-jnp.inf)))
        left = [i for i, token in enumerate(tokens) if token == mask]
        most = max(left, key=lambda i: trusted[i, best[i]])
        tokens[most] = int(best[most])
    written = ask(distrust=some)
    assert written.tolist() == tokens[16:]
    assert (written < 128).any()


def test_infilling_can_be_watched(model_of):
    model, params = model_of("llada")
    rows, recipe = [[7, None, 9, None], [5, None]], RECIPES["llada"][1]
    last = list(stream(model, params, rows, recipe=recipe))[-1]
    out = infill(model, params, rows, recipe=recipe)
    np.testing.assert_array_equal(last.tokens[0, :4], out.tokens[0, :4])
    np.testing.assert_array_equal(last.tokens[1, :2], out.tokens[1, :2])


def test_a_prompt_and_its_infilling_are_the_same(model_of):
    """Masks behind a text are what generate puts there."""
    model, params = model_of("llada")
    recipe = RECIPES["fast_dllm_dual"][1]
    row = prompts(model.config.vocab_size)[1]
    given = dataclasses.replace(recipe, ending="never")
    written = generate(model, params, [row], recipe=given, max_new_tokens=16)
    filled = infill(model, params, [[*row, *[None] * 16]], recipe=recipe)
    np.testing.assert_array_equal(filled.tokens[0, len(row) : len(row) + 16], written.tokens[0])


def test_guidance_that_keeps_the_whole_prompt_is_off(model_of):
    model, params = model_of("llada")
    rows, plain = prompts(model.config.vocab_size), RECIPES["llada"][1]
    keep = np.zeros((len(rows), 64), bool)
    for i, row in enumerate(rows):
        keep[i, : len(row)] = True
    guide = lambda keep: dataclasses.replace(  # noqa: E731
        plain, guidance=policies.Guidance(2.0, None if keep is None else jnp.asarray(keep))
    )
    ask = lambda recipe: np.asarray(  # noqa: E731
        generate(model, params, rows, recipe=recipe, max_new_tokens=BUDGET).tokens
    )
    np.testing.assert_array_equal(ask(guide(keep)), ask(plain))
    assert (ask(guide(None)) != ask(plain)).any()


def test_a_forced_row_is_written_and_scored(model_of):
    """The log-probabilities are those of the given tokens, in the order that the recipe takes."""
    model, params = model_of("llada")
    row = prompts(model.config.vocab_size)[2]
    recipe = dataclasses.replace(RECIPES["fast_dllm_prefix"][1], ending="never")
    free = run(model, params, edge(model, pad([row]), recipe, 16, None))
    text = free.tokens[:, : len(row) + 16]
    job = edge(model, checked([[*row, *[None] * 16]], model.config, True), recipe, None, None)
    forced = run(model, params, job, forced=text)
    np.testing.assert_array_equal(forced.tokens[:, : text.shape[1]], text)
    np.testing.assert_allclose(
        forced.logprobs[:, : text.shape[1]], free.logprobs[:, : text.shape[1]], atol=1e-4
    )
    assert (np.asarray(free.logprobs[0, len(row) : len(row) + 16]) < 0).all()


def test_recipes_travel_as_data():
    for name in recipes.TABLE:
        made = recipes.named(name)
        data = json.loads(json.dumps(recipes.to_dict(made)))
        assert recipes.from_dict(data) == made
        assert recipes.named(name, **recipes.options_of(name)) == made
    assert recipes.named("sdar", block_size=8).width.size == 8
    assert recipes.for_family("Dream") == "dream"
    assert recipes.for_family("llama") == "ar"


def test_what_cannot_be_a_recipe_is_told_so():
    def told(message, make):
        with pytest.raises(ValueError, match=message):
            make()

    told("no recipe 'sdr'", lambda: recipes.named("sdr"))
    told("has no option 'width'", lambda: recipes.named("sdar", width=3))
    told("order='best' is none of", lambda: recipes.sdar(order="best"))
    told("no recipe is known for 'gpt2'", lambda: recipes.for_family("gpt2"))
    told("unknown part 'Magic'", lambda: recipes.from_dict({"part": "Magic"}))
    told("no field 'speed'", lambda: recipes.from_dict({"part": "Denoise", "speed": 3}))
    told("must divide the block", lambda: recipes.fast_dllm_v2(block_size=32, sub_block=7))
    told("cache='all' is none of", lambda: recipes.fast_dllm(cache="all"))

    class Mine(NamedTuple):
        def commit(self, view):
            return view.masked

    own = dataclasses.replace(recipes.llada(), commit=Mine())
    told("cannot be written", lambda: recipes.to_dict(own))


def test_recipes_that_do_not_fit_a_model_are_told_so(model_of):
    def told(message, folder, recipe, key=None):
        model, params = model_of(folder)
        with pytest.raises(ValueError, match=message):
            generate(model, params, [[5, 6]], recipe=recipe, max_new_tokens=4, key=key)

    told("for bidirectional models", "sdar", recipes.llada())
    told("an exact cache needs", "llada", recipes.sdar())
    told("shifted", "sdar", recipes.fast_dllm_v2())
    told("causal, shifted model", "llada", recipes.ar())
    told("uniform noise", "llada", recipes.diffusion_gemma(), jax.random.key(0))
    told("needs a key", "llada", recipes.llada(remasking="random"))
    told("TimeGrid.* needs a key", "dream", recipes.dream(alg_temp=0.5))
    told("a pipeline of blocks needs", "llada", dataclasses.replace(recipes.d2f(), cache="none"))
    with pytest.raises(ValueError, match="steps=0"):
        recipes.llada(steps_per_block=0)
    with pytest.raises(ValueError, match="no block is filled"):
        recipes.d2f(add=1.5)
    causal, weights = tiny()
    for recipe in (recipes.sdar(), recipes.d2f(), recipes.fast_dllm_v2()):
        with pytest.raises(ValueError, match=r"block_diffusion|pipeline"):
            generate(causal, weights, [[5, 6]], recipe=recipe, max_new_tokens=4)
    finish = dataclasses.replace(recipes.diffusion_gemma(), finish=None)
    told("needs a `finish`", "diffusion_gemma", finish, jax.random.key(0))
    model, params = model_of("sdar")
    with pytest.raises(ValueError, match="no free position"):
        infill(model, params, [[5, None], [6, 7]], recipe=recipes.sdar())
    with pytest.raises(ValueError, match="use infill"):
        generate(model, params, [[5, None]], recipe=recipes.sdar())
    with pytest.raises(ValueError, match="nothing to fill in"):
        infill(model, params, [[5, 6]], recipe=recipes.sdar())


class Impatient(NamedTuple):
    """Parts of one's own: one that says when a block is done, and one that takes tokens back."""

    steps: int = 3

    def done(self, view):
        return view.steps >= self.steps


class TakesBack(NamedTuple):
    below: float = -0.7  # log-probability when it was written

    def revise(self, view):
        doubted = (view.logprobs < self.below) & (view.commit.step[:, None] < 3)
        return policies.Revision(jnp.zeros_like(doubted), doubted)


@pytest.mark.parametrize("folder", ["llada", "sdar"])
def test_parts_of_ones_own_plug_in(folder, model_of):
    model, params = model_of(folder)
    row = prompts(model.config.vocab_size)[1]  # of 16: blocks of 8 are whole
    base = recipes.llada(block_size=8) if folder == "llada" else recipes.sdar(block_size=8)
    ask = lambda **parts: generate(  # noqa: E731
        model, params, [row], recipe=dataclasses.replace(base, ending="never", **parts),
        max_new_tokens=24,
    )  # fmt: skip
    for parts in ({"finish": Impatient()}, {"max_steps": 3}):
        out = ask(**parts)
        assert int(out.nfe[0]) == 3 * 3
        assert int(out.lengths[0]) == 24
        assert not (out.tokens == model.config.mask_id).any()
    plain, doubting = ask(), ask(revise=TakesBack())
    assert int(doubting.nfe[0]) > int(plain.nfe[0])
    assert int(doubting.lengths[0]) == 24


CASES = {
    "llada": ("c05", "c10", "c12", "c20", "c22", "c24"),
    "llada_more": ("c01",),
    "llada_moe": ("c01",),
    "llada2": ("c01", "c04"),
    "llada21": ("c02",),
    "dream": ("c01", "b10", "b17"),
    "sdar": ("c01", "c03", "c06"),
    "fast_dllm_v2": ("c00", "c02", "c03"),
    "d2f": ("c02", "c05"),
}


@pytest.mark.parametrize("folder", CASES)
def test_published_answers(folder, goldens):
    """Some of each folder's cases; all of them are the slow test below."""
    for case in CASES[folder]:
        lines = list(replay(goldens / folder, only=case))
        assert lines, case
        assert all(line["ok"] for line in lines), lines


@pytest.mark.slow
def test_all_published_answers(goldens):
    lines = [line for folder in sorted(goldens.iterdir()) if folder.is_dir()
             for line in replay(folder)]  # fmt: skip
    assert [line for line in lines if not line["ok"]] == []
    assert sum("case" in line for line in lines) == 89
