"""`litgpt generate_speculatively`"""

import sys
import time
from pathlib import Path
from typing import Optional, Union

from litgpt.commands.generate import LLAMAS, check_numbers, from_stdin
from litgpt.generate.answers import stop_strings
from litgpt.generate.inference_model import InferenceModel
from litgpt.generate.sampling import Sampling
from litgpt.generate.speculative import Speculation, check_pair
from litgpt.generate.text import TextStream
from litgpt.methods.quantize import QuantizeName
from litgpt.model.devices import Accelerator, PrecisionName, peak_memory
from litgpt.train.progress import gigabytes


def main(
    draft_model_checkpoint_dir: Path,
    target_model_checkpoint_dir: Path,
    prompt: str = LLAMAS,
    input: str = "",
    sys_prompt: Optional[str] = None,
    num_samples: int = 1,
    max_new_tokens: int = 50,
    speculative_k: int = 3,
    top_k: Optional[int] = 50,
    top_p: float = 1.0,
    temperature: float = 0.8,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    stop: Optional[Union[str, list[str]]] = None,
    precision: Optional[PrecisionName] = None,
    quantize: Optional[QuantizeName] = None,
    compile: bool = False,
    accelerator: Accelerator = "auto",
    seed: int = 1234,
) -> None:
    """Continue a prompt with a large model, and a small one of the same tokenizer that drafts for it.

    The text is the large model's: with temperature 0 the same, else drawn from the same distribution. The prompt, as
    the model reads it, and what follows go to stdout, figures to stderr.

    Args:
        draft_model_checkpoint_dir: The small model: a base folder or an adapter folder, or the name of one.
        target_model_checkpoint_dir: The large model; its prompt style and tokenizer are used.
        prompt: What to continue or to answer; - reads it from stdin, and so does a pipe where no prompt is given.
        input: What an instruction is about, as the input of Alpaca's rows; - reads it from stdin.
        sys_prompt: A system message before the prompt.
        num_samples: How many answers.
        max_new_tokens: The length of an answer, at most.
        speculative_k: How many tokens are drafted at a time.
        top_k: Draw from so many of the most likely tokens; null for all.
        top_p: Draw from the most likely tokens whose probabilities sum up to this.
        temperature: Below 1 the likely tokens become likelier; 0 always takes the most likely one.
        min_p: Draw from tokens that are at least this likely, as a share of the most likely one.
        repetition_penalty: Above 1 tokens that the text has already become less likely.
        stop: A text that ends the answer, or a JSON list of several; it is left out.
        precision: By default 32-true for weights that are stored so, else bf16-true where the device computes it
            natively, else 32-true.
        quantize: Keep the weights of the blocks in 4 or 8 bits, of both models.
        compile: Compile the blocks of both models: a slower start, and then faster steps.
        accelerator: The kind of device.
        seed: The same seed draws the same answers.
    """
    check_numbers(num_samples=num_samples, max_new_tokens=max_new_tokens, speculative_k=speculative_k)
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    words, (prompt, input) = stop_strings(stop), from_stdin(prompt, input)
    draft = InferenceModel.open(draft_model_checkpoint_dir, None, precision, quantize, accelerator)
    target = InferenceModel.open(target_model_checkpoint_dir, None, precision, quantize, accelerator)
    check_pair(target.tokenizer, draft.tokenizer)
    draft.prepare(compile)
    target.prepare(compile)  # the last, since it says how many threads there are
    messages = [{"role": "system", "content": sys_prompt}] if sys_prompt else []
    text, ids = target.render([*messages, {"role": "user", "content": prompt, "input": input}])
    speculation = Speculation(target.model, draft.model, speculative_k)
    began, n_new = time.perf_counter(), 0
    for i in range(num_samples):
        stream = TextStream(target.tokenizer, ids, words)
        tokens = speculation.generate(ids, max_new_tokens, sampling, target.stop_ids, seed + i)
        sys.stdout.write(text)
        for token in tokens:
            n_new += 1
            sys.stdout.write(stream.push([token]))
            sys.stdout.flush()
            if stream.stopped:
                break
        sys.stdout.write(stream.close() + "\n")
    seconds = time.perf_counter() - began
    memory = gigabytes(peak_memory(target.device))
    share = speculation.n_accepted / max(speculation.n_drafted, 1)
    print(
        f"{n_new} tokens in {seconds:.2f} s, {n_new / seconds:.1f} tokens/s, {share:.0%} of {speculation.n_drafted} "
        f"drafted tokens kept, peak memory {memory}",
        file=sys.stderr,
    )
