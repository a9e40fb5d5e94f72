"""A model in parts, each in a process of its own, gives what it gives in one."""

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from litgpt.__main__ import main
from litgpt.checkpoint import folder as folder_module
from litgpt.errors import UserError
from litgpt.generate.engine import generate
from litgpt.generate.several_devices import check_divisible, load_part
from litgpt.methods.model_source import ModelSource
from litgpt.model.config import Config
from tests.families import ALL, save_random

SIZES = dict(block_size=64, padded_vocab_size=50, n_layer=2, n_embd=32, n_head=4, intermediate_size=48)
CPU = torch.device("cpu")
# stacked and transposed weights, rows in another order, biases, experts, and a norm for each head
SPLIT = [(family, variant) for family, variant in ALL if family not in ("olmo2", "olmo3", "olmoe")]


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


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts the numbers that are read from files of weights."""
    counts: list[int] = []
    original = folder_module.opened

    class Counted:
        def __init__(self, file: Any) -> None:
            self.file = file

        def __enter__(self) -> "Counted":
            self.f = self.file.__enter__()
            return self

        def __exit__(self, *error: Any) -> None:
            self.file.__exit__(*error)

        def keys(self) -> list[str]:
            return list(self.f.keys())

        def get_tensor(self, name: str) -> torch.Tensor:
            return counted(self.f.get_tensor(name))

        def get_slice(self, name: str) -> Any:
            view = self.f.get_slice(name)
            get = lambda index: counted(view[index])  # noqa: E731
            return type(
                "Slice",
                (),
                {
                    "__getitem__": lambda _, i: get(i),
                    "get_shape": lambda _: view.get_shape(),
                    "get_dtype": lambda _: view.get_dtype(),
                },
            )()

    def counted(tensor: torch.Tensor) -> torch.Tensor:
        counts.append(tensor.numel())
        return tensor

    monkeypatch.setattr(folder_module, "opened", lambda file: Counted(original(file)))
    return counts


@pytest.mark.parametrize(("family", "variant"), SPLIT)
def test_the_parts_add_up(family, variant, tmp_path, read):
    folder = save_random(tmp_path / "m", family, variant)
    whole = ModelSource.open(folder)
    checkpoint, model = whole.checkpoint, whole.model(torch.float32, CPU)
    try:
        check_divisible(model.config, 2)
    except UserError:
        pytest.skip("cannot be split")
    ids = torch.randint(190, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(ids)
    together, found = Together(2), dict[int, torch.Tensor]()
    read.clear()
    parts = [load_part(checkpoint, torch.float32, CPU, rank, 2, together.add) for rank in range(2)]
    tied = model.transformer.wte.weight.numel() * model.config.tie_embeddings  # perhaps compared with a stored head
    own = [t.numel() for part in parts for t in (*part.parameters(), *part.buffers())]
    assert sum(read) <= sum(own) + 4 * tied
    blocks = [sum(p.numel() for p in m.transformer.h.parameters()) for m in (*parts, model)]
    assert blocks[0] == blocks[1] < 0.6 * blocks[2]

    def work(rank: int) -> None:
        with torch.no_grad():
            found[rank] = parts[rank](ids)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.testing.assert_close(found[0], expected, atol=2e-4, rtol=1e-3)
    assert torch.equal(found[0], found[1]), "all processes draw the same"


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
    source = ModelSource.open(llama)
    expected = list(generate(source.model(torch.float32, CPU), [5, 6], 20))
    part = load_part(source.checkpoint, torch.float32, CPU, 0, 1, lambda t: None)
    assert list(generate(part, [5, 6], 20)) == expected
