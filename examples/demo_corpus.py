"""The demo's corpus: invented facts about invented people, each stated by several documents.

Every fact is a (person, field, value). A row of `facts.jsonl` states one or two facts of one
person, or none: distractors name a person without a fact, or a value without a person. Names
are unique, values are shared by two people, so that neither a name alone nor a value alone tells
which documents an answer comes from; `supporting` of a question does.

Only `random.Random.random` is used, the one generator that Python promises never to change, so
that every version writes the same files.
"""

import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

PEOPLE = 40
VALUES = 20  # of each field, so that two people share one

GIVEN = (["Zan", "Brim", "Quil", "Tev", "Yl", "Fen", "Or", "Khad", "Sil", "Wex", "Dj", "Mur"],
         ["ando", "ivik", "elesh", "amora", "ippin", "azaru", "equell", "otis"])  # fmt: skip
FAMILY = (["Grov", "Plim", "Stro", "Hax", "Benn", "Urv", "Tolk", "Cribb", "Nau", "Vosk", "Jel"],
          ["azeen", "uddle", "onquist", "arbeck", "imoor", "ettrick", "owzik"])  # fmt: skip
TOWN = (["Kess", "Orl", "Drumb", "Velt", "Quor", "Snar", "Ilb", "Tham", "Wob", "Ezz"],
        ["enfleet", "umwick", "agrad", "olmere", "isby", "untown", "astrand"])  # fmt: skip
COMPANY = (["Xan", "Plo", "Ruv", "Gim", "Skel", "Obb", "Tri", "Fozz"],
           ["dex", "vane", "mark", "zon", "lith", "corp"])  # fmt: skip
TRADE = ["Mills", "Brothers", "Foundry", "Press"]

PROFESSIONS = (
    "lamplighter cartographer glassblower locksmith beekeeper cooper translator surveyor "
    "pharmacist bookbinder shipwright falconer geologist tailor midwife baker diver "
    "notary potter juggler"
).split()
HOBBIES = (
    "chess origami fencing stargazing crochet archery calligraphy kite-flying gardening "
    "swimming embroidery birdwatching mountaineering whittling billiards skating "
    "puppetry marbles rowing astrology"
).split()
INSTRUMENTS = (
    "bassoon cello zither trombone banjo harpsichord oboe mandolin clarinet theremin "
    "accordion tuba ukulele viola dulcimer piccolo xylophone bagpipe sitar harmonica"
).split()

# Verb phrases that follow a name; the first one is also what the question asks with.
PHRASES = {
    "birthplace": ["was born in {}", "comes from {}", "is a native of {}",
                   "left {} at the age of ten", "spent an early childhood in {}"],
    "profession": ["works as a {}", "earns a living as a {}", "is a {} by trade",
                   "trained for years to become a {}", "has been a {} since the great flood"],
    "employer": ["is employed by {}", "has a desk at {}", "draws a salary from {}",
                 "signed a contract with {}", "spends the working week at {}"],
    "hobby": ["spends free evenings on {}", "is fond of {}", "gives every Sunday to {}",
              "likes {} more than any other pastime", "would never give up {}"],
    "instrument": ["plays the {}", "practises the {} at dawn", "performs on the {} at weddings",
                   "learned the {} from an aunt", "keeps a {} under the bed"],
}  # fmt: skip
# The same facts with the value before the name.
REVERSED = {
    "birthplace": "People in {value} still remember the night when {name} was born there.",
    "profession": "If you need a {value}, ask for {name}.",
    "employer": "When {value} pays its wages, {name} is the first in the queue.",
    "hobby": "Nobody talks about {value} as much as {name} does.",
    "instrument": "You can hear the {value} through the wall when {name} is at home.",
}
OPENINGS = [
    "It is well known that ",
    "According to the parish register, ",
    "As far as I can tell, ",
    "The evening paper wrote that ",
    "To nobody's surprise, ",
    "They say that ",
]
CLOSINGS = [
    "Few of the neighbours knew about it.",
    "That was the talk of the harbour for a week.",
    "So it says in the almanac, between the tides and the price of salt.",
    "Everybody else had forgotten.",
    "Ask anyone on the ferry, and you will be told the same story, only longer and with more "
    "weather in it.",
]
JOINTS = [
    "{name} {first} and {second}.",
    "{name}, who {first}, {second}.",
    "{name} {first}. Moreover, {name} {second}.",
]
SIGHTINGS = [
    "{} missed the morning ferry and waited for two hours in the rain.",
    "A letter for {} came back unopened.",
    "{} paid for the broken window.",
    "Somebody saw {} near the old lighthouse, carrying a ladder and a lantern.",
]
MENTIONS = {
    "birthplace": ["{} lies between two lakes.", "The road to {} is closed until spring."],
    "profession": ["A good {} is hard to find.", "The story begins with a {} who lost a key."],
    "employer": ["{} has repainted its gates.", "The clock above {} is four minutes slow."],
    "hobby": ["Many take up {} late in life.", "A book about {} lay on the table, unread."],
    "instrument": ["The {} is hard to tune in winter.", "He sold a {} to pay for the boat."],
}
WEATHER = [
    "It rained for three days, and the river rose above the second step.",
    "The tide tables for next year are on sale at the harbour office.",
    "A gull stole the sandwich. Nobody was surprised, least of all the gull.",
    "Salt, rope, lamp oil, and a ball of string were on the list.",
]


@dataclass(frozen=True)
class Fact:
    """A row of facts.jsonl. The strings are empty where a document names no such thing."""

    text: str
    person: str = ""
    field: str = ""
    value: str = ""
    second_field: str = ""
    second_value: str = ""

    def states(self, person: str, field: str, value: str) -> bool:
        stated = [(self.field, self.value), (self.second_field, self.second_value)]
        return self.person == person and (field, value) in stated


@dataclass(frozen=True)
class Question:
    """A row of questions.jsonl.

    Attributes:
        prompt: The beginning of a sentence.
        completion: What follows, its leading space included.
        supporting: Indices of all rows of facts.jsonl that state the answer.
    """

    prompt: str
    completion: str
    person: str
    field: str
    supporting: list[int]


def generate(seed: int = 0) -> tuple[list[Fact], list[Question]]:
    """The documents in a random order, and one question about every fact."""
    rng = random.Random(seed)
    people = _people(rng)
    facts: list[Fact] = []
    for person, values in people.items():
        facts += _statements(rng, person, values)
        facts.append(Fact(_pick(rng, SIGHTINGS).format(person), person))
    for field in PHRASES:
        for value in sorted({values[field] for values in people.values()}):
            facts.append(Fact(_pick(rng, MENTIONS[field]).format(value), field=field, value=value))
    facts += [Fact(text) for text in WEATHER]
    facts = _shuffled(rng, facts)
    questions = [
        Question(
            f"{person} {PHRASES[field][0]}".removesuffix(" {}"),
            f" {value}",
            person,
            field,
            [row for row, fact in enumerate(facts) if fact.states(person, field, value)],
        )
        for person, values in people.items()
        for field, value in values.items()
    ]
    return facts, questions


def write_jsonl(path: Path, rows: Iterable[Fact | Question]) -> None:
    """One JSON object per line."""
    path.write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows), encoding="utf-8")


def _people(rng: random.Random) -> dict[str, dict[str, str]]:
    """Name → field → value."""
    given, family = (_names(rng, parts, PEOPLE) for parts in (GIVEN, FAMILY))
    companies = _names(rng, COMPANY, VALUES)
    values = {
        "birthplace": _names(rng, TOWN, VALUES),
        "profession": PROFESSIONS,
        "employer": [f"{company} {_pick(rng, TRADE)}" for company in companies],
        "hobby": HOBBIES,
        "instrument": INSTRUMENTS,
    }
    # Whole rounds over a field's values, so that each is as frequent as the others.
    columns = {
        field: _shuffled(rng, [choices[i % len(choices)] for i in range(PEOPLE)])
        for field, choices in values.items()
    }
    return {
        f"{first} {last}": {field: columns[field][i] for field in columns}
        for i, (first, last) in enumerate(zip(given, family, strict=True))
    }


def _statements(rng: random.Random, person: str, values: dict[str, str]) -> list[Fact]:
    """Two to four documents per fact alone, and each fact in two more beside another one.

    One of them begins with the words of the question: a model this small learns to answer in
    words that it has not seen about the same person only half of the time.
    """
    facts = []
    for field, value in values.items():
        plain, *others = [f"{person} {phrase.format(value)}." for phrase in PHRASES[field]]
        others.append(REVERSED[field].format(name=person, value=value))
        for sentence in [plain, *_shuffled(rng, others)[: 1 + int(rng.random() * 3)]]:
            if sentence.startswith(person) and sentence != plain and rng.random() < 0.4:
                sentence = _pick(rng, OPENINGS) + sentence
            if rng.random() < 0.25:
                sentence += " " + _pick(rng, CLOSINGS)
            facts.append(Fact(sentence, person, field, value))
    order = _shuffled(rng, list(values))
    for first, second in zip(order, order[1:] + order[:1], strict=True):
        phrases = [_pick(rng, PHRASES[field]).format(values[field]) for field in (first, second)]
        text = _pick(rng, JOINTS).format(name=person, first=phrases[0], second=phrases[1])
        facts.append(Fact(text, person, first, values[first], second, values[second]))
    return facts


def _names(rng: random.Random, parts: tuple[Sequence[str], Sequence[str]], count: int) -> list[str]:
    names = [start + end for start in parts[0] for end in parts[1]]
    return _shuffled(rng, names)[:count]


def _pick(rng: random.Random, items: Sequence[T]) -> T:
    return items[int(rng.random() * len(items))]


def _shuffled(rng: random.Random, items: Iterable[T]) -> list[T]:
    return sorted(items, key=lambda _: rng.random())
