"""`litgpt serve`"""

import ipaddress
import os
from pathlib import Path
from typing import Literal, Optional

from litgpt.errors import UserError, require
from litgpt.generate.sampling import Sampling
from litgpt.methods.quantize import QuantizeName
from litgpt.model.devices import Accelerator, PrecisionName

TAKEN = ("/health", "/metrics", "/style.css", "/script.js", "/openapi.json", "/v1")


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
    """Answer over HTTP, as OpenAI's interface does, and on a page to chat.

    Requests that come at the same time are decoded in one batch. SIGTERM lets the answers under way finish.

    Args:
        checkpoint_dir: A base folder or an adapter folder, or the name of one under checkpoints/.
        adapters: LoRA adapters over this base, as NAME=DIR NAME=DIR; a request chooses one by `model`.
        host: The address to listen at. Another one than this machine's own wants --api_key.
        port: Where to listen; 0 for one that is free.
        api_key: What clients have to send; by default the value of LITGPT_API_KEY, which, unlike a flag, other users of
            the machine do not see.
        allow_anonymous: Let anyone in, also from other machines.
        quantize: Keep the weights of the blocks in 4 or 8 bits, by bitsandbytes.
        precision: By default 32-true for weights that are stored so, else bf16-true where the device computes it
            natively, else 32-true.
        accelerator: The kind of device.
        base: The base model of an adapter, instead of the recorded one.
        temperature: Of requests that do not say; 0 always takes the most likely token.
        top_k: Of requests that do not say: draw from so many of the most likely tokens; null for all.
        top_p: Of requests that do not say: draw from the most likely tokens whose probabilities sum up to this.
        max_new_tokens: The length of an answer, at most, where the request does not say. By default what the context
            leaves, as clients of OpenAI expect; 50 for --api_path, as in LitGPT.
        stream: Let --api_path answer in lines of JSON as the tokens come; requests to /v1 say it themselves.
        openai_spec: Leave out --api_path; /v1 is always there.
        api_path: Where LitGPT's own form, {"prompt": ...} to {"output": ...}, is answered.
        timeout: Seconds that a request may take, its wait included. More than LitGPT's 30, which on a CPU a long answer
            needs.
        max_batch: So many texts are decoded at once.
        max_queue: So many may wait; more are refused with 429.
        max_body: Bytes of a request, at most; more are refused with 413.
        devices: Only 1 is possible.
        access_token: For private and gated models that are downloaded; by default that of HF_TOKEN.
        generate_strategy: Not supported, as the model is on one device.
    """
    check(port, temperature, top_k, top_p, max_new_tokens, api_path, timeout, max_batch, max_queue, max_body)
    if devices != 1 or generate_strategy is not None:
        flag = f"--generate_strategy {generate_strategy}" if generate_strategy else f"--devices {devices}"
        raise UserError(f"{flag}: a model is served from one device. Start several servers, or choose --quantize.")
    if access_token is not None:
        os.environ["HF_TOKEN"] = access_token
    key = api_key if api_key is not None else os.environ.get("LITGPT_API_KEY")
    local = is_loopback(host)
    if key is not None and not (key.strip() and key.isascii() and key == key.strip()):
        raise UserError("--api_key (or LITGPT_API_KEY) is empty, or has blanks around it or characters beyond ASCII.")
    if key is None and not local and not allow_anonymous:
        raise UserError(
            f"--host {host} lets other machines in: set --api_key (or LITGPT_API_KEY), or --allow_anonymous true if "
            "anyone may use this server."
        )
    require("fastapi", "serve")
    require("uvicorn", "serve")
    from litgpt.serve.app import Settings, make_app
    from litgpt.serve.models import ModelRegistry
    from litgpt.serve.server import bind, serve

    listening = bind(host, port)
    options = {"base": base, "precision": precision, "quantize": quantize, "accelerator": accelerator}
    offer = ModelRegistry.open(checkpoint_dir, adapters or {}, **options)
    settings = Settings(
        temperature,
        top_k,
        top_p,
        max_new_tokens,
        None if openai_spec else api_path.rstrip("/"),
        stream,
        timeout,
        max_batch,
        max_queue,
        max_body,
        key,
        local and not allow_anonymous,
    )
    app = make_app(offer, settings)
    shown = f"[{host}]" if ":" in host else host
    paths = ", ".join(["a page to chat at /", "/v1", *([settings.api_path] if settings.api_path else [])])
    print(f"litgpt: {', '.join(offer.models)} at http://{shown}:{listening.getsockname()[1]} ({paths})", flush=True)
    serve(app, app.state.service, listening)


def check(
    port: int,
    temperature: float,
    top_k: Optional[int],
    top_p: float,
    max_new_tokens: Optional[int],
    api_path: str,
    timeout: float,
    max_batch: int,
    max_queue: int,
    max_body: int,
) -> None:
    """Raise `UserError` for numbers that cannot be; all that is wrong at once."""
    wrong = []
    if not 0 <= port <= 65535:
        wrong.append(f"--port {port} is not between 0 and 65535")
    above = {"max_new_tokens": max_new_tokens, "timeout": timeout, "max_batch": max_batch, "max_body": max_body}
    wrong += [f"--{name} {value} must be above 0" for name, value in above.items() if value is not None and value <= 0]
    if max_queue < 0:
        wrong.append(f"--max_queue {max_queue} is below 0")
    if (reason := wrong_path(api_path)) is not None:
        wrong.append(f"--api_path {api_path!r} {reason}")
    try:
        Sampling(temperature, top_k, top_p)
    except UserError as e:
        wrong.append(str(e).rstrip("."))
    if wrong:
        raise UserError("; ".join(wrong) + ".")


def wrong_path(path: str) -> Optional[str]:
    """Why requests to a path would not reach it; None if they do."""
    if not path.startswith("/") or path == "/":
        return "must begin with / and name a path, for example /predict"
    parts = path[1:].removesuffix("/").split("/")
    if not path.isprintable() or set(path) & set(" {}?#%\\") or {"", ".", ".."} & set(parts):
        return "has an empty part, a part . or .., or a character that a path in a URL cannot have"
    return "is in use; choose another" if path.rstrip("/") in TAKEN or parts[0] == "v1" else None


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
