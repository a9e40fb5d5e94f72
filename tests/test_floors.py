"""A module imports from its own floor or from below."""

import ast
from pathlib import Path

import pytest

import litgpt

ROOT = Path(litgpt.__file__).parent
FLOORS = {
    0: (
        "errors",
        "imports",
        "fields",
        "files",
        "web",
        "outputs",
        "args",
        "config",
        "prompts",
        "chat_template",
        "styles",
        "recipes",
    ),
    1: ("model", "shards"),
    2: (
        "lora",
        "adapter",
        "adapter_v2",
        "quantize",
        "peft_folder",
        "peft_export",
        "adapter_folder",
        "lit_folder",
        "lit_adapter",
        "families",
        "checkpoint",
        "tokenizer",
        "hub",
        "download",
        "torch_file",
        "loading",
    ),
    3: ("train", "data", "generate", "evaluation"),
    4: ("finetune", "pretrain"),
    5: ("__main__", "api", "cli", "given", "older", "commands", "serve"),
}
FLOOR = {name: floor for floor, names in FLOORS.items() for name in names}
MODULES = sorted(p.relative_to(ROOT) for p in ROOT.rglob("*.py") if p != ROOT / "__init__.py")


def floor(dotted: str) -> int:
    """The floor of `litgpt.x.y`; the package itself, which holds only the version, is below all."""
    parts = dotted.split(".")
    return FLOOR[parts[1]] if len(parts) > 1 else 0


def imports(path: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            found.append(str(node.module))
    return found


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_imports(module):
    own = FLOOR[module.parts[0].removesuffix(".py")]
    ours = [name for name in imports(ROOT / module) if name.split(".")[0] == "litgpt"]
    above = [name for name in ours if floor(name) > own]
    assert not above, f"{module} is on floor {own} and imports {above}"
    if own == 0:
        assert "torch" not in [name.split(".")[0] for name in imports(ROOT / module)]
    assert "transformers" not in [name.split(".")[0] for name in imports(ROOT / module)]


def test_every_module_has_a_floor():
    assert {m.parts[0].removesuffix(".py") for m in MODULES} == set(FLOOR)
