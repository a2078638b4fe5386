"""Training a model, from nothing or from one that is there, as a config says.

    config = Train(
        run=Path("runs/sudoku"), data=TaskData(task=Sudoku()), objective=Diffusion(),
        model=TransformerConfig(...), fit=Fit(steps=5000, batch=256, length=81),
    )
    train(config)

A config is a file in `configs/` too, which `dllm-jax train` takes; its numbers and names are
options.
"""

import dataclasses
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from tyro.conf import Fixed, OmitArgPrefixes

from dllm_jax import distributed, training
from dllm_jax.checkpoint import load, read_config, save
from dllm_jax.data import Conversations, Source
from dllm_jax.decode.generate import generate
from dllm_jax.generation_config import save_recipe
from dllm_jax.losses import Objective
from dllm_jax.models.folders import check_gives_way
from dllm_jax.nn.dit import DiTConfig
from dllm_jax.nn.gemma import GemmaConfig
from dllm_jax.nn.transformer import TransformerConfig
from dllm_jax.nn.tree import Config, param_axes, param_shapes
from dllm_jax.recipes import Recipe
from dllm_jax.sharding import shardings
from dllm_jax.sources import absolute, resolve
from dllm_jax.tasks import Examples, Task, solve
from dllm_jax.tokenizer import Tokenizer
from dllm_jax.training.feed import mesh_for
from dllm_jax.training.identity import described
from dllm_jax.training.loop import Found
from dllm_jax.typing import Params


@runtime_checkable
class Data(Protocol):
    """Where a run's rows come from: a frozen dataclass whose fields say which."""

    def source(self, split: str) -> Source:
        """The rows of "train" or "heldout".

        Raises:
          FileNotFoundError: there are none of that split.
        """
        ...


@runtime_checkable
class Evaluation(Protocol):
    """What is asked of a model every so many steps: a frozen dataclass.

    One with `of(data)` is asked as that says, given the data of the run.
    """

    def __call__(self, model: Any, params: Params, step: int) -> Found:
        """Figures for the metrics, and strings for the samples."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConversationData:
    """Conversations that scripts/distill.py wrote."""

    folder: Path

    def source(self, split: str) -> Source:
        """As `Data`."""
        return Conversations(self.folder, split)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskData:
    """Questions of a task, with their answers."""

    task: Any
    """A `tasks.Task`; its fields are options too."""
    rows: int = 1_000_000
    """To train on; each is made when it is read."""
    heldout: int = 256
    """Held out; 0: none are."""
    seed: int = 0
    filled: bool = False
    """Answers go on with ends to the longest: what a canvas of a fixed length sees."""

    def source(self, split: str) -> Source:
        """As `Data`."""
        count = self.rows if split == "train" else self.heldout
        if not count and split != "train":
            raise FileNotFoundError(f"heldout=0: there are no rows of {split!r}")
        return Examples(self.task, split, count, self.seed, filled=self.filled)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskAccuracy:
    """How many held-out questions of a task a model answers, and in how many passes."""

    recipe: Fixed[Recipe]
    """How it is decoded."""
    task: Fixed[Task | None] = None
    """None: that of the run's data."""
    count: int = 128
    """Questions."""
    show: int = 1
    """Answers that go to the samples."""
    split: str = "heldout"
    seed: int = 0

    def of(self, data: Any) -> "TaskAccuracy":
        """With the task of a run's data, where it has none of its own."""
        if self.task is not None:
            return self
        if (task := getattr(data, "task", None)) is None:
            raise ValueError(f"an accuracy needs a task: {type(data).__name__} has none")
        return dataclasses.replace(self, task=task)

    def __call__(self, model: Any, params: Params, step: int) -> Found:
        """As `Evaluation`."""
        if self.task is None:
            raise ValueError("an accuracy needs a task: give one, or ask of(data)")
        found = solve(
            model, params, self.task, recipe=self.recipe, count=self.count, split=self.split,
            seed=self.seed, key=jax.random.key(self.seed),
        )  # fmt: skip
        return {
            "accuracy": found.accuracy,
            "stderr": found.stderr,
            "passes": found.passes,
            "overhead": found.overhead,
            "answers": [self.task.show(answer) for answer in found.answers[: self.show]],
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Samples:
    """How a model goes on from texts."""

    prompts: tuple[str, ...]
    tokenizer: str
    """What `Tokenizer.load` takes: a model, or its folder."""
    recipe: Fixed[Recipe]
    """How it is decoded."""
    max_new_tokens: int = 64
    seed: int = 0

    def __call__(self, model: Any, params: Params, step: int) -> Found:
        """As `Evaluation`."""
        tokenizer = Tokenizer.load(self.tokenizer)
        found = generate(
            model, params, [tokenizer.encode(prompt) for prompt in self.prompts],
            recipe=self.recipe, max_new_tokens=self.max_new_tokens, key=jax.random.key(self.seed),
        )  # fmt: skip
        tokens, lengths, passes = distributed.fetched((found.tokens, found.lengths, found.nfe))
        rows = zip(tokens, lengths, strict=True)
        texts = [tokenizer.decode(row[:length].tolist()) for row, length in rows]
        return {
            "texts": [a + b for a, b in zip(self.prompts, texts, strict=True)],
            "passes": float(passes.mean()),
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Train:
    """A run, and what it leaves."""

    run: Path
    """Folder of the checkpoints, the metrics and the model."""
    data: Data
    """What is learnt."""
    model: TransformerConfig | DiTConfig | GemmaConfig | str
    """An architecture, which starts with random weights; or a model that is there: anything that
    `load` takes."""
    objective: Objective
    """What is minimised."""
    fit: OmitArgPrefixes[training.Fit]
    """How long, and how it is looked at."""
    phases: tuple[training.Phase, ...] = ()
    """Block sizes, one after the other; the last one holds until the end. Of the noise, and of
    attention where it is not causal. The data and the schedule go on (BD3-LM, 2503.09573: first the
    whole text, at half the price, then blocks)."""
    optimiser: training.Optimiser = training.Optimiser()
    """What moves the parameters."""
    names: tuple[str, ...] = ()
    """Top-level parameters that are trained; all by default."""
    evaluations: Mapping[str, Evaluation] = dataclasses.field(default_factory=dict)
    """Asked every `evaluate_every` steps, by the name that their figures begin with."""
    dtype: str | None = None
    """Of activations: bfloat16 on an accelerator. None: as the model says, float32 by default."""
    param_dtype: str | None = None
    """Of weights, their gradients and moments. None: as the model says; of a stored one float32 for
    what is trained, else as it is stored."""
    remat: str | None = None
    """What the backward pass computes again: none, dots, dots_no_batch, full, offload, or auto:
    none, but on CPUs dots_no_batch, which is faster there. None: as the model says, or auto."""
    fsdp: int = 1
    """Devices that the parameters are split over."""
    tensor: int = 1
    """Devices that heads, feed-forward and vocabulary are split over. The batch is split over the
    others."""
    export: Path | None = None
    """Write the model here, at any step; by default to <run>/model at the last one."""
    recipe: Fixed[Recipe | None] = None
    """How the model that is written is decoded by default."""

    def __post_init__(self) -> None:
        training.check_phases(self.phases)


def train(config: Train) -> tuple[Any, Params]:
    """Trains, or goes on training, and writes the model; on as many processes as call it together.

    Returns:
      The model, and all its parameters: of the average where one is kept.
    """
    say = print if distributed.is_first() else lambda *_: None
    fit = config.fit
    check_export(config.export or config.run / "model", config.run, fit.checkpoints)
    mesh = mesh_for(fit.batch, accumulate=fit.accumulate, fsdp=config.fsdp, tensor=config.tensor)
    model, params = start(config.model, fit.seed, mesh, config.param_dtype, whole=not config.names)
    model = trained_as(config, model.config).build()
    source, heldout = sources(config.data)
    used = 1 if mesh is None else mesh.size
    count = sum(x.size for x in jax.tree.leaves(params))
    say(f"{count:,} parameters, {len(source):,} rows; {used} x {jax.devices()[0].device_kind}")
    tx = config.optimiser.build(fit.steps, model.config)
    names = config.names or tuple(params)
    if isinstance(config.model, str) and config.param_dtype is None:
        params = masters(params, names)
    state = training.create(params, names, tx)
    params = {name: own for name, own in params.items() if name not in state.trainable}
    about = {
        "data": config.data, "objective": config.objective,
        "model": in_words(config.model, model.config), "backbone": backbone(model.config),
    }  # fmt: skip
    state, model = training.fit_phases(
        config.run, fit, config.phases, model, params, state, config.objective, tx, source, heldout,
        evaluations=asked_of(config.evaluations, config.data), about=about,
        settings=settings_of(config),
    )  # fmt: skip
    params, step = {**params, **training.trained(state)}, int(state.step)
    params = jax.tree.map(lambda x, own: x.astype(own.dtype), params, param_shapes(model.config))
    folder = config.export or (config.run / "model" if step == fit.steps else None)
    if folder is None:
        say(f"step {step} of {fit.steps}, saved; the same command continues")
    else:
        write(folder, model, params, tokenizer_of(config.model, config.data), config.recipe)
        say(f"step {step}: the model is in {folder}")
    return model, params


def trained_as(config: Train, own: Any) -> Any:
    """An architecture with the dtype and the remat policy that it is trained with."""
    remat = config.remat or ("auto" if own.remat in ("none", False) else own.remat)
    return dataclasses.replace(own, dtype=config.dtype or own.dtype, remat=remat)


def in_words(model: Config | str, settings: Any) -> str:
    """What a run trains, beside the shapes of its parameters: no other goes on from there.

    Of a folder its name alone, which it keeps where it is moved.
    """
    name = Path(model).name if isinstance(model, str) else type(model).__name__
    fields = ("attention", "alignment", "mask_id")
    told = [f"{field}={getattr(settings, field, None)}" for field in fields]
    return ", ".join([name, *told])


def backbone(settings: Any) -> str:
    """An architecture in words, but for what a run may change on its way."""
    return described(settings, without=("dtype", "param_dtype", "remat", "max_length"))


def start(
    model: Config | str, seed: int, mesh: Mesh | None, param_dtype: str | None, *, whole: bool,
    **options: Any,
) -> tuple[Any, Params]:  # fmt: skip
    """A model and its parameters: random ones of the seed, or those that `load` finds.

    Stored ones are float32 by default where the whole model is trained.
    """
    if isinstance(model, str):
        if param_dtype is None and whole:
            param_dtype = "float32"  # as `masters`, in one step
        module, params = load(model, dtype=param_dtype, mesh=mesh, **options)
        if param_dtype is None:
            return module, params
        own = read_config(resolve(model)).dtype  # of activations: weights alone are wider
        return dataclasses.replace(module.config, dtype=own).build(), params
    config: Any = model
    if param_dtype is not None:
        config = dataclasses.replace(config, param_dtype=param_dtype)
    module = config.build()

    def init(key: jax.Array) -> Params:
        return module.init(key, jnp.zeros((1, 2), jnp.int32))["params"]

    homes = None
    if mesh is not None:
        homes = shardings(param_axes(config), mesh, shapes=param_shapes(config))
    params = jax.jit(init, out_shardings=homes)(jax.random.key(seed))
    if mesh is None:  # on a device of their own, as `load` gives them
        params = jax.device_put(params, jax.devices()[0])
    return module, params


def masters(params: Params, names: Collection[str]) -> Params:
    """The parameters, those named in float32: small steps are lost on weights of bfloat16."""
    wide = lambda own: jax.tree.map(lambda x: x.astype(jnp.float32), own)  # noqa: E731
    return {name: wide(own) if name in names else own for name, own in params.items()}


def settings_of(config: Train) -> dict[str, str]:
    """What else a run is of, in words, for its settings.json."""
    told = {"architecture": config.model, "optimiser": config.optimiser, "names": config.names}
    return {name: described(thing) for name, thing in told.items()}


def asked_of(evaluations: Mapping[str, Evaluation], data: Data) -> dict[str, Evaluation]:
    """The evaluations of a run with such data."""
    return {k: x.of(data) if hasattr(x, "of") else x for k, x in evaluations.items()}


def sources(data: Data) -> tuple[Source, Source | None]:
    """The rows to train on, and those that are held out, where there are any."""
    heldout = None
    try:
        heldout = data.source("heldout")
        found = None if len(heldout) else "the held-out split is empty"
    except FileNotFoundError as error:
        found = str(error)
    if found is not None:
        heldout = None
        if distributed.is_first():
            print(f"{found}: no held-out loss is measured")
    return data.source("train"), heldout


def check_export(folder: Path, run: Path, checkpoints: str | None) -> None:
    """Raises ValueError or FileExistsError where writing a model would take something away."""
    target = Path(os.path.realpath(folder))
    for own in (run, Path(checkpoints or run)):
        found = Path(os.path.realpath(own))
        if target == found or target in found.parents:
            raise ValueError(
                f"export={folder}: a model takes the place of what its folder holds, and this one"
                f" holds the run ({own}): choose another"
            )
    check_gives_way(absolute(folder))


def write(
    folder: Path, model: Any, params: Params, tokenizer: Tokenizer | None, recipe: Recipe | None
) -> None:
    """A trained model as a folder that `load` and `generate` take; an older one gives way."""
    model = dataclasses.replace(model.config, remat="none").build()
    save(folder, model, params, tokenizer, overwrite=True)
    if recipe is not None and distributed.is_first():
        save_recipe(folder, recipe)


def tokenizer_of(model: Config | str, data: Data) -> Tokenizer | None:
    """That of the data, or of the model that training began with."""
    found = getattr(data, "tokenizer", None)
    if found is not None or not isinstance(model, str):
        return found
    try:
        return Tokenizer.load(model)
    except FileNotFoundError:  # some are published without
        return None
