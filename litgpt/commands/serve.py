"""`litgpt serve`"""

import json
import os
import shlex
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Literal, Optional

from litgpt.cli.groups import option_group
from litgpt.errors import UserError, require
from litgpt.generate.inference_model import ModelOptions
from litgpt.generate.sampling import Sampling
from litgpt.serve.settings import Settings


@option_group("model", ModelOptions, skip=("compile",))
@option_group("settings", Settings)
@option_group("sampling", Sampling, skip=("min_p", "repetition_penalty"))
def main(
    checkpoint_dir: Path,
    model: ModelOptions,
    settings: Settings,
    sampling: Sampling,
    adapters: Optional[dict[str, Path]] = None,
    name: Optional[str] = None,
    port: int = 8000,
    access_token: Optional[str] = None,
    generate_strategy: Optional[Literal["sequential", "tensor_parallel"]] = None,
) -> None:
    """Serve a model over HTTP with OpenAI's API, and a chat page. A LoRA adapter is served beside its base.

    Requests that arrive at the same time are decoded in one batch. A request may set other sampling options than those
    given here. SIGTERM lets running answers finish.

    Args:
        checkpoint_dir: A base or adapter folder, or its name under checkpoints/.
        adapters: More LoRA adapters on the same base, as NAME=DIR NAME=DIR. A request selects one with `model`.
        name: Name of the model for requests. By default that of its folder: out/support/final is support.
        port: Port to listen on; 0 for a free one.
        devices: Only 1 is supported.
        access_token: Token for private and gated models; by default that of HF_TOKEN.
        generate_strategy: Not supported.
    """
    if model.devices != 1 or generate_strategy is not None:
        flag = f"--generate_strategy {generate_strategy}" if generate_strategy else f"--devices {model.devices}"
        raise UserError(f"{flag}: a model is served from one device. Start several servers, or use --quantize.")
    if access_token is not None:
        os.environ["HF_TOKEN"] = access_token
    require("fastapi", "serve")
    require("uvicorn", "serve")
    from litgpt.serve.app import App
    from litgpt.serve.models import ModelRegistry
    from litgpt.serve.server import bind, serve

    host = settings.host
    listening = bind(host, port)
    options = {
        name: getattr(model, name) for name in ("base", "precision", "quantize", "accelerator", "template_kwargs")
    }
    registry = ModelRegistry.open(checkpoint_dir, adapters or {}, name, **options)
    app = App(registry, replace(settings, sampling=sampling))
    print(introduction(host, listening.getsockname()[1], settings, registry.models), flush=True)
    serve(app, listening)


def introduction(host: str, port: int, settings: Settings, models: Collection[str]) -> str:
    """Where the server is, the names of its models, and a request to try."""
    local = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    url = f"http://{f'[{local}]' if ':' in local else local}:{port}"
    lines = [f"chat    {url}", f"API     {url}/v1", f"models  {', '.join(models)}"]
    if settings.api_path:
        lines.insert(2, f"LitGPT  {url}{settings.api_path}")
    if local != host:
        lines.append(f"host    {host}; other machines use the address of this one")
    name = json.dumps(next(iter(models)), ensure_ascii=False)
    body = f'{{"model": {name}, "max_tokens": 100,\n      "messages": [{{"role": "user", "content": "Hello!"}}]}}'
    curl = [f"curl {url}/v1/chat/completions", "-H 'Content-Type: application/json'"]
    if settings.api_key is not None:
        curl.append('-H "Authorization: Bearer $LITGPT_API_KEY"')
    curl.append(f"-d {shlex.quote(body)}")
    return "\n  ".join(["litgpt: the server is ready", *lines, "try"]) + "\n    " + " \\\n      ".join(curl)
