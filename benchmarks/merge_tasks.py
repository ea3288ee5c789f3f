"""Small tasks in the words of children's stories, drawn by fixed seeds: what models are tuned to before merging.

where     three names and three places; where is one of them?
sums      a name has some things and finds more; how many now? Numbers in words, sums up to twenty.
secret    words in pig Latin
feelings  what befell a name; does it feel glad, sad, cross or afraid?
whisper   `where`, to be answered in pig Latin: none is tuned to it; `where` and `secret` together know how

No row is in two splits of a task.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

TASKS = ("where", "sums", "secret", "feelings")
COMPOSITE = "whisper"
SEEDS = {"where": 11, "sums": 12, "secret": 13, "feelings": 14, "whisper": 15}
SPLITS = {"train": 1600, "dev": 64, "test": 160}

NAMES = ("Anna", "Ben", "Clara", "Daniel", "Emma", "Fred", "Grace", "Henry", "Ida", "Jack", "Kate", "Leo", "Mary",
         "Ned", "Olga", "Peter", "Rose", "Sam", "Tilly", "Will")  # fmt: skip
PLACES = ("garden", "kitchen", "forest", "barn", "river", "mill", "church", "market", "tower", "meadow", "cave",
          "castle", "school", "orchard", "harbour", "stable")  # fmt: skip
THINGS = ("apples", "eggs", "shells", "nuts", "coins", "stones", "pears", "flowers", "keys", "feathers")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
           "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty")  # fmt: skip
ANIMALS = ("fox", "hare", "duck", "goose", "wolf", "bear", "cat", "dog", "horse", "mouse", "owl", "pig", "sheep",
           "toad")  # fmt: skip
COLOURS = ("red", "brown", "white", "black", "little", "old", "proud", "lazy", "clever", "hungry", "poor", "wild")
EVENTS = {
    "glad": ("found a golden coin", "won the race", "got a new kite", "met an old friend", "ate a sweet cake"),
    "sad": ("lost a little dog", "broke a dear toy", "heard of a death", "had to leave home", "missed the feast"),
    "cross": ("was pushed in the mud", "was called a liar", "had to wait all day", "was robbed of bread",
              "was blamed for nothing"),
    "afraid": ("heard a wolf at night", "saw a dark shape", "fell into a deep well", "met a great bear",
               "was lost in the fog"),
}  # fmt: skip
TIMES = ("One morning", "At noon", "In the evening", "On Sunday", "In spring", "Last winter", "Long ago", "Yesterday")


@dataclass(frozen=True)
class Row:
    """What is asked, and what the answer is."""

    prompt: str
    completion: str

    @property
    def text(self) -> str:
        """Both."""
        return self.prompt + self.completion


def pig_latin(words: str) -> str:
    """First consonants go to the end, and `ay` behind them: "the owl" is "ethay owlay"."""
    return " ".join(_pig_latin_word(word) for word in words.split())


def _pig_latin_word(word: str) -> str:
    start = next((i for i, letter in enumerate(word) if letter in "aeiouy"), 0)
    return word[start:] + word[:start] + "ay"


def _places(draw: random.Random) -> tuple[str, str, str]:
    names, places = draw.sample(NAMES, 3), draw.sample(PLACES, 3)
    asked = draw.randrange(3)
    told = " ".join(f"{name} is in the {place}." for name, place in zip(names, places, strict=True))
    return told, names[asked], places[asked]


def _where(draw: random.Random) -> Row:
    told, name, place = _places(draw)
    return Row(f"{told}\nWhere is {name}?", f" in the {place}")


def _whisper(draw: random.Random) -> Row:
    told, name, place = _places(draw)
    return Row(f"{told}\nSay in secret: where is {name}?", f" {pig_latin(f'in the {place}')}")


def _sums(draw: random.Random) -> Row:
    name, thing, total = draw.choice(NAMES), draw.choice(THINGS), draw.randint(2, 20)
    had = draw.randint(1, total - 1)
    told = f"{name} has {NUMBERS[had]} {thing} and finds {NUMBERS[total - had]} more."
    return Row(f"{told}\nHow many {thing} has {name}?", f" {NUMBERS[total]}")


def _secret(draw: random.Random) -> Row:
    words = f"the {draw.choice(COLOURS)} {draw.choice(ANIMALS)} is in the {draw.choice(PLACES)}"
    return Row(f"Say in secret: {words}", f" {pig_latin(words)}")


def _feelings(draw: random.Random) -> Row:
    name, feeling = draw.choice(NAMES), draw.choice(sorted(EVENTS))
    return Row(f"{draw.choice(TIMES)} {name} {draw.choice(EVENTS[feeling])}.\nHow does {name} feel?", f" {feeling}")


DRAWS: dict[str, Callable[[random.Random], Row]] = {
    "where": _where, "sums": _sums, "secret": _secret, "feelings": _feelings, "whisper": _whisper,
}  # fmt: skip


def rows(task: str) -> dict[str, list[Row]]:
    """By split; equal rows are drawn once."""
    draw, found = random.Random(SEEDS[task]), dict[Row, None]()
    while len(found) < sum(SPLITS.values()):
        found[DRAWS[task](draw)] = None
    unique = list(found)
    random.Random(SEEDS[task]).shuffle(unique)
    splits, start = {}, 0
    for split, count in SPLITS.items():
        splits[split] = unique[start : start + count]
        start += count
    return splits


def write_tasks(folder: Path) -> None:
    """`TASK-SPLIT.jsonl` of prompt and completion, and `TASK-SPLIT.txt` of whole texts, one a document."""
    folder.mkdir(parents=True, exist_ok=True)
    for task in (*TASKS, COMPOSITE):
        for split, drawn in rows(task).items():
            lines = [json.dumps({"prompt": row.prompt, "completion": row.completion}) + "\n" for row in drawn]
            (folder / f"{task}-{split}.jsonl").write_text("".join(lines), encoding="utf-8")
            texts = "\n<|endoftext|>\n".join(row.text for row in drawn)
            (folder / f"{task}-{split}.txt").write_text(texts + "\n", encoding="utf-8")
