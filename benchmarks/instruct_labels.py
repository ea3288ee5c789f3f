"""Short things to classify, by examples given before: kinds of things, feelings, opinions.

The words of `kinds` that are measured are never trained on; of feelings and opinions it is the combinations.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache

from merge_tasks import EVENTS, NAMES, TIMES

SHOTS = (1, 4)  # examples before a question

KINDS = {
    "animal": ("fox", "duck", "wolf", "bear", "cat", "dog", "horse", "mouse", "pig", "lion", "monkey", "frog", "cow",
               "hen", "rat", "goat", "rabbit", "snake", "sheep", "donkey", "owl", "tiger", "goose", "bee", "elephant",
               "squirrel"),
    "food": ("bread", "cheese", "apple", "pear", "egg", "cake", "honey", "soup", "rice", "corn", "butter", "sugar",
             "plum", "potato", "pie", "pudding", "jam", "milk", "meat", "salt", "bean", "cherry", "onion", "biscuit",
             "orange", "nut"),
    "place": ("garden", "kitchen", "forest", "river", "church", "market", "castle", "school", "city", "village",
              "valley", "island", "hill", "field", "palace", "wood", "shore", "street", "mountain", "lake", "town",
              "farm", "cottage", "desert", "harbour", "meadow"),
    "tool": ("hammer", "knife", "axe", "saw", "spade", "needle", "brush", "rope", "ladder", "plough", "broom", "hook",
             "shovel", "pen", "chain", "wheel", "lamp", "key", "fork", "spoon", "nail", "basket", "bucket", "scissors",
             "rake", "pot"),
    "colour": ("red", "brown", "white", "black", "blue", "green", "yellow", "grey", "purple", "pink", "scarlet",
               "crimson", "violet", "golden"),
    "person": ("king", "queen", "farmer", "doctor", "teacher", "soldier", "cook", "sailor", "judge", "nurse", "baker",
               "servant", "princess", "captain", "boy", "girl", "uncle", "mother", "father", "sister", "brother",
               "miller", "tailor", "hunter", "aunt", "thief"),
}  # fmt: skip
HELD_OUT_WORDS = 4  # of each kind

SUBJECTS = ("soup", "book", "song", "house", "walk", "dinner", "story", "bed", "journey", "cake", "play", "school")
PRAISE = ("was a joy", "was very good", "made us happy", "was the best of all", "was lovely", "pleased everybody",
          "was just what I wanted", "was so beautiful")  # fmt: skip
BLAME = ("was dreadful", "was very bad", "made us sick", "was the worst of all", "was spoiled", "pleased nobody",
         "was a great disappointment", "was so ugly")  # fmt: skip


@dataclass(frozen=True)
class Labelled:
    """One thing to classify."""

    question: str
    label: str


def _kind(word: str, label: str) -> Labelled:
    return Labelled(f"What kind of thing is this: {word}?", label)


def _kinds(trained: bool) -> list[Labelled]:
    """By words that are trained on, or by those that are not."""
    parts = {label: words[HELD_OUT_WORDS:] if trained else words[:HELD_OUT_WORDS] for label, words in _shuffled()}
    return [_kind(word, label) for label, words in parts.items() for word in words]


def _shuffled() -> list[tuple[str, list[str]]]:
    draw = random.Random(903)
    return [(label, draw.sample(words, len(words))) for label, words in KINDS.items()]


def _feelings() -> list[Labelled]:
    return [
        Labelled(f"{time} {name} {event}. How does {name} feel?", feeling)
        for feeling, events in EVENTS.items()
        for event in events
        for time in TIMES
        for name in NAMES
    ]


def _opinions() -> list[Labelled]:
    return [
        Labelled(f"Good or bad: The {subject} {words}.", label)
        for label, phrases in (("good", PRAISE), ("bad", BLAME))
        for words in phrases
        for subject in SUBJECTS
    ]


@cache
def pools() -> tuple[dict[str, list[Labelled]], dict[str, list[Labelled]]]:
    """Items by task, to train on and to measure on."""
    trained, measured = {"kinds": _kinds(True)}, {"kinds": _kinds(False)}
    draw = random.Random(904)
    for task, every in (("feelings", _feelings()), ("opinions", _opinions())):
        draw.shuffle(every)
        cut = len(every) // 5
        trained[task], measured[task] = every[cut:], every[:cut]
    return trained, measured


def draw_shots(draw: random.Random, pool: list[Labelled], asked: Labelled) -> list[Labelled]:
    """Examples before `asked`, none of which is it, each with another label while there are any."""
    labels = sorted({item.label for item in pool})
    draw.shuffle(labels)
    labels = (labels * SHOTS[1])[: draw.randint(*SHOTS)]
    return [draw.choice([item for item in pool if item.label == label and item != asked]) for label in labels]
