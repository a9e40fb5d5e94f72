"""Every trained weight has a gradient after every micro-batch, zero where nothing depends on it. So devices with other
rows, or with none, have gradients of the same weights: what DDP and FSDP share needs that."""

from typing import Any

import pytest
import torch

from litgpt.checkpoint.folder import Checkpoint, load_weights
from litgpt.data.batches import UNTRAINED, Batch
from litgpt.finetune.full import train_everything
from litgpt.methods.adapter import LLaMAAdapter, LLaMAAdapterV2
from litgpt.methods.lora import LoRA
from litgpt.methods.quantize import quantize
from litgpt.model.blocks import recompute
from litgpt.model.gpt import GPT
from litgpt.train.loss import LossModel
from tests.families import FAMILIES, save_random

CPU = torch.device("cpu")
EVERYWHERE: dict[str, Any] = {"r": 2, "dropout": 0.0, "key": True, "projection": True, "mlp": True, "head": True}
METHODS = {
    "full": train_everything,
    "lora": LoRA(**EVERYWHERE).apply,
    "head": LoRA(r=2, dropout=0.0, query=False, value=False, head=True).apply,
    "embeddings": LoRA(**EVERYWHERE, train_embeddings=True).apply,
    "adapter": LLaMAAdapter(2, 1).apply,
    "adapter_v2": LLaMAAdapterV2(2, 1).apply,
}
FEW = ("llama", "mixtral", "gpt2")
SOME = [f if f in FEW else pytest.param(f, marks=pytest.mark.long) for f in FAMILIES]


def batches() -> dict[str, Batch]:
    ids = torch.randint(1, 190, (1, 12), generator=torch.Generator().manual_seed(1))
    after, nothing = ids.roll(-1, dims=1), torch.full_like(ids, UNTRAINED)
    return {
        "one token": Batch(ids[:, :1], after[:, :1], [1], 1),  # most experts have none
        "all": Batch(ids, after, [5, 7], 12),
        "nothing trained": Batch(ids, nothing, [12], 0),  # of a rank without a share
    }


@pytest.mark.parametrize("family", SOME)
@pytest.mark.parametrize("scheme", [None, "bnb.nf4", "bnb.int8"])
def test_every_trained_weight_has_a_gradient(family, scheme, tmp_path):
    if scheme:
        pytest.importorskip("bitsandbytes")
    checkpoint = Checkpoint(save_random(tmp_path / "m", family, next(iter(FAMILIES[family]))))
    for method, apply in METHODS.items():
        if scheme and method == "full":
            continue
        with torch.device("meta"):
            model = GPT(checkpoint.config)
        if scheme:
            quantize(model, scheme, CPU)
        apply(model)
        load_weights(model, checkpoint, torch.float32, CPU)
        for recomputed in (False, True):
            if recomputed:
                recompute(model)
            for name, batch in batches().items():
                model.zero_grad()
                LossModel(model.train())(batch).backward()
                lacking = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
                assert not lacking, (method, name, recomputed)
