"""Memory and work of a setting in closed form."""

from collections.abc import Mapping

from dllm_jax import roofline
from dllm_jax.decode.prompt import chunk_of
from dllm_jax.plan.setting import Setting
from dllm_jax.recipes import Verified


def memory_of(own: Setting, layout: Mapping[str, int]) -> dict[str, int]:
    """Bytes by role, of each device."""
    if own.mode == "train":
        return roofline.train_memory(
            own.config, layout, batch=own.batch, length=own.context, accumulate=own.accumulate
        )
    if own.mode == "decode":
        entries = own.block * (2 if _rides(own) else 1)
    else:
        chunk = chunk_of(own.recipe, own.config, own.context, None)
        entries = min(chunk or own.context, own.context)
    return roofline.decode_memory(
        own.config, layout, batch=own.batch, slots=own.context + _spare(own), entries=entries,
        cache_dtype=own.cache_dtype, kept=own.mode == "prefill" or not _approximate(own),
    )  # fmt: skip


def work_of(own: Setting, layout: Mapping[str, int]) -> roofline.Work:
    """Of one pass, or one step of training."""
    config, batch, context = own.config, own.batch, own.context
    if own.mode == "train":
        return roofline.train_work(
            config, layout, batch=batch, length=context, block=own.block, accumulate=own.accumulate
        )
    if own.mode == "prefill":
        riding = own.block if _denoises(own) else own.recipe.width
        riding = 0 if _approximate(own) else riding
        prompt = context - riding
        own_pass = roofline.prefill_pass(config, batch=batch, prompt=prompt, riding=riding)
        return roofline.forward_work(config, layout, own_pass)
    own_pass = roofline.decode_pass(batch=batch, entries=own.block, context=context)
    return roofline.forward_work(config, layout, own_pass, cache_dtype=own.cache_dtype)


def _denoises(own: Setting) -> bool:
    return not isinstance(own.recipe, Verified)


def _approximate(own: Setting) -> bool:
    """Whether a pass over all of the canvas fills the cache, and others leave it."""
    return _denoises(own) and own.recipe.cache in ("none", "prefix", "dual")


def _rides(own: Setting) -> bool:
    """Whether a finished block rides on the pass of the next one."""
    return _denoises(own) and own.recipe.cache == "exact" and own.recipe.first is None


def _spare(own: Setting) -> int:
    """Slots behind the text, which `decode.start` adds."""
    if not _denoises(own):
        return own.recipe.width + 1
    if _approximate(own):
        return 0
    return 2 * own.block
