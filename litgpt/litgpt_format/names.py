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
ABSENT = {  # modules and names of LitGPT that are not here, and what to use instead
    "litgpt.data.prepare_slimpajama": "prepare these data with LitGPT, or train on text files with TextFiles",
    "litgpt.data.prepare_starcoder": "prepare these data with LitGPT, or train on text files with TextFiles",
    "litgpt.generate.sequentially": "use LLM.distribute(generate_strategy='sequential')",
    "litgpt.generate.speculative_decoding": "use the command litgpt generate_speculatively",
    "litgpt.generate.tp": "use the command litgpt generate_tp",
    **dict.fromkeys(
        ("load_param", "qkv_reassemble", "copy_weights_..."), "use convert_hf_checkpoint for a whole folder"
    ),
    "estimate_model_memory": "litgpt finetune --train.max_steps 2 prints the peak memory",
    "incremental_save": "use torch.save",
    "instantiate_bnb_optimizer": "use instantiate_torch_optimizer",
    "load_from_full_model_state_dict": "use load_checkpoint",
    "validate_checkpoint": "use check_valid_checkpoint_dir",
}
PACKAGES = ("litgpt.chat", "litgpt.deploy", "litgpt.eval", "litgpt.scripts")  # that have some of these modules


class OtherNames(MetaPathFinder, Loader):
    """Imports one of `MODULES` after the ordinary lookup has failed. Both names refer to the same module object."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Optional[ModuleSpec]:
        if name in ABSENT:
            raise ModuleNotFoundError(f"{name} is not available: {ABSENT[name]}.", name=name)
        if name in PACKAGES:
            return ModuleSpec(name, None, is_package=True)
        return ModuleSpec(name, self) if name in MODULES else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = importlib.import_module(MODULES[spec.name])
        self.spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self.spec  # the import system has replaced it


def absent(module: str, name: str) -> Exception:
    """The error for a name that a module does not have."""
    reason = ABSENT.get("copy_weights_..." if name.startswith("copy_weights_") else name)
    if reason is None:
        return AttributeError(f"module {module!r} has no attribute {name!r}")
    return ImportError(f"{name} is not available: {reason}.")


sys.meta_path.append(OtherNames())
