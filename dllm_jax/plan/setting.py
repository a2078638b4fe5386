"""What is planned: a model, a way to run it, and how large."""

import dataclasses
from typing import Any

from dllm_jax import recipes
from dllm_jax.plan.architectures import AnyConfig, architecture
from dllm_jax.policies.chance import random_part

MODES = ("decode", "prefill", "train")
_NOISE = 8  # at least: that of configs/adapt_smollm2.py:gpu
_WIDTHS = ("block_size", "canvas", "width")  # how recipes call the size of their blocks


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """A program before it is one."""

    model: str
    mode: str
    config: AnyConfig
    recipe_name: str
    recipe: Any
    tokens_per_forward: float
    batch: int  # rows
    context: int  # positions of a row: in the cache, of the prompt and its answer, of the text
    cache_dtype: str | None  # None: that of activations
    accumulate: int  # parts of a batch that are trained on one after the other
    noise: int  # positions of a noisy block, in training

    @property
    def draws(self) -> bool:
        """Whether the recipe needs a key."""
        return random_part(self.recipe) is not None

    @property
    def block(self) -> int:
        """Positions that are denoised together; of drafts, what a pass checks and drafts."""
        if self.mode == "train":
            return self.noise
        size = getattr(self.recipe.width, "size", None)
        return size or (self.recipe.width + 1) ** 2


def setting(
    model: str,
    mode: str,
    *,
    batch: int,
    context: int,
    block: int | None = None,
    recipe: str | None = None,
    dtype: str = "bfloat16",
    cache_dtype: str | None = None,
    accumulate: int = 1,
    tokens_per_forward: float | None = None,
) -> Setting:
    """A setting by names and numbers.

    Args:
      block: of the recipe, or of the noise in training; None is the recipe's own.
      dtype: of activations and cache; and of the weights, but in training, where they are float32.

    Raises:
      FileNotFoundError, ValueError: there is no such model, mode or recipe, or a number is below 1.
    """
    if mode not in MODES:
        raise ValueError(f"mode {mode!r} is none of {', '.join(MODES)}")
    for name, number in (("batch", batch), ("context", context), ("block", block),
                         ("accumulate", accumulate)):  # fmt: skip
        if number is not None and number < 1:
            raise ValueError(f"{name} {number} must be at least 1")
    if batch % accumulate:
        raise ValueError(f"accumulate {accumulate} must divide batch {batch}")
    own = architecture(model)
    name = recipe or own.recipe
    options: dict[str, int] = {}
    noise = block or max(getattr(own.config, "block_size", 1), _NOISE)
    if recipe in (None, own.recipe):
        block = block or own.block
    if block is not None and mode != "train":
        known = [option for option in _WIDTHS if option in recipes.options_of(name)]
        if not known:
            raise ValueError(f"recipe {name} has no blocks: leave the block out")
        options[known[0]] = block
    train = mode == "train"
    config = dataclasses.replace(
        own.config,
        dtype=dtype,
        param_dtype="float32" if train else dtype,
        remat=train,
        max_length=max(own.config.max_length, context),
    )
    forward = own.tokens_per_forward if recipe in (None, own.recipe) else 1.0
    return Setting(
        model=model, mode=mode, config=config, recipe_name=name,
        recipe=recipes.named(name, **options), batch=batch, context=context,
        cache_dtype=cache_dtype, accumulate=accumulate, noise=noise,
        tokens_per_forward=tokens_per_forward or forward,
    )  # fmt: skip
