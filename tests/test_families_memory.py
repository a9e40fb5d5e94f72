"""Loading takes the memory of the loaded weights, and little more."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from litgpt.checkpoint.folder import INDEX, hf_weights
from litgpt.families import read_config
from litgpt.model.gpt import GPT

FIELDS = {
    "model_type": "llama",
    "hidden_size": 1536,
    "intermediate_size": 4096,
    "num_hidden_layers": 14,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "vocab_size": 48000,
    "max_position_embeddings": 2048,
}
LOAD = """
import sys, torch
from pathlib import Path
from litgpt.methods.model_source import ModelSource
model = ModelSource.open(Path(sys.argv[1])).model(getattr(torch, sys.argv[2]), torch.device("cpu"))
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))  # in KiB
"""


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("files", [1, 4])
def test_two_gigabytes_in_float32(files, tmp_path):
    with torch.device("meta"):
        model = GPT(read_config(FIELDS))
    shapes = {name: tuple(tensor.shape) for name, tensor in hf_weights(model)}
    total = sum(4 * torch.Size(shape).numel() for shape in shapes.values())
    assert 1.99e9 < total < 2.01e9
    shards: list[dict[str, torch.Tensor]] = [{} for _ in range(files)]
    for i, (name, shape) in enumerate(shapes.items()):
        shards[i * files // len(shapes)][name] = torch.full(shape, 0.01)
    weight_map = {}
    for i, shard in enumerate(shards):
        file = "model.safetensors" if files == 1 else f"model-{i + 1:05d}-of-{files:05d}.safetensors"
        save_file(shard, tmp_path / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
        shard.clear()
    if files > 1:
        (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    (tmp_path / "config.json").write_text(json.dumps(FIELDS))
    for dtype, limit in (("float32", 2.9e9), ("bfloat16", 2.0e9)):
        assert peak(tmp_path, dtype) < limit, dtype


def peak(folder: Path, dtype: str) -> int:
    """The largest resident set of a process that loads the folder, in bytes."""
    run = subprocess.run([sys.executable, "-c", LOAD, str(folder), dtype], capture_output=True, text=True, check=True)
    return 1024 * int(run.stdout)
