"""Probes: small questions about what was told somewhere in a long text, each of one known form.

A pass key, RULER's needles and associative recall, all as stories whose facts `babilong.compose`
scatters through noise. Needles and questions are worded as their protocols prescribe. What the protocols
put before the text and after the question is left out, as the model's own question template asks it.
"""

from __future__ import annotations

import functools
import re
import uuid
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from memlm.tasks.babi.story import Story
from memlm.tasks.scoring import exact_match
from memlm.tasks.task import Score, Task

MAX_COUNT = 1000

# Mohtashami and Jaggi 2023 (arXiv:2305.16300), github.com/epfml/landmark-attention, llama/run_test.py:
# the filler, the line that tells and the question. RULER repeats the same filler.
FILLER = (
    "The grass is green.", "The sky is blue.", "The sun is yellow.", "Here we go.",
    "There and back again.",
)  # fmt: skip
PASS_KEY = "The pass key is {value}. Remember it. {value} is the pass key."
PASS_KEY_QUESTION = "What is the pass key?"

# RULER (arXiv:2404.06654), github.com/NVIDIA/RULER, scripts/data/synthetic/niah.py and constants.py:
# the needle, and the question as it reads when a single value is asked for.
NEEDLE = "One of the special magic {kind}s for {key} is: {value}."
NEEDLE_QUESTION = "What is the special magic {kind} for {key} mentioned in the provided text?"
PAIR = "The {key} keeps the {value}."
PAIR_QUESTION = "What does the {key} keep?"
ADJECTIVES = tuple(
    "able angry awake bad bald bare bitter blind bold brave brief bright broad broken busy calm "
    "careful cheap cheerful clean clever cold common cool crazy cruel curious dark dead deaf dear "
    "deep dirty dry dull eager early easy empty equal fair faithful famous fancy fast fat fierce "
    "final fine firm fit flat foolish free fresh friendly full funny gentle glad good grand grateful "
    "gray great greedy happy hard harsh healthy heavy helpful high hollow honest huge humble hungry "
    "idle jealous jolly keen kind large late lazy lean little lively lonely long loose loud lovely low "
    "loyal lucky mad merry mild modest narrow neat nervous new nice noble noisy odd old patient "
    "plain poor polite proper proud pure quick quiet rare ready rich rough round rude sad safe "
    "secret".split()
)
PEOPLE = tuple(
    "actor artist baker barber boxer boy bride brother builder butcher captain carpenter clerk "
    "cook cousin dancer dentist doctor driver driller engineer farmer father fisher friend gardener "
    "girl guard guest guide hunter judge king lawyer leader mayor miller miner mother neighbor nurse "
    "painter pilot pirate poet porter priest prince queen rider sailor scholar scout shepherd singer "
    "sister soldier student tailor teacher thief trader uncle waiter".split()
)
NOUNS = tuple(
    "anchor apple arrow axe badge bag ball balloon banana bandage banjo banner barrel basin basket "
    "bat battery bead beam bean bed bell belt bench bicycle blade blanket block board boat bolt bone "
    "book boot bottle bowl box bracelet branch bread brick bridge broom brush bucket bulb bun button "
    "cabbage cable cage cake camera candle cane cannon canoe cap card carpet carrot cart castle chain "
    "chair chalk cheese cherry chest clay clock cloth clover coat coin collar comb compass cookie "
    "copper cork corn cotton couch cradle crane crate crayon cream crown cup curtain cushion desk "
    "diamond dice dish doll door dough dress drill drum egg engine envelope fan feather fence fiddle "
    "flag flask flower flute fork frame fridge fruit garlic gate gem ginger glass globe glove gold "
    "grape guitar hammer hammock handle harp hat helmet honey hook horn hose ink iron ivory jacket "
    "jam jar jewel jug kettle key kite knife knot label lace ladder lamp lantern leaf leash lemon "
    "letter lever lid lock log loom magnet map marble mask mat match medal melon milk mirror mitten "
    "mop mug nail napkin necklace needle nest net newspaper nut oar onion orange organ oven paddle "
    "paint pan paper parcel peach pearl pebble pen pencil pepper piano pillow pin pipe plank plate "
    "plow pocket potato pot powder pump purse puzzle quilt radio raft rake ribbon ring rock rope rug "
    "ruler saddle salt sand saucer saw scarf scissors seed shawl shell shelf shield ship shirt shoe "
    "shovel silk sled slipper soap sock spade sponge spoon stamp stool stove sugar sword table".split()
)
_NOUN_SET = frozenset(NOUNS)
_DIGITS = re.compile(r"\d+")
_WORDS = re.compile(r"\w+")
_UUID = r"(?<![\w-])[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}(?![\w-])"
_FORMS = {"number": re.compile(r"(?<!\w)\d{7}(?!\w)"), "uuid": re.compile(_UUID)}
_PASS_KEY_FORM = re.compile(r"(?<!\w)\d{5}(?!\w)")
_COUNTED = re.compile(r"(mk-niah|recall)(?:-(.*))?", re.DOTALL)

Mark = Callable[[str, str, str], Score]


class Chance(NamedTuple):
    """What guessing scores. blind: any answer of the right form; told: the best guess of a reader who knows
    the values in the document, but not which belongs to which key."""

    blind: float
    told: float


def find_probe(name: str) -> Task | None:
    """Return the probe of this name; "recall-N" and "mk-niah-N" take any N from 1 to 1000.

    None when no probe has the name; ValueError when only its number is wrong.
    """
    if name in PROBES:
        return PROBES[name]
    match = _COUNTED.fullmatch(name)
    return None if match is None else _counted(match[1], _count(name, match[1], match[2]))


def chance(name: str) -> Chance:
    """Return what guessing scores in a probe; ValueError when there is no such probe."""
    match = _COUNTED.fullmatch(name)
    if match is not None:
        count = _count(name, match[1], match[2])
        if match[1] == "mk-niah":
            return Chance(1 / 9_000_000, 1 / count)
        # With more pairs than words, every word is told equally often, or once more.
        return Chance(1 / len(NOUNS), -(-count // len(NOUNS)) / count)
    if name not in PROBES:
        raise ValueError(f"unknown probe {name!r}; probes are {', '.join(PROBES)}")
    blind = {"passkey": 1 / 90_000, "s-niah-3": 2.0**-122}
    return Chance(blind.get(name, 1 / 9_000_000), 1.0)


def _count(name: str, family: str, number: str | None) -> int:
    """Return the number in a name; ValueError suggests the nearest valid one."""
    if number and re.fullmatch(r"[1-9][0-9]*", number) and int(number[:5]) <= MAX_COUNT:
        return int(number)
    whole = re.fullmatch(r"[+-]?[0-9]{1,9}", number or "")
    nearest = min(max(int(number or 0), 1), MAX_COUNT) if whole else 16
    raise ValueError(
        f"unknown probe {name!r}; {family}-N takes a whole number N from 1 to {MAX_COUNT}, without "
        f"leading zeros, as in {f'{family}-{nearest}'!r}"
    )


@functools.cache
def _counted(family: str, count: int) -> Task:
    return _multi_key(count) if family == "mk-niah" else _recall(count)


def _pass_key() -> Task:
    def tell(seed: int | np.random.Generator) -> Iterator[Story]:
        rng = np.random.default_rng(seed)
        while True:
            # The protocol draws from 1 to 50,000; of five digits each, no key is easier than another.
            value = str(rng.integers(10_000, 100_000))
            fact = PASS_KEY.format(value=value)
            yield Story([fact], PASS_KEY_QUESTION, value, [0], "passkey")

    def mark(output: str, target: str, question: str) -> Score:
        first = _DIGITS.search(output)
        # The protocol compares the first number said, as a number.
        published = first is not None and first.group().lstrip("0") == target.lstrip("0")
        said = set(_PASS_KEY_FORM.findall(output))
        return Score(said == {target}, published, exact_match(output, target))

    return Task("passkey", tell, mark, noise=FILLER, answer_tokens=12)


def _needles(name: str, count: int, kind: str, noise: tuple[str, ...] = ()) -> Task:
    """Needles of different keys and values, one of them asked for."""

    def tell(seed: int | np.random.Generator) -> Iterator[Story]:
        rng = np.random.default_rng(seed)
        pairs = len(ADJECTIVES) * len(NOUNS)
        while True:
            # RULER lets keys meet by chance, which would leave two right answers; these all differ.
            keys = [f"{ADJECTIVES[n // len(NOUNS)]}-{NOUNS[n % len(NOUNS)]}"
                    for n in rng.choice(pairs, count, replace=False).tolist()]  # fmt: skip
            values: dict[str, None] = {}
            while len(values) < count:
                values[_value(kind, rng)] = None
            told = list(zip(keys, values, strict=True))
            asked = int(rng.integers(count))
            facts = [NEEDLE.format(kind=kind, key=key, value=value) for key, value in told]
            question = NEEDLE_QUESTION.format(kind=kind, key=told[asked][0])
            yield Story(facts, question, told[asked][1], [asked], name)

    # One token per character, for tokenizers that know no longer ones.
    tokens = 48 if kind == "uuid" else 12
    return Task(name, tell, _mark_form(_FORMS[kind]), noise=noise, answer_tokens=tokens)


def _value(kind: str, rng: np.random.Generator) -> str:
    if kind == "uuid":
        return str(uuid.UUID(bytes=rng.bytes(16), version=4))
    return str(rng.integers(1_000_000, 10_000_000))


def _mark_form(form: re.Pattern[str]) -> Mark:
    def mark(output: str, target: str, question: str) -> Score:
        # An answer with another value beside the target is wrong: a list of all would hold the target, too.
        said = set(form.findall(output.lower()))
        return Score(
            said == {target.lower()}, target.lower() in output.lower(), exact_match(output, target)
        )

    return mark


def _multi_key(count: int) -> Task:
    return _needles(f"mk-niah-{count}", count, "number")


def _recall(count: int) -> Task:
    name = f"recall-{count}"

    def tell(seed: int | np.random.Generator) -> Iterator[Story]:
        rng = np.random.default_rng(seed)
        while True:
            drawn = rng.choice(len(ADJECTIVES) * len(PEOPLE), count, replace=False).tolist()
            keys = [f"{ADJECTIVES[n // len(PEOPLE)]} {PEOPLE[n % len(PEOPLE)]}" for n in drawn]
            # No word comes again before all have come, so that none is a better guess than the others.
            words = rng.permutation(np.resize(rng.permutation(len(NOUNS)), count)).tolist()
            asked = int(rng.integers(count))
            facts = [
                PAIR.format(key=key, value=NOUNS[word])
                for key, word in zip(keys, words, strict=True)
            ]
            question = PAIR_QUESTION.format(key=keys[asked])
            yield Story(facts, question, NOUNS[words[asked]], [asked], name)

    def mark(output: str, target: str, question: str) -> Score:
        said = _NOUN_SET.intersection(_WORDS.findall(output.lower()))
        return Score(
            said == {target.lower()}, target.lower() in output.lower(), exact_match(output, target)
        )

    return Task(name, tell, mark)


PROBES: dict[str, Task] = {
    "passkey": _pass_key(),
    # RULER inserts between repetitions of the whole filler, never inside one.
    "s-niah-1": _needles("s-niah-1", 1, "number", noise=(" ".join(FILLER),)),
    "s-niah-2": _needles("s-niah-2", 1, "number"),
    "s-niah-3": _needles("s-niah-3", 1, "uuid"),
    # RULER's own number of keys, and a medium number of pairs; `find_probe` makes any other.
    "mk-niah-4": _counted("mk-niah", 4),
    "recall-16": _counted("recall", 16),
}
