"""Every test sees eight CPU devices, repeatable examples, and the goldens if there are any."""

import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest
from hypothesis import HealthCheck, settings

from dllm_jax.testing.aot import has_compiler

# Before any backend starts. The devices are virtual: a test process has no more cores than before.
jax.config.update("jax_num_cpu_devices", 8)
# Tests compile many tiny programs and run each a few times.
jax.config.update("jax_disable_most_optimizations", True)

_MOST_MAPS = 20_000

# The first example compiles, so there is no deadline.
settings.register_profile(
    "house",
    deadline=None,
    derandomize=bool(os.environ.get("CI")),
    max_examples=25,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("house")


@pytest.fixture
def optimised():
    """Programs as they run outside of tests: for models whose passes cost more than compiling."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


def pytest_runtest_teardown() -> None:
    """Compiled programs are unloaded before the kernel runs out of memory maps for them.

    Each takes several of the 65,530 that Linux gives a process; the next one then kills it.
    """
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_text().count("\n") > _MOST_MAPS:
        jax.clear_caches()


def pytest_runtest_setup(item: pytest.Item) -> None:
    for device in ("gpu", "tpu"):
        if item.get_closest_marker(device) and jax.default_backend() != device:
            pytest.skip(f"needs a {device.upper()}; JAX runs on {jax.default_backend()}")
    if aot := item.get_closest_marker("aot"):
        platform, target = aot.args[0], {"tpu": "aot", "cuda": "aot-cuda"}[aot.args[0]]
        if not has_compiler(platform):
            pytest.skip(f"the compiler for {platform} is not installed; run `make {target}`")
        jax.config.update("jax_disable_most_optimizations", False)  # the programs that run there


@pytest.fixture(scope="session")
def goldens() -> Path:
    """The folder of what the published code answered on tiny weights, one folder a family."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "goldens"
    folder = Path(os.environ.get("DLLM_JAX_GOLDENS", beside))
    if not folder.is_dir():
        pytest.skip(f"no goldens at {folder}; set DLLM_JAX_GOLDENS to their folder")
    return folder
