"""`from litgpt import LLM`: a model with its tokenizer and prompts, in Python."""

import os
import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from numbers import Integral
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Literal, Optional, Union, get_args

import torch
from torch import nn

from litgpt.checkpoint.find import find_folder
from litgpt.checkpoint.writing import write_model
from litgpt.errors import UserError, kind, nearest
from litgpt.families.weights import Weights
from litgpt.generate.answers import decode, stop_strings
from litgpt.generate.engine import Engine, Request
from litgpt.generate.inference_model import InferenceModel
from litgpt.generate.sampling import Sampling
from litgpt.generate.sequentially import open_spread, spread, usable_devices
from litgpt.methods.model_source import ModelSource
from litgpt.methods.quantize import QuantizeName
from litgpt.model import GPT
from litgpt.model.config import Config
from litgpt.model.devices import DTYPES, Accelerator, PrecisionName, pick_device
from litgpt.model.linear import prepack, undo_prepack
from litgpt.storage.outputs import new_folder
from litgpt.text.prompts import PromptStyle, load_style, save_style
from litgpt.text.tokenizer import Tokenizer, copy_files, save_stop
from litgpt.train.base_model import BaseModel, model_fields


class LLM(nn.Module):
    """A model that answers, and that can be trained by a loop of your own. Made by `LLM.load`.

    Attributes:
        model: The `GPT`.
        tokenizer: Its `Tokenizer`.
        prompt_style: How a prompt becomes text; may be replaced, for example by `PromptStyle.from_name("alpaca")`.
        checkpoint_dir: Where the weights came from; None if they were drawn.
    """

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer,
        style: PromptStyle,
        fields: dict[str, Any],
        source: Optional[ModelSource],
    ) -> None:
        super().__init__()
        self.model, self.tokenizer, self.prompt_style = model, tokenizer, style
        self.fields, self.source = fields, source
        self.changed = source is None  # whether the weights may be others than those of the folder
        self.max_length: Optional[int] = None
        self.scheme: Optional[str] = None
        self.eval()

    @classmethod
    def load(
        cls,
        model: Union[str, Path],
        init: Literal["pretrained", "random"] = "pretrained",
        tokenizer_dir: Optional[Union[str, Path]] = None,
        access_token: Optional[str] = None,
        distribute: Optional[Literal["auto"]] = "auto",
        *,
        base: Optional[Union[str, Path]] = None,
        precision: Optional[PrecisionName] = None,
        quantize: Optional[QuantizeName] = None,
        accelerator: Accelerator = "auto",
    ) -> "LLM":
        """Load a model, or draw the weights of one.

        Args:
            model: A base folder or an adapter folder, or the name of one under checkpoints/.
            init: `random` draws the weights: of the model that the folder's config.json describes.
            tokenizer_dir: The folder of the tokenizer, where the weights are drawn; by default that of the model.
            access_token: Of the Hugging Face hub, for a model that is downloaded; by default what HF_TOKEN holds.
            distribute: `auto` for the best device there is; None for the CPU, until `distribute` is called.
            base: The base model of an adapter, instead of the recorded one.
            precision: By default 32-true for weights that are stored so, else bf16-true where the device computes it
                natively, else 32-true; 32-true for drawn weights.
            quantize: Keep the weights of the blocks in 4 or 8 bits.
            accelerator: The kind of device.

        Raises:
            UserError: the folder cannot be used.
        """
        if access_token is not None:
            os.environ["HF_TOKEN"] = access_token
        check_choices(init=(init, Literal["pretrained", "random"]), distribute=(distribute, Literal["auto"]))
        check_choices(
            precision=(precision, PrecisionName),
            quantize=(quantize, QuantizeName),
            accelerator=(accelerator, Accelerator),
        )
        accelerator = (accelerator or "auto") if distribute else "cpu"
        if init == "pretrained":
            if tokenizer_dir is not None:
                raise UserError("tokenizer_dir is for drawn weights (init='random'); a folder has its own tokenizer.")
            loaded = InferenceModel.open(Path(model), Path(base) if base else None, precision, quantize, accelerator)
            made = cls(loaded.model, loaded.tokenizer, loaded.style, loaded.source.checkpoint.fields, loaded.source)
            made.scheme = quantize
            return made
        if quantize is not None or base is not None:
            raise UserError("Drawn weights (init='random') have no base and are not quantized.")
        folder = find_folder(Path(tokenizer_dir or model))
        start = BaseModel.random(model_fields(Path(model), None), folder)
        with torch.device("meta"):
            empty = GPT(start.config)
        start.fill(empty, DTYPES[precision or "32-true"], pick_device(accelerator))
        return cls(empty.requires_grad_(False).eval(), start.tokenizer(), load_style(folder), start.fields, None)

    @property
    def config(self) -> Config:
        return self.model.config

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def checkpoint_dir(self) -> Optional[Path]:
        return self.source.folder if self.source is not None else None

    # answering

    def generate(
        self,
        prompt: Union[str, Sequence[str], Sequence[Mapping[str, Any]]],
        sys_prompt: Optional[str] = None,
        max_new_tokens: int = 50,
        temperature: float = 1.0,
        top_k: Optional[int] = None,
        top_p: float = 1.0,
        return_as_token_ids: bool = False,
        stream: bool = False,
        *,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        stop: Optional[Union[str, list[str]]] = None,
        seed: Optional[int] = None,
        batch_size: int = 16,
    ) -> Any:
        """Answer a prompt, or several.

        Args:
            prompt: A text, or a list of messages; or a list of texts, whose answers come as a list, decoded together.
            sys_prompt: A system message before each.
            max_new_tokens: The length of an answer, at most.
            temperature: Below 1 the likely tokens become likelier; 0 always takes the most likely one.
            top_k: Draw from so many of the most likely tokens; None for all.
            top_p: Draw from the most likely tokens whose probabilities sum up to this.
            return_as_token_ids: Token ids (n,), on the CPU, instead of texts.
            stream: An iterator over the pieces of the answer as they come; of one prompt only.
            min_p: Draw from tokens that are at least this likely, as a share of the most likely one.
            repetition_penalty: Above 1 tokens that the text has already become less likely.
            stop: A text that ends the answer, or several.
            seed: The same seed draws the same answers; by default torch's own generator says which.
            batch_size: How many answers are decoded at once.

        Returns:
            The answer without the prompt: a text, ids, a list of either or an iterator over either.
        """
        options = max_new_tokens, Sampling(temperature, top_k, top_p, min_p, repetition_penalty), seed
        words, system = stop_strings(stop), [{"role": "system", "content": sys_prompt}] if sys_prompt else []
        check_numbers(max_new_tokens=max_new_tokens, batch_size=batch_size)
        if not isinstance(prompt, (str, Sequence)):
            raise UserError(f"prompt is {kind(prompt)}: a text, a list of texts or a list of messages is wanted.")
        alone = isinstance(prompt, str) or (len(prompt) > 0 and isinstance(prompt[0], Mapping))
        if stream and not alone:
            raise UserError("stream=True is for one prompt, not for a list.")
        given: list[Any] = [prompt] if alone else list(prompt)
        wanted = [[*system, *to_messages(p)] for p in given]
        answers = self.decode(self.texts(wanted, *options), words, return_as_token_ids, batch_size)
        if stream:
            return (piece for _, piece, _ in answers if len(piece))
        whole: dict[int, list[Any]] = defaultdict(list)
        for number, piece, _ in answers:
            whole[number].append(piece)
        joined = [torch.cat(whole[i]) if return_as_token_ids else "".join(whole[i]) for i in range(len(given))]
        return joined[0] if alone else joined

    def chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> Any:
        """Answer the last message of a conversation, whose messages have `role` and `content`.

        Args:
            options: As in `generate`.
        """
        if isinstance(messages, (str, Mapping)) or not messages or not isinstance(messages[0], Mapping):
            raise UserError('messages is a list of messages, as [{"role": "user", "content": "..."}].')
        return self.generate(messages, **options)

    def texts(
        self, wanted: list[list[dict[str, Any]]], max_new_tokens: int, sampling: Sampling, seed: Optional[int]
    ) -> list[Request]:
        first = int(torch.randint(2**31, ())) if seed is None else seed
        loaded = InferenceModel(self.source, self.model, self.tokenizer, self.prompt_style)  # type: ignore[arg-type]
        texts = []
        for i, messages in enumerate(wanted):
            texts.append(Request(loaded.render(messages)[1], max_new_tokens, sampling, loaded.stop_ids, first + i))
            texts[-1].check(self.model)
            if self.max_length is not None and len(texts[-1].prompt) >= self.max_length:
                n = len(texts[-1].prompt)
                raise UserError(f"The prompt has {n} tokens; with its answer it must fit into {self.max_length}.")
        return texts

    def decode(
        self, texts: list[Request], stop: list[str], as_ids: bool, batch_size: int
    ) -> Iterator[tuple[int, Any, Request]]:
        """The number of each text with its pieces as they come: of the answer's words, or of its ids."""
        if not self.changed:
            prepack(self.model)
        engine = Engine(self.model, max(1, min(len(texts), batch_size)), self.max_length)
        training, shown = self.model.training, dict.fromkeys(texts, 0)
        self.model.eval()
        try:
            for answer, piece in decode(engine, self.tokenizer, texts, stop):
                new = answer.text.ids[shown[answer.text] :]
                shown[answer.text] += len(new)
                yield answer.number, torch.tensor(new, dtype=torch.long) if as_ids else piece, answer.text
        finally:
            self.model.train(training)

    def benchmark(self, num_iterations: int = 1, **options: Any) -> tuple[str, dict[str, list[float]]]:
        """Answer a prompt several times with a clock.

        Args:
            num_iterations: How many times.
            options: As in `generate`, with one prompt.

        Returns:
            The last answer; and for each figure its value at each time: `Seconds total`, `Seconds to first token`,
            `Tokens generated`, `Inference speed in tokens/sec` and, on a GPU, `Total GPU memory allocated in GB`.
        """
        check_numbers(num_iterations=num_iterations)
        found: dict[str, list[float]] = defaultdict(list)
        options = {**options, "stream": True, "return_as_token_ids": True}
        ids: list[int] = []
        for _ in range(num_iterations):
            began, first, ids = time.perf_counter(), None, []
            for piece in self.generate(**options):
                ids += piece.tolist()
                first = first or time.perf_counter() - began
            seconds = time.perf_counter() - began
            found["Seconds total"].append(seconds)
            found["Seconds to first token"].append(first or seconds)
            found["Tokens generated"].append(len(ids))
            found["Inference speed in tokens/sec"].append(len(ids) / seconds)
            if self.device.type == "cuda":
                found["Total GPU memory allocated in GB"].append(torch.cuda.max_memory_allocated() / 1e9)
        return self.tokenizer.decode(ids), dict(found)

    # where it runs

    def distribute(
        self,
        accelerator: Accelerator = "auto",
        devices: Union[int, Literal["auto"]] = "auto",
        precision: Optional[Union[PrecisionName, Literal["auto"]]] = None,
        quantize: Optional[QuantizeName] = None,
        generate_strategy: Optional[Literal["sequential", "tensor_parallel"]] = None,
        fixed_kv_cache_size: Optional[Union[int, Literal["max_model_supported"]]] = None,
    ) -> "LLM":
        """Put the model on devices, in some precision.

        Weights that were not trained here are read from the folder again.

        Args:
            accelerator: The kind of device.
            devices: How many. By default one, and with a strategy all.
            precision: By default as in `load`; that of now for weights that were drawn or trained here.
            quantize: Keep the weights of the blocks in 4 or 8 bits.
            generate_strategy: `sequential` spreads the layers over the devices. `tensor_parallel` wants a process for
                each device: `litgpt generate_tp` starts them.
            fixed_kv_cache_size: The longest text, prompt and answer, in tokens; by default what the model reads. The
                cache grows with the text.

        Returns:
            This model.

        Raises:
            UserError: there are no such devices, or weights of this process are to be quantized.
        """
        if generate_strategy == "tensor_parallel":
            raise UserError("tensor_parallel wants a process for each device: use litgpt generate_tp in a shell.")
        wanted = None if precision == "auto" else precision
        size = None if fixed_kv_cache_size == "max_model_supported" else fixed_kv_cache_size
        check_choices(
            generate_strategy=(generate_strategy, Literal["sequential", "tensor_parallel"]),
            precision=(wanted, PrecisionName),
            quantize=(quantize, QuantizeName),
            accelerator=(accelerator, Accelerator),
        )
        numbers = {"devices": devices, "fixed_kv_cache_size": size}
        check_numbers(**{name: n for name, n in numbers.items() if n not in ("auto", None)})
        if size is not None and size > self.model.config.block_size:
            most = self.model.config.block_size
            raise UserError(f"fixed_kv_cache_size={size} is longer than what this model reads: at most {most} tokens.")
        n = 1 if devices == "auto" and generate_strategy is None else devices
        chosen = usable_devices(accelerator, n)
        if len(chosen) > 1 and generate_strategy is None:
            raise UserError(f"devices={devices} wants a strategy: generate_strategy='sequential' spreads the layers.")
        if not self.changed:
            assert self.source is not None
            adapter = self.source.adapter is not None
            base = self.source.checkpoint.folder if adapter else None
            loaded = open_spread(self.source.folder, base, wanted, quantize, accelerator, n)
            self.model, self.source, self.scheme = loaded.model, loaded.source, quantize
        elif quantize is not None:
            raise UserError("These weights were drawn or trained here: save them, and load the folder with quantize.")
        else:
            self.model.to(chosen[0], DTYPES[wanted] if wanted else self.model.dtype)
            self.model.tie_weights()
            if len(chosen) > 1:
                spread(self.model, chosen)
        self.max_length = size
        return self

    # training it, and saving it

    def trainer_setup(self, trainer_ckpt: Optional[Union[str, Path]] = None) -> None:
        """Make the weights trainable, for a loop of your own.

        Args:
            trainer_ckpt: A checkpoint of PyTorch Lightning, whose `state_dict` has this model's weights.

        Raises:
            UserError: quantized weights are not trained, or the checkpoint has other weights.
        """
        self.train()
        if trainer_ckpt is not None:
            saved = torch.load(trainer_ckpt, map_location="cpu", weights_only=True)
            state = saved.get("state_dict", saved)
            prefix = next((n.partition("model.transformer")[0] for n in state if "model.transformer" in n), None)
            if prefix is None:
                raise UserError(f"{trainer_ckpt} has no weights of such a model.")
            self.load_state_dict({n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)})
        self.model.requires_grad_(True)

    def unpack(self) -> "LLM":
        """Restore the layout of the weights that generation changes on a CPU (`litgpt.model.linear.prepack`).

        Call this before you read tensors of `.model` yourself. The methods of this class do so.
        """
        if undo_prepack(self.model):
            self.model.tie_weights()
        return self

    def train(self, mode: bool = True) -> "LLM":
        if mode:
            if self.scheme is not None:
                raise UserError("Quantized weights are not trained: load the model without quantize.")
            self.unpack().changed = True
        return super().train(mode)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        return super(LLM, self.unpack()).named_parameters(*args, **kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return super(LLM, self.unpack()).state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:  # also where this is a part of a module
        self.unpack().changed = True
        super()._load_from_state_dict(*args, **kwargs)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:  # to another device or dtype
        return super(LLM, self.unpack())._apply(*args, **kwargs)

    def forward(
        self,
        input_ids: torch.Tensor,
        target_ids: Optional[torch.Tensor] = None,
        loss_fn: Optional[Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = None,
    ) -> Any:
        """Logits for the token after each, and the loss against targets.

        Args:
            input_ids: (B, T)
            target_ids: The same tokens (B, T), with -100 where nothing is learned; they are shifted by one here.
            loss_fn: Takes logits (B, T - 1, V) and targets (B, T - 1); by default the mean cross-entropy.

        Returns:
            The logits (B, T, V); with targets also the loss.
        """
        if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
            self.unpack()
        logits = self.model(input_ids)
        if target_ids is None:
            return logits
        if loss_fn is not None:
            return logits, loss_fn(logits[:, :-1], target_ids[:, 1:])
        return logits, nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(), target_ids[:, 1:].flatten(), ignore_index=-100
        )

    def save(self, out_dir: Union[str, Path], prompt_style: Optional[PromptStyle] = None) -> None:
        """Write a Hugging Face folder, with tokenizer and prompt style.

        Args:
            prompt_style: Instead of the model's own.

        Raises:
            UserError: the folder is not empty, the weights are quantized, or the adapter on them was trained here.
        """
        out, style = Path(out_dir), prompt_style or self.prompt_style
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UserError(f"{out} is there already: name another folder.")
        adapter = self.source is not None and self.source.adapter is not None
        if adapter and self.changed:
            raise UserError("An adapter that was trained here cannot be saved: train it with litgpt finetune.")
        if self.scheme is not None and not adapter:
            raise UserError("Quantized weights are not saved: load the model without quantize.")
        with new_folder(out) as temporary:
            if adapter:
                assert self.source is not None
                shutil.copytree(self.source.folder, temporary, dirs_exist_ok=True)
            else:
                base: Optional[Weights] = self.source.checkpoint if self.source is not None else None
                write_model(self.unpack().model, self.fields, temporary, base)
                copy_files(self.tokenizer.folder, temporary)
            save_style(style, temporary, self.tokenizer.prefix, self.tokenizer.eos_token or "")
            save_stop(temporary, self.tokenizer.trained_stop(style), self.fields)


def to_messages(prompt: Any) -> list[dict[str, Any]]:
    """A text, or a list of messages, as messages.

    Raises:
        UserError: it is neither.
    """
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    messages = list(prompt) if isinstance(prompt, Iterable) and not isinstance(prompt, Mapping) else []
    if not messages or any(not isinstance(m, Mapping) or "role" not in m for m in messages):
        raise UserError(
            f"The prompt {str(prompt)[:60]!r} is neither a text nor a list of messages, as "
            '[{"role": "user", "content": "..."}].'
        )
    return [dict(m) for m in messages]


def check_numbers(**numbers: Any) -> None:
    wrong = [
        f"{name} {n!r}" for name, n in numbers.items() if not isinstance(n, Integral) or isinstance(n, bool) or n < 1
    ]
    if wrong:
        raise UserError(f"{', '.join(wrong)}: a whole number above 0 is wanted.")


def check_choices(**given: tuple[Any, Any]) -> None:
    """For each name a value and the `Literal` that says what it may be; None always may."""
    for name, (value, allowed) in given.items():
        words = [word for word in get_args(allowed) if isinstance(word, str)]
        if value is not None and value not in words:
            raise UserError(f"{name} {value!r}: choose from {', '.join(words)}.{nearest(str(value), words)}")


def benchmark_dict_to_markdown_table(figures: Mapping[str, Iterable[float]]) -> str:
    """The figures of `LLM.benchmark` as a table: mean and standard deviation of each."""
    lines = ["| Metric | Mean | Std Dev |", "|---|---|---|"]
    for name, values in figures.items():
        numbers = list(values)
        lines.append(f"| {name} | {mean(numbers):.2f} | {stdev(numbers) if len(numbers) > 1 else 0.0:.2f} |")
    return "\n".join(lines)
