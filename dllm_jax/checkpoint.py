"""Models in and out: named models, GGUF files and published folders in; Orbax folders both ways.

    model, params = load("smollm2-135m-instruct")
    save("runs/mine", model, params, tokenizer)
    model, params = load("runs/mine", dtype="bfloat16", mesh=make_mesh(fsdp=8, data=1))
    export("for/others", model, params, tokenizer)

A folder of ours stands alone: `params/` (Orbax), `config.json`, and the tokenizer's files. It is
restored straight into the sharding and dtype that are asked for.
"""

import dataclasses
import json
import logging
import os
import shutil
from collections.abc import Sequence
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
from dllm_jax.models.export import write_published, write_tokenizer
from dllm_jax.models.folders import check_tree, facts_of, read_facts, whole
from dllm_jax.models.peft import is_peft, read_peft, with_peft
from dllm_jax.models.placing import Placement, on_devices
from dllm_jax.nn.transformer import TransformerConfig
from dllm_jax.nn.tree import param_shapes
from dllm_jax.sharding import Rules
from dllm_jax.sources import Damaged
from dllm_jax.tokenizer import Tokenizer
from dllm_jax.typing import Params

__all__ = [
    "convert",
    "export",
    "load",
    "load_adapter",
    "load_part",
    "read_config",
    "save",
    "save_adapter",
]

PathLike = str | os.PathLike[str]

_log = logging.getLogger(__name__)


def load(
    source: PathLike,
    *,
    dtype: str | np.dtype | type | None = None,
    mesh: Mesh | None = None,
    rules: Rules | None = None,
    adapter: PathLike | None = "auto",
    merge: bool = True,
) -> tuple[Any, Params]:
    """A model (a `Transformer`, or the module of another architecture) and its parameters.

    A named model or GGUF file is converted into the user's cache on the first load (see
    `sources.cache_entry`) and restored from there afterwards.

    Args:
      source: a named model ("smollm2-135m-instruct"), a .gguf file, a published folder with
        safetensors, or a folder that `save` or `convert` wrote.
      dtype: of parameters and activations; as stored by default, and float32 for GGUF. Another mix
        is a `dataclasses.replace(model.config, dtype=...)` away.
      mesh: where to put the parameters; the mesh of `jax.set_mesh` by default, else the default
        device.
      rules: how they lie on the mesh; `sharding.EVERY` by default.
      adapter: "auto" attaches the adapter that ships for a named model, or that is part of a folder
        of ours; None attaches none; a path attaches the adapter in that folder.
      merge: an adapter of PEFT (adapter_config.json) is merged into the weights of the published
        folder that it was made for; False keeps it beside them, as `params["adapter"]`.

    Raises:
      FileNotFoundError: no such model, or a file of it is missing.
      ValueError: the model is of an unknown kind, or its files are damaged or do not fit together.
    """
    found, name = sources.resolve(source), _dtype_name(dtype)
    place = Placement(mesh, rules)
    peft = adapter if adapter and adapter != "auto" and is_peft(adapter) else None
    if peft and found.kind != "published":
        raise ValueError(
            f"{adapter} is an adapter of PEFT, which belongs to a published folder;"
            f" {found.path} is none. Load the folder it was made for, then save the result"
        )
    if found.kind == "gguf":
        config, params = _load_gguf(found, name, place)
    elif found.kind == "published":
        opened = weights.open_folder(found.path)
        if peft and merge:
            opened = with_peft(opened, peft)
        config, params = _load_weights(opened, name, place)
        if peft and not merge:
            own, arrays = read_peft(opened, peft)
            config = dataclasses.replace(config, adapter=own)
            homes = place.shardings(config)["adapter"]
            cast = lambda array, home: on_devices(array.astype(config.param_dtype), home)  # noqa: E731
            params = {**params, "adapter": jax.tree.map(cast, arrays, homes)}
        if peft:
            adapter = None
    else:
        config, params = _load_folder(found.path, name, place, keep_adapter=adapter == "auto")
    if adapter == "auto":
        shipped = Path(__file__).parent / "assets" / (found.name or "")
        adapter = shipped if found.name and (shipped / "adapter.json").exists() else None
    if adapter is not None:
        config, own = load_adapter(adapter, config, mesh=mesh, rules=rules)
        params = {**params, "adapter": own}
    return config.build(), params


def load_part(
    source: PathLike,
    names: Sequence[str],
    *,
    dtype: str | np.dtype | type | None = None,
    mesh: Mesh | None = None,
    rules: Rules | None = None,
) -> Params:
    """Some of a model's parameters (`("head",)`, `("adapter",)`), as `load` gives all of them.

    Nothing else is read.

    Args:
      source: a published folder with safetensors, or a folder that `save` or `convert` wrote.
      names: of top-level entries of the parameter tree.
      dtype, mesh, rules: as in `load`.

    Raises:
      FileNotFoundError: no such model, or a file of it is missing.
      ValueError: it has no such entries, is of another kind, or its files are damaged.
    """
    found, name, place = sources.resolve(source), _dtype_name(dtype), Placement(mesh, rules)
    if found.kind == "gguf":
        raise ValueError(f"{found.path} is read as a whole: load it, and take the parts")
    config = read_config(found)
    unknown = sorted(set(names) - param_shapes(config).keys())
    if unknown or not names:
        known = sorted(param_shapes(config))
        raise ValueError(f"{found.path} has no part {unknown}; name some of {known}")
    if found.kind == "published":
        return _load_weights(weights.open_folder(found.path), name, place, tuple(names))[1]
    return _load_folder(found.path, name, place, names=tuple(names))[1]


def save(
    folder: PathLike,
    model: Any,
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
    check_tree(params, model.config, "the parameters given to save")
    _write(sources.absolute(folder), model.config, params, tokenizer, overwrite)


def export(
    folder: PathLike,
    model: Any,
    params: Params,
    tokenizer: Tokenizer | None = None,
    *,
    max_shard_bytes: int = 5 << 30,
) -> None:
    """Writes a model as its authors publish theirs, for other tools and for `load`.

    There are config.json, generation_config.json, the weights (model.safetensors, or shards and
    their index) and the tokenizer's files; nothing is there until all of it is. Modelling code that
    some publish beside the weights is not: copy it, and its `auto_map`, from their folder.

    Raises:
      FileExistsError: the folder is there.
      ValueError: the model has an adapter, is something that its family's config.json cannot say,
        or is spread over several hosts; or the parameters are not those of `model`.
    """
    path = sources.absolute(folder)
    if jax.process_count() > 1 or "://" in str(path):
        raise ValueError(
            f"export writes a local folder from one host, not {path} from {jax.process_count()};"
            " save the model, and export what load gives elsewhere"
        )
    check_tree(params, model.config, "the parameters given to export")
    with whole(path, overwrite=False) as target:
        write_published(target, model.config, params, max_shard_bytes=max_shard_bytes)
        if tokenizer is not None:
            write_tokenizer(target, tokenizer)


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
    homes = Placement(mesh, rules).shardings(config)["adapter"]
    return config, jax.tree.map(on_devices, arrays, homes)


def read_config(found: sources.Source) -> Any:
    """The architecture of a model that `sources.resolve` found, without its weights."""
    if found.kind == "gguf":
        converted = sources.cache_entry(found.path)
        if (converted / "config.json").exists():  # parsing a GGUF file's vocabulary takes seconds
            return read_facts(converted).config
        return weights.open_gguf(sources.open_gguf(found.path), str(found.path)).config
    if found.kind == "published":
        return weights.open_folder(found.path).config
    return read_facts(found.path).config


_HOST = Placement(host=True)


def _dtype_name(dtype: Any) -> str | None:
    if dtype is None:
        return None
    name = jnp.dtype(dtype).name
    if name not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"dtype={name!r}: parameters are float32, bfloat16 or float16")
    return name


# Sources in their authors' form


def _load_weights(
    opened: weights.Weights,
    dtype: str | None,
    place: Placement,
    names: tuple[str, ...] | None = None,
) -> tuple[Any, Params]:
    dtype = dtype or opened.config.param_dtype
    config = dataclasses.replace(opened.config, dtype=dtype, param_dtype=dtype)
    homes = None if place.host else place.shardings(config)
    return config, weights.assemble(opened, dtype, homes, names)


def _load_gguf(found: sources.Source, dtype: str | None, place: Placement) -> tuple[Any, Params]:
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
        lambda array, where: on_devices(array.astype(jnp.dtype(dtype), copy=False), where),
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
    folder: epath.Path,
    dtype: str | None,
    place: Placement,
    keep_adapter: bool = True,
    names: tuple[str, ...] | None = None,
) -> tuple[Any, Params]:
    facts = read_facts(folder)
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
    check_tree(stored, config, f"{folder}")
    drop = getattr(config, "adapter", None) is not None and not keep_adapter
    if drop:
        own = config.mask_id is not None and config.mask_id >= config.vocab_size
        mask_id = None if own else config.mask_id  # a mask of the adapter's goes with it
        config = dataclasses.replace(config, adapter=None, mask_id=mask_id)
        stored = {key: value for key, value in stored.items() if key != "adapter"}
    if dtype is not None:
        config = dataclasses.replace(config, dtype=dtype, param_dtype=dtype)
    asked: Any = stored if dtype is None else param_shapes(config)
    dtypes = jax.tree.map(lambda leaf: leaf.dtype, asked)
    targets = place.targets(config, dtypes)
    if names is not None:
        targets = {name: targets[name] for name in names}
    context = ocp.Context()
    context.pytree.loading.partial_load = drop or names is not None
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
    config: Any,
    params: Any,
    tokenizer: Tokenizer | None,
    overwrite: bool,
) -> None:
    with whole(folder, overwrite) as target:
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
            facts = json.dumps(facts_of(target, config), indent=1)
            (target / "config.json").write_text(facts, encoding="utf-8")
