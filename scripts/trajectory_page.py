"""One answer, pass by pass: as a page, and as the terminal shows it; with pictures of both.

    python scripts/trajectory_page.py --prompt "Name the planets of the solar system."

Writes <out>-page.html, and by a Chromium <out>-page.png and <out>-terminal.png; without one there
is <out>-terminal.svg.
"""

import dataclasses
import os
import re
import shutil
import subprocess
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import tyro
from rich.console import Console

import dllm_jax as dj

# Rich's own frame for an SVG asks a server for a font.
_SVG = """\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" class="rich-terminal">
<style>
.{unique_id}-matrix {{
  font: {char_height}px/{line_height}px "DejaVu Sans Mono", Menlo, Consolas, monospace;
}}
.{unique_id}-title {{ font: bold 18px sans-serif; }}
{styles}
</style>
<defs>
<clipPath id="{unique_id}-clip-terminal">
<rect x="0" y="0" width="{terminal_width}" height="{terminal_height}"/>
</clipPath>
{lines}
</defs>
{chrome}
<g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">
{backgrounds}
<g class="{unique_id}-matrix">{matrix}</g>
</g>
</svg>
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Picture:
    """What to show."""

    out: Path = Path("scripts/bench/results/trajectory")
    """Where the files go, without what tells them apart."""
    prompt: str = "Name the planets of the solar system."
    model: str = "smollm2-135m-instruct"
    block_size: int = 4
    threshold: float = 0.5
    max_new_tokens: int = 96


def main(config: Picture) -> None:
    """Decodes, writes, and takes the pictures."""
    model, params = dj.load(config.model)
    tokenizer = dj.Tokenizer.load(config.model)
    decode = partial(tokenizer.decode, skip_special=False)
    recipe = dj.recipes.block_diffusion(block_size=config.block_size, threshold=config.threshold)
    _, trajectory = dj.record(
        model, params, [tokenizer.chat(config.prompt)], recipe=recipe,
        max_new_tokens=config.max_new_tokens,
        title=f"{config.model} · block_diffusion block_size={config.block_size}"
        f" threshold={config.threshold}",
    )  # fmt: skip
    row = trajectory.rows[0]
    written = np.bincount(row.step, minlength=row.steps + 1)
    step = row.steps // 2 + int(written[row.steps // 2 :].argmax())  # the pictures show a busy pass
    page = _beside(config.out, "page.html")
    trajectory.html(decode, page)
    with open(os.devnull, "w") as nowhere:
        console = Console(record=True, width=100, file=nowhere, force_terminal=True)
        trajectory.show(decode, step, console=console)
        console.print()
        trajectory.show(decode, colour="confidence", console=console)
        svg = console.export_svg(title=config.prompt, code_format=_SVG)
    terminal = _beside(config.out, "terminal.svg")
    terminal.write_text(svg, encoding="utf-8")
    _picture(f"{page.resolve().as_uri()}#pass={step}", page.with_suffix(".png"), 980, 690)
    box = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg)
    assert box is not None
    width, height = (round(float(size)) for size in box.groups())
    if _picture(terminal.resolve().as_uri(), terminal.with_suffix(".png"), width, height):
        terminal.unlink()


def _beside(out: Path, name: str) -> Path:
    return out.with_name(f"{out.name}-{name}")


def _picture(address: str, file: Path, width: int, height: int) -> bool:
    """Writes what a browser shows at an address; False where there is no browser."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        print(f"no Chromium: {file} is not written")
        return False
    with tempfile.TemporaryDirectory() as profile:
        command = [
            browser, "--headless", "--disable-gpu", "--hide-scrollbars",
            f"--user-data-dir={profile}", f"--window-size={width},{height}",
            f"--screenshot={file.resolve()}", address,
        ]  # fmt: skip
        if os.geteuid() == 0:  # its sandbox is not for root
            command.insert(1, "--no-sandbox")
        subprocess.run(command, check=True, capture_output=True, timeout=120)
    return True


if __name__ == "__main__":
    main(tyro.cli(Picture))
