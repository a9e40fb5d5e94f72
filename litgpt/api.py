"""`from litgpt import LLM`: a model with its tokenizer and prompts, in Python."""

import importlib
import os
import re
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

from litgpt.checkpoint.find import find_folder, local_folder
from litgpt.checkpoint.folder import write_model
from litgpt.errors import UserError, kind, nearest
from litgpt.families import write_config
from litgpt.families.weights import Weights
from litgpt.generate.answers import decode, stop_strings
from litgpt.generate.engine import Engine, Request
from litgpt.generate.inference_model import InferenceModel
from litgpt.generate.sampling import Sampling
from litgpt.generate.several_devices import spread, usable_devices
from litgpt.litgpt_format.config import Config as LitConfig
from litgpt.litgpt_format.model import GPT as LitGPT
from litgpt.methods.model_source import ModelSource
from litgpt.methods.quantize import QuantizeName
from litgpt.model.config import Config, known_models, known_repositories
from litgpt.model.devices import DTYPES, Accelerator, PrecisionName, pick_device
from litgpt.model.gpt import GPT
from litgpt.model.linear import prepack, undo_prepack
from litgpt.storage.outputs import new_folder
from litgpt.text.model_styles import style_named
from litgpt.text.prompts import PromptStyle, load_style, save_style
from litgpt.text.styles import STYLES
from litgpt.text.tokenizer import Tokenizer, copy_files, save_stops
from litgpt.train.base_model import BaseModel, model_fields

FABRIC_PRECISIONS = {torch.float32: "32-true", torch.bfloat16: "bf16-true", torch.float16: "16-true"}


class Preprocessor:
    """Text to token IDs on a device, and back.

    Args:
        tokenizer: A `litgpt.Tokenizer`.
        device: Where `encode` puts the IDs.
    """

    def __init__(self, tokenizer: Any, device: Union[str, torch.device] = "cpu") -> None:
        self.tokenizer, self.device = tokenizer, torch.device(device)

    def encode(self, text: str) -> torch.Tensor:
        """Token IDs, (T,)."""
        return torch.as_tensor(self.tokenizer.encode(text), device=self.device)

    def decode(self, token_ids: torch.Tensor) -> str:
        return self.tokenizer.decode(token_ids)


class LLM(nn.Module):
    """A model that generates text, and that you can train in your own loop. Create one with `LLM.load`.

    You can replace `prompt_style`, for example by `PromptStyle.from_name("alpaca")`.
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
        self.inner_tokenizer, self.prompt_style = tokenizer, style
        self.fields, self.source = fields, source
        self.hold(model)
        self.changed = source is None  # whether the weights may differ from those of the folder
        self.max_length: Optional[int] = None
        self.scheme: Optional[str] = None
        self.placed = True  # whether the model is where it is to run, rather than waiting for `distribute`
        self.in_graph = False  # whether a graph may hold the weights, which then keep their layout
        self.trainable: Optional[list[bool]] = None  # which weights were, before they were frozen to generate
        self.made_preprocessor: Optional[Preprocessor] = None
        self.made_fabric: Any = None
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
        """Load a model, or initialize one with random weights. Raises `UserError` if the folder cannot be used.

        Args:
            model: A model folder or an adapter folder, or the name of one under checkpoints/.
            init: `random` initializes the model that the folder's config.json describes, or a known model by its name,
                such as pythia-160m.
            tokenizer_dir: The folder of the tokenizer. Default: the model's.
            access_token: Hugging Face token, to download a model. Default: the value of HF_TOKEN.
            distribute: `auto` uses the best available device; None the CPU, until you call `distribute`.
            base: The base model of an adapter, instead of the recorded one.
            precision: Default: 32-true for random weights and for weights stored in float32; otherwise bf16-true if the
                device supports it natively, 16-true on other CUDA GPUs, else 32-true.
            quantize: Quantize the weights of the blocks to 4 or 8 bits.
        """
        if access_token is not None:
            os.environ["HF_TOKEN"] = access_token
        check_choices(
            init=(init, Literal["pretrained", "random"]),
            distribute=(distribute, Literal["auto"]),
            precision=(precision, PrecisionName),
            quantize=(quantize, QuantizeName),
            accelerator=(accelerator, Accelerator),
        )
        accelerator = (accelerator or "auto") if distribute else "cpu"
        if init == "pretrained":
            source = ModelSource.open(Path(model), Path(base) if base else None)
            if tokenizer_dir is not None:
                source.tokenizer_dir = find_folder(Path(tokenizer_dir), weights=False)
            loaded = InferenceModel.open(source, None, precision, quantize, accelerator)
            made = cls(loaded.model, loaded.tokenizer, loaded.style, loaded.source.checkpoint.fields, loaded.source)
            made.scheme, made.placed = quantize, distribute is not None
            made.inner.requires_grad_(quantize is None and loaded.source.adapter is None)
            return made
        if quantize is not None or base is not None:
            raise UserError("Random weights (init='random') take no base and cannot be quantized.")
        fields, style = random_model(str(model))
        if style is not None and tokenizer_dir is None:
            raise UserError("Missing tokenizer. For random weights by the name of a model, pass tokenizer_dir.")
        folder = find_folder(Path(tokenizer_dir or model), weights=False)
        start = BaseModel.random(fields, folder)
        start.config.name = Path(model).name
        with torch.device("meta"):
            empty = GPT(start.config)
        start.fill(empty, DTYPES[precision or "32-true"], pick_device(accelerator))
        made = cls(empty.eval(), start.tokenizer(), style or load_style(folder), start.fields, None)
        made.placed = distribute is not None
        return made

    def hold(self, inner: GPT) -> None:
        """Make this the model."""
        model = LitGPT.around(inner, LitConfig.of(inner.config, self.source.checkpoint.folder if self.source else None))
        self._modules["model"] = model
        model.register_forward_pre_hook(self.before_forward)
        model.register_forward_hook(self.after_forward)
        model.register_state_dict_pre_hook(self.before_state_dict)
        model.register_load_state_dict_pre_hook(self.before_load)

    @property
    def model(self) -> LitGPT:  # type: ignore[override]
        """The model with LitGPT's interface, a `litgpt.GPT`."""
        self.unpack()
        return self._modules["model"]  # type: ignore[return-value]

    @property
    def inner(self) -> GPT:
        """The model that has the weights. Generation may have changed their layout; see `unpack`."""
        return self._modules["model"].inner  # type: ignore[union-attr, return-value]

    @property
    def config(self) -> LitConfig:
        return self._modules["model"].config  # type: ignore[union-attr, return-value]

    @property
    def device(self) -> torch.device:
        return self.inner.device

    @property
    def preprocessor(self) -> Preprocessor:
        """The tokenizer with the device of the model; on the CPU before `distribute`, that of the best device."""
        if self.made_preprocessor is None:
            tokenizer = importlib.import_module("litgpt").Tokenizer(self.inner_tokenizer.folder)
            getattr(tokenizer, "inner", tokenizer).n_embeddings = self.inner_tokenizer.n_embeddings
            self.made_preprocessor = Preprocessor(tokenizer, self.device if self.placed else pick_device("auto"))
        return self.made_preprocessor

    @property
    def tokenizer(self) -> Any:
        """A `litgpt.Tokenizer`."""
        return self.preprocessor.tokenizer

    @property
    def fabric(self) -> Any:
        """A `lightning.Fabric` for the device and precision of the model; None before `distribute`."""
        if self.made_fabric is None and self.placed:
            fabric = importlib.import_module("lightning.fabric").Fabric
            precision = FABRIC_PRECISIONS[self.inner.dtype]
            self.made_fabric = fabric(accelerator=self.device.type, devices=1, precision=precision)
        return self.made_fabric

    @property
    def checkpoint_dir(self) -> Optional[Path]:
        """The folder of the weights; None for random weights."""
        return self.source.folder if self.source is not None else None

    # generating

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
        """Generate answers to a prompt, or to several.

        Args:
            prompt: A text or a list of messages. For a list of texts the answers are a list, generated in batches.
            sys_prompt: A system message before each prompt.
            max_new_tokens: The maximum length of an answer.
            temperature: Below 1 likely tokens become more likely; 0 is greedy.
            top_k: Sample from this many of the most likely tokens; None for all.
            top_p: Sample from the most likely tokens whose probabilities sum up to this.
            return_as_token_ids: Return token ids (n,) on the CPU instead of text.
            stream: Return an iterator over parts of the answer as they are generated, for one prompt only.
            min_p: Sample from tokens at least this likely, as a fraction of the most likely token's probability.
            repetition_penalty: Above 1 tokens that are already in the text become less likely.
            stop: A text that ends the answer, or several.
            seed: Makes the answers reproducible. Default: drawn from torch's generator.
            batch_size: How many answers to generate at once.

        Returns:
            The answer without the prompt: text, ids, a list of either, or an iterator over either.
        """
        check_numbers(max_new_tokens=max_new_tokens, batch_size=batch_size)
        if not isinstance(prompt, (str, Sequence)):
            raise UserError(f"Expected a text, a list of texts or a list of messages as prompt, got {kind(prompt)}.")
        single = isinstance(prompt, str) or (len(prompt) > 0 and isinstance(prompt[0], Mapping))
        if stream and not single:
            raise UserError("stream=True takes one prompt, not a list.")
        prompts: list[Any] = [prompt] if single else list(prompt)
        system = [{"role": "system", "content": sys_prompt}] if sys_prompt else []
        sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
        requests = self.requests([[*system, *to_messages(p)] for p in prompts], max_new_tokens, sampling, seed)
        parts = self.decode(requests, stop_strings(stop), return_as_token_ids, batch_size)
        if stream:
            return (part for _, part in parts if len(part))
        answers: dict[int, list[Any]] = defaultdict(list)
        for number, part in parts:
            answers[number].append(part)
        joined = [torch.cat(answers[i]) if return_as_token_ids else "".join(answers[i]) for i in range(len(prompts))]
        return joined[0] if single else joined

    def chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> Any:
        """Answer the last of some messages, which are mappings with `role` and `content`. Options as for `generate`."""
        if isinstance(messages, (str, Mapping)) or not messages or not isinstance(messages[0], Mapping):
            raise UserError('Expected a list of messages like [{"role": "user", "content": "..."}].')
        return self.generate(messages, **options)

    def requests(
        self, conversations: list[list[dict[str, Any]]], max_new_tokens: int, sampling: Sampling, seed: Optional[int]
    ) -> list[Request]:
        first = int(torch.randint(2**31, ())) if seed is None else seed
        loaded = InferenceModel(self.source, self.inner, self.inner_tokenizer, self.prompt_style)  # type: ignore[arg-type]
        requests = []
        for i, messages in enumerate(conversations):
            request = Request(loaded.render(messages)[1], max_new_tokens, sampling, loaded.stop_ids, first + i)
            request.check(self.inner)
            if (n := len(request.prompt)) >= self.longest:
                raise UserError(f"The prompt has {n} tokens. With its answer it must fit into {self.longest}.")
            requests.append(request)
        return requests

    def decode(
        self, requests: list[Request], stop: list[str], as_ids: bool, batch_size: int
    ) -> Iterator[tuple[int, Any]]:
        """Yield the number of a request with a part of its answer, as text or ids."""
        if not self.changed and not self.in_graph:
            self.freeze_and_prepack()
        engine = Engine(self.inner, max(1, min(len(requests), batch_size)), self.longest)
        model = self._modules["model"]
        assert model is not None
        training = model.training
        model.eval()
        try:
            for answer, part in decode(engine, self.inner_tokenizer, requests, stop):
                yield answer.number, torch.tensor(answer.new_ids, dtype=torch.long) if as_ids else part
        finally:
            model.train(training)

    @property
    def longest(self) -> int:
        """The most tokens of a prompt and its answer."""
        longest: int = self._modules["model"].max_seq_length  # type: ignore[union-attr, assignment]
        return min(longest, self.max_length or longest)

    def benchmark(self, num_iterations: int = 1, **options: Any) -> tuple[str, dict[str, list[float]]]:
        """Measure the speed of generation. Options as for `generate`, with one prompt.

        Returns:
            The last answer, and for each metric its value in each iteration: `Seconds total`, `Seconds to first token`,
            `Tokens generated`, `Inference speed in tokens/sec` and, on a GPU, `Total GPU memory allocated in GB`.
        """
        check_numbers(num_iterations=num_iterations)
        metrics: dict[str, list[float]] = defaultdict(list)
        options = {**options, "stream": True, "return_as_token_ids": True}
        ids: list[int] = []
        for _ in range(num_iterations):
            start, first, ids = time.perf_counter(), None, []
            for part in self.generate(**options):
                ids += part.tolist()
                first = first or time.perf_counter() - start
            seconds = time.perf_counter() - start
            metrics["Seconds total"].append(seconds)
            metrics["Seconds to first token"].append(first or seconds)
            metrics["Tokens generated"].append(len(ids))
            metrics["Inference speed in tokens/sec"].append(len(ids) / seconds)
            if self.device.type == "cuda":
                metrics["Total GPU memory allocated in GB"].append(torch.cuda.max_memory_allocated() / 1e9)
        return self.inner_tokenizer.decode(ids), dict(metrics)

    # devices

    def distribute(
        self,
        accelerator: Accelerator = "auto",
        devices: Union[int, Literal["auto"]] = "auto",
        precision: Optional[Union[PrecisionName, Literal["auto"]]] = None,
        quantize: Optional[QuantizeName] = None,
        generate_strategy: Optional[Literal["sequential", "tensor_parallel"]] = None,
        fixed_kv_cache_size: Optional[Union[int, Literal["max_model_supported"]]] = None,
    ) -> "LLM":
        """Move the model to devices, in a given precision, and return it.

        Weights that are unchanged since they were loaded are read from the folder again. Raises `UserError` if there
        are no such devices; random or trained weights cannot be quantized.

        Args:
            devices: The number of devices. Default: one, or all with a strategy.
            precision: Default: as for `load`; for random or trained weights, their current precision.
            quantize: Quantize the weights of the blocks to 4 or 8 bits.
            generate_strategy: `sequential` spreads the layers over the devices. `tensor_parallel` needs a process for
                each device; use `litgpt generate_tp`.
            fixed_kv_cache_size: The maximum number of tokens in prompt and answer, else the model's context length.
        """
        if generate_strategy == "tensor_parallel":
            raise UserError("tensor_parallel needs a process for each device. Use litgpt generate_tp in a shell.")
        chosen_precision = None if precision == "auto" else precision
        size = None if fixed_kv_cache_size == "max_model_supported" else fixed_kv_cache_size
        check_choices(
            generate_strategy=(generate_strategy, Literal["sequential", "tensor_parallel"]),
            precision=(chosen_precision, PrecisionName),
            quantize=(quantize, QuantizeName),
            accelerator=(accelerator, Accelerator),
        )
        numbers = {"devices": devices, "fixed_kv_cache_size": size}
        check_numbers(**{name: n for name, n in numbers.items() if n not in ("auto", None)})
        if size is not None and size > self.config.block_size:
            raise UserError(f"fixed_kv_cache_size={size}: this model reads at most {self.config.block_size} tokens.")
        n = 1 if devices == "auto" and generate_strategy is None else devices
        chosen = usable_devices(accelerator, n)
        if len(chosen) > 1 and generate_strategy is None:
            raise UserError(f"devices={devices} needs a strategy. generate_strategy='sequential' spreads the layers.")
        if not self.changed:
            assert self.source is not None
            loaded = InferenceModel.open(self.source, None, chosen_precision, quantize, accelerator, n)
            self.scheme, self.trainable = quantize, None
            self.hold(loaded.model)
            loaded.model.requires_grad_(quantize is None and self.source.adapter is None)
            self.in_graph = False
        elif quantize is not None:
            raise UserError("Random or trained weights cannot be quantized. Save them, and load them with quantize.")
        else:
            self.model.to(chosen[0], DTYPES[chosen_precision] if chosen_precision else self.inner.dtype)
            self.inner.tie_weights()
            if len(chosen) > 1:
                spread(self.inner, chosen)
        self.max_length, self.placed, self.made_fabric = size, True, None
        self.preprocessor.device = self.device
        return self

    # training and saving

    def trainer_setup(self, trainer_ckpt: Optional[Union[str, Path]] = None) -> None:
        """Make all weights trainable, for your own training loop, and load those of a PyTorch Lightning checkpoint, if
        given. Raises `UserError` if the weights are quantized, or the checkpoint has other weights."""
        self.train()
        if trainer_ckpt is not None:
            saved = torch.load(trainer_ckpt, map_location="cpu", weights_only=True)
            state = saved.get("state_dict", saved)
            prefix = next((re.split(r"(?:\bmodel\.)?transformer\.", n)[0] for n in state if "transformer." in n), None)
            if prefix is None:
                raise UserError(f"{trainer_ckpt} has no weights for this model.")
            self.load_state_dict({n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)})
        self.model.requires_grad_(True)

    def freeze_and_prepack(self) -> None:
        if self.trainable is None:
            self.trainable = [p.requires_grad for p in self.inner.parameters()]
        self.inner.requires_grad_(False)
        prepack(self.inner)

    def unpack(self) -> "LLM":
        """Restore the layout of the weights that generation changes on a CPU (`litgpt.model.linear.prepack`). `.model`
        and the methods of this class do so."""
        if undo_prepack(self.inner):
            self.inner.tie_weights()
        if self.trainable is not None:
            for parameter, trainable in zip(self.inner.parameters(), self.trainable):
                parameter.requires_grad_(trainable)
            self.trainable = None
        return self

    def train(self, mode: bool = True) -> "LLM":
        if mode:
            if self.scheme is not None:
                raise UserError("Quantized weights cannot be trained. Load the model without quantize.")
            self.unpack().changed = True
        return super().train(mode)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        return super(LLM, self.unpack()).named_parameters(*args, **kwargs)

    def state_dict(self, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:  # type: ignore
        """The weights of the model under LitGPT's names, such as `transformer.h.0.mlp.fc_1.weight`."""
        return self.model.state_dict(destination=destination, prefix=prefix, keep_vars=keep_vars)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Takes the names of `state_dict`, also where this is a part of a module."""
        for name in [name for name in state_dict if name.startswith(prefix)]:
            if not name.startswith(f"{prefix}model."):
                state_dict[f"{prefix}model.{name.removeprefix(prefix)}"] = state_dict.pop(name)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def before_state_dict(self, *_: Any) -> None:
        self.unpack()

    def before_load(self, *_: Any) -> None:
        self.unpack().changed = True

    def _apply(self, *args: Any, **kwargs: Any) -> Any:  # to another device or dtype
        return super(LLM, self.unpack())._apply(*args, **kwargs)

    def forward(
        self,
        input_ids: torch.Tensor,
        target_ids: Optional[torch.Tensor] = None,
        loss_fn: Optional[Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = None,
    ) -> Any:
        """The logits (B, T, V) of the tokens that follow `input_ids` (B, T), with targets also the loss.

        Args:
            target_ids: The same tokens (B, T), with -100 for those to ignore. They are shifted by one here.
            loss_fn: Takes logits (B, T - 1, V) and targets (B, T - 1). Default: mean cross-entropy, 0 without targets.
        """
        logits = self._modules["model"](input_ids)  # type: ignore[misc]
        if target_ids is None:
            return logits
        if loss_fn is not None:
            return logits, loss_fn(logits[:, :-1], target_ids[:, 1:])
        targets = target_ids[:, 1:].flatten()
        losses = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets, reduction="sum")
        return logits, losses / (targets != -100).sum().clamp(min=1)

    def before_forward(self, *_: Any) -> None:
        if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
            self.unpack()

    def after_forward(self, model: nn.Module, inputs: Any, logits: Any) -> None:
        for part in logits if isinstance(logits, list) else [logits]:
            if part.requires_grad:
                self.in_graph = True
                part.register_hook(self.note_backward)

    def note_backward(self, gradient: torch.Tensor) -> None:
        self.changed = True

    def save(self, out_dir: Union[str, Path], prompt_style: Optional[PromptStyle] = None) -> None:
        """Write a Hugging Face folder, which must be empty or missing, with tokenizer and prompt style (by default the
        model's). Raises `UserError` if weights are quantized, or an adapter was trained here."""
        out, style = Path(out_dir), prompt_style or self.prompt_style
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UserError(f"{out} already exists. Choose another folder.")
        adapter = self.source is not None and self.source.adapter is not None
        if adapter and self.changed:
            raise UserError("An adapter that was trained here cannot be saved. Train it with litgpt finetune.")
        if self.scheme is not None and not adapter:
            raise UserError("Quantized weights cannot be saved. Load the model without quantize.")
        with new_folder(out) as temporary:
            if adapter:
                assert self.source is not None
                shutil.copytree(self.source.folder, temporary, dirs_exist_ok=True)
            else:
                base: Optional[Weights] = self.source.checkpoint if self.source is not None else None
                write_model(self.unpack().inner, self.fields, temporary, base)
                copy_files(self.inner_tokenizer.folder, temporary)
            save_style(style, temporary, self.inner_tokenizer)
            save_stops(temporary, self.inner_tokenizer, style, self.fields)


def random_model(name: str) -> tuple[dict[str, Any], Optional[PromptStyle]]:
    """The `config.json` of a folder or of a known model, and the prompt style of the latter; None for a folder's."""
    known = known_models().get(name) or known_repositories().get(name)
    if known is None or local_folder(Path(name)) is not None:
        return model_fields(Path(name), None), None
    return write_config(Config(**known)), style_named(name) or STYLES["none"]


def to_messages(prompt: Any) -> list[dict[str, Any]]:
    """A text, or a list of messages, as messages. Raises `UserError` if it is neither."""
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    messages = list(prompt) if isinstance(prompt, Iterable) and not isinstance(prompt, Mapping) else []
    if not messages or any(not isinstance(m, Mapping) or "role" not in m for m in messages):
        raise UserError(
            f"The prompt {str(prompt)[:60]!r} is neither a text nor a list of messages like "
            '[{"role": "user", "content": "..."}].'
        )
    return [dict(m) for m in messages]


def check_numbers(**numbers: Any) -> None:
    for name, n in numbers.items():
        if not isinstance(n, Integral) or isinstance(n, bool) or n < 1:
            raise UserError(f"Expected an integer above 0 for {name}, got {n!r}.")


def check_choices(**choices: tuple[Any, Any]) -> None:
    """Check a value against the `Literal` type of its name. None is always allowed."""
    for name, (value, literal) in choices.items():
        words = [word for word in get_args(literal) if isinstance(word, str)]
        if value is not None and value not in words:
            raise UserError(f"{name} {value!r}: choose from {', '.join(words)}.{nearest(str(value), words)}")


def benchmark_dict_to_markdown_table(metrics: Mapping[str, Iterable[float]]) -> str:
    """The metrics of `LLM.benchmark` as a table with mean and standard deviation."""
    lines = ["| Metric | Mean | Std Dev |", "|---|---|---|"]
    for name, values in metrics.items():
        numbers = list(values)
        lines.append(f"| {name} | {mean(numbers):.2f} | {stdev(numbers) if len(numbers) > 1 else 0.0:.2f} |")
    return "\n".join(lines)
