"""A training run, on one process or on many.

A run is a folder:

    <run>/checkpoints/   Orbax: the trained parameters, the optimiser, and the position in the data
    <run>/metrics.jsonl  one line a logged step
    <run>/loss.png       the curve, when matplotlib is there

Interrupted (SIGTERM, SIGINT) it saves and returns; killed, it falls back to the last checkpoint.
Started again on the same folder it continues on the numbers of an uninterrupted run, on as many
processes as there are then: a step's batch and noise are functions of (seed, step), and what each
process reads of the batch follows from where its devices stand in the mesh.
"""

import contextlib
import dataclasses
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding

from dllm_jax import distributed
from dllm_jax.data import Source, batches
from dllm_jax.losses import Objective
from dllm_jax.nn.transformer import Transformer
from dllm_jax.sharding import EVERY, Rules, mesh_of, scope, shardings
from dllm_jax.training import checkpoints, records
from dllm_jax.training.step import TrainState, make_train_step
from dllm_jax.typing import Key, Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fit:
    """How long a run lasts, and what it leaves behind."""

    steps: int
    batch: int
    """Rows of a step, of all processes together."""
    length: int
    seed: int = 0
    accumulate: int = 1
    """Parts of a batch that are passed one after the other, for the memory of one."""
    minutes: float | None = None
    """Stop after this much time in this process, saved and ready to be continued."""
    save_every: int = 50
    keep: int = 2
    """So many of the newest checkpoints stay."""
    keep_every: int | None = None
    """Checkpoints of steps that it divides stay too."""
    checkpoints: str | None = None
    """Their folder, by default in the run's. All processes must see it: where hosts share no disk,
    a bucket (gs://...)."""
    log_every: int = 1
    """Many processes look for signals, and at the clock, at logged steps only."""
    evaluate_every: int = 100


def fit(
    run: Path,
    config: Fit,
    model: Transformer,
    params: Params,
    state: TrainState,
    objective: Objective,
    tx: optax.GradientTransformation,
    source: Source,
    heldout: Source | None = None,
    *,
    rules: Rules = EVERY,
) -> TrainState:
    """Trains until `config.steps`, the time budget, or a signal; continues what the folder holds.

    Parameters on a mesh are trained there: the batch is split by `rules`, and each process reads
    the rows of its own devices. The processes stop together, at the first one's clock or at a
    signal to any of them.

    Args:
      params: all parameters, on one device or on a mesh; with many processes, on one of them all.
      state: a fresh state (`create`); replaced by the folder's newest checkpoint when there is one.
      rules: those that the parameters were placed by.

    Returns:
      The last state, which is also on disk when any step was made.

    Raises:
      ValueError: the folder holds a run of other parameters, another optimiser, or another seed,
        batch, length or data, or no checkpoint of it can be read; or the batch does not fit the
        mesh. A new number of steps is welcome: the schedule follows it. So is another mesh.
    """
    run.mkdir(parents=True, exist_ok=True)
    mesh = _mesh_of(params)
    feed = Feed(config.batch, mesh, rules, parts=config.accumulate)
    shape = dict(batch=config.batch, length=config.length)
    pad_id = model.config.pad_id
    data = batches(source, pad_id=pad_id, seed=config.seed, rows=feed.rows, **shape)
    step = make_train_step(model, objective, tx, accumulate=config.accumulate)
    key = jax.random.key(config.seed)
    budget = float("inf") if config.minutes is None else 60 * config.minutes
    deadline = time.monotonic() + budget
    numbers = {"seed": config.seed, **shape, "rows": len(source)}
    folder = config.checkpoints or run / "checkpoints"
    first, alone = distributed.is_first(), jax.process_count() == 1
    with scope(params), records.interrupts() as interrupted:
        state = _restore(folder, state, data, numbers)
        done = began = int(state.step)

        def stop() -> bool:
            if not alone and done % config.log_every:
                return False
            over = first and time.monotonic() >= deadline
            return distributed.any_process(over or interrupted())

        with (
            _saver(folder, config) as saver,
            records.metrics(run / "metrics.jsonl", done) as write,
            records.progress(config.steps, done) as show,
        ):
            while done < config.steps and not stop():
                start = time.perf_counter()
                given = feed.place(next(data))
                if done == began:
                    distributed.compile_together(step, state, params, given, key)
                state, figures = step(state, params, given, key)
                done += 1
                if done % config.log_every == 0 or done == config.steps:
                    figures = {name: float(v) for name, v in jax.device_get(figures).items()}
                    write({"step": done, **figures, "seconds": time.perf_counter() - start})
                    show(done, figures)
                if (
                    heldout is not None
                    and config.evaluate_every
                    and done % config.evaluate_every == 0
                ):
                    figures = evaluate(
                        model, {**params, **state.trainable}, objective, heldout, rules=rules,
                        **shape,
                    )  # fmt: skip
                    write({"step": done, **{f"heldout_{name}": v for name, v in figures.items()}})
                if done % config.save_every == 0:
                    _save(saver, done, state, data, numbers)
            _save(saver, done, state, data, numbers)
    if first:
        records.plot(run)
    return state


def evaluate(
    model: Transformer, params: Params, objective: Objective, source: Source, *, batch: int,
    length: int, seed: int = 0, limit: int = 64, rules: Rules = EVERY,
) -> dict[str, float]:  # fmt: skip
    """Mean figures of the objective over `limit` rows, the same ones for the same seed."""
    mesh = _mesh_of(params)
    batch = min(batch, len(source))
    feed = Feed(batch, mesh, rules, whole=True)
    pad_id = model.config.pad_id
    data = batches(source, batch=batch, length=length, pad_id=pad_id, seed=seed, rows=feed.rows)
    count = max(1, min(limit, len(source)) // batch)
    key = jax.random.key(seed)
    measure, rows = partial(_figures, model, objective), []
    with scope(params):
        for i in range(count):
            given = params, feed.place(next(data)), jax.random.fold_in(key, i)
            if i == 0:
                distributed.compile_together(measure, *given)
            rows.append(jax.device_get(measure(*given)))
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}


@partial(jax.jit, static_argnums=(0, 1))  # compiled once, however often a run evaluates
def _figures(model: Transformer, objective: Objective, params: Params, batch, key: Key):
    return objective.loss(model, params, batch, key)[1]


class Feed:
    """How batches get onto a mesh: which rows this process reads, and where they go.

    Without a mesh it reads all of them, and leaves them where they are.
    """

    rows: np.ndarray  # int[R]: of each batch, those that this process reads

    def __init__(
        self, batch: int, mesh: Mesh | None, rules: Rules, *, parts: int = 1, whole: bool = False
    ):
        """Splits batches by `rules`; where `whole` says so, one that does not divide stays whole.

        Raises:
          ValueError: the batch does not divide over the mesh, in so many parts.
        """
        self.batch, self.rows = batch, np.arange(batch)
        if batch % parts:
            raise ValueError(f"accumulate={parts} must divide batch={batch}")
        self._homes: dict[int, NamedSharding] | None = None
        if mesh is None:
            return
        axes: Any = {1: ("batch",), 2: ("batch", None)}  # by an array's number of dimensions
        homes = shardings(axes, mesh, rules)
        shards = batch // homes[1].shard_shape((batch,))[0] if _divides(homes[1], batch) else 0
        if not shards or batch // parts % shards:
            if not whole:
                raise ValueError(
                    f"batch={batch} in {parts} part{'s' * (parts > 1)} does not divide over the "
                    f"data axes of the mesh {dict(mesh.shape)}; choose a multiple"
                )
            homes = shardings({n: (None,) * n for n in axes}, mesh, rules)
        self._homes = homes
        own = homes[1].addressable_devices_indices_map((batch,)).values()
        self.rows = np.unique(np.concatenate([np.arange(batch)[index] for index in own]))

    def place(self, given: dict[str, np.ndarray]) -> dict[str, Any]:
        """The global arrays of a batch, of this process's rows."""
        if self._homes is None:
            return given
        homes = self._homes

        def one(local: np.ndarray) -> jax.Array:
            def shard(index: Any) -> np.ndarray:
                return local[np.searchsorted(self.rows, np.arange(self.batch)[index[0]])]

            shape = (self.batch, *local.shape[1:])
            return jax.make_array_from_callback(shape, homes[local.ndim], shard)

        return {name: one(local) for name, local in given.items()}


def _divides(home: NamedSharding, batch: int) -> bool:
    try:
        home.shard_shape((batch,))
    except ValueError:
        return False
    return True


def _mesh_of(params: Params) -> Mesh | None:
    """The mesh that parameters lie on; None: they are on one device."""
    mesh = mesh_of(params)
    if mesh is None and jax.process_count() > 1:
        raise ValueError(
            f"{jax.process_count()} processes train on one mesh of all their devices: place the "
            "parameters on it (load with mesh=make_mesh())"
        )
    return mesh


@contextlib.contextmanager
def _saver(folder: Path | str, config: Fit) -> Iterator[checkpoints.Saver]:
    saver = checkpoints.Saver(folder, keep=config.keep, keep_every=config.keep_every)
    try:
        yield saver
    except BaseException:
        # The others may be gone, and a save that waits for them would not end.
        if jax.process_count() == 1:
            saver.close()
        raise
    saver.close()


def _save(saver: checkpoints.Saver, step: int, state: TrainState, data, numbers) -> None:
    saver.save(step, _as_dict(state), {"data": data.get_state(), "numbers": numbers})


def _restore(folder: Path | str, state: TrainState, data, numbers: dict[str, int]) -> TrainState:
    """The newest readable checkpoint, with `data` set to its position; else the given state."""
    target = jax.tree.map(checkpoints.target_of, _as_dict(state))
    checkpoints.check_shared(folder)
    advice = "; continue it with the settings it was started with, or choose another folder"

    def load(path, step: int) -> tuple[Params, dict[str, Any]]:
        saved, facts = checkpoints.facts_of(path)
        what = f"the checkpoint of step {step} does not fit this run"
        checkpoints.check(saved, target, what, advice)
        for name, value in facts["numbers"].items():
            if value != numbers[name]:
                raise ValueError(
                    f"the run of this folder was started with {name}={value}, here it is "
                    f"{numbers[name]}: its data and noise would not go on as they were; give the "
                    "old value, or choose another folder"
                )
        return checkpoints.read(path, target), facts

    found = checkpoints.restore_newest(folder, load)
    if found is None:
        return state
    loaded, facts = found[1]
    data.set_state(facts["data"])
    optimiser = jax.tree.structure(state.opt_state)
    return TrainState(
        loaded["step"],
        loaded["trainable"],
        jax.tree.unflatten(optimiser, jax.tree.leaves(loaded["opt_state"])),
    )


def _as_dict(state: TrainState) -> Params:
    """Plain containers, the optimiser's leaves in order: a checkpoint outlives its classes."""
    return {
        "step": state.step,
        "trainable": state.trainable,
        "opt_state": {f"{i:04d}": leaf for i, leaf in enumerate(jax.tree.leaves(state.opt_state))},
    }
