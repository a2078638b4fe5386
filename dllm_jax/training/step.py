"""One training step: what it changes, its gradient in parts, and the optimiser."""

import dataclasses
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding

from dllm_jax.losses import Objective
from dllm_jax.nn.transformer import Transformer
from dllm_jax.sharding import Rules, as_they_lie, automatic, shardings
from dllm_jax.typing import Key, Params


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What a step changes."""

    step: jax.Array  # int32[]
    trainable: Params  # a subset of the parameters' top level, e.g. {"adapter": ...}
    opt_state: Any


def create(params: Params, names: tuple[str, ...], tx: optax.GradientTransformation) -> TrainState:
    """A state that trains the named top-level entries of `params` and leaves the others alone.

    What the optimiser keeps of a parameter lies where the parameter does, split as it is split.
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
    moments = optax.tree.map_params(
        tx.init, lambda _, home: home, jax.eval_shape(tx.init, given), homes,
        transform_non_params=lambda _: whole,
    )  # fmt: skip
    return TrainState(*jax.jit(start, out_shardings=(whole, homes, moments))(given))


def _whole(home: jax.sharding.Sharding) -> jax.sharding.Sharding:
    """The sharding of what every device of `home` holds whole."""
    if not isinstance(home, NamedSharding):
        return home
    return shardings((), cast(Mesh, home.mesh), Rules())


def make_train_step(
    model: Transformer,
    objective: Objective,
    tx: optax.GradientTransformation,
    *,
    accumulate: int = 1,
) -> partial[tuple[TrainState, dict[str, jax.Array]]]:
    """A jitted `step(state, params, batch, key) -> (state, figures)`; `state` is donated.

    `params` are all parameters; those that `state.trainable` holds are taken from the state. The
    noise is drawn from `fold_in(key, state.step)`. The same arguments share one compiled program.

    Args:
      accumulate: parts of a batch that are passed one after the other, for the memory of one. Noise
        and weights are those of the whole batch, so that loss and gradient are, up to rounding.
    """
    return partial(_step, model, objective, tx, accumulate)


@partial(jax.jit, static_argnums=(0, 1, 2, 3), donate_argnums=4)
def _step(model, objective, tx, accumulate, state: TrainState, params: Params, batch, key: Key):
    run = partial(_stepped, model, objective, tx, accumulate)
    return automatic(run, as_they_lie((state,)), state, params, batch, key)


def _stepped(model, objective, tx, accumulate, state: TrainState, params: Params, batch, key: Key):
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
    figures = {"loss": total, **figures, "grad_norm": optax.tree.norm(grads)}
    return TrainState(state.step + 1, trainable, opt_state), figures


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimiser:
    """AdamW with warm-up and cosine decay, gradients clipped by their global norm."""

    learning_rate: float = 1e-3
    warmup: int = 20
    final: float = 0.05  # of the learning rate, at the last step
    weight_decay: float = 0.0
    clip: float = 1.0

    def build(self, steps: int) -> optax.GradientTransformation:
        """The optax transformation for a run of `steps`."""
        schedule = optax.warmup_cosine_decay_schedule(
            0.0,
            self.learning_rate,
            min(self.warmup, steps - 1),
            steps,
            self.learning_rate * self.final,
        )
        return optax.chain(
            optax.clip_by_global_norm(self.clip),
            optax.adamw(schedule, b2=0.99, weight_decay=self.weight_decay),
        )
