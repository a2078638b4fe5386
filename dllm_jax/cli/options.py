"""The commands and what they take: plain data, documented for --help, without JAX.

The string below a class or field is its help text.
"""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import OmitArgPrefixes, Positional

Dtype = Literal["float32", "bfloat16", "float16"]
Mode = Literal["diffusion", "speculative", "ar"]
Part = Literal["decode", "vocabulary", "training"]


def word(metavar: str):
    return tyro.conf.arg(metavar=metavar)


def default(metavar: str, default: object):
    """An option of which is told whether it was given; its default is the recipe's."""
    return tyro.conf.arg(metavar=metavar, help_behavior_hint=f"(default: {default})")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Which weights."""

    model: Annotated[str, word("MODEL")] = "smollm2-135m-instruct"
    """A named model, a .gguf file, or a folder: published (safetensors) or written by convert."""

    adapter: Annotated[str, word("auto|none|FOLDER")] = "auto"
    """The diffusion adapter: the one that ships with the model, none, or the one in a folder."""

    dtype: Annotated[Dtype | None, word("float32|bfloat16|float16")] = None
    """Of weights and activations; as stored by default (GGUF: float32)."""

    mesh: Annotated[str | None, default("AXIS=N,...", "the first device")] = None
    """Devices to lie on, by axes: tensor=8, or data=2,tensor=4 (also fsdp, expert, context)."""


# Options of a recipe: --set block_size=8 --set threshold=0.7
Sets = Annotated[
    tyro.conf.UseAppendAction[tuple[str, ...]],
    tyro.conf.arg(name="set", metavar="OPTION=VALUE", help_behavior_hint="(repeatable)"),
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decoding:
    """How the answer is decoded."""

    recipe: Annotated[str | None, default("NAME|FILE.json", "the model's own")] = None
    """A recipe by its name, of those that `dllm-jax recipes` lists, or one in a file."""

    sets: Sets = ()
    """Options of the recipe; `dllm-jax recipes NAME` lists them."""

    mode: Annotated[Mode | None, default("diffusion|speculative|ar", "none")] = None
    """Short for a recipe: block_diffusion, self_speculative (the tokens of ar, faster) or ar."""

    block_size: Annotated[int | None, default("INT", 4)] = None
    """Positions denoised at once (--mode diffusion)."""

    threshold: Annotated[float | None, default("FLOAT", 0.9)] = None
    """Write tokens that are surer than this; lower is faster, and rougher (--mode diffusion)."""

    width: Annotated[int | None, default("INT", 2)] = None
    """Tokens drafted in each pass (--mode speculative)."""

    temperature: Annotated[float | None, default("FLOAT", "the recipe's")] = None
    """Randomness of the draw; 0 takes the most probable token."""

    top_k: Annotated[int | None, default("INT", "the recipe's")] = None
    """Draw among the k most probable tokens; 0: all."""

    top_p: Annotated[float | None, default("FLOAT", "the recipe's")] = None
    """Draw among the most probable tokens with this share of probability."""

    seed: int = 0
    """Of what is drawn: the same seed, the same answer."""

    max_new_tokens: int = 128
    """The most tokens of an answer; the canvas of models that see all of it."""

    @property
    def any_mode(self) -> Mode | None:
        """The mode, also where only one of its flags was given."""
        flags = (self.block_size, self.threshold, self.width)
        return self.mode or (None if flags == (None, None, None) else "diffusion")

    def check(self) -> None:
        """Raises ValueError on a number outside its range, or options that exclude each other."""
        if self.recipe is not None and self.any_mode is not None:
            names = ("mode", "block_size", "threshold", "width")
            given = [f"--{name}" for name in names if getattr(self, name) is not None]
            raise ValueError(
                f"--recipe and {' '.join(given).replace('_', '-')} exclude each other:"
                " options of a recipe are given as --set option=value"
            )
        if self.sets and self.recipe is None:
            raise ValueError("--set is an option of a recipe: name it with --recipe NAME")
        if self.block_size is not None and self.block_size < 1:
            raise ValueError(f"--block-size {self.block_size} must be at least 1")
        if self.threshold is not None and not 0 <= self.threshold <= 1:
            raise ValueError(f"--threshold {self.threshold} must be in [0, 1]")
        if self.width is not None and self.width < 1:
            raise ValueError(f"--width {self.width} must be at least 1; --mode ar drafts nothing")
        if self.temperature is not None and not 0 <= self.temperature < float("inf"):
            raise ValueError(f"--temperature {self.temperature} must be 0 (greedy) or positive")
        if self.top_k is not None and self.top_k < 0:
            raise ValueError(f"--top-k {self.top_k} must be 0 (off) or positive")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"--top-p {self.top_p} must be in (0, 1]")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"--seed {self.seed} must be in [0, 2**32)")
        if self.max_new_tokens < 1:
            raise ValueError(f"--max-new-tokens {self.max_new_tokens} must be at least 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    """What every command takes."""

    debug: bool = False
    """Show the traceback of an error; DLLM_JAX_DEBUG=1 does it too."""

    def check(self) -> None:
        """Raises ValueError on what cannot work, before anything is loaded."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generate(Command):
    """Answer prompts. Several are decoded together, as one batch.

    dllm-jax generate --watch "Why is the sky blue?"
    """

    prompts: Annotated[
        Positional[tuple[str, ...]], tyro.conf.arg(metavar="PROMPT ...", help_behavior_hint="")
    ] = ()
    """What to answer; - reads stdin."""

    watch: bool = False
    """Show the canvas while it denoises; a line a step where there is no terminal."""

    html: Annotated[str | None, word("FILE")] = None
    """Write a page that shows every pass, with a slider; it needs no network."""

    trajectory: Annotated[str | None, word("FILE.json")] = None
    """Write what every pass did, as data."""

    json: bool = False
    """Print one JSON object a prompt, with text, ids and figures, instead of text."""

    raw: bool = False
    """Continue the prompt as it stands, without the chat template."""

    infill: bool = False
    """Fill in a text as it stands: [MASK] is one token to write, [MASK:5] are five."""

    system: Annotated[str | None, word("TEXT")] = None
    """A system message."""

    weights: OmitArgPrefixes[ModelOptions] = ModelOptions()
    decoding: OmitArgPrefixes[Decoding] = Decoding()

    def check(self) -> None:
        self.decoding.check()
        if not self.prompts:
            raise ValueError('give a prompt, as in: dllm-jax generate "Why is the sky blue?"')
        if self.prompts.count("-") > 1:
            raise ValueError("stdin can be read once: give - once")
        for flag in ("raw", "infill"):
            if getattr(self, flag) and self.system is not None:
                raise ValueError(
                    f"--{flag} knows no --system: write it into the prompt, or drop --{flag}"
                )
        if self.infill and (self.watch or self.html or self.trajectory):
            raise ValueError("--infill shows no passes: drop --watch, --html and --trajectory")
        for file in filter(None, (self.html, self.trajectory)):
            if not Path(file).expanduser().parent.is_dir():
                raise ValueError(f"{file} cannot be written: there is no such folder")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chat(Command):
    """Talk with a model, several turns. /help lists the commands, Ctrl-C stops an answer."""

    system: Annotated[str | None, word("TEXT")] = None
    """A system message."""

    weights: OmitArgPrefixes[ModelOptions] = ModelOptions()
    decoding: OmitArgPrefixes[Decoding] = Decoding(max_new_tokens=512)

    def check(self) -> None:
        self.decoding.check()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Convert(Command):
    """Convert a model into a folder that loads quickly and stands alone."""

    source: Annotated[Positional[str], word("SOURCE")]
    """A named model, a .gguf file, or a published folder with safetensors."""

    folder: Annotated[Positional[str], word("FOLDER")]
    """Where to write; it must not exist."""

    dtype: Annotated[Dtype | None, word("float32|bfloat16|float16")] = None
    """Of the weights; as stored by default (GGUF: float32)."""

    published: bool = False
    """Write what the family's authors publish, for other tools; an adapter is left out."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Info(Command):
    """Describe a model and the memory it needs, without loading it."""

    model: Annotated[Positional[str], word("MODEL")] = "smollm2-135m-instruct"
    """A named model, a .gguf file, or a folder."""

    adapter: Annotated[str, word("auto|none|FOLDER")] = "auto"
    """The diffusion adapter: the one that ships with the model, none, or the one in a folder."""

    dtype: Annotated[Dtype | None, word("float32|bfloat16|float16")] = None
    """Of weights, cache and activations; as stored by default (GGUF: float32)."""

    batch: int = 1
    """Rows decoded together."""

    context: int = 2048
    """Tokens of a row in the cache."""

    block_size: Annotated[int | None, default("INT", "the model's, or 4")] = None
    """Of block diffusion."""

    width: int = 2
    """Of self-speculation."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipes(Command):
    """List the ways to decode, or describe one.

    dllm-jax recipes sdar --set block_size=8 --save my-model
    """

    name: Annotated[
        Positional[str | None], tyro.conf.arg(metavar="[NAME]", help_behavior_hint="")
    ] = None
    """A recipe; all of them by default."""

    sets: Sets = ()
    """Options of the recipe."""

    save: Annotated[str | None, word("FOLDER")] = None
    """Make it the recipe of the model in a folder (in its generation_config.json)."""

    json: bool = False
    """Print JSON; that of one recipe may be edited and given to --recipe as a file."""

    def check(self) -> None:
        if self.name is None and (self.sets or self.save):
            raise ValueError("name the recipe, as in: dllm-jax recipes sdar --set block_size=8")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bench(Command):
    """Time the kernels on this device, beside what one would use instead.

    dllm-jax bench --out results/kernels-h200
    """

    out: Annotated[Path, word("PREFIX")]
    """Writes PREFIX.json and PREFIX.md as it goes, and PREFIX.png at the end."""

    minutes: float = 9.0
    """Time to spend; the most telling shapes come first, and what is left out is listed."""

    quick: bool = False
    """Small shapes, for a laptop's CPU."""

    parts: tuple[Part, ...] = ("decode", "vocabulary", "training")
    """Block attention against a cache, statistics of the vocabulary, attention of sequences."""

    also: Annotated[tuple[str, ...] | None, word("IMPLEMENTATION ...")] = None
    """Implementations of ours besides the device's own; xla by default where there is another."""

    without: Annotated[tuple[str, ...], word("SIDE ...")] = ()
    """Sides to leave out, as the report names them: "torch flex" takes long to compile."""

    dtype: Annotated[Dtype | None, word("float32|bfloat16")] = None
    """Of all arrays; bfloat16 by default, float32 on a CPU."""

    title: Annotated[str, word("TEXT")] = "The kernels, timed"
    """The first line of the report."""

    def check(self) -> None:
        if not 0 < self.minutes < float("inf"):
            raise ValueError(f"--minutes {self.minutes} must be positive")
        if not self.parts:
            raise ValueError("--parts is empty: there is nothing to time")
        if self.dtype == "float16":
            raise ValueError("--dtype float16 is not timed: use bfloat16 or float32")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan(Command):
    """What a run needs, on chips that need not be here: memory, collectives, time.

    dllm-jax plan --model llada-8b --topology v5e:2x4 --batch 8 --context 4096
    """

    model: Annotated[str, word("MODEL")]
    """An architecture (llada-8b, llada2-flash-100b, ...), a named model, or a folder."""

    topology: Annotated[str, word("CHIP:SHAPE")]
    """As in v5e:16x16, v6e:2x4, v5p:4x8x8, h100:8."""

    mode: Literal["decode", "prefill", "train"] = "decode"
    """A denoising step behind a cache, a prompt, or a step of training on the dual stream."""

    batch: int = 1
    """Rows in all."""

    context: int = 4096
    """Positions of a row: cached, prompted, or learnt from."""

    block: Annotated[int | None, default("INT", "the recipe's")] = None
    """Positions that are denoised together."""

    mesh: Annotated[str | None, default("AXIS=N,...", "one that suits the model")] = None
    """Of data, fsdp, expert, context and tensor, as in data=2,tensor=4."""

    recipe: Annotated[str | None, default("NAME", "the model's own")] = None
    """A recipe by its name, of those that `dllm-jax recipes` lists."""

    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Of activations, cache and weights; in training the weights are float32."""

    cache_dtype: Annotated[str | None, default("int8|bfloat16", "that of --dtype")] = None
    """Of the cache; int8 has scales of each row and head."""

    accumulate: int = 1
    """Parts of a batch that are trained on one after the other, for the memory of one."""

    tokens_per_forward: Annotated[float | None, default("FLOAT", "as reported, or 1")] = None
    """That a row writes in a pass."""

    effort: Literal["none", "low", "full"] = "low"
    """Of the compiler: none answers in closed form, full may take minutes."""

    json: bool = False
    """Print one JSON object."""

    def check(self) -> None:
        self.sizes()

    def sizes(self) -> dict[str, int] | None:
        """The axes that --mesh gives.

        Raises:
          ValueError: it is written in another way.
        """
        return None if self.mesh is None else mesh_sizes(self.mesh)


def mesh_sizes(text: str) -> dict[str, int]:
    """The sizes of a mesh's axes, "data=2,tensor=4".

    Raises:
      ValueError: it is written in another way.
    """
    found = {}
    for part in text.split(","):
        axis, _, size = part.partition("=")
        if not size.strip().isdigit():
            raise ValueError(f"--mesh {text}: {part!r} is no AXIS=N, as in tensor=4")
        found[axis.strip()] = int(size)
    return found
