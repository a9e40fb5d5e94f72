"""What a run picked by itself: a resumed run takes it from its checkpoint."""

from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Optional

from litgpt.errors import UserError
from litgpt.storage.files import read_yaml
from litgpt.train.args import AUTO, record_setting
from litgpt.train.resume.folder import HYPERPARAMETERS
from litgpt.train.resume.state import MICRO_BATCH, TrainingState, flat, is_dict

if TYPE_CHECKING:
    from litgpt.train.run import Run

RATE = "optimizer.init_args.lr"
RATES = ("train.learning_rate", RATE)
OPTIONS = ("train.save_interval", "train.keep_last", "train.lr_warmup_steps", "eval.interval")  # that may be auto
EARLIER: dict[str, Any] = {
    "train.save_interval": 1000,
    "train.keep_last": None,
    "train.micro_batch_size": 1,
}  # defaults


def take_recorded(run: "Run") -> None:
    """Replace what the options leave to the run by what the run to resume, if any, has recorded. Record the default
    learning rate."""
    settings, rate = recorded(run) if run.resume is not False else ({}, None)
    for name in OPTIONS:
        group, _, leaf = name.partition(".")
        if getattr(getattr(run, group), leaf) == AUTO and (value := settings.get(name, AUTO)) != AUTO:
            setattr(run, group, replace(getattr(run, group), **{leaf: value}))
            record_setting(name, value)
    if run.picks_micro_batch and (size := settings.get("train.micro_batch_size", AUTO)) != AUTO:
        run.picks_micro_batch = False
        run.use_micro_batch([size])
        record_setting("train.micro_batch_size", size)
    elif run.picks_micro_batch and MICRO_BATCH in settings:
        run.use_micro_batch([settings[MICRO_BATCH]])
    if run.default_rate is not None:
        rate = settings.get(RATE, rate)
        if rate is not None:
            run.default_rate, run.rate_origin = rate, "as recorded"
        if RATE in settings or not settings:
            record_setting(RATE, run.default_rate)


def recorded(run: "Run") -> tuple[dict[str, Any], Optional[float]]:
    """The settings of the run to resume, by dotted name, and its learning rate if they lack it: from its checkpoint, or
    else from its result. Earlier releases recorded no rate that was PyTorch's default, and no settings of a run from
    Python."""
    if run.checkpoint is None:
        with suppress(UserError, OSError):
            return flat(read_yaml(run.out_dir / "final" / HYPERPARAMETERS)), None
        return {}, None
    state = TrainingState.read(run.checkpoint, mmap=True)
    options = state.progress.get("options")
    group = options[0] if isinstance(options, list) and options and is_dict(options[0], str) else {}
    defaults = {} if MICRO_BATCH in state.settings else EARLIER | {"train.lr_warmup_steps": run.method.warmup_steps}
    return defaults | state.settings, group.get("lr")
