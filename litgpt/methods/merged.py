"""A base model with the updates of a LoRA folder added to its weights."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import torch

from litgpt.checkpoint.folder import with_changes
from litgpt.errors import UserError
from litgpt.families import weight_map
from litgpt.families.weights import Weights
from litgpt.methods.peft_folder import LoRAFolder


class MergedWeights(Weights):
    """The weights of a base, to which updates are added in float32 when they are read. They are outlined with the types
    of the base. A tied head is among them only if the adapter updates it, which unties it. Raises `UserError` if the
    adapter does not fit the base. `base` has those weights replaced that the adapter has in full."""

    def __init__(self, base: Weights, adapter: LoRAFolder) -> None:
        self.base = base
        self.adapter, self.folder, self.config, self.fields = adapter, base.folder, base.config, base.fields
        self.names = names = weight_map(base.config)
        self.deltas = adapter.deltas(base.config)
        self.origins = {name: name for name in base.files if name != names.tied_head and not names.unused.search(name)}
        if names.tied_head and names.tied_head.removesuffix(".weight") in self.deltas:
            self.origins[names.tied_head] = names.embedding
            self.config = replace(base.config, tie_embeddings=False)
            self.fields = with_changes(base.fields, base.config, self.config)
        if missing := sorted({f"{module}.weight" for module in self.deltas} - set(self.origins)):
            raise UserError(f"The adapter updates weights that the base does not have: {', '.join(missing)}.")
        self.shapes = {name: base.shapes[origin] for name, origin in self.origins.items()}
        self.dtypes = {name: base.dtypes[origin] for name, origin in self.origins.items()}
        self.files = {name: base.files[origin] for name, origin in self.origins.items()}

    def shards(self) -> list[Path]:
        return self.base.shards()

    def tensors(self, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        names = list(names)
        read = self.base.tensors(self.origins[name] for name in names)
        yield from ((name, self.merged(name, tensor)) for name, (_, tensor) in zip(names, read))

    def merged(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        module = name.removesuffix(".weight")
        if module not in self.deltas or module == name:
            return tensor
        delta, (ours, i) = self.deltas[module], self.names.find(module)
        transposed = bool(ours) and self.names.rules[ours][i].transposed
        tensor = tensor.T if transposed else tensor
        if delta.shape != tuple(tensor.shape):
            raise UserError(f"The adapter's update of {module} does not fit its weight {tuple(tensor.shape)}.")
        tensor = delta.added_to(tensor)
        return tensor.T if transposed else tensor
