"""`litgpt doctor`"""

import os
import platform
import re
import shutil
import sys
import tempfile
import textwrap
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, Optional

import litgpt
from litgpt.errors import install_command
from litgpt.storage.files import cache_place, home

EXTRAS = {  # the extras of pyproject.toml, and what they add
    "chat": "a line editor for litgpt chat",
    "quantize": "4- and 8-bit base models (--quantize), 8-bit optimizers",
    "evaluate": "lm-evaluation-harness benchmarks",
    "serve": "the HTTP server",
    "export": "GGUF files (litgpt export)",
    "plot": "loss.png beside metrics.csv",
    "data": "Parquet and zstandard files, Hugging Face datasets (hf:ORG/NAME)",
    "litdata": "LitGPT's LitData, OpenWebText, TinyLlama, and MicroLlama in Python",
    "tensorboard": "--logger_name tensorboard",
    "wandb": "--logger_name wandb",
    "mlflow": "--logger_name mlflow",
    "trackio": "--logger_name trackio",
}
SHOWN = (  # environment variables that are shown with their values: switches and numbers
    "CUDA_VISIBLE_DEVICES OMP_NUM_THREADS MKL_NUM_THREADS PYTORCH_CUDA_ALLOC_CONF PYTORCH_ALLOC_CONF HF_HUB_OFFLINE "
    "LITGPT_TRACEBACK WANDB_MODE RANK LOCAL_RANK WORLD_SIZE NODE_RANK SLURM_NTASKS SLURM_PROCID SLURM_LOCALID "
    "NCCL_DEBUG NCCL_P2P_DISABLE NCCL_IB_DISABLE"
).split()
NAMED = (  # variables that are shown without their values: tokens, addresses, paths
    "HF_TOKEN HF_HOME HF_ENDPOINT LITGPT_CACHE WANDB_API_KEY MLFLOW_TRACKING_URI TRACKIO_DIR MASTER_ADDR HTTP_PROXY "
    "HTTPS_PROXY http_proxy https_proxy LD_LIBRARY_PATH PYTHONPATH"
).split()
HARMLESS = re.compile(r"[\w.,:/-]{0,40}")
MEMORY_LIMITS = (  # limit and usage of a container, in both generations of control groups
    ("memory.max", "memory.current"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
)
GB = 1e9


def main(out_dir: Path = Path("out")) -> None:
    """Show what a bug report needs: versions, devices, precisions, memory, extras.

    Everything is tested on this machine; nothing is sent. The output has no tokens, addresses or home folders, so you
    can paste it as it is. Exits with 1 if something keeps litgpt from working.

    Args:
        out_dir: An output folder, to show the free space on its disk.
    """
    report = Report(out_dir)
    for check in (check_versions, check_devices, check_memory, check_extras, check_environment):
        check(report)
    print()
    for problem in report.problems:
        print(f"PROBLEM: {without_home(problem)}")
    if report.problems:
        sys.exit(1)
    print("No problems found.")


class Report:
    """The output so far. Each check adds lines, and problems that keep litgpt from working."""

    def __init__(self, out_dir: Path) -> None:
        self.out_dir = out_dir
        self.problems: list[str] = []

    def add(self, name: str, *parts: str, separator: str = ", ") -> None:
        """Print an entry, with line breaks between its parts."""
        text = without_home(separator.join(part.replace(" ", "\xa0") for part in parts))
        for i, line in enumerate(textwrap.wrap(text, 100, break_long_words=False, break_on_hyphens=False)):
            print(f"{'' if i else name:12} {line}".replace("\xa0", " ").rstrip(), flush=True)


def check_versions(report: Report) -> None:
    report.add("litgpt", f"{litgpt.__version__}, in {Path(litgpt.__file__).parent}")
    report.add("python", f"{platform.python_version()} ({platform.python_implementation()}), {platform.platform()}")
    required = requirements("")
    versions = {requirement.name: installed(requirement.name) for requirement in required}
    report.add("libraries", *(f"{name} {version}" for name, version in versions.items() if version))
    report.problems += filter(None, map(lacking, required))


def check_devices(report: Report) -> None:
    try:
        import torch
    except Exception as e:  # a broken build may raise anything
        report.problems.append(f"torch cannot be imported: {first_line(e)}")
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    report.add("cpu", f"{cpu_name()}, {cores} cores, torch uses {torch.get_num_threads()} threads")
    devices = [torch.device("cpu")]
    for i in range(torch.cuda.device_count()):
        try:
            properties = torch.cuda.get_device_properties(i)
            free, total = torch.cuda.mem_get_info(i)
        except Exception as e:
            report.problems.append(f"cuda:{i} cannot be used: {first_line(e)}")
            continue
        devices.append(torch.device("cuda", i))
        memory = f"{free / GB:,.1f} of {total / GB:,.1f} GB free"
        capability = f"compute capability {properties.major}.{properties.minor}"
        report.add(f"cuda:{i}", f"{properties.name}, {memory}, {capability}, CUDA {torch.version.cuda}")
    if not torch.cuda.is_available():
        report.add("cuda", "none" if torch.version.cuda else "none: this build of torch does not support it")
    if torch.backends.mps.is_available():
        devices.append(torch.device("mps"))
        report.add("mps", "available")
    for device in devices:
        check_precisions(report, device)


def check_precisions(report: Report, device: Any) -> None:
    from litgpt.model.devices import DTYPES, default_training_precision

    results, default = [], default_training_precision(device)
    for precision in DTYPES:
        error = tried(train_a_step, precision, device)
        note = " (the default)" if precision == default else ""
        results.append(f"not {precision}: {error}" if error else f"{precision}{note}")
        if precision == default and error:
            report.problems.append(f"a training step fails on {device} in {precision}: {error}")
    report.add(f"on {device}", *results, separator="; ")
    if installed("bitsandbytes") and device.type != "mps":
        errors = {scheme: tried(quantized_product, scheme, device) for scheme in ("bnb.nf4", "bnb.fp4", "bnb.int8")}
        report.add("", *(f"not {s}: {error}" if error else s for s, error in errors.items()), separator="; ")


def check_memory(report: Report) -> None:
    memory = free_memory()
    report.add("memory", f"{memory[0] / GB:,.1f} of {memory[1] / GB:,.1f} GB free" if memory else "unknown")
    cache = cache_place() or Path(tempfile.gettempdir())
    out = report.out_dir
    report.add("disk", f"{free_disk(out.absolute())} for {out}, {free_disk(cache)} for the cache of tokenized data")


def check_extras(report: Report) -> None:
    for i, (name, purpose) in enumerate(EXTRAS.items()):
        packages = requirements(name)
        if not packages:
            text = "unknown: litgpt is not installed as a package"
        elif any(map(lacking, packages)):
            text = f"not installed: {purpose}; in the clone: {install_command(name)}"
        else:
            text = ", ".join(f"{package.name} {installed(package.name)}" for package in packages)
        report.add("" if i else "extras", f"{name:11} {text}")


def check_environment(report: Report) -> None:
    shown = {name: os.environ[name] for name in SHOWN if name in os.environ}
    entries = [f"{name}={value}" if HARMLESS.fullmatch(value) else f"{name} is set" for name, value in shown.items()]
    entries += [f"{name} is set" for name in NAMED if os.environ.get(name)]
    report.add("environment", *(entries or ["no relevant variable is set"]))
    report.add("hub token", "found" if hub_token() else "none (only private and gated models need one)")


def train_a_step(precision: str, device: Any) -> None:
    import torch

    from litgpt.model.config import Config
    from litgpt.model.devices import DTYPES
    from litgpt.model.gpt import GPT

    config = Config(n_layer=1, n_head=2, n_embd=64, padded_vocab_size=64, block_size=16, intermediate_size=64)
    model = GPT(config).to(device, DTYPES[precision])
    half = torch.bfloat16 if precision.startswith("bf16") else torch.float16
    with torch.autocast(device.type, half, enabled=precision.endswith("-mixed")):
        loss = model(torch.arange(16, device=device)[None]).float().square().mean()
    loss.backward()
    if not all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None):
        raise ArithmeticError("the gradients are not finite")


def quantized_product(scheme: str, device: Any) -> None:
    import torch

    from litgpt.methods.quantize import QuantizedLinear

    layer = QuantizedLinear(torch.nn.Linear(64, 64, bias=False, device="meta"), scheme)
    layer.store(0, torch.randn(64, 64, device=device))
    x = torch.randn(4, 64, device=device, dtype=torch.bfloat16, requires_grad=True)
    layer(x).float().sum().backward()


def tried(what: Callable[..., None], *args: Any) -> Optional[str]:
    """None if it works, else the first line of the error."""
    try:
        what(*args)
    except Exception as e:  # a missing kernel, driver or library may raise anything
        return first_line(e)
    return None


def first_line(e: Exception) -> str:
    return next(iter(str(e).splitlines()), "")[:100] or type(e).__name__


def requirements(extra: str) -> list[Any]:
    """The packages that litgpt requires; those of an extra alone if one is given. Empty if litgpt is not installed."""
    from packaging.requirements import Requirement

    try:
        stated = [Requirement(text) for text in metadata.requires("litgpt") or []]
    except metadata.PackageNotFoundError:
        return []
    active = [r for r in stated if r.marker is None or r.marker.evaluate({"extra": extra})]
    return [r for r in active if r not in requirements("")] if extra else active


def installed(package: str) -> Optional[str]:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def lacking(requirement: Any) -> str:
    """What is wrong with an installed package; empty if nothing is."""
    version = installed(requirement.name)
    if version is None:
        return f"{requirement.name} is not installed; litgpt needs {requirement}"
    if not requirement.specifier.contains(version, prereleases=True):
        return f"{requirement.name} is {version}; litgpt needs {requirement.specifier}"
    return ""


def cpu_name() -> str:
    match = re.search(r"^model name\s*:\s*(.+)$", system_text("/proc/cpuinfo"), re.MULTILINE)
    return match[1] if match else platform.processor() or platform.machine()


def free_memory() -> Optional[tuple[int, int]]:
    """Free and total memory in bytes, of the machine or within the limit of its container; None if unknown."""
    numbers = {k: int(n) * 1024 for k, n in re.findall(r"^(\w+):\s+(\d+)", system_text("/proc/meminfo"), re.MULTILINE)}
    if not numbers:
        return None
    free, total = numbers["MemAvailable"], numbers["MemTotal"]
    for files in MEMORY_LIMITS:
        limit, used = (system_text(f"/sys/fs/cgroup/{file}").strip() for file in files)
        if limit.isdecimal() and used.isdecimal() and int(limit) < total:
            total, free = int(limit), min(free, max(0, int(limit) - int(used)))
    return free, total


def system_text(path: str) -> str:
    """A text file of the system; empty if it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def free_disk(folder: Path) -> str:
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        return f"{shutil.disk_usage(folder).free / GB:,.1f} GB free"
    except OSError as e:
        return f"unknown ({e.strerror})"


def hub_token() -> bool:
    """Whether there is a Hugging Face token, in HF_TOKEN or stored by `hf auth login`."""
    try:
        from huggingface_hub import get_token

        return get_token() is not None
    except Exception:  # check_versions reports a broken installation
        return bool(os.environ.get("HF_TOKEN"))


def without_home(text: str) -> str:
    own = str(home() or "")
    return re.sub(rf"{re.escape(own)}(?![\w.-])", "~", text) if len(own) > 1 else text
