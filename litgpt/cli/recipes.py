"""The recipes that come with the package."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

import litgpt
from litgpt.errors import UserError, nearest
from litgpt.storage.files import PlainSafeLoader

SPELLINGS = {"gemma2b": "gemma2-2b"}  # names in LitGPT's documentation that differ from its folders


UNAVAILABLE = {  # LitGPT's recipes for data that litgpt does not have, and their models
    "tinyllama": "tiny-llama-1.1b",
    "microllama": "micro-llama-300M",
}


@dataclass
class Recipe:
    name: str  # for `--config`, in any case: `falcon-7b/lora`, or `tinystories` for pretraining
    file: Path

    @property
    def model(self) -> str:
        return self.name.partition("/")[0]

    @property
    def method(self) -> str:
        return self.name.partition("/")[2] or "pretrain"

    @property
    def command(self) -> str:
        command = {"pretrain": "pretrain", "qlora": "finetune lora"}.get(self.method, f"finetune {self.method}")
        return f"litgpt {command} --config {self.name}"

    def machine(self) -> str:
        """The machine that it needs, from the comment on top."""
        found = re.search(r"^# Machine: (.*)", self.file.read_text(encoding="utf-8"), re.M)
        return found[1] if found else ""

    def fields(self) -> dict[str, Any]:
        return yaml.load(self.file.read_text(encoding="utf-8"), PlainSafeLoader)


def shipped_recipes() -> Iterator[Recipe]:
    """All recipes, from the installed package or, in a clone, from beside it."""
    package = Path(litgpt.__file__).parent
    for hub in (package / "config_hub", package.parent / "config_hub"):
        for file in sorted(hub.glob("*/**/*.yaml")):
            yield Recipe(file.relative_to(hub).with_suffix("").as_posix().partition("/")[2], file)


def find_recipe(name: str) -> Recipe:
    """A recipe by a name such as `llama-3.2-1B/lora`, in any case, with or without its folder and suffix. Raises
    `UserError` if there is none."""
    recipes = {recipe.name.lower(): recipe for recipe in shipped_recipes()}
    short = re.sub(r"^(.*config_hub/)?((finetune|pretrain)/)?", "", name.replace("\\", "/")).removesuffix(".yaml")
    model, slash, method = short.lower().partition("/")
    found = recipes.get(f"{SPELLINGS.get(model, model)}{slash}{method}")
    if found is None and short.lower() in UNAVAILABLE and ("pretrain" in name or short.lower() == "microllama"):
        raise UserError(
            f"The recipe {name!r} trains on data that is not available. For texts of your own: litgpt pretrain "
            f"{UNAVAILABLE[short.lower()]} --tokenizer_dir DIR --data TextFiles --data.train_data_path FOLDER"
        )
    if found is None:
        names = [r.name for r in recipes.values() if not slash and simplified(r.model) == simplified(model)]
        hint = f" Available: {', '.join(names)}." if names else nearest(short, [r.name for r in recipes.values()])
        raise UserError(f"No recipe named {name!r}.{hint or ' See: litgpt recipes'}")
    return found


def simplified(name: str) -> str:
    return re.sub(r"[-_. ]", "", name.lower())
