"""How long a start takes from the GGUF file and from Orbax, and what a bad checkpoint is told.

    python scripts/bench/checkpoints.py --out scripts/bench/results/checkpoints

Seconds are those of `load` in a fresh process each, imports left out. The faults are made on copies
of a tiny model and of the GGUF file. Writes <out>.json and <out>.md.
"""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import tyro
from safetensors.numpy import load_file, save_file

import dllm_jax as dj
from dllm_jax import sources
from dllm_jax.testing import tiny

NAME = "smollm2-135m-instruct"
TIMED = (
    "import time, jax, dllm_jax as dj; dj.load; s = time.perf_counter();"
    f"jax.block_until_ready(dj.load({NAME!r}, adapter=None)[1]); print(time.perf_counter() - s)"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoints:
    """What to run."""

    out: Path
    """Where the results go, without a suffix."""
    repeat: int = 3


def main(config: Checkpoints) -> None:
    """Runs everything and writes the files."""
    with tempfile.TemporaryDirectory() as folder:
        seconds = starts(Path(folder) / "cache", config.repeat)
        told = {name: message(make) for name, make in faults(Path(folder))}
    report = {"seconds": seconds, "faults": told}
    config.out.parent.mkdir(parents=True, exist_ok=True)
    config.out.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    lines = ["| start | seconds of `load` |", "|---|---|"]
    lines += [f"| {name} | {', '.join(f'{s:.2f}' for s in row)} |" for name, row in seconds.items()]
    lines += ["", "| fault | what is said |", "|---|---|"]
    lines += [f"| {name} | {text} |" for name, text in told.items()]
    config.out.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def starts(cache: Path, repeat: int) -> dict[str, list[float]]:
    """Seconds of the first start (reads the GGUF file, fills the cache) and of the next ones."""
    first, later = [], []
    for _ in range(repeat):
        shutil.rmtree(cache, ignore_errors=True)
        first.append(_timed(cache))
        later.append(_timed(cache))
    return {"from the GGUF file, converting": first, "restored from Orbax": later}


def _timed(cache: Path) -> float:
    environment = {**os.environ, "DLLM_JAX_CACHE": str(cache), "JAX_PLATFORMS": "cpu"}
    found = subprocess.run(
        [sys.executable, "-c", TIMED], env=environment, check=True, capture_output=True, text=True
    )
    return float(found.stdout.split()[-1])


def message(make: Callable[[], str | Path]) -> str:
    """What `load` says of the source that `make` spoils."""
    source = make()
    try:
        dj.load(source)
    except (ValueError, FileNotFoundError) as error:
        where = str(Path(source).parent)
        return f"{type(error).__name__}: {error}".replace(where + "/", "").replace("|", "\\|")
    return "nothing: it loaded"


def faults(root: Path) -> Iterator[tuple[str, Callable[[], str | Path]]]:
    """Names of faults, and functions that make them."""
    model, params = tiny(adapter=False, mask_id=None)
    dj.save(root / "good", model, params)
    published = root / "published"
    _publish(published)
    gguf = Path(str(sources.resolve(NAME).path))

    def ours(name: str, change: Callable[[Path], None]):
        def make() -> Path:
            folder = root / name
            shutil.copytree(root / "good", folder)
            change(folder)
            return folder

        return make

    def theirs(name: str, **changes: np.ndarray | None):
        def make() -> Path:
            folder = root / name
            shutil.copytree(published, folder)
            tensors = load_file(folder / "model.safetensors")
            for tensor, value in changes.items():
                tensors.pop(tensor.replace("__", "."), None)
                if value is not None:
                    tensors[tensor.replace("__", ".")] = value
            save_file(tensors, folder / "model.safetensors")
            return folder

        return make

    def config(folder: Path, **changes) -> None:
        facts = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**facts, **changes}))

    def biggest(folder: Path) -> Path:
        return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)

    def cut(source: Path, name: str) -> Path:
        path = root / name
        path.write_bytes(source.read_bytes()[: source.stat().st_size // 2])
        return path

    def cut_inside(folder: Path) -> None:
        file = biggest(folder)
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])

    def cut_published() -> Path:
        folder = root / "cut-published"
        shutil.copytree(published, folder)
        cut_inside(folder)
        return folder

    def other_type() -> Path:
        folder = root / "other-type"
        shutil.copytree(published, folder)
        config(folder, model_type="mamba")
        return folder

    wide = np.zeros((3, 3), np.float32)
    yield "no such model", lambda: "no/such-model"
    yield "GGUF cut in half", lambda: cut(gguf, "half.gguf")
    yield "safetensors cut in half", cut_published
    yield "tensor missing", theirs("missing", model__norm__weight=None)
    yield "tensor too many", theirs("extra", model__norm__bias=wide)
    yield "tensor misshapen", theirs("misshapen", model__norm__weight=wide)
    yield "unknown model_type", other_type
    yield "Orbax file cut in half", ours("cut", cut_inside)
    yield "Orbax file missing", ours("gone", lambda f: biggest(f).unlink())
    yield "config.json missing", ours("bare", lambda f: (f / "config.json").unlink())
    yield "config.json of a later version", ours("later", lambda f: config(f, version=2))


def _publish(folder: Path) -> None:
    """A tiny Llama as its authors would publish it."""
    rng, size = np.random.default_rng(0), 8
    shapes = {
        "model.embed_tokens.weight": (32, size), "model.norm.weight": (size,),
        "lm_head.weight": (32, size),
    }  # fmt: skip
    layer = {
        "input_layernorm": (size,), "post_attention_layernorm": (size,),
        "self_attn.q_proj": (size, size), "self_attn.k_proj": (size, size),
        "self_attn.v_proj": (size, size), "self_attn.o_proj": (size, size),
        "mlp.gate_proj": (16, size), "mlp.up_proj": (16, size), "mlp.down_proj": (size, 16),
    }  # fmt: skip
    shapes |= {f"model.layers.0.{name}.weight": shape for name, shape in layer.items()}
    folder.mkdir()
    tensors = {k: rng.normal(size=s).astype(np.float32) for k, s in shapes.items()}
    save_file(tensors, folder / "model.safetensors")
    fields = dict(
        model_type="llama", vocab_size=32, hidden_size=size, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, intermediate_size=16, rms_norm_eps=1e-5,
        rope_theta=10000.0, max_position_embeddings=64, hidden_act="silu",
        tie_word_embeddings=False, eos_token_id=1, bos_token_id=0,
    )  # fmt: skip
    (folder / "config.json").write_text(json.dumps(fields))


if __name__ == "__main__":
    main(tyro.cli(Checkpoints, description=__doc__))
