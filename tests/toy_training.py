"""A run that compiles in a moment, for tests of the loop; as a program, what its processes do."""

import dataclasses
import functools
import os
import signal
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from dllm_jax import distributed, sharding, training
from dllm_jax.data import Conversations, write_part
from dllm_jax.nn.tree import param_axes, param_shapes
from dllm_jax.testing import tiny


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Drawn:
    """Rows, and what the sums over them are divided by."""

    rows: tuple
    total: jax.Array

    def with_rows(self, rows):
        return Drawn(rows, self.total)


class Toy:
    """Words that follow each other get similar embeddings; noise of the key beside."""

    def loss(self, model, params, batch, key):
        return self.score(model, params, self.draw(model, batch, key))

    def draw(self, model, batch, key):
        noise = 0.1 * jax.random.normal(key, (*batch["tokens"].shape, model.config.dim))
        return Drawn((batch, noise), (batch["lengths"] - 1).sum())

    def score(self, model, params, drawn):
        batch, noise = drawn.rows
        x = params["embed"][batch["tokens"]] + noise
        there = jnp.arange(x.shape[1] - 1) < batch["lengths"][:, None] - 1
        apart = jnp.square(x[:, 1:] - x[:, :-1]).mean(axis=-1)
        loss = (apart * there).sum() / drawn.total
        return loss, {"share": (there.sum() / drawn.total).astype(jnp.float32)}


class Poisoned(Toy):
    """The toy; the loss of a batch with the row of `POISON` in it is no number."""

    def score(self, model, params, drawn):
        loss, figures = super().score(model, params, drawn)
        ill = (drawn.rows[0]["tokens"][:, 0] == POISON[0]).any()
        pull = jnp.square(params["layers"]["mlp"]["up"]).mean()  # matrices have a gradient too
        return jnp.where(ill, jnp.nan, 1.0) * (loss + 0.1 * pull), figures


POISON = [2 + (7 * 30 + j) % 30 for j in range(7)]  # the row of number 30 (`write`)
TOY, POISONED = Toy(), Poisoned()
EXTRAS = dict(on_spike="skip", spike=50.0, ema=0.9)
TX = training.Optimiser(learning_rate=0.05).build(12)
MUON = training.Optimiser(kind="muon", learning_rate=0.05, weight_decay=0.1, schedule="wsd")


def write(folder: Path, count: int = 40) -> None:
    """Conversations of rising numbers."""
    rows = [[2 + (7 * i + j) % 30 for j in range(5 + i % 4)] for i in range(count)]
    write_part(folder / "train-00000.npz", rows, [2] * count)


@functools.cache
def model():
    models = []

    def init():
        model, params = tiny()
        models.append(model)
        return params

    params = jax.jit(init)()  # one program instead of many
    return models[0], params


class Source(Conversations):
    """`event` is called when so many rows have been read."""

    event, reads = None, 0

    def __getitem__(self, index: int):
        self.reads += 1
        if self.event and self.reads == self.event[0]:
            self.event[1]()
        return super().__getitem__(index)


def fit(
    run: Path,
    mesh=None,
    event=None,
    *,
    ill: bool = False,
    evaluations=None,
    heldout=None,
    begins: int = 0,
    **changes,
) -> training.TrainState:
    """Twelve steps of eight rows, a checkpoint every three, from data beside the run.

    Args:
      ill: with the objective that one row poisons, on matrices too, by Muon.
    """
    network, params = model()
    if mesh is None:
        params = jax.device_put(params, jax.devices()[0])
    else:
        homes = sharding.shardings(
            param_axes(network.config), mesh, shapes=param_shapes(network.config)
        )
        params = distributed.place(params, homes)
    source = Source(run.parent, "train")
    source.event = event
    settings = dict(steps=12, batch=8, length=8, save_every=3, evaluate_every=0)
    config = training.Fit(**{**settings, **changes})
    names, tx, objective = ("embed", "head"), TX, TOY
    if ill:
        names, tx, objective = ("embed", "layers"), muon(), POISONED
    state = training.create(params, names, tx)
    return training.fit(
        run, config, network, params, state, objective, tx, source, heldout,
        evaluations=evaluations, begins=begins,
    )  # fmt: skip


@functools.cache
def muon():
    return MUON.build(12, model()[0].config)


def losses(run: Path) -> np.ndarray:
    """By step; every step must be there once."""
    rows = training.read_metrics(run / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return np.array([row["loss"] for row in rows])


if __name__ == "__main__":
    distributed.initialize(heartbeat=30)
    distributed.initialize()  # once is enough, twice does no harm
    place = f"{jax.process_index()} of {jax.process_count()}"
    run, what = Path(sys.argv[1]), sys.argv[2]
    mesh = sharding.make_mesh(data=-1, fsdp=2)
    last = jax.process_index() == jax.process_count() - 1
    event = None
    if what == "term" and last:  # in the fifth step, on one process alone
        own = 8 // jax.process_count()
        event = (4 * own + 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
    if what == "fail" and last:
        event = (2, lambda: 1 / 0)
    if what == "apart":  # hosts that share no disk
        run = run / str(jax.process_index()) / "run"
        run.parent.mkdir(parents=True)
        write(run.parent)
    extras = EXTRAS if what in ("extras", "stop") else {}
    if what == "stop":
        extras = {**extras, "on_spike": "stop"}
    state = fit(run, mesh, event, ill=bool(extras), **extras)
    print(f"{place}: step {int(state.step)}")
