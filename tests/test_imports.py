"""What may import what."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def run(code: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_layers():
    """The contracts of import-linter, in pyproject.toml: imports only point down."""
    result = run("import importlinter.cli as lint; exit(lint.lint_imports(no_cache=True))")
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("package", "strangers"),
    [
        ("dllm_jax", {"torch", "tensorflow", "transformers", "matplotlib"}),
        ("pallas_kernels", {"dllm_jax", "flax", "optax", "orbax"}),
    ],
)
def test_import_stays_light(package: str, strangers: set[str]):
    result = run(f"import sys, {package}; print(*sys.modules.keys() & {strangers!r})")
    assert result.returncode == 0, result.stderr
    assert not result.stdout.split(), f"import {package} also imports {result.stdout}"
