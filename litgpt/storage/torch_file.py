"""Read files of `torch.save`, such as `pytorch_model.bin`, like safetensors: lazily, and without running code."""

import re
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from litgpt.errors import UserError

NAMES = {  # safetensors' names
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
TYPES = {name: dtype for dtype, name in NAMES.items()}
# the last file that cannot be mapped: its time, its tensors
_legacy: dict[Path, tuple[int, dict[str, torch.Tensor]]] = {}


class TorchFile:
    """The tensors of a file, with the methods of `safetensors.safe_open` that litgpt uses. Raises `UserError` if the
    file is damaged, or does not contain named tensors."""

    def __init__(self, file: Path) -> None:
        found = read(file)
        if isinstance(found, dict) and isinstance(found.get("state_dict"), dict):
            found = found["state_dict"]
        named = found.items() if isinstance(found, dict) else ()
        self.tensors = {name: t for name, t in named if isinstance(t, torch.Tensor)}
        if not self.tensors:
            raise UserError(f"{file} does not contain named tensors.")

    def __enter__(self) -> "TorchFile":
        return self

    def __exit__(self, *error: Any) -> None:
        self.tensors = {}

    def keys(self) -> list[str]:
        return list(self.tensors)

    def get_tensor(self, name: str) -> torch.Tensor:
        return self.tensors[name].detach().clone()  # does not keep the file open

    def get_slice(self, name: str) -> "TorchSlice":
        return TorchSlice(self.tensors[name])


class TorchSlice:
    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def get_shape(self) -> list[int]:
        return list(self.tensor.shape)

    def get_dtype(self) -> str:
        return NAMES.get(self.tensor.dtype, str(self.tensor.dtype))

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self.tensor[index].detach().clone()


def read(file: Path) -> Any:
    """Load a file of `torch.save`, mapped into memory. Files of the format before torch 1.6 are read and cached. Raises
    `UserError` if it is damaged, or contains more than tensors and plain values."""
    try:
        with open(file, "rb") as f:
            if f.read(4) == b"PK\x03\x04":
                return torch.load(file, map_location="cpu", mmap=True, weights_only=True)
        stamp = file.stat().st_mtime_ns
        if _legacy.get(file, (None,))[0] != stamp:
            found = torch.load(file, map_location="cpu", weights_only=True)
            _legacy.clear()
            _legacy[file] = (stamp, found)
        return _legacy[file][1]
    except UnpicklingError as e:
        if found := re.search(r"GLOBAL ([\w.]+)", str(e)):
            raise UserError(
                f"{file} requires code ({found[1]}), which litgpt does not run. Convert it to safetensors, or use a "
                "folder with safetensors files."
            ) from e
        raise UserError(f"{file} is damaged, or not a file of weights.") from e
    except (RuntimeError, OSError, EOFError, ValueError, KeyError, TypeError, AttributeError, IndexError) as e:
        reason = " ".join((str(e) or type(e).__name__).split())[:80]
        raise UserError(f"{file} is damaged or truncated ({reason}). Download it again.") from e
