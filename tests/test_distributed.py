"""Who a process is by its environment, and real processes that train together."""

import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from dllm_jax import distributed, sharding
from tests import toy_training

ROOT = Path(__file__).resolve().parents[1]
LAUNCH = ROOT / "scripts" / "launch"
ADDRESS = {"JAX_COORDINATOR_ADDRESS": "host-0:8476"}


def place_of(monkeypatch, chips=(), **environ) -> distributed.Place | None:
    monkeypatch.setattr(distributed.glob, "glob", lambda pattern: list(chips))
    return distributed.place_of(environ)


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"JAX_NUM_PROCESSES": "1", "SLURM_STEP_NODELIST": "n[1-4]", "SLURM_NTASKS": "4"},
        {**ADDRESS, "JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"},
        {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"},  # in a job, but not started by srun
        {"SLURM_STEP_NODELIST": "n1", "SLURM_NTASKS": "1", "SLURM_PROCID": "0"},
        {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"},
        {"KUBERNETES_SERVICE_HOST": "10.0.0.1"},
    ],
)
def test_a_lone_process_is_alone(monkeypatch, environ):
    assert place_of(monkeypatch, **environ) is None


@pytest.mark.parametrize(
    ("environ", "count", "rank"),
    [
        ({"JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}, 4, 3),
        ({"JAX_NUM_PROCESSES": "4", "JOB_COMPLETION_INDEX": "2"}, 4, 2),
        ({"OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_RANK": "0"}, 8, 0),
        ({"SLURM_NTASKS": "2", "SLURM_PROCID": "1"}, 2, 1),
        # Ours win over what a launcher around them set.
        ({"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1", "SLURM_NTASKS": "9"}, 2, 1),
    ],
)
def test_with_an_address_the_rest_comes_from_whoever_knows_it(monkeypatch, environ, count, rank):
    place = place_of(monkeypatch, **ADDRESS, **environ)
    assert place is not None
    assert (place.address, place.processes, place.process) == ("host-0:8476", count, rank)


@pytest.mark.parametrize(
    ("environ", "why"),
    [
        ({"SLURM_STEP_NODELIST": "n[1-2]", "SLURM_NTASKS": "2", "SLURM_PROCID": "1"}, "SLURM"),
        (
            {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:9"},
            "Open MPI",
        ),
    ],
)
def test_what_jax_knows_by_itself_is_left_to_it(monkeypatch, environ, why):
    assert place_of(monkeypatch, **environ) == distributed.Place(why)


def test_a_tpu_is_asked_whether_it_is_one_of_a_pod(monkeypatch):
    monkeypatch.setattr(distributed.importlib.util, "find_spec", lambda name: object())
    tpu = distributed.Place("TPU", maybe=True)
    assert place_of(monkeypatch, chips=["/dev/accel0"]) == tpu
    assert place_of(monkeypatch, chips=["/dev/accel0"], JAX_PLATFORMS="tpu,cpu") == tpu
    assert place_of(monkeypatch, chips=["/dev/accel0"], JAX_PLATFORMS="cpu") is None
    addressed = place_of(monkeypatch, chips=["/dev/accel0"], **ADDRESS)
    assert addressed == distributed.Place("TPU", "host-0:8476")
    monkeypatch.setattr(distributed.importlib.util, "find_spec", lambda name: None)
    assert place_of(monkeypatch, chips=["/dev/accel0"]) is None


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"JAX_NUM_PROCESSES": "4"}, "JAX_NUM_PROCESSES without JAX_COORDINATOR_ADDRESS.*=1 to"),
        ({"JAX_PROCESS_ID": "0"}, "JAX_PROCESS_ID without JAX_COORDINATOR_ADDRESS"),
        (ADDRESS, "JAX_COORDINATOR_ADDRESS is set, JAX_NUM_PROCESSES is not"),
        ({**ADDRESS, "JAX_NUM_PROCESSES": "4"}, "is set, JAX_PROCESS_ID is not"),
        ({**ADDRESS, "JAX_NUM_PROCESSES": "x"}, "JAX_NUM_PROCESSES='x' is not a number"),
        (
            {**ADDRESS, "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "4"},
            "JAX_PROCESS_ID=4 is not one of JAX_NUM_PROCESSES=4 processes",
        ),
        (
            {"JAX_COORDINATOR_ADDRESS": "host", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"},
            "'host' is not host:port",
        ),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, r"mpirun -x JAX_COORDINATOR_ADDRESS=host:port"),
    ],
)
def test_half_an_environment_is_an_error_that_says_what_is_missing(monkeypatch, environ, message):
    with pytest.raises(ValueError, match=message):
        place_of(monkeypatch, **environ)


def test_alone_nothing_is_started_and_flags_are_their_own(monkeypatch):
    for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
        monkeypatch.delenv(name, raising=False)
    distributed.initialize()
    assert not jax.distributed.is_initialized()
    assert distributed.is_first()
    assert (distributed.any_process(True), distributed.any_process(False)) == (True, False)
    distributed.wait("nobody")


def test_host_arrays_are_placed_shard_by_shard():
    mesh = sharding.make_mesh(data=2, fsdp=4)
    homes = sharding.shardings({"w": ("embed", None), "b": (None,)}, mesh)
    given = {"w": np.arange(24.0).reshape(8, 3), "b": np.arange(2)}
    placed = distributed.place(given, homes)
    for name, home in homes.items():
        assert placed[name].sharding == home
        np.testing.assert_array_equal(placed[name], given[name])


# The launchers


@pytest.fixture
def local():
    spec = importlib.util.spec_from_file_location("launch_local", LAUNCH / "local.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def launched(*command: str, **changes: str) -> subprocess.CompletedProcess:
    """A launch by local.py, seen from outside."""
    return subprocess.run(
        [sys.executable, str(LAUNCH / "local.py"), *command],
        capture_output=True, text=True, timeout=300, env={**os.environ, **changes},
    )  # fmt: skip


def test_local_gives_each_process_the_variables_that_are_understood(local):
    code = "import os; print({k: v for k, v in os.environ.items() if k.startswith('JAX_')})"
    out = launched("3", "--devices", "2", "--gpu", "--", sys.executable, "-c", code)
    assert out.returncode == 0
    seen = [eval(line[4:]) for line in sorted(out.stdout.splitlines())]
    for rank, (line, environ) in enumerate(zip(sorted(out.stdout.splitlines()), seen, strict=True)):
        assert line.startswith(f"[{rank}] ")
        place = distributed.place_of(environ)
        assert place is not None
        assert (place.processes, place.process) == (3, rank)
        assert environ["JAX_LOCAL_DEVICE_IDS"] == str(rank)
        assert environ["JAX_NUM_CPU_DEVICES"] == "2"
    assert len({environ["JAX_COORDINATOR_ADDRESS"] for environ in seen}) == 1


def test_local_ends_the_others_when_one_fails():
    code = (
        "import os, sys, time; rank = int(os.environ['JAX_PROCESS_ID']); "
        "sys.exit(3) if rank == 1 else time.sleep(200)"
    )
    start = time.monotonic()
    out = launched("3", "--", sys.executable, "-c", code)
    assert out.returncode == 3
    assert "process 1 ended with code 3: ending the others" in out.stdout
    assert time.monotonic() - start < 100


@pytest.mark.slow
def test_the_command_trains_in_two_processes_and_an_error_of_one_ends_both(tmp_path):
    (tmp_path / "config.py").write_text("""
import dataclasses, os
from pathlib import Path
from dllm_jax.experiments import modes
from dllm_jax.tasks import Addition
whole = modes(Addition(digits=2), run=Path("run"), flops=1e9, layers=1, dim=16, heads=1).ar
whole = dataclasses.replace(whole, evaluations={})

@dataclasses.dataclass(frozen=True)
class Half:
    task: object = None

    def source(self, split):
        if os.environ["JAX_PROCESS_ID"] == "1":
            raise OSError("no such disk on this host")
        return whole.data.source(split)

half = dataclasses.replace(whole, run=Path("half"), data=Half())
""")
    train = (sys.executable, "-m", "dllm_jax", "train", f"{tmp_path / 'config.py'}:whole")
    out = launched("2", "--", *train, "--steps", "3", "--run", str(tmp_path / "run"))
    assert out.returncode == 0, out.stdout
    assert "[0] step 3: the model is in" in out.stdout
    begin = time.monotonic()
    train = (*train[:-1], f"{tmp_path / 'config.py'}:half")
    out = launched("2", "--", *train, "--steps", "3", "--run", str(tmp_path / "half"))
    assert out.returncode == 2
    assert "[1] dllm-jax: no such disk on this host" in out.stdout
    assert "process 1 ended with code 2: ending the others" in out.stdout
    assert time.monotonic() - begin < 90  # an orderly exit waits 100 seconds


def test_local_kills_those_that_do_not_listen():
    code = (
        "import os, signal, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
        "print('up', flush=True); "
        "os.kill(os.getpid(), 9) if os.environ['JAX_PROCESS_ID'] == '0' else time.sleep(200)"
    )
    out = launched("2", "--grace", "0.5", "--", sys.executable, "-c", code)
    assert out.returncode == 137


def test_the_other_launchers_parse():
    for script in ("tpu_vm.sh", "xpk.sh", "slurm.sbatch"):
        subprocess.run(["bash", "-n", str(LAUNCH / script)], check=True)
        out = subprocess.run(
            ["bash", str(LAUNCH / script)], capture_output=True, text=True, check=False
        )
        assert out.returncode == 2
        assert "scripts/" in out.stderr


def test_a_pod_of_the_job_set_finds_its_place(monkeypatch):
    text = (LAUNCH / "jobset.yaml").read_text()
    for name, value in {"NAME": "mine", "HOSTS": "4", "IMAGE": "i", "COMMAND": "true"}.items():
        text = text.replace(f"${{{name}}}", value)
    assert "${" not in text
    value = re.compile(r"- name: (JAX_\w+)\n\s+value: \"(.*)\"")
    environ = {**dict(value.findall(text)), "JOB_COMPLETION_INDEX": "2"}
    place = place_of(monkeypatch, **environ)
    assert place is not None
    assert (place.address, place.processes, place.process) == ("mine-host-0-0.mine:8476", 4, 2)
    assert "job-completion-index" in text.split("JAX_PROCESS_ID")[1].split("- ")[0]
    assert "completionMode: Indexed" in text


# Processes that train together


def together(processes: int, devices: int, run: Path, what: str) -> subprocess.CompletedProcess:
    """The toy run on that many processes."""
    return launched(
        str(processes), "--devices", str(devices), "--",
        sys.executable, str(ROOT / "tests" / "toy_training.py"), str(run), what,
        PYTHONPATH=str(ROOT), JAX_PLATFORMS="cpu", JAX_DISABLE_MOST_OPTIMIZATIONS="1",
    )  # fmt: skip


def test_two_processes_stop_together_and_one_goes_on(tmp_path):
    toy_training.write(tmp_path)
    run, alone = tmp_path / "run", tmp_path / "alone"
    out = together(2, 2, run, "term")
    assert out.returncode == 0, out.stdout
    for rank in range(2):  # one had the signal, both have stopped, after the same step
        assert f"[{rank}] {rank} of 2: step 5" in out.stdout
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["3", "5"]
    assert (run / "checkpoints" / "5" / "sums.1.json").exists()  # both wrote, both vouch
    toy_training.fit(run)  # here, on one device
    whole = toy_training.fit(alone)
    assert int(whole.step) == 12
    np.testing.assert_allclose(toy_training.losses(run), toy_training.losses(alone), rtol=1e-5)


@pytest.mark.slow
def test_two_processes_choose_an_interval_of_noise_together(tmp_path):
    """By the command; the variances are those that one process finds."""
    config = str(ROOT / "tests" / "toy_config.py:tuned")
    command = [sys.executable, "-m", "dllm_jax", "train", config, "--run"]
    environ = {
        "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }  # fmt: skip
    alone = subprocess.run([*command, tmp_path / "one"], env={**os.environ, **environ})
    both = launched("2", "--", *command, str(tmp_path / "two"), **environ)
    assert (alone.returncode, both.returncode) == (0, 0), both.stdout
    files = (tmp_path / run / "interval-2.json" for run in ("one", "two"))
    one, two = (np.array(json.loads(file.read_text())["variances"]) for file in files)
    np.testing.assert_allclose(two, one, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "message"),
    [("fail", "ZeroDivisionError"), ("apart", "is not the same folder on all 2 processes")],
)
def test_a_process_that_fails_ends_all_at_once(tmp_path, what, message):
    toy_training.write(tmp_path)
    start = time.monotonic()
    out = together(2, 2, tmp_path / "run", what)
    assert out.returncode == 1
    assert message in out.stdout
    assert "of 2 ends here" in out.stdout
    assert time.monotonic() - start < 240


@pytest.mark.slow
def test_killed_hosts_go_on_on_the_same_curve(tmp_path):
    """scripts/bench/kill_hosts.py, with a checkpoint damaged before the second stage."""
    path = ROOT / "scripts" / "bench" / "kill_hosts.py"
    spec = importlib.util.spec_from_file_location("kill_hosts", path)
    bench = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = bench  # dataclasses look their module up
    spec.loader.exec_module(bench)
    stages = (bench.Stage(2, "KILL"), bench.Stage(4, "TERM", before="flip"), bench.Stage(1, "END"))
    config = bench.Kill(run=tmp_path, steps=40, save_every=3, devices=4, out=tmp_path / "report")
    report = bench.main(config, stages)
    for part in report["compared"]:
        assert part["loss"] < 1e-3
        assert part["last_loss"] < 0.7 * part["first_loss"]
        assert [stage["exit_code"] for stage in part["stages"]][-1] == 0
    killed, damaged, _ = report["compared"][0]["stages"]
    assert killed["exit_code"] == 137
    assert any("is not what was written" in line for line in damaged["told"])
    assert "Told about the damage" in (tmp_path / "report.md").read_text()
