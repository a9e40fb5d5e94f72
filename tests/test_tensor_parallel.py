"""A model in parts, each in a process of its own, gives what it gives in one."""

import copy
import threading
from pathlib import Path

import pytest
import torch

from litgpt.__main__ import main
from litgpt.errors import UserError
from litgpt.generate.engine import generate
from litgpt.generate.several_devices import check_divisible, keep_part
from litgpt.model.config import Config
from litgpt.model.gpt import GPT

SIZES = dict(block_size=64, padded_vocab_size=50, n_layer=2, n_embd=32, n_head=4, intermediate_size=48)
MODELS = {
    "llama": dict(n_query_groups=2),
    "biases": dict(bias=True, norm_class_name="LayerNorm", mlp_class_name="GptNeoxMLP", parallel_residual=True),
    "gemma": dict(n_query_groups=2, mlp_class_name="GemmaMLP", post_attention_norm=True, head_size=16),
    "experts": dict(n_query_groups=4, mlp_class_name="LLaMAMoE", n_expert=4, n_expert_per_token=2),
    "norms": dict(n_query_groups=2, norm_qk=True),
    "a norm for each head": dict(n_query_groups=2, norm_qk=True, norm_qk_type="each_head"),
}


class Together:
    """Adds the tensors of threads up, as processes would."""

    def __init__(self, world: int) -> None:
        self.barrier, self.tensors = threading.Barrier(world, timeout=60), dict[int, torch.Tensor]()

    def add(self, t: torch.Tensor) -> None:
        self.tensors[threading.get_ident()] = t.clone()
        self.barrier.wait()
        total = sum(self.tensors[i] for i in sorted(self.tensors))
        self.barrier.wait()
        t.copy_(total)


def in_parts(model: GPT, world: int, ids: torch.Tensor) -> list[torch.Tensor]:
    """What each part says."""
    together, found = Together(world), dict[int, torch.Tensor]()

    def work(rank: int) -> None:
        part = copy.deepcopy(model)
        keep_part(part, rank, world, together.add)
        sizes = [p.numel() for p in part.transformer.h.parameters()]
        assert sum(sizes) < sum(p.numel() for p in model.transformer.h.parameters()) * (0.6 if world == 2 else 0.4)
        with torch.no_grad():
            found[rank] = part(ids)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[rank] for rank in range(world)]


@pytest.mark.parametrize("name", MODELS)
def test_the_parts_add_up(name):
    fields = {**SIZES, **MODELS[name]}
    torch.manual_seed(0)
    model = GPT(Config(**fields)).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    ids = torch.randint(50, (2, 9))
    with torch.no_grad():
        expected = model(ids)
    for world in (2, 4) if model.config.n_query_groups == 4 else (2,):
        parts = in_parts(model, world, ids)
        assert len(parts) == world
        for logits in parts:
            torch.testing.assert_close(logits, expected, atol=2e-4, rtol=1e-3)
        assert all(torch.equal(parts[0], logits) for logits in parts), "all processes draw the same"


def test_what_cannot_be_split():
    for fields, world, words in (
        (dict(n_query_groups=2), 4, "n_query_groups 2"),
        (dict(n_query_groups=4, intermediate_size=50), 4, "intermediate_size 50"),
        (dict(norm_qk=True, norm_qk_type="olmo2"), 2, "generate_sequentially"),
    ):
        with pytest.raises(UserError, match=words):
            check_divisible(Config(**{**SIZES, **fields}), world)


def test_two_processes(llama: Path, capfd: pytest.CaptureFixture):
    words = [
        str(llama),
        "--prompt",
        "the quick",
        "--num_samples",
        "2",
        "--precision",
        "32-true",
        "--accelerator",
        "cpu",
    ]
    main(["generate", *words])
    expected = capfd.readouterr().out
    main(["generate_tp", *words, "--devices", "2"])
    out, err = capfd.readouterr()
    assert out == expected and "2 processes" in err
    for wrong, said in (
        (["--devices", "3"], "n_query_groups 2"),
        (["--quantize", "bnb.nf4"], "--quantize bnb.nf4"),
        (["--prompt", "é" * 400], "reads at most 256"),
        (["--devices", "0"], "--devices 0"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["generate_tp", *words, *wrong])
        assert stop.value.code == 2 and said in capfd.readouterr().err


def test_one_process_is_the_whole(llama):
    from litgpt.methods.model_source import ModelSource

    model = ModelSource.open(llama).model(torch.float32, torch.device("cpu"))
    expected = list(generate(model, [5, 6], 20))
    keep_part(model, 0, 1, lambda t: None)
    assert list(generate(model, [5, 6], 20)) == expected
