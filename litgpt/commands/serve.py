"""`litgpt serve`"""

import os
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
    port: int = 8000,
    access_token: Optional[str] = None,
    generate_strategy: Optional[Literal["sequential", "tensor_parallel"]] = None,
) -> None:
    """Serve a model over HTTP with OpenAI's API, and a chat page.

    Requests that arrive at the same time are decoded in one batch. A request may set other sampling options than those
    given here. SIGTERM lets running answers finish.

    Args:
        checkpoint_dir: A base or adapter folder, or its name under checkpoints/.
        adapters: LoRA adapters on this base, as NAME=DIR NAME=DIR. A request selects one with `model`.
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
    registry = ModelRegistry.open(checkpoint_dir, adapters or {}, **options)
    app = App(registry, replace(settings, sampling=sampling))
    url = f"http://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}"
    paths = ", ".join(["chat page at /", "/v1", *([settings.api_path] if settings.api_path else [])])
    print(f"litgpt: {', '.join(registry.models)} at {url} ({paths})", flush=True)
    serve(app, listening)
