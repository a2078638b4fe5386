"""The commands and what they take: plain data, documented for --help, without JAX.

The string below a class or field is its help text.
"""

import dataclasses
from typing import Annotated, Literal

import tyro
from tyro.conf import OmitArgPrefixes, Positional

Dtype = Literal["float32", "bfloat16", "float16"]
Mode = Literal["diffusion", "speculative", "ar"]


def _word(metavar: str):
    return tyro.conf.arg(metavar=metavar)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Which weights."""

    model: Annotated[str, _word("MODEL")] = "smollm2-135m-instruct"
    """A named model, a .gguf file, or a folder: published (safetensors) or written by convert."""

    adapter: Annotated[str, _word("auto|none|FOLDER")] = "auto"
    """The diffusion adapter: the one that ships with the model, none, or the one in a folder."""

    dtype: Annotated[Dtype | None, _word("float32|bfloat16|float16")] = None
    """Of weights and activations; as stored by default (GGUF: float32)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decoding:
    """How the answer is decoded."""

    mode: Mode = "diffusion"
    """diffusion denoises blocks of tokens; ar writes a token a pass; speculative gives the tokens
    of ar in fewer passes: it drafts by diffusion and verifies."""

    block_size: int = 4
    """Positions denoised at once (diffusion)."""

    threshold: float = 0.9
    """Write tokens whose probability is over this; lower is faster, and rougher (diffusion)."""

    width: int = 2
    """Tokens drafted in each pass (speculative)."""

    temperature: float = 0.0
    """Randomness of the draw; 0 takes the most probable token."""

    top_k: int = 0
    """Draw among the k most probable tokens; 0: all."""

    top_p: float = 1.0
    """Draw among the most probable tokens with this share of probability."""

    seed: int = 0
    """Of the draw, where the temperature is above 0: the same seed, the same answer."""

    max_new_tokens: int = 128
    """The most tokens of an answer."""

    def check(self) -> None:
        """Raises ValueError on a number outside its range."""
        if self.block_size < 1:
            raise ValueError(f"--block-size {self.block_size} must be at least 1")
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"--threshold {self.threshold} must be in [0, 1]")
        if self.width < 1:
            raise ValueError(f"--width {self.width} must be at least 1; --mode ar drafts nothing")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"--temperature {self.temperature} must be 0 (greedy) or positive")
        if self.top_k < 0:
            raise ValueError(f"--top-k {self.top_k} must be 0 (off) or positive")
        if not 0 < self.top_p <= 1:
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

    json: bool = False
    """Print one JSON object a prompt, with text, ids and figures, instead of text."""

    raw: bool = False
    """Continue the prompt as it stands, without the chat template."""

    system: Annotated[str | None, _word("TEXT")] = None
    """A system message."""

    weights: OmitArgPrefixes[ModelOptions] = ModelOptions()
    decoding: OmitArgPrefixes[Decoding] = Decoding()

    def check(self) -> None:
        self.decoding.check()
        if not self.prompts:
            raise ValueError('give a prompt, as in: dllm-jax generate "Why is the sky blue?"')
        if self.prompts.count("-") > 1:
            raise ValueError("stdin can be read once: give - once")
        if self.raw and self.system is not None:
            raise ValueError("--raw knows no --system: write it into the prompt, or drop --raw")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chat(Command):
    """Talk with a model, several turns. /help lists the commands, Ctrl-C stops an answer."""

    system: Annotated[str | None, _word("TEXT")] = None
    """A system message."""

    weights: OmitArgPrefixes[ModelOptions] = ModelOptions()
    decoding: OmitArgPrefixes[Decoding] = Decoding(max_new_tokens=512)

    def check(self) -> None:
        self.decoding.check()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Convert(Command):
    """Convert a model into a folder that loads quickly and stands alone."""

    source: Annotated[Positional[str], _word("SOURCE")]
    """A named model, a .gguf file, or a published folder with safetensors."""

    folder: Annotated[Positional[str], _word("FOLDER")]
    """Where to write; it must not exist."""

    dtype: Annotated[Dtype | None, _word("float32|bfloat16|float16")] = None
    """Of the weights; as stored by default (GGUF: float32)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Info(Command):
    """Describe a model and the memory it needs, without loading it."""

    model: Annotated[Positional[str], _word("MODEL")] = "smollm2-135m-instruct"
    """A named model, a .gguf file, or a folder."""

    adapter: Annotated[str, _word("auto|none|FOLDER")] = "auto"
    """The diffusion adapter: the one that ships with the model, none, or the one in a folder."""

    dtype: Annotated[Dtype | None, _word("float32|bfloat16|float16")] = None
    """Of weights, cache and activations; as stored by default (GGUF: float32)."""

    batch: int = 1
    """Rows decoded together."""

    context: int = 2048
    """Tokens of a row in the cache."""

    block_size: int = 4
    """Of block diffusion."""

    width: int = 2
    """Of self-speculation."""


AnyCommand = (
    Annotated[Generate, tyro.conf.subcommand("generate")]
    | Annotated[Chat, tyro.conf.subcommand("chat")]
    | Annotated[Convert, tyro.conf.subcommand("convert")]
    | Annotated[Info, tyro.conf.subcommand("info")]
)
