"""Recipes on the command line: which one is taken, its options, and what is shown of its passes."""

import dataclasses
import io
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dllm_jax as dj
from dllm_jax import checkpoint, recipes
from dllm_jax.cli import choice
from dllm_jax.cli.describe import counts
from dllm_jax.cli.options import Decoding
from dllm_jax.nn.dit import DiTConfig
from dllm_jax.nn.gemma import GemmaConfig
from dllm_jax.nn.transformer import Transformer
from dllm_jax.nn.tree import param_shapes
from dllm_jax.ops.moe import MoEConfig
from dllm_jax.trajectory import Trajectory
from tests.test_cli import CONFIG, FIGURES, byte_tokenizer, folder, run  # noqa: F401 (fixtures)

LLADA = dataclasses.replace(
    CONFIG, family="llada", vocab_size=259, mask_id=258, adapter=None,
    attention="bidirectional", alignment="same_position", max_length=512,
)  # fmt: skip


@pytest.fixture(scope="module")
def canvas(tmp_path_factory) -> Path:
    """A bidirectional model, its folder written as LLaDA's authors publish theirs."""
    noise = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(noise.normal(scale=0.3, size=leaf.shape), jnp.float32),
        param_shapes(LLADA),
    )
    params["head"] = params["head"].at[256:].set(0.0) * 3
    path = tmp_path_factory.mktemp("cli") / "llada"
    checkpoint.save(path, Transformer(LLADA), params, byte_tokenizer(template=None))
    return path


# The table


def test_recipes_lists_the_table(run):  # noqa: F811
    code, out, err = run("recipes")
    assert (code, err) == (0, "")
    for name in recipes.TABLE:
        assert f"\n{name} " in out
    assert "order=dynamic" in out
    assert "steps_per_block=none" in out
    rows = json.loads(run("recipes", "--json")[1])
    assert [row["name"] for row in rows] == list(recipes.TABLE)
    for row in rows:
        assert recipes.from_dict(row["recipe"]) is not None
        options = recipes.options_of(row["name"])
        assert row["options"] == json.loads(json.dumps(options))


def test_one_recipe(run):  # noqa: F811
    code, out, _ = run("recipes", "llada2_edit", "--set", "edit_threshold=0.25")
    assert code == 0
    assert "LLaDA2.1" in out
    assert "Replace(threshold=0.25)" in out
    assert "llada2_moe" in out
    guarded = json.loads(run("recipes", "llada", "--set", "forbid=5,7", "--json")[1])
    assert guarded["shape"] == {"part": "Forbid", "tokens": [5, 7]}
    data = json.loads(run("recipes", "sdar", "--set", "block_size=8", "--json")[1])
    assert recipes.from_dict(data) == recipes.sdar(block_size=8)


def test_save_keeps_what_else_is_there(run, tmp_path):  # noqa: F811
    file = tmp_path / "generation_config.json"
    file.write_text('{"eos_token_id": 5}')
    code, _, err = run("recipes", "llada", "--set", "guidance=0.5", "--save", str(tmp_path))
    assert code == 0
    assert "llada guidance=0.5" in err
    assert json.loads(file.read_text())["eos_token_id"] == 5
    assert dj.load_recipe(tmp_path) == recipes.llada(guidance=0.5)
    assert [path.name for path in tmp_path.iterdir()] == ["generation_config.json"]
    file.write_text('{"dllm_jax_recipe": {"part": "Magic"}}')
    with pytest.raises(ValueError, match="dllm_jax_recipe is no recipe"):
        dj.load_recipe(tmp_path)
    assert dj.load_recipe(tmp_path / "nowhere") is None
    with pytest.raises(FileNotFoundError, match="not a folder"):
        dj.save_recipe(tmp_path / "nowhere", recipes.ar())


# Options


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("sdar", "threshold=1", 1),
        ("sdar", "steps_per_block=none", None),
        ("sdar", "steps_per_block=3", 3),
        ("fast_dllm", "factor=0.5", 0.5),
        ("fast_dllm_v2", "block_cache=true", True),
        ("dream", "alg=topk_margin", "topk_margin"),
    ],
)
def test_options_have_the_type_of_their_default(name, text, value):
    option = text.partition("=")[0]
    assert choice.named(name, [text]).recipe == recipes.named(name, **{option: value})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--recipe", "magic"], "no recipe 'magic': there are ar, self_speculative"),
        (["--recipe", "sdar", "--set", "size=3"], "no option 'size'; it has block_size, order"),
        (["--recipe", "sdar", "--set", "block_size=1.5"], "block_size=1.5: give a whole number"),
        (["--recipe", "sdar", "--set", "threshold=x"], "threshold=x: give a number"),
        (["--recipe", "sdar", "--set", "steps_per_block=x"], "give a number or none"),
        (["--recipe", "fast_dllm_v2", "--set", "block_cache=1"], "true or false"),
        (["--recipe", "sdar", "--set", "threshold"], "write it as option=value"),
        (["--recipe", "ar", "--mode", "ar"], "--recipe and --mode exclude each other"),
        (["--recipe", "ar", "--block-size", "3"], "--recipe and --block-size exclude each other"),
        (["--set", "threshold=0.5"], "--set is an option of a recipe"),
        (["--recipe", "nowhere.json"], "nowhere.json: there is no such file"),
        (["--recipe", "llada"], "this one is causal"),
        (["--html", "/no/such/folder/x.html"], "there is no such folder"),
        (["--infill"], "no [MASK] to fill in"),
        (["--infill", "--watch"], "--infill shows no passes"),
        (["--infill", "--system", "x"], "--infill knows no --system"),
    ],
)
def test_mistakes(run, arguments: list[str], message: str):  # noqa: F811
    code, out, err = run("generate", "x", *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("dllm-jax: ")
    assert message in err


def test_a_recipe_is_the_same_by_mode_name_and_file(run, tmp_path):  # noqa: F811
    options = ["Hello", "--max-new-tokens", "8", "--json"]
    by_mode = json.loads(run("generate", *options, "--mode", "diffusion", "--threshold", "0.2")[1])
    by_name = ["--recipe", "block_diffusion", "--set", "threshold=0.2"]
    named = json.loads(run("generate", *options, *by_name)[1])
    file = tmp_path / "mine.json"
    file.write_text(run("recipes", "block_diffusion", "--set", "threshold=0.2", "--json")[1])
    read = json.loads(run("generate", *options, "--recipe", str(file))[1])
    assert by_mode["ids"] == named["ids"] == read["ids"]
    assert by_mode["recipe"] == named["recipe"] == "block_diffusion threshold=0.2"
    assert read["recipe"] == "mine"
    file.write_text('{"part": "Sampling"}')
    assert "holds no recipe" in run("generate", *options, "--recipe", str(file))[2]


# Which one is taken


def test_the_choice(tmp_path, canvas):
    def chosen(config, options=None, source=str(tmp_path)):
        return choice.choose(options or Decoding(), config, source)

    assert chosen(CONFIG).recipe == recipes.block_diffusion()
    assert chosen(dataclasses.replace(CONFIG, adapter=None)).recipe == recipes.ar()
    assert chosen(LLADA).recipe == recipes.llada()
    blocks = dataclasses.replace(
        LLADA, family="sdar", attention="block_causal", alignment="same_position", block_size=16
    )
    assert chosen(blocks).recipe == recipes.sdar(block_size=16)
    set_ = Decoding(recipe="sdar", sets=("block_size=8",))
    assert chosen(blocks, set_).recipe == recipes.sdar(block_size=8)
    gemma = GemmaConfig(
        vocab_size=9, dim=8, num_heads=2, ffn_dim=8, num_experts=4, experts_per_token=2,
        expert_dim=4, layer_types=("sliding", "full"), head_dim=4, num_kv_heads=1, window=4,
        full_head_dim=8, full_num_kv_heads=1, canvas_length=32,
    )  # fmt: skip
    found = chosen(gemma)
    assert found.recipe == recipes.diffusion_gemma(canvas=32)
    assert found.key(0) is not None
    dj.save_recipe(tmp_path, recipes.llada(block_size=64))
    assert chosen(LLADA) == ("saved recipe", recipes.llada(block_size=64))
    assert chosen(LLADA, Decoding(recipe="dream")).recipe == recipes.dream()
    hot = chosen(LLADA, Decoding(temperature=0.5, top_k=7))
    assert (hot.recipe.sampling.temperature, hot.recipe.sampling.top_k) == (0.5, 7)
    with pytest.raises(ValueError, match="no recipe is known for 'none'"):
        chosen(dataclasses.replace(LLADA, family="none"), source=str(canvas))


@pytest.mark.parametrize(
    ("name", "sets", "random"),
    [
        ("remdm", ["temperature=0"], True),
        ("bd3lm", ["temperature=0"], True),
        ("llada", ["remasking=random"], True),
        ("dream", ["alg=origin"], True),
        ("llada", [], False),
        ("llada", ["temperature=1"], True),
        ("sdar", ["order=static"], False),
    ],
)
def test_recipes_that_draw_get_a_key(name, sets, random):
    found = choice.named(name, sets)
    assert (found.key(0) is not None) == random
    if random:
        assert found.key(0) == found.key(0)
        assert found.key(0) != found.key(1)
        assert found.key(0, turn=1) != found.key(0)


# What is shown


def test_a_canvas_is_watched_and_recorded(run, canvas, tmp_path):  # noqa: F811
    page, data = tmp_path / "x.html", tmp_path / "x.json"
    options = ["Hello", "--raw", "--max-new-tokens", "8", "--recipe", "llada",
               "--set", "block_size=4", "--set", "steps_per_block=2"]  # fmt: skip
    model = ["--model", str(canvas)]
    files = ["--html", str(page), "--trajectory", str(data)]
    code, out, err = run("generate", *options, "--watch", *files, *model)
    assert code == 0, err
    *lines, wrote, figures = err.splitlines()
    assert wrote == f"wrote {page} and {data}"
    assert FIGURES.fullmatch(figures + "\n")[1] == "8"
    # The masks of all of the canvas: 8 at first, two fewer after each pass.
    assert [line.count("░░░") for line in lines] == [8, 6, 4, 2, 0]
    assert out == run("generate", *options, *model)[1]
    trajectory = Trajectory.load(data)
    assert trajectory.title == f"{canvas} · llada block_size=4 steps_per_block=2"
    assert byte_tokenizer().decode(trajectory.rows[0].answer()) == out[:-1]
    assert trajectory.title in page.read_text()
    code, again, err = run("generate", *options, *files[:2], *model)  # recorded, not watched
    assert (code, again) == (0, out)
    assert "░" not in err


def test_seeds_of_recipes_that_draw(run, canvas):  # noqa: F811
    options = ["Hello", "--raw", "--max-new-tokens", "8", "--recipe", "remdm", "--set", "steps=6",
               "--model", str(canvas)]  # fmt: skip
    one, again, two = (run("generate", *options, "--seed", n)[1] for n in "112")
    assert one == again != two


def test_infill(run, canvas):  # noqa: F811
    text = "ab[MASK]cd[MASK:3]e"
    options = ["--infill", "--json", "--model", str(canvas)]
    code, out, err = run("generate", text, "x[MASK]", *options)
    assert code == 0, err
    filled, other = map(json.loads, out.splitlines())
    assert len(filled["ids"]) == 9
    ids = byte_tokenizer().encode("abcde")
    assert [filled["ids"][i] for i in (0, 1, 3, 4, 8)] == ids
    assert (filled["tokens"], other["tokens"]) == (4, 1)
    assert 258 not in filled["ids"]
    assert FIGURES.fullmatch(err)[1] == "5"


def test_chat_changes_the_recipe(run, monkeypatch):  # noqa: F811
    lines = ["/recipe ar", "Hello", "/recipe block_diffusion threshold=1", "/reset", "Hello",
             "/recipe magic", "/recipe", "/recipe llada", "Hello"]  # fmt: skip
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    code, out, err = run("chat", "--max-new-tokens", "8")
    assert code == 0
    first, second = out.split()
    assert first == second
    assert "recipe: ar\n" in err
    assert "recipe: block_diffusion threshold=1\n" in err
    assert err.count("dllm-jax: no recipe ''") == 1
    assert "dllm-jax: no recipe 'magic'" in err
    assert "this one is causal" in err


# convert and info


def test_convert_to_published_files(run, canvas, tmp_path):  # noqa: F811
    target = tmp_path / "published"
    code, _, err = run("convert", str(canvas), str(target), "--published")
    assert code == 0, err
    assert json.loads((target / "config.json").read_text())["model_type"] == "llada"
    one, two = checkpoint.load(canvas), checkpoint.load(target)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), one[1], two[1]))
    assert run("info", str(target))[0] == 0


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (LLADA, ("family      llada", "bidirectional attention", "canvas, block 32")),
        (
            dataclasses.replace(
                LLADA, family="llada2_moe", attention="block_causal", block_size=16,
                moe=MoEConfig(num_experts=4, experts_per_token=2, ffn_dim=8, shared_ffn_dim=8),
            ),
            ("2 of 4 experts of 8, and 8 for every token", "experts", "diffusion, block 16"),
        ),
        (
            DiTConfig(vocab_size=259, num_layers=2, dim=16, num_heads=2, cond_dim=4, mask_id=258,
                      block_size=8),
            ("block causal attention in blocks of 8", "other", "diffusion, block 8"),
        ),
    ],
    ids=["llada", "llada2", "bd3lm"],
)  # fmt: skip
def test_info_of_other_architectures(run, tmp_path, config, words):  # noqa: F811
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), param_shapes(config))
    checkpoint.save(tmp_path / "model", config.build(), params)
    code, page, err = run("info", str(tmp_path / "model"), "--context", "64", "--batch", "2")
    assert (code, err) == (0, "")
    for word in words:
        assert word in page
    leaves = jax.tree.leaves(params)
    assert sum(share.count for share in counts(config).values()) == sum(x.size for x in leaves)
    assert sum(share.bytes for share in counts(config).values()) == sum(x.nbytes for x in leaves)
    cache = sum(x.nbytes for x in jax.tree.leaves(config.build().cache(2, 64).kv))
    assert f"{cache / 1024:.4g} KiB" in page
