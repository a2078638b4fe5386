"""Many hosts: one process each (or one an accelerator), joined by JAX's own runtime.

    distributed.initialize()          # first, before anything asks JAX for a device
    if distributed.is_first(): ...    # one of them prints, and writes what is written once

Alone, a process does as if none of this were here. Who is alone, and who is who, is read from what
the launcher set; `scripts/launch/` has launchers for one machine, TPU pods, Kubernetes and SLURM.
"""

import dataclasses
import glob
import importlib.util
import itertools
import os
import sys
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import numpy as np
from jax._src import distributed as runtime  # its barrier has no public name
from jax.experimental import multihost_utils

_ADDRESS, _COUNT, _RANK = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
# Where the others come from when there is an address: ours first, then what launchers set.
_COUNTS = (_COUNT, "OMPI_COMM_WORLD_SIZE", "SLURM_NTASKS")
_RANKS = (_RANK, "JOB_COMPLETION_INDEX", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID")

_waits = itertools.count()  # the same on all processes, which wait in the same order
_LONGEST = 3600  # seconds for the others to come; those that have died are known earlier


def initialize(*, timeout: int = 300, heartbeat: int | None = None) -> None:
    """Joins this process to the others of its run; does nothing alone, or the second time.

    In this order: JAX_COORDINATOR_ADDRESS ("host:port" of process 0), with JAX_NUM_PROCESSES and
    JAX_PROCESS_ID or the counts of Open MPI, SLURM or an indexed Kubernetes job; else what JAX
    finds by itself (SLURM, Open MPI 4, TPU pods, Kubernetes with the package `kubernetes`).
    JAX_NUM_PROCESSES=1 says that the process is alone, whatever else is set.

    Args:
      timeout: seconds to wait for the others.
      heartbeat: seconds without a sign of life after which a process counts as dead, and ends the
        others; DLLM_JAX_HEARTBEAT, or 100, by default.

    Raises:
      ValueError: variables are missing, or are no numbers that fit together.
      RuntimeError: JAX has been used before, the others did not come, or a pod cannot be found out.
    """
    if jax.distributed.is_initialized():
        return
    place = place_of(os.environ)
    if place is None:
        return
    jax.config.update("jax_cpu_collectives_implementation", "gloo")  # between CPU devices
    seconds = heartbeat or _number(os.environ, "DLLM_JAX_HEARTBEAT") or 100
    try:
        jax.distributed.initialize(
            place.address, place.processes, place.process,
            initialization_timeout=timeout, heartbeat_timeout_seconds=seconds,
            shutdown_timeout_seconds=max(seconds, 10),
        )  # fmt: skip
    except Exception as error:
        if place.maybe and "coordinator_address" in str(error):
            return  # a TPU, but none of a pod's
        raise RuntimeError(
            f"this process did not join its run ({place.why}): {error}. "
            f"Where it is meant to run alone, set {_COUNT}=1"
        ) from error
    _fail_at_once()


def is_first() -> bool:
    """Whether this process is the one that speaks and writes for all."""
    return jax.process_index() == 0


def any_process(flag: bool) -> bool:
    """Whether the flag is set on any process. All must ask, in the same order: all get one answer.

    On many processes it waits for the device's queue, as reading a result does.
    """
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.array([flag]))))


def fetched(tree: Any) -> Any:
    """Arrays as NumPy's, whole on every process, wherever their parts lie; all take part."""

    def one(x: Any) -> np.ndarray:
        if isinstance(x, jax.Array) and not x.is_fully_addressable:
            x = multihost_utils.process_allgather(x, tiled=True)
        return np.asarray(x)

    return jax.tree.map(one, tree)


def wait(name: str) -> None:
    """Returns when every process has come here; the devices are not asked.

    Raises:
      RuntimeError: another process has ended.
    """
    if jax.process_count() > 1:
        client = runtime.global_state.client
        assert client is not None
        client.wait_at_barrier(f"dllm_jax {next(_waits)} {name}", 1000 * _LONGEST)


def compile_together(function: partial, *args: Any) -> None:
    """Compiles a jitted function with its first arguments, and waits for the other processes.

    Their CPU devices (gloo) wait 30 seconds for each other in a first collective, and no longer:
    it must not begin here while another process compiles.
    """
    if jax.process_count() > 1:
        jitted: Any = function.func
        jitted.lower(*function.args, *args).compile()  # the call finds the program there
        wait("compiled")


def place(tree: Any, homes: Any) -> Any:
    """Host arrays, the same on every process, as global arrays with these shardings.

    Args:
      homes: the same tree of `jax.sharding.Sharding`s.
    """

    def one(x: Any, home: jax.sharding.Sharding) -> jax.Array:
        host = np.asarray(x)
        return jax.make_array_from_callback(host.shape, home, lambda index: host[index])

    return jax.tree.map(one, tree, homes)


@dataclasses.dataclass(frozen=True)
class Place:
    """What `jax.distributed.initialize` is told; None is for JAX to find out."""

    why: str
    address: str | None = None
    processes: int | None = None
    process: int | None = None
    maybe: bool = False  # it may turn out that there are no others


def place_of(environ: Mapping[str, str]) -> Place | None:
    """Where a process with these variables stands; None: alone.

    Raises:
      ValueError: as `initialize`.
    """
    if _number(environ, _COUNT) == 1:
        return None
    if _ADDRESS in environ:
        return _addressed(environ)
    if stray := [name for name in (_COUNT, _RANK) if name in environ]:
        raise ValueError(
            f"{' and '.join(stray)} without {_ADDRESS}: give all processes the host:port of process"
            f" 0, or set {_COUNT}=1 to run alone"
        )
    if "SLURM_STEP_NODELIST" in environ and (_number(environ, "SLURM_NTASKS") or 1) > 1:
        return Place("SLURM")
    if (_number(environ, "OMPI_COMM_WORLD_SIZE") or 1) > 1:
        if "OMPI_MCA_orte_hnp_uri" in environ:
            return Place("Open MPI")
        raise ValueError(
            "this Open MPI does not say where process 0 is (from version 5 on): "
            f"mpirun -x {_ADDRESS}=host:port, with the first host and a free port"
        )
    if _is_tpu(environ):
        return Place("TPU", maybe=True)
    # Indexed jobs may be many lone processes: who installs the package means them to be joined.
    indexed = "KUBERNETES_SERVICE_HOST" in environ and "JOB_COMPLETION_INDEX" in environ
    if indexed and importlib.util.find_spec("kubernetes"):
        return Place("Kubernetes")
    return None


def _fail_at_once() -> None:
    """An error that nobody catches ends the process, though others may be gone.

    Else it would wait for them at the exit, until their heartbeats are missed, and its launcher,
    which ends the rest and starts again, would wait too.
    """
    before = sys.excepthook

    def ending(kind, error, trace) -> None:
        before(kind, error, trace)
        me, count = jax.process_index(), jax.process_count()
        print(
            f"process {me} of {count} ends here. Where the error is of a connection or a collective"
            ", another process died first: see its log. Started again, a run goes on from its last"
            " checkpoint.",
            file=sys.stderr, flush=True,
        )  # fmt: skip
        sys.stdout.flush()
        os._exit(130 if issubclass(kind, KeyboardInterrupt) else 1)

    sys.excepthook = ending


def _addressed(environ: Mapping[str, str]) -> Place | None:
    address, port = environ[_ADDRESS].rpartition(":")[::2]
    if not address or not port.isdigit():
        raise ValueError(f"{_ADDRESS}={environ[_ADDRESS]!r} is not host:port")
    counted = next((name for name in _COUNTS if name in environ), None)
    ranked = next((name for name in _RANKS if name in environ), None)
    if counted is None and ranked is None and _is_tpu(environ):
        return Place("TPU", environ[_ADDRESS])
    if counted is None or ranked is None:
        missing = _COUNT if counted is None else _RANK
        raise ValueError(
            f"{_ADDRESS} is set, {missing} is not: a run of many processes needs "
            f"{_ADDRESS}, {_COUNT} and {_RANK} on each; unset all of them to run alone"
        )
    count, rank = _number(environ, counted), _number(environ, ranked)
    assert count is not None
    assert rank is not None
    if not 0 <= rank < count:
        raise ValueError(f"{ranked}={rank} is not one of {counted}={count} processes, from 0")
    if count == 1:
        return None
    return Place(f"{counted}={count}, {ranked}={rank}", environ[_ADDRESS], count, rank)


def _is_tpu(environ: Mapping[str, str]) -> bool:
    """Whether JAX would use a TPU here: chips, their library, and nobody against it."""
    wanted = environ.get("JAX_PLATFORMS", "")
    if wanted and "tpu" not in wanted.split(","):
        return False
    chips = glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*")
    return bool(chips) and importlib.util.find_spec("libtpu") is not None


def _number(environ: Mapping[str, str], name: str) -> int | None:
    if name not in environ:
        return None
    try:
        return int(environ[name])
    except ValueError:
        raise ValueError(f"{name}={environ[name]!r} is not a number") from None
