"""Models in and out: named models, GGUF files and published folders in; Orbax folders both ways.

    model, params = load("smollm2-135m-instruct")
    save("runs/mine", model, params, tokenizer)
    model, params = load("runs/mine", dtype="bfloat16", mesh=make_mesh(fsdp=8, data=1))

A folder of ours stands alone: `params/` (Orbax), `config.json`, and the tokenizer's files. It is
restored straight into the sharding and dtype that are asked for.
"""

import contextlib
import dataclasses
import json
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh
from orbax.checkpoint import v1 as ocp

from dllm_jax import sources
from dllm_jax.models import weights
from dllm_jax.models.adapters import read_adapter, save_adapter
from dllm_jax.models.tensors import leaves
from dllm_jax.nn.adapters import AdapterConfig
from dllm_jax.nn.transformer import Transformer, TransformerConfig
from dllm_jax.nn.tree import param_axes, param_shapes
from dllm_jax.sharding import FSDP_TENSOR, Rules, shardings
from dllm_jax.sources import Damaged
from dllm_jax.tokenizer import Tokenizer
from dllm_jax.typing import Params

__all__ = ["convert", "load", "load_adapter", "read_config", "save", "save_adapter"]

PathLike = str | os.PathLike[str]

_log = logging.getLogger(__name__)


def load(
    source: PathLike,
    *,
    dtype: str | np.dtype | type | None = None,
    mesh: Mesh | None = None,
    rules: Rules | None = None,
    adapter: PathLike | None = "auto",
) -> tuple[Transformer, Params]:
    """A model and its parameters.

    A named model or GGUF file is converted into the user's cache on the first load (see
    `sources.cache_entry`) and restored from there afterwards.

    Args:
      source: a named model ("smollm2-135m-instruct"), a .gguf file, a published folder with
        safetensors, or a folder that `save` or `convert` wrote.
      dtype: of parameters and activations; as stored by default, and float32 for GGUF. Another mix
        is a `dataclasses.replace(model.config, dtype=...)` away.
      mesh: where to put the parameters; the mesh of `jax.set_mesh` by default, else the default
        device.
      rules: how they lie on the mesh; `sharding.FSDP_TENSOR` by default.
      adapter: "auto" attaches the adapter that ships for a named model, or that is part of a folder
        of ours; None attaches none; a path attaches the adapter in that folder.

    Raises:
      FileNotFoundError: no such model, or a file of it is missing.
      ValueError: the model is of an unknown kind, or its files are damaged or do not fit together.
    """
    found, name = sources.resolve(source), _dtype_name(dtype)
    place = _Placement(mesh, rules)
    if found.kind == "gguf":
        config, params = _load_gguf(found, name, place)
    elif found.kind == "published":
        opened = weights.open_folder(found.path)
        config, params = _load_weights(opened, name, place)
    else:
        config, params = _load_folder(found.path, name, place, keep_adapter=adapter == "auto")
    if adapter == "auto":
        shipped = Path(__file__).parent / "assets" / (found.name or "")
        adapter = shipped if found.name and (shipped / "adapter.json").exists() else None
    if adapter is not None:
        config, own = load_adapter(adapter, config, mesh=mesh, rules=rules)
        params = {**params, "adapter": own}
    return config.build(), params


def save(
    folder: PathLike,
    model: Transformer,
    params: Params,
    tokenizer: Tokenizer | None = None,
    *,
    overwrite: bool = False,
) -> None:
    """Writes a model as a folder of ours; nothing is there until all of it is.

    Raises:
      FileExistsError: the folder is there and `overwrite` is False.
      ValueError: the parameters are not those of `model`.
    """
    _check_tree(params, model.config, "the parameters given to save")
    _write(sources.absolute(folder), model.config, params, tokenizer, overwrite)


def convert(source: PathLike, folder: PathLike, dtype: str | np.dtype | type | None = None) -> None:
    """Converts any source of `load` (without an adapter of its own) into a folder of ours.

    The work is done on the host, which must hold the whole model once.
    """
    found, name = sources.resolve(source), _dtype_name(dtype)
    tokenizer = None
    if found.kind == "gguf":
        reader = sources.open_gguf(found.path)
        tokenizer = _gguf_tokenizer(reader)
        config, params = _load_weights(weights.open_gguf(reader, str(found.path)), name, _HOST)
    elif found.kind == "published":
        config, params = _load_weights(weights.open_folder(found.path), name, _HOST)
    else:
        config, params = _load_folder(found.path, name, _HOST, keep_adapter=True)
    if found.kind != "gguf" and (found.path / "tokenizer.json").exists():
        tokenizer = Tokenizer.load(found.path)
    _write(sources.absolute(folder), config, params, tokenizer, overwrite=False)


def load_adapter(
    folder: PathLike,
    config: TransformerConfig,
    *,
    mesh: Mesh | None = None,
    rules: Rules | None = None,
) -> tuple[TransformerConfig, Params]:
    """The config with the adapter and its mask id, and the adapter's parameters on their devices.

    Args:
      config: of the base model; it is not changed. The parameters are in its `param_dtype`.
      mesh, rules: as in `load`.

    Raises:
      FileNotFoundError: adapter.json or adapter.safetensors is missing.
      ValueError: a file is damaged, or the adapter belongs to another model.
    """
    config, arrays = read_adapter(folder, config)
    homes = _Placement(mesh, rules).shardings(config)["adapter"]
    return config, jax.tree.map(_put, arrays, homes)


def read_config(found: sources.Source) -> TransformerConfig:
    """The architecture of a model that `sources.resolve` found, without its weights."""
    if found.kind == "gguf":
        converted = sources.cache_entry(found.path)
        if (converted / "config.json").exists():  # parsing a GGUF file's vocabulary takes seconds
            return _read_facts(converted).config
        return weights.open_gguf(sources.open_gguf(found.path), str(found.path)).config
    if found.kind == "published":
        return weights.open_folder(found.path).config
    return _read_facts(found.path).config


# Placing


@dataclasses.dataclass(frozen=True)
class _Placement:
    """Where parameters go: a mesh by rules, the default device, or (host) NumPy arrays."""

    mesh: Mesh | None = None
    rules: Rules | None = None
    host: bool = False

    def shardings(self, config: TransformerConfig) -> Params:
        """The parameter tree of shardings."""
        mesh = jax.sharding.get_mesh() if self.mesh is None else self.mesh
        shapes = param_shapes(config)
        if mesh.empty:
            single = jnp.zeros(()).sharding
            return jax.tree.map(lambda _: single, shapes)
        return shardings(param_axes(config), mesh, self.rules or FSDP_TENSOR, shapes=shapes)

    def targets(self, config: TransformerConfig, dtypes: Any) -> Any:
        """The tree of what Orbax is to restore."""
        shapes = param_shapes(config)
        if self.host:
            return jax.tree.map(lambda s, dtype: np.empty(s.shape, dtype), shapes, dtypes)
        return jax.tree.map(
            lambda s, dtype, where: jax.ShapeDtypeStruct(s.shape, dtype, sharding=where),
            shapes,
            dtypes,
            self.shardings(config),
        )


_HOST = _Placement(host=True)


def _put(array: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
    """A host array on its devices; each process gives the shards of its own."""
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def _dtype_name(dtype: Any) -> str | None:
    if dtype is None:
        return None
    name = jnp.dtype(dtype).name
    if name not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"dtype={name!r}: parameters are float32, bfloat16 or float16")
    return name


# Sources in their authors' form


def _load_weights(
    opened: weights.Weights, dtype: str | None, place: _Placement
) -> tuple[TransformerConfig, Params]:
    dtype = dtype or opened.config.param_dtype
    config = dataclasses.replace(opened.config, dtype=dtype, param_dtype=dtype)
    if place.host:
        return config, weights.assemble(opened, dtype)
    homes = dict(leaves(place.shardings(config)))
    return config, weights.assemble(opened, dtype, lambda path, array: _put(array, homes[path]))


def _load_gguf(
    found: sources.Source, dtype: str | None, place: _Placement
) -> tuple[TransformerConfig, Params]:
    """From the cache, or from the file where the cache has no good copy, which it then gets."""
    entry = sources.cache_entry(found.path)
    alone = jax.process_count() == 1  # the hosts of a pod do not share a cache folder
    if alone and entry.exists():
        try:
            return _load_folder(entry, dtype, place)
        except (Damaged, FileNotFoundError) as error:
            _log.warning("the cached copy %s is rebuilt: %s", entry, error)
            shutil.rmtree(entry, ignore_errors=True)
    reader = sources.open_gguf(found.path)
    config, host = _load_weights(weights.open_gguf(reader, str(found.path)), None, _HOST)
    if alone:
        try:
            _write(entry, config, host, _gguf_tokenizer(reader), overwrite=False)
        except FileExistsError:
            pass  # another process keeps the same copy
        except Exception as error:  # a full disk or a read-only home: the next load is slower
            _log.warning("no converted copy is kept in %s: %s", entry, error)
    dtype = dtype or config.param_dtype
    config = dataclasses.replace(config, dtype=dtype, param_dtype=dtype)
    return config, jax.tree.map(
        lambda array, where: _put(array.astype(jnp.dtype(dtype), copy=False), where),
        host,
        place.shardings(config),
    )


def _gguf_tokenizer(reader: gguf.GGUFReader) -> Tokenizer | None:
    """The file's tokenizer; weights are useful without one, so an unknown kind is a warning."""
    try:
        return Tokenizer.from_gguf(reader)
    except ValueError as error:
        _log.warning("no tokenizer is converted: %s", error)
        return None


# Folders of ours


def _load_folder(
    folder: epath.Path, dtype: str | None, place: _Placement, keep_adapter: bool = True
) -> tuple[TransformerConfig, Params]:
    facts = _read_facts(folder)
    config = facts.config
    for name, size in facts.files.items():
        file = folder / name
        there = file.stat().length if file.exists() else None
        if there is None:
            raise FileNotFoundError(f"{folder} lacks {name}; copy it again, or make it anew")
        if there != size:
            raise Damaged(
                f"{file} has {there} bytes where {size} were written: the copy is truncated;"
                " copy the folder again, or make it anew"
            )
    try:
        stored: Any = ocp.metadata(folder / "params").metadata
    except Exception as error:
        raise _unreadable(folder, error) from error
    if stored is None:
        raise _unreadable(folder, "no metadata")
    _check_tree(stored, config, f"{folder}")
    drop = config.adapter is not None and not keep_adapter
    if drop:
        own = config.mask_id is not None and config.mask_id >= config.vocab_size
        mask_id = None if own else config.mask_id  # a mask of the adapter's goes with it
        config = dataclasses.replace(config, adapter=None, mask_id=mask_id)
        stored = {key: value for key, value in stored.items() if key != "adapter"}
    dtypes = jax.tree.map(lambda leaf: dtype or leaf.dtype, stored)
    if dtype is not None:
        config = dataclasses.replace(config, dtype=dtype, param_dtype=dtype)
    targets = place.targets(config, dtypes)
    context = ocp.Context()
    context.pytree.loading.partial_load = drop
    try:
        with context:
            params: Any = ocp.load(folder / "params", targets)
    except Exception as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            raise
        raise _unreadable(folder, error) from error
    return config, params


def _unreadable(folder: epath.Path, error: object) -> Damaged:
    reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
    return Damaged(
        f"{folder}/params cannot be read ({reason}): it is incomplete or damaged;"
        " copy the folder again, or make it anew"
    )


def _write(
    folder: epath.Path,
    config: TransformerConfig,
    params: Any,
    tokenizer: Tokenizer | None,
    overwrite: bool,
) -> None:
    with _whole(folder, overwrite) as target:
        context = ocp.Context()
        # Weights hardly shrink, and reading them back takes three times as long. Chunks bound what
        # a device reads beyond its own shard, in bytes.
        context.array.saving.use_compression = False
        context.array.saving.storage_options.chunk_byte_size = 1 << 25
        with context:
            ocp.save(target / "params", params)
        if jax.process_index() == 0:
            if tokenizer is not None:
                tokenizer.save(target)
            files = {
                str(file.relative_to(target)): file.stat().length
                for file in _files(target / "params")
            }
            facts = {
                "format": sources.FORMAT,
                "version": sources.VERSION,
                "config": dataclasses.asdict(config),
                "files": files,
            }
            (target / "config.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")


def _files(folder: epath.Path) -> Iterator[epath.Path]:
    for entry in sorted(folder.iterdir()):
        if entry.is_dir():
            yield from _files(entry)
        else:
            yield entry


@contextlib.contextmanager
def _whole(folder: epath.Path, overwrite: bool) -> Iterator[epath.Path]:
    """A folder to write in that takes its name when all is written.

    Object stores rename nothing: there the folder is written in place, and config.json, which comes
    last, says that it is whole.
    """
    taken = FileExistsError(f"{folder} exists; choose another folder, or give overwrite=True")
    if not overwrite and folder.exists() and any(folder.iterdir()):
        raise taken
    if "://" in str(folder):
        yield folder
        return
    mark = os.getpid() if jax.process_count() == 1 else "pod"
    new, old = (folder.parent / f".{folder.name}.{mark}.{word}" for word in ("new", "old"))
    first = jax.process_index() == 0
    try:
        if first:
            shutil.rmtree(new, ignore_errors=True)
            new.mkdir(parents=True)
        yield new
        if first:
            if overwrite and folder.exists():
                folder.rename(old)
            try:
                new.rename(folder)
            except OSError as error:  # another process was faster
                raise taken from error
            shutil.rmtree(old, ignore_errors=True)
    finally:
        if first:
            shutil.rmtree(new, ignore_errors=True)


@dataclasses.dataclass(frozen=True)
class _Facts:
    config: TransformerConfig
    files: dict[str, int]  # of params/: bytes by name


def _read_facts(folder: epath.Path) -> _Facts:
    file = folder / "config.json"
    facts = sources.read_json(file)
    sources.check_format(facts, sources.FORMAT, file)
    fields = dict(facts.get("config", {}))
    if fields.get("adapter"):
        fields["adapter"] = sources.build(AdapterConfig, fields["adapter"], file)
    fields["eos_ids"] = tuple(fields.get("eos_ids", ()))
    return _Facts(sources.build(TransformerConfig, fields, file), facts.get("files", {}))


def _check_tree(tree: Any, config: TransformerConfig, where: str) -> None:
    """Names and shapes against the config's; one error for the first difference."""
    wanted = {path: leaf.shape for path, leaf in leaves(param_shapes(config))}
    given = {path: tuple(leaf.shape) for path, leaf in leaves(tree)}
    for path in sorted(wanted.keys() - given.keys()):
        raise Damaged(f"{where}: tensor {path!r} is missing; its config asks for it")
    for path in sorted(given.keys() - wanted.keys()):
        raise Damaged(f"{where}: tensor {path!r} is not part of the model its config describes")
    for path, shape in wanted.items():
        if given[path] != shape:
            raise Damaged(
                f"{where}: tensor {path!r} has shape {given[path]}, but the config says {shape}"
            )
