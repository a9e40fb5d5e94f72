"""`litgpt recipes`"""

import json
import shutil
from pathlib import Path
from typing import Any, Optional

from litgpt.checkpoint.hub import PICO
from litgpt.cli.recipes import Recipe, find_recipe, shipped_recipes
from litgpt.commands.download import parameters
from litgpt.errors import UserError, nearest
from litgpt.model.config import Config, known_repositories

ROW = "{:28} {:9} {:>10}  {:>10}  {}"


def main(words: list[str] = [], overwrite: bool = False) -> None:  # noqa: B006
    """List the recipes that --config takes by name, show one, or copy one to a file.

    `litgpt recipes` lists all, `litgpt recipes llama qlora` those with these words in their name, model or machine.
    `litgpt recipes show phi-2/lora` prints a recipe, `litgpt recipes copy phi-2/lora my.yaml` copies it.

    Args:
        words: Words to search for; or show NAME; or copy NAME [FILE].
        overwrite: Let copy replace an existing file.
    """
    command, *rest = words or [""]
    if command == "show":
        if len(rest) != 1:
            raise UserError("litgpt recipes show takes the name of one recipe, such as phi-2/lora.")
        print(find_recipe(rest[0]).file.read_text(encoding="utf-8"), end="")
    elif command == "copy":
        if len(rest) not in (1, 2):
            raise UserError("litgpt recipes copy takes a recipe and a file, such as phi-2/lora my.yaml.")
        copy(find_recipe(rest[0]), rest[1] if len(rest) == 2 else None, overwrite)
    else:
        show_table(rest if command == "list" else words)


def copy(recipe: Recipe, to: Optional[str], overwrite: bool) -> None:
    """Copy a recipe to a file, by default NAME.yaml. Raises `UserError` if the file exists."""
    name = f"{recipe.name.replace('/', '-')}.yaml"
    target = Path(to or name)
    if target.is_dir() or (to or "").endswith("/"):
        target = target / name
    if target.exists() and not overwrite:
        raise UserError(f"{target} already exists. Choose another file, or pass --overwrite true.")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(recipe.file, target)
    print(f"Copied to {target}. To run it: {recipe.command.replace(recipe.name, str(target))}")


def show_table(words: list[str]) -> None:
    """Print the recipes that match all words. Raises `UserError` if there are none."""
    recipes = list(shipped_recipes())
    rows = [(r, f"{r.name} {r.method} {r.machine()} {repository(r.fields())}".lower()) for r in recipes]
    found = [r for r, text in rows if all(word.lower() in text for word in words)]
    if not found:
        names = {r.model for r in recipes} | {r.method for r in recipes} | {r.name for r in recipes}
        raise UserError(
            f"No recipe matches {' and '.join(words)}.{nearest(' '.join(words), names)} See: litgpt recipes"
        )
    print(ROW.format("MODEL", "METHOD", "PARAMETERS", "TRAINED", "MACHINE: GPUs AND THEIR MEMORY"))
    for recipe in found:
        fields = recipe.fields()
        config, n = model_of(fields)
        trained = n if recipe.method in ("full", "pretrain") else lora_parameters(config, fields)
        print(ROW.format(recipe.model, recipe.method, spoken(n), spoken(trained), recipe.machine()))
    print(f"\nTo run one: {found[0].command}")


def spoken(n: int) -> str:
    return f"{n / 1e9:.2f} B" if n >= 1e9 else f"{n / 1e6:.1f} M"


def repository(fields: dict[str, Any]) -> str:
    """The model as ORG/NAME or `pico`; empty for a recipe that defines its own model."""
    return str(fields.get("checkpoint_dir") or fields.get("model_name") or "").removeprefix("checkpoints/")


def model_of(fields: dict[str, Any]) -> tuple[Config, int]:
    """The model of a recipe and its approximate number of parameters, without norms and biases."""
    if row := known_repositories().get(repository(fields)):
        return Config(**row), parameters(Config(**row))
    llama = fields.get("model_config") or json.loads((PICO / "config.json").read_text(encoding="utf-8"))
    config = Config(
        padded_vocab_size=llama.get("vocab_size", 32000),  # that of the Llama tokenizer
        n_layer=llama["num_hidden_layers"],
        n_embd=llama["hidden_size"],
        n_head=llama["num_attention_heads"],
        n_query_groups=llama.get("num_key_value_heads"),
        head_size=llama.get("head_dim"),
        intermediate_size=llama["intermediate_size"],
        mlp_class_name="LLaMAMLP",
    )
    return config, parameters(config) - config.padded_vocab_size * config.n_embd  # both tie the head


def lora_parameters(config: Config, fields: dict[str, Any]) -> int:
    width = config.n_embd
    on = {"query": True, "value": True} | {k.removeprefix("lora_"): v for k, v in fields.items() if "lora_" in k}
    if on.get("targets") == "all-linear":
        on |= dict.fromkeys(("query", "key", "value", "projection", "mlp", ""), True) | {"head": False}
    mixing = [row for layer in range(config.n_layer) for row in config.mixing(layer)]
    n = sum(inputs + outputs for name, inputs, outputs in mixing if on.get(name))
    gates = config.n_layer * (width + 1) if config.shared_expert_gate and on.get("mlp") else 0
    n_matrices = 2 if config.mlp_class_name == "GptNeoxMLP" else 3
    sizes = [size for layer in range(config.n_layer) for size in config.mlp_sizes(layer)] if on.get("mlp") else []
    head = width + config.padded_vocab_size if on.get("head") else 0
    return on.get("r", 8) * (n + n_matrices * sum(width + size for size in sizes) + gates + head)
