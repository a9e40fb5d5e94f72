"""State dicts with LitGPT's names, of the model that everything inside litgpt uses."""

from collections.abc import Iterator
from typing import Any

import torch

from litgpt.families.table import without_wrappers
from litgpt.litgpt_format.folder import lit_modules
from litgpt.model.gpt import GPT


def lit_names(model: GPT) -> Iterator[tuple[str, list[str], list[int]]]:
    """For each parameter, its name here, and the names and rows of the tensors that hold it in LitGPT."""
    for path, module in model.named_modules(remove_duplicate=False):
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                theirs = [f"{name}.{leaf}" for name in lit_modules(without_wrappers(path), module)]
                sizes: Any = getattr(module, "parts", ()) if len(theirs) > 1 else [len(parameter)]
                yield f"{path}.{leaf}", theirs, list(sizes)


def to_lit_state(model: GPT, state: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A state dict of the model, whose keys begin with `prefix`, with LitGPT's names. Tensors share their memory."""
    found: dict[str, Any] = {}
    state = dict(state)
    for ours, theirs, sizes in lit_names(model):
        if prefix + ours in state:
            value = state.pop(prefix + ours)
            parts = value.split(sizes) if len(theirs) > 1 else [value]
            found |= {prefix + name: part for name, part in zip(theirs, parts)}
    return found | state


def from_lit_state(model: GPT, state: dict[str, Any], prefix: str, target: str) -> None:
    """Rename LitGPT's tensors in a state dict, in place: from those that begin with `prefix` to ours with `target`."""
    for ours, theirs, _ in lit_names(model):
        names = [prefix + name for name in theirs]
        if all(name in state for name in names):
            parts = [state.pop(name) for name in names]
            state[target + ours] = parts[0] if len(parts) == 1 else torch.cat(parts)
