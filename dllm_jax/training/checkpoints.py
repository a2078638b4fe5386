"""The checkpoints of a run: one coordinated save, and a restore that trusts no file unseen.

Orbax writes a step under a temporary name, while training goes on, and renames it when all
processes are done: a step is there whole or not at all. It does not notice when bytes of an array
change afterwards. So each process adds the sums of what it wrote (`sums.<process>.json`), and
together they compare them before a step is restored.
"""

import json
import logging
import os
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from orbax.checkpoint import v1 as ocp

from dllm_jax import distributed
from dllm_jax.models.folders import files_in
from dllm_jax.models.tensors import leaves
from dllm_jax.sources import absolute
from dllm_jax.typing import Params

PathLike = str | os.PathLike[str]

_log = logging.getLogger(__name__)
_CHUNK = 1 << 24  # bytes of a file that are summed at a time
_DAMAGED = "damaged"


class Saver:
    """Saves the steps of a run, each while the next ones are trained."""

    def __init__(self, folder: PathLike, *, keep: int = 2, keep_every: int | None = None):
        """Takes over a folder: what a killed process left half written there is removed.

        Args:
          keep: so many of the newest steps stay when a new one is there.
          keep_every: steps that it divides stay too.
        """
        self._folder = absolute(folder)
        for path in self._folder.glob("*.orbax-checkpoint-tmp*"):
            if distributed.is_first():
                _log.warning("a save was cut short; its remains, %s, are removed", path)
        distributed.wait("the remains are seen")
        policies = ocp.training.preservation_policies
        kept: list[Any] = [policies.LatestN(keep)]
        if keep_every:
            kept.append(policies.EveryNSteps(keep_every))
        self._checkpointer = ocp.training.Checkpointer(
            self._folder,
            preservation_policy=policies.AnyPreservationPolicy(kept),  # pyrefly: ignore
            cleanup_tmp_directories=True,
        )
        self._thread = ThreadPoolExecutor(1)
        self._last: Future[None] | None = None
        self._step = self._checkpointer.latest.step if self._checkpointer.latest else 0

    def save(self, step: int, tree: Any, facts: dict[str, Any]) -> None:
        """Copies the arrays and returns; the writing goes on beside what follows.

        Nothing happens where this step, or none, is what the disk has. An error of the last save
        is raised here.
        """
        if step <= self._step:
            return
        self.wait()
        response = self._checkpointer.save_async(step, tree, force=True, custom_metadata=facts)
        assert response is not None
        self._last = self._thread.submit(self._seal, response, self._folder / str(step))
        self._step = step

    def wait(self) -> None:
        """Returns when the last save is on disk; raises its error."""
        if self._last is not None:
            self._last.result()
            self._last = None

    def close(self) -> None:
        """Waits for the last save, and ends the threads."""
        try:
            self.wait()
        finally:
            self._checkpointer.close()
            self._thread.shutdown()

    @staticmethod
    def _seal(response: Any, folder: epath.Path) -> None:
        """Waits until a step is whole, and adds the sums of this process's files."""
        response.result()
        me, count = jax.process_index(), jax.process_count()
        own = {name: list(_sum(path)) for name, path in _files(folder) if _writer(name) == me}
        text = json.dumps({"processes": count, "files": own})
        partial = folder / f"partial.{me}"
        partial.write_text(text)
        partial.rename(folder / f"sums.{me}.json")


def restore_newest(
    folder: PathLike, load: Callable[[epath.Path, int], Any], *, move: bool = True
) -> tuple[int, Any] | None:
    """The newest step that can be read, and what `load` makes of it; None without any step.

    A damaged step is skipped with a warning, and moved to the folder `damaged` beside the steps;
    it is deleted by nobody. All processes take the same step.

    Args:
      load: called with a step's folder and number. What it raises as `Unreadable` is damage too.
      move: False leaves damaged steps where they are.

    Raises:
      ValueError: there are steps, and none of them can be read.
    """
    root, damaged = absolute(folder), []
    for step in sorted(steps(root), reverse=True):
        loaded, reason = None, _damage(root / str(step))
        if not distributed.any_process(reason is not None):
            try:
                loaded = load(root / str(step), step)
            except Unreadable as error:
                reason = str(error)
            if not distributed.any_process(reason is not None):
                if move:
                    _set_aside(root, damaged)
                return step, loaded
        if reason is not None:
            _log.warning("the checkpoint of step %d is damaged: %s", step, reason)
        damaged.append(step)
    if damaged:
        raise ValueError(
            f"none of the checkpoints {sorted(damaged)} in {root} can be read (the warnings say"
            " why); restore one from a copy, or start again in another folder"
        )
    return None


def check_shared(folder: PathLike) -> None:
    """Raises ValueError where processes do not see the same folder of checkpoints."""
    if jax.process_count() == 1:
        return
    mark = absolute(folder) / "shared"
    if distributed.is_first():
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.write_text("")
    distributed.wait("a file is there")
    apart = distributed.any_process(not mark.exists())
    if distributed.is_first():
        mark.unlink()
    if apart:
        raise ValueError(
            f"{folder} is not the same folder on all {jax.process_count()} processes: put the "
            "checkpoints on a disk that they share, or in a bucket (gs://...)"
        )


class Unreadable(Exception):
    """A step that cannot be read."""


def read(path: epath.Path, target: Any, *, partial: bool = False) -> Any:
    """The arrays of a step, in the dtype and on the devices of `target`.

    Raises:
      Unreadable: a file is missing or damaged.
    """
    context = ocp.Context()
    context.pytree.loading.partial_load = partial
    try:
        with context:
            return ocp.load(path, target, checkpointable_name="state")
    except (PermissionError, TimeoutError, ConnectionError):
        raise  # says nothing of the step, which stays where it is
    except Exception as error:
        if "RESOURCE_EXHAUSTED" in str(error) or "out of memory" in str(error).lower():
            raise
        raise Unreadable(_first_line(error)) from error


def facts_of(path: epath.Path) -> tuple[Any, Any]:
    """The names and shapes of a step's arrays, and the facts saved with them.

    Raises:
      Unreadable: a file is missing or damaged.
    """
    try:
        found = ocp.metadata(path, checkpointable_name="state")
    except (PermissionError, TimeoutError, ConnectionError):
        raise
    except Exception as error:
        raise Unreadable(_first_line(error)) from error
    if not found.custom_metadata or found.metadata is None:
        raise Unreadable("its metadata is lost")
    return found.metadata, found.custom_metadata


def restore(
    run: PathLike,
    names: tuple[str, ...] | None = None,
    *,
    like: Params | None = None,
    dtype: Any = None,
    ema: bool = False,
) -> tuple[int, Params]:
    """Trained parameters from a run's newest readable checkpoint, and its step.

        step, trained = restore("runs/mine", ("adapter",), like=params)
        params = {**params, **trained}

    Nothing else is read, and nothing changed: another process may be training there.

    Args:
      run: the folder of a run (or a folder of checkpoints, such as `Fit.checkpoints`).
      names: top-level entries of the parameters; all that were trained by default.
      like: a tree with (at least) these entries, of arrays or `jax.ShapeDtypeStruct`s, whose
        sharding and dtype they get; by default they are as saved, on the default device.
      dtype: of all of them, instead.
      ema: their running average instead, which is in float32 by default.

    Raises:
      FileNotFoundError: there is no checkpoint.
      ValueError: a name was not trained, or `like` has other shapes, or no checkpoint is readable,
        or no average was kept.
    """
    root, entry = _root(run), "ema" if ema else "trainable"

    def load(path: epath.Path, step: int) -> Params:
        saved = facts_of(path)[0].get(entry)
        if saved is None:
            raise ValueError(f"{run} kept no average of its parameters (Fit.ema)")
        chosen = tuple(saved) if names is None else names
        if unknown := [name for name in chosen if name not in saved]:
            raise ValueError(f"{unknown} was not trained in {run}; there are {sorted(saved)}")
        entries = {name: saved[name] for name in chosen}
        given = entries
        if like is not None:
            given = {name: like[name] for name in chosen if name in like}
            check(entries, given, f"step {step} of {run} does not fit `like`", dtypes=False)
        target = jax.tree.map(lambda x: target_of(x, dtype), given)
        return read(path, {entry: target}, partial=True)[entry]

    found = restore_newest(root, load, move=False)
    if found is None:
        raise FileNotFoundError(f"{run} has no checkpoint")
    return found


def average(run: PathLike, last: int, *, like: Params | None = None) -> tuple[list[int], Params]:
    """The mean of what was trained, over a run's last checkpoints, and their steps.

    Sums are in float32, the result in the dtype and where `like` is (`restore`). `Fit.keep` says
    how many checkpoints a run keeps.

    Raises:
      FileNotFoundError: there are fewer.
      ValueError: one of them is damaged, or `like` has other shapes.
    """
    root = _root(run)
    chosen = sorted(steps(root))[-last:] if last > 0 else []
    if not chosen or len(chosen) < last:
        raise FileNotFoundError(
            f"{run} has {len(chosen)} checkpoints, not last={last}; see Fit.keep"
        )
    total: Any = None
    saved: Params = {}
    for step in chosen:
        path = root / str(step)
        if reason := _damage(path):
            raise ValueError(f"the checkpoint of step {step} is damaged: {reason}")
        try:
            saved = facts_of(path)[0]["trainable"]
            if like is not None:
                like = {name: like[name] for name in saved if name in like}
                check(saved, like, f"step {step} of {run} does not fit `like`", dtypes=False)
            homes = saved if like is None else like
            target = jax.tree.map(lambda x: target_of(x, jnp.float32), homes)
            found = read(path, {"trainable": target}, partial=True)["trainable"]
        except Unreadable as error:
            raise ValueError(f"the checkpoint of step {step} is damaged: {error}") from error
        total = found if total is None else jax.tree.map(jnp.add, total, found)
    dtypes = saved if like is None else like
    return chosen, jax.tree.map(lambda x, at: (x / last).astype(at.dtype), total, dtypes)


def _root(run: PathLike) -> epath.Path:
    """The folder of a run's checkpoints."""
    root = absolute(run)
    return root / "checkpoints" if (root / "checkpoints").exists() else root


def check(
    saved: Params, target: Params, what: str, advice: str = "", *, dtypes: bool = True
) -> None:
    """Raises ValueError when a checkpoint's arrays are not those that are wanted."""

    def shapes(tree: Params) -> dict[str, str]:
        kind = lambda x: x.dtype if dtypes else ""  # noqa: E731
        return {name: f"{kind(x)}{list(x.shape)}" for name, x in leaves(tree)}

    theirs, ours = shapes(saved), shapes(target)
    for name in sorted(theirs.keys() | ours.keys(), reverse=True):  # parameters first
        if theirs.get(name) != ours.get(name):
            raise ValueError(
                f"{what}: its {name} is {theirs.get(name, 'missing')}, here it is "
                f"{ours.get(name, 'missing')}{advice}"
            )


def steps(folder: epath.Path) -> list[int]:
    """The steps whose saves were finished."""
    if not folder.exists():
        return []
    return [int(path.name) for path in folder.iterdir() if path.name.isdigit()]


def target_of(x: Any, dtype: Any = None) -> jax.ShapeDtypeStruct:
    """What Orbax is to restore: as the array is, on the default device where it is on none."""
    home = getattr(x, "sharding", None)
    home = home if isinstance(home, jax.sharding.Sharding) else jnp.zeros(()).sharding
    return jax.ShapeDtypeStruct(x.shape, jnp.dtype(dtype or x.dtype), sharding=home)


def _set_aside(root: epath.Path, damaged: list[int]) -> None:
    """Moves damaged steps out of the way of those that will be saved."""
    if distributed.is_first():
        for step in damaged:
            (root / _DAMAGED).mkdir(exist_ok=True)
            home, number = root / _DAMAGED / str(step), 2
            while home.exists():
                home, number = root / _DAMAGED / f"{step}-{number}", number + 1
            (root / str(step)).rename(home)
            _log.warning("the checkpoint of step %d is skipped, and kept as %s", step, home)
    distributed.wait("damaged steps are set aside")


def _damage(folder: epath.Path) -> str | None:
    """What this process finds wrong in its share of a step's files; None: nothing.

    A step without sums was saved by a process that was killed right then (or by an older version):
    only reading it will tell.
    """
    me, count = jax.process_index(), jax.process_count()
    named: dict[str, list[int]] = {}
    for file in folder.glob("sums.*.json"):
        try:
            named |= json.loads(file.read_text())["files"]
        except (ValueError, KeyError) as error:
            return f"{file.name} cannot be read ({_first_line(error)})"
    for number, (name, (size, total)) in enumerate(sorted(named.items())):
        if number % count != me:
            continue
        if not (folder / name).exists():
            return f"{name} is missing"
        found = _sum(folder / name)
        if found[0] != size:
            return f"{name} has {found[0]} bytes where {size} were written"
        if found[1] != total:
            return f"{name} is not what was written: its sum is {found[1]:08x}, not {total:08x}"
    return None


def _files(folder: epath.Path) -> Iterator[tuple[str, epath.Path]]:
    """Every file of a step by its name within, but for the sums."""
    for path in files_in(folder):
        if not path.name.startswith(("sums.", "partial.")):
            yield str(path.relative_to(folder)), path


def _writer(name: str) -> int:
    """Which process wrote a file: Orbax gives each a folder, and the first one writes the rest."""
    for part in name.split("/"):
        if part.startswith("ocdbt.process_"):
            return int(part.removeprefix("ocdbt.process_"))
    return 0


def _sum(path: epath.Path) -> tuple[int, int]:
    """Bytes of a file, and their CRC-32."""
    size = total = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            size, total = size + len(chunk), zlib.crc32(chunk, total)
    return size, total


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0][:200] or type(error).__name__
