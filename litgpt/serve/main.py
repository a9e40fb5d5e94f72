"""`litgpt serve`"""

import ipaddress
import os
from pathlib import Path
from typing import Literal, Optional

from litgpt.errors import UserError, require
from litgpt.methods.quantize import QuantizeName
from litgpt.model.devices import Accelerator, PrecisionName
from litgpt.serve.settings import Settings


def main(
    checkpoint_dir: Path,
    adapters: Optional[dict[str, Path]] = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: Optional[str] = None,
    allow_anonymous: bool = False,
    quantize: Optional[QuantizeName] = None,
    precision: Optional[PrecisionName] = None,
    accelerator: Accelerator = "auto",
    base: Optional[Path] = None,
    temperature: float = 0.8,
    top_k: Optional[int] = 50,
    top_p: float = 1.0,
    max_new_tokens: Optional[int] = None,
    stream: bool = False,
    openai_spec: bool = False,
    api_path: str = "/predict",
    timeout: float = 600.0,
    max_batch: int = 16,
    max_queue: int = 64,
    max_body: int = 4_194_304,
    devices: int = 1,
    access_token: Optional[str] = None,
    generate_strategy: Optional[Literal["sequential", "tensor_parallel"]] = None,
) -> None:
    """Serve a model over HTTP with OpenAI's API, and a chat page.

    Requests that arrive at the same time are decoded in one batch. SIGTERM lets running answers finish.

    Args:
        checkpoint_dir: A base or adapter folder, or its name under checkpoints/.
        adapters: LoRA adapters on this base, as NAME=DIR NAME=DIR. A request selects one with `model`.
        host: Address to listen on. Other addresses than this machine's own require --api_key.
        port: Port to listen on; 0 for a free one.
        api_key: Key that clients have to send. By default the value of LITGPT_API_KEY, which, unlike a flag, other
            users of the machine cannot see.
        allow_anonymous: Allow requests without a key, also from other machines.
        quantize: Store the weights of the blocks in 4 or 8 bits with bitsandbytes.
        precision: By default 32-true for weights that are stored so, else bf16-true if the device supports it, else
            32-true.
        accelerator: The kind of device.
        base: Base model of an adapter, instead of the recorded one.
        temperature: Default temperature for requests that set none; 0 is greedy.
        top_k: Default top-k for requests that set none; null for all tokens.
        top_p: Default top-p for requests that set none.
        max_new_tokens: Default limit of the answer for requests that set none. By default the rest of the context, as
            in OpenAI's API, and 50 for --api_path, as in LitGPT.
        stream: Answer requests to --api_path as lines of JSON while the tokens are generated.
        openai_spec: Disable --api_path. /v1 is always available.
        api_path: Path of LitGPT's own API, from {"prompt": ...} to {"output": ...}.
        timeout: Time limit of a request in seconds, including its time in the queue. LitGPT's 30 are too short for
            long answers on a CPU.
        max_batch: Number of answers that are generated at once.
        max_queue: Number of answers that may wait. More are refused with 429.
        max_body: Size limit of a request in bytes. Larger ones are refused with 413.
        devices: Only 1 is supported.
        access_token: Token for private and gated models; by default that of HF_TOKEN.
        generate_strategy: Not supported.
    """
    if devices != 1 or generate_strategy is not None:
        flag = f"--generate_strategy {generate_strategy}" if generate_strategy else f"--devices {devices}"
        raise UserError(f"{flag}: a model is served from one device. Start several servers, or use --quantize.")
    local = is_loopback(host)
    settings = Settings(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        max_new_tokens=max_new_tokens,
        api_path=None if openai_spec else api_path,
        stream=stream,
        timeout=timeout,
        max_batch=max_batch,
        max_queue=max_queue,
        max_body=max_body,
        api_key=api_key if api_key is not None else os.environ.get("LITGPT_API_KEY"),
        local_only=local and not allow_anonymous,
    )
    if settings.api_key is None and not local and not allow_anonymous:
        raise UserError(
            f"--host {host} accepts requests from other machines. Set --api_key (or LITGPT_API_KEY), or pass "
            "--allow_anonymous true to let anyone use this server."
        )
    if access_token is not None:
        os.environ["HF_TOKEN"] = access_token
    require("fastapi", "serve")
    require("uvicorn", "serve")
    from litgpt.serve.app import App
    from litgpt.serve.models import ModelRegistry
    from litgpt.serve.server import bind, serve

    listening = bind(host, port)
    options = {"base": base, "precision": precision, "quantize": quantize, "accelerator": accelerator}
    registry = ModelRegistry.open(checkpoint_dir, adapters or {}, **options)
    app = App(registry, settings)
    url = f"http://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}"
    paths = ", ".join(["chat page at /", "/v1", *([settings.api_path] if settings.api_path else [])])
    print(f"litgpt: {', '.join(registry.models)} at {url} ({paths})", flush=True)
    serve(app, listening)


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
