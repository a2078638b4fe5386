"""Starts N processes of one run on this machine.

    python scripts/launch/local.py 2 -- dllm-jax adapt configs/adapt_smollm2.py:cpu
    python scripts/launch/local.py 4 --devices 2 -- python ...     # with two CPU devices each
    python scripts/launch/local.py 8 --gpu -- python ...           # with one GPU each

Each line of output gets its process's number in front. SIGTERM and SIGINT are passed on. When one
process fails the others are ended, and so it fails too, with that one's exit code.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import threading
import time


def main(argv: list[str] | None = None) -> int:
    """Runs to the end of all processes; returns 0, or the exit code of the first that failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("processes", type=int)
    parser.add_argument("--devices", type=int, help="CPU devices of each process")
    parser.add_argument("--gpu", action="store_true", help="process i gets GPU i alone")
    parser.add_argument("--grace", type=float, default=20, help="seconds between TERM and KILL")
    parser.add_argument("command", nargs="+", help="what to run, behind --")
    given = parser.parse_args(argv)
    address = f"127.0.0.1:{free_port()}"
    processes = [start(rank, address, given) for rank in range(given.processes)]
    printers = [threading.Thread(target=prefix, args=pair) for pair in enumerate(processes)]
    for printer in printers:
        printer.start()

    def forward(number: int, _) -> None:
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, forward)
    code = wait(processes, given.grace)
    for printer in printers:
        printer.join()
    return code


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(rank: int, address: str, given: argparse.Namespace) -> subprocess.Popen:
    """One process, with the variables that `dllm_jax.distributed.initialize` reads."""
    environment = {
        **os.environ,
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_NUM_PROCESSES": str(given.processes),
        "JAX_PROCESS_ID": str(rank),
        "PYTHONUNBUFFERED": "1",
    }
    if given.devices:
        environment["JAX_NUM_CPU_DEVICES"] = str(given.devices)
    if given.gpu:
        environment["JAX_LOCAL_DEVICE_IDS"] = str(rank)
    # A session of its own: Ctrl-C reaches it once, from us.
    return subprocess.Popen(
        given.command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        start_new_session=True,
    )  # fmt: skip


def prefix(rank: int, process: subprocess.Popen) -> None:
    """Prints a process's lines with its number."""
    assert process.stdout is not None
    for line in process.stdout:
        text = f"[{rank}] {line.decode(errors='replace')}"
        sys.stdout.write(text if text.endswith("\n") else text + "\n")
        sys.stdout.flush()


def wait(processes: list[subprocess.Popen], grace: float) -> int:
    """Until all have ended; once one has failed, the others get SIGTERM, and later SIGKILL."""
    failed, deadline = 0, float("inf")
    while True:
        codes = [process.poll() for process in processes]
        left = [p for p, code in zip(processes, codes, strict=True) if code is None]
        if not left:
            break
        if not failed and any(codes):
            rank, failed = next((rank, code) for rank, code in enumerate(codes) if code)
            print(f"process {rank} ended with code {failed}: ending the others", flush=True)
            deadline = time.monotonic() + grace
            for process in left:
                process.terminate()
        if time.monotonic() > deadline:
            for process in left:
                process.kill()
        time.sleep(0.05)
    code = failed or next((code for code in codes if code), 0)
    return code if code >= 0 else 128 - code  # as shells have it


if __name__ == "__main__":
    sys.exit(main())
