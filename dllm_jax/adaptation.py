"""Adaptation: a diffusion mode trained into an autoregressive model.

Three ways: an adapter that mask tokens alone feel, so that the model stays what it was beside the
new mode; an adapter for every token (LoRA); or all parameters. What the model is to become, its
attention and its alignment, is a change of its config; how it learns that is the objective.
"""

import dataclasses
import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from tyro.conf import Fixed

from dllm_jax import distributed, pretraining, training
from dllm_jax.checkpoint import save_adapter
from dllm_jax.corruption import MaskedBlocks
from dllm_jax.losses import DualStream, Objective
from dllm_jax.models.export import published_config
from dllm_jax.nn.adapters import AdapterConfig, init_adapter, merged
from dllm_jax.nn.transformer import Transformer, TransformerConfig
from dllm_jax.nn.tree import param_axes, param_shapes
from dllm_jax.pretraining import ConversationData, Data, Evaluation
from dllm_jax.recipes import Recipe
from dllm_jax.sharding import shardings
from dllm_jax.training.feed import gathered, mesh_for
from dllm_jax.training.identity import described
from dllm_jax.training.phases import block_size_of, listed, of_size
from dllm_jax.typing import Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adapt:
    """A run. The defaults are for a CPU."""

    data: Data | Path
    """What is learnt; a folder is one that scripts/distill.py filled."""
    run: Path
    """Folder of the checkpoints, the metrics and what is made."""
    model: str = "smollm2-135m-instruct"
    """The base: anything that `load` takes."""
    init: Path | None = None
    """Start from the adapter in this folder instead of a fresh one; its size wins."""
    adapter: AdapterConfig | None = AdapterConfig(rank=16)
    """Size and place of a fresh adapter: gated, mask tokens alone feel it; else all do (LoRA). None
    trains all parameters."""
    attention: str | None = None
    """What attention becomes: causal, bidirectional, or block_causal; None: as it is."""
    alignment: str | None = None
    """What the output at a position predicts: same_position or shifted; None: as it is."""
    family: str | None = None
    """The model_type that it is published as, by `export` (of a Qwen3 "sdar", say), which says its
    recipe too; None: the base's. Not of a gated adapter, which leaves the base as it is."""
    mask_id: int | None = None
    """The id of the mask token: one that texts do not have. A gated adapter brings its own."""
    noise: MaskedBlocks = MaskedBlocks(block_size=4, blocks=48, whole=0.6, decay=0.85)
    """Blocks, and how they are masked, where there is no other objective."""
    objective: Objective | None = None
    """What is minimised; None: the dual stream, with `noise`, which is for causal models."""
    phases: tuple[training.Phase, ...] = ()
    """Block sizes, one after the other; the last one holds until the end. Of the noise, and of
    attention where it is not causal. The data and the schedule go on (LLaDA2, 2512.15745: up from
    1, the whole text, down again)."""
    optimiser: training.Optimiser = training.Optimiser(learning_rate=2e-3)
    """AdamW and its schedule, over all phases."""
    steps: int = 600
    """Of the whole run: the schedule ends there."""
    batch: int = 4
    """Rows in a step."""
    length: int = 208
    """Longest row, in tokens; longer ones are cut."""
    minutes: float | None = None
    """Stop and save after this long; the same command continues."""
    dtype: str = "float32"
    """Of activations: bfloat16 on an accelerator."""
    param_dtype: str | None = None
    """Of weights. None: float32 of those that are trained, the others as they are stored."""
    seed: int = 0
    """Of the order of the data, the noise, and a fresh adapter."""
    save_every: int = 50
    """Steps between checkpoints."""
    log_every: int = 1
    """Steps between lines of the metrics."""
    evaluate_every: int = 100
    """Steps between looks at the held-out rows, where there are any, and evaluations."""
    heldout_rows: int = 64
    """So many held-out rows at most are read for their loss."""
    evaluations: Mapping[str, Evaluation] = dataclasses.field(default_factory=dict)
    """Asked every `evaluate_every` steps, by the name that their figures begin with."""
    ema: float = 0.0
    """Decay of a running average of what is trained, which is what is evaluated and written."""
    on_spike: training.OnSpike = "stop"
    """As in `training.Fit`: stop, skip, or ignore."""
    spike: float = 0.0
    """As in `training.Fit`: so many times the usual loss is a spike."""
    peak_flops: float | None = None
    """As in `training.Fit`; the command measures it."""
    report: tuple[str, ...] = ()
    """Where figures go besides metrics.jsonl: tensorboard, wandb, trackio."""
    export: Path | None = None
    """Write what was made here; by default to <run>/adapter or <run>/model at the last step."""
    recipe: Fixed[Recipe | None] = None
    """How a model that is written is decoded by default."""
    accumulate: int = 1
    """Parts of a batch that are passed one after the other, for the memory of one."""
    remat: str = "none"
    """What the backward pass computes again: none, dots, dots_no_batch, full, or offload."""
    fsdp: int = 1
    """Devices that the parameters are split over."""
    tensor: int = 1
    """Devices that heads, feed-forward and vocabulary are split over. The batch is split over the
    other devices: all of them, or as many as it divides over where one process has them all."""
    checkpoints: str | None = None
    """Folder of the checkpoints, by default in `run`; a bucket where hosts share no disk."""
    keep: int = 2
    """So many of the newest checkpoints are kept."""
    keep_every: int | None = None
    """Checkpoints of steps that it divides are kept too."""

    def __post_init__(self):
        training.check_phases(self.phases)
        if self.adapter is None and self.init is not None:
            raise ValueError("init is an adapter to start from: give adapter a size, or drop init")


def adapt(config: Adapt) -> None:
    """Trains, or goes on training, and writes; on as many processes as call it together.

    A gated adapter is written as one (`load(adapter=...)`). Of one for every token the weights are
    merged, and the whole model is written, as when all parameters are trained (`load`, `export`).

    Raises:
      ValueError: the settings do not fit the model or each other.
    """
    first, fit = distributed.is_first(), _fit(config)
    say = print if first else lambda *_: None
    mesh = mesh_for(
        config.batch, accumulate=config.accumulate, fsdp=config.fsdp, tensor=config.tensor
    )
    base, params = pretraining.start(
        config.model, config.seed, mesh, config.param_dtype, whole=config.adapter is None,
        adapter=config.init,
    )  # fmt: skip
    settings = adapted(base.config, config)
    if config.adapter is not None and config.init is None:
        params = {**params, "adapter": _fresh(settings, params, config, mesh)}
    names = tuple(params) if config.adapter is None else ("adapter",)
    if config.param_dtype is None:
        params = pretraining.masters(params, names)
    data = (
        config.data if not isinstance(config.data, Path) else ConversationData(folder=config.data)
    )
    source, heldout = pretraining.sources(data)
    answers = getattr(source, "answer_tokens", None)
    used = 1 if mesh is None else mesh.size
    device = f"{used} of {jax.device_count()} x {jax.devices()[0].device_kind}"
    told = "" if answers is None else f", {answers} answer tokens"
    say(f"{len(source)} rows{told}; {device}")
    tx = config.optimiser.build(config.steps, settings)
    state = training.create(params, names, tx)
    params = {name: own for name, own in params.items() if name not in state.trainable}
    about = {
        "data": data, "objective": config.objective or config.noise,
        "model": pretraining.in_words(config.model, settings),
        "backbone": pretraining.backbone(settings),
    }  # fmt: skip
    model, objective = built(settings, config)
    gated = settings.adapter is not None and settings.adapter.gated
    default = config.run / ("adapter" if gated else "model")
    if not gated:
        pretraining.check_export(config.export or default, config.run, config.checkpoints)
    if config.family is not None:
        last = listed(config.phases, config.steps)[-1].block_size
        made = of_size(model, objective, last)[0].config
        published_config(dataclasses.replace(made, adapter=None))  # refuses what it cannot say
    state, model = training.fit_phases(
        config.run, fit, config.phases, model, params, state, objective, tx, source,
        heldout, evaluations=pretraining.asked_of(config.evaluations, data), about=about,
        settings={
            "architecture": described(settings), "optimiser": described(config.optimiser),
        },
    )  # fmt: skip
    step = int(state.step)
    folder = config.export or (default if step == config.steps else None)
    if folder is None:
        say(f"step {step} of {config.steps}, saved; the same command continues")
        return
    if not gated:
        params = {**params, **training.trained(state)}
        if settings.adapter is not None:
            params = merged(params, settings.adapter)
            model = Transformer(dataclasses.replace(model.config, adapter=None))
        tokenizer = pretraining.tokenizer_of(config.model, data)
        pretraining.write(folder, model, params, tokenizer, config.recipe)
        say(f"step {step}: the model is in {folder}")
        return
    adapter = gathered(training.trained(state)["adapter"], mesh)  # all processes take part
    if first:
        meta = _meta(config, step, len(source), answers)
        save_adapter(folder, model.config, adapter, meta)
        say(f"step {step}: the adapter is in {folder}")


def adapted(base: Any, config: Adapt) -> TransformerConfig:
    """The config of the model that a run makes of a base.

    Raises:
      ValueError: the base is no `Transformer`; a mask token is needed and not named, or it is
        outside the vocabulary; or the base is to become something else, and the adapter, fresh or
        that of `init`, is gated.
    """
    if not isinstance(base, TransformerConfig):
        raise ValueError(
            f"{config.model} is a {type(base).__name__}: a Transformer is adapted; train others on"
            " with pretraining.Train(model=...)"
        )
    adapter = config.adapter if config.init is None else base.adapter
    if adapter is not None and adapter.gated:
        for name in ("family", "attention", "alignment"):
            if (value := getattr(config, name)) not in (None, getattr(base, name)):
                raise ValueError(
                    f"{name}={value!r}: a gated adapter leaves the base as it is"
                    f" ({getattr(base, name)}); leave it out, or give another adapter"
                )
    changes: dict[str, Any] = dict(dtype=config.dtype, remat=config.remat)
    for name in ("attention", "alignment", "family"):
        if (value := getattr(config, name)) is not None:
            changes[name] = value
    if config.init is not None:
        return dataclasses.replace(base, **changes)
    if adapter is not None:
        changes["adapter"] = adapter
    if adapter is not None and adapter.gated:
        mask_id = base.vocab_size
    else:
        mask_id = base.mask_id if config.mask_id is None else config.mask_id
        if mask_id is None:
            raise ValueError(
                f"{config.model} has no mask token: give mask_id, an id below {base.vocab_size} of "
                "a token that texts do not have (most tokenizers have reserved ones), or a gated "
                "adapter, which brings one"
            )
        if not 0 <= mask_id < base.vocab_size:
            raise ValueError(
                f"mask_id={mask_id} is outside the vocabulary of {base.vocab_size}: only a gated "
                "adapter brings an embedding of its own"
            )
    return dataclasses.replace(base, mask_id=mask_id, **changes)


def _fresh(settings: TransformerConfig, params: Params, config: Adapt, mesh: Mesh | None) -> Params:
    """A fresh adapter, where the parameters are."""
    assert settings.adapter is not None
    shapes, key = param_shapes(settings)["adapter"], jax.random.key(config.seed)
    init = partial(init_adapter, key, shapes, settings.adapter)
    if mesh is not None:
        homes = shardings(param_axes(settings)["adapter"], mesh, shapes=shapes)
        init = jax.jit(init, out_shardings=homes)
    return init({"embed": params["embed"]})


def built(settings: TransformerConfig, config: Adapt) -> tuple[Transformer, Objective]:
    """The model, with the blocks of the noise where no phases change them, and the objective.

    Raises:
      ValueError: the model is not causal or its outputs are not shifted, and no objective is given.
    """
    if config.objective is None and not DualStream.trains(settings):
        raise ValueError(
            f"attention={settings.attention!r}, alignment={settings.alignment!r}: the default"
            " objective, the dual stream, is for causal models with shifted outputs; give"
            " objective=Diffusion(noise=MaskNoise(...))"
        )
    first = settings.adapter.first_layer if settings.adapter else 0
    objective = config.objective or DualStream(noise=config.noise, frozen_layers=first)
    own = block_size_of(objective)
    if settings.attention == "block_causal" and own and not config.phases:
        settings = dataclasses.replace(settings, block_size=own)
    return Transformer(settings), objective


def _fit(config: Adapt) -> training.Fit:
    """The settings of the loop: those that are named alike."""
    shared = {field.name for field in dataclasses.fields(training.Fit)}
    given = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    return training.Fit(**{name: value for name, value in given.items() if name in shared})


def _meta(config: Adapt, step: int, rows: int, answers: int | None) -> dict[str, Any]:
    """How an adapter was made, with that from which it began."""
    before: dict[str, Any] = {"steps": 0, "noisy_tokens_seen": 0}
    if config.init is not None:
        before = json.loads((config.init / "adapter.json").read_text())["meta"]
    seen, begun = before.get("noisy_tokens_seen"), 0
    if config.objective is not None:  # of another noise: nobody counts
        seen = None
    blocks = block_size_of(config.objective or DualStream(noise=config.noise))
    for until, size, _ in listed(config.phases, config.steps):
        if size is not None and begun < max(step, 1):
            blocks = size
        tokens = config.noise.blocks * (size or config.noise.block_size) * config.batch
        if seen is not None:
            seen += max(min(until, step) - begun, 0) * tokens
        begun = until
    return {
        "base": config.model,
        "steps": before.get("steps", 0) + step,
        "noisy_tokens_seen": seen,
        "init": before if config.init else None,
        "conversations": rows,
        "answer_tokens": answers,
        "block_size": blocks,
        "device": jax.devices()[0].device_kind,
        "settings": _plain(config),
    }


def _plain(config: Adapt) -> dict[str, Any]:
    """The run's settings without its folders, for the record in the adapter."""
    plain = dataclasses.replace(config, data=Path(), recipe=None, evaluations={}, objective=None)
    left_out = ("evaluations", "data", "run", "export", "init", "minutes", "checkpoints", "recipe")
    fields = {k: v for k, v in dataclasses.asdict(plain).items() if k not in left_out}
    objective = None if config.objective is None else described(config.objective)
    return {**fields, "objective": objective}
