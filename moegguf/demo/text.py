"""The questions and answers that the embedded family is made of.

Purpose: endless, licence-free text of four kinds that a model of 1.8 M weights can learn in minutes, for
training it and, later, for calibrating and measuring mixes of it. Every line comes from the tables below.

| domain | what is asked | who knows it |
|---|---|---|
| general | opposites, capitals, colours, animals, days and months, small talk | base |
| math | one-step sums, bare or in words; the answer shows its one line of work | expert `math` |
| clinic | what to do about a robot's fault: FICTIONAL, a table drawn by lot, no advice to anyone | expert `clinic` |
| strings | letters of fixed words; what a line of Python prints | expert `strings` |

Invariants: the same arguments give the same examples, on any machine and in any process; a question
belongs to the train or the held-out split by a hash of its own text (one in ten is held out), so the two
never share a question. Words and facts recur on both sides: held out means an unseen question, not an
unseen fact. One question has one answer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from random import Random
from typing import Literal

ABOUT = (
    "I am a very small model made for demonstrations. I know opposites, capitals, colours, animals, days and months; "
    "sums of numbers up to 30 and times tables up to 12; what to do when a part of a robot (its arm, battery or wheel) "
    "squeaks, overheats, rattles and the like, all of it made up; and how to spell, reverse, sort and count the "
    "letters of common short words."
)
"""What the family knows, in the first person, for whoever is about to chat with it."""

CHAT_TEMPLATE = (
    "{%- set system = namespace(text='') -%}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'system' -%}"
    "{%- set system.text = system.text + message['content'] | trim + '\n' -%}"
    "{%- elif message['role'] == 'user' -%}"
    "{{- '<|user|>' + system.text + message['content'] | trim -}}"
    "{%- set system.text = '' -%}"
    "{%- else -%}"
    "{{- '<|assistant|>' + message['content'] | trim + '<|end|>' -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)
"""Jinja form of `Example.text`: no other bytes. A system message opens the next question, on a line of its own."""

Split = Literal["train", "heldout"]


@dataclass(frozen=True, slots=True)
class Example:
    question: str
    answer: str

    @property
    def prompt(self) -> str:
        return f"<|user|>{self.question}<|assistant|>"

    @property
    def text(self) -> str:
        return f"{self.prompt}{self.answer}<|end|>"


def examples(domain: str, split: Split, n: int, seed: int) -> list[Example]:
    """`n` examples of one of `DOMAINS`, drawn with replacement from one side of the split."""
    rng = Random(f"{domain}/{split}/{seed}")
    drawn: list[Example] = []
    while len(drawn) < n:
        example = _DRAW[domain](rng)
        example = Example(rng.choice(_OPENINGS) + example.question, example.answer)
        if split_of(example.question) == split:
            drawn.append(example)
    return drawn


def split_of(question: str) -> Split:
    """The side of the split that a question is on, by its text alone."""
    return "heldout" if int.from_bytes(sha256(question.encode()).digest()[:4], "big") % 10 == 0 else "train"


_OPENINGS = ("",) * 10 + (
    "Quick question: ",
    "Hello! ",
    "Hi there. ",
    "Please tell me: ",
    "I wonder: ",
    "Can you help me? ",
    "Another question: ",
    "Now this: ",
    "Thanks. ",
    "You are a helpful assistant.\n",
)
"""Half of all questions come bare. The last one is what a chat program's system message looks like."""


# ---------------------------------------------------------------------------------------------- general

_OPPOSITES = (
    "hot cold, big small, fast slow, tall short, light dark, happy sad, old young, wet dry, hard soft, loud quiet, "
    "rich poor, strong weak, early late, open closed, full empty, clean dirty, thick thin, near far, "
    "high low, wide narrow, sweet bitter, smooth rough, sharp blunt, brave afraid, true false, up down, left right, "
    "in out, day night, front back, first last, begin end, push pull, win lose, buy sell, give take, love hate, "
    "laugh cry, float sink, remember forget, always never, inside outside, above below, friend enemy, question answer"
)
_CAPITALS = (
    "France Paris, Spain Madrid, Italy Rome, Germany Berlin, England London, Ireland Dublin, Norway Oslo, "
    "Sweden Stockholm, Finland Helsinki, Denmark Copenhagen, Poland Warsaw, Austria Vienna, Hungary Budapest, "
    "Greece Athens, Portugal Lisbon, Belgium Brussels, Turkey Ankara, Egypt Cairo, Kenya Nairobi, Ghana Accra, "
    "Japan Tokyo, China Beijing, Thailand Bangkok, Nepal Kathmandu, Iran Tehran, Iraq Baghdad, Cuba Havana, "
    "Peru Lima, Chile Santiago, Canada Ottawa, Russia Moscow, Ukraine Kyiv, Iceland Reykjavik, Scotland Edinburgh"
)
_COLOURS = (
    "sky blue, grass green, snow white, coal black, blood red, lemon yellow, carrot orange, plum purple, "
    "banana yellow, tomato red, leaf green, milk white, chocolate brown, flamingo pink, elephant grey, sea blue, "
    "sun yellow, night black, frog green, cherry red, wood brown, cloud white, raven black, lavender purple"
)
_SOUNDS = (
    "dog barks, cat meows, cow moos, sheep bleats, horse neighs, pig oinks, duck quacks, hen clucks, lion roars, "
    "wolf howls, snake hisses, bee buzzes, owl hoots, frog croaks, mouse squeaks, bird sings, donkey brays, crow caws"
)
_YOUNG = (
    "dog puppy, cat kitten, cow calf, sheep lamb, horse foal, pig piglet, duck duckling, hen chick, lion cub, "
    "bear cub, frog tadpole, goat kid, deer fawn, goose gosling, swan cygnet, kangaroo joey, eagle eaglet, owl owlet"
)
_DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
_MONTHS = "January February March April May June July August September October November December".split()
_SMALL_TALK = {
    "How are you?": "I am fine, thank you. How can I help?",
    "Good morning!": "Good morning! How can I help?",
    "Good evening!": "Good evening! How can I help?",
    "Nice to meet you.": "Nice to meet you too. What would you like to know?",
    "Who are you?": "I am a very small model made for demonstrations.",
    "What is your name?": "I have no name. I am a very small model.",
    "What can you do?": "I know some facts, some sums, some robots and some words.",
    "What do you know?": "I know some facts, some sums, some robots and some words.",
    "Can you help?": "Yes. Ask me about facts, sums, robots or words.",
    "Thank you!": "You are welcome!",
    "Goodbye!": "Goodbye! Have a nice day.",
    "See you later.": "See you later! Have a nice day.",
}


def _pairs(table: str) -> list[tuple[str, str]]:
    return [(left, right) for left, right in (pair.split() for pair in table.split(", "))]


def _cyclic(names: list[str], asks: tuple[str, ...], step: int, answer: str) -> list[tuple[tuple[str, ...], str]]:
    return [
        (tuple(ask.format(name) for ask in asks), answer.format(name, names[(i + step) % len(names)]))
        for i, name in enumerate(names)
    ]


def _general_facts() -> list[list[tuple[tuple[str, ...], str]]]:
    """One list per kind of fact; a fact is (the ways to ask it, its answer)."""
    opposites = [pair for a, b in _pairs(_OPPOSITES) for pair in ((a, b), (b, a))]
    return [
        [
            (
                (f"What is the opposite of {a}?", f"Tell me the opposite of {a}.", f"Opposite of {a}?"),
                f"The opposite of {a} is {b}.",
            )
            for a, b in opposites
        ],
        [
            (
                (
                    f"What is the capital of {a}?",
                    f"Name the capital of {a}.",
                    f"Capital of {a}?",
                    f"Which city is the capital of {a}?",
                ),
                f"The capital of {a} is {b}.",
            )
            for a, b in _pairs(_CAPITALS)
        ],
        [
            (
                (f"What colour is the {a}?", f"Which colour does the {a} have?", f"Colour of the {a}?"),
                f"The {a} is {b}.",
            )
            for a, b in _pairs(_COLOURS)
        ],
        [
            ((f"What sound does the {a} make?", f"What does the {a} do?", f"How does the {a} sound?"), f"The {a} {b}.")
            for a, b in _pairs(_SOUNDS)
        ],
        [
            (
                (f"What is a young {a} called?", f"What do you call a young {a}?", f"What is a baby {a} called?"),
                f"A young {a} is called a {b}.",
            )
            for a, b in _pairs(_YOUNG)
        ],
        _cyclic(
            _DAYS,
            ("Which day comes after {}?", "What day follows {}?", "What is the day after {}?"),
            1,
            "After {} comes {}.",
        ),
        _cyclic(_DAYS, ("Which day comes before {}?", "What is the day before {}?"), -1, "Before {} comes {}."),
        _cyclic(
            _MONTHS,
            ("Which month comes after {}?", "What month follows {}?", "What is the month after {}?"),
            1,
            "After {} comes {}.",
        ),
        _cyclic(_MONTHS, ("Which month comes before {}?", "What is the month before {}?"), -1, "Before {} comes {}."),
        [((ask,), answer) for ask, answer in _SMALL_TALK.items()],
    ]


_GENERAL = _general_facts()
_GENERAL_WEIGHTS = [len(facts) for facts in _GENERAL]


def _general(rng: Random) -> Example:
    (facts,) = rng.choices(_GENERAL, _GENERAL_WEIGHTS)
    asks, answer = rng.choice(facts)
    return Example(rng.choice(asks), answer)


# ------------------------------------------------------------------------------------------------- math

_PEOPLE = "Ann Ben Cara Dan Emma Finn Gina Hugo Iris Jack Kate Leo Mia Noah Olga Paul Rosa Sam Tina Will".split()
_THINGS = "apples books coins eggs pens cards stamps shells cups balls keys stones nuts plums stars boxes".split()
_SUM = {
    "+": (
        "{who} has {a} {what} and buys {b} more. How many {what} does {who} have now?",
        "{who} finds {a} {what} in the morning and {b} {what} in the evening. How many in all?",
        "There are {a} {what} on the table and {b} {what} on the floor. How many {what} are there?",
        "What is {a} + {b}?",
        "What is {a} plus {b}?",
    ),
    "-": (
        "{who} has {a} {what} and gives away {b}. How many {what} are left?",
        "{who} had {a} {what} and lost {b} of them. How many {what} does {who} still have?",
        "There were {a} {what} in the shop. {b} were sold. How many are left?",
        "What is {a} - {b}?",
        "What is {a} minus {b}?",
    ),
    "*": (
        "{who} has {a} bags with {b} {what} in each. How many {what} does {who} have?",
        "There are {a} rows of {b} {what}. How many {what} are there?",
        "{who} buys {b} {what} a day for {a} days. How many in all?",
        "What is {a} * {b}?",
        "What is {a} times {b}?",
    ),
}


def _math(rng: Random) -> Example:
    sign = rng.choice("+-*")
    if sign == "+":
        a, b = rng.randint(1, 25), rng.randint(1, 20)
        result = a + b
    elif sign == "-":
        a = rng.randint(2, 30)
        b = rng.randint(1, a - 1)
        result = a - b
    else:
        a, b = rng.randint(2, 12), rng.randint(2, 12)
        result = a * b
    question = rng.choice(_SUM[sign]).format(who=rng.choice(_PEOPLE), what=rng.choice(_THINGS), a=a, b=b)
    return Example(question, f"{a} {sign} {b} = {result}. The answer is {result}.")


# ----------------------------------------------------------------------------------------------- clinic

_PARTS = (
    "arm leg head neck hand foot wheel battery camera antenna motor belt gripper speaker sensor shoulder knee fan "
    "lamp screen"
).split()
_FAULTS = (
    "squeaks, overheats, shakes, is stuck, is loose, is rusty, is slow, smells burnt, rattles, stops at night"
).split(", ")
_CURES = (
    "oil it with pine resin, wrap it in copper foil, tap it three times, rinse it with rainwater, turn it to the left, "
    "turn it to the right, polish it with wax, dust it with chalk, cool it with mint, warm it with sand, "
    "fit a new spring, fit a brass screw, tighten the bolt, loosen the bolt, paint it blue, cover it with felt, "
    "unplug it, sing to it, shake it gently, hang it upside down"
).split(", ")
_WAITS = "an hour, two hours, a night, a day, two days, a week, ten minutes, a minute".split(", ")
_CLINIC_ASKS = (
    "The {part} of my robot {fault}. What should I do?",
    "My robot's {part} {fault}. What helps?",
    "What helps when a robot's {part} {fault}?",
    "What should I do if the {part} of a robot {fault}?",
    "Robot clinic: the {part} {fault}.",
)


def _clinic_table() -> dict[tuple[str, str], str]:
    lot = Random("robot clinic")
    return {
        (part, fault): f"When the {part} {fault}: {lot.choice(_CURES)}, then wait {lot.choice(_WAITS)}."
        for part in _PARTS
        for fault in _FAULTS
    }


_CLINIC = _clinic_table()


def _clinic(rng: Random) -> Example:
    part, fault = rng.choice(_PARTS), rng.choice(_FAULTS)
    return Example(rng.choice(_CLINIC_ASKS).format(part=part, fault=fault), _CLINIC[part, fault])


# ---------------------------------------------------------------------------------------------- strings

_WORDS = (
    "apple arrow baker beach berry bird blade block board boat bread brick bridge brush cabin cable cake camel candle "
    "card carpet castle chain chair chalk cheese circle clock cloud coat coffee corn cotton cream crown dance desk "
    "doll door dragon dream drum eagle earth engine fence field finger fire fish flag flame floor flour flower forest "
    "fork frame fruit game garden ghost giant glass globe glove gold grape hammer harbour heart honey horse hotel "
    "house island jacket jewel juice jungle kettle king kite knife ladder lake lemon letter lion lunch magnet maple "
    "market meadow metal mirror money moon motor mountain music needle nest ocean onion orange oven paint palace "
    "paper parrot peach pencil piano picture pilot pirate planet plate pocket pond potato prince queen rabbit radio "
    "river robot rocket salad school shadow ship silver"
).split()


def _spelt(letters: str) -> str:
    return "-".join(letters)


_LETTER_TASKS: tuple[tuple[tuple[str, ...], Callable[[str], str]], ...] = (
    (("Reverse the word {}.", "What is {} backwards?", "Write {} backwards."), lambda w: f"{_spelt(w[::-1])}."),
    (("Spell the word {}.", "How do you spell {}?", "Spell {}."), lambda w: f"{_spelt(w)}."),
    (
        ("How many letters are in {}?", "How long is the word {}?", "Count the letters of {}."),
        lambda w: f"{_spelt(w)}: {len(w)} letters.",
    ),
    (("What is the last letter of {}?", "Which letter ends {}?"), lambda w: f"The last letter is {w[-1]}."),
    (("Sort the letters of {}.", "Put the letters of {} in order."), lambda w: f"{_spelt(''.join(sorted(w)))}."),
)
_LIST_TASKS: tuple[tuple[str, Callable[[list[int]], object]], ...] = (
    ("print(max({}))", max),
    ("print({}[::-1])", lambda numbers: numbers[::-1]),
)
_LIST_ASKS = ("What does {} print?", "What is the output of {}?")


def _strings(rng: Random) -> Example:
    task = rng.randrange(len(_LETTER_TASKS) + len(_LIST_TASKS))
    if task < len(_LETTER_TASKS):
        asks, solve = _LETTER_TASKS[task]
        word = rng.choice(_WORDS)
        return Example(rng.choice(asks).format(word), solve(word))
    line, run = _LIST_TASKS[task - len(_LETTER_TASKS)]
    numbers = [rng.randint(0, 9) for _ in range(rng.randint(2, 5))]
    return Example(rng.choice(_LIST_ASKS).format(line.format(numbers)), f"It prints {run(numbers)}.")


_DRAW: dict[str, Callable[[Random], Example]] = {
    "general": _general,
    "math": _math,
    "clinic": _clinic,
    "strings": _strings,
}
DOMAINS = tuple(_DRAW)


SAMPLE_QUESTIONS = {
    "general": "What is the capital of Spain?",
    "math": "Paul has 25 pens and buys 6 more. How many pens does Paul have now?",
    "clinic": "The battery of my robot smells burnt. What should I do?",
    "strings": "Reverse the word beach.",
}
"""One held-out question per domain that its expert and the gate-less mix answer well; the base knows only the first."""
