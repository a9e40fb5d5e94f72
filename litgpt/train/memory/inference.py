"""The memory of a model that generates: weights, the cache of keys and values, and what a forward pass takes."""

from contextlib import nullcontext
from pathlib import Path
from typing import Optional

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from litgpt.checkpoint.folder import load_weights
from litgpt.errors import UserError
from litgpt.generate.engine import CHUNK
from litgpt.methods.quantize import quantize
from litgpt.model.devices import DTYPES, default_precision, pick_device
from litgpt.model.gpt import GPT
from litgpt.model.kv_cache import KVCache
from litgpt.train.args import PlanArgs
from litgpt.train.base_model import BaseModel
from litgpt.train.devices.launch import CONTEXT
from litgpt.train.memory.meter import CPU_BLOCK, CUDA_BLOCK, Meter
from litgpt.train.memory.plan import GIB, USABLE, counted, target_of
from litgpt.train.memory.predict import shortened
from litgpt.train.memory.stand_ins import gpu_kernels


def plan_inference(path: Path, precision: Optional[str], scheme: Optional[str], args: PlanArgs) -> None:
    """Print what a model needs to generate, and how many sequences fit at the same time. `args.tokens` is their length,
    by default the model's context."""
    base = BaseModel.from_folder(path)
    base = shortened(base, base.config.n_layer)  # with weights without contents
    device = pick_device("auto")
    target = target_of(args.gpu, device)
    length = min(args.tokens or base.config.block_size, base.config.block_size)
    if length < 1:
        raise UserError(f"--tokens {length} must be above 0.")
    precision = precision or ("bf16-true" if target.is_gpu else default_precision(device))
    with torch.device("meta"):
        model = GPT(base.config)
    n_parameters = sum(p.numel() for p in model.parameters())
    if scheme is not None:
        quantize(model, scheme, torch.device("cpu"))
    meter = Meter(CUDA_BLOCK if target.is_gpu else CPU_BLOCK)
    kernels = gpu_kernels() if target.is_gpu else nullcontext()
    with FakeTensorMode(allow_non_fake_inputs=True), kernels, meter, torch.no_grad():
        assert base.checkpoint is not None
        load_weights(model, base.checkpoint, DTYPES[precision], torch.device("cpu"))
        weights = meter.total
        meter.start()
        cache, ids = KVCache(base.config), torch.zeros(1, min(CHUNK, length), dtype=torch.int64)
        model.eval().lm_head(model.hidden(ids, cache=cache)[0, -1:])
        states = sum(t.nbytes for layer in cache.recurrent.values() for t in layer)
        stored = [(*layer, window) for layer, window in zip(cache.layers, cache.windows) if layer is not None]
        temporary = meter.peak - weights - states - sum(t.nbytes for k, v, _ in stored for t in (k, v))
        sequence = states
        for k, v, window in stored:
            slots = length if window is None else min(length, window)
            sequence += slots * sum(t[0, :, 0].numel() * t.element_size() for t in (k, v))
    room = (target.memory - CONTEXT) * USABLE if target.is_gpu else target.memory
    fitting = max(0, int((room - weights - temporary) // sequence))
    about = f"{counted(n_parameters)} parameters, {precision}"
    print(f"{base.config.model_type}, {about}; {target.name} ({target.memory / GIB:.1f} GiB)\n")
    print(f"weights    {weights / GIB:8.2f} GiB")
    print(f"temporary  {temporary / GIB:8.2f} GiB, for {ids.size(1)} tokens of a prompt at once")
    print(f"cache      {sequence / GIB:8.2f} GiB for a sequence of {length:,} tokens")
    print(f"\n{fitting:,} sequences of {length:,} tokens fit at the same time.")
