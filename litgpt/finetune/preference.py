"""`litgpt finetune dpo`, `kto`, `orpo`, `simpo`, and `cpo`: training on preferences between answers."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Optional

from litgpt.cli.groups import option_group
from litgpt.errors import UserError
from litgpt.finetune.adapter import adapter_method
from litgpt.finetune.full import full_method
from litgpt.finetune.initial import continued_adapter
from litgpt.finetune.lora import lora_method
from litgpt.methods.adapter import LLaMAAdapter, LLaMAAdapterV2
from litgpt.methods.lora import LoRA
from litgpt.train.args import TrainArgs, run_flags
from litgpt.train.base_model import BaseModel
from litgpt.train.method import Method
from litgpt.train.objectives import OBJECTIVES, Name, Preference, PreferenceArgs
from litgpt.train.result import TrainingResult
from litgpt.train.run import Run

MethodName = Literal["lora", "full", "adapter", "adapter_v2"]
TRAIN = TrainArgs(epochs=1)
RATE = 0.1  # of the learning rate of supervised finetuning
FLAGS = {"lora": ("lora_", "train_embeddings"), "adapter": ("adapter_",)}  # the beginnings of a method's own options


def command(name: Name, rows: str, paper: str) -> Callable[..., Optional[TrainingResult]]:
    """The command of an algorithm."""

    def setup(
        checkpoint_dir: Path,
        out_dir: Path = Path("out/finetune", name),
        method: MethodName = "lora",
        preference: PreferenceArgs = PreferenceArgs(),  # noqa: B008
        lora: LoRA = LoRA(),  # noqa: B008
        train_embeddings: bool = False,
        adapter_prompt_length: int = 10,
        adapter_start_layer: int = 2,
        initial_adapter: Optional[Path] = None,
        train: TrainArgs = TRAIN,
        **kwargs: Any,
    ) -> Optional[TrainingResult]:
        check_flags(method)
        objective = OBJECTIVES[name](name, preference)
        base_model = BaseModel.from_folder(checkpoint_dir, initial_adapter, kwargs.get("dry_run", False))
        if method == "full":
            base_model, chosen = base_model.merged(), full_method()
        elif method == "lora":
            chosen = lora_method(lora, train_embeddings, base_model, out_dir)
        else:
            kind = LLaMAAdapter if method == "adapter" else LLaMAAdapterV2
            adapter = continued_adapter(kind(adapter_prompt_length, adapter_start_layer), base_model)
            chosen = adapter_method(method, adapter)
        return Run(with_objective(chosen, objective), base_model, out_dir, train=train, **kwargs)()

    setup.__doc__ = f"""Finetune a model on {rows} with {name.upper() if name != "simpo" else "SimPO"}.

    The result, `final/` in the output folder, is that of the method: an adapter folder, or a model folder. Paper:
    {paper}

    Args:
        checkpoint_dir: Model: a Hugging Face folder, or the name of one under checkpoints/; or an adapter folder, whose
            training continues.
        out_dir: Output folder; the result is in final/.
        method: What is trained: the updates of LoRA, all weights, or an adapter.
        preference: Options of the loss.
        train_embeddings: With LoRA, also train the embedding.
        adapter_prompt_length: Length of an adapter's prefix in tokens.
        adapter_start_layer: First layer with a prefix, counted from 0.
        initial_adapter: Adapter folder whose training continues, if the model is its base. Not needed if the model is
            an adapter folder that names its base.
        train: Training options.
    """
    return option_group("lora", LoRA, prefix="lora_", defaults={"dropout": 0.0})(setup)


def check_flags(method: MethodName) -> None:
    """Raise `UserError` for flags of other methods."""
    for flag in sorted(run_flags.get()):
        owner = next((m for m, starts in FLAGS.items() if flag.startswith(starts)), None)
        if owner is not None and not method.startswith(owner):
            raise UserError(f"--{flag} is an option of --method {owner}. Remove it.")


def with_objective(method: Method, objective: Preference) -> Method:
    """The method with another objective, and a smaller default learning rate."""
    rate = method.learning_rate
    return replace(
        method,
        name=f"finetune {objective.name}, {method.name.removeprefix('finetune ')}",
        objective=objective,
        learning_rate=None if rate is None else lambda width: RATE * rate(width),
    )


PAIRS, LABELS = "pairs of a chosen and a rejected answer", "answers that are labeled as desirable or undesirable"
dpo = command("dpo", PAIRS, "https://arxiv.org/abs/2305.18290")
kto = command("kto", LABELS, "https://arxiv.org/abs/2402.01306")
orpo = command("orpo", PAIRS, "https://arxiv.org/abs/2403.07691")
simpo = command("simpo", PAIRS, "https://arxiv.org/abs/2405.14734")
cpo = command("cpo", PAIRS, "https://arxiv.org/abs/2401.08417")
