"""How exactly each family answers as its published code: replays recorded answers, writes a table.

    python scripts/bench/parity.py GOLDENS --out scripts/bench/results/parity

GOLDENS is a folder of folders in the format of `dllm_jax.testing.replay`.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import jax

from dllm_jax.bench.report import commit
from dllm_jax.testing.replay import replay


def main() -> int:
    """Writes OUT.json (every check) and OUT.md (a row a folder); 1 where a check fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("goldens", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    started, lines = time.time(), []
    for folder in sorted(p for p in arguments.goldens.iterdir() if (p / "case.json").exists()):
        for line in replay(folder):
            print(json.dumps(line), flush=True)
            lines.append(line)
    about = {
        "commit": commit(),
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "seconds": round(time.time() - started),
    }
    arguments.out.with_suffix(".json").write_text(
        json.dumps({**about, "lines": lines}, indent=1) + "\n"
    )
    arguments.out.with_suffix(".md").write_text(table(about, lines))
    return 0 if all(line["ok"] for line in lines) else 1


def table(about: dict, lines: list[dict]) -> str:
    """The figures of each folder, as Markdown."""
    head = ", ".join(f"{name} {value}" for name, value in about.items())
    rows = [
        f"Recorded answers, replayed: {head}.",
        "",
        "| folder | family | cases: tokens and passes equal | logits: largest difference | loss |",
        "|---|---|---|---|---|",
    ]
    for folder in dict.fromkeys(line["folder"] for line in lines):
        own = [line for line in lines if line["folder"] == folder]
        cases = [line for line in own if "case" in line]
        far = [line["max_difference"] for line in own if "logits" in line.get("check", "")]
        loss = [line["relative"] for line in own if "relative" in line]
        cells = [
            folder,
            own[0].get("family", "?"),
            f"{sum(c['ok'] for c in cases)} of {len(cases)}" if cases else "",
            f"{max(far):.1e}" if far else "",
            f"{loss[0]:.0e}" if loss else "",
        ]
        rows.append(f"| {' | '.join(cells)} |")
    cases = [line for line in lines if "case" in line]
    rows += ["", f"{sum(c['ok'] for c in cases)} of {len(cases)} decoding cases."]
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    sys.exit(main())
