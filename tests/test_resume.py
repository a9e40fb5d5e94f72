"""A run that was stopped and goes on gives the numbers of one that was not, bit for bit."""

import json
import os
import random
import shutil
import signal
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from litgpt.__main__ import main
from litgpt.errors import UserError
from litgpt.storage.outputs import SINGLE, SUMS, new_folder, write_single, write_sums
from litgpt.train.inbox import INBOX
from litgpt.train.loop import Trainer
from litgpt.train.metrics import FIELDS, lines_until
from litgpt.train.optimizers import AdamW
from litgpt.train.resume import state as states
from litgpt.train.resume.find import to_resume
from litgpt.train.resume.folder import taken
from litgpt.train.resume.state import STATE, damage
from tests.conftest import some
from tests.runs import METHODS, Processes, go, lines, same, start, words


@pytest.mark.parametrize("method", some(METHODS, "lora", "full", "nf4", "adapter_v2-muon", "full-packs", "lora-bf16"))
def test_paused_and_resumed(method, whole, base, rows_file, tmp_path):
    """Two pauses: in the middle of an epoch where a validation is due (4), and later."""
    if "--quantize" in METHODS[method] or "8bit" in method:
        pytest.importorskip("bitsandbytes")
    out = tmp_path / "out"
    assert go(method, base, rows_file, out, "--train.pause_after", 4) == 75
    assert not (out / "final").exists() and damage(out / "step-000004") is None
    assert go(method, base, rows_file, out, "--resume", "true", "--train.pause_after", 5) == 75
    assert go(method, base, rows_file, out, "--resume", "auto") == 0
    same(out, whole(method))
    assert len(lines(out)) == 12 + 4  # validations after 0, 4, 8 and 12


# killed


@pytest.fixture(scope="module")
def processes() -> Iterator[Processes]:
    made = Processes()
    yield made
    made.close()


def kill_until_done(processes: Processes, command: list[str], out: Path, kills: int) -> int:
    """Kill a run at random moments after it wrote its first line, up to so many times. Returns how often it was."""
    draw, done, log = random.Random(0), 0, out.with_name("log")
    while True:
        before = size(out)
        process = processes.start(command, log)
        if done < kills:
            until = time.monotonic() + 60
            while size(out) == before and not (out / "final").exists() and time.monotonic() < until:
                time.sleep(0.002)
            time.sleep(draw.random() * 0.25)
            if not (out / "final").exists():
                os.kill(process, signal.SIGKILL)
        code = processes.wait()
        done += code == -signal.SIGKILL
        assert code in (0, -signal.SIGKILL), log.read_text()
        if code == 0:
            return done


def size(out: Path) -> int:
    return (out / "metrics.csv").stat().st_size if (out / "metrics.csv").is_file() else 0


FORTY = ["--train.max_steps", 40, "--train.save_interval", 3, "--eval.interval", 7, "--train.save_best", "true"]


@pytest.mark.parametrize("method", some(["full", "nf4"], "full"))
def test_killed_again_and_again(method, processes, base, rows_file, tmp_path):
    if method == "nf4":
        pytest.importorskip("bitsandbytes")
    killed_again_and_again(processes, method, base, rows_file, tmp_path, kills=2)


@pytest.mark.long
@pytest.mark.parametrize("method", METHODS)
def test_killed_ten_times(method, processes, base, rows_file, tmp_path):
    if "--quantize" in METHODS[method] or "8bit" in method:
        pytest.importorskip("bitsandbytes")
    killed_again_and_again(processes, method, base, rows_file, tmp_path, kills=10)


def killed_again_and_again(processes: Processes, method: str, base: Path, rows: Path, folder: Path, kills: int) -> None:
    assert go(method, base, rows, folder / "whole", *FORTY) == 0
    command = words(method, base, rows, folder / "out", *FORTY, "--resume", "true")
    done = kill_until_done(processes, command, folder / "out", kills)
    print(f"{method}: {done} kills")
    assert done >= kills / 2
    same(folder / "out", folder / "whole")
    assert not [p.name for p in (folder / "out").glob(".*") if p.name not in (".lock", SINGLE)], (
        "a killed writer's folder is left"
    )


@pytest.mark.long
def test_two_devices(base, rows_file, tmp_path, capsys):
    devices = ["--devices", 2, "--train.pause_after"]
    runs = {"whole": [(99, 0, [])], "out": [(5, 75, []), (99, 0, ["--resume", "true"])]}
    for name, parts in runs.items():
        for pause, code, flags in parts:
            process = start("lora", base, rows_file, tmp_path / name, *devices, pause, *flags)
            said = process.communicate(timeout=300)[0]
            assert process.returncode == code, said
            assert "Traceback" not in said
    same(tmp_path / "out", tmp_path / "whole")
    assert go("lora", base, rows_file, tmp_path / "out", "--resume", "true", "--train.max_steps", 13) == 2
    error = capsys.readouterr().err
    assert "--resume: " in error and "the number of devices was 2, is now 1" in error


# where a run goes on


@pytest.fixture
def paused(base: Path, rows_file: Path, tmp_path: Path) -> Path:
    """A run that was paused after 7 of 12 steps, with checkpoints after 5 and 7."""
    assert go("lora", base, rows_file, tmp_path / "out", "--train.pause_after", 7) == 75
    return tmp_path / "out"


@pytest.mark.parametrize("where", ["true", "auto", "folder", "checkpoint", "elsewhere"])
def test_what_resume_takes(where, paused, whole, base, rows_file, capsys):
    out, value = paused, where
    if where == "folder":
        value = str(paused)
    elif where == "checkpoint":
        value = str(paused / "step-000007")
    elif where == "elsewhere":
        out, value = paused.with_name("another"), str(paused / "step-000005")
    assert go("lora", base, rows_file, out, "--resume", value) == 0
    printed = capsys.readouterr().out
    assert f"Resuming from {paused / ('step-000005' if where == 'elsewhere' else 'step-000007')}." in printed
    same(out, whole("lora"))
    if where == "elsewhere":
        assert len(lines(paused)) == 7 + 2, "the run that it came from has changed"


def test_best_is_a_checkpoint_too(base, rows_file, tmp_path, whole, capsys):
    flags = ["--train.save_interval", "null", "--train.save_best", "true"]
    assert go("lora", base, rows_file, tmp_path / "out", *flags, "--train.pause_after", 9) == 75
    best = min(lines(tmp_path / "out")[1:], key=lambda line: float(line["val_loss"] or "inf"))["step"]
    assert json.loads((tmp_path / "out" / "best" / SUMS).read_text())["step"] == int(best)
    shutil.rmtree(tmp_path / "out" / "step-000009")
    assert go("lora", base, rows_file, tmp_path / "out", *flags, "--resume", "true") == 0
    assert f"Resuming from {tmp_path / 'out' / 'best'}." in capsys.readouterr().out
    same(tmp_path / "out", whole("lora"))
    main(["generate", str(tmp_path / "out" / "best"), "--max_new_tokens", "1", "--accelerator", "cpu"])
    main(["merge_lora", str(tmp_path / "out" / "best")])
    assert go("lora", base, rows_file, tmp_path / "out", "--overwrite", "true", "--train.max_steps", 1) == 0
    assert not (tmp_path / "out" / "best").exists(), "that of the earlier run is left"


def test_an_older_checkpoint_beside_newer_ones_is_refused(paused, base, rows_file, capsys):
    assert go("lora", base, rows_file, paused, "--resume", paused / "step-000005") == 2
    error = capsys.readouterr().err
    assert "newer checkpoints (step-000007)" in error and error.count("\n") == 1


def test_a_folder_of_another_run_is_refused(paused, whole, base, rows_file, tmp_path, capsys):
    shutil.copytree(whole("full"), tmp_path / "full")
    assert go("lora", base, rows_file, tmp_path / "full", "--resume", paused) == 2
    assert "contains another run" in capsys.readouterr().err
    assert lines(tmp_path / "full") == lines(whole("full"))


def test_afresh_where_nothing_is(base, rows_file, tmp_path, whole, capsys):
    assert go("lora", base, rows_file, tmp_path / "out", "--resume", "auto") == 0
    assert f"{tmp_path / 'out'} has no complete checkpoint." in capsys.readouterr().out
    same(tmp_path / "out", whole("lora"))
    for value, message in ((tmp_path / "nowhere", "no such folder"), (tmp_path, "no complete checkpoint")):
        assert go("lora", base, rows_file, tmp_path / "new", "--resume", value) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
        assert not (tmp_path / "new").exists()


def test_killed_before_the_first_checkpoint(base, rows_file, tmp_path, whole):
    """Only the settings, a line and a half of metrics."""
    out = tmp_path / "out"
    out.mkdir()
    write_single(out / "hyperparameters.yaml", "seed: 3\n")
    write_single(out / "metrics.csv", ",".join(FIELDS) + "\n")
    with open(out / "metrics.csv", "a") as f:
        f.write("0,,,,5.0,0,0.0,,\n1,0.")
    assert go("lora", base, rows_file, out) == 2
    assert go("lora", base, rows_file, out, "--resume", "true") == 0
    same(out, whole("lora"))


def test_a_finished_run(whole, base, rows_file, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(whole("lora"), out)
    before = (out / "metrics.csv").read_bytes()
    # settings that the original has with another out_dir, and one that changes no number
    assert go("lora", base, rows_file, out, "--resume", "true", "--train.log_interval", 2) == 0
    assert f"{out} is finished. Its result is {out / 'final'}." in capsys.readouterr().out
    assert (out / "metrics.csv").read_bytes() == before
    assert go("lora", base, rows_file, out, "--resume", "true", "--seed", 8) == 2
    assert "--seed was 1337, is now 8" in capsys.readouterr().err
    for step in out.glob("step-*"):
        shutil.rmtree(step)
    assert go("lora", base, rows_file, out, "--resume", "true", "--seed", 8) == 2
    assert "--seed was 1337, is now 8" in capsys.readouterr().err
    assert (out / "final").is_dir() and (out / "metrics.csv").read_bytes() == before
    (out / "final" / "hyperparameters.yaml").write_text("a: [")
    assert go("lora", base, rows_file, out, "--resume", "true") == 2  # whose it is cannot be told


# what changed


def test_changed_settings_are_named(paused, base, rows_file, capsys):
    flags = ["--resume", "true", "--train.global_batch_size", 4, "--lora_dropout", 0.3, "--eval.interval", 3]
    assert go("lora", base, rows_file, paused, *flags) == 2
    error = capsys.readouterr().err
    assert "--lora_dropout was 0.2, is now 0.3; --train.global_batch_size was 8, is now 4." in error
    assert "--resume_with_changes true" in error and error.count("\n") == 1 and "eval" not in error
    assert go("lora", base, rows_file, paused, *flags, "--resume_with_changes", "true") == 0
    assert "Changed since the checkpoint: --lora_dropout was 0.2, is now 0.3" in capsys.readouterr().out
    assert "lora_dropout: 0.3" in (paused / "hyperparameters.yaml").read_text()


def test_a_checkpoint_of_an_earlier_release(paused, whole, base, rows_file):
    """It has a part of the progress by another name."""
    checkpoint = paused / "step-000007"
    state = torch.load(checkpoint / STATE, weights_only=True)
    state["progress"]["judged"] = state["progress"].pop("last_eval_step")
    torch.save(state, checkpoint / STATE)
    write_sums(checkpoint, step=7)
    assert go("lora", base, rows_file, paused, "--resume", "true") == 0
    same(paused, whole("lora"))


def test_changed_rows_are_named(paused, base, rows_file, tmp_path, capsys):
    rows = json.loads(rows_file.read_text())
    rows[3]["output"] += " again"
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    assert go("lora", base, tmp_path / "rows.json", paused, "--resume", "true") == 2
    assert "the training rows (rows, tokens, checksum) was [36," in capsys.readouterr().err


def test_options_of_the_optimizer_change_and_another_one_begins_anew(paused, base, rows_file, monkeypatch, capsys):
    seen: list[torch.optim.Optimizer] = []
    fit = Trainer.fit

    def watched(self):
        seen.append(self.optimizer)
        found = self.optimizer.state_dict()
        seen.append(([{**g} for g in found["param_groups"]], len(found["state"])))
        return fit(self)

    monkeypatch.setattr(Trainer, "fit", watched)
    changed = ["--resume", "true", "--resume_with_changes", "true", "--train.pause_after", 1]
    assert go("lora", base, rows_file, paused, *changed, "--optimizer.weight_decay", 0.5) == 75
    groups, states = seen[1]
    assert groups[0]["weight_decay"] == 0.5 and groups[0]["lr"] == 0.01 and states > 0
    assert go("lora", base, rows_file, paused, *changed, "--optimizer", "SGD") == 75
    assert seen[3][1] == 0
    assert "The optimizer starts without state" in capsys.readouterr().out


# damage


def flip(file: Path) -> None:
    bits = bytearray(file.read_bytes())
    bits[len(bits) // 2] ^= 1
    file.write_bytes(bits)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut": (lambda p: os.truncate(p / STATE, 100), f"{STATE} has 100 bytes instead of"),
    "flipped": (lambda p: flip(p / "adapter_model.safetensors"), "adapter_model.safetensors has changed"),
    "missing": (lambda p: (p / STATE).unlink(), f"{STATE} is missing"),
    "no list": (lambda p: (p / SUMS).unlink(), f"{SUMS} cannot be used"),
    "half a list": (lambda p: os.truncate(p / SUMS, 60), f"{SUMS} cannot be used"),
    "another list": (lambda p: (p / SUMS).write_text("[1]"), f"{SUMS} cannot be used"),
    "sums of text": (
        lambda p: (p / SUMS).write_text('{"step": 7, "files": {"a": [1, "x"]}}'),
        f"{SUMS} cannot be used",
    ),
    "files in a list": (lambda p: (p / SUMS).write_text('{"step": 7, "files": ["a"]}'), f"{SUMS} cannot be used"),
    "no step": (lambda p: (p / SUMS).write_text('{"step": "x", "files": {}}'), f"{SUMS} cannot be used"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over(kind, paused):
    do, message = DAMAGES[kind]
    do(paused / "step-000007")
    checkpoint, said = to_resume(paused, True)
    assert checkpoint == paused / "step-000005"
    assert f"{paused / 'step-000007'}, which is damaged: {message}" in said[0]


# a state that is whole, and not of this run, or not of our making; by what is said


def put(value: object, *path: object) -> Callable[[dict], object]:
    """Set the value at a path into nested dictionaries and lists."""

    def change(state: dict) -> None:
        *above, last = path
        for key in above:
            state = state[key]
        state[last] = value

    return change


FIRST = "transformer.h.0.attn.qkv.lora_A"
FOREIGN: dict[str, tuple[Callable[[dict], object], str]] = {
    "a list": (lambda s: s.clear(), "trained"),
    "no weights": (lambda s: s.pop("trained"), "trained"),
    "another part": (put(1, "more"), "more"),
    "weights in a list": (put([1.0], "trained", FIRST), "trained"),
    "a weight is missing": (lambda s: s["trained"].pop(FIRST), FIRST),
    "a weight of others": (put(torch.ones(1), "trained", "wte.lora_A"), "wte.lora_A"),
    "a weight of another shape": (put(torch.ones(3, 2), "trained", FIRST), FIRST),
    "no groups": (lambda s: s["optimizer"].pop("param_groups"), "optimizer"),
    "groups of text": (put("lr", "optimizer", "param_groups"), "optimizer"),
    "another number of groups": (lambda s: s["optimizer"]["param_groups"].clear(), "optimizer"),
    "fewer weights": (lambda s: s["optimizer"]["param_groups"][0]["params"].pop(), "optimizer"),
    "a weight that nobody has": (put({"step": 1}, "optimizer", "state", 99), "optimizer"),
    "moments of another shape": (put(torch.ones(1), "optimizer", "state", 0, "exp_avg"), "exp_avg"),
    "moments that are none": (put("x", "optimizer", "state", 0, "exp_avg_sq"), "exp_avg_sq"),
    "states by name": (put({}, "optimizer", "state", "a"), "optimizer"),
    "no generators": (put([{}], "random"), "random"),
    "a short generator": (put(torch.zeros(3, dtype=torch.uint8), "random", 0, "cpu"), "random"),
    "a generator of floats": (put(torch.zeros(5056), "random", 0, "cpu"), "random"),
    "a generator of nowhere": (put(torch.zeros(3, dtype=torch.uint8), "random", 0, "rounding-tpu"), "random"),
    "no progress": (put({}, "progress"), "steps"),
    "steps of text": (put("7", "progress", "steps"), "steps"),
    "unknown progress": (put(1, "progress", "height"), "height"),
    "validations without losses": (put([3], "progress", "val_losses"), "val_losses"),
    "options of text": (put("lr", "progress", "options"), "options"),
    "options of other groups": (put([], "progress", "options"), "optimizer"),
    "precision of text": (put({"scale": "x"}, "progress", "precision"), "precision"),
    "settings by number": (put(1, "settings", 1), "settings"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_state_that_is_not_of_this_run(kind, paused_once, base, rows_file, tmp_path, capsys):
    """One line, whatever the file holds: sizes and sums are right."""
    out = tmp_path / "out"
    shutil.copytree(paused_once, out)
    checkpoint = out / "step-000003"
    state = torch.load(checkpoint / STATE, weights_only=True)
    change, named = FOREIGN[kind]
    change(state)
    torch.save([state] if kind == "a list" else state, checkpoint / STATE)
    write_sums(checkpoint, step=3)
    assert go("lora", base, rows_file, out, "--resume", "true") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and (named in error or kind == "a list"), error
    assert "does not match this run" in error or STATE in error


@pytest.fixture(scope="module")
def paused_once(base, rows_file, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("paused") / "out"
    assert go("lora", base, rows_file, out, "--train.pause_after", 3) == 75
    return out


@pytest.mark.parametrize("error", [AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError])
@pytest.mark.parametrize("where", ["save.put", "save.Saver.sharded", "save.set_random_state", "state.checksum"])
def test_errors_of_the_code_are_not_put_down_to_the_checkpoint(
    error, where, paused_once, base, rows_file, tmp_path, monkeypatch
):
    def fail(*args, **kwargs):
        raise error("this is a bug")

    shutil.copytree(paused_once, tmp_path / "out")
    monkeypatch.setattr(f"litgpt.train.resume.{where}", fail)
    with pytest.raises(error, match="this is a bug"):
        go("lora", base, rows_file, tmp_path / "out", "--resume", "true")


def test_goes_on_with_an_older_one_or_afresh(paused, whole, base, rows_file, capsys):
    DAMAGES["cut"][0](paused / "step-000007")
    assert (
        go("lora", base, rows_file, paused, "--resume", "true", *"--train.pause_after 1 --train.keep_last 1".split())
        == 75
    )
    printed = capsys.readouterr().out
    assert "step-000007, which is damaged" in printed and f"Saved {paused / 'step-000006'}." in printed
    assert {p.name for p in paused.glob("*step*")} == {"step-000006", "damaged-step-000007"}
    for step in paused.glob("step-*"):
        flip(step / STATE)
    assert go("lora", base, rows_file, paused, "--resume", paused) == 2
    assert "damaged" in capsys.readouterr().err
    assert go("lora", base, rows_file, paused, "--resume", "true") == 0
    assert "Starting from the beginning" in capsys.readouterr().out
    same(paused, whole("lora"))
    assert {p.name for p in paused.glob("damaged-*")} == {f"damaged-step-00000{n}" for n in (6, 7)}


def test_later_lines_and_a_half_one_are_cut_off(paused, whole, base, rows_file):
    with open(paused / "metrics.csv", "a") as f:
        f.write("8,1.7,9.9,0.1,,2000,9.0,100.0,1000\n8,,,,9.9,2000,9.0,,\n9,1.8,9.")
    assert go("lora", base, rows_file, paused, "--resume", "true") == 0
    same(paused, whole("lora"))


def test_a_validation_that_the_checkpoint_does_not_know_is_cut_off(tmp_path):
    def line(step: int, **values: object) -> str:
        return ",".join(str({"step": step, **values}.get(k, "")) for k in FIELDS) + "\n"

    text = [",".join(FIELDS) + "\n", line(0, val_loss=5), line(4, loss=1), line(4, val_loss=4), line(5, loss=2)]
    (tmp_path / "m.csv").write_text("".join(text) + "6,0.5\n5,")
    kept = lines_until(tmp_path / "m.csv", 4, last_eval_step=0)
    assert [(row["step"], row["loss"], row["val_loss"]) for row in kept] == [("0", "", "5"), ("4", "1", "")]
    assert len(lines_until(tmp_path / "m.csv", 4, last_eval_step=4)) == 3
    assert len(lines_until(tmp_path / "m.csv", 5, last_eval_step=4)) == 4


# keeping


def test_keep_last_and_save_best(base, rows_file, tmp_path):
    flags = ["--train.save_interval", 2, "--train.keep_last", 2, "--train.save_best", "true", "--eval.interval", 3]
    assert go("lora", base, rows_file, tmp_path / "out", *flags) == 0
    found = {p.name for p in (tmp_path / "out").iterdir() if p.is_dir()}
    assert found == {"step-000010", "step-000012", "best", "final"}  # the last one is always kept
    assert damage(tmp_path / "out" / "best") is None
    out = tmp_path / "all"
    assert go("lora", base, rows_file, out, "--train.save_interval", 2) == 0
    assert len(list(out.glob("step-*"))) == 6 and not (out / "best").exists()


def test_early_stopping_is_carried_on(base, rows_file, tmp_path):
    flags = ["--eval.interval", 1, "--eval.early_stopping_patience", 4, "--optimizer.lr", 1e-12]
    flags += ["--train.min_lr", 0, "--lora_dropout", 0]  # what is learned is lost in rounding: no loss is a new best
    assert go("lora", base, rows_file, tmp_path / "whole", *flags) == 0
    steps = int(lines(tmp_path / "whole")[-1]["step"])
    assert steps < 11
    assert go("lora", base, rows_file, tmp_path / "out", *flags, "--train.pause_after", steps - 1) == 75
    assert go("lora", base, rows_file, tmp_path / "out", *flags, "--resume", "true") == 0
    same(tmp_path / "out", tmp_path / "whole")


def test_limits_of_tokens_are_carried_on(base, rows_file, tmp_path):
    flags = ["--train.max_tokens", 7500]
    assert go("lora", base, rows_file, tmp_path / "whole", *flags) == 0
    assert 4 < int(lines(tmp_path / "whole")[-1]["step"]) < 12
    assert go("lora", base, rows_file, tmp_path / "out", *flags, "--train.pause_after", 3) == 75
    assert go("lora", base, rows_file, tmp_path / "out", *flags, "--resume", "true") == 0
    same(tmp_path / "out", tmp_path / "whole")


@pytest.mark.parametrize(("value", "code"), [("0", 2), ("-1", 2), ("x", 2), ("1.5", 2), ("12", 75), ("13", 0)])
def test_odd_pauses(value, code, whole, base, rows_file, tmp_path, capsys):
    assert go("lora", base, rows_file, tmp_path / "out", "--train.pause_after", value) == code
    if code == 2:
        error = capsys.readouterr().err
        assert "--train.pause_after" in error and error.count("\n") == 1 and not (tmp_path / "out").exists()
    elif code == 75:
        assert lines(tmp_path / "out")[-1]["step"] == "12" and not (tmp_path / "out" / "final").exists()
        assert go("lora", base, rows_file, tmp_path / "out", "--resume", "true") == 0
        same(tmp_path / "out", whole("lora"))


# writers that are killed


@pytest.mark.parametrize("at", ["before", "between", "after"])
def test_a_replaced_folder_is_never_lost(at, tmp_path, monkeypatch):
    """Killed at each of the renames that put a new folder in the place of an old one."""
    for text in ("old", "new"):
        if text == "new":
            rename, renamed = Path.rename, []

            def killed(self, target, rename=rename, renamed=renamed):
                if len(renamed) == ("before", "between").index(at):
                    raise SystemExit
                renamed.append(target)
                return rename(self, target)

            if at != "after":
                monkeypatch.setattr(Path, "rename", killed)
            monkeypatch.setattr(shutil, "rmtree", lambda *a, **k: None)  # nor is anything tidied up
            monkeypatch.setattr("litgpt.storage.outputs.put_back", lambda *a: None)
        try:
            with new_folder(tmp_path / "best") as folder:
                (folder / "text").write_text(text)
        except SystemExit:
            pass
    monkeypatch.undo()
    assert any(p.name.startswith(".best.") for p in tmp_path.iterdir())
    with taken(tmp_path):
        assert (tmp_path / "best" / "text").read_text() == ("new" if at == "after" else "old")
        assert {p.name for p in tmp_path.iterdir()} == {"best", ".lock", INBOX}


def test_two_runs_in_one_folder(base, rows_file, tmp_path, capsys):
    out = tmp_path / "out"
    with taken(out):
        for flags in ([], ["--overwrite", "true"], ["--resume", "true"]):
            assert go("lora", base, rows_file, out, *flags) == 2
            error = capsys.readouterr().err
            assert f"--out_dir {out}: another process is writing there." in error and error.count("\n") == 1
    runs = [start("lora", base, rows_file, out) for _ in range(2)]
    said = [run.communicate(timeout=300)[0] for run in runs]
    assert sorted(run.returncode for run in runs) == [0, 2], said
    assert any("another" in text or "finished run" in text for text in said)
    assert len(lines(out)) == 12 + 4


def test_sharded_state_is_gathered_and_written_one_tensor_at_a_time(tmp_path, monkeypatch):
    """So the first device never holds the optimizer's state of the whole model."""
    held: list[weakref.ref] = []

    def gather(tensor: torch.Tensor) -> torch.Tensor:
        assert all(reference() is None for reference in held[:-1]), "only the last one may still be in memory"
        full = tensor.clone()
        held.append(weakref.ref(full))
        return full

    monkeypatch.setattr(states, "is_sharded", lambda value: torch.is_tensor(value) and value.ndim > 0)
    monkeypatch.setattr(states, "full_tensor", gather)
    params = [torch.nn.Parameter(torch.randn(n, 3)) for n in (2, 5)]
    params.append(torch.nn.Parameter(torch.randn(7).bfloat16()))
    optimizer = AdamW(params)
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer.step()
    written = states.TrainingState({}, optimizer.state_dict(), [states.random_state(torch.device("cpu"))], {}, {})
    written.write(tmp_path)
    assert len(held) == 6 and (tmp_path / states.STATE).stat().st_size < 20_000
    state = states.TrainingState.read(tmp_path, mmap=True)
    expected = optimizer.state_dict()
    assert state.optimizer.keys() == expected.keys() and state.optimizer["state"].keys() == expected["state"].keys()
    for n, values in expected["state"].items():
        assert state.optimizer["state"][n].keys() == values.keys()
        assert all(torch.equal(state.optimizer["state"][n][k], v) for k, v in values.items())
    AdamW(params).load_state_dict(state.optimizer)

    file = tmp_path / states.SHARDED_STATE
    for spoil in (lambda: file.write_bytes(file.read_bytes()[:-8]), file.unlink):
        spoil()
        with pytest.raises(UserError, match=r"optimizer\.safetensors cannot be read"):
            states.TrainingState.read(tmp_path)
