"""`litgpt generate`"""

import sys
import time
from pathlib import Path
from typing import Optional

import torch

from litgpt.args import PrecisionName, QuantizeName
from litgpt.errors import UserError
from litgpt.generate.engine import generate
from litgpt.generate.parity import stored_dtypes
from litgpt.generate.sampling import Sampling
from litgpt.loading import Source
from litgpt.train.launch import DTYPES, Accelerator, default_precision, peak_memory, pick_device
from litgpt.train.progress import gigabytes


def main(
    checkpoint_dir: Path,
    prompt: str = "What food do llamas eat?",
    num_samples: int = 1,
    max_new_tokens: int = 50,
    top_k: Optional[int] = 50,
    top_p: float = 1.0,
    temperature: float = 0.8,
    precision: Optional[PrecisionName] = None,
    quantize: Optional[QuantizeName] = None,
    accelerator: Accelerator = "auto",
    base: Optional[Path] = None,
    seed: int = 1234,
) -> None:
    """Continue a prompt. The prompt, as the model reads it, and what follows go to stdout, figures to stderr.

    The prompt is rendered with the style that was saved at training, else with the checkpoint's chat template, else
    left as it is.

    Args:
        checkpoint_dir: A base folder or an adapter folder, or the name of one under checkpoints/.
        prompt: What to continue or to answer.
        num_samples: How many answers.
        max_new_tokens: The length of an answer, at most.
        top_k: Draw from so many of the most likely tokens; null for all.
        top_p: Draw from the most likely tokens whose probabilities sum up to this.
        temperature: Below 1 the likely tokens become likelier; 0 always takes the most likely one.
        precision: By default 32-true for weights that are stored so, else bf16-true where the device computes it
            natively, else 32-true.
        quantize: Keep the weights of the blocks in 4 or 8 bits, by bitsandbytes.
        accelerator: The kind of device.
        base: The base model of an adapter, instead of the recorded one.
        seed: The same seed draws the same answers.
    """
    if num_samples < 1 or max_new_tokens < 1:
        raise UserError("--num_samples and --max_new_tokens must be above 0.")
    sampling = Sampling(temperature, top_k, top_p)
    source = Source.open(checkpoint_dir, base)
    tokenizer, style = source.tokenizer(), source.style()
    text = style.prompt([{"role": "user", "content": prompt}])
    ids = tokenizer.encode(text, special=not style.own_special_tokens)
    device = pick_device(accelerator)
    natural = "32-true" if stored_dtypes(source.checkpoint) == ["F32"] else default_precision(device)
    model = source.model(DTYPES[precision or natural], device, quantize)

    generator = torch.Generator(device).manual_seed(seed)
    began, n_new = time.perf_counter(), 0
    for _ in range(num_samples):
        new = []
        tokens = generate(model, ids, max_new_tokens, sampling, tokenizer.stops(style), generator)
        sys.stdout.write(text)
        for piece in tokenizer.decode_stream(ids, (new.append(t) or t for t in tokens)):  # type: ignore[func-returns-value]
            sys.stdout.write(piece)
            sys.stdout.flush()
        n_new += len(new)
        sys.stdout.write("\n")
    seconds = time.perf_counter() - began
    speed, memory = n_new / seconds, gigabytes(peak_memory(device))
    print(f"{n_new} tokens in {seconds:.2f} s, {speed:.1f} tokens/s, peak memory {memory}", file=sys.stderr)
