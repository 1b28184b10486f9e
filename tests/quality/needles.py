"""Needles: facts of several forms that occur once, hidden in a long text and asked for at its end.

A fact is a sentence about an entity that no other fact of the text is about; its answer is drawn at random, so that nothing
but reading can find it. A question is judged teacher-forced: every token of the answer must be the likeliest one."""
from __future__ import annotations

import itertools
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


# form: (question, how its answer begins, the answer); {} is the entity. A fact is the last two and a full stop.
FORMS = {
    "number": ("What is the secret code of {}?", "The secret code of {} is", lambda r: str(r.randrange(10000, 100000))),
    "date": ("When was {} born?", "{} was born on",
             lambda r: f"{r.choice(MONTHS)} {r.randrange(1, 29)}, {r.randrange(1700, 2000)}"),
    "words": ("What is the password of {}?", "The password of {} is the phrase",
              lambda r: f"{r.choice(COLOURS)} {r.choice(ANIMALS)}"),
    "name": ("Who is the best friend of {}?", "The best friend of {} is called",
             lambda r: f"{r.choice(PEOPLE)} {r.choice(SURNAMES)}"),
    "cargo": ("What does the ship from {} carry?", "The ship from {} carries",
              lambda r: f"{r.randrange(20, 990)} tons of {r.choice(FRUITS)}"),
    "place": ("Where was the stolen {} found?", "The stolen {} was found in the city of", lambda r: r.choice(CITIES)),
    "trade": ("What was the trade of the old {}?", "The old {} worked all his life as a", lambda r: r.choice(TRADES)),
}


@dataclass(frozen=True)
class Needle:
    form: str
    question: str
    lead: str  # how the answer begins
    answer: str

    @property
    def fact(self) -> str:
        return f"{self.lead} {self.answer}."


def draw(count: int, seed: int) -> list[Needle]:
    """Forms in turn, every entity once, in random order."""
    r = random.Random(seed)
    cities, people, surnames, things = (r.sample(x, len(x)) for x in (CITIES, PEOPLE, SURNAMES, THINGS))
    names = [f"{p} {r.choice(SURNAMES)}" for p in people]
    half, third = len(cities) // 2, len(names) // 3
    entities = {"number": cities[:half], "date": names[:third], "words": names[third: 2 * third], "name": names[2 * third:],
                "cargo": cities[half:], "place": things, "trade": surnames}
    needles = []
    for form in itertools.islice(itertools.cycle(FORMS), count):
        if not entities[form]:
            raise ValueError(f"{count} needles are more than there are entities for")
        question, lead, answer = FORMS[form]
        entity = entities[form].pop()
        needles.append(Needle(form, question.format(entity), lead.format(entity), answer(r)))
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
