"""A run follows the commands of `litgpt ctl` between its steps, and repeats those that its earlier parts recorded."""

import signal
from typing import TYPE_CHECKING, NoReturn

from litgpt.errors import UserError
from litgpt.train.faults import spared
from litgpt.train.inbox import ACTIONS, INBOX, Command, answer, take, waiting
from litgpt.train.metrics import REPEATED, timeline
from litgpt.train.resume.find import resume_hint
from litgpt.train.schedule import Result
from litgpt.train.signals import CODES, Stopped

if TYPE_CHECKING:
    from litgpt.train.loop import Trainer
    from litgpt.train.run import Run


class Control:
    """Follows commands, each of which becomes an event in the metrics. The first rank reads them, and all ranks follow
    them after the same step.

    Events that change the result are repeated after the steps at which they are recorded: those that a resumed run has
    recorded after its checkpoint, and all of them if the run repeats another one.
    """

    def __init__(self, trainer: "Trainer") -> None:
        self.trainer, self.run = trainer, trainer.run
        self.result: Result = trainer.run.result
        path, events = self.run.metrics.path, self.run.metrics.events
        self.place = None if path is None else path.with_name(INBOX)  # None on the other ranks, and in a plan
        done = (*map(tuple, self.result.events),)
        self.repeats = [e for e in events if e[1].startswith(REPEATED) and e[0] >= self.result.steps and e not in done]

    def n_due(self, step: int) -> int:
        """The number of commands to follow after a step, as the first rank sees it."""
        return sum(at <= step for at, _ in self.repeats) + (0 if self.place is None else len(waiting(self.place)))

    def follow(self, quickly: bool = False) -> None:
        """Follow the commands that are due after the last step; if `quickly`, because a signal came, only those that
        repeat events. All ranks must call this."""
        step = self.result.steps
        due = [Command(*text.split(" ", 1)) for at, text in self.repeats if at <= step]
        self.repeats = [event for event in self.repeats if event[0] > step]
        if self.place is not None and not quickly:
            due += take(self.place)
        due.sort(key=lambda command: [*ACTIONS].index(command.action))
        for command in self.run.fabric.broadcast(due):
            try:
                command.check()
                text, failed = getattr(self, command.action)(command), False
            except UserError as e:
                text, failed = str(e), True
            self.answer(command, text, failed)
            if command.action != "eval" or failed:  # the screen shows a validation by itself
                self.run.screen.say(f"{self.position} | {text}")

    def answer(self, command: Command, text: str, failed: bool = False) -> None:
        if self.place is not None:
            answer(self.place, command, f"{self.position} | {text}", failed)

    @property
    def position(self) -> str:
        return self.trainer.plan.position(self.result)

    def record(self, command: Command) -> None:
        """Record what happens after the last step. What is repeated is in the metrics already."""
        event = self.result.steps, command.action + f" {command.rate!r}" * (command.action == "lr")
        self.result.events.append(event)
        if command.name is not None:
            self.run.metrics.write_event(*event)
            self.repeats = timeline([*self.repeats, event])[1:]

    def lr(self, command: Command) -> str:
        train, before = self.run.train, self.run.peak_lr
        if train.min_lr > command.rate and train.lr_schedule != "constant":
            raise UserError(f"lr {command.rate:g} is below --train.min_lr {train.min_lr:g}.")
        self.record(command)
        set_rate(self.run)
        rate = self.trainer.next_rate()
        return f"peak learning rate {before:g} -> {command.rate:g}; the next step has {rate:.2e} ({train.lr_schedule})"

    def sample(self, command: Command) -> str:
        ids, text = self.run.examples.encode(command.value or ""), None
        if not 0 < len(ids) < (limit := self.run.base_model.config.block_size):
            raise UserError(f"The prompt has {len(ids):,} tokens; the model can answer at most {limit - 1:,}.")
        with spared("Cannot answer the prompt", self.run.fabric.world_size):
            text = self.run.examples.complete([ids])[0]
        if text is None:
            raise UserError("The prompt could not be answered. The output of the run says why.")
        self.record(command)
        return f"sample: {command.value}\n  -> {text}"

    def eval(self, command: Command) -> str:
        if not len(self.trainer.val_rows):
            raise UserError("The run has no validation rows.")
        loss = self.trainer.evaluate(lambda: self.record(command))
        return f"validation loss {loss:.4f}, best {self.result.best:.4f}"

    def save(self, command: Command) -> str:
        self.record(command)
        return f"saved {self.trainer.save_step()}"

    def stop(self, command: Command) -> NoReturn:
        self.record(command)
        self.run.screen.say(f"{self.position} | stop")
        self.run.signals.code = CODES[signal.SIGTERM]
        try:
            self.trainer.stop()
        except Stopped:
            self.answer(command, f"stopped. {resume_hint(self.run.out_dir)}")
            raise


def set_rate(run: "Run") -> None:
    """Give a run the peak learning rate of its last event that changed it, if there is one."""
    for step, text in run.result.events:
        if text.startswith("lr"):
            run.peak_lr, run.rate_origin = float(text.split()[1]), f"set by litgpt ctl at step {step:,}"
