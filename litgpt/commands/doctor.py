"""`litgpt doctor`"""

import os
import platform
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, Optional

import litgpt
from litgpt.storage.files import cache_place, home

EXTRAS = {  # what an extra of pyproject.toml adds
    "chat": "a line editor for litgpt chat",
    "quantize": "a base in 4 or 8 bits (--quantize), 8-bit optimizers",
    "evaluate": "benchmarks of lm-evaluation-harness",
    "serve": "a server over HTTP",
    "plot": "loss.png beside metrics.csv",
    "data": "Parquet and zstandard files, data sets of the hub (hf:ORG/NAME)",
    "tensorboard": "--logger_name tensorboard",
    "wandb": "--logger_name wandb",
    "mlflow": "--logger_name mlflow",
}
SHOWN = (  # environment variables whose value may be shown: switches and numbers
    "CUDA_VISIBLE_DEVICES OMP_NUM_THREADS MKL_NUM_THREADS PYTORCH_CUDA_ALLOC_CONF PYTORCH_ALLOC_CONF HF_HUB_OFFLINE "
    "LITGPT_TRACEBACK WANDB_MODE RANK LOCAL_RANK WORLD_SIZE NODE_RANK SLURM_NTASKS SLURM_PROCID SLURM_LOCALID "
    "NCCL_DEBUG NCCL_P2P_DISABLE NCCL_IB_DISABLE"
).split()
NAMED = (  # only whether they are set: tokens, addresses, paths
    "HF_TOKEN HF_HOME HF_ENDPOINT LITGPT_CACHE WANDB_API_KEY MLFLOW_TRACKING_URI MASTER_ADDR HTTP_PROXY HTTPS_PROXY "
    "http_proxy https_proxy LD_LIBRARY_PATH PYTHONPATH"
).split()
PLAIN = re.compile(r"[\w.,:/-]{0,40}")
GB = 1e9
Lines = Iterator[tuple[str, str]]


def main(out_dir: Path = Path("out")) -> None:
    """Show what a bug report needs: versions, devices, precisions, memory, extras.

    Everything is tried, nothing is sent. No token, no address and no home folder is shown, so that the screen can be
    pasted as it is. Exits with 1 if something keeps litgpt from working.

    Args:
        out_dir: A folder that a run would write to, whose free disk is shown.
    """
    wrong: list[str] = []
    for name, text in lines(out_dir, wrong):
        print(f"{name:12} {without_home(text)}".rstrip(), flush=True)
    print()
    for problem in wrong:
        print(f"PROBLEM: {without_home(problem)}")
    if wrong:
        sys.exit(1)
    print("Nothing is wrong with this installation.")


def lines(out_dir: Path, wrong: list[str]) -> Lines:
    """The screen, line by line; adds to `wrong` what keeps litgpt from working."""
    required, extras = requirements()
    yield "litgpt", f"{litgpt.__version__}, in {Path(litgpt.__file__).parent}"
    yield "python", f"{platform.python_version()} ({platform.python_implementation()}), {platform.platform()}"
    found = {requirement.name: installed(requirement.name) for requirement in required}
    yield from folded("libraries", [f"{name} {version}" for name, version in found.items() if version])
    wrong += [lack for requirement in required if (lack := lacking(requirement))]
    try:
        import torch  # noqa: F401
    except Exception as e:  # whatever a broken build raises
        wrong.append(f"torch cannot be imported: {first_line(e)}")
    else:
        yield from device_lines(wrong)
    memory = free_memory()
    yield "memory", f"{memory[0] / GB:,.1f} of {memory[1] / GB:,.1f} GB free" if memory else "unknown"
    cache = cache_place() or Path(tempfile.gettempdir())
    yield "disk", f"{free_disk(out_dir.absolute())} for {out_dir}, {free_disk(cache)} where tokens are kept"
    for name, what in EXTRAS.items():
        parts = extras.get(name, [])
        missing = [lack for requirement in parts if (lack := lacking(requirement))]
        if not parts:
            text = "unknown: litgpt is not installed as a package"
        elif missing:
            text = f"not there: {what}; pip install 'litgpt[{name}]'"
        else:
            text = ", ".join(f"{requirement.name} {installed(requirement.name)}" for requirement in parts)
        yield "extra" if name == next(iter(EXTRAS)) else "", f"{name:11} {text}"
    yield from folded("environment", environment() or ["none of the variables that matter is set"])
    yield "hub token", "there" if hub_token() else "none (only private and gated models need one)"


def device_lines(wrong: list[str]) -> Lines:
    """Devices, and the precisions and quantizations that work on each."""
    import torch

    from litgpt.model.devices import DTYPES, default_precision

    yield "cpu", f"{cpu_name()}, {cpu_count()} cores, torch takes {torch.get_num_threads()} threads"
    devices = [torch.device("cpu")]
    for i in range(torch.cuda.device_count()):
        try:
            properties = torch.cuda.get_device_properties(i)
            free, total = torch.cuda.mem_get_info(i)
        except Exception as e:
            wrong.append(f"cuda:{i} cannot be used: {first_line(e)}")
            continue
        devices.append(torch.device("cuda", i))
        yield (
            f"cuda:{i}",
            f"{properties.name}, {free / GB:,.1f} of {total / GB:,.1f} GB free, "
            f"compute capability {properties.major}.{properties.minor}, CUDA {torch.version.cuda}",
        )
    if not torch.cuda.is_available():
        yield "cuda", f"none{'' if torch.version.cuda else ': this torch is built without it'}"
    if torch.backends.mps.is_available():
        devices.append(torch.device("mps"))
        yield "mps", "there"
    for device in devices:
        said, default = [], default_precision(device)
        for precision in DTYPES:
            error = tried(train_a_step, precision, device)
            note = " (the default)" if precision == default else ""
            said.append(f"{precision}{note}" if error is None else f"not {precision}: {error}")
            if precision == default and error is not None:
                wrong.append(f"a training step fails on {device} in {precision}: {error}")
        yield from folded(f"on {device}", said, "; ")
        if installed("bitsandbytes") and device.type != "mps":
            schemes = {s: tried(quantized_product, s, device) for s in ("bnb.nf4", "bnb.fp4", "bnb.int8")}
            yield from folded("", [s if error is None else f"not {s}: {error}" for s, error in schemes.items()], "; ")


def train_a_step(precision: str, device: Any) -> None:
    """A forward and a backward pass of a very small model."""
    import torch

    from litgpt.model import GPT
    from litgpt.model.config import Config
    from litgpt.model.devices import DTYPES

    config = Config(n_layer=1, n_head=2, n_embd=64, padded_vocab_size=64, block_size=16, intermediate_size=64)
    model = GPT(config).to(device, DTYPES[precision])
    half = torch.bfloat16 if precision.startswith("bf16") else torch.float16
    with torch.autocast(device.type, half, enabled=precision.endswith("-mixed")):
        loss = model(torch.arange(16, device=device)[None]).float().square().mean()
    loss.backward()
    if not all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None):
        raise ArithmeticError("its numbers are not finite")


def quantized_product(scheme: str, device: Any) -> None:
    """A product with a quantized matrix, and its backward pass."""
    import torch

    from litgpt.methods.quantize import QuantizedLinear

    layer = QuantizedLinear(torch.nn.Linear(64, 64, bias=False, device="meta"), scheme)
    layer.store(0, torch.randn(64, 64, device=device))
    x = torch.randn(4, 64, device=device, dtype=torch.bfloat16, requires_grad=True)
    layer(x).float().sum().backward()


def tried(what: Any, *args: Any) -> Optional[str]:
    """None if it works, else the first line of what it says."""
    try:
        what(*args)
    except Exception as e:  # a missing kernel, a driver, a library: anything may come
        return first_line(e)
    return None


def first_line(e: Exception) -> str:
    return next(iter(str(e).splitlines()), "")[:100] or type(e).__name__


def requirements() -> tuple[list[Any], dict[str, list[Any]]]:
    """What litgpt wants installed: always, and for each extra. Empty where it is not installed as a package."""
    from packaging.requirements import Requirement

    always: list[Any] = []
    extras: dict[str, list[Any]] = {}
    try:
        stated = [Requirement(text) for text in metadata.requires("litgpt") or []]
    except metadata.PackageNotFoundError:
        return [], {}
    for requirement in stated:
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            always.append(requirement)
            continue
        for name in EXTRAS:
            if requirement.marker.evaluate({"extra": name}):
                extras.setdefault(name, []).append(requirement)
    return always, extras


def installed(package: str) -> Optional[str]:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def lacking(requirement: Any) -> str:
    """What is wrong with an installed package, or nothing."""
    version = installed(requirement.name)
    if version is None:
        return f"{requirement.name} is not installed; litgpt needs {requirement}"
    if not requirement.specifier.contains(version, prereleases=True):
        return f"{requirement.name} is {version}; litgpt needs {requirement.specifier}"
    return ""


def cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    match = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return match[1] if match else platform.processor() or platform.machine()


def cpu_count() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def free_memory() -> Optional[tuple[int, int]]:
    """Free and all memory that this process may use, in bytes: the machine's, or what its container leaves."""
    try:
        text = Path("/proc/meminfo").read_text(encoding="utf-8")
    except OSError:
        return None
    numbers = {name: int(n) * 1024 for name, n in re.findall(r"^(\w+):\s+(\d+)", text, re.MULTILINE)}
    free, total = numbers["MemAvailable"], numbers["MemTotal"]
    groups = (  # of both generations
        ("", "memory.max", "memory.current"),
        ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    )
    for folder, most, used in groups:
        try:
            limit, now = (int((Path("/sys/fs/cgroup") / folder / name).read_text()) for name in (most, used))
        except (OSError, ValueError):  # no such file, or "max"
            continue
        if limit < total:
            total, free = limit, min(free, max(0, limit - now))
    return free, total


def free_disk(folder: Path) -> str:
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        return f"{shutil.disk_usage(folder).free / GB:,.1f} GB free"
    except OSError as e:
        return f"unknown ({e.strerror})"


def environment() -> list[str]:
    """The variables that matter: values of switches and numbers, of others only that they are set."""
    said = []
    for name in SHOWN:
        if name in os.environ:
            value = os.environ[name]
            said.append(f"{name}={value}" if PLAIN.fullmatch(value) else f"{name} is set")
    return said + [f"{name} is set" for name in NAMED if os.environ.get(name)]


def hub_token() -> bool:
    """Whether there is a token of the hub: in HF_TOKEN, or kept by `hf auth login`."""
    try:
        from huggingface_hub import get_token

        return get_token() is not None
    except Exception:  # a broken installation is reported elsewhere
        return bool(os.environ.get("HF_TOKEN"))


def without_home(text: str) -> str:
    """`text` with ~ for the home folder."""
    own = str(home() or "")
    return re.sub(rf"{re.escape(own)}(?![\w.-])", "~", text) if len(own) > 1 else text


def folded(name: str, parts: list[str], between: str = ", ") -> Lines:
    """One entry in lines of about a hundred characters."""
    line = ""
    for part in parts:
        if line and len(line) + len(part) > 100:
            yield name, line + between.rstrip()
            name, line = "", ""
        line += (between if line else "") + part
    if line:
        yield name, line
