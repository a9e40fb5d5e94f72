"""A GGUF file in llama.cpp, through the package `xllamacpp`. It runs in a process of its own, because llama.cpp ends
its process when something is wrong with a file."""

import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Optional

import torch

from litgpt.errors import UserError

SERVER = """
import sys
import xllamacpp

path, n_context, exact, lora = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "True", sys.argv[4]
params = xllamacpp.CommonParams()
params.model.path = path
params.n_ctx, params.n_parallel = n_context, 1
params.warmup = params.fit_params = False
params.n_gpu_layers, params.verbosity = 0, -1
if exact:
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
if lora:
    params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(lora, 1.0)]
server = xllamacpp.Server(params)
print(server.listening_address, flush=True)
sys.stdin.read()  # until the other process closes the pipe, or ends
"""


class LlamaCpp:
    """A server with one model at an address of this machine."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open
        self.letter = self.encode("a", special=False)[-1]

    def ask(self, path: str, **request: Any) -> Any:
        data = json.dumps(request).encode()
        headers = {"Content-Type": "application/json"}
        with self.open(urllib.request.Request(self.address + path, data, headers)) as answer:
            return json.load(answer)

    def encode(self, text: str, special: bool = True) -> list[int]:
        return self.ask("/tokenize", content=text, add_special=special, parse_special=True)["tokens"]

    def render(self, prompt: str) -> str:
        return self.ask("/apply-template", messages=[{"role": "user", "content": prompt}])["prompt"]

    def log_probabilities(self, ids: Sequence[int], n_vocabulary: int) -> torch.Tensor:
        """Of the next token, (V,). The answer itself is always a letter, because llama.cpp leaves the probabilities out
        if it is a stop token or a part of a character. They do not depend on the bias."""
        request = {"prompt": list(ids), "n_predict": 1, "n_probs": n_vocabulary, "temperature": 0.0}
        answer = self.ask("/completion", **request, cache_prompt=False, logit_bias=[[self.letter, 1e4]])
        found = torch.full((n_vocabulary,), -torch.inf)
        for token in answer["completion_probabilities"][0]["top_logprobs"]:
            found[token["id"]] = token["logprob"]
        return found


def is_installed() -> bool:
    return find_spec("xllamacpp") is not None


@contextmanager
def llama_cpp(path: Path, n_context: int, exact: bool = True, lora: Optional[Path] = None) -> Iterator[LlamaCpp]:
    """Open a GGUF file in llama.cpp. Raises `UserError` if it cannot be opened.

    Args:
        n_context: How many tokens it reads at most.
        exact: Keep keys and values in float32, and compute attention without the fused kernel.
        lora: The file of an adapter to apply.
    """
    command = [sys.executable, "-c", SERVER, str(path), str(n_context), str(exact), str(lora or "")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, text=True, **pipes) as process:  # type: ignore[call-overload]
        try:
            lines = iter(process.stdout.readline, "")
            address = next((line.strip() for line in lines if line.startswith("http")), None)
            if address is None:
                raise UserError(f"llama.cpp cannot open {path}{f' with {lora}' if lora else ''}.")
            yield LlamaCpp(address)
        finally:
            process.kill()
