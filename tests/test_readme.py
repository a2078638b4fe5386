"""The README's Python, run from top to bottom as one program."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_examples_run(tmp_path, monkeypatch, optimised):
    text = (ROOT / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(blocks) >= 5
    monkeypatch.chdir(tmp_path)  # an example saves a model
    exec(compile("\n".join(blocks), "README.md", "exec"), {"__name__": "readme"})


def test_the_files_it_names_exist():
    text = (ROOT / "README.md").read_text()
    links = re.findall(r"\]\(([^)#]+)\)", text)
    named = re.findall(r"`((?:dllm_jax|scripts|tests|pallas_kernels)/?[\w/.]*)`", text)
    missing = [p for p in links + named if "://" not in p and not (ROOT / p).exists()]
    assert not missing
