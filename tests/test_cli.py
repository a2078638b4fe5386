"""The command line, on a tiny model with a byte-level tokenizer."""

import dataclasses
import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from dllm_jax import checkpoint
from dllm_jax.cache import KVCache
from dllm_jax.cli import main, program
from dllm_jax.cli.answering import Clock
from dllm_jax.cli.background import background
from dllm_jax.cli.describe import activation_bytes, counts
from dllm_jax.cli.options import Chat, Convert, Generate, Info, Plan, Recipes
from dllm_jax.cli.training_options import Data
from dllm_jax.nn.adapters import AdapterConfig
from dllm_jax.nn.transformer import Transformer, TransformerConfig
from dllm_jax.nn.tree import param_shapes
from dllm_jax.tokenizer import Tokenizer
from pallas_kernels import BlockMask

ROOT = Path(__file__).resolve().parents[1]
START, END = 256, 257
CONFIG = TransformerConfig(
    vocab_size=258,
    num_layers=2,
    dim=16,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    ffn_dim=32,
    max_length=1 << 20,
    mask_id=258,
    eos_ids=(END,),
    pad_id=END,
    adapter=AdapterConfig(rank=2),
)
TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}<e>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)
FIGURES = re.compile(
    r"(\d+) tokens in [\d.]+ s \([\d.]+ a second\), ([\d.]+) tokens per forward,"
    r" overhead [\d.]+, stop: ([\w ,]+); compiled in ([\d.]+) s\n"
)


def byte_tokenizer(template: str | None = TEMPLATE) -> Tokenizer:
    """One token a byte, and two that mark turns."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate(letters)}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(t, normalized=False) for t in ("<s>", "<e>")])
    special = {"eos_token": "<e>"}
    return Tokenizer(
        backend=backend, template=template, special=special, eos_ids=(END,), pad_id=END
    )


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that writes printable letters, with an adapter that does something."""
    noise, tokenizer = np.random.default_rng(2), byte_tokenizer()
    # Not `model.init`, which takes seconds to compile.
    params = jax.tree.map(
        lambda leaf: noise.normal(scale=0.3, size=leaf.shape).astype(np.float32),
        param_shapes(CONFIG),
    )
    # Bytes that are no letters, and the end of a turn, get a score that never wins.
    readable = np.array([tokenizer.decode([i]).isalnum() for i in range(256)] + [False, False])
    params["head"] = np.where(readable[:, None], params["head"] * 3, 0)
    path = tmp_path_factory.mktemp("cli") / "tiny"
    checkpoint.save(path, Transformer(CONFIG), jax.tree.map(jnp.asarray, params), tokenizer)
    return path


@pytest.fixture
def run(folder, monkeypatch, capsys):
    """Runs a command line in this process, on the tiny model: its code, stdout and stderr."""
    # Logging and the compilation cache belong to the tests, not to the command.
    monkeypatch.setattr(program, "_quiet", lambda debug: None)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "set")

    def call(command: str, *arguments: str) -> tuple[int, str, str]:
        asks = command in ("generate", "chat") and "--model" not in arguments
        model = ["--model", str(folder)] if asks else []
        code = main([command, *arguments, *model])
        return code, *capsys.readouterr()

    return call


def start(*arguments: str, cache: Path, **options) -> subprocess.Popen[str]:
    """The command in a process of its own."""
    environment = {**os.environ, "DLLM_JAX_CACHE": str(cache), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "dllm_jax", *arguments]
    # A shell's background jobs do not hear Ctrl-C, and neither would what they start.
    hear = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen(command, env=environment, text=True, preexec_fn=hear, **options)


# What is asked


@pytest.mark.parametrize(
    ("name", "command"),
    {
        "generate": Generate,
        "chat": Chat,
        "convert": Convert,
        "info": Info,
        "recipes": Recipes,
        "plan": Plan,
        "data": Data,
    }.items(),
)
def test_help(name: str, command: type, capsys):
    with pytest.raises(SystemExit) as error:
        main([name, "--help"])
    assert error.value.code == 0
    text = " ".join(re.sub(r"[^\x20-\x7e\n]", " ", capsys.readouterr().out).split())
    assert command.__doc__.split(".")[0] in text
    flags = re.findall(r"(?<= )(?:--[a-z-]+|PROMPT \.\.\.|SOURCE|FOLDER|MODEL|NAME)(?= )", text)
    assert len(set(flags)) >= len(dataclasses.fields(command)) - 1
    # Every flag is followed by words of its own.
    assert not re.search(r"--[a-z-]+( [A-Z]+)? \(default", text)


def test_help_of_all(capsys):
    for arguments in ([], ["--help"]):
        with pytest.raises(SystemExit) as error:
            main(arguments)
        assert error.value.code == 0
        listed = capsys.readouterr().out
        commands = ("generate", "chat", "convert", "info", "recipes", "plan")
        assert all(name in listed for name in commands)


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"dllm-jax {program.version()}\n"


def test_help_needs_no_jax():
    code = (
        "import sys; from dllm_jax.cli import main\n"
        "try: main(['generate', '--help'])\n"
        "except SystemExit: print('jax' in sys.modules, 'flax' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.splitlines()[-1] == "False False"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["x", "--threshold", "1.5"], "--threshold 1.5 must be in [0, 1]"),
        (["x", "--block-size", "0"], "--block-size 0"),
        (["x", "--width", "0"], "--width 0"),
        (["x", "--temperature", "-1"], "--temperature -1"),
        (["x", "--temperature", "nan"], "--temperature nan"),
        (["x", "--top-k", "-1"], "--top-k -1"),
        (["x", "--top-p", "0"], "--top-p 0"),
        (["x", "--seed", "-1"], "--seed -1"),
        (["x", "--max-new-tokens", "0"], "--max-new-tokens 0"),
        (["x", "--raw", "--system", "y"], "--system"),
        ([], "give a prompt"),
        (["-", "-"], "once"),
        (["  "], "empty"),
        (["x", "--adapter", "none", "--mode", "diffusion"], "--mode ar"),
        (["x", "--adapter", "none", "--width", "3"], "--mode ar"),
        (["x", "--adapter", "/nowhere"], "/nowhere"),
        (["x", "--mesh", "tensor"], "'tensor' is no AXIS=N"),
        (["x", "--mesh", "tensr=2"], "['tensr'] are none of ('data', "),
        (["x", "--mesh", "tensor=3"], "does not fit 8 devices: 3 must divide it"),
    ],
)
def test_mistakes(run, arguments: list[str], message: str):
    code, out, err = run("generate", *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("dllm-jax: ")
    assert err.count("\n") == 1
    assert message in err


@pytest.mark.slow
def test_an_answer_from_a_mesh(run):
    asked = "Why?", "--max-new-tokens", "8", "--mode", "diffusion", "--json"
    (_, alone, _), (code, meshed, _) = (
        run("generate", *asked),
        run("generate", *asked, "--mesh", "data=1,tensor=2"),
    )
    assert code == 0
    assert json.loads(meshed)["ids"] == json.loads(alone)["ids"]


def test_missing_model(run, monkeypatch):
    code, _, err = run("info", "no/such")
    assert code == 2
    assert err.startswith("dllm-jax: no model at 'no/such'")
    with pytest.raises(FileNotFoundError):
        run("info", "no/such", "--debug")
    monkeypatch.setenv("DLLM_JAX_DEBUG", "1")
    with pytest.raises(FileNotFoundError):
        run("info", "no/such")


@pytest.mark.parametrize("arguments", [["generate", "x", "--mode", "magic"], ["sing"]])
def test_command_lines_that_do_not_parse(arguments: list[str], capsys):
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert error.value.code == 2
    assert capsys.readouterr().err


def test_base_model_needs_raw(run, folder, tmp_path):
    model, params = checkpoint.load(folder)
    checkpoint.save(tmp_path / "base", model, params, byte_tokenizer(template=None))
    base = ["--mode", "ar", "--max-new-tokens", "4", "--model", str(tmp_path / "base")]
    code = main(["generate", "x", *base])
    assert code == 2
    assert main(["generate", "x", "--raw", *base]) == 0


# generate


def test_modes(run):
    texts = {}
    for mode in ("ar", "speculative", "diffusion"):
        options = ["--mode", mode, "--max-new-tokens", "12", "--block-size", "4"]
        code, out, err = run("generate", "Hello", *options)
        assert code == 0
        found = FIGURES.fullmatch(err)
        assert found, err
        assert found[1] == "12"
        assert found[3] == "length"
        assert out.endswith("\n")
        texts[mode] = out
    assert texts["ar"] == texts["speculative"]
    assert len(texts["ar"].strip()) == 12


def test_json(run, folder):
    prompts = ["Hello", "Is this a longer question?"]
    options = ["--json", "--mode", "ar", "--max-new-tokens", "6"]
    code, out, err = run("generate", *prompts, *options)
    assert code == 0
    assert FIGURES.fullmatch(err)[3] == "2 length"
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row["prompt"] for row in rows] == prompts
    decode = Tokenizer.load(folder).decode
    for row in rows:
        assert row["text"] == decode(row["ids"])
        assert row["tokens"] == row["forwards"] == len(row["ids"]) == 6
        assert row["tokens_per_forward"] == 1
        assert row["overhead"] == row["queries"] / 6
        assert (row["stop"], row["recipe"]) == ("length", "ar")
        assert row["run_seconds"] > 0
        assert row["compile_seconds"] >= 0
    alone = json.loads(run("generate", prompts[0], *options)[1])
    assert alone["ids"] == rows[0]["ids"]
    code, out, err = run("generate", *prompts, *options[1:])
    assert out == f"{rows[0]['text']}\n\n{rows[1]['text']}\n"
    assert "[2] Is this a longer question?" in err


def test_stdin_and_raw(run, monkeypatch):
    options = ["--mode", "ar", "--max-new-tokens", "6"]
    told = run("generate", "Hello", *options)[1]
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello"))
    assert run("generate", "-", *options)[1] == told
    assert run("generate", "--raw", "<s>user: Hello<e><s>assistant: ", *options)[1] == told
    assert run("generate", "Hello", "--system", "Be brief.", *options)[1] != told


def test_seed(run):
    options = ["--mode", "ar", "--max-new-tokens", "8", "--temperature", "2", "--top-k", "9"]
    first, again, other = (
        run("generate", "Hello", *options, "--seed", seed)[1] for seed in ("1", "1", "2")
    )
    assert first == again != other


@pytest.mark.parametrize("mode", ["diffusion", "speculative"])
def test_watch_without_a_terminal(run, mode: str):
    options = ["Hello", "--mode", mode, "--max-new-tokens", "12", "--block-size", "4"]
    plain = run("generate", *options)[1]
    code, out, err = run("generate", "--watch", *options)
    assert code == 0
    assert out == plain
    assert "\x1b" not in out + err
    *lines, figures = err.splitlines()
    assert FIGURES.fullmatch(figures + "\n")
    assert [int(line[:4]) for line in lines] == list(range(1, len(lines) + 1))
    assert all("[" in line for line in lines)  # each step writes something
    shown = [line[6:].replace("[", "").replace("]", "") for line in lines]
    assert shown[-1] == plain.strip()
    assert "░" in shown[0] if mode == "diffusion" else "(" in shown[0]


def test_watch_of_a_batch(run):
    options = ["Hello", "You", "--mode", "ar", "--max-new-tokens", "3"]
    code, out, err = run("generate", "--watch", *options)
    assert code == 0
    assert out == run("generate", *options)[1]
    assert [line[:3] for line in err.splitlines()[:6]] == ["[1]", "[2]"] * 3


# chat


def test_chat_through_a_pipe(run, monkeypatch):
    lines = [
        "Hello", "Hello", "", "/seed 3", "/seed x", "/mode magic", "/mode ar", "/frobnicate",
        "/reset", "Hello", "/system Be brief.", "/reset", "Hello", "/help", "/quit", "Not read",
    ]  # fmt: skip
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    code, out, err = run("chat", "--mode", "speculative", "--max-new-tokens", "8")
    assert code == 0
    first, second, fresh, brief = out.splitlines()
    assert all(len(answer) == 8 for answer in (first, second, fresh, brief))
    assert first == fresh  # /reset forgets, and the mode changes how, not what
    assert second != first  # the history is part of the prompt
    assert brief != fresh
    assert len(FIGURES.findall(err)) == 4
    assert "mode: ar\n" in err
    assert "dllm-jax: /seed x: give a whole number\n" in err
    assert "dllm-jax: /mode magic: the modes are diffusion, speculative, ar\n" in err
    assert "dllm-jax: /frobnicate is no command" in err
    assert "/system TEXT" in err
    assert "\x1b" not in out + err


def test_chat_ends_with_its_input(run, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello"))
    code, out, _ = run("chat", "--mode", "ar", "--max-new-tokens", "8")
    assert code == 0
    assert len(out.splitlines()) == 1


# Ctrl-C


@pytest.mark.parametrize("watch", [False, True])
def test_interrupt_generate(folder, tmp_path, watch: bool):
    arguments = ["--mode", "ar", "--max-new-tokens", "60000", "--model", str(folder)]
    process = start(
        "generate", "Hello", *arguments, *["--watch"] * watch,
        cache=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    if watch:
        assert process.stderr.readline().startswith("   1  ")
    else:
        time.sleep(2)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert out == ""
    assert "Traceback" not in err
    if watch:
        assert list((tmp_path / "xla").iterdir())  # compiled programs are kept


def test_interrupt_chat(folder, tmp_path):
    """On a terminal: Ctrl-C stops the answer, Ctrl-D leaves, and the cursor is back."""
    ours, theirs = pty.openpty()
    arguments = ["--mode", "ar", "--max-new-tokens", "60000", "--model", str(folder)]
    process = start(
        "chat", *arguments, cache=tmp_path, stdin=theirs, stdout=theirs, stderr=theirs,
        start_new_session=True,
    )  # fmt: skip
    os.close(theirs)
    seen = ""

    def until(text: str) -> None:
        nonlocal seen
        deadline = time.monotonic() + 60
        while text not in seen:
            assert time.monotonic() < deadline, seen
            if select.select([ours], [], [], 1)[0]:
                seen += os.read(ours, 1 << 16).decode(errors="replace")
        seen = seen.partition(text)[2]

    def type_(text: bytes) -> None:
        os.write(ours, text)

    try:
        until("> ")
        type_(b"Hello\n")
        until("pass 3")
        process.send_signal(signal.SIGINT)
        until("interrupted")
        until("> ")
        type_(b"/mode diffusion\n")
        until("mode: diffusion")
        until("> ")
        type_(b"\x04")
        assert process.wait(timeout=60) == 0
        assert "\x1b[?25l" not in seen.rpartition("\x1b[?25h")[2]
        assert "Traceback" not in seen
    finally:
        process.kill()
        process.wait()
        os.close(ours)


# convert and info


def test_convert_and_info(run, folder, tmp_path):
    target = tmp_path / "converted"
    code, out, err = run("convert", str(folder), str(target), "--dtype", "bfloat16")
    assert (code, out) == (0, "")
    assert str(target) in err
    assert "dllm-jax: " in run("convert", str(folder), str(target))[2]  # it exists
    code, page, err = run("info", str(target), "--batch", "2", "--context", "64")
    assert (code, err) == (0, "")
    _, params = checkpoint.load(target)
    leaves = jax.tree.leaves(params)
    assert f"{sum(leaf.size for leaf in leaves):,}" in page
    assert f"{sum(leaf.nbytes for leaf in leaves) / 1024:.4g} KiB" in page
    cache = CONFIG.num_layers * 2 * 64 * 2 * CONFIG.num_kv_heads * CONFIG.head_dim * 2
    assert f"{cache / 1024:.4g} KiB" in page
    for word in (
        "bfloat16",
        "mask 258, end 257",
        "rank 2",
        "diffusion, block 4",
        f"jax {jax.__version__}",
    ):
        assert word in page
    bare = run("info", str(target), "--adapter", "none")[1]
    assert "adapter     none" in bare
    assert "dllm-jax: --batch 0" in run("info", str(target), "--batch", "0")[2]


def test_info_reads_the_model_card(run, folder, tmp_path):
    model, params = checkpoint.load(folder)
    meta = {"steps": 7, "data": ["a", "b"]}
    checkpoint.save_adapter(tmp_path, model.config, params["adapter"], meta)
    (tmp_path / "README.md").write_text("---\ntags: x\n---\n# Title\n\nMade\nfor tests.\n\nMore.\n")
    page = run("info", str(folder), "--adapter", str(tmp_path))[1]
    assert "Made for tests.\n" in page
    assert "steps 7\n" in page
    assert "More" not in page


def test_counts_are_those_of_the_tree():
    found = counts(CONFIG)
    leaves = jax.tree.leaves(param_shapes(CONFIG))
    assert sum(share.count for share in found.values()) == sum(leaf.size for leaf in leaves)
    assert found["embedding"] == found["head"]
    assert found["embedding"].count == CONFIG.vocab_size * CONFIG.dim


def test_activations_are_about_what_the_compiler_allocates():
    config = dataclasses.replace(CONFIG, dim=64, num_heads=8, num_kv_heads=4, ffn_dim=128)
    model, batch, context, block = Transformer(config), 4, 512, 8

    def one_pass(params, tokens, kv, lengths):
        mask, cache = BlockMask.block_diagonal(block), KVCache(kv, lengths)
        return model.apply({"params": params}, tokens, mask=mask, cache=cache)

    empty = model.cache(batch, context)
    tokens = jnp.zeros((batch, block), jnp.int32)
    compiled = (
        jax.jit(one_pass).lower(param_shapes(config), tokens, empty.kv, empty.lengths).compile()
    )
    memory = compiled.memory_analysis()
    found = counts(config)
    layer = (found["attention"].bytes + found["mlp"].bytes) // config.num_layers
    held = memory.temp_size_in_bytes + memory.output_size_in_bytes - layer
    assert activation_bytes(config, batch, context, block) == pytest.approx(held, rel=0.4)


# The parts


def test_clock_tells_compiling_from_running():
    double = jax.jit(lambda x: jnp.sin(x) * 2 + jnp.arange(7))

    def timed() -> Clock:
        with Clock() as clock:
            double(jnp.ones(7)).block_until_ready()
            time.sleep(0.05)
        return clock

    first, second = timed(), timed()
    assert first.compile > 0
    assert second.compile == 0
    assert 0.05 <= second.run < 0.05 + first.compile + 1


def test_background():
    def failing():
        yield 1
        raise ValueError("two")

    assert list(background(lambda: range(5))) == list(range(5))
    got = []
    with pytest.raises(ValueError, match="two"):
        got += background(failing)
    assert list(background(lambda: [], newest=True)) == []

    seen = []
    for item in background(lambda: range(100), newest=True):
        seen.append(item)
        time.sleep(0.01)
    assert seen[-1] == 99  # the last is never skipped
    assert seen == sorted(seen)
