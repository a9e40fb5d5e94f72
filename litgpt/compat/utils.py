"""`litgpt.utils`: what scripts for LitGPT import from there."""

import importlib
import inspect
import math
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, Optional, Union

import torch
import yaml
from torch import nn

from litgpt.checkpoint.find import find_folder
from litgpt.checkpoint.hub import CHECKPOINTS
from litgpt.cli.legacy import REFUSED_VALUES
from litgpt.errors import UserError, nearest
from litgpt.litgpt_format.folder import MODEL, MODEL_CONFIG, has_hf_weights, read_pth
from litgpt.litgpt_format.names import absent
from litgpt.model.config import Config, to_litgpt
from litgpt.text.tokenizer import copy_files

SETTINGS = "hyperparameters.yaml"
LOGGERS = {  # the modules of Lightning's loggers
    "csv": ("lightning.fabric.loggers", "CSVLogger"),
    "tensorboard": ("lightning.fabric.loggers", "TensorBoardLogger"),
    "wandb": ("lightning.pytorch.loggers", "WandbLogger"),
    "mlflow": ("lightning.pytorch.loggers", "MLFlowLogger"),
}


# numbers


def find_multiple(n: int, k: int) -> int:
    """The smallest multiple of `k` that is at least `n`."""
    return -(-n // k) * k


def num_parameters(module: nn.Module, requires_grad: Optional[bool] = None) -> int:
    """The number of parameters, or only of those that require gradients, or do not. 4-bit ones count as they were."""
    chosen = (p for p in module.parameters() if requires_grad in (None, p.requires_grad))
    return sum(math.prod(p.quant_state.shape) if hasattr(p, "quant_state") else p.numel() for p in chosen)


def map_old_state_dict_weights(state_dict: dict[str, Any], mapping: Mapping[str, str], prefix: str) -> dict[str, Any]:
    """A state dict whose entries, with a prefix, are renamed in place."""
    for old, new in mapping.items():
        if prefix + old in state_dict:
            state_dict[prefix + new] = state_dict.pop(prefix + old)
    return state_dict


def reset_parameters(module: nn.Module) -> None:
    """Initialize the module and those in it, as far as they know how to."""
    for part in module.modules():
        if callable(getattr(part, "reset_parameters", None)):
            part.reset_parameters()  # type: ignore[operator]


def chunked_cross_entropy(
    logits: Union[torch.Tensor, list[torch.Tensor]],
    targets: torch.Tensor,
    chunk_size: int = 128,
    ignore_index: int = -100,
) -> torch.Tensor:
    """The mean cross-entropy, computed in chunks, which takes less memory.

    Args:
        logits: (B, T, V), or chunks of it along T.
        targets: (B, T).
        chunk_size: Rows of a chunk; 0 for all at once, where no targets give nan instead of 0.
        ignore_index: A target that does not count.
    """
    together = torch.cat(logits, dim=1) if isinstance(logits, list) else logits
    rows, ids = together.reshape(-1, together.size(-1)), targets.reshape(-1)
    if chunk_size == 0:
        return nn.functional.cross_entropy(rows, ids, ignore_index=ignore_index)
    parts = zip(rows.split(chunk_size), ids.split(chunk_size))
    losses = [nn.functional.cross_entropy(r, i, ignore_index=ignore_index, reduction="none") for r, i in parts]
    return torch.cat(losses).sum() / (ids != ignore_index).sum().clamp(min=1)


def flops_per_param(max_seq_length: int, n_layer: int, n_embd: int, n_params: int) -> int:
    """The FLOPs of a forward pass over a sequence: two for each parameter and token, and those of attention."""
    return 2 * n_params * max_seq_length + 4 * n_layer * n_embd * max_seq_length**2


def estimate_flops(model: Any, training: bool) -> int:
    """The FLOPs of a pass over a sequence of the model's full length: forward, and in training also backward."""
    config = model.config
    length = getattr(model, "max_seq_length", config.block_size)
    trained, frozen = (
        flops_per_param(length, config.n_layer, config.n_embd, num_parameters(model, requires_grad=grad))
        for grad in (True, False)
    )
    return (3 * trained + 2 * frozen) if training else trained + frozen


# folders and files


def extend_checkpoint_dir(checkpoint_dir: Path) -> Path:
    """The folder under checkpoints/, if only that exists."""
    below = CHECKPOINTS / checkpoint_dir
    is_name = not checkpoint_dir.is_absolute() and checkpoint_dir.parts[:1] != CHECKPOINTS.parts
    return below if is_name and not checkpoint_dir.is_dir() and below.exists() else checkpoint_dir


def auto_download_checkpoint(
    model_name: Union[str, Path], access_token: Optional[str] = None, ignore_tokenizer_files: bool = False
) -> Path:
    """The folder of a model, which is downloaded if it is missing."""
    if access_token is not None:
        os.environ["HF_TOKEN"] = access_token
    folder = find_folder(extend_checkpoint_dir(Path(model_name)))
    check_valid_checkpoint_dir(folder, raise_error=True, verbose=False, ignore_tokenizer_files=ignore_tokenizer_files)
    return folder


def check_valid_checkpoint_dir(
    checkpoint_dir: Path,
    model_filename: str = MODEL,
    verbose: bool = True,
    raise_error: bool = False,
    ignore_tokenizer_files: bool = False,
) -> None:
    """Check that a folder has a model, in LitGPT's form or in Hugging Face's, and a tokenizer. Otherwise it ends the
    program, or raises `FileNotFoundError` with `raise_error`."""
    folder = Path(checkpoint_dir)
    if not folder.is_dir():
        fail_check(f"{folder.absolute()} is not a folder.", verbose, raise_error)
    missing = []
    if not has_hf_weights(folder):
        missing = [name for name in (model_filename, MODEL_CONFIG) if not (folder / name).is_file()]
    if not ignore_tokenizer_files and not any(
        (folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")
    ):
        missing.append("tokenizer.json or tokenizer.model")
    if missing:
        fail_check(f"{folder.absolute()} has no {', '.join(missing)}.", verbose, raise_error)


def fail_check(problem: str, verbose: bool, raise_error: bool) -> NoReturn:
    if verbose:
        print(f"litgpt: error: {problem} To download a model: litgpt download ORG/NAME", file=sys.stderr)
    if raise_error:
        raise FileNotFoundError(problem)
    raise SystemExit(1)


def copy_config_files(source_dir: Path, out_dir: Path) -> None:
    """Copy what belongs to a model beside its weights: configuration and tokenizer."""
    for name in ("config.json", MODEL_CONFIG):
        if (Path(source_dir) / name).is_file():
            shutil.copyfile(Path(source_dir) / name, Path(out_dir) / name)
    copy_files(Path(source_dir), Path(out_dir))


def save_config(config: Any, checkpoint_dir: Path) -> None:
    """Write a `model_config.yaml`."""
    fields = to_litgpt(config, config.name) if isinstance(config, Config) else asdict(config)
    (Path(checkpoint_dir) / MODEL_CONFIG).write_text(yaml.safe_dump(fields), encoding="utf-8")


def load_checkpoint(fabric: Any, model: nn.Module, checkpoint_path: Path, strict: bool = True) -> None:
    """Load the weights of a file of LitGPT's into a model. `fabric` is not needed."""
    model.load_state_dict(read_pth(Path(checkpoint_path)), strict=strict)


def load_checkpoint_update(
    fabric: Any, adapter_path: Path, model: nn.Module, checkpoint_path: Path, strict: bool = True
) -> None:
    """Load the weights of a base and of an adapter, both files of LitGPT's, into a model. `fabric` is not needed."""
    model.load_state_dict(read_pth(Path(checkpoint_path)) | read_pth(Path(adapter_path)), strict=strict)


def find_resume_path(resume: Union[bool, Literal["auto"], Path], out_dir: Path) -> Union[bool, Path, None]:
    """The file of the latest checkpoint below an output folder, LitGPT's or ours. Without one it is None for `auto`;
    True raises `FileNotFoundError`. Paths and False are returned as they are."""
    if not resume or isinstance(resume, Path):
        return resume
    files = [file for name in ("*.pth", "training_state.pt") for file in Path(out_dir).rglob(f"step-*/{name}")]
    latest = max(files, key=lambda file: int(file.parent.name.split("-")[1]), default=None)
    if latest is None and resume is True:
        raise FileNotFoundError(f"{out_dir} has no checkpoint to resume from.")
    return latest


def init_out_dir(out_dir: Union[str, Path]) -> Path:
    """The output folder; a relative one is below the folder in LIGHTNING_ARTIFACTS_DIR, if that is set."""
    return Path(os.environ.get("LIGHTNING_ARTIFACTS_DIR", ""), out_dir)


# settings of a run


def parse_devices(devices: Union[str, int]) -> int:
    """The number of devices. `auto` and -1 are all GPUs, or one device without any."""
    if devices in ("auto", -1):
        return max(1, torch.cuda.device_count())
    if not isinstance(devices, int) or devices < 1:
        raise UserError(f"devices={devices!r}: expected 'auto' or a number above 0.")
    return devices


def get_default_supported_precision(training: bool) -> str:
    """LitGPT's default precision for this machine. The commands choose their own, which may be another."""
    bits = "16" if torch.cuda.is_available() and not torch.cuda.is_bf16_supported() else "bf16"
    return f"{bits}-mixed" if training else f"{bits}-true"


def capture_hparams() -> dict[str, Any]:
    """The local variables of the caller, in forms that a YAML file can have."""
    frame = inspect.currentframe()
    assert frame is not None and frame.f_back is not None
    found: dict[str, Any] = {}
    for name, value in frame.f_back.f_locals.items():
        if is_dataclass(value) and not isinstance(value, type):
            found[name] = asdict(value)
        else:
            found[name] = value if isinstance(value, (int, float, str, bool, Path, type(None))) else str(value)
    return found


def save_hyperparameters(function: Any, checkpoint_dir: Path, known_commands: Optional[list[str]] = None) -> None:
    """Write the arguments of the command line, as `function` takes them, to `hyperparameters.yaml`.

    Args:
        known_commands: Words that the command line may begin with and that are not arguments; by default the commands
            of litgpt.
    """
    from jsonargparse import CLI, capture_parser

    commands = known_commands or list(importlib.import_module("litgpt.__main__").COMMANDS)
    words = sys.argv[1:]
    words = words[1:] if words[:1] and words[0] in commands else words
    parser = capture_parser(lambda: CLI(function, args=words))
    parser.save(parser.parse_args(words), str(Path(checkpoint_dir) / SETTINGS), overwrite=True)


def choose_logger(
    logger_name: Literal["csv", "tensorboard", "wandb", "mlflow"],
    out_dir: Path,
    name: str,
    log_interval: int = 1,
    log_args: Optional[dict[str, Any]] = None,
    resume: Optional[bool] = None,
    **kwargs: Any,
) -> Any:
    """A logger of Lightning. Raises `UserError` if there is none of that name."""
    if reason := REFUSED_VALUES.get(("logger_name", str(logger_name))):
        raise UserError(reason)
    if logger_name not in LOGGERS:
        raise UserError(
            f"logger_name={logger_name!r}: choose from {', '.join(LOGGERS)}.{nearest(logger_name, LOGGERS)}"
        )
    module, kind = LOGGERS[logger_name]
    given = log_args or {}
    options: dict[str, Any] = {"root_dir": Path(out_dir) / "logs", "name": logger_name}
    if logger_name == "csv":
        options["flush_logs_every_n_steps"] = log_interval
    elif logger_name == "mlflow":
        options = {"experiment_name": name}
    elif logger_name == "wandb":
        run, group = (given.get(key, os.environ.get(f"WANDB_RUN_{env}")) for key, env in WANDB)
        options = {"project": given.get("project", name), "name": run, "group": group, "resume": resume}
    return getattr(importlib.import_module(module), kind)(**options, **kwargs)


WANDB = (("run", "NAME"), ("group", "GROUP"))  # options, and the ends of the variables that replace them


class CycleIterator:
    """Iterates again and again over an iterable, and counts in `epoch` how often it has begun anew."""

    def __init__(self, iterable: Iterable[Any]) -> None:
        self.iterable, self.epoch = iterable, 0
        self.current: Optional[Iterator[Any]] = None

    def __iter__(self) -> "CycleIterator":
        return self

    def __next__(self) -> Any:
        if self.current is None:
            self.current = iter(self.iterable)
        for item in self.current:
            return item
        self.current = iter(self.iterable)
        self.epoch += 1
        return next(self.current)


def instantiate_torch_optimizer(optimizer: Union[str, dict[str, Any]], model_parameters: Any, **kwargs: Any) -> Any:
    """An optimizer by its name in `torch.optim` or its path, or by `{class_path: ..., init_args: ...}`. Of `kwargs`,
    those that it takes are used."""
    given: dict[str, Any] = {"class_path": optimizer} if isinstance(optimizer, str) else dict(optimizer)  # type: ignore
    module, _, name = given["class_path"].rpartition(".")
    kind = getattr(importlib.import_module(module or "torch.optim"), name)
    taken = inspect.signature(kind).parameters
    return kind(model_parameters, **given.get("init_args", {}), **{k: v for k, v in kwargs.items() if k in taken})


def __getattr__(name: str) -> Any:
    raise absent("litgpt.utils", name)
