"""Trajectories: every step can be rebuilt, saved, and shown; a page needs nothing but itself."""

import dataclasses
import io
import json
import re
from html.parser import HTMLParser

import jax
import numpy as np
import pytest
from rich.console import Console

import dllm_jax as dj
from dllm_jax import recipes
from dllm_jax.decode.generate import generate, stream
from dllm_jax.testing import tiny
from dllm_jax.trajectory import KINDS, Recorder, Trajectory, record
from dllm_jax.trajectory.page import page

ROWS = [[3, 4, 5], [6, 7, 8, 9, 10, 11, 12], [2]]
BUDGET = 21
CANVAS = dict(attention="bidirectional", alignment="same_position", adapter=False, mask_id=31)
BLOCKS = dict(CANVAS, attention="block_causal", block_size=8)
NOISE = dict(alignment="same_position", adapter=False, mask_id=None)
CASES = {
    "ar": (recipes.ar(), {}),
    "self_speculative": (recipes.self_speculative(), {}),
    "block_diffusion": (recipes.block_diffusion(threshold=0.3), {}),
    "llada": (recipes.llada(block_size=8, steps_per_block=3), CANVAS),
    "fast_dllm_dual": (recipes.fast_dllm_dual(block_size=8, threshold=0.3), CANVAS),
    "remdm": (recipes.remdm(steps=12, eta=0.3), CANVAS),
    "d2f": (recipes.d2f(block_size=4, blocks=3, threshold=0.3), CANVAS),
    "sdar": (recipes.sdar(block_size=8, threshold=0.3), BLOCKS),
    "llada2_edit": (recipes.llada2_edit(block_size=8, edit_threshold=0.2), BLOCKS),
    # Without self-conditioning, which these models have not learned.
    "diffusion_gemma": (
        dataclasses.replace(recipes.diffusion_gemma(canvas=8, bound=2.0, steps=6), carry=None),
        NOISE,
    ),
}
LETTERS = [*"\n abcdefghijklmnopqrstuvwxyz.,!?-"]


def decode(ids) -> str:
    return "".join(LETTERS[i] for i in ids if i < len(LETTERS))


@pytest.fixture(scope="module", params=CASES)
def run(request):
    """The states of a recipe, and what was recorded of them."""
    recipe, changes = CASES[request.param]
    model, params = tiny(eos_ids=(29,), **changes)
    recorder = Recorder(recipe, eos_ids=model.config.eos_ids, title=request.param)
    states = []
    for state in stream(
        model, params, ROWS, recipe=recipe, max_new_tokens=BUDGET, key=jax.random.key(3)
    ):
        recorder.add(state)
        states.append({
            name: np.asarray(getattr(state, name))
            for name in ("tokens", "open", "logprobs", "nfe", "written", "end", "stop", "prompt",
                         "start", "reach", "queries")
        })  # fmt: skip
    return request.param, states, recorder.trajectory()


def test_every_step_can_be_rebuilt(run):
    name, states, trajectory = run
    for number, row in enumerate(trajectory.rows):
        assert row.steps == states[-1]["nfe"][number]
        for state in states:
            step, end = int(state["nfe"][number]), int(state["end"][number])
            assert row.nfe[step] == step
            if step == 0:
                continue
            canvas = row.canvas(step)
            expected = state["tokens"][number, :end]
            if name in ("ar", "self_speculative"):  # whose buffers are padded, not masked
                expected = np.where(canvas.open, trajectory.mask_id, expected)
            np.testing.assert_array_equal(canvas.tokens, expected)
            np.testing.assert_array_equal(canvas.open, state["open"][number, :end])
            wrote = row.free & ~canvas.open
            expected = np.exp(state["logprobs"][number, :end][wrote])
            np.testing.assert_allclose(canvas.probability[wrote], expected, rtol=1e-6)
            columns = ["written", "stop", "queries"]
            columns += [] if name in ("ar", "self_speculative") else ["start", "reach"]
            for column in columns:
                assert getattr(row, column)[step] == state[column][number]
        before = row.canvas(0)
        np.testing.assert_array_equal(before.open, row.free)
        np.testing.assert_array_equal(before.tokens[: len(ROWS[number])], ROWS[number])
        if name != "diffusion_gemma":
            assert (before.tokens[row.free] == trajectory.mask_id).all()
        assert row.answer().tolist() == [
            int(token)
            for token in states[-1]["tokens"][number, row.prompt : states[-1]["written"][number]]
        ]


def test_the_kinds_of_events(run):
    name, _, trajectory = run
    kinds = {KINDS[kind] for row in trajectory.rows for kind in row.kind.tolist()}
    expected = {"llada2_edit": {"edit"}, "remdm": {"remask"}, "diffusion_gemma": {"noise"}}
    assert kinds == {"commit"} | expected.get(name, set())
    for row in trajectory.rows:
        assert (np.diff(row.step) >= 0).all()
        assert (row.probability[row.kind >= KINDS.index("remask")] == 0).all()
        written, first = row.free & ~row.canvas().open, row.committed()
        assert (first[written] > 0).all()
        assert (first <= row.canvas().step).all()


def test_json_both_ways(run, tmp_path):
    _, _, trajectory = run
    trajectory.save(tmp_path / "t.json")
    again = Trajectory.load(tmp_path / "t.json")
    for one, two in zip(trajectory.rows, again.rows, strict=True):
        for field in dataclasses.fields(one):
            a, b = np.asarray(getattr(one, field.name)), np.asarray(getattr(two, field.name))
            assert a.dtype == b.dtype, field.name
            np.testing.assert_array_equal(a, b)
    shared = [f.name for f in dataclasses.fields(trajectory) if f.name != "rows"]
    assert all(getattr(trajectory, name) == getattr(again, name) for name in shared)
    assert recipes.to_dict(recipes.from_dict(again.recipe)) == trajectory.recipe


def test_figures_are_those_of_the_result():
    model, params = tiny()
    recipe = recipes.block_diffusion(threshold=0.3)
    result, trajectory = dj.record(model, params, ROWS, recipe=recipe, max_new_tokens=BUDGET)
    whole = generate(model, params, ROWS, recipe=recipe, max_new_tokens=BUDGET)
    np.testing.assert_array_equal(result.tokens, whole.tokens)
    for number, row in enumerate(trajectory.rows):
        figures = row.figures()
        assert figures["tokens"] == result.lengths[number]
        assert figures["passes"] == result.nfe[number]
        assert figures["tokens_per_forward"] == pytest.approx(result.tokens_per_forward[number])
        assert figures["overhead"] == pytest.approx(result.overhead[number])
        assert figures["stop"] == result.stop_reasons[number]
        mean = np.exp(result.logprobs[number, : result.lengths[number]]).mean()
        assert figures["confidence"] == pytest.approx(mean)
        assert (figures["edits"], figures["remasks"]) == (0, 0)
        assert row.figures(0)["tokens"] == 0
    with pytest.raises(ValueError, match="step=99"):
        trajectory.rows[0].canvas(99)
    assert "Sliding" in trajectory.title


def test_what_is_no_trajectory(tmp_path):
    file = tmp_path / "t.json"
    for text, message in (
        ("{}", "format None"),
        ("[]", "t.json"),
        ('{"format": "dllm_jax.trajectory", "version": 9}', "version 9"),
        ('{"format": "dllm_jax.trajectory", "version": 1}', "damaged"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            Trajectory.load(file)


# The page


class Reader(HTMLParser):
    """Collects what a browser would see of a page: tags, attributes, the scripts' texts."""

    def __init__(self):
        super().__init__()
        self.tags, self.scripts, self.inside = [], [], ""

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.inside = tag
        self.scripts += [""] * (tag == "script")

    def handle_endtag(self, tag):
        self.inside = ""

    def handle_data(self, data):
        if self.inside == "script":
            self.scripts[-1] += data


def read(text: str) -> Reader:
    reader = Reader()
    reader.feed(text)
    reader.close()
    return reader


def test_a_page_needs_nothing_but_itself(run):
    text = page(run[2], decode)
    assert not re.search(r"https?://|\bsrc=|@import|url\(", text)
    reader = read(text)
    for tag, attributes in reader.tags:
        assert tag not in ("img", "iframe", "object", "embed")
        assert attributes.get("href", "data:,") == "data:,"
    (policy,) = [a["content"] for t, a in reader.tags if t == "meta" and "http-equiv" in a]
    assert "default-src 'none'" in policy


def test_a_page_holds_the_trajectory(run, tmp_path):
    name, _, trajectory = run
    trajectory.html(decode, tmp_path / "t.html")
    text = (tmp_path / "t.html").read_text(encoding="utf-8")
    assert f"<title>{name}</title>" in text
    facts = json.loads(read(text).scripts[0])
    again = Trajectory.from_dict(facts["trajectory"])
    for row, other in zip(trajectory.rows, again.rows, strict=True):
        ids = other.answer().tolist()
        assert ids == row.answer().tolist()
        assert "".join(facts["texts"][str(i)] for i in ids) == decode(ids)
        assert {str(i) for i in row.token.tolist()} <= facts["texts"].keys()


HOSTILE = "</script><img src=x onerror=alert(1)><!--&amp;\u2028"


def test_hostile_texts_stay_texts():
    model, params = tiny()
    _, trajectory = record(
        model, params, ROWS, recipe=recipes.ar(), max_new_tokens=4, title=f"{{{{data}}}}{HOSTILE}"
    )
    text = page(trajectory, lambda ids: HOSTILE * len(ids))
    reader = read(text)
    assert [tag for tag, _ in reader.tags].count("script") == 2
    assert not any(tag == "img" for tag, _ in reader.tags)
    assert text.count("</script>") == 2
    facts = json.loads(reader.scripts[0])
    assert set(facts["texts"].values()) == {HOSTILE}
    assert facts["trajectory"]["title"] == trajectory.title


def test_tokens_without_text_and_halves_of_characters():
    """Special tokens show their ids; a character of two tokens belongs to the first of them."""

    def halves(ids) -> str:
        texts = {4: "<", 5: ">", 1: ""}
        text = "".join(texts.get(int(id), "a") for id in ids).replace("<>", "é")
        return text.replace("<", "\ufffd").replace(">", "\ufffd")

    model, params = tiny()
    _, trajectory = record(model, params, ROWS, recipe=recipes.ar(), max_new_tokens=4)
    facts = json.loads(read(page(trajectory, halves)).scripts[0])
    assert facts["joined"] == {"4,5": "é"}
    if "1" in facts["texts"]:
        assert facts["texts"]["1"] == "⟨1⟩"
    assert facts["texts"]["3"] == "a"


# The terminal


@pytest.mark.parametrize("colour", ["step", "confidence"])
def test_show(run, colour):
    name, _, trajectory = run
    file = io.StringIO()
    console = Console(file=file, width=200, force_terminal=True, color_system="truecolor")
    row = trajectory.rows[1]
    trajectory.show(decode, row=1, colour=colour, console=console)
    shown = re.sub(r"\x1b\[[\d;]*m", "", file.getvalue())
    assert shown.startswith(f"{name} · pass {row.steps} of {row.steps} · row 2 of 3\n")
    lines = decode(row.answer()[:-1].tolist()).replace("\n", "↵\n").splitlines()
    assert all(line in shown for line in lines)
    assert f"{row.figures()['tokens']} tokens in {row.steps} passes" in shown
    assert "38;2;17;17;17;48;2;" in file.getvalue()  # black on a colour of the scale
    for wrong in (dict(row=3), dict(step=-1)):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}="):
            trajectory.show(decode, console=console, **wrong)


def test_show_a_canvas_under_way():
    recipe, changes = CASES["llada"]
    model, params = tiny(eos_ids=(), **changes)
    _, trajectory = record(model, params, ROWS, recipe=recipe, max_new_tokens=16)
    console = Console(file=io.StringIO(), width=200)
    trajectory.show(decode, 2, console=console)
    assert console.file.getvalue().count("░░") == 16 - trajectory.rows[0].figures(2)["tokens"] + 1
