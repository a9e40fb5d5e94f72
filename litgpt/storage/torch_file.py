"""A file of `torch.save`, such as `pytorch_model.bin`, read as a file of safetensors is: lazily, and without running
what may be in it."""

import re
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from litgpt.errors import UserError

NAMES = {  # as safetensors names them
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
_old_form: dict[Path, tuple[int, dict[str, torch.Tensor]]] = {}  # the last one that was read


class TorchFile:
    """The tensors of a file, with the methods of `safetensors.safe_open` that are used here.

    Raises:
        UserError: it is damaged, or holds something else than tensors by name.
    """

    def __init__(self, file: Path) -> None:
        found = read(file)
        if isinstance(found, dict) and isinstance(found.get("state_dict"), dict):
            found = found["state_dict"]
        self.tensors = (
            {k: t for k, t in found.items() if isinstance(t, torch.Tensor)} if isinstance(found, dict) else {}
        )
        if not self.tensors:
            raise UserError(f"{file} holds no tensors by name.")

    def __enter__(self) -> "TorchFile":
        return self

    def __exit__(self, *error: Any) -> None:
        self.tensors = {}

    def keys(self) -> list[str]:
        return list(self.tensors)

    def get_tensor(self, name: str) -> torch.Tensor:
        return self.tensors[name].detach().clone()  # the file is not kept open for it

    def get_slice(self, name: str) -> "TorchSlice":
        return TorchSlice(self.tensors[name])


class TorchSlice:
    """A tensor of which only a part may be wanted."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def get_shape(self) -> list[int]:
        return list(self.tensor.shape)

    def get_dtype(self) -> str:
        return NAMES.get(self.tensor.dtype, str(self.tensor.dtype))

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self.tensor[index].detach().clone()


def read(file: Path) -> Any:
    """What is in a file that `torch.save` wrote, as long as it is tensors and plain values; mapped into memory. One of
    the form before torch 1.6 is read whole and kept.

    Raises:
        UserError: it is damaged, or asks for more than that.
    """
    try:
        return mapped_or_kept(file)
    except UnpicklingError as e:
        if found := re.search(r"GLOBAL ([\w.]+)", str(e)):
            raise UserError(
                f"{file} is not read: it asks for {found[1]}, and weights need no code. "
                "Convert it to safetensors, or find a folder that has them."
            ) from e
        raise UserError(f"{file} is damaged, or no file of weights.") from e
    except (RuntimeError, OSError, EOFError, ValueError, KeyError, TypeError, AttributeError, IndexError) as e:
        reason = " ".join((str(e) or type(e).__name__).split())[:80]
        raise UserError(f"{file} is damaged or cut short ({reason}). Download it again.") from e


def mapped_or_kept(file: Path) -> Any:
    stamp = file.stat().st_mtime_ns
    if file in _old_form and _old_form[file][0] == stamp:
        return _old_form[file][1]
    with open(file, "rb") as f:
        is_zip = f.read(4) == b"PK\x03\x04"
    if is_zip:
        return torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    found = torch.load(file, map_location="cpu", weights_only=True)
    _old_form.clear()
    _old_form[file] = (stamp, found)
    return found
