"""One training step: what it changes, its gradient in parts, and what it refuses to apply."""

import dataclasses
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding

from dllm_jax.losses import Objective
from dllm_jax.sharding import Rules, as_they_lie, automatic, shardings
from dllm_jax.training.optimisers import global_norm
from dllm_jax.typing import Key, Params

WINDOW = 32
"""Applied steps whose losses say what is usual."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What a step changes."""

    step: jax.Array  # int32[]
    trainable: Params  # a subset of the parameters' top level, e.g. {"adapter": ...}
    opt_state: Any
    ema: Params | None = None  # float32: the running average of `trainable`, where one is kept
    losses: jax.Array | None = None  # float32[WINDOW]: the last that were numbers, the newest last
    stopped: jax.Array | None = None  # bool[]: a step was not applied, so none is any more


def create(
    params: Params,
    names: tuple[str, ...],
    tx: optax.GradientTransformation,
    *,
    ema: bool = False,
    losses: bool = False,
    stopped: bool = False,
) -> TrainState:
    """A state that trains the named top-level entries of `params` and leaves the others alone.

    What the optimiser keeps of a parameter lies where the parameter does, split as it is split.

    Args:
      ema: with a running average of the parameters, which starts as they are.
      losses: with the last losses, which a step with `spike` compares its own with.
      stopped: with the mark that a step with `stop` leaves.
    """
    unknown = [name for name in names if name not in params]
    if unknown:
        raise ValueError(f"nothing named {unknown} to train; the parameters have {sorted(params)}")
    given = {name: params[name] for name in names}

    def start(given: Params):
        trainable = jax.tree.map(jnp.copy, given)  # steps donate it
        return jnp.int32(0), trainable, tx.init(trainable)

    # All of it where the parameters are: a state of mixed placement compiles a step twice.
    homes = jax.tree.map(lambda x: x.sharding, given)
    whole = _whole(jax.tree.leaves(homes)[0])
    moments = _homes(jax.eval_shape(tx.init, given), given, whole)
    state = TrainState(*jax.jit(start, out_shardings=(whole, homes, moments))(given))
    return with_extras(state, ema=ema, losses=losses, stopped=stopped)


def with_extras(state: TrainState, *, ema: bool, losses: bool, stopped: bool) -> TrainState:
    """The state with what is asked for and not there: an average, the last losses, a mark."""
    if ema and state.ema is None:
        homes = jax.tree.map(lambda x: x.sharding, state.trainable)
        wide = jax.jit(partial(jax.tree.map, _wide), out_shardings=homes)
        state = dataclasses.replace(state, ema=wide(state.trainable))
    if losses and state.losses is None:
        fresh = jax.jit(lambda: jnp.full(WINDOW, jnp.nan), out_shardings=state.step.sharding)
        state = dataclasses.replace(state, losses=fresh())
    if stopped and state.stopped is None:
        fresh = jax.jit(lambda: jnp.bool_(False), out_shardings=state.step.sharding)
        state = dataclasses.replace(state, stopped=fresh())
    return state


def trained(state: TrainState) -> Params:
    """What a run has made: the average of the parameters where one is kept, in their dtype."""
    if state.ema is None:
        return state.trainable
    return jax.tree.map(lambda mean, x: mean.astype(x.dtype), state.ema, state.trainable)


def _wide(x: jax.Array) -> jax.Array:
    """A copy in float32."""
    return jnp.array(x, jnp.float32, copy=True)


def _homes(moments: Any, given: Params, whole: jax.sharding.Sharding) -> Any:
    """Where what an optimiser keeps is to lie: with its parameter, told by its name and shape."""
    known = dict(jax.tree.leaves_with_path(given))

    def one(path: tuple[Any, ...], leaf: Any) -> jax.sharding.Sharding:
        names = (path[start:] for start in range(len(path)))
        owner = next((known[name] for name in names if name in known), None)
        return whole if owner is None or owner.shape != leaf.shape else owner.sharding

    return jax.tree.map_with_path(one, moments)


def _whole(home: jax.sharding.Sharding) -> jax.sharding.Sharding:
    """The sharding of what every device of `home` holds whole."""
    if not isinstance(home, NamedSharding):
        return home
    return shardings((), cast(Mesh, home.mesh), Rules())


def make_train_step(
    model: Any,
    objective: Objective,
    tx: optax.GradientTransformation,
    *,
    accumulate: int = 1,
    ema: float = 0.0,
    spike: float | None = None,
    stop: bool = False,
) -> partial[tuple[TrainState, dict[str, jax.Array]]]:
    """A jitted `step(state, params, batch, key) -> (state, figures)`; `state` is donated.

    `params` are all parameters; those that `state.trainable` holds are taken from the state. The
    noise is drawn from `fold_in(key, state.step)`. The same arguments share one compiled program.
    Among the figures are the `loss`, `grad_norm`, `tokens` (those of the batch, unless the
    objective says something else), and with `spike` also `skipped`: 1 where nothing was applied.

    Args:
      accumulate: parts of a batch that are passed one after the other, for the memory of one. Noise
        and weights are those of the whole batch, so that loss and gradient are, up to rounding.
      ema: decay d of the average of the parameters; at step n it is at most (1 + n) / (10 + n), so
        that the beginning is soon forgotten. 0: none is kept.
      spike: what is not applied, so that the step is counted and all else stays as it was: a step
        whose loss or gradient is not finite, and one whose loss is above `spike` times the median
        of the last `WINDOW` losses that were numbers, once there are so many: a loss that stays
        high is soon the usual one. 0: only what is not finite. None: everything is applied.
      stop: after a step that is not applied none is, and the state stays as it was before it, its
        `step` too. So who looks at `skipped` later finds that state, and waits for no step.
    """
    if not 0 <= ema < 1:
        raise ValueError(f"ema={ema} is a decay: it must be in [0, 1)")
    if spike and spike <= 1:
        raise ValueError(f"spike={spike} times the usual loss must be above 1, or 0: no number")
    if stop and spike is None:
        raise ValueError("stop=True needs to know what is not applied: give spike, 0 or more")
    return partial(_step, model, objective, tx, accumulate, ema, spike, stop)


@partial(jax.jit, static_argnums=(0, 1, 2, 3, 4, 5, 6), donate_argnums=7)
def _step(
    model, objective, tx, accumulate, ema, spike, stop, state: TrainState, params: Params, batch,
    key: Key,
):  # fmt: skip
    for name, there, what in (
        ("ema", bool(ema), f"ema={ema}"),
        ("losses", bool(spike), f"spike={spike}"),
        ("stopped", stop, f"stop={stop}"),
    ):
        if there != (getattr(state, name) is not None):
            raise ValueError(
                f"a step with {what} takes a state that was created with {name}={there}"
            )
    run = partial(_stepped, model, objective, tx, accumulate, ema, spike)
    return automatic(run, as_they_lie((state,)), state, params, batch, key)


def _stepped(
    model, objective, tx, accumulate, ema, spike, state: TrainState, params: Params, batch, key: Key
):
    noise = jax.random.fold_in(key, state.step)
    if accumulate == 1:

        def loss(trainable):
            return objective.loss(model, {**params, **trainable}, batch, noise)

        (total, figures), grads = jax.value_and_grad(loss, has_aux=True)(state.trainable)
    else:
        if not hasattr(objective, "draw"):
            raise ValueError(
                f"accumulate={accumulate} needs an objective with `draw` and `score`, which tell "
                f"the parts of a batch; {type(objective).__name__} has none"
            )
        drawn = objective.draw(model, batch, noise)
        total, figures, grads = _in_parts(model, objective, accumulate, state, params, drawn)
    updates, opt_state = tx.update(grads, state.opt_state, state.trainable)
    trainable = cast(Params, optax.apply_updates(state.trainable, updates))
    if "lengths" in batch:
        figures = {"tokens": batch["lengths"].sum(), **figures}
    figures = {"loss": total, **figures, "grad_norm": global_norm(grads)}
    mean = None
    if ema:
        decay = jnp.minimum(ema, (1 + state.step) / (10 + state.step))
        mean = jax.tree.map(
            lambda old, x: decay * old + (1 - decay) * x.astype(jnp.float32), state.ema, trainable
        )
    losses = None
    if state.losses is not None:
        newer = jnp.append(state.losses[1:], total.astype(jnp.float32))
        losses = jnp.where(jnp.isfinite(total), newer, state.losses)
    after = TrainState(state.step + 1, trainable, opt_state, mean, losses, state.stopped)
    if spike is not None:
        spiked = ~(jnp.isfinite(total) & jnp.isfinite(figures["grad_norm"]))
        if state.losses is not None:  # the median is no number while one of them is none
            spiked |= total > spike * jnp.median(state.losses)
        if state.stopped is None:
            before = dataclasses.replace(state, step=state.step + 1, losses=losses)
        else:
            spiked |= state.stopped
            before = dataclasses.replace(state, stopped=jnp.bool_(True))
        after = jax.tree.map(lambda old, new: jnp.where(spiked, old, new), before, after)
        figures["skipped"] = spiked.astype(jnp.float32)
    return after, figures


def _in_parts(model, objective, count, state: TrainState, params: Params, drawn):
    """Loss, figures and gradient as sums over parts of the batch; each is a share of the whole."""

    def loss(trainable, part):
        return objective.score(model, {**params, **trainable}, part)

    gradient = jax.value_and_grad(loss, has_aux=True)

    def one(sums, part):
        (total, figures), grads = gradient(state.trainable, drawn.with_rows(part))
        found = (total, figures, grads)
        return jax.tree.map(lambda whole, x: whole + x.astype(whole.dtype), sums, found), None

    def split(x):
        # Part i has the rows i, i + count, ...: each shard of a batch gives to every part.
        if len(x) % count:
            raise ValueError(f"accumulate={count} must divide the batch of {len(x)}")
        return jnp.moveaxis(x.reshape(-1, count, *x.shape[1:]), 1, 0)

    parts = jax.tree.map(split, drawn.rows)
    (total, figures), grads = jax.eval_shape(
        gradient, state.trainable, drawn.with_rows(jax.tree.map(lambda x: x[0], parts))
    )
    wide = lambda x: jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32))  # noqa: E731
    zeros = jax.tree.map(wide, (total, figures, grads))
    (total, figures, grads), _ = jax.lax.scan(one, zeros, parts)
    grads = jax.tree.map(lambda grad, x: grad.astype(x.dtype), grads, state.trainable)
    return total, figures, grads
