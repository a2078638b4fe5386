"""Countdown: reach a target from a few numbers by sums, differences, products and quotients."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dllm_jax.data.rows import Row
from dllm_jax.tasks.task import Vocabulary, answer_of, drawn, within, written

_EQUATION = re.compile(r"(N)([-+*/])(N)=(N)".replace("N", "0|[1-9][0-9]{0,8}"))
_LARGEST = 999  # of the numbers on the way of the row's own answer


@dataclass(frozen=True, kw_only=True)
class Countdown:
    """`3,12,7:57|` is answered by `12+7=19,19*3=57`: k - 1 equations, the last one the target's.

    Each equation uses two of the numbers at hand, given or made, once; all given ones are used.
    Numbers are whole, differences not negative, quotients exact. Any right answer counts.

    After Stream of Search (2404.03683) and MGDM (2410.14157), whose targets are 10 to 100. What is
    ours: numbers are drawn evenly from 1 to `largest`, and the target is where random equations
    lead (no number on the way is above 999), so with four numbers a target in the nineties is 1.7
    times as frequent as one below 20; and what is held out is a question (numbers and target), not
    a target.
    """

    name = "countdown"
    layout = "prompt"
    vocabulary = Vocabulary("0123456789+-*/=,:|")

    numbers: int = 4
    """How many are given: k."""
    largest: int = 100
    targets: tuple[int, int] = (10, 100)
    """The least and the most."""

    def __post_init__(self) -> None:
        within("numbers", self.numbers, 2, 8)
        within("largest", self.largest, 2, _LARGEST)
        least, most = self.targets
        if not 0 < least <= most <= _LARGEST:
            raise ValueError(f"targets={self.targets} must be two numbers between 1 and {_LARGEST}")

    @property
    def length(self) -> int:
        question = self.numbers * (len(str(self.largest)) + 1) + len(str(self.targets[1])) + 1
        return question + self.answer_length

    @property
    def answer_length(self) -> int:
        return (self.numbers - 1) * len("999+999=999,")  # the last comma's place is the end's

    def example(self, split: str, index: int, seed: int = 0) -> Row:
        return written(self.vocabulary, *drawn(self._made, split, index, seed))

    def check(self, row: Row, tokens: Sequence[int] | np.ndarray) -> bool:
        answer = answer_of(self.vocabulary, row, tokens)
        if answer is None:
            return False
        numbers, target = self.vocabulary.decode(row.tokens[: row.prompt - 1]).split(":")
        return reaches([int(x) for x in numbers.split(",")], int(target), answer)

    def show(self, tokens: Sequence[int] | np.ndarray) -> str:
        return self.vocabulary.decode(tokens)

    def _made(self, draw: np.random.Generator) -> tuple[str, tuple[str, str]]:
        for _ in range(10_000):
            given = [int(x) for x in draw.integers(1, self.largest, self.numbers, endpoint=True)]
            at_hand, equations = list(given), []
            while len(at_hand) > 1:
                rest = list(at_hand)
                a, b = (rest.pop(draw.integers(len(rest))) for _ in range(2))
                made = {sign: result(a, sign, b) or 0 for sign in "+-*/"}
                signs = [sign for sign in made if 0 < made[sign] <= _LARGEST]
                if not signs:
                    break
                sign = signs[draw.integers(len(signs))]
                at_hand = [*rest, made[sign]]
                equations.append(f"{a}{sign}{b}={made[sign]}")
            target = at_hand[-1]
            if len(at_hand) == 1 and self.targets[0] <= target <= self.targets[1]:
                question = f"{','.join(map(str, given))}:{target}|"
                return f"{sorted(given)}:{target}", (question, ",".join(equations))
        raise ValueError(
            f"10,000 times numbers={self.numbers} of largest={self.largest} led to none of"
            f" targets={self.targets}: give targets that they reach"
        )


def result(a: int, sign: str, b: int) -> int | None:
    """Of an equation; None where it is not whole, or negative."""
    if sign == "+":
        return a + b
    if sign == "*":
        return a * b
    if sign == "-":
        return a - b if a >= b else None
    return a // b if b and a % b == 0 else None


def reaches(numbers: Sequence[int], target: int, equations: str) -> bool:
    """Whether equations lead from all of the numbers to the target."""
    at_hand = Counter(numbers)
    made = None
    for text in equations.split(","):
        found = _EQUATION.fullmatch(text)
        if found is None:
            return False
        a, sign, b, said = int(found[1]), found[2], int(found[3]), int(found[4])
        at_hand.subtract((a, b))
        made = result(a, sign, b)
        if min(at_hand[a], at_hand[b]) < 0 or made is None or made != said:
            return False
        at_hand[made] += 1
    return made == target and sum(at_hand.values()) == 1
