"""Options whose value depends on who gave what: the optimizer and its arguments, the learning rate, the size of a step,
and two more pairs of which one excludes the other.

A later level beats an earlier one: one `--config` after the other, then the flags.
"""

import importlib
import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Optional

from litgpt.errors import UserError, nearest, remark
from litgpt.storage.files import parse_yaml

if TYPE_CHECKING:
    from litgpt.cli.parser import Parser

MACHINE = ("devices", "num_nodes")
NO_CLOSURE = ("LBFGS", "SparseAdam")  # classes of torch.optim that the loop cannot serve


@dataclass
class Level:
    """What one `--config` or all flags together say on the options of this file.

    Args:
        source: As a message names it.
        optimizer: The class, as it was given.
        arguments: The optimizer's; values of flags are text.
        train: Those of `TrainArgs`; values of flags are text.
        machine: The same for `devices` and `num_nodes`.
        data: The same for the data set.
    """

    source: str
    optimizer: Optional[str] = None
    arguments: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)


@dataclass
class Settled:
    """The words that the parser is to see, and the arguments of the optimizer that somebody gave."""

    configs: list[dict[str, Any]]
    words: list[str]
    optimizer_arguments: set[str]

    def recorded(self, settings: dict[str, Any]) -> dict[str, Any]:
        """The settings for `hyperparameters.yaml`: as a `--config` they must not look like given where they were not,
        or another optimizer would take them over."""
        if "optimizer" in settings:
            arguments = settings["optimizer"].get("init_args", {})
            kept = {k: v for k, v in arguments.items() if k in self.optimizer_arguments}
            settings["optimizer"] = {**settings["optimizer"], "init_args": kept}
        if (settings.get("train") or {}).get("gradient_accumulation_iters") is not None:
            del settings["train"]["global_batch_size"]
        return settings


def settle(configs: list[tuple[str, dict[str, Any]]], words: list[str], parser: "Parser") -> Settled:
    """Bring what was given together, so that the parser finds no two values that contradict each other.

    Args:
        configs: Name and options of each `--config`.
        words: The flags, each as `--name=value`.

    Raises:
        UserError: flags contradict each other, or there is no such optimizer.
    """
    known = {option.removeprefix("--") for action in parser._actions for option in action.option_strings}
    if "optimizer" not in known:
        return Settled([fields for _, fields in configs], words, set())
    configs = [(source, dict(fields)) for source, fields in configs]
    levels = [of_config(source, fields) for source, fields in configs]
    flags, words = of_flags(words)
    levels.append(flags)
    more = [*learning_rate(levels), *rows_of_a_step(levels, parser), *warmup(levels), *trained_words(levels)]
    optimizer_words, given = optimizer(levels, parser)
    return Settled([fields for _, fields in configs], [*more, *optimizer_words, *words], given)


def of_config(name: str, fields: dict[str, Any]) -> Level:
    """The level of a `--config`; what it says on the optimizer is taken out of `fields`."""
    machine = {k: fields[k] for k in MACHINE if k in fields}
    level = Level(name, train=fields.get("train") or {}, machine=machine)
    if isinstance(data := fields.get("data"), dict):
        level.data = data | (data["init_args"] if isinstance(data.get("init_args"), dict) else {})
    optimizer = fields.pop("optimizer", None)
    if isinstance(optimizer, dict):
        read_class(level, optimizer)
    elif optimizer is not None:
        level.optimizer = str(optimizer)
    return level


def of_flags(words: list[str]) -> tuple[Level, list[str]]:
    """The level of the flags, and the words that say nothing on the optimizer."""
    level, others = Level("flags"), []
    for word in words:
        name, _, value = word.removeprefix("--").partition("=")
        if name == "optimizer.help":
            others.append(f"--optimizer.help={class_path(value)}")
        elif name in ("optimizer", "optimizer.class_path"):
            if value.lstrip().startswith("{"):
                read_class(level, mapping(name, value))
            else:
                level.optimizer = value
        elif name == "optimizer.init_args":
            read_class(level, {"init_args": mapping(name, value)})
        elif name.startswith("optimizer."):
            level.arguments[name.removeprefix("optimizer.").removeprefix("init_args.")] = value
        else:
            others.append(word)
        if name.startswith("train."):
            level.train[name.removeprefix("train.")] = value
        elif name.startswith("data."):
            level.data[name.removeprefix("data.").removeprefix("init_args.")] = value
        elif name in MACHINE:
            level.machine[name] = value
    return level, others


def mapping(name: str, value: str) -> dict[str, Any]:
    """The value of a flag that takes several options at once. Raises `UserError` if it is none."""
    fields = parse_yaml(value, f"--{name} {value[:40]}")
    if not isinstance(fields, dict):
        raise UserError(f"--{name} {value}: a mapping is wanted, as {{class_path: SGD, init_args: {{lr: 0.1}}}}.")
    return fields


def read_class(level: Level, fields: dict[str, Any]) -> None:
    """Read `{class_path: NAME, init_args: {...}}`; arguments may also stand beside `class_path`, or without it."""
    fields = dict(fields)
    if fields.get("class_path") is not None:
        level.optimizer = str(fields["class_path"])
    fields.pop("class_path", None)
    arguments = fields.pop("init_args", None) or {}
    if not isinstance(arguments, dict):
        raise UserError(
            f"{level.source}: init_args of the optimizer is {arguments!r}; a mapping is wanted, {{lr: ...}}."
        )
    level.arguments |= {**fields, **arguments}


# the optimizer


def optimizer(levels: list[Level], parser: "Parser") -> tuple[list[str], set[str]]:
    """The words that name the class and the arguments that were given, and the names of these.

    An argument of a level is one of the class that holds there. Where a later level names another class, arguments that
    this one does not know are dropped, with a word about it.
    """
    default = str(parser.get_default("optimizer")["class_path"])
    if not any(level.optimizer or level.arguments for level in levels):
        return [], set()
    path = default
    given: dict[str, Any] = {}
    for level in levels:
        if level.optimizer and class_path(level.optimizer) != path:
            path = class_path(level.optimizer)
            given = carried(given, path, level)
        given |= level.arguments
    if path != default:  # or the library fills in the default arguments of the default class
        parser.set_defaults({"optimizer": {"class_path": path}})
    words = [f"--optimizer.{k}={v if isinstance(v, str) else json.dumps(v, default=str)}" for k, v in given.items()]
    return [f"--optimizer={path}", *words], set(given)


def carried(given: dict[str, Any], path: str, level: Level) -> dict[str, Any]:
    """Those of the arguments that were given to another class which this one knows as well."""
    parameters = inspect.signature(load_class(path)).parameters
    open_end = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    kept = {k: v for k, v in given.items() if open_end or k in parameters}
    if given:
        words = [f"keeps {', '.join(f'{k} {v}' for k, v in kept.items())}"] if kept else []
        if len(kept) < len(given):
            words.append(f"does not know {', '.join(k for k in given if k not in kept)}")
        place = "" if level.source == "flags" else f"{level.source}: "
        text = f"{place}of the config's options for another optimizer, {level.optimizer} {' and '.join(words)}"
        remark(f"{text}.")
    return kept


def class_path(name: str) -> str:
    """The dotted path of an optimizer from its short name or path.

    Raises:
        UserError: there is none of this name, or the loop cannot use it.
    """
    from litgpt.train.optimizers import SHORT_NAMES

    path = SHORT_NAMES.get(name, name)
    load_class(path)
    return path


def load_class(path: str) -> type:
    """The class at a dotted path. Raises `UserError` as `class_path`."""
    from torch.optim import Optimizer

    from litgpt.methods.quantize import bitsandbytes
    from litgpt.train.optimizers import SHORT_NAMES

    module, _, name = path.rpartition(".")
    if module.partition(".")[0] == "bitsandbytes":
        bitsandbytes()
    try:
        found = getattr(importlib.import_module(module), name, None) if module else None
    except ImportError:
        found = None
    if not (isinstance(found, type) and issubclass(found, Optimizer)):
        hint = nearest(path, SHORT_NAMES) or nearest(name, SHORT_NAMES)
        hint = hint or f" Choose from {', '.join(SHORT_NAMES)}, or give the path of a class, as torch.optim.AdamW."
        raise UserError(f"--optimizer {path}: no such optimizer.{hint}")
    if name in NO_CLOSURE and module.startswith("torch."):
        raise UserError(f"--optimizer {path} does not fit this training loop; AdamW does.")
    return found


# the learning rate


def learning_rate(levels: list[Level]) -> list[str]:
    """The words for `train.learning_rate`; the optimizer's `lr` is changed in the levels, so that both agree.

    A later level beats an earlier one, whichever of the two options it gives. Within a level `train.learning_rate`
    wins; two flags that disagree are refused.
    """
    rate: Any = None
    lr: Any = None
    named = False
    for level in levels:
        if (own := level.arguments.get("lr")) is not None:
            lr, rate = own, None
        if "learning_rate" in level.train:
            rate = None if is_null(level.train["learning_rate"]) else level.train["learning_rate"]
            if rate is not None and own is not None and not same(rate, own):
                if level.source == "flags":
                    raise UserError(
                        f"--train.learning_rate {rate} and --optimizer.lr {own} disagree: give one of them."
                    )
                remark(f"{level.source}: train.learning_rate {rate} wins over the optimizer's lr {own}.")
            named = named or rate is not None
    if not named:
        return []
    final = lr if rate is None else rate
    for level in levels:
        level.arguments.pop("lr", None)
    if final is None:
        return ["--train.learning_rate=null"]
    levels[-1].arguments["lr"] = final
    return [f"--train.learning_rate={final}"]


def is_null(value: Any) -> bool:
    return value is None or str(value).lower() in ("null", "none", "~", "")


def same(a: Any, b: Any) -> bool:
    """Whether two numbers, maybe as text, are equal. What is no number is left to the parser to refuse."""
    try:
        return float(a) == float(b)
    except (TypeError, ValueError):
        return a == b


# the size of a step


def rows_of_a_step(levels: list[Level], parser: "Parser") -> list[str]:
    """The words that leave one of `train.global_batch_size` and `train.gradient_accumulation_iters`.

    A later level beats an earlier one. Within one the iterations win; two flags that disagree are refused.
    """
    winner: Any = None
    for level in levels:
        size, times = level.train.get("global_batch_size"), level.train.get("gradient_accumulation_iters")
        if not is_null(times):
            winner = times
            if size is not None and level.source == "flags":
                check_rows(levels, parser, size, times)
            elif size is not None:
                what = f"train.gradient_accumulation_iters {times} wins over train.global_batch_size {size}"
                remark(f"{level.source}: {what}.")
        elif size is not None or "gradient_accumulation_iters" in level.train:
            winner = None
    given = any(not is_null(level.train.get("gradient_accumulation_iters")) for level in levels)
    return ["--train.gradient_accumulation_iters=null"] if given and winner is None else []


def check_rows(levels: list[Level], parser: "Parser", size: Any, times: Any) -> None:
    """Raise `UserError` if two flags do not come to the same number of rows."""
    train = {k: v for level in levels for k, v in level.train.items()}
    machine = {k: v for level in levels for k, v in level.machine.items()}
    micro = train.get("micro_batch_size", parser.get_default("train.micro_batch_size"))
    devices = [machine.get(k, parser.get_default(k)) for k in MACHINE]
    try:
        agree = int(micro) * int(times) * int(devices[0]) * int(devices[1]) == int(size)
    except ValueError:  # devices may be auto; other words are left to the parser to refuse
        agree = False
    if not agree:
        raise UserError(
            f"--train.global_batch_size {size} and --train.gradient_accumulation_iters {times} disagree (micro-batches "
            f"of {micro}, devices {devices[0]}): give one of them."
        )


# pairs of which one excludes the other


def warmup(levels: list[Level]) -> list[str]:
    """The words that leave one of `train.lr_warmup_steps`, which has a default, and `train.lr_warmup_fraction`."""
    left = left_of(levels, "train", "lr_warmup_fraction", "lr_warmup_steps", lambda fraction, steps: False)
    loser = {"lr_warmup_fraction": "lr_warmup_steps", "lr_warmup_steps": "lr_warmup_fraction"}.get(left or "")
    return [f"--train.{loser}=null"] if loser and given(levels, "train", "lr_warmup_fraction") else []


def trained_words(levels: list[Level]) -> list[str]:
    """The words that make `data.mask_prompt` and `data.train_on` agree, which says more."""

    def masks(train_on: Any) -> bool:
        return str(train_on) != "all"

    def agree(train_on: Any, mask_prompt: Any) -> bool:
        return masks(train_on) == (str(mask_prompt).lower() in ("true", "yes", "on"))

    left = left_of(levels, "data", "train_on", "mask_prompt", agree)
    if left == "mask_prompt":
        return ["--data.train_on=null"] if given(levels, "data", "train_on") else []
    return [f"--data.mask_prompt={str(masks(given(levels, 'data', 'train_on')[-1])).lower()}"] if left else []


def left_of(
    levels: list[Level], group: str, winner: str, loser: str, agree: Callable[[Any, Any], bool]
) -> Optional[str]:
    """Which of two options holds, None for neither.

    A later level beats an earlier one, whichever of the two it gives. Within one `winner` wins, with a word about it
    unless both agree; two flags that disagree are refused.
    """
    left = None
    for level in levels:
        values = getattr(level, group)
        first, second = values.get(winner), values.get(loser)
        if not is_null(first):
            if not is_null(second) and not agree(first, second):
                both = f"--{group}.{winner} {first} and --{group}.{loser} {second}"
                if level.source == "flags":
                    raise UserError(f"{both} exclude each other: give one of them.")
                remark(f"{level.source}: of {both} the first holds.")
            left = winner
        elif not is_null(second):
            left = loser
        elif winner in values and left == winner:
            left = None
    return left


def given(levels: list[Level], group: str, name: str) -> list[Any]:
    """The values that the levels give to an option, the first first."""
    return [v for level in levels if not is_null(v := getattr(level, group).get(name))]
