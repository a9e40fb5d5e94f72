"""LitGPT's module names, such as `litgpt.lora`, as aliases of the modules here."""

import importlib
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, Optional

GENERATE = "litgpt.compat.generate"
SCRIPTS = """
    convert_hf_checkpoint convert_lit_checkpoint convert_pretrained_checkpoint download merge_lora validate
"""
MODULES = {
    "litgpt.adapter": "litgpt.compat.adapter",
    "litgpt.adapter_v2": "litgpt.compat.adapter_v2",
    "litgpt.args": "litgpt.train.args",
    "litgpt.chat.base": "litgpt.compat.chat",
    "litgpt.config": "litgpt.litgpt_format.config",
    **dict.fromkeys(
        (
            f"litgpt.data.{name}"
            for name in (
                "alpaca alpaca_2k alpaca_gpt4 base deita dolly flan json_data lima lit_data longform microllama "
                "openwebtext text_files tinyllama tinystories"
            ).split()
        ),
        "litgpt.compat.data",
    ),
    "litgpt.deploy.serve": "litgpt.compat.scripts",
    "litgpt.eval.evaluate": "litgpt.compat.scripts",
    **dict.fromkeys((f"litgpt.generate.{name}" for name in "adapter adapter_v2 base full".split()), GENERATE),
    "litgpt.lora": "litgpt.compat.lora",
    "litgpt.parser_config": "litgpt.compat.utils",
    "litgpt.pretrain": "litgpt.finetune.pretrain",
    "litgpt.prompts": "litgpt.litgpt_format.prompts",
    **dict.fromkeys((f"litgpt.scripts.{name}" for name in SCRIPTS.split()), "litgpt.compat.scripts"),
    "litgpt.tokenizer": "litgpt.litgpt_format.tokenizer",
    "litgpt.utils": "litgpt.compat.utils",
}
PACKAGES = ("litgpt.chat", "litgpt.deploy", "litgpt.eval", "litgpt.scripts")  # that have some of these modules


class OtherNames(MetaPathFinder, Loader):
    """Imports one of `MODULES` after the ordinary lookup has failed. Both names refer to the same module object."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Optional[ModuleSpec]:
        if name in PACKAGES:
            return ModuleSpec(name, None, is_package=True)
        return ModuleSpec(name, self) if name in MODULES else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = importlib.import_module(MODULES[spec.name])
        self.spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self.spec  # the import system has replaced it


sys.meta_path.append(OtherNames())
