"""Several devices, method by method: the losses and the folder of one, and what has to hold when a run stops."""

import csv
import signal
import subprocess
import time

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.fsdp import FSDPModule

from tests.conftest import save_llama
from tests.ranks import alike, curve, ended, start
from tests.runs import lines, same, words
from tests.test_devices import free_port, same_result

pytestmark = pytest.mark.long
SHORT = ("--train.micro_batch_size", 1, "--train.max_steps", 6, "--train.max_norm", 0.5, "--eval.max_new_tokens", 3,
         "--data.val_split_fraction", 0.025)  # fmt: skip
NO_DROPOUT = ("--lora_dropout", 0)
CASES = {
    "full-ddp": ("full", "ddp", 2, ()),
    "full-fsdp-4": ("full", "fsdp", 4, ()),
    "full-ddp-4": ("full", "ddp", 4, ()),
    "full-recomputed": ("full", "fsdp", 2, ("--train.activation_checkpointing", "true")),
    "full-compiled": ("full", "fsdp", 2, ("--compile", "true")),
    "full-muon": ("full", "fsdp", 2, ("--optimizer", "Muon")),
    "full-sgd": ("full-sgd", "fsdp", 2, ()),
    "pretrain": ("pretrain", "fsdp", 2, ()),
    "pretrain-4": ("pretrain", "fsdp", 4, ("--train.pack", "true", "--train.max_seq_length", 256)),
    "lora": ("lora", "fsdp", 2, NO_DROPOUT),
    "lora-ddp-4": ("lora", "ddp", 4, NO_DROPOUT),
    "lora-4": ("lora", "fsdp", 4, NO_DROPOUT),
    "lora-muon": ("lora-plus-muon", "fsdp", 2, NO_DROPOUT),
    "lora-embeddings": ("lora-embeddings", "fsdp", 2, (*NO_DROPOUT, "--lora_head", "true")),
    "dora": ("dora", "fsdp", 2, NO_DROPOUT),
    "pissa": ("pissa", "fsdp", 2, NO_DROPOUT),
    "adamw8bit": ("adamw8bit", "fsdp", 2, NO_DROPOUT),
    "nf4": ("nf4", "ddp", 2, NO_DROPOUT),
    "nf4-4": ("nf4", "ddp", 4, NO_DROPOUT),
    "adapter": ("adapter", "fsdp", 2, ()),
    "adapter-ddp": ("adapter", "ddp", 2, ()),
    "adapter_v2": ("adapter_v2", "fsdp", 2, ()),
    "adapter_v2-ddp": ("adapter_v2", "ddp", 2, ()),
}


@pytest.fixture(scope="module")
def one(base, rows_file, tmp_path_factory):
    """The folder of a run in one process."""
    made = {}

    def run(method, *flags):
        if (method, *flags) not in made:
            out = made[(method, *flags)] = tmp_path_factory.mktemp("one") / "out"
            ended(start(out.parent, words(method, base, rows_file, out, *SHORT, *flags)))
        return made[(method, *flags)]

    return run


@pytest.mark.parametrize("case", CASES)
def test_several_give_the_numbers_of_one(case, one, base, rows_file, tmp_path):
    """There is one validation row: all devices but one have none."""
    method, strategy, devices, flags = CASES[case]
    several = (*SHORT, *flags, "--devices", devices, "--strategy", strategy)
    text = ended(start(tmp_path, words(method, base, rows_file, tmp_path / "out", *several)))
    assert f"{devices} x cpu ({strategy})" in text
    same_result(one(method, *flags), tmp_path / "out")
    alike(tmp_path, devices)


@pytest.mark.parametrize("method", ["full-bf16", "lora-bf16", "pretrain-bf16-muon"])
def test_half_precision(method, base, rows_file, tmp_path):
    """Rounding is drawn otherwise; the losses are about those of one device."""
    flags = (*SHORT, "--optimizer.lr", 0.001)
    flags += NO_DROPOUT if method == "lora-bf16" else ()
    for out, more in (("one", ()), ("two", ("--devices", 2, "--strategy", "fsdp"))):
        ended(start(tmp_path, words(method, base, rows_file, tmp_path / out, *flags, *more)))
    alike(tmp_path, 2)
    assert curve(tmp_path / "two") == pytest.approx(curve(tmp_path / "one"), rel=0.03)
    ours, theirs = (load_file(next((tmp_path / o / "final").glob("*.safetensors"))) for o in ("two", "one"))
    assert {k: (t.shape, t.dtype) for k, t in ours.items()} == {k: (t.shape, t.dtype) for k, t in theirs.items()}


def test_tied_embeddings(tokenizer_file, rows_file, tmp_path):
    """The vocabulary is odd: the devices hold different numbers of its rows."""
    model = save_llama(tmp_path / "model", tokenizer_file, tie_word_embeddings=True, vocab_size=301)
    for out, more in (("one", ()), ("two", ("--devices", 2, "--strategy", "fsdp"))):
        ended(start(tmp_path, words("full", model, rows_file, tmp_path / out, *SHORT, *more)))
    same_result(tmp_path / "one", tmp_path / "two")
    assert "lm_head.weight" not in load_file(tmp_path / "two" / "final" / "model.safetensors")


@pytest.mark.parametrize("method", ["full", "full-bf16", "lora", "lora-embeddings", "adapter_v2", "pretrain-bf16-muon"])
def test_resume(method, base, rows_file, tmp_path):
    """With dropout: each device draws its own. What a run that stopped gives is what a run gives that did not."""
    two = ("--devices", 2, "--strategy", "fsdp")
    ended(start(tmp_path, words(method, base, rows_file, tmp_path / "whole", *two)))
    ended(start(tmp_path, words(method, base, rows_file, tmp_path / "parts", *two, "--train.pause_after", 7)), code=75)
    ended(start(tmp_path, words(method, base, rows_file, tmp_path / "parts", *two, "--resume", "true")))
    same(tmp_path / "whole", tmp_path / "parts")
    alike(tmp_path, 2)


def test_resume_with_another_strategy(base, rows_file, tmp_path):
    """The checkpoint of sharded training is one of any training."""
    run = words("full", base, rows_file, tmp_path / "out", "--devices", 2)
    ended(start(tmp_path, [*run, "--strategy", "fsdp", "--train.pause_after", "7"]), code=75)
    text = ended(start(tmp_path, [*run, "--strategy", "ddp", "--resume", "true"]), code=2)
    assert "the strategy was 'fsdp', is now 'ddp'" in text and text.count("litgpt: error") == 1
    more = ["--strategy", "ddp", "--resume", "true", "--resume_with_changes", "true"]
    ended(start(tmp_path, [*run, *more]))
    ended(start(tmp_path, words("full", base, rows_file, tmp_path / "one")))
    then, now = ([float(line["loss"] or line["val_loss"]) for line in lines(tmp_path / o)] for o in ("one", "out"))
    assert now == pytest.approx(then, abs=1e-4)


def test_slurm(base, rows_file, tmp_path):
    out = words("full", base, rows_file, tmp_path / "out", *SHORT)
    job = {"SLURM_NTASKS": "2", "SLURM_NNODES": "2", "SLURM_JOB_ID": str(free_port() - 15000 + 10000),
           "SLURM_NODELIST": "127.0.0.1", "MASTER_PORT": str(free_port()), "SLURM_LOCALID": "0"}  # fmt: skip
    tasks = [start(tmp_path, out, **job, SLURM_PROCID=str(n), SLURM_NODEID=str(n)) for n in range(2)]
    texts = [ended(task) for task in tasks]
    assert "2 x cpu on 2 machines (ddp)" in texts[0] and not texts[1].strip()
    ended(start(tmp_path, words("full", base, rows_file, tmp_path / "one", *SHORT)))
    same_result(tmp_path / "one", tmp_path / "out")


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_an_error_on_one_rank_ends_all(strategy, base, rows_file, tmp_path):
    out = words("full", base, rows_file, tmp_path / "out", "--devices", 2, "--strategy", strategy)
    text = ended(start(tmp_path, out, FAULT="1:3:error"), code=2, within=60)
    assert "litgpt: error: Device 1: this rank has had enough" in text and "Traceback" not in text


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_leaves_nobody(rank, base, rows_file, tmp_path):
    out = words("full", base, rows_file, tmp_path / "out", "--devices", 2, "--strategy", "fsdp")
    process = start(tmp_path, out, FAULT=f"{rank}:3:kill")
    ended(process, code=1 if rank else -signal.SIGKILL, within=60)
    time.sleep(5)
    left = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    assert str(tmp_path) not in left


def test_an_error_that_all_have_is_told_once(base, rows_file, tmp_path):
    out = words("full", base, rows_file, tmp_path / "out", "--devices", 2, "--optimizer", "AdamW8bit")
    text = ended(start(tmp_path, [*out, "--strategy", "fsdp"]), code=2)
    assert text.count("litgpt: error") == 1 and "--optimizer AdamW8bit" in text


def test_torchrun_passes_an_error_on(base, rows_file, tmp_path):
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port()))
    out = words("full", base, rows_file, tmp_path / "out", "--strategy", "fsdp")
    text = ended(start(tmp_path, out, *launcher, FAULT="1:3:error"), code=1)
    assert "Device 1: this rank has had enough" in text


def test_not_finite_while_sharded(base, rows_file, tmp_path):
    out = words("full", base, rows_file, tmp_path / "out", "--devices", 2, "--strategy", "fsdp", "--optimizer.lr", 1e30)
    text = ended(start(tmp_path, out), code=2)
    assert text.count("litgpt: error") == 1 and "Stopping before the weights are updated" in text
    assert len(list((tmp_path / "out" / "crash").glob("step-*"))) == 1


def test_one_device_shards_nothing(base, rows_file, tmp_path):
    out = words("lora", base, rows_file, tmp_path / "out", *SHORT, "--strategy", "fsdp", "--fsdp_cpu_offload", "true")
    text = ended(start(tmp_path, out))
    assert "--strategy fsdp has no effect" in text and "--fsdp_cpu_offload true has no" in text


def test_memory(tokenizer_file, rows_file, tmp_path):
    """Weights of 0.7 GB in float32: a rank of two has at most 0.62 of the memory of one process at its peak."""
    fields = {"model_type": "llama", "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 24,
              "num_attention_heads": 12, "num_key_value_heads": 12, "max_position_embeddings": 256}  # fmt: skip
    model = save_llama(tmp_path / "tokenizer", tokenizer_file)
    peaks = {}
    for name, more in (("one", ()), ("two", ("--devices", 2, "--strategy", "fsdp"))):
        flags = ("--train.global_batch_size", 2, "--train.pause_after", 3, "--eval.max_new_tokens", "null", *more)
        run = words("pretrain", model, rows_file, tmp_path / name, *SHORT, *flags)
        run[run.index("--model_name") : run.index("--model_name") + 2] = ["--model_config", str(fields)]
        ended(start(tmp_path, run), code=75, within=600)
        with open(tmp_path / name / "metrics.csv", newline="") as f:
            peaks[name] = max(int(row["peak_memory"]) for row in csv.DictReader(f) if row["peak_memory"])
    assert peaks["two"] <= 0.62 * peaks["one"], peaks


# weights that some rank, or all but one, have no gradient of


@pytest.fixture(scope="module")
def experts(base, tmp_path_factory):
    """Sixteen experts, of which each token passes one: most have no token of a row."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_local_experts": 16, "num_experts_per_tok": 1, "max_position_embeddings": 256, "vocab_size": 300}
    folder = tmp_path_factory.mktemp("experts") / "base"
    config = MixtralConfig(**sizes, num_key_value_heads=2, bos_token_id=0, eos_token_id=1, initializer_range=0.2)
    MixtralForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((base / name).read_bytes())
    return folder


FEW = ("--train.micro_batch_size", 1, "--train.global_batch_size", 2, "--train.max_steps", 5,
       "--optimizer.weight_decay", 0.1, "--eval.max_new_tokens", "null")  # fmt: skip


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.skipif(not hasattr(FSDPModule, "set_reduce_scatter_unused_params"), reason="before torch 2.13")
def test_sharded_experts_that_one_rank_does_not_run(precision, experts, rows_file, tmp_path):
    """Their gradient is zero there, as on one device, which runs all of them."""
    flags = (*FEW, "--precision", precision, "--optimizer.lr", 3e-4)
    for name, devices, idle in (("one", (), {}), ("two", ("--devices", 2, "--strategy", "fsdp"), {"IDLE": "1"})):
        (tmp_path / name).mkdir()
        ended(
            start(tmp_path / name, words("full", experts, rows_file, tmp_path / name / "out", *flags, *devices), **idle)
        )
    alike(tmp_path / "two", 2)
    one, two = (load_file(tmp_path / name / "rank-0.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys() and all(torch.allclose(one[key], two[key], atol=2e-3) for key in one)
    assert curve(tmp_path / "two" / "out") == pytest.approx(curve(tmp_path / "one" / "out"), abs=2e-3)


@pytest.mark.parametrize(
    ("method", "strategy", "idle", "flags"),
    [
        ("lora", "fsdp", True, (*NO_DROPOUT, "--lora_mlp", "true")),
        ("lora", "fsdp", False, (*NO_DROPOUT, "--lora_mlp", "true")),
        ("lora", "ddp", False, (*NO_DROPOUT, "--lora_mlp", "true")),
        ("nf4", "ddp", False, (*NO_DROPOUT, "--lora_mlp", "true")),
        ("adapter_v2", "fsdp", False, ("--adapter_start_layer", 1)),
        ("full", "fsdp", False, ()),
        ("full", "ddp", False, ()),
    ],
)
def test_experts_without_tokens(method, strategy, idle, flags, experts, rows_file, tmp_path):
    for name, devices in (("one", ()), ("two", ("--devices", 2, "--strategy", strategy))):
        (tmp_path / name).mkdir()
        command = words(method, experts, rows_file, tmp_path / name / "out", *FEW, *flags, *devices)
        ended(start(tmp_path / name, command, **({"IDLE": "1"} if idle else {})))
    alike(tmp_path / "two", 2)
    one, two = (load_file(tmp_path / name / "rank-0.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys() and all(torch.allclose(one[key], two[key], atol=2e-3) for key in one)


def test_the_first_ranks_clock_is_that_of_all(base, rows_file, tmp_path):
    """The other one is twice as fast: by its own the run would end after half of the steps, at other rates."""
    flags = ("--train.epochs", "null", "--train.max_time", 6, "--train.max_steps", "null", *NO_DROPOUT)
    rates = []
    for name, devices in (("one", ()), ("two", ("--devices", 2, "--strategy", "ddp"))):
        (tmp_path / name).mkdir()
        command = words("lora", base, rows_file, tmp_path / name / "out", *flags, *devices)
        ended(start(tmp_path / name, command, CLOCK="1"))
        rates.append([line["lr"] for line in lines(tmp_path / name / "out") if line["lr"]])
    alike(tmp_path / "two", 2)
    assert rates[0] == rates[1] and len(rates[0]) == 6
