"""`litgpt generate`"""

import sys
import time
from pathlib import Path
from typing import Optional

from litgpt.args import PrecisionName, QuantizeName
from litgpt.errors import UserError
from litgpt.generate.engine import Engine, Text, follow
from litgpt.generate.loaded import Loaded
from litgpt.generate.sampling import Sampling
from litgpt.generate.text import TextStream
from litgpt.train.launch import Accelerator, peak_memory
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
    loaded = Loaded.open(checkpoint_dir, base, precision, quantize, accelerator)
    text, ids = loaded.render([{"role": "user", "content": prompt}])
    engine = Engine(loaded.model, rows=min(num_samples, 16))
    began = time.perf_counter()
    answers = [Text(ids, max_new_tokens, sampling, loaded.stop_ids, seed + i) for i in range(num_samples)]
    for answer in answers:
        engine.submit(answer)
    for answer in answers:
        sys.stdout.write(text)
        stream = TextStream(loaded.tokenizer, ids)
        for token in follow(engine, answer):
            sys.stdout.write(stream.push([token]))
            sys.stdout.flush()
        sys.stdout.write(stream.close() + "\n")
    n_new = sum(len(answer.ids) for answer in answers)
    seconds = time.perf_counter() - began
    speed, memory = n_new / seconds, gigabytes(peak_memory(loaded.device))
    print(f"{n_new} tokens in {seconds:.2f} s, {speed:.1f} tokens/s, peak memory {memory}", file=sys.stderr)
