"""Which recipe to decode by: the one that was asked for, that of the folder, or the model's own."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from dllm_jax import generation_config, policies, recipes, sources
from dllm_jax.cli.options import Decoding
from dllm_jax.recipes import Recipe
from dllm_jax.typing import Key


class Choice(NamedTuple):
    """A recipe, and what figures and pages call it."""

    name: str
    recipe: Recipe

    def key(self, seed: int, turn: int = 0) -> Key | None:
        """The key of a draw, where there is one.

        Args:
          turn: of a chat: each has noise of its own.
        """
        if not self.recipe.sampling.temperature and policies.random_part(self.recipe) is None:
            return None
        key = jax.random.key(seed)
        return jax.random.fold_in(key, turn) if turn else key


def choose(options: Decoding, config: Any, source: str) -> Choice:
    """The recipe for a model.

    In this order: --recipe; --mode or one of its flags; the recipe in the generation_config.json of
    the model's folder; block diffusion where there is an adapter for it; what the family's
    published code does.

    Args:
      config: the model's.
      source: where it came from.

    Raises:
      ValueError: there is no such recipe, it lacks an option, or the model cannot decode so.
    """
    if options.recipe is not None:
        found = asked(options, config)
    elif (mode := options.any_mode) is not None:
        found = _of_mode(options, mode)
        if mode != "ar" and not config.has_mask:
            raise ValueError(
                f"{source} has no diffusion adapter, which --mode {mode} needs:"
                " give one with --adapter FOLDER, or use --mode ar"
            )
    else:
        found = _saved(source) or _own(config)
    given = {
        name: value
        for name in ("temperature", "top_k", "top_p")
        if (value := getattr(options, name)) is not None
    }
    sampling = dataclasses.replace(found.recipe.sampling, **given)
    return Choice(_label(found.name, given), dataclasses.replace(found.recipe, sampling=sampling))


def asked(options: Decoding, config: Any = None) -> Choice:
    """The recipe of --recipe and --set; sizes that were not set are the model's.

    Raises:
      ValueError: there is no such recipe or option; or --set goes with a file.
    """
    name = options.recipe or ""
    if name.endswith(".json"):
        if options.sets:
            raise ValueError("--set changes a recipe with a name: edit the file instead")
        file = sources.absolute(name)
        if not file.exists():
            raise FileNotFoundError(f"no recipe at {name}: there is no such file")
        try:
            return Choice(Path(name).stem, recipes.from_dict(sources.read_json(file)))
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(f"{name} holds no recipe: {error}") from error
    if name not in recipes.TABLE:
        raise ValueError(
            f"no recipe {name!r}: there are {', '.join(recipes.TABLE)}; or give a FILE.json"
        )
    return named(name, options.sets, _sizes(config))


def named(name: str, sets: Sequence[str], defaults: Mapping[str, Any] | None = None) -> Choice:
    """A recipe of the table, with options as they are written on a command line: "steps=32".

    Raises:
      ValueError: it has no such option, or a value is of the wrong type.
    """
    known = recipes.options_of(name)
    given = {}
    for text in sets:
        option, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"--set {text}: write it as option=value")
        if option not in known:
            raise ValueError(f"recipe {name} has no option {option!r}; it has {', '.join(known)}")
        given[option] = _value(text, known[option], value)
    fitting = {k: v for k, v in (defaults or {}).items() if k in known}
    recipe = recipes.named(name, **{**fitting, **given})
    recipe.sampling.check()
    return Choice(_label(name, given), recipe)


def _value(text: str, default: Any, value: str) -> Any:
    """A value of the type of the option's default; a default of None is no number, or any.

    Several numbers are parted by commas.
    """
    if isinstance(default, str):
        return value
    if isinstance(default, bool):
        if value not in ("true", "false"):
            raise ValueError(f"--set {text}: true or false")
        return value == "true"
    if default is None and value == "none":
        return None
    if isinstance(default, tuple):
        return tuple(_value(text, 0, one) for one in value.split(",") if one)
    for kind in (int,) if isinstance(default, int) else (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    wanted = "a whole number" if isinstance(default, int) else "a number"
    raise ValueError(f"--set {text}: give {wanted}{' or none' if default is None else ''}")


def _of_mode(options: Decoding, mode: str) -> Choice:
    names = {"ar": "ar", "speculative": "self_speculative", "diffusion": "block_diffusion"}
    known = recipes.options_of(names[mode])
    given = {
        option: value
        for option in ("block_size", "threshold", "width")
        if option in known and (value := getattr(options, option)) is not None
    }
    return Choice(_label(names[mode], given), recipes.named(names[mode], **given))


def _saved(source: str) -> Choice | None:
    found = sources.resolve(source)
    if found.kind == "gguf":  # a file has no folder of its own
        return None
    recipe = generation_config.load_recipe(found.path)
    return None if recipe is None else Choice("saved recipe", recipe)


def _own(config: Any) -> Choice:
    adapter = getattr(config, "adapter", None)
    if adapter is not None and adapter.gated:
        return named("block_diffusion", ())
    return named(recipes.for_family(config.family), (), _sizes(config))


def _sizes(config: Any) -> dict[str, int]:
    """The options whose right value is a fact about the model."""
    if getattr(config, "attention", None) == "block_causal":
        return {"block_size": config.block_size}
    canvas = getattr(config, "canvas_length", None)
    return {} if canvas is None else {"canvas": canvas}


def _label(name: str, given: Mapping[str, Any]) -> str:
    return " ".join([name, *(f"{option}={value}" for option, value in given.items())])
