"""A LoRA adapter as a GGUF file, which llama.cpp applies to any file of its base, also a quantized one."""

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from litgpt.errors import UserError, require
from litgpt.export.gguf import LARGE, GGUFModel, Line, Parity, lora_folder
from litgpt.export.gguf_tensors import Tensor, arranged_columns, arranged_rows, expert_of
from litgpt.export.llama_cpp import is_installed
from litgpt.families import weight_map
from litgpt.methods.deltas import Delta
from litgpt.methods.peft_folder import LoRAFolder

DTYPES = {"f32": torch.float32, "f16": torch.float16}


def check_lora(base: GGUFModel) -> LoRAFolder:
    """The adapter. Raises `UserError` if llama.cpp cannot apply it to a file of the base."""
    adapter, config = lora_folder(base.source), base.weights.config
    merge = "Merge it instead: --to gguf"
    if adapter.dora:
        raise UserError(f"{adapter.folder} is a DoRA adapter, which llama.cpp cannot apply. {merge}")
    if adapter.in_full:
        raise UserError(f"{adapter.folder} has fully trained weights, such as {adapter.in_full[0]}. {merge}")
    if weight_map(config).tied_head.removesuffix(".weight") in adapter.deltas(config):
        raise UserError(f"{adapter.folder} updates the head, which is tied to the embedding. {merge}")
    return adapter


def write_gguf_lora(path: Path, base: GGUFModel, adapter: LoRAFolder, type: str) -> None:
    """Write an adapter, whose tensors are named after those of the base's file.

    Args:
        base: The base without the adapter.
        type: A key of `DTYPES`.
    """
    gguf = require("gguf", "export")
    writer = gguf.GGUFWriter(path, base.architecture.name)
    writer.add_type("adapter")
    writer.add_name(base.name)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    alpha = adapter.alpha or 1.0  # 0 stands for no scale at all
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    deltas = adapter.deltas(base.weights.config)
    unwritten = set(deltas)
    for tensor in base.tensors:
        updates = {name: deltas[module] for name in tensor.sources if (module := module_of(name)) in deltas}
        unwritten -= {module_of(name) for name in updates}
        if updates and tensor.name.endswith(".weight"):
            for end, factor in zip("ab", factors(updates, tensor, alpha, base)):
                writer.add_tensor(f"{tensor.name}.lora_{end}", factor.to(DTYPES[type]).contiguous().numpy())
    if unwritten:
        raise UserError(f"The adapter updates weights that the base does not have: {', '.join(sorted(unwritten))}.")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def module_of(name: str) -> str:
    module, _, leaf = name.rpartition(".")
    return module if leaf == "weight" else ""


def factors(
    updates: Mapping[str, Delta], tensor: Tensor, alpha: float, base: GGUFModel
) -> tuple[torch.Tensor, torch.Tensor]:
    """A (r, in_features) and B (rows, r) of a tensor, or of each expert in a stack. llama.cpp multiplies their product
    by alpha / r."""
    r = max(len(delta.a) for delta in updates.values())
    some, n, rows = next(iter(updates.values())), len(tensor.sources), tensor.shape[-2]
    a, b = some.a.new_zeros(n, r, some.a.size(1)), some.b.new_zeros(n, rows, r)
    for name, delta in updates.items():
        i, own = expert_of(name) if n > 1 else 0, len(delta.a)
        a[i, :own] = arranged_columns(name, delta.a, base.weights.config)
        changed = tensor.part(arranged_rows(name, delta.b, base.weights.config, base.architecture))
        b[i, :, :own] = changed * (delta.scale * r / alpha)
    return (a, b) if n > 1 else (a[0], b[0])


def parity_of_lora(out: Path, base: GGUFModel, parity: Parity) -> Iterator[Line]:
    """Ask llama.cpp with the adapter over a temporary file of the base. Raises as `GGUFModel.parity`."""
    if not is_installed():
        yield "parity", "xllamacpp is not installed, so llama.cpp was not asked: pip install xllamacpp"
    elif parity == "tensors" or (parity == "auto" and base.size > LARGE):
        yield "parity", "llama.cpp was not asked. --parity answers does it, with the model in memory"
    else:
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as folder:
            file = Path(folder, "base.gguf")
            base.write(file)
            yield from base.ask_llama_cpp(file, True, out)
