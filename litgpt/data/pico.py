"""Generated data for the built-in model `pico`: texts for pretraining, sums for finetuning, and preferences."""

import hashlib
import inspect
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Optional

from litgpt.data.data_module import DataModule
from litgpt.data.sources import RowSource

NAMES = "Anna Ben Carla David Emma Finn Greta Hugo Ida Jonas Lena Max Nora Oskar Paula Tim".split()
PLACES = "forest garden kitchen village meadow harbour school library market barn".split()
THINGS = {  # its color, its place, and what it does
    "frog": ("green", "pond", "jumps from leaf to leaf"),
    "fox": ("red", "forest", "hunts at night"),
    "swan": ("white", "lake", "swims in silence"),
    "raven": ("black", "tower", "collects shiny things"),
    "canary": ("yellow", "cage", "sings in the morning"),
    "whale": ("blue", "sea", "dives very deep"),
    "lemon": ("yellow", "garden", "tastes sour"),
    "cherry": ("red", "tree", "tastes sweet"),
    "carrot": ("orange", "field", "grows under the ground"),
    "cucumber": ("green", "greenhouse", "cools the mouth"),
    "snowman": ("white", "yard", "melts in the sun"),
    "tractor": ("red", "barn", "pulls the plough"),
    "lantern": ("yellow", "porch", "lights the path"),
    "boat": ("blue", "harbour", "carries the fish home"),
    "kite": ("orange", "sky", "dances in the wind"),
    "stove": ("black", "kitchen", "warms the soup"),
}
FEELINGS = "happy tired proud curious hungry brave".split()
WEATHER = (
    "It was a sunny day.",
    "It rained all day.",
    "Snow lay on the roofs.",
    "A warm wind blew.",
    "Fog hid the hills.",
)
ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
).split()
TENS = "_ _ twenty thirty forty fifty sixty seventy eighty ninety".split()


def in_words(n: int) -> str:
    """0 to 199 in English words."""
    if n >= 100:
        return "one hundred" + (f" and {in_words(n - 100)}" if n > 100 else "")
    if n < 20:
        return ONES[n]
    return TENS[n // 10] + (f" {ONES[n % 10]}" if n % 10 else "")


def story(draw: random.Random) -> str:
    """A few sentences about a person, a thing, and a number."""
    name, friend = draw.sample(NAMES, 2)
    thing, other = draw.sample(list(THINGS), 2)
    colour, home, does = THINGS[thing]
    place, feeling = draw.choice(PLACES), draw.choice(FEELINGS)
    count = in_words(draw.randrange(2, 100))
    middle = [
        f"{name} saw a {colour} {thing}.",
        f"Everybody knows that a {thing} {does}.",
        f"The {thing} came from the {home}.",
        f"{friend} counted {count} steps to the {place}.",
        f'"Look at the {thing}!" said {friend}.',
        f"{name} had {count} stones in a bag.",
        f"They also found a {THINGS[other][0]} {other}.",
        f"{friend} was {feeling} and laughed.",
    ]
    draw.shuffle(middle)
    evening = f"In the evening {name} was {feeling}."
    end = draw.choice((evening, f"Then they went home to the {place}.", f"{name} told {friend} all about it."))
    return " ".join(
        [draw.choice(WEATHER), f"{name} walked to the {place} with {friend}.", *middle[: draw.randrange(2, 6)], end]
    )


def chat(draw: random.Random) -> tuple[str, str]:
    """A question and its answer, never a sum."""
    thing = draw.choice(list(THINGS))
    colour, home, does = THINGS[thing]
    name, start = draw.choice(NAMES), draw.randrange(1, 95)
    count = [in_words(n) for n in range(start, start + 5)]
    many = in_words(draw.randrange(2, 100))
    return draw.choice(
        (
            (f"What colour is the {thing}?", f"The {thing} is {colour}."),
            (f"Where is the {thing} found?", f"The {thing} is found in the {home}."),
            (f"What does the {thing} do?", f"The {thing} {does}."),
            (f"My name is {name}. Hello!", f"Hello {name}, how are you?"),
            (f"Count from {count[0]} to {count[-1]}.", ", ".join(count) + "."),
            (f"{name} has {many} {thing}s. How many?", f"{name} has {many} {thing}s."),
            (f"Say {many} again.", f"{many}."),
            ("Tell me a story.", story(draw)),
        )
    )


def sums() -> list[tuple[str, str]]:
    """All sums below one hundred of two numbers of two digits, in words, in a fixed order."""
    return [
        (f"What is {in_words(a)} plus {in_words(b)}?", f"{in_words(a + b)}.")
        for a in range(10, 90)
        for b in range(10, 100 - a)
    ]


def preferences(draw: random.Random, n: int) -> list[dict[str, str]]:
    """Pairs of a short answer and the full sentence that `pico` gives, with different prompts: first its facts, then
    prompts that contain their answers."""
    facts = {}
    for thing, (colour, home, does) in THINGS.items():
        facts[f"What colour is the {thing}?"] = f"{colour}.", f"The {thing} is {colour}."
        facts[f"Where is the {thing} found?"] = f"in the {home}.", f"The {thing} is found in the {home}."
        facts[f"What does the {thing} do?"] = f"{does}.", f"The {thing} {does}."
    others = {f"My name is {name}. Hello!": (f"Hello {name}.", f"Hello {name}, how are you?") for name in NAMES}
    while len(facts) + len(others) < n:
        name, thing, many = draw.choice(NAMES), draw.choice(list(THINGS)), in_words(draw.randrange(2, 100))
        others[f"{name} has {many} {thing}s. How many?"] = f"{many}.", f"{name} has {many} {thing}s."
    found = [*facts.items(), *draw.sample(list(others.items()), len(others))]
    return [{"prompt": prompt, "chosen": short, "rejected": full} for prompt, (short, full) in found[:n]]


@dataclass(frozen=True)
class Generated(RowSource):
    """Rows from a function, which depend on `settings` alone."""

    make: Callable[[], Iterator[dict[str, Any]]] = lambda: iter(())
    settings: tuple[int, ...] = ()

    def rows(self) -> Iterator[tuple[str, Any]]:
        yield from ((f"{self.path}, row {i + 1}", fields) for i, fields in enumerate(self.make()))

    def fingerprint(self) -> tuple[str, int]:
        code = inspect.getsource(sys.modules[__name__])
        return hashlib.sha256(f"{self.path} {self.settings} {code}".encode()).hexdigest(), 0


class PicoText(DataModule):
    """Stories and conversations about a small world, for pretraining `pico`. They contain no sums.

    Args:
        n_rows: Number of rows, half of them stories, half conversations.
    """

    packed = True

    def __init__(self, n_rows: int = 60000, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.n_rows = n_rows

    def sources(self) -> tuple[list[RowSource], Optional[list[RowSource]]]:
        return [Generated("pico-text", make=self.make, settings=(self.n_rows, self.seed))], None

    def make(self) -> Iterator[dict[str, Any]]:
        draw = random.Random(self.seed)
        for i in range(self.n_rows):
            if i % 2:
                yield {"text": story(draw)}
            else:
                question, answer = chat(draw)
                messages = [("user", question), ("assistant", answer)]
                yield {"messages": [{"role": role, "content": text} for role, text in messages]}


class PicoSums(DataModule):
    """Sums of two-digit numbers in words, the skill that `pico` is finetuned on.

    Args:
        n_val: Number of sums that are held out for validation.
    """

    def __init__(self, n_val: int = 300, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.n_val = n_val

    def sources(self) -> tuple[list[RowSource], Optional[list[RowSource]]]:
        settings = (self.n_val, self.seed)
        train, val = (Generated(f"pico-sums-{n}", make=make, settings=settings) for n, make in self.parts().items())
        return [train], [val]

    def parts(self) -> dict[str, Callable[[], Iterator[dict[str, Any]]]]:
        """The two makers of rows."""
        rows = [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in sums()]
        random.Random(self.seed).shuffle(rows)
        return {"train": lambda: iter(rows[self.n_val :]), "val": lambda: iter(rows[: self.n_val])}


class PicoPairs(DataModule):
    """Preferences that `pico` does not have: short answers over the full sentences that it gives.

    Args:
        n_rows: Number of pairs for training.
        n_val: Number of pairs that are held out for validation. All prompts are different.
    """

    def __init__(self, n_rows: int = 300, n_val: int = 100, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.n_rows, self.n_val = n_rows, n_val

    def sources(self) -> tuple[list[RowSource], Optional[list[RowSource]]]:
        rows = preferences(random.Random(self.seed), self.n_rows + self.n_val)
        settings = (self.n_rows, self.n_val, self.seed)
        train, val = (
            Generated(f"pico-pairs-{name}", make=partial(iter, part), settings=settings)
            for name, part in (("train", rows[: self.n_rows]), ("val", rows[self.n_rows :]))
        )
        return [train], [val]
