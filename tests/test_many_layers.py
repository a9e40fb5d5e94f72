"""The work for one layer does not grow with their number: models with experts have thousands of layers."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from litgpt.checkpoint import folder as checkpoint
from litgpt.checkpoint.folder import Checkpoint, write_model
from litgpt.export.folder import FolderWriter
from litgpt.families import MAPS, read_config
from litgpt.families.table import WeightMap
from litgpt.families.weights import Outline
from litgpt.methods.adapter_folder import open_adapter
from litgpt.methods.lora import LoRA
from litgpt.methods.merged import MergedWeights
from litgpt.methods.model_source import ModelSource
from litgpt.methods.peft_export import write_lora
from litgpt.methods.peft_folder import LoRAFolder
from litgpt.model.gpt import GPT
from litgpt.train.devices.fsdp import added_parameters
from tests.test_lora import CPU, with_lora

LORA = LoRA(r=2, mlp=True)
FIELDS = {
    "model_type": "qwen3_moe",
    "vocab_size": 50,
    "hidden_size": 8,
    "intermediate_size": 8,
    "moe_intermediate_size": 8,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "max_position_embeddings": 64,
    "num_experts": 5,
    "num_experts_per_tok": 2,
}


class Folders:
    """A model of experts, as safetensors and as pytorch_model.bin, with an adapter."""

    def __init__(self, root: Path, n_layer: int) -> None:
        self.base, self.bin, self.adapter, self.out = (root / n for n in ("base", "bin", "adapter", "out"))
        for folder in (self.base, self.bin, self.adapter, self.out):
            folder.mkdir()
        fields = FIELDS | {"num_hidden_layers": n_layer}
        self.model = GPT(read_config(fields))
        write_model(self.model, fields, self.base)
        stored = Checkpoint(self.base)
        torch.save({name: stored.tensor(name) for name in stored.files}, self.bin / "pytorch_model.bin")
        (self.bin / "config.json").write_bytes((self.base / "config.json").read_bytes())
        self.adapted = with_lora(self.base, LORA)
        write_lora(LORA, self.adapted, str(self.base), self.adapter)
        with torch.device("meta"):
            self.empty = GPT(stored.config)

    def load(self, folder: Path, base: Path | None = None) -> GPT:
        return ModelSource.open(folder, base).model(torch.float32, CPU)


def merge(source: ModelSource, out: Path) -> None:
    assert isinstance(source.adapter, LoRAFolder)
    FolderWriter(source, MergedWeights(source.weights(), source.adapter)).write_weights(out)


WORK: dict[str, Callable[[Folders], Any]] = {
    "save an adapter": lambda f: write_lora(LORA, f.adapted, "base", f.out),
    "save a model": lambda f: write_model(f.model, {}, f.out),
    "load safetensors": lambda f: f.load(f.base),
    "load a .bin file": lambda f: f.load(f.bin),
    "load an adapter": lambda f: f.load(f.adapter),
    "adapt a model": lambda f: LoRA(r=2, mlp=True).apply(f.empty),
    "read an adapter": lambda f: open_adapter(f.adapter).deltas(f.model.config),
    "merge": lambda f: merge(ModelSource.open(f.adapter), f.out),
    "merge into a .bin file": lambda f: merge(ModelSource.open(f.adapter, f.bin), f.out),
    "find what FSDP shards": lambda f: added_parameters(f.model),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Folders]:
    return {n: Folders(tmp_path_factory.mktemp("experts"), n) for n in (1, 3)}


@pytest.mark.parametrize("work", WORK)
def test_once_for_all_layers(work, folders, monkeypatch):
    """How often the weight map is built and a file is opened does not depend on the layers; a weight's size is computed
    as often for each."""
    counts: Counter[str] = Counter()

    def counted(target: Any, name: str, found: Any) -> None:
        def call(*args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return found(*args, **kwargs)

        monkeypatch.setattr(target, name, property(call) if name == "size" else call)

    counted(WeightMap, "__init__", WeightMap.__init__)
    counted(checkpoint, "opened", checkpoint.opened)
    counted(Outline, "size", Outline.size.fget)  # type: ignore[attr-defined]
    seen = {}
    for n, several in folders.items():
        counts.clear()
        MAPS.clear()
        WORK[work](several)
        n_weights = sum(1 for _ in several.model.parameters())
        seen[n] = counts["__init__"], counts["opened"], counts["size"] / n_weights
    assert seen[1][:2] == seen[3][:2] and seen[3][2] <= 1.1 * seen[1][2]
