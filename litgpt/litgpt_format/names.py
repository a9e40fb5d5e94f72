"""LitGPT's module names, such as `litgpt.lora`, as aliases of the modules here."""

import importlib
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, Optional

MODULES = {
    "litgpt.adapter": "litgpt.methods.adapter",
    "litgpt.adapter_v2": "litgpt.methods.adapter",
    "litgpt.args": "litgpt.train.args",
    "litgpt.config": "litgpt.model.config",
    **dict.fromkeys(
        (
            f"litgpt.data.{name}"
            for name in (
                "alpaca alpaca_2k alpaca_gpt4 deita dolly flan json_data lima lit_data longform microllama openwebtext "
                "tinyllama tinystories"
            ).split()
        ),
        "litgpt.compat.data",
    ),
    "litgpt.lora": "litgpt.methods.lora",
    "litgpt.pretrain": "litgpt.finetune.pretrain",
    "litgpt.prompts": "litgpt.litgpt_format.prompts",
    "litgpt.tokenizer": "litgpt.text.tokenizer",
}


class OtherNames(MetaPathFinder, Loader):
    """Imports one of `MODULES` after the ordinary lookup has failed. Both names refer to the same module object."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Optional[ModuleSpec]:
        return ModuleSpec(name, self) if name in MODULES else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = importlib.import_module(MODULES[spec.name])
        self.spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self.spec  # the import system has replaced it


sys.meta_path.append(OtherNames())
