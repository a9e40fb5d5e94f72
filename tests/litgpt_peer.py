"""What LitGPT itself makes and says of a folder. Run by the python that has it, never imported by what runs here.

python litgpt_peer.py COMMANDS   a list in JSON, of these:

["make", FOLDER, FIELDS]                  a model of random weights, from the fields of its model_config.yaml
["adapter", KIND, BASE, FOLDER, SETTINGS] a random lora, adapter or adapter_v2 over a base
["logits", KIND, BASE, FOLDER, OUT, VOCABULARY]   what a model answers to IDS, into a file
"""

import json
import sys
from pathlib import Path

import torch
import yaml

IDS = torch.randint(2, 290, (2, 40), generator=torch.Generator().manual_seed(3))


def draw(model, names=lambda n: True):
    generator = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        if names(name):
            std = 0.2 if p.dim() == 1 else 1.2 / p.shape[-1] ** 0.5
            mean = 1.0 if "norm" in name or "ln_f" in name or "adapter_scale" in name else 0.0
            with torch.no_grad():
                p.copy_(torch.randn(p.shape, generator=generator) * std + mean)


def make(folder, fields):
    from litgpt.config import Config
    from litgpt.utils import save_config

    from litgpt.model import GPT

    config = Config(**fields)
    model = GPT(config)
    draw(model)
    Path(folder).mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), Path(folder) / "lit_model.pth")
    save_config(config, Path(folder))


def build(kind, base, settings):
    import litgpt.adapter
    import litgpt.adapter_v2
    import litgpt.config
    import litgpt.lora

    import litgpt.model

    module = {"base": litgpt.model, "adapter": litgpt.adapter, "adapter_v2": litgpt.adapter_v2, "lora": litgpt.lora}[
        kind
    ]
    config_class = litgpt.config.Config if kind == "base" else module.Config
    lora = {k: v for k, v in settings.items() if k.startswith("lora_") and kind == "lora"}
    return module.GPT(config_class.from_file(Path(base) / "model_config.yaml", **lora)), module


def adapter(kind, base, folder, settings):
    model, module = build(kind, base, settings)
    keep = module.lora_filter if kind == "lora" else module.adapter_filter
    draw(model, lambda n: keep(n, None))
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {n: p for n, p in model.state_dict().items() if keep(n, p)}
    torch.save({"model": state}, folder / f"lit_model.pth.{kind}")
    (folder / "hyperparameters.yaml").write_text(yaml.safe_dump({"checkpoint_dir": str(base), **settings}))


@torch.no_grad()
def logits(kind, base, folder, out, vocabulary):
    settings = {}
    if kind != "base":
        settings = yaml.safe_load((Path(folder) / "hyperparameters.yaml").read_text())
    model, _ = build(kind, base, settings)
    state = torch.load(Path(base) / "lit_model.pth", weights_only=True)
    state = state.get("model", state)
    if kind != "base":
        own = torch.load(Path(folder) / f"lit_model.pth.{kind}", weights_only=True)
        state |= own.get("model", own)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not missing and not unexpected, (missing, unexpected)
    torch.save(model.eval().float()(IDS.remainder(vocabulary)), out)


if __name__ == "__main__":
    for command, *arguments in json.loads(sys.argv[1]):
        {"make": make, "adapter": adapter, "logits": logits}[command](*arguments)
