"""The recipes that are shipped: their files, found by name, and what they say on themselves."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

import litgpt
from litgpt.errors import UserError, nearest
from litgpt.storage.files import PlainSafeLoader

SPELLINGS = {"gemma2b": "gemma2-2b"}  # of LitGPT's table, where they are not those of its folders


@dataclass
class Recipe:
    """One file of `config_hub`.

    Args:
        name: As `--config` takes it, in any case: `falcon-7b/lora`, or `tinystories` for one of pretraining.
        file: Where it lies.
    """

    name: str
    file: Path

    @property
    def model(self) -> str:
        return self.name.partition("/")[0]

    @property
    def method(self) -> str:
        return self.name.partition("/")[2] or "pretrain"

    @property
    def command(self) -> str:
        """As it is typed."""
        methods = {"pretrain": "litgpt pretrain", "full": "litgpt finetune full", "adapter": "litgpt finetune adapter"}
        return f"{methods.get(self.method, 'litgpt finetune lora')} --config {self.name}"

    def machine(self) -> str:
        """What it runs on, as the comment on top says."""
        found = re.search(r"^# Machine: (.*)", self.file.read_text(encoding="utf-8"), re.M)
        return found[1] if found else ""

    def fields(self) -> dict[str, Any]:
        text = self.file.read_text(encoding="utf-8")
        return yaml.load(text, PlainSafeLoader)


def shipped_recipes() -> Iterator[Recipe]:
    """All recipes, in the installed package or, in a clone, beside it."""
    package = Path(litgpt.__file__).parent
    for hub in (package / "config_hub", package.parent / "config_hub"):
        for file in sorted(hub.glob("*/**/*.yaml")):
            yield Recipe(file.relative_to(hub).with_suffix("").as_posix().partition("/")[2], file)


def find_recipe(name: str) -> Recipe:
    """A recipe by a name such as `llama-3.2-1B/lora`, in any case, with or without its folder and ending.

    Raises:
        UserError: there is none; the nearest name is in the message.
    """
    recipes = {recipe.name.lower(): recipe for recipe in shipped_recipes()}
    short = re.sub(r"^(.*config_hub/)?((finetune|pretrain)/)?", "", name.replace("\\", "/")).removesuffix(".yaml")
    model, slash, method = short.lower().partition("/")
    found = recipes.get(f"{SPELLINGS.get(model, model)}{slash}{method}")
    if found is None:
        names = [r.name for r in recipes.values() if not slash and plain(r.model) == plain(model)]
        hint = f" There are: {', '.join(names)}." if names else nearest(short, [r.name for r in recipes.values()])
        raise UserError(f"No recipe is called {name!r}.{hint or ' See: litgpt recipes'}")
    return found


def plain(name: str) -> str:
    """A name without what is easily typed otherwise."""
    return re.sub(r"[-_. ]", "", name.lower())
