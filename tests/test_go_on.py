"""Training goes on: from an adapter, beyond the end of a finished run, and in the style of a result."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file, save_file

from litgpt.__main__ import main
from litgpt.data import JSON
from litgpt.errors import UserError
from litgpt.finetune import lora
from litgpt.methods.adapter_folder import open_adapter
from litgpt.methods.model_source import ModelSource
from litgpt.train.args import EvalArgs, TrainArgs, run_flags, run_settings, run_words
from litgpt.train.loop import Trainer
from tests import test_peft_embeddings
from tests.runs import go, lines, same, start
from tests.test_families import CPU, assert_close
from tests.test_peft_embeddings import IDS, adapter_of_peft, resized

bases = test_peft_embeddings.bases

KINDS = {  # of the adapter, and of the run that continues it
    "lora": "lora",
    "rslora": "lora",
    "dora": "lora",
    "pissa": "lora",
    "lora-embeddings": "lora",
    "nf4": "nf4",
    "adapter": "adapter",
    "adapter-int8": "adapter-int8",
    "adapter_v2": "adapter_v2",
}
ONE = ("--train.max_steps", 1)
NOTHING = (*ONE, "--optimizer.lr", 0, "--optimizer.weight_decay", 0)  # is learned


def val_losses(out: Path) -> list[float]:
    return [float(line["val_loss"]) for line in lines(out) if line["val_loss"]]


def refused(capsys: pytest.CaptureFixture, *args: object) -> str:
    capsys.readouterr()
    assert go(*args) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error


# from an adapter


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_is_trained_further(kind, whole, base, rows_file, tmp_path):
    if kind in ("nf4", "adapter-int8"):
        pytest.importorskip("bitsandbytes")
    first, out = whole(kind) / "final", tmp_path / "out"
    assert go(KINDS[kind], first, rows_file, out, "--train.max_steps", 3) == 0
    before, after = val_losses(out)
    assert before == pytest.approx(val_losses(whole(kind))[-1], abs=1e-5) and after != before
    ours, theirs = open_adapter(out / "final"), open_adapter(first)
    assert (ours.base, ours.shapes, ours.description) == (theirs.base, theirs.shapes, theirs.description)
    weights = [load_file(folder / "adapter_model.safetensors") for folder in (first, out / "final")]
    assert all(not torch.equal(weights[0][name], t) for name, t in weights[1].items()), "not all of it is trained"


@pytest.mark.parametrize("kind", ["dora", "lora-embeddings", "adapter_v2"])
def test_such_a_run_resumes(kind, whole, base, rows_file, tmp_path):
    first = whole(kind) / "final"
    for out, pauses in ((tmp_path / "whole", []), (tmp_path / "out", [2])):
        for pause in pauses:
            assert go(KINDS[kind], first, rows_file, out, "--train.max_steps", 4, "--train.pause_after", pause) == 75
        assert go(KINDS[kind], first, rows_file, out, "--train.max_steps", 4, "--resume", "true") == 0
    same(tmp_path / "out", tmp_path / "whole")


def test_the_base_is_given(whole, base, rows_file, tmp_path, capsys):
    """For an adapter whose record is wrong, and for one without a record."""
    adapter = shutil.copytree(whole("lora") / "final", tmp_path / "adapter")
    fields = json.loads((adapter / "adapter_config.json").read_text())
    for recorded in ("nowhere/at-all", None):
        fields["base_model_name_or_path"] = recorded
        (adapter / "adapter_config.json").write_text(json.dumps(fields))
        error = refused(capsys, "lora", adapter, rows_file, tmp_path / "out", *ONE)
        assert f"--initial_adapter {adapter}" in error and error.count("\n") == 1
    assert go("lora", base, rows_file, tmp_path / "out", *ONE, "--initial_adapter", adapter) == 0
    assert val_losses(tmp_path / "out")[0] == val_losses(whole("lora"))[-1]
    assert open_adapter(tmp_path / "out" / "final").base == str(base)
    assert "needs a base" in refused(capsys, "lora", adapter, rows_file, tmp_path / "b", "--initial_adapter", adapter)
    assert "not an adapter" in refused(capsys, "lora", base, rows_file, tmp_path / "b", "--initial_adapter", base)


CONTRADICTIONS = [
    ("lora", ["--lora_r", 4], "--lora_r 4, but it has 8"),
    ("lora", ["--lora_alpha", 8], "--lora_alpha 8"),
    ("lora", ["--lora_variant", "dora"], "--lora_variant dora"),
    ("dora", ["--lora_variant", "lora"], "--lora_variant lora"),
    ("lora", ["--lora_init", "pissa"], "--lora_init pissa"),
    ("lora", ["--lora_mlp", "true"], "--lora_mlp true, but it updates q_proj, v_proj"),
    ("lora", ["--lora_layers", "[0]"], "--lora_layers [0]"),
    ("lora", ["--lora_targets", "k_proj"], "--lora_targets k_proj"),
    ("pissa", ["--lora_r", 8], "--lora_r 8, but it has 16"),  # a default that is typed
    ("lora-embeddings", ["--train_embeddings", "false"], "--train_embeddings false"),
    ("adapter", ["--adapter_prompt_length", 5], "--adapter_prompt_length 5, but it has 10"),
    ("adapter_v2", ["--adapter_start_layer", 1], "--adapter_start_layer 1, but it has 2"),
]


@pytest.mark.parametrize(("kind", "flags", "named"), CONTRADICTIONS)
def test_options_that_contradict_the_adapter(kind, flags, named, whole, rows_file, tmp_path, capsys):
    error = refused(capsys, KINDS[kind], whole(kind) / "final", rows_file, tmp_path / "out", *flags)
    assert named in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("kind", "flags"),
    [
        ("lora", ["--lora_r", 8, "--lora_alpha", 16, "--lora_value", "true", "--lora_dropout", 0.5]),
        ("lora", ["--lora_targets", "q_proj|v_proj"]),
        ("rslora", ["--lora_r", 8, "--lora_variant", "rslora", "--lora_alpha", 16]),  # peft's alpha is another
        ("lora", ["--train_embeddings", "true"]),
        ("lora-embeddings", ["--train_embeddings", "true"]),
    ],
)
def test_options_that_agree_with_the_adapter(kind, flags, whole, rows_file, tmp_path):
    out = tmp_path / "out"
    assert go("lora", whole(kind) / "final", rows_file, out, *ONE, *flags) == 0
    assert val_losses(out)[0] == pytest.approx(val_losses(whole(kind))[-1], abs=1e-5)
    trained = any("embed_tokens" in name for name in open_adapter(out / "final").shapes)
    assert trained == ("--train_embeddings" in flags)


@pytest.mark.parametrize(
    ("method", "kind", "named"),
    [
        ("adapter", "lora", "litgpt finetune lora {}"),
        ("lora", "adapter_v2", "litgpt finetune adapter_v2 {}"),
        ("adapter", "adapter_v2", "litgpt finetune adapter_v2 {}"),
        ("adapter_v2", "adapter", "litgpt finetune adapter {}"),
        ("full", "adapter", "cannot be merged"),
    ],
)
def test_an_adapter_of_another_method(method, kind, named, whole, rows_file, tmp_path, capsys):
    folder = whole(kind) / "final"
    error = refused(capsys, method, folder, rows_file, tmp_path / "out")
    assert named.format(folder) in error and error.count("\n") == 1


@pytest.mark.parametrize("kind", ["lora", "dora", "lora-embeddings"])
def test_all_weights_of_an_adapted_model(kind, whole, base, rows_file, tmp_path):
    out = tmp_path / "out"
    assert go("full", whole(kind) / "final", rows_file, out, "--train.max_steps", 3, "--train.pause_after", 2) == 75
    assert go("full", whole(kind) / "final", rows_file, out, "--train.max_steps", 3, "--resume", "true") == 0
    assert val_losses(out)[0] == pytest.approx(val_losses(whole(kind))[-1], abs=1e-4)
    fields, of_base = (json.loads((folder / "config.json").read_text()) for folder in (out / "final", base))
    assert fields == of_base and not (out / "final" / "adapter_config.json").exists()


def test_the_folder_of_the_adapter_is_not_written_to(whole, rows_file, tmp_path, capsys):
    out = shutil.copytree(whole("lora"), tmp_path / "out")
    for flags in ([], ["--overwrite", "true"]):
        error = refused(capsys, "lora", out / "final", rows_file, out, *flags)
        assert f"such as {tmp_path / 'out-2'}" in error


def test_the_style_of_the_result(whole, base, rows_file, tmp_path, capsys):
    """Rows of any form are rendered in the style that the adapter was trained in; another one is remarked."""
    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}] * 20
    (tmp_path / "chats.json").write_text(json.dumps(rows))
    first = shutil.copytree(whole("lora") / "final", tmp_path / "first")
    assert yaml.safe_load((first / "prompt_style.yaml").read_text())["prompt_style"] == "alpaca"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (first / name).unlink()  # the base has them
    for method in ("lora", "full"):
        out = tmp_path / method
        assert go(method, first, tmp_path / "chats.json", out, *ONE) == 0
        assert (out / "final" / "prompt_style.yaml").read_text() == (first / "prompt_style.yaml").read_text()
    for words in ([first], [base, "--initial_adapter", first]):
        capsys.readouterr()
        main(["data_check", *map(str, words), str(tmp_path / "chats.json"), "--json"])
        assert json.loads(capsys.readouterr().out)["prompt_style"] == "alpaca"
    assert go("lora", first, rows_file, tmp_path / "other", *ONE, "--data.prompt_style", "phi-2") == 0
    assert "trained with the prompt style alpaca; these rows use phi-2" in capsys.readouterr().out


# adapters of peft

TRAINED_BY_PEFT = {
    "patterns": {
        "target_modules": ["q_proj", "down_proj"],
        "rank_pattern": {"q_proj": 5},
        "alpha_pattern": {"q_proj": 7},
    },
    "rslora": {"use_rslora": True, "rank_pattern": {"q_proj": 3}},
    "dora": {"use_dora": True, "target_modules": ["q_proj", "v_proj"]},
    "norms": {"modules_to_save": ["input_layernorm", "norm"]},
}
IN_FULL = ["resized and trained", "trained", "trained embedding", "trained head", "all biases"]
UNTRAINABLE = ["tokens", "LoRA"]


@pytest.fixture
def more_cases(monkeypatch):
    monkeypatch.setattr(test_peft_embeddings, "CASES", test_peft_embeddings.CASES | TRAINED_BY_PEFT)


@pytest.mark.parametrize(
    ("family", "case"),
    [
        *(("llama", case) for case in (*TRAINED_BY_PEFT, *IN_FULL)),
        *(("gemma", case) for case in ("trained embedding", "trained and tied", "resized and tied")),
        *(("gpt_neox", case) for case in ("all biases", "trained")),
        *((("gpt2", "all biases"), ("mixtral", "trained"))),
    ],
)
def test_adapters_of_peft(family, case, more_cases, bases, rows_file, tmp_path):
    """An update of nothing leaves the adapter as it is: `peft` reads the same model from the result."""
    base, folder, out = bases[family], tmp_path / "adapter", tmp_path / "out"
    theirs = adapter_of_peft(base, family, case, folder)
    expected = logits(theirs)
    own = ["--initial_adapter", folder, "--data.prompt_style", "none"]
    assert go("lora", base, rows_file, out, *own, *NOTHING) == 0
    more = expected.size(-1) - json.loads((base / "config.json").read_text())["vocab_size"]
    assert_close(logits(PeftModel.from_pretrained(resized(base, more), out / "final").eval()), expected, 1e-4)
    assert_close(ModelSource.open(out / "final", base).model(torch.float32, CPU)(IDS), expected, 1e-4)

    assert go("lora", base, rows_file, out, *own, *ONE, "--overwrite", "true", "--lora_dropout", 0) == 0
    before, after = (
        PeftModel.from_pretrained(resized(base, more), f, is_trainable=True) for f in (folder, out / "final")
    )
    trained = {name: p for name, p in after.named_parameters() if p.requires_grad}
    same_names = {name for name, p in before.named_parameters() if p.requires_grad}
    tied_head = {"base_model.model.lm_head.modules_to_save.default.weight"} if family == "gemma" else set()
    assert same_names <= trained.keys() <= same_names | tied_head  # of which peft would keep the base's
    assert (logits(after.eval()) - expected).abs().max() > 1e-3


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(IDS).logits


@pytest.mark.parametrize("case", UNTRAINABLE)
def test_what_cannot_be_trained_further(case, bases, rows_file, tmp_path, capsys):
    adapter_of_peft(bases["llama"], "llama", case, tmp_path / "adapter")
    flags = ["--initial_adapter", tmp_path / "adapter"]
    error = refused(capsys, "lora", bases["llama"], rows_file, tmp_path / "out", *flags)
    assert "model.embed_tokens" in error and f"litgpt merge_lora {tmp_path / 'adapter'}" in error
    assert error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_an_update_of_a_router_is_not_lost(bases, rows_file, tmp_path, capsys):
    adapter_of_peft(bases["mixtral"], "mixtral", "trained", tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    weights, gate = load_file(file), "base_model.model.model.layers.0.mlp.gate"
    weights |= {f"{gate}.lora_A.weight": torch.ones(2, 32), f"{gate}.lora_B.weight": torch.ones(4, 2)}
    save_file(weights, file)
    flags = ["--initial_adapter", tmp_path / "adapter"]
    error = refused(capsys, "lora", bases["mixtral"], rows_file, tmp_path / "out", *flags)
    assert "gate in a way that cannot be trained further" in error


# beyond the end

CONSTANT = ("--train.lr_schedule", "constant", "--train.max_steps", "null", "--train.lr_warmup_steps", 0)


@pytest.mark.parametrize("kind", ["lora", "adapter_v2"])
def test_a_finished_run_is_extended(kind, base, rows_file, tmp_path, capsys):
    """With a constant learning rate it becomes the longer run, bit for bit."""
    out, flags = tmp_path / "out", (*CONSTANT, "--train.global_batch_size", 12)  # 36 rows
    assert go(kind, base, rows_file, out, *flags, "--train.epochs", 2, "--train.save_interval", "null") == 0
    assert [p.name for p in out.glob("step-*")] == ["step-000006"], "the last state is always kept"
    capsys.readouterr()
    for said in ("Extending the finished run: --train.epochs was 2, is now 3.", "is finished"):
        assert go(kind, base, rows_file, out, *flags, "--train.epochs", 3, "--resume", "true") == 0
        assert said in capsys.readouterr().out
    assert go(kind, base, rows_file, tmp_path / "whole", *flags, "--train.epochs", 3) == 0
    same(out, tmp_path / "whole")


def test_an_extension_skips_no_row(base, rows_file, tmp_path, monkeypatch):
    """36 rows in steps of 8: the last step of the first run has 4 of them."""
    seen: list[int] = []
    count = Trainer.count_step
    monkeypatch.setattr(Trainer, "count_step", lambda self, rows, began: (seen.extend(rows), count(self, rows, began)))
    for epochs in (1, 2):
        assert go("lora", base, rows_file, tmp_path, *CONSTANT, "--train.epochs", epochs, "--resume", "true") == 0
        assert sorted(seen[-36:]) == list(range(36)) and len(seen) == 36 * epochs
    assert [line["epoch"] for line in lines(tmp_path) if line["epoch"]][4::5] == ["1.0", "2.0"]


def test_the_schedule_is_that_of_the_longer_run(whole, base, rows_file, tmp_path, capsys):
    out = shutil.copytree(whole("lora"), tmp_path / "out")
    assert go("lora", base, rows_file, out, "--resume", "true", "--train.max_steps", 24) == 0
    printed = capsys.readouterr().out
    assert go("lora", base, rows_file, tmp_path / "whole", "--train.max_steps", 24) == 0
    rates = [[line["lr"] for line in lines(folder) if line["lr"]] for folder in (out, tmp_path / "whole")]
    assert rates[0][12:] == rates[1][12:] and rates[0][:12] != rates[1][:12] and len(rates[0]) == 24
    assert [x for x in lines(out) if x["loss"]][:12] == [x for x in lines(whole("lora")) if x["loss"]]
    assert f"after step 12 of 24 with the learning rate of the longer schedule, {float(rates[0][12]):.2e}" in printed


def test_an_extension_is_stopped_and_resumed(whole, base, rows_file, tmp_path, capsys):
    for name, pauses in (("whole", []), ("out", [2, 1])):
        out = shutil.copytree(whole("dora"), tmp_path / name)
        for pause in pauses:
            flags = ["--resume", "true", "--train.max_steps", 16, "--train.pause_after", pause]
            assert go("dora", base, rows_file, out, *flags) == 75
        assert go("dora", base, rows_file, out, "--resume", "true", "--train.max_steps", 16) == 0
    same(tmp_path / "out", tmp_path / "whole")
    printed = capsys.readouterr().out
    assert printed.count("Extending the finished run") == 2


def test_a_stopped_extension_is_no_finished_run(whole, base, rows_file, tmp_path, capsys):
    out = shutil.copytree(whole("lora"), tmp_path / "out")
    assert go("lora", base, rows_file, out, "--resume", "true", "--train.max_steps", 20, "--train.pause_after", 1) == 75
    error = refused(capsys, "lora", base, rows_file, out, "--resume", "true")
    assert "--train.max_steps was 20, is now 12" in error
    error = refused(capsys, "lora", base, rows_file, out, "--resume", "true", "--train.max_steps", 24)
    assert "--train.max_steps was 20, is now 24" in error


@pytest.mark.parametrize("flags", [["--train.max_steps", 11], ["--train.epochs", 1], ["--train.epochs", 30]])
def test_limits_that_extend_nothing(flags, whole, base, rows_file, tmp_path, capsys):
    out = shutil.copytree(whole("lora"), tmp_path / "out")
    error = refused(capsys, "lora", base, rows_file, out, "--resume", "true", *flags)
    assert "has finished 12 steps" in error and " ".join(map(str, flags)) in error and error.count("\n") == 1
    same(out, whole("lora"))
    error = refused(capsys, "lora", base, rows_file, out, "--resume", "true", "--train.max_steps", 20, "--seed", 2)
    assert "--seed was 1337, is now 2" in error and "max_steps" not in error


def test_a_run_that_stopped_early_is_extended(base, rows_file, tmp_path, capsys):
    flags = ["--eval.interval", 1, "--eval.early_stopping_patience", 2, "--optimizer.lr", 1e-12, "--lora_dropout", 0]
    out = tmp_path / "out"
    assert go("lora", base, rows_file, out, *flags) == 0
    steps = int(lines(out)[-1]["step"])
    assert steps < 11
    assert go("lora", base, rows_file, out, *flags, "--resume", "true") == 0  # without a change
    assert "is finished" in capsys.readouterr().out
    assert go("lora", base, rows_file, out, *flags, "--resume", "true", "--train.max_steps", 14) == 0
    assert steps < int(lines(out)[-1]["step"]) <= steps + 2


def test_all_weights_are_extended_from_a_checkpoint(whole, base, rows_file, tmp_path, capsys):
    """Of full training only the checkpoints that were asked for are there."""
    out = shutil.copytree(whole("full"), tmp_path / "out")
    assert sorted(p.name for p in out.glob("step-*")) == ["step-000005", "step-000010"]
    assert go("full", base, rows_file, out, "--resume", "true") == 0
    assert "is finished" in capsys.readouterr().out
    assert go("full", base, rows_file, out, "--resume", "true", "--train.max_steps", 14) == 0
    assert "Training continues after step 10 of 14" in capsys.readouterr().out
    assert lines(out)[-1]["step"] == "14"
    for folder in out.glob("step-*"):
        shutil.rmtree(folder)
    error = refused(capsys, "full", base, rows_file, out, "--resume", "true", "--train.max_steps", 20)
    assert f"pass {out / 'final'} as the model" in error and "--train.save_interval" in error


def test_a_run_is_extended_from_python(base, rows_file, tmp_path, capsys):
    run_settings.set(None)  # of a command that ran in this process
    run_words.set(())
    run_flags.set(frozenset())

    def run(out: Path, epochs: int, resume: bool = True) -> None:
        train = TrainArgs(epochs=epochs, global_batch_size=12, lr_warmup_steps=0, lr_schedule="constant")
        data = JSON(json_path=rows_file, val_split_fraction=0.1)
        own = {"precision": "32-true", "eval": EvalArgs(max_new_tokens=None), "accelerator": "cpu"}
        lora.setup(base, out, data=data, train=train, resume=resume, **own)

    run(tmp_path / "out", 1)
    run(tmp_path / "out", 1)
    assert "is finished" in capsys.readouterr().out
    run(tmp_path / "out", 2)
    assert "--train.epochs was 1, is now 2" in capsys.readouterr().out
    run(tmp_path / "whole", 2)
    same(tmp_path / "out", tmp_path / "whole")
    with pytest.raises(UserError, match=r"--resume true(.|\n)*--overwrite true") as error:
        run(tmp_path / "out", 2, resume=False)
    assert len(error.value.hints) == 2


@pytest.mark.long
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("kind", ["lora-embeddings", "adapter_v2"])
def test_two_processes(kind, strategy, whole, rows_file, tmp_path):
    """An adapter is trained further; the run stops, resumes, and is extended, to the result of a longer run."""
    constant = ["--train.lr_schedule", "constant", "--train.lr_warmup_steps", 0]
    devices = ["--devices", 2, "--strategy", strategy, *constant]

    def run(name: str, code: int, n_steps: int, *flags: object) -> None:
        words = [*devices, "--train.max_steps", n_steps, *flags]
        process = start(KINDS[kind], whole(kind) / "final", rows_file, tmp_path / name, *words)
        said = process.communicate(timeout=300)[0]
        assert process.returncode == code, said

    run("out", 75, 4, "--train.pause_after", 2)
    run("out", 0, 4, "--resume", "true")
    run("out", 0, 6, "--resume", "true")
    run("longer", 0, 6)
    same(tmp_path / "out", tmp_path / "longer")
    assert val_losses(tmp_path / "out")[0] == pytest.approx(val_losses(whole(kind))[-1], abs=1e-5)


# what to type


@pytest.mark.parametrize("state", ["stopped", "not begun", "finished"])
def test_a_folder_with_a_run_says_what_to_type(state, whole, base, rows_file, tmp_path, capsys):
    out = tmp_path / "out"
    if state == "finished":
        shutil.copytree(whole("lora"), out)
    else:
        assert go("lora", base, rows_file, out, "--train.pause_after", 6) == 75
    if state == "not begun":
        for folder in out.glob("step-*"):
            shutil.rmtree(folder)
    first, go_on, over = refused(capsys, "lora", base, rows_file, out).splitlines()
    named = {"stopped": "unfinished run (its last checkpoint is step-000006)", "not begun": "it has no checkpoint"}
    assert f"--out_dir {out} contains " in first and named.get(state, "a finished run") in first
    assert go_on.endswith("--resume true") and f"litgpt finetune lora {base}" in go_on
    assert "go on" in go_on or state == "finished"
    command, _, n_files = over.partition(" (deletes ")
    assert command.strip().startswith(f"start over: litgpt finetune lora {base}") and command.endswith(
        "--overwrite true"
    )
    files = {p for p in out.rglob("*") if p.is_file() and p.name != ".lock"}
    assert n_files == f"{len(files)} files)"
