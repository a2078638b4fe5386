"""The tasks: the same rows everywhere, splits apart, and a check that no damage passes."""

import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dllm_jax import data, tasks
from dllm_jax.tasks import countdown
from dllm_jax.tasks.addition import carry_chain
from dllm_jax.tasks.brackets import balanced, fits
from dllm_jax.tasks.repair import _whole
from dllm_jax.tasks.task import EOS, SPLITS, drawn, split_of

KINDS = {
    "sudoku": {"size": 4, "pool": 16},
    "sudoku, prompt": {"size": 4, "pool": 16, "layout": "prompt"},
    "countdown, of 3": {"numbers": 3},
    "countdown, of 4": {"numbers": 4},
    "path_star": {},
    "path_star, canvas": {"degree": 20, "path": 4, "names": 100, "layout": "canvas"},
    "addition": {"digits": 4},
    "addition, canvas": {"digits": 12, "layout": "canvas"},
    "addition, hard": {"digits": 9, "carries": 6},
    "brackets": {},
    "brackets, of one kind": {"kinds": 1, "holes": 3, "hole": 4, "longest": 30},
    "repair": {"words": 6, "rate": 0.2},
    "repair, canvas": {"words": 5, "rate": 0.25, "layout": "canvas"},
    "recall": {"context": 200, "queries": 2},
    "recall, canvas": {"context": 100, "key": 2, "value": 3, "layout": "canvas"},
}


def made(kind: str) -> tasks.Task:
    return tasks.named(kind.split(",")[0], **KINDS[kind])


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("DLLM_JAX_CACHE", str(tmp_path_factory.getbasetemp() / "tasks-cache"))


def rows(task: tasks.Task, split: str, count: int, seed: int = 0) -> list[data.Row]:
    source = tasks.Examples(task, split, count, seed)
    return [source[i] for i in range(count)]


def text(task: tasks.Task, row: data.Row) -> str:
    return task.vocabulary.decode(row.tokens)


def question(task: tasks.Task, row: data.Row) -> str:
    """What is asked, with marks where the answer stands."""
    if row.given is None:
        return text(task, row)[: row.prompt]
    shown = zip(text(task, row), row.given, strict=True)
    return "".join(symbol if there else "_" for symbol, there in shown)


def filled(task: tasks.Task, row: data.Row, answer: str) -> np.ndarray:
    """The row with another answer."""
    ids = task.vocabulary.encode(answer)
    if row.given is None:
        return np.concatenate([row.tokens[: row.prompt], ids])
    whole = row.tokens.copy()
    whole[~row.given] = ids
    return whole


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_is_a_function_of_split_number_and_seed(kind):
    task, again = made(kind), made(kind)
    assert (task, hash(task)) == (again, hash(again))
    assert isinstance(task, tasks.Task)
    first = rows(task, "train", 12)
    for split, seed in (("train", 0), ("train", 1), ("test", 0)):
        one, other = rows(task, split, 12, seed), list(reversed(rows(again, split, 12, seed)))
        for a, b in zip(one, reversed(other), strict=True):
            np.testing.assert_array_equal(a.tokens, b.tokens)
            assert a.prompt == b.prompt
            assert (a.given is None) == (b.given is None) == (first[0].given is None)
        asked = [question(task, row) for row in one]
        assert len(set(asked)) == 12
        assert (asked == [question(task, row) for row in first]) == ((split, seed) == ("train", 0))


# What the first rows of a few tasks hold, on any machine and version: of their ids, CRC 32.
SUMS = {
    "sudoku": 2542441539,
    "countdown, of 4": 1857469942,
    "path_star": 1725111405,
    "addition": 2696439644,
    "brackets": 17414103,
    "repair": 2587053812,
    "recall": 988997460,
}


@pytest.mark.parametrize("kind", SUMS)
def test_rows_are_the_same_on_every_machine(kind):
    task = made(kind)
    ids = [row.tokens for split in SPLITS for row in rows(task, split, 3)]
    assert zlib.crc32(np.concatenate(ids).astype("<i4").tobytes()) == SUMS[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_lengths_are_what_the_task_says(kind):
    task = made(kind)
    for row in rows(task, "train", 60):
        ids = row.tokens
        assert ids.dtype == np.int32
        assert len(ids) <= task.length
        assert ids.min() >= task.vocabulary.eos_id
        assert ids.max() < task.vocabulary.size
        if task.layout == "canvas":
            assert len(ids) == task.length
            assert row.prompt == 0
            assert row.given is not None
            assert (~row.given).sum() <= task.answer_length
            assert 0 < row.given.sum() < len(ids)
        else:
            assert 0 < row.prompt < len(ids)
            assert len(ids) - row.prompt <= task.answer_length
            assert (ids == task.vocabulary.eos_id).tolist() == [False] * (len(ids) - 1) + [True]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "sudoku" not in kind])
def test_splits_share_no_question(kind):
    task, size = made(kind), 40
    asked = {
        split: {question(task, row) for seed in (0, 3) for row in rows(task, split, count, seed)}
        for split, count in (("train", 2 * size), ("heldout", size // 3), ("test", size // 3))
    }
    assert not asked["train"] & asked["test"]
    assert not asked["train"] & asked["heldout"]
    assert not asked["heldout"] & asked["test"]
    assert all(len(found) >= size // 4 for found in asked.values())


def test_a_split_is_a_share_of_the_questions():
    found = [split_of(str(i)) for i in range(8000)]
    shares = [found.count(split) / 8000 for split in SPLITS]
    np.testing.assert_allclose(shares, [14 / 16, 1 / 16, 1 / 16], atol=0.01)


def test_twins_are_in_one_split():
    """Questions that differ only in an order that means nothing."""
    for index in range(20):
        task = tasks.named("countdown", numbers=4)
        numbers, target = text(task, task.example("test", index)).split("|")[0].split(":")
        values = sorted(int(x) for x in numbers.split(","))
        assert split_of(f"{values}:{target}") == "test"
        adding = tasks.named("addition", digits=5)
        a, b = map(int, text(adding, adding.example("test", index)).split("=")[0].split("+"))
        assert split_of(f"{min(a, b)}+{max(a, b)}") == "test"


def test_too_few_questions_are_an_error():
    one = split_of("the only one")
    assert drawn(lambda draw: ("the only one", 7), one, 0, 0) == 7
    for split in set(SPLITS) - {one}:
        with pytest.raises(ValueError, match=f"none is in the split '{split}': give the task more"):
            drawn(lambda draw: ("the only one", 7), split, 0, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_the_rows_answer_is_right_and_damage_is_not(kind):
    """One id changed: always wrong in the question, and in the answer where there is one only."""
    task = made(kind)
    draw = np.random.default_rng(0)
    other = 0
    for row in rows(task, "train", 6) + rows(task, "test", 3):
        assert task.check(row, row.tokens)
        assert task.check(row, row.tokens.tolist())
        places = np.arange(len(row.tokens))
        asked = row.given if row.given is not None else places < row.prompt
        for at in draw.permutation(places)[:60]:
            wrong = row.tokens.copy()
            wrong[at] = (wrong[at] + draw.integers(1, task.vocabulary.size)) % task.vocabulary.size
            if task.check(row, wrong):
                assert not asked[at]
                other += 1
        for bad in (-1, task.vocabulary.size, task.vocabulary.mask_id, task.vocabulary.pad_id):
            wrong = row.tokens.copy()
            wrong[np.flatnonzero(~asked)[0]] = bad
            assert not task.check(row, wrong)
        assert not task.check(row, row.tokens[:-1])
        assert not task.check(row, row.tokens[: row.prompt])
        assert not task.check(row, row.tokens[:0])
    assert other == 0 or kind.startswith(("countdown", "brackets"))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if made(kind).layout == "prompt"])
def test_what_is_behind_the_end_does_not_count(kind):
    task = made(kind)
    row = task.example("train", 0)
    ids, eos = row.tokens.tolist(), task.vocabulary.eos_id
    assert task.check(row, [*ids, task.vocabulary.pad_id, 5, 6])
    assert task.check(row, [*ids, eos])
    assert not task.check(row, [*ids[:-1], 5, eos])


@pytest.mark.parametrize("kind", KINDS)
def test_one_questions_answer_is_not_anothers(kind):
    task = made(kind)
    one, other = rows(task, "train", 2)
    if task.layout == "prompt":
        swapped = np.concatenate([one.tokens[: one.prompt], other.tokens[other.prompt :]])
        assert not task.check(one, swapped)
    assert not task.check(one, other.tokens)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_can_be_shown(kind):
    task = made(kind)
    row = task.example("test", 0)
    assert task.show(row.tokens).strip()
    blank = row.tokens.copy()
    blank[~row.given if row.given is not None else slice(row.prompt, None)] = 1
    assert "▒" in task.show(blank)


@pytest.mark.parametrize("kind", KINDS)
@given(drawn_ids=st.data())
def test_whatever_a_model_writes_is_judged_and_shown(kind, drawn_ids):
    task = made(kind)
    row = task.example("train", 0)
    ids = st.integers(-1, task.vocabulary.size + 2)
    wrong = drawn_ids.draw(st.lists(ids, max_size=len(row.tokens) + 3))
    assert not task.check(row, wrong)
    assert isinstance(task.show(wrong), str)
    # Symbols alone, behind the question or in the free cells.
    symbols = st.integers(2, task.vocabulary.size - 1)
    if row.given is None:
        written = drawn_ids.draw(st.lists(symbols, max_size=task.answer_length))
        wrong = [*row.tokens[: row.prompt].tolist(), *written, task.vocabulary.eos_id]
    else:
        free = int((~row.given).sum())
        whole = row.tokens.copy()
        whole[~row.given] = drawn_ids.draw(st.lists(symbols, min_size=free, max_size=free))
        wrong = whole.tolist()
    assert task.check(row, wrong) in (True, False)
    assert isinstance(task.show(wrong), str)


# Examples


@pytest.mark.parametrize("kind", ["sudoku", "countdown, of 3", "repair, canvas"])
def test_examples_are_a_source_of_batches(kind):
    task = made(kind)
    source = tasks.Examples(task, "train", 40)
    assert isinstance(source, data.Source)
    batches = data.batches(source, batch=8, length=task.length, pad_id=0, seed=0)
    batch = next(batches)
    assert batch["tokens"].shape == (8, task.length)
    assert ("given" in batch) == (task.layout == "canvas")
    known = {row.tokens.tobytes() for row in rows(task, "train", 40)}
    for tokens, length in zip(batch["tokens"], batch["lengths"], strict=True):
        assert tokens[:length].tobytes() in known


def test_filled_answers_are_all_as_long():
    task = tasks.named("countdown", numbers=3)
    plain, filled = (tasks.Examples(task, "train", 9, filled=f) for f in (False, True))
    lengths = {len(plain[i].tokens) - plain[i].prompt for i in range(9)}
    assert len(lengths) > 1
    for i in range(9):
        a, b = plain[i], filled[i]
        assert len(b.tokens) - b.prompt == task.answer_length
        np.testing.assert_array_equal(b.tokens[: len(a.tokens)], a.tokens)
        assert (b.tokens[len(a.tokens) :] == task.vocabulary.eos_id).all()
        assert task.check(b, b.tokens)


def test_examples_are_checked():
    task = tasks.named("brackets")
    with pytest.raises(ValueError, match="no split 'valid'; there are train, heldout, test"):
        tasks.Examples(task, "valid", 5)
    with pytest.raises(ValueError, match="count=0"):
        tasks.Examples(task, "train", 0)
    with pytest.raises(IndexError):
        tasks.Examples(task, "train", 5)[5]
    with pytest.raises(ValueError, match="seed=-1"):
        task.example("train", 0, seed=-1)
    assert "'train', 5" in repr(tasks.Examples(task, "train", 5))
    assert len(list(tasks.Examples(task, "train", 5))) == 5


# Vocabulary


@given(st.lists(st.integers(0, 20), max_size=30))
def test_a_vocabulary_reads_what_it_writes(ids):
    vocabulary = tasks.named("countdown").vocabulary
    assert vocabulary.size == 21
    assert vocabulary.encode(vocabulary.decode(ids)).tolist() == ids


def test_a_vocabulary_refuses_what_it_does_not_have():
    vocabulary = tasks.Vocabulary("ab")
    assert (vocabulary.size, vocabulary.pad_id, vocabulary.mask_id, vocabulary.eos_id) == (
        5,
        0,
        1,
        2,
    )
    assert vocabulary.encode(f"ab{EOS}").tolist() == [3, 4, 2]
    assert vocabulary.decode([-1, 3, 5]) == "�a�"
    with pytest.raises(ValueError, match="'c' is no symbol; there are 'ab'"):
        vocabulary.encode("abc")
    for symbols in ("aa", f"a{EOS}"):
        with pytest.raises(ValueError, match="symbols must differ"):
            tasks.Vocabulary(symbols)


def test_names_and_fields_are_checked():
    assert set(tasks.TASKS) == {
        "sudoku", "countdown", "path_star", "addition", "brackets", "repair", "recall"
    }  # fmt: skip
    with pytest.raises(ValueError, match="no task 'chess'; there are sudoku, countdown"):
        tasks.named("chess")
    with pytest.raises(ValueError, match="countdown has no field 'size'; it has numbers"):
        tasks.named("countdown", size=9)
    wrong = [
        ("countdown", {"numbers": 1}, "numbers=1"),
        ("countdown", {"targets": (50, 20)}, "targets"),
        ("path_star", {"names": 10}, "names=10 must be .* at least 21 and at most 190"),
        ("path_star", {"path": 1}, "path=1"),
        ("addition", {"carries": 9}, "carries=9 .* at most 8"),
        ("addition", {"digits": 0}, "digits=0 must be a whole number, at least 1 and at most 100"),
        ("brackets", {"kinds": 5}, "kinds=5"),
        ("brackets", {"longest": 33}, "must be even"),
        ("brackets", {"longest": 10}, "at least 16"),
        ("repair", {"rate": 0.3}, "rate=0.3 must be between 0 and 0.25"),
        ("recall", {"context": 10}, "context=10"),
        ("recall", {"context": 4096, "key": 1}, "give longer keys"),
        ("recall", {"key": 14}, "key=14 must be .* at most 13"),
        ("recall", {"layout": "grid"}, "layout='grid' is none of 'prompt', 'canvas'"),
    ]
    for name, fields, message in wrong:
        with pytest.raises(ValueError, match=message):
            tasks.named(name, **fields)
    beyond = tasks.named("countdown", numbers=2, largest=9, targets=(100, 200))
    with pytest.raises(ValueError, match=r"led to none of targets=\(100, 200\)"):
        beyond.example("train", 0)


# Countdown


def test_countdown_is_evaluated():
    reaches = countdown.reaches
    assert reaches([3, 12, 7], 57, "12+7=19,19*3=57")
    assert reaches([3, 12, 7], 57, "7+12=19,3*19=57")
    assert reaches([6, 3, 2], 4, "6/3=2,2+2=4")  # a number made that equals a given one
    assert reaches([5, 5], 25, "5*5=25")
    assert reaches([5, 5, 9], 9, "5-5=0,9+0=9")
    wrong = [
        ([3, 12, 7], 57, "12+7=19,19*3=58"),  # does not hold
        ([3, 12, 7], 58, "12+7=19,19*3=57"),  # not the target
        ([3, 12, 7], 19, "12+7=19"),  # a number is left
        ([3, 12, 7], 57, "12+7=19,19*3=57,"),  # an end without an equation
        ([3, 12, 7], 57, "12+7=19,3*19=57,57*1=57"),  # a number from nowhere
        ([5, 9], 25, "5*5=25"),  # one number twice
        ([5, 5, 5], 25, "5*5=25"),  # one is left
        ([3, 7], 4, "3-7=-4"),  # negative
        ([3, 7], 2, "7/3=2"),  # not whole
        ([7, 0], 7, "7/0=7"),
        ([3, 4], 7, "3+4=07"),
        ([3, 4], 7, "3+4"),
        ([3, 4], 7, ""),
        ([3, 4], 7, "4+3=7=7"),
    ]
    for numbers, target, equations in wrong:
        assert not reaches(numbers, target, equations), equations


@given(st.integers(0, 10**6))
def test_countdown_takes_sums_and_products_in_either_order(number):
    task = tasks.named("countdown", numbers=4)
    row = task.example("train", number)
    equations = text(task, row)[row.prompt : -1].split(",")
    assert len(equations) == 3
    turned = []
    for equation in equations:
        sign = next(s for s in "+-*/" if s in equation)
        left, made = equation.split("=")
        a, b = left.split(sign)
        turned.append(f"{b}{sign}{a}={made}" if sign in "+*" else equation)
    assert task.check(row, filled(task, row, ",".join(turned) + EOS))
    assert not task.check(row, filled(task, row, ",".join(equations[:2]) + EOS))
    target = int(text(task, row).split(":")[1].split("|")[0])
    assert 10 <= target <= 100


# Path-star


def test_a_path_follows_edges_from_start_to_goal():
    task = tasks.named("path_star", degree=3, path=4, names=10)
    for row in rows(task, "train", 20):
        asked, answer = text(task, row)[:-1].split("=")
        edges, ends = asked.split(";")
        edges = edges.split(",")
        assert len(edges) == len(set(edges)) == 9
        assert len({node for edge in edges for node in edge}) == 10
        out = [edge[0] for edge in edges]
        assert out.count(ends[0]) == 3  # the start's
        assert all(out.count(node) == 1 for node in set(out) - {ends[0]})
        assert len(answer) == 4
        nexts = {edge[0]: edge[1] for edge in edges}
        for first in (edge[1] for edge in edges if edge[0] == ends[0]):
            path = [ends[0], first]
            while path[-1] in nexts:
                path.append(nexts[path[-1]])
            right = path[-1] == ends[1]
            assert ("".join(path) == answer) == right
            assert task.check(row, filled(task, row, "".join(path) + EOS)) == right
        assert not task.check(row, filled(task, row, ends + EOS))  # no such edge
        assert not task.check(row, filled(task, row, answer[:-1] + EOS))
        assert not task.check(row, filled(task, row, EOS))


# Addition


def test_the_longest_chain_of_carries():
    assert carry_chain(12, 34) == 0
    assert carry_chain(5, 5) == 1
    assert carry_chain(999, 1) == 3
    assert carry_chain(999, 2) == 3
    assert carry_chain(99, 99) == 1  # each place makes its own
    assert carry_chain(45055, 55045) == 2
    assert carry_chain(90, 9) == 0  # 9, but nothing to carry
    assert carry_chain(123456, 876544) == 6


@pytest.mark.parametrize("carries", [0, 1, 3, 6])
def test_a_sum_has_the_chain_that_is_asked_for(carries):
    task = tasks.named("addition", digits=6, carries=carries)
    for row in rows(task, "train", 40):
        asked, total = text(task, row)[:-1].split("=")
        a, b = map(int, asked.split("+"))
        assert a + b == int(total)
        assert max(a, b) < 10**6
        assert carry_chain(a, b) == carries


def test_operands_are_of_all_lengths():
    task = tasks.named("addition", digits=5)
    operands = [
        operand
        for row in rows(task, "train", 400)
        for operand in text(task, row).split("=")[0].split("+")
    ]
    counts = np.bincount([len(operand) for operand in operands], minlength=6)[1:]
    assert counts.min() > 100  # of 800, 160 each
    assert not any(operand[0] == "0" and len(operand) > 1 for operand in operands)
    row = task.example("train", 0)
    total = text(task, row)[row.prompt : -1]
    assert not task.check(row, filled(task, row, f"0{total}{EOS}"))


# Brackets


@given(st.text("()[]?", max_size=12))
def test_balance_is_that_of_taking_pairs_out(word):
    left = word
    while (less := left.replace("()", "").replace("[]", "")) != left:
        left = less
    assert balanced(word) == (left == "")


def test_a_hole_takes_any_filling():
    assert fits(["([", ")", ""], "([]{})")
    assert fits(["([", ")", ""], "([])")
    assert not fits(["([", ")", ""], "[()]")
    assert not fits(["(", ")"], "(")  # what is kept does not overlap
    assert fits(["(", ")"], "()")


def test_any_balanced_filling_is_right_and_no_longer_one():
    task = tasks.named("brackets", kinds=2, holes=1, hole=4, longest=14)
    for row in rows(task, "train", 30):
        asked, answer = text(task, row)[: row.prompt - 1], text(task, row)[row.prompt : -1]
        before, after = asked.split("?")
        hidden = answer[len(before) : len(answer) - len(after)]
        assert 1 <= len(hidden) <= 4
        for more in ("()", "[]", "[()]"):
            other = before + more + hidden + after
            assert task.check(row, filled(task, row, other + EOS)) == (len(other) <= 14)
        assert not task.check(row, filled(task, row, before + ")" + hidden + after + EOS))
        if before and after:
            assert not task.check(row, filled(task, row, f"()[]{EOS}"[-len(asked) :]))
        assert not task.check(row, filled(task, row, asked + EOS))  # the hole itself


# Repair


def test_words_differ_in_three_digits():
    pairs = np.stack(np.meshgrid(np.arange(7), np.arange(7)), -1).reshape(-1, 2)
    words = _whole(pairs)
    apart = (words[:, None] != words[None]).sum(-1)
    assert apart[~np.eye(49, dtype=bool)].min() == 3


@pytest.mark.parametrize(("rate", "errors"), [(0.0, 0), (0.1, 4), (0.25, 10)])
def test_so_many_tokens_are_wrong_and_one_sentence_is_near(rate, errors):
    task = tasks.named("repair", words=10, rate=rate)
    assert task.errors == errors
    for row in rows(task, "train", 10):
        asked, answer = text(task, row)[:-1].split("=")
        assert sum(a != b for a, b in zip(asked, answer, strict=True)) == errors
        assert task.check(row, filled(task, row, asked + EOS)) == (errors == 0)
        # Another word of the language, where all else is right.
        other = "1010" if answer[:4] == "0000" else "0000"
        assert not task.check(row, filled(task, row, other + answer[4:] + EOS))


# Recall


@pytest.mark.parametrize("context", [512, 4096])
def test_a_context_is_full_and_holds_what_is_asked(context):
    task = tasks.named("recall", context=context, queries=3)
    row = task.example("test", 0)
    assert context - 9 < row.prompt <= context
    pairs, rest = text(task, row).split("|")
    asked, answer = rest[:-1].split("=")
    known = dict(pair.split(":") for pair in pairs.split(","))
    assert len(known) == task.pairs
    assert [known[key] for key in asked.split(",")] == answer.split(",")
    assert len(set(asked.split(","))) == 3
    values = answer.split(",")
    if len(set(values)) > 1:
        assert not task.check(row, filled(task, row, ",".join(values[1:] + values[:1]) + EOS))
