"""A training run, on one process or on many.

A run is a folder:

    <run>/checkpoints/   Orbax: the trained parameters, the optimiser, and the position in the data
    <run>/settings.json  what the run is of, in words, as it was last started
    <run>/metrics.jsonl  one line a logged step
    <run>/samples.jsonl  what evaluations wrote in words
    <run>/spikes/        batches of steps that were not applied
    <run>/loss.png       the curve, when matplotlib is there

Interrupted (SIGTERM, SIGINT) it saves and returns; killed, it falls back to the last checkpoint.
Started again on the same folder it continues on the numbers of an uninterrupted run, on as many
processes as there are then: a step's batch and noise are functions of (seed, step), and what each
process reads of the batch follows from where its devices stand in the mesh.
"""

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import optax

from dllm_jax import distributed, files
from dllm_jax.data import Source, batches
from dllm_jax.losses import Objective
from dllm_jax.sharding import EVERY, Rules, scope
from dllm_jax.sources import absolute
from dllm_jax.training import checkpoints, curves, records
from dllm_jax.training.feed import Feed, training_mesh, what_is_cut
from dllm_jax.training.identity import check_same, described
from dllm_jax.training.reports import reports
from dllm_jax.training.spikes import Spike, Started, Watch
from dllm_jax.training.step import WINDOW, TrainState, make_train_step, trained, with_extras
from dllm_jax.training.throughput import Meter, step_flops
from dllm_jax.typing import Key, Params

Found = Mapping[str, float | str | Sequence[str]]
Evaluation = Callable[[Params, int], Found]
"""Figures of parameters at a step, and samples: strings."""


OnSpike = Literal["stop", "skip", "ignore"]


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
    ema: float = 0.0
    """Decay of a running average of the parameters, which is evaluated; 0: there is none."""
    on_spike: OnSpike = "stop"
    """A step whose loss or gradient is not finite, or a spike: it is not applied, its batch is
    kept, and the run stops or goes on; ignore: it is applied."""
    spike: float = 0.0
    """A loss so many times the median of the last 32 is a spike; 0: none is."""
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
    """Many processes look for signals, and at the clock, at logged steps only. A spike is seen at
    the next step that is logged, evaluated or saved; what was started behind it is not applied."""
    evaluate_every: int = 100
    """And at the last step; 0: never."""
    heldout_rows: int = 64
    """So many held-out rows at most are read for their loss."""
    peak_flops: float | None = None
    """FLOP/s of one device at most; given, the metrics tell the share that is used (mfu)."""
    report: tuple[str, ...] = ()
    """Where figures go besides metrics.jsonl: tensorboard, wandb, trackio."""

    def __post_init__(self):
        looks = ("save_every", "keep", "log_every", "heldout_rows")
        for name in ("steps", "batch", "length", "accumulate", *looks):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.evaluate_every < 0:
            raise ValueError(f"evaluate_every={self.evaluate_every}: 0 is never, 1 every step")
        if self.on_spike not in ("stop", "skip", "ignore"):
            raise ValueError(f"on_spike={self.on_spike!r} is not stop, skip or ignore")
        if self.on_spike == "ignore" and self.spike:
            raise ValueError(
                f"spike={self.spike} does nothing where on_spike is ignore: stop or skip"
            )


def fit(
    run: Path,
    config: Fit,
    model: Any,
    params: Params,
    state: TrainState,
    objective: Objective,
    tx: optax.GradientTransformation,
    source: Source,
    heldout: Source | None = None,
    *,
    rules: Rules = EVERY,
    evaluations: Mapping[str, Evaluation] | None = None,
    about: Mapping[str, Any] | None = None,
    begins: int = 0,
    settings: Mapping[str, Any] | None = None,
) -> TrainState:
    """Trains until `config.steps`, the time budget, or a signal; continues what the folder holds.

    Parameters on a mesh are trained there: the batch is split by `rules`, and each process reads
    the rows of its own devices. The processes stop together, at the first one's clock or at a
    signal to any of them.

    Args:
      params: those that are not trained, on one device or on a mesh; with many processes, on one of
        them all. Those that `state` trains may be among them: they then stay in memory twice.
      state: a fresh state (`create`), which is donated; replaced by the folder's newest checkpoint
        when there is one.
      rules: those that the parameters were placed by.
      evaluations: what is asked of all parameters (of their average, where one is kept) every
        `config.evaluate_every` steps, by all processes. Numbers go into the metrics as
        `<name>_<figure>`, strings into samples.jsonl.
      about: what the run is of, by name: the settings of its data, say. They are kept in words
        (`identity.described`), and others do not go on from there. The objective, by default.
      begins: the step from which on the model and the objective are these: losses of before say
        nothing of what is a spike.
      settings: more to tell people of the run than `config` and `about`, in words and numbers, by
        name: its optimiser, say. All goes to settings.json, and to what `config.report` names.

    Returns:
      The last state, which is also on disk when any step was made. What it trained is
      `trained(state)`.

    Raises:
      ValueError: the folder holds a run of other parameters, an optimiser that keeps other things
        (another learning rate is welcome, and `ema` or `spike` that it had not), another seed,
        batch, length, number of rows or `about`, or no checkpoint of it can be read; or the batch
        does not fit the mesh; or, cut at the length, no row has anything to learn. A new number of
        steps is welcome: the schedule follows it. So is another mesh.
      Spike: a step was not applied, and `config.on_spike` is stop; or `WINDOW` one after the other
        were not.
      ModuleNotFoundError: what `config.report` names is not installed.
    """
    if config.length > model.config.max_length:
        raise ValueError(
            f"length={config.length} is more than the model's max_length={model.config.max_length}"
        )
    cuts = what_is_cut(source, config.length)
    if cuts and not int(state.step) and distributed.is_first():  # once, of many phases
        print(cuts)
    run.mkdir(parents=True, exist_ok=True)
    placed = {**params, **state.trainable}
    mesh = training_mesh(placed)
    feed = Feed(config.batch, mesh, rules, parts=config.accumulate)
    shape = dict(batch=config.batch, length=config.length)
    pad_id = model.config.pad_id
    data = batches(source, pad_id=pad_id, seed=config.seed, rows=feed.rows, **shape)
    guarded, stops = config.on_spike != "ignore", config.on_spike == "stop"
    step = make_train_step(
        model, objective, tx, accumulate=config.accumulate, ema=config.ema,
        spike=config.spike if guarded else None, stop=stops,
    )  # fmt: skip
    extras = partial(with_extras, ema=config.ema > 0, losses=config.spike > 0, stopped=stops)
    state = extras(state)
    asked: dict[str, Evaluation] = dict(evaluations or {})
    if heldout is not None:
        look = partial(
            evaluate, model, objective=objective, source=heldout, rules=rules,
            batch=config.batch // config.accumulate, length=config.length,
            limit=config.heldout_rows,
        )  # fmt: skip
        asked = {"heldout": lambda params, step: look(params), **asked}
    key = jax.random.key(config.seed)
    budget = float("inf") if config.minutes is None else 60 * config.minutes
    deadline = time.monotonic() + budget
    about = {"objective": objective} if about is None else about
    own = {name: described(thing) for name, thing in about.items()}
    own |= {"seed": config.seed, **shape, "rows": len(source)}
    told = {**dataclasses.asdict(config), **own, **(settings or {})}
    folder = absolute(config.checkpoints or run / "checkpoints")
    first, alone = distributed.is_first(), jax.process_count() == 1
    watch = Watch(run, key, stops=stops)
    meter = Meter(*_rates(config, model, objective, state, 1 if mesh is None else mesh.size))
    with scope(placed), records.interrupts() as interrupted:
        del placed
        state = extras(_restore(folder, state, data, own))
        done = began = int(state.step)
        if first:
            files.write(run / "settings.json", json.dumps(told, indent=1) + "\n")
        if done == begins and state.losses is not None:
            state = dataclasses.replace(state, losses=state.losses * float("nan"))

        def stop() -> bool:
            if not alone and done % config.log_every:
                return False
            over = first and time.monotonic() >= deadline
            return distributed.any_process(over or interrupted())

        def write(step: int, figures: dict[str, float]) -> dict[str, float]:
            figures = records.known(figures)
            log({"step": step, **figures})
            report(step, figures)
            return figures

        with (
            _saver(folder, config) as saver,
            records.metrics(run / "metrics.jsonl", done) as log,
            _samples(run, done, evaluations) as tell,
            reports(run, config.report, told) as report,
            records.progress(config.steps, done) as show,
        ):

            def check(state: TrainState) -> None:
                refused = watch.look()
                if stops and refused:
                    one, path = refused[0]
                    its = jax.device_get(one.figures)
                    found = meter.look() | {name: float(x) for name, x in its.items()}
                    write(one.number, found)
                    _save(saver, one.number - 1, state, one.position, own)
                    saver.wait()
                    raise _spike(one.number, found, folder, path)

            while done < config.steps and not stop():
                position = data.get_state()
                given = feed.place(next(data))
                if done == began:
                    distributed.compile_together(step, state, params, given, key)
                state, figures = step(state, params, given, key)
                done += 1
                meter.add(figures)
                if guarded:
                    watch.add(Started(done, given, position, figures))
                logged = done % config.log_every == 0 or done == config.steps
                every = config.evaluate_every if asked else 0
                due = every > 0 and (done == config.steps or done % every == 0)
                if logged or due or done % config.save_every == 0:
                    check(state)
                if logged:
                    show(done, write(done, meter.look()))
                    if watch.in_a_row >= WINDOW:
                        _save(saver, done, state, data.get_state(), own)
                        saver.wait()
                        raise Spike(
                            f"{watch.in_a_row} steps up to step {done} were not applied, one after "
                            f"the other: their batches are in {run / 'spikes'}"
                        )
                if due:
                    with meter.pause():
                        whole = {**params, **trained(state)}
                        for name, ask in asked.items():
                            numeric, samples = _told(name, ask(whole, done))
                            write(done, numeric)
                            for row in samples:
                                tell({"step": done, **row})
                if done % config.save_every == 0:
                    with meter.pause():
                        _save(saver, done, state, data.get_state(), own)
            check(state)
            if meter.holds:
                write(done, meter.look())
            _save(saver, done, state, data.get_state(), own)
    if first:
        curves.plot(run)
    return dataclasses.replace(state, stopped=None)  # for steps of anybody's own


def evaluate(
    model: Any, params: Params, objective: Objective, source: Source, *, batch: int,
    length: int, seed: int = 0, limit: int = 64, rules: Rules = EVERY,
) -> dict[str, float]:  # fmt: skip
    """The loss and the figures of the objective on held-out rows: means of whole batches.

    A figure that is NaN in a batch, for there was nothing to count, is the mean of the others.
    The same rows and noise for the same seed. At most `limit` rows are read, in batches of at most
    `batch`; those that fill no batch are left out.
    """
    key, rows = jax.random.key(seed), []
    measure = partial(_figures, model, objective)
    given = looked_at(model, params, source, batch, length, seed=seed, limit=limit, rules=rules)
    with scope(params):
        for i, one in enumerate(given):
            own = params, one, jax.random.fold_in(key, i)
            if i == 0:
                distributed.compile_together(measure, *own)
            rows.append(jax.device_get(measure(*own)))
    return {name: _mean(name, np.array([row[name] for row in rows])) for name in rows[0]}


def looked_at(
    model: Any, params: Params, source: Source, batch: int, length: int, *, seed: int, limit: int,
    rules: Rules = EVERY,
) -> Iterator[dict[str, jax.Array]]:  # fmt: skip
    """Whole batches of at most `batch` rows, of at most `limit` rows, where the parameters are."""
    batch = min(batch, limit, len(source))
    feed = Feed(batch, training_mesh(params), rules, whole=True)
    pad_id = model.config.pad_id
    data = batches(source, batch=batch, length=length, pad_id=pad_id, seed=seed, rows=feed.rows)
    for _ in range(min(limit, len(source)) // batch):
        yield feed.place(next(data))


def _mean(name: str, values: np.ndarray) -> float:
    """Of a figure's values by batch those that are numbers; of a loss all, so that NaN is seen."""
    told = values if name == "loss" else values[~np.isnan(values)]
    return float(told.mean()) if told.size else float("nan")


@partial(jax.jit, static_argnums=(0, 1))  # compiled once, however often a run evaluates
def _figures(model: Any, objective: Objective, params: Params, batch, key: Key):
    loss, figures = objective.loss(model, params, batch, key)
    return {"loss": loss, **figures}


def _samples(run: Path, done: int, evaluations: Any) -> Any:
    """As `records.metrics`; a run without evaluations has no file of samples."""
    if not evaluations:
        return contextlib.nullcontext(lambda row: None)
    return records.metrics(run / "samples.jsonl", done)


@contextlib.contextmanager
def _saver(folder: checkpoints.PathLike, config: Fit) -> Iterator[checkpoints.Saver]:
    saver = checkpoints.Saver(folder, keep=config.keep, keep_every=config.keep_every)
    try:
        yield saver
    except BaseException:
        # The others may be gone, and a save that waits for them would not end.
        if jax.process_count() == 1:
            saver.close()
        raise
    saver.close()


def _save(saver: checkpoints.Saver, step: int, state: TrainState, position, own) -> None:
    saver.save(step, _as_dict(state), {"data": position, "numbers": own})


def _restore(
    folder: checkpoints.PathLike, state: TrainState, data, own: dict[str, Any]
) -> TrainState:
    """The newest readable checkpoint, with `data` set to its position; else the given state."""
    target = jax.tree.map(checkpoints.target_of, _as_dict(state))
    checkpoints.check_shared(folder)
    advice = "; continue it with the settings it was started with, or choose another folder"

    def load(path, step: int) -> tuple[Params, dict[str, Any]]:
        saved, facts = checkpoints.facts_of(path)
        what = f"the checkpoint of step {step} does not fit this run"
        wanted = {k: x for k, x in target.items() if k in saved or k not in _EXTRAS}
        checkpoints.check(saved, wanted, what, advice)
        check_same(facts["numbers"], own)
        for leaf in jax.tree.leaves(state):  # make room
            leaf.delete()
        return checkpoints.read(path, wanted), facts

    found = checkpoints.restore_newest(folder, load)
    if found is None:
        return state
    loaded, facts = found[1]
    data.set_state(facts["data"])
    optimiser = jax.tree.structure(state.opt_state)
    moments = jax.tree.unflatten(optimiser, jax.tree.leaves(loaded.pop("opt_state")))
    return TrainState(opt_state=moments, **loaded)


_EXTRAS = ("ema", "losses")  # what a run may be given on its way (`with_extras`)


def _as_dict(state: TrainState) -> Params:
    """Plain containers, the optimiser's leaves in order: a checkpoint outlives its classes."""
    extras = {name: getattr(state, name) for name in _EXTRAS}
    return {
        "step": state.step,
        "trainable": state.trainable,
        "opt_state": {f"{i:04d}": leaf for i, leaf in enumerate(jax.tree.leaves(state.opt_state))},
        **{name: extra for name, extra in extras.items() if extra is not None},
    }


def _rates(
    config: Fit, model: Any, objective: Any, state: TrainState, devices: int
) -> tuple[float | None, float | None]:
    """FLOPs of a step, and of all devices in a second; None where they are not known."""
    if config.peak_flops is None:
        return None, None
    flops = step_flops(model.config, state.trainable, objective, config.batch, config.length)
    return flops, config.peak_flops * devices


def _told(name: str, found: Found) -> tuple[dict[str, float], list[dict[str, str]]]:
    """What an evaluation found: numbers for the metrics, and rows of samples."""
    numbers: dict[str, float] = {}
    samples: list[dict[str, str]] = []
    for figure, value in found.items():
        if isinstance(value, str):
            value = [value]
        if isinstance(value, Sequence):
            samples += [{"name": f"{name}_{figure}", "text": text} for text in value]
        else:
            numbers[f"{name}_{figure}"] = float(value)
    return numbers, samples


def _spike(done: int, figures: dict[str, float], folder: Any, path: Path) -> Spike:
    before = f"is checkpoint {done - 1} of {folder}" if done > 1 else "is a fresh one, not kept"
    return Spike(
        f"step {done} is not applied: its loss is {figures['loss']:.4g}, the norm of its gradient "
        f"{figures['grad_norm']:.4g}. Its batch and key are in {path} (training.read_spike), the "
        f"state before it {before}. To go on without this batch, "
        "start again with on_spike=skip"
    )
