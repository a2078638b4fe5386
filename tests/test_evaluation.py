"""The harness's requests, as the harness makes them: objects with `args`; lm-eval is not needed."""

import logging
import sys
import types
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors

from dllm_jax import recipes
from dllm_jax.checkpoint import save
from dllm_jax.evaluation import Evaluator, lm_class, register
from dllm_jax.generation_config import save_recipe
from dllm_jax.likelihood import log_likelihood
from dllm_jax.testing import tiny
from dllm_jax.tokenizer import Tokenizer

TEMPLATE = (
    "<s>{% for m in messages %}{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


class Instance(NamedTuple):
    """A request, as far as a model sees it."""

    args: tuple[Any, ...]


def instances(*args: tuple[Any, ...]) -> list[Instance]:
    return [Instance(a) for a in args]


@cache
def tokenizer() -> Tokenizer:
    """Sixteen characters and three specials: every run of ids but those is plain text."""
    pieces = [*"abcdefghinorstu", "Ġ", ":", "<s>", "</s>", "<mask>"]
    backend = tokenizers.Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(p, special=True) for p in ("<s>", "</s>", "<mask>")])
    backend.post_processor = processors.TemplateProcessing(
        single=["<s>", "$A"], special_tokens=[("<s>", 17)]
    )
    return Tokenizer(
        backend=backend, template=TEMPLATE, special={"bos_token": "<s>", "eos_token": "</s>"},
        eos_ids=(18,), pad_id=18,
    )  # fmt: skip


FIELDS: dict[str, Any] = dict(vocab_size=20, mask_id=19, eos_ids=(18,), pad_id=18, adapter=False)
CAUSAL = tiny(**FIELDS, sharpness=6.0)
CANVAS = tiny(**FIELDS, sharpness=6.0, attention="bidirectional", alignment="same_position", seed=1)


def causal(**options) -> Evaluator:
    return Evaluator(*CAUSAL, tokenizer(), recipes.ar(), **{"max_gen_toks": 6, **options})


def canvas(recipe=None, **options) -> Evaluator:
    recipe = recipe or recipes.llada(block_size=0)
    return Evaluator(*CANVAS, tokenizer(), recipe, **{"max_gen_toks": 6, **options})


PAIRS = [("a bad", " dog"), ("", "the"), ("one test ", "said no"), ("sun", " is")]


def test_a_pair_is_cut_out_of_the_whole():
    evaluator, ids = causal(), tokenizer().encode
    assert evaluator.encode_pair("a bad ", "dog") == (ids("a bad"), ids(" dog")[1:])
    assert evaluator.encode_pair("", "dog") == ([17], ids("dog"))
    given, answer = evaluator.encode_pair("a bad", " dog")
    assert given + answer == ids("a bad dog")


def test_likelihoods_are_those_of_the_library_in_any_batch():
    evaluator = causal(batch_size=3)
    found = evaluator.loglikelihood(instances(*PAIRS), disable_tqdm=True)
    one = causal(batch_size=1).loglikelihood(instances(*PAIRS), disable_tqdm=True)
    for pair, (nats, greedy), (same, same_greedy) in zip(PAIRS, found, one, strict=True):
        given, answer = evaluator.encode_pair(*pair)
        expected = log_likelihood(*CAUSAL, [given], [answer], recipe=recipes.ar()).total[0]
        assert nats == pytest.approx(float(expected), rel=1e-4)
        assert same == pytest.approx(nats, rel=1e-4)
        assert greedy == same_greedy
    assert evaluator.loglikelihood(instances(("a", ""))) == [(0.0, True)]


@pytest.mark.parametrize("make", [causal, canvas])
def test_greedy_answers_are_known(make):
    evaluator = make(batch_size=2, max_gen_toks=3)
    contexts = ["a bad dog", "the sun", "is it", "no test", "dust", "ha"]
    wishes = [(c, {"until": [], "do_sample": False}) for c in contexts]
    answers = evaluator.generate_until(instances(*wishes), disable_tqdm=True)
    whole = [(c, a) for c, a in zip(contexts, answers, strict=True) if len(a) == 3]
    assert len(whole) >= 2, "too many answers hold special tokens: the test shows too little"
    greedy = evaluator.loglikelihood(instances(*whole), disable_tqdm=True)
    assert [g for _, g in greedy] == [True] * len(whole)
    other = [(c, ("b" if a[0] == "a" else "a") + a[1:]) for c, a in whole]
    assert not any(g for _, g in evaluator.loglikelihood(instances(*other), disable_tqdm=True))
    evaluator.check_greedy = False
    assert not any(g for _, g in evaluator.loglikelihood(instances(*whole), disable_tqdm=True))


def test_rolling_scores_each_token_once():
    text = "the sun is hot and dust is on the road"
    ids = tokenizer().encode(text)
    evaluator = causal()
    expected = log_likelihood(*CAUSAL, [ids[:1]], [ids[1:]], recipe=recipes.ar()).total[0]
    (whole,) = evaluator.loglikelihood_rolling(instances((text,)), disable_tqdm=True)
    assert whole == pytest.approx(float(expected), rel=1e-4)

    evaluator = causal(max_length=8)
    windows = list(evaluator.windows(ids))
    assert [token for _, answer in windows for token in answer] == ids[1:]
    assert windows[0][0] == ids[:1]
    assert all(len(given) + len(answer) == 8 for given, answer in windows)
    parts = [float(log_likelihood(*CAUSAL, [g], [a], recipe=recipes.ar()).total[0])
             for g, a in windows]  # fmt: skip
    found = evaluator.loglikelihood_rolling(instances((text,), ("",)), disable_tqdm=True)
    assert found == pytest.approx([sum(parts), 0.0], rel=1e-4)


def test_a_text_that_is_too_long_loses_its_start():
    long, short = causal(max_length=12), causal()
    (found,) = long.loglikelihood(instances(("dust is on the road", " and")), disable_tqdm=True)
    given, answer = short.encode_pair("dust is on the road", " and")
    expected = log_likelihood(*CAUSAL, [given[-8:]], [answer], recipe=recipes.ar()).total[0]
    assert found[0] == pytest.approx(float(expected), rel=1e-4)
    with pytest.raises(ValueError, match="leaves no room"):
        long.loglikelihood(instances(("a", " dog is on the road")), disable_tqdm=True)


def test_bounds_do_not_depend_on_the_batch():
    """`auto` takes exact likelihoods where there are any."""
    options = dict(likelihood="bound", samples=16, check_greedy=False)
    found, same = (
        canvas(**options, batch_size=size).loglikelihood(instances(*PAIRS), disable_tqdm=True)
        for size in (4, 3)
    )
    np.testing.assert_allclose([n for n, _ in found], [n for n, _ in same], rtol=1e-4)
    random = canvas(recipes.remdm())
    assert (canvas().exact, random.exact, random.random) == (True, False, True)


def test_answers_are_cut_at_stop_strings():
    evaluator = causal(batch_size=2)
    context = "the sun"
    (whole,) = evaluator.generate_until(instances((context, {})), disable_tqdm=True)
    assert 2 <= len(whole) <= 6
    middle = whole[len(whole) // 2]
    wishes = instances(
        (context, {"until": middle, "max_gen_toks": 6}),
        (context, {"until": ["xyz", "<never>"], "max_gen_toks": 2}),
        (context, {"until": ["xyz"], "max_gen_toks": 6}),
    )
    cut, short, same = evaluator.generate_until(wishes, disable_tqdm=True)
    assert cut == whole[: whole.index(middle)]
    assert short == whole[: len(short)]
    assert same == whole


def test_draws_follow_the_seed_not_the_batch(caplog):
    hot = {"temperature": 1.5, "do_sample": True, "top_p": 0.9, "num_beams": 4}
    wishes = instances(*[("the sun", hot)] * 3)
    with caplog.at_level(logging.WARNING):
        found = causal(batch_size=3).generate_until(wishes, disable_tqdm=True)
    assert "left out: num_beams" in caplog.text
    assert found == causal(batch_size=2).generate_until(wishes, disable_tqdm=True)
    assert found != causal(batch_size=3, seed=1).generate_until(wishes, disable_tqdm=True)
    assert len(set(found)) > 1, "each request draws for itself"


def test_chat_templates():
    evaluator = causal()
    turns = [{"role": "user", "content": "sun or rain"}, {"role": "assistant", "content": "sun "}]
    text = evaluator.apply_chat_template(turns[:1])
    assert text == "<s>user: sun or rain</s>assistant: "
    assert evaluator.encode(text) == tokenizer().chat(turns[:1])  # one start token
    assert evaluator.apply_chat_template(turns, add_generation_prompt=False).endswith("sun")
    assert evaluator.chat_template(True) == TEMPLATE
    assert evaluator.chat_template(False) == ""
    with pytest.raises(ValueError, match="to choose"):
        evaluator.chat_template("rag")
    assert evaluator.tokenizer_name == "dllm_jax"


@pytest.fixture
def folder(tmp_path) -> str:
    save(tmp_path / "model", *CANVAS, tokenizer())
    return str(tmp_path / "model")


def test_model_args_name_a_recipe_and_its_options(folder: str):
    evaluator = Evaluator.load(
        folder, recipe="llada", block_size=4, remasking="random", batch_size="2", dtype="float32",
        adapter="none", device="cpu", max_batch_size=None, samples=4,
    )  # fmt: skip
    assert evaluator.recipe == recipes.llada(block_size=4, remasking="random")
    assert (evaluator.batch_size, evaluator.samples, evaluator.exact) == (2, 4, False)
    assert "/" not in evaluator.tokenizer_name
    save_recipe(folder, recipes.llada(block_size=2))
    assert Evaluator.load(folder).recipe == recipes.llada(block_size=2)


def test_bad_model_args_are_told_so(folder: str):
    for message, wrong in (
        ("has no option 'blocksize'", dict(recipe="llada", blocksize=4)),
        ("no recipe 'lada'", dict(recipe="lada")),
        ("give a number", dict(recipe="llada", batch_size="auto")),
        ("none of auto", dict(recipe="llada", likelihood="approximate")),
        ("picks positions at random", dict(recipe="remdm", temperature=0, likelihood="exact")),
        ("without guidance", dict(recipe="llada", guidance=0.5, likelihood="bound")),
    ):
        with pytest.raises(ValueError, match=message):
            Evaluator.load(folder, **wrong)


def test_the_harness_gets_a_model_of_its_own_kind(folder: str, monkeypatch):
    """A stand-in for lm-eval: the real one is too heavy to depend on."""

    class LM:
        def __init__(self):
            self.cache_hook = types.SimpleNamespace(add_partial=lambda *a: kept.append(a))

    kept, registry = [], {}
    api = types.ModuleType("lm_eval.api.model"), types.ModuleType("lm_eval.api.registry")
    api[0].LM = LM
    api[1].register_model = lambda name: lambda kind: registry.setdefault(name, kind)
    for module in (types.ModuleType("lm_eval"), types.ModuleType("lm_eval.api"), *api):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    lm_class.cache_clear()
    register.cache_clear()
    try:
        assert register() is register() is registry["dllm_jax"]
        model = registry["dllm_jax"](model=folder, recipe="llada", batch_size=2, device="cuda")
        assert isinstance(model, LM)
        (found,) = model.loglikelihood(instances(("a", " dog")), disable_tqdm=True)
        assert kept == [("loglikelihood", ("a", " dog"), found)]
    finally:
        lm_class.cache_clear()
        register.cache_clear()
    assert "torch" not in sys.modules
