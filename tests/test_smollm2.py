"""The real base model against the published code's answers, and its three modes."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dllm_jax as dj
from dllm_jax.nn.head import logits_of
from dllm_jax.nn.transformer import forward

NAME = "smollm2-135m-instruct"

pytestmark = pytest.mark.usefixtures("optimised")


@pytest.fixture(scope="module")
def base():
    return dj.load(NAME, adapter=None)


@pytest.fixture(scope="module")
def golden(goldens):
    folder = goldens / "smollm2_ar"
    cases = json.loads((folder / "case.json").read_text())["cases"]
    return cases, np.load(folder / "inputs.npz"), np.load(folder / "outputs.npz")


def test_logits_and_log_probabilities(base, golden):
    model, params = base
    cases, inputs, outputs = golden
    scores = jax.jit(
        lambda params, tokens: logits_of(
            model, params, forward(model, params, tokens, canvas=False).hidden
        )
    )
    rows = dj.pad([inputs[name][0].tolist() for name in cases])
    got = np.asarray(scores(params, rows.tokens))
    for row, name in enumerate(cases):
        last = got[row, int(rows.lengths[row]) - 1]
        np.testing.assert_allclose(last, outputs[f"{name}_logits_last"][0], atol=1e-3)
    text = inputs["text"][0]
    logs = np.asarray(jax.nn.log_softmax(scores(params, dj.pad([text.tolist()]).tokens))[0])
    got = logs[np.arange(len(text) - 1), text[1:]]
    np.testing.assert_allclose(got, outputs["text_logprob"], atol=1e-3)


def test_greedy_tokens(base, golden):
    """Chat-templated from text, in one ragged batch."""
    model, params = base
    cases, inputs, outputs = golden
    tokenizer = dj.Tokenizer.load(NAME)
    rows = [tokenizer.chat(case["prompt"]) for case in cases.values()]
    for row, name in zip(rows, cases, strict=True):
        assert row == inputs[name][0].tolist()
    out = dj.generate(model, params, rows, recipe=dj.recipes.ar(), max_new_tokens=48)
    for index, name in enumerate(cases):
        expected = outputs[f"{name}_greedy"][0][len(rows[index]) :]
        answer = np.asarray(out.tokens[index])[: int(out.lengths[index])]
        np.testing.assert_array_equal(answer, expected)


def test_the_adapter_that_ships(base):
    """Speculation gives the tokens of the base model in fewer passes; diffusion writes text."""
    plain_model, plain_params = base
    model, params = dj.load(NAME)
    tokenizer = dj.Tokenizer.load(NAME)
    rows = [tokenizer.chat(p) for p in ("What causes earthquakes?", "Name three primary colors.")]
    plain = dj.generate(plain_model, plain_params, rows, recipe=dj.recipes.ar(), max_new_tokens=32)
    fast = dj.generate(
        model, params, rows, recipe=dj.recipes.self_speculative(width=2), max_new_tokens=32
    )
    np.testing.assert_array_equal(plain.tokens, fast.tokens)
    assert float(fast.lengths.sum() / fast.nfe.sum()) > 1.2
    written = dj.generate(
        model, params, rows, recipe=dj.recipes.block_diffusion(threshold=0.5), max_new_tokens=32
    )
    assert float(written.lengths.sum() / written.nfe.sum()) > 1.0
    for row, length in zip(written.tokens, written.lengths, strict=True):
        text = tokenizer.decode(np.asarray(row)[: int(length)])
        assert len(text.split()) > 5


def test_the_shipped_adapter_leaves_the_causal_mode_bit_equal(base):
    plain_model, plain_params = base
    model, params = dj.load(NAME)
    tokens = jnp.asarray([dj.Tokenizer.load(NAME).chat("Hello!")])
    plain = jax.jit(lambda p, t: forward(plain_model, p, t))(plain_params, tokens)
    gated = jax.jit(lambda p, t: forward(model, p, t))(params, tokens)
    np.testing.assert_array_equal(plain.hidden, gated.hidden)
    np.testing.assert_array_equal(plain.kv, gated.kv)
