"""What a person may choose on the command line: plain data, documented for --help, without JAX.

The string below a field is its help text.
"""

import dataclasses
from typing import Annotated, Literal

import tyro

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
    """Denoise blocks of tokens; or draft by denoising and verify, for the tokens of ar in fewer
    passes; or ar: autoregressive, a token a pass."""

    block_size: int = 8
    """Positions denoised at once (diffusion)."""

    threshold: float = 0.9
    """Write tokens whose probability is over this; lower is faster, and rougher (diffusion)."""

    width: int = 4
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
