"""Retrieval: questions about the needles of a long text, each asked as if it followed the text alone."""
from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

import needles
from reading import Reading
from signature import IN_NUMPY, Signature
from subject import ServiceCache, Subject, fill, in_numpy

LEARN = 4096  # tokens a scheme may calibrate itself on; needles come later
FIRST_NEEDLE = 4200
ROOM = 96  # tokens of the longest question and answer
CHARACTERS = 170000  # of a text: enough for 32600 tokens of any
BUDGETS = (128, 512, 2048)


@dataclass(frozen=True)
class Question:
    tokens: list[int]  # the question and, but for its last token, the answer
    answer: list[int]

    @staticmethod
    def of(encode, needle: needles.Needle) -> "Question":
        answer = encode(f" {needle.answer}")
        return Question(encode(f"\n\nQuestion: {needle.question}\nAnswer: {needle.lead}") + answer[:-1], answer)


class Exam:
    """A text with its needles, read by a model."""

    def __init__(self, subject: Subject, texts, name: str, count: int, seed: int):
        self.subject, self.name = subject, name
        traits, encode = subject.traits, subject.model.encode
        text = texts.read(name, CHARACTERS)
        self.needles = needles.draw(count, seed)
        tokens = needles.hide(encode, text, self.needles, traits.tokens - len(subject.begin), FIRST_NEEDLE)
        self.reading: Reading = subject.read(subject.begin + tokens, name)
        self.questions = [Question.of(encode, n) for n in self.needles]

    def ask(self, cache) -> list[bool]:
        """Whether each answer is right: every token the likeliest, given the true ones before it."""
        model, first, hidden = self.subject.model, len(self.reading.tokens), []
        whole, restore = self.subject.whole(self.reading, cache)
        for question in self.questions:
            restore()
            hidden.append(model.forward(question.tokens, first, whole)[-len(question.answer):])
        restore()
        wanted, rows = np.concatenate([q.answer for q in self.questions]), np.concatenate(hidden)
        right = np.concatenate([model.logits(rows[at: at + 64]).argmax(axis=-1) == wanted[at: at + 64]
                                for at in range(0, len(rows), 64)])
        ends = np.cumsum([len(q.answer) for q in self.questions])
        return [bool(part.all()) for part in np.split(right, ends[:-1])]

    def full(self) -> list[bool]:
        return self.ask(self.subject.exact_cache(self.reading, ROOM))

    def selected(self, kv, signature: Signature, budgets) -> dict[int, list[bool]]:
        """{k: answers} with the selection in every layer that selects."""
        if signature.kind in IN_NUMPY:
            exact = self.subject.exact_cache(self.reading, ROOM)
            return {k: self.ask(in_numpy(signature, exact, k)) for k in budgets}
        subject, length = self.subject, len(self.reading.tokens)
        model = subject.open_model(kv, signature, range(subject.layers), f"needles-{self.name}")
        with model.sequence(max(subject.model.context, length + ROOM)) as sequence:
            for layer in range(subject.layers):
                fill(sequence, self.reading, layer, layer, 0, length, LEARN)
            model.settle()
            return {k: self.ask(ServiceCache(sequence, signature.budget(k))) for k in budgets}


def accuracy(right: list[bool]) -> tuple[float, float]:
    """And its standard error."""
    p = sum(right) / len(right)
    return p, math.sqrt(p * (1 - p) / len(right))


def against(full: list[bool], right: list[bool]) -> tuple[float, float]:
    """Mean and standard error of the difference, needle by needle: the same needles were asked."""
    difference = np.array(right, float) - np.array(full, float)
    return float(difference.mean()), float(difference.std() / math.sqrt(len(difference)))
