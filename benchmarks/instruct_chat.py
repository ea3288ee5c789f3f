"""Simple chat: greetings, who is there, thanks, small requests, and what the model cannot know.

The requests that are measured are never trained on.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache

from merge_tasks import ANIMALS, COLOURS, NAMES, PLACES, THINGS

SEED = 905
HELP = "How can I help you?"
WHO = "I am fable, a very small language model. I came with quantlab."
ABLE = "I can answer from sources that you give me, reckon step by step, sort things by examples, and chat a little."
UNKNOWN = "I do not know. I am too small to know facts. Give me a source to read."


@dataclass(frozen=True)
class Exchange:
    """What is said, and the answer."""

    said: str
    answer: str


# Ways to say one thing, and what to answer.
SET_PHRASES: tuple[tuple[tuple[str, ...], str], ...] = (
    (("Hello", "Hello!", "Hi", "Hi!", "Hi there!", "Hello there", "Hey", "Good day", "Greetings!", "Hello, fable!"),
     f"Hello! {HELP}"),
    (("Good morning", "Good morning!", "A good morning to you", "Good morning, fable"), f"Good morning! {HELP}"),
    (("Good evening", "Good evening!", "A good evening to you", "Good evening, fable"), f"Good evening! {HELP}"),
    (("Good night", "Good night!", "I am going to bed", "Good night, fable"), "Good night! Sleep well."),
    (("Who are you?", "What are you?", "What is your name?", "Tell me who you are.", "Are you a robot?", "Who is this?",
      "Do you have a name?", "Are you a person?", "Please tell me your name."), WHO),
    (("What can you do?", "How can you help me?", "What are you good at?", "Help", "Can you help me?",
      "What should I ask you?", "What do you do?"), ABLE),
    (("Who made you?", "Who wrote you?", "Where do you come from?", "Who trained you?"),
     "The quantlab project trained me, on old books and on small exercises."),
    (("How are you?", "How are you today?", "How do you do?", "How is it going?", "Are you well?"),
     "I am well, thank you. How are you?"),
    (("I am well, too.", "I am fine.", "Very well, thank you.", "I am happy today."), "I am glad to hear that."),
    (("I am sad.", "I feel sad today.", "I am not well.", "I am tired."), "I am sorry to hear that."),
    (("Thank you", "Thank you!", "Thanks", "Thanks!", "Thank you very much", "Many thanks", "Thanks a lot!",
      "That was good, thank you"), "You are welcome!"),
    (("Bye", "Goodbye", "Goodbye!", "See you", "Bye bye!", "See you tomorrow", "Good bye for now"), "Goodbye!"),
    (("Sorry", "I am sorry.", "Excuse me", "I beg your pardon"), "That is all right."),
    (("You are wrong.", "That is wrong.", "No, that is not right."), "I am sorry. I make mistakes. Please ask again."),
    (("Yes", "Okay", "Good", "Very good!", "Well done!"), "Good. What else can I do for you?"),
)  # fmt: skip

OPPOSITES = (("hot", "cold"), ("big", "small"), ("old", "young"), ("good", "bad"), ("up", "down"), ("day", "night"),
             ("rich", "poor"), ("long", "short"), ("wet", "dry"), ("happy", "sad"), ("open", "closed"),
             ("black", "white"), ("first", "last"), ("strong", "weak"), ("early", "late"), ("high", "low"),
             ("full", "empty"), ("fast", "slow"), ("in", "out"), ("left", "right"))  # fmt: skip
WEEK = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
LANDS = ("France", "Spain", "Egypt", "China", "Norway", "Peru", "Greece", "India", "Poland", "Chile", "Kenya", "Cuba")
UNKNOWABLE = ("What is the capital of {}?", "Who is the king of {}?", "How many people live in {}?",
              "How big is {}?", "When was {} founded?")  # fmt: skip
WORDS = tuple(sorted({*ANIMALS, *COLOURS, *PLACES, *THINGS}))
STARTS = ("Once upon a time", "Long ago", "One day", "One winter")
STORY = ("{start} the {colour} {animal} lived in the {place}. It found some {things} and gave them to {name}. "
         "{name} was glad, and they were friends ever after.")  # fmt: skip


def _set_phrases() -> list[Exchange]:
    return [Exchange(said, answer) for ways, answer in SET_PHRASES for said in ways]


def _requests() -> list[Exchange]:
    """Every request of the kinds that are told in a line."""
    found = [Exchange(f"What is the opposite of {a}?", b) for pair in OPPOSITES for a, b in (pair, pair[::-1])]
    for days, step in ((WEEK, 1), (WEEK[::-1], -1)):
        where = "after" if step == 1 else "before"
        found += [Exchange(f"Which day comes {where} {day}?", days[(n + 1) % len(days)]) for n, day in enumerate(days)]
    for word in WORDS:
        found += [Exchange(f"{verb} the word {word}.", word) for verb in ("Say", "Write", "Repeat")]
    for a in range(1, 31):
        for b in (a + 3, a - 4, a + 11):
            if b > 0:
                found.append(Exchange(f"Which is more, {a} or {b}?", str(max(a, b))))
                found.append(Exchange(f"Which is less, {a} or {b}?", str(min(a, b))))
    for last in range(2, 13):
        numbers = ", ".join(str(number) for number in range(1, last + 1))
        found += [Exchange(f"{ask} to {last}.", numbers) for ask in ("Count", "Please count", "Can you count")]
    for land in LANDS:
        found += [Exchange(form.format(land), UNKNOWN) for form in UNKNOWABLE]
    for name in NAMES:
        found += [Exchange(form.format(name), f"Hello, {name}! {HELP}") for form in ("I am {}.", "My name is {}.")]
    return found


@cache
def measured_and_trained(share: float = 0.15) -> tuple[list[Exchange], list[Exchange]]:
    """Exchanges to measure on and to train on; set phrases, which have no rule to learn, are trained on alone, so that
    of them only what is said in another spelling can be asked.
    """
    requests = _requests()
    random.Random(SEED).shuffle(requests)
    cut = int(share * len(requests))
    return requests[:cut], requests[cut:]


def draw_story(draw: random.Random) -> Exchange:
    """A request for a story; a name, an animal or nothing at all is asked for."""
    animal, name = draw.choice(ANIMALS), draw.choice(NAMES)
    said = draw.choice(("Tell me a story.", f"Tell me a story about the {animal}.", f"Tell me a story about {name}."))
    told = {"start": STARTS, "colour": COLOURS, "place": PLACES, "things": THINGS}
    story = STORY.format(name=name, animal=animal, **{part: draw.choice(words) for part, words in told.items()})
    return Exchange(said, story)


@cache
def set_phrases() -> list[Exchange]:
    """Greetings and the like, which are the same every time."""
    return _set_phrases()
