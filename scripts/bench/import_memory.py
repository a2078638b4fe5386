"""Host memory while a published model comes onto a mesh.

    python scripts/bench/import_memory.py --out scripts/bench/results/import-memory

Writes a checkpoint of LLaDA-8B's shape (16 GB of bfloat16 in five safetensors files, of random
bits), loads it over eight CPU devices in a fresh process, and samples that process's memory. The
devices are this host's memory, so the arrays themselves are in every figure; on accelerators the
host has what is above them. Writes <out>.json and <out>.md.
"""

import dataclasses
import json
import math
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import tyro

from dllm_jax.models import llada
from dllm_jax.models.placing import PIECE

FIELDS = {
    "model_type": "llada", "d_model": 4096, "n_heads": 32, "n_kv_heads": 32, "n_layers": 32,
    "mlp_hidden_size": 12288, "vocab_size": 126464, "embedding_size": 126464,
    "rope_theta": 500000.0, "rms_norm_eps": 1e-5, "max_sequence_length": 4096,
    "mask_token_id": 126336, "eos_token_id": 126081, "pad_token_id": 126081,
    "weight_tying": False, "block_type": "llama",
    "activation_type": "silu", "layer_norm_type": "rms", "include_bias": False,
    "include_qkv_bias": False, "rope": True, "alibi": False,
}  # fmt: skip
GIB, MIB = 1 << 30, 1 << 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImportMemory:
    """What to run."""

    out: Path
    """Where the results go, without a suffix."""
    layers: int = 32
    """Of the model; fewer for a try."""
    folder: Path | None = None
    """Where the checkpoint is written, and left; a temporary folder by default."""
    load: Path | None = None
    """(Internal.) Loads this checkpoint and prints what it took."""


def main(config: ImportMemory) -> None:
    """Writes the checkpoint, loads it, and writes the files."""
    if config.load:
        print(json.dumps(loaded(config.load)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = config.folder or Path(temporary)
        size = publish(folder, config.layers)
        found = json.loads(_in_a_process(config, folder).splitlines()[-1])
    row: dict[str, Any] = {"checkpoint": size, **found}
    above = row["peak_anonymous"] - row["before"] - row["arrays"]
    config.out.parent.mkdir(parents=True, exist_ok=True)
    config.out.with_suffix(".json").write_text(json.dumps(row, indent=1) + "\n")
    lines = [
        f"LLaDA-8B's shape, {config.layers} layers, bfloat16, over 8 CPU devices"
        f" ({', '.join(f'{k}={v}' for k, v in row['mesh'].items() if v > 1)}); pieces of"
        f" {PIECE // MIB} MiB.",
        "",
        "| | GiB |",
        "|---|---|",
        f"| safetensors | {size / GIB:.2f} |",
        f"| arrays on the devices | {row['arrays'] / GIB:.2f} |",
        f"| process before the load (JAX and its devices) | {row['before'] / GIB:.2f} |",
        f"| peak of the process's own memory | {row['peak_anonymous'] / GIB:.2f} |",
        f"| of that above arrays and start | {above / GIB:.2f} |",
        f"| peak of mapped file pages (the kernel's cache; given back on demand) |"
        f" {row['peak_file'] / GIB:.2f} |",
        f"| highest resident set, all in all (VmHWM) | {row['peak_resident'] / GIB:.2f} |",
        "",
        f"{row['seconds']:.0f} s; {row['equal']} parts of arrays compared with the files: equal.",
    ]
    config.out.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def publish(folder: Path, layers: int) -> int:
    """Writes the checkpoint as its authors would; its bytes."""
    fields = {**FIELDS, "n_layers": layers}
    config = llada.config_from_published(fields)
    shapes = {
        name: row.published_shape(config)
        for row in llada.tensor_maps(config)
        for _, name in row.entries(config)
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(fields))
    noise = np.random.default_rng(0).normal(size=1 << 23).astype(ml_dtypes.bfloat16).tobytes()
    files = 5
    names, home, total = list(shapes), {}, 0
    for number in range(files):
        name = f"model-{number + 1:05d}-of-{files:05d}.safetensors"
        own = names[number * len(names) // files : (number + 1) * len(names) // files]
        header, at = {}, 0
        for tensor in own:
            size = 2 * math.prod(shapes[tensor])
            header[tensor] = {
                "dtype": "BF16", "shape": list(shapes[tensor]), "data_offsets": [at, at + size],
            }  # fmt: skip
            home[tensor], at = name, at + size
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (folder / name).open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for start in range(0, at, len(noise)):  # a different rotation in each part
                turn = 2 * (start // len(noise) * 7919 % (len(noise) // 2))
                file.write((noise[turn:] + noise[:turn])[: at - start])
        total += at
    index = {"metadata": {"total_size": total}, "weight_map": home}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def _in_a_process(config: ImportMemory, folder: Path) -> str:
    command = [sys.executable, __file__, "--out", str(config.out), "--load", str(folder)]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8"}
    return subprocess.run(
        command, env=environment, check=True, stdout=subprocess.PIPE, text=True
    ).stdout


def loaded(folder: Path) -> dict:
    """Loads it onto a mesh of four by two, in this process, and says what that took."""
    import jax

    import dllm_jax as dj

    mesh = dj.make_mesh(data=1, fsdp=4, tensor=2)
    jax.block_until_ready(jax.device_put(np.zeros(8), jax.devices()[-1]))
    before = _memory()["RssAnon"]
    with _Watch() as watch:
        start = time.perf_counter()
        model, params = dj.load(folder, mesh=mesh)
        jax.block_until_ready(params)
        seconds = time.perf_counter() - start
    arrays = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    return {
        "mesh": dict(mesh.shape), "arrays": arrays, "before": before, "seconds": seconds,
        "peak_anonymous": watch.peak["RssAnon"], "peak_file": watch.peak["RssFile"],
        "peak_resident": _memory()["VmHWM"], "equal": _compared(folder, model.config, params),
    }  # fmt: skip


def _compared(folder: Path, config, params) -> int:
    """How many parts of arrays were compared with the files; an error where one differs."""
    from etils import epath

    from dllm_jax.models import weights
    from dllm_jax.models.tensors import leaves

    opened, count = weights.open_folder(epath.Path(folder)), 0
    arrays = dict(leaves(params))
    for row in opened.maps:
        array = arrays[row.paths[0]]
        for at, name in (row.entries(config)[0], row.entries(config)[-1]):
            ours = row.ours(config, opened.read(name), row.paths[0])
            for shard in array.addressable_shards:
                bounds = [s.indices(n)[:2] for s, n in zip(shard.index, array.shape, strict=True)]
                inside = tuple(slice(*ends) for ends in bounds[len(at) :])
                own = tuple(i - start for i, (start, _) in zip(at, bounds, strict=False))
                np.testing.assert_array_equal(shard.data[own], ours[inside], name)
                count += 1
    return count


class _Watch:
    """The largest figures of this process's memory while it is open, sampled."""

    def __enter__(self):
        self.peak, self._open = _memory(), True
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        return self

    def _run(self):
        while self._open:
            for name, value in _memory().items():
                self.peak[name] = max(self.peak[name], value)
            time.sleep(0.005)

    def __exit__(self, *_):
        self._open = False
        self._thread.join()


def _memory() -> dict[str, int]:
    """Bytes of this process by kind (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    rows = dict(line.split(":", 1) for line in lines)
    return {name: 1024 * int(rows[name].split()[0]) for name in ("RssAnon", "RssFile", "VmHWM")}


if __name__ == "__main__":
    main(tyro.cli(ImportMemory, description=__doc__))
