"""Our models in EleutherAI's evaluation harness (lm-eval), as its model "dllm_jax".

    python -m dllm_jax.evaluation --model dllm_jax --tasks arc_easy,gsm8k \\
        --model_args model=my-llada,recipe=llada,block_size=32 --batch_size 8

or `register()`, and then `lm_eval.simple_evaluate(model="dllm_jax", ...)`. `Evaluator` answers the
harness's requests and does not need it; `lm_class()` is the same as a model of the harness.
"""

import functools
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.progress import track

from dllm_jax import checkpoint, generation_config, recipes, sources
from dllm_jax.decode.generate import generate
from dllm_jax.likelihood import bound, check_deterministic, is_greedy, log_likelihood
from dllm_jax.ops.sampling import Sampling
from dllm_jax.recipes import Denoise, Recipe
from dllm_jax.tokenizer import Tokenizer
from dllm_jax.typing import Params

_log = logging.getLogger(__name__)

_MAX_GEN_TOKS = 256


Request = Any  # of the harness, its `Instance`: `args` is all that is read of it


class Evaluator:
    """Answers the harness's three kinds of requests.

    Args:
      recipe: how answers are decoded, and in which order exact likelihoods are taken.
      likelihood: "exact" (of the recipe), "bound" (of the model, from `samples` draws of noise), or
        "auto": exact where the recipe has a likelihood.
      samples: draws of a bound.
      seed: of draws, of noise and of tokens.
      batch_size: texts in a pass.
      max_gen_toks: the most tokens of an answer, where a request does not say.
      max_length: of a text, in tokens; the model's by default. What is too long loses its start.
      check_greedy: False saves the decoding that says whether an answer is the greedy one, which
        few tasks read (LAMBADA), and reports False.
      name: of the tokenizer; the harness keys its caches by it.

    Raises:
      ValueError: the recipe has no exact likelihood, and one is asked for; or a bound of a guided
        recipe is.
    """

    def __init__(
        self,
        model: Any,
        params: Params,
        tokenizer: Tokenizer,
        recipe: Recipe,
        *,
        likelihood: str = "auto",
        samples: int = 128,
        seed: int = 0,
        batch_size: int = 8,
        max_gen_toks: int = _MAX_GEN_TOKS,
        max_length: int | None = None,
        check_greedy: bool = True,
        name: str = "dllm_jax",
    ):
        if likelihood not in ("auto", "exact", "bound"):
            raise ValueError(f"likelihood={likelihood!r} is none of auto, exact, bound")
        self.model, self.params, self.tokenizer, self.recipe = model, params, tokenizer, recipe
        self.samples, self.seed, self.batch_size = samples, seed, batch_size
        self.max_gen_toks, self.check_greedy, self.name = max_gen_toks, check_greedy, name
        self.max_length = model.config.max_length if max_length is None else max_length
        self.random = False
        try:
            check_deterministic(recipe)
        except ValueError:
            if likelihood == "exact":
                raise
            self.random = True
        self.exact = likelihood == "exact" or (likelihood == "auto" and not self.random)
        guided = isinstance(recipe, Denoise) and recipe.guidance is not None
        if guided and not self.exact:
            raise ValueError("the bound is the model's own, without guidance: use likelihood=exact")

    @classmethod
    def load(cls, model: str, **options: Any) -> "Evaluator":
        """From the harness's `model_args`, as `arguments` takes them."""
        return cls(**arguments(model, **options))

    # Requests of the harness

    def loglikelihood(
        self, requests: Sequence[Request], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """log p(continuation | context) in nats, and whether it is what greedy decoding gives."""
        pairs = [self.encode_pair(*request.args) for request in requests]
        found = self._score(pairs, disable_tqdm, self.check_greedy)
        for request, result in zip(requests, found, strict=True):
            self._keep("loglikelihood", request, result)
        return found

    def loglikelihood_rolling(
        self, requests: Sequence[Request], disable_tqdm: bool = False
    ) -> list[float]:
        """log p(text) in nats, in windows of `max_length`.

        Each token is scored once; the last window is filled up with context. A bidirectional model
        scores what is new in a window as a whole.
        """
        windows = [list(self.windows(self.encode(request.args[0]))) for request in requests]
        flat = self._score([pair for text in windows for pair in text], disable_tqdm, False)
        totals, first = [], 0
        for request, text in zip(requests, windows, strict=True):
            totals.append(float(sum(nats for nats, _ in flat[first : first + len(text)])))
            first += len(text)
            self._keep("loglikelihood_rolling", request, totals[-1])
        return totals

    def generate_until(self, requests: Sequence[Request], disable_tqdm: bool = False) -> list[str]:
        """The answers, up to the first of each request's stop strings."""
        asked = [_wish(request.args[1], self.max_gen_toks) for request in requests]
        rows = [
            self.encode(request.args[0])[-max(self.max_length - wish.budget, 1) :]
            for request, wish in zip(requests, asked, strict=True)
        ]
        alike: dict[Any, list[int]] = {}
        for i, wish in enumerate(asked):
            alike.setdefault((wish.budget, wish.sampling), []).append(i)
        batches = [batch for group in alike.values() for batch in self._batches(rows, group)]
        answers = [""] * len(requests)
        for batch in track(batches, "generate_until", disable=disable_tqdm):
            full, wish = self._full(batch), asked[batch[0]]
            recipe = self.recipe
            if wish.sampling is not None:
                recipe = replace(recipe, sampling=wish.sampling)
            draws = self.random or bool(recipe.sampling.temperature)
            out = generate(
                self.model, self.params, [rows[i] for i in full], recipe=recipe,
                max_new_tokens=wish.budget, key=self._keys(full) if draws else None,
            )  # fmt: skip
            tokens, lengths = jax.device_get((out.tokens, out.lengths))
            for i, row, length in zip(batch, tokens, lengths, strict=False):
                answers[i] = self._text(row[:length].tolist(), asked[i].until)
                self._keep("generate_until", requests[i], answers[i])
        return answers

    # Text

    def encode(self, text: str) -> list[int]:
        """Ids; a chat template's start token is not doubled."""
        ids = self.tokenizer.encode(text)
        bos = self._special("bos_token")
        return ids[1:] if bos is not None and ids[:2] == [bos, bos] else ids

    def encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Ids of both, cut from the ids of the whole.

        Spaces that end the context belong to the continuation, as the harness has it.
        """
        if not context:
            return self.prefix, self.encode(continuation)
        text = context.rstrip()
        continuation = context[len(text) :] + continuation
        given = self.encode(text)
        return given, self.encode(text + continuation)[len(given) :]

    @property
    def prefix(self) -> list[int]:
        """What stands before a text without context: the start token, or an end-of-turn token."""
        start = self._special("bos_token")
        ends = self.tokenizer.eos_ids or self.model.config.eos_ids
        return [start] if start is not None else list(ends[:1])

    def windows(self, ids: list[int]) -> Iterator[tuple[list[int], list[int]]]:
        """Contexts and what follows them, each token in one continuation."""
        start = self.prefix[: 1 if ids[:1] != self.prefix else 0]
        whole, room = start + ids, self.max_length - 1
        first = len(start) or 1  # a text that begins with its start token is scored behind it
        for begin in range(first, len(whole), room):
            end = min(begin + room, len(whole))
            yield whole[max(end - self.max_length, 0) : begin], whole[begin:end]

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The conversation as text; without a generation prompt its last message is left open."""
        ids = self.tokenizer.chat(chat_history, add_generation_prompt=add_generation_prompt)
        text = self.tokenizer.decode(ids, skip_special=False)
        if add_generation_prompt:
            return text
        last = chat_history[-1]["content"].strip()
        return text[: text.rindex(last) + len(last)]

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The model's template, for the harness's records; it has one or none."""
        if isinstance(chat_template, str):
            raise ValueError(f"there is no template {chat_template!r} to choose: the model has one")
        return (self.tokenizer.template or "") if chat_template else ""

    @property
    def tokenizer_name(self) -> str:
        return self.name.replace("/", "__")

    # Batches

    def _score(
        self, pairs: Sequence[tuple[list[int], list[int]]], quiet: bool, greedy: bool
    ) -> list[tuple[float, bool]]:
        """Log-likelihoods of answers, and whether they are greedy; nothing follows with certainty.

        Contexts that are too long lose their start.
        """
        found = [(0.0, True)] * len(pairs)
        texts = [self._fitting(*pair) for pair in pairs]
        asked = [i for i, (_, answer) in enumerate(texts) if answer]
        batches = list(self._batches([c + a for c, a in texts], asked))
        for batch in track(batches, "loglikelihood", disable=quiet):
            rows = self._full(batch)
            given = [texts[i][0] for i in rows], [texts[i][1] for i in rows]
            if self.exact:
                total = log_likelihood(self.model, self.params, *given, recipe=self.recipe).total
            else:
                total = bound(
                    self.model, self.params, *given, key=self._keys(rows), samples=self.samples
                ).mean
            right = np.zeros(len(rows), bool)
            if greedy and not self.random:
                right = np.asarray(is_greedy(self.model, self.params, *given, recipe=self.recipe))
            for i, nats, same in zip(batch, np.asarray(total), right, strict=False):
                found[i] = float(nats), bool(same)
        return found

    def _fitting(self, context: list[int], answer: list[int]) -> tuple[list[int], list[int]]:
        over = len(context) + len(answer) - self.max_length
        if over <= 0:
            return context, answer
        if over >= len(context):
            raise ValueError(
                f"a continuation of {len(answer)} tokens leaves no room for its context:"
                f" max_length={self.max_length}"
            )
        return context[over:], answer

    def _batches(self, rows: Sequence[list[int]], asked: Iterable[int]) -> Iterator[list[int]]:
        """Numbers of rows, those of one length together, the longest first."""
        order = sorted(asked, key=lambda i: -len(rows[i]))
        for first in range(0, len(order), self.batch_size):
            yield order[first : first + self.batch_size]

    def _full(self, batch: list[int]) -> list[int]:
        """A batch of the full size, by repetition: one program serves them all."""
        return batch + batch[-1:] * (self.batch_size - len(batch))

    def _keys(self, rows: list[int]) -> jax.Array:
        """A key for each request: its draws do not depend on its batch."""
        return jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(self.seed)))(
            jnp.array(rows)
        )

    def _text(self, ids: list[int], until: Sequence[str]) -> str:
        if ids and ids[-1] in self.model.config.eos_ids:
            ids = ids[:-1]
        text = self.tokenizer.decode(ids)
        return text[: min((at for stop in until if (at := text.find(stop)) >= 0), default=None)]

    def _special(self, name: str) -> int | None:
        token = self.tokenizer.special.get(name)
        return None if token is None else self.tokenizer.backend.token_to_id(token)

    def _keep(self, kind: str, request: Request, result: Any) -> None:
        hook = getattr(self, "cache_hook", None)  # of the harness
        if hook is not None:
            hook.add_partial(kind, request.args, result)


_OPTIONS = (
    "likelihood", "samples", "seed", "batch_size", "max_gen_toks", "max_length", "check_greedy",
)  # fmt: skip


def arguments(model: str, *, recipe: str | None = None, **options: Any) -> dict[str, Any]:
    """What `Evaluator` takes, from the harness's `model_args`.

    Args:
      model: a named model, a file or a folder, as for `dllm_jax.load`.
      recipe: one of `recipes.TABLE`; else the one saved with the model, else its family's.
      options: `dtype` and `adapter` of `load`, those of `Evaluator`, and the recipe's.
    """
    options = {k: v for k, v in options.items() if v is not None}
    options.pop("device", None)  # JAX has chosen already
    options.pop("max_batch_size", None)
    read = {k: options.pop(k) for k in ("dtype", "adapter") if k in options}
    if read.get("adapter") == "none":
        read["adapter"] = None
    own = {k: options.pop(k) for k in _OPTIONS if k in options}
    size = str(own.get("batch_size", 8))
    if not size.isdecimal():
        raise ValueError(f"batch_size={size} is not known here: give a number")
    network, params = checkpoint.load(model, **read)
    return {
        **own,
        "model": network,
        "params": params,
        "tokenizer": Tokenizer.load(model),
        "recipe": _recipe(model, network.config, recipe, options),
        "batch_size": int(size),
        "name": model,
    }


def _recipe(source: str, config: Any, name: str | None, options: dict[str, Any]) -> Recipe:
    """The recipe by its name and options; sizes that are not given are the model's."""
    if name is None:
        found = sources.resolve(source)
        saved = None if found.kind == "gguf" else generation_config.load_recipe(found.path)
        if saved is not None and not options:
            return saved
        adapted = getattr(config, "adapter", None) is not None
        name = "block_diffusion" if adapted else recipes.for_family(config.family)
    sizes = {"canvas": getattr(config, "canvas_length", None)}
    if config.attention == "block_causal":
        sizes["block_size"] = config.block_size
    known = recipes.options_of(name) if name in recipes.TABLE else {}
    sizes = {k: v for k, v in sizes.items() if v is not None and k in known}
    return recipes.named(name, **{**sizes, **options})


class _Wish(NamedTuple):
    """How a request wants its answer."""

    until: tuple[str, ...]
    budget: int
    sampling: Sampling | None  # None: the recipe's own


def _wish(given: dict[str, Any], most: int) -> _Wish:
    given = dict(given)
    until = given.pop("until", None) or ()
    budgets = [given.pop(name, None) for name in ("max_gen_toks", "max_new_tokens", "max_tokens")]
    temperature, sample = given.pop("temperature", None), given.pop("do_sample", None)
    top_k, top_p = given.pop("top_k", None), given.pop("top_p", None)
    sampling = None
    if sample is False or temperature == 0:
        sampling = Sampling()
    elif temperature is not None:
        sampling = Sampling(float(temperature), int(top_k or 0), float(top_p or 1))
    if given:
        _log.warning("not known here, and left out: %s", ", ".join(given))
    return _Wish(
        (until,) if isinstance(until, str) else tuple(until),
        int(next((budget for budget in budgets if budget), most)),
        sampling,
    )


@functools.cache
def lm_class() -> type:
    """The harness's model: `Evaluator.load` by keywords.

    Raises:
      ImportError: lm-eval is not installed (the extra `eval`).
    """
    from lm_eval.api.model import LM

    class DllmJax(Evaluator, LM):
        def __init__(self, model: str, **options: Any):
            LM.__init__(self)
            Evaluator.__init__(self, **arguments(model, **options))

    return DllmJax


@functools.cache
def register() -> type:
    """Makes the model "dllm_jax" known to the harness."""
    from lm_eval.api.registry import register_model

    return register_model("dllm_jax")(lm_class())


def main() -> None:
    """The harness's own command line, with our model in it."""
    register()
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
