"""Needles: facts of several forms that occur once, hidden in a long text and asked for at its end.

A fact is a sentence about an entity that no other fact of the text is about; its answer is drawn at random, so that nothing
but reading can find it. A question is judged teacher-forced: every token of the answer must be the likeliest one."""
from __future__ import annotations

import random
from dataclasses import dataclass

CITIES = ("Berlin Lisbon Oslo Cairo Lima Madrid Tokyo Delhi Dublin Athens Vienna Prague Warsaw Helsinki Zurich Geneva Havana "
          "Nairobi Quito Manila Seoul Boston Chicago Denver Seattle Toronto Montreal Sydney Melbourne Auckland Hamburg Munich "
          "Naples Venice Milan Porto Seville Valencia Bristol Oxford Cambridge York Leeds Cardiff Belfast Krakow Riga Tallinn "
          "Vilnius Sofia Bucharest Belgrade Zagreb Budapest Ankara Baghdad Tehran Karachi Mumbai Bangkok Hanoi Jakarta "
          "Santiago Bogota Caracas Dallas Austin Phoenix Portland Detroit").split()
PEOPLE = ("Alice Robert Emma Oliver Sophia Henry Clara Victor Julia Martin Laura Felix Nora Oscar Irene Hugo Diana Walter "
          "Helen George Marta Albert Susan Frank Linda Edward Rosa Arthur Grace Leon Vera Simon Monica Bruno Sylvia Edgar "
          "Teresa Gustav Paula Conrad Beatrice Harold Amelia Roger Cecilia Norman Lydia Stanley Miriam Eugene").split()
SURNAMES = ("Miller Baker Carter Fisher Mason Turner Walker Cooper Parker Wright Hughes Morgan Bennett Foster Graham Hunter "
            "Jordan Lawson Murray Nelson Palmer Reynolds Sanders Thornton Warren Webster Winters Young Sullivan "
            "Gallagher").split()
ANIMALS = "lion tiger eagle horse camel falcon otter badger donkey parrot turtle rabbit salmon spider monkey panther".split()
FRUITS = "apples oranges lemons cherries grapes peaches plums olives figs pears melons bananas".split()
COLOURS = "red green blue yellow purple orange brown white black silver golden pink".split()
THINGS = ("clock lamp sword crown violin statue mirror carpet bicycle telescope piano hammer anchor ladder helmet "
          "trumpet").split()
MONTHS = ("January February March April May June July August September October November "
          "December").split()
TRADES = "carpenter doctor painter lawyer sailor farmer teacher baker soldier dentist plumber tailor butcher pilot".split()


@dataclass(frozen=True)
class Needle:
    form: str
    fact: str  # a sentence
    question: str
    answer: str  # what follows the question, from its leading space on


def _number(r: random.Random, city: str) -> Needle:
    code = str(r.randrange(10000, 100000))
    return Needle("number", f"The secret code of {city} is {code}.",
                  f"What is the secret code of {city}? The secret code of {city} is", f" {code}")


def _year(r: random.Random, name: str) -> Needle:
    day = f"{r.choice(MONTHS)} {r.randrange(1, 29)}, {r.randrange(1700, 2000)}"
    return Needle("date", f"{name} was born on {day}.", f"When was {name} born? {name} was born on", f" {day}")


def _animal(r: random.Random, name: str) -> Needle:
    words = f"{r.choice(COLOURS)} {r.choice(ANIMALS)}"
    return Needle("words", f"The password of {name} is the phrase {words}.",
                  f"What is the password of {name}? The password of {name} is the phrase", f" {words}")


def _friend(r: random.Random, name: str) -> Needle:
    other = f"{r.choice(PEOPLE)} {r.choice(SURNAMES)}"
    return Needle("name", f"The best friend of {name} is called {other}.",
                  f"Who is the best friend of {name}? The best friend of {name} is called", f" {other}")


def _cargo(r: random.Random, city: str) -> Needle:
    load = f"{r.randrange(20, 990)} tons of {r.choice(FRUITS)}"
    return Needle("cargo", f"The ship from {city} carries {load}.",
                  f"What does the ship from {city} carry? The ship from {city} carries", f" {load}")


def _place(r: random.Random, thing: str) -> Needle:
    city = r.choice(CITIES)
    return Needle("place", f"The stolen {thing} was found in the city of {city}.",
                  f"Where was the stolen {thing} found? The stolen {thing} was found in the city of", f" {city}")


def _trade(r: random.Random, name: str) -> Needle:
    trade = r.choice(TRADES)
    return Needle("trade", f"The old {name} worked all his life as a {trade}.",
                  f"What was the trade of the old {name}? The old {name} worked all his life as a", f" {trade}")


def draw(count: int, seed: int) -> list[Needle]:
    """Forms in turn, every entity once, in random order."""
    r = random.Random(seed)
    cities, people, surnames, things = (r.sample(x, len(x)) for x in (CITIES, PEOPLE, SURNAMES, THINGS))
    names = [f"{p} {r.choice(SURNAMES)}" for p in people]
    half, third = len(cities) // 2, len(names) // 3
    pools = [(_number, cities[:half]), (_year, names[:third]), (_animal, names[third: 2 * third]), (_friend, names[2 * third:]),
             (_cargo, cities[half:]), (_place, things), (_trade, surnames)]
    needles = []
    for i in range(count):
        make, entities = pools[i % len(pools)]
        if not entities:
            raise ValueError(f"{count} needles are more than there are entities for")
        needles.append(make(r, entities.pop()))
    r.shuffle(needles)
    return needles


def hide(encode, text: str, needles: list[Needle], tokens: int, first: int) -> list[int]:
    """`tokens` token ids of the text, the needles at even distances from position `first` on, each at the end of a line."""
    facts = [encode(f"\n{n.fact}\n") for n in needles]
    lines = [encode(line + "\n") for line in text.split("\n")]
    gap = (tokens - first) / (len(needles) + 0.5)
    ids: list[int] = []
    hidden = 0
    for line in lines:
        while hidden < len(facts) and len(ids) >= first + gap * (hidden + 0.25):
            ids += facts[hidden]
            hidden += 1
        ids += line
        if len(ids) >= tokens and hidden == len(facts):
            return ids[:tokens]
    raise ValueError(f"the text has only {len(ids)} tokens of the {tokens} wanted")
