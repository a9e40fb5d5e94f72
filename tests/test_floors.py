"""The rooms of the package: what may import what."""

import ast
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

import litgpt

ROOT = Path(litgpt.__file__).parent
FLOORS = (  # a module imports from its own floor or from below
    ("errors",),
    ("storage",),  # files, and what is fetched over HTTP: no model, no text
    ("text", "model"),
    ("families", "data"),
    ("litgpt_format",),
    ("checkpoint",),
    ("methods",),
    ("generate",),
    ("train", "evaluation", "serve", "export"),
    ("finetune", "commands", "cli", "api", "compat", "__main__"),
)
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names}
WITHOUT_TORCH = ("errors", "text", "cli/legacy", "storage/files", "storage/fields", "storage/outputs", "storage/http")
PUBLIC = {"litgpt.model.GPT": "litgpt.litgpt_format.model"}  # what users import from `litgpt.model`
LATE = {  # modules that are imported within functions, and why
    "litgpt.cli.completion": "only a Tab needs it",
    "litgpt.cli.parser": "`litgpt -h` starts without the libraries that it needs",
    "litgpt.checkpoint.download": "a model that is here does not need the hub's library",
    "litgpt.train.devices.fsdp": "a run on one device does not need Lightning",
    "litgpt.train.memory.plan": "fake tensors take a second to import, and only a plan needs them",
    "litgpt.train.memory.fit": "the same, for a run that may not fit",
    "litgpt.train.run_report.page": "a run needs Jinja only at its end",
    "litgpt.train.memory.sharded": "a plan for one device does not need Lightning",
    "litgpt.serve.app": "the web server is an extra",
    "litgpt.serve.models": "the web server is an extra",
    "litgpt.serve.server": "the web server is an extra",
    "litgpt.evaluation.lm": "lm-eval is an extra",
    "litgpt.evaluation.run": "lm-eval is an extra",
    "litgpt.evaluation.tasks": "lm-eval is an extra",
    "litgpt.storage.http": "only `--config URL` fetches something",
    "litgpt.train.optimizers": "read by a command that trains, and by no other",
    "litgpt.methods.quantize": "only `--quantize` needs it",
    "litgpt.data.data_module": "a command without data sets does not need it",
    "litgpt.data.json_file": "a command without data sets does not need it",
    "litgpt.model.gpt": "`litgpt doctor` says which of its parts cannot be imported",
    "litgpt.model.config": "`litgpt doctor` says which of its parts cannot be imported",
    "litgpt.model.devices": "`litgpt doctor` says which of its parts cannot be imported",
}


def dotted(path: Path) -> str:
    """The name of a module by its path below the package."""
    parts = ("litgpt", *path.with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {dotted(p.relative_to(ROOT)): p for p in sorted(ROOT.rglob("*.py"))}


def imports(source: str, modules: Mapping[str, object] = MODULES) -> Iterator[tuple[str, bool]]:
    """What a module imports, and whether it does so within a function. Imports for type checkers do not count."""

    def walk(node: ast.AST, late: bool) -> Iterator[tuple[str, bool]]:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.Import):
            yield from ((alias.name, late) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import"
            whole = [PUBLIC.get(name, name) for name in (f"{node.module}.{alias.name}" for alias in node.names)]
            yield from ((name if name in modules else str(node.module), late) for name in whole)
        for child in ast.iter_child_nodes(node):
            yield from walk(child, late or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)))

    yield from walk(ast.parse(source), False)


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Paths that lead back to where they begin."""
    found, done = [], set()

    def visit(node: str, path: list[str]) -> None:
        if node in path:
            found.append([*path[path.index(node) :], node])
        elif node not in done:
            for other in sorted(graph[node]):
                visit(other, [*path, node])
            done.add(node)

    for node in sorted(graph):
        visit(node, [])
    return found


def graphs(sources: Mapping[str, str]) -> tuple[dict[str, set[str]], dict[str, set[str]]]:
    """Which module imports which, and which room imports from which."""
    modules: dict[str, set[str]] = defaultdict(set)
    rooms: dict[str, set[str]] = defaultdict(set)
    for module, source in sources.items():
        for name, _ in imports(source, sources):
            if name in sources and name not in (module, "litgpt"):
                modules[module].add(name)
                if room(name) != room(module) and room(module):
                    rooms[room(module)].add(room(name))
    return defaultdict(set, modules), defaultdict(set, rooms)


SOURCES = {module: path.read_text(encoding="utf-8") for module, path in MODULES.items()}


def test_every_room_has_a_floor():
    assert {room(m) for m in MODULES} - {""} == set(FLOOR)
    assert len([p for p in ROOT.iterdir() if p.name not in ("__pycache__", "py.typed")]) <= 21


@pytest.mark.parametrize("module", MODULES)
def test_imports(module):
    names = list(imports(SOURCES[module]))
    if module != "litgpt":
        above = [n for n, _ in names if n.startswith("litgpt.") and FLOOR[room(n)] > FLOOR[room(module)]]
        assert not above, f"{module} imports from a floor above: {above}"
    tops = {name.split(".")[0] for name, _ in names}
    place = "/".join(module.split(".")[1:])
    assert "torch" not in tops or not place.startswith(WITHOUT_TORCH)
    assert "transformers" not in tops
    late = {name for name, late in names if late and name.startswith("litgpt.")}
    assert late <= set(LATE), f"{module} imports within a function: {late - set(LATE)}"


def test_no_circles():
    for graph in graphs(SOURCES):
        assert not circles(graph)


def test_a_circle_is_found():
    """Put in on purpose: from the model to the place that loads it, and between two modules of one room."""
    up = {**SOURCES, "litgpt.model.gpt": "from litgpt.checkpoint.folder import Checkpoint"}
    modules, rooms = graphs(up)
    assert any("litgpt.model.gpt" in circle for circle in circles(modules))
    assert any({"model", "checkpoint"} <= set(circle) for circle in circles(rooms))
    one = {**SOURCES, "litgpt.text.prompt_style": "def f():\n    from litgpt.text import styles"}
    assert ["litgpt.text.prompt_style", "litgpt.text.styles", "litgpt.text.prompt_style"] in circles(graphs(one)[0])


def test_code_for_a_cpu_alone_is_behind_its_door():
    """`model/kernels_cpu.py`, which a switch turns off."""
    places = [
        *(ROOT / "model").rglob("*.py"),
        *(ROOT / "methods").rglob("*.py"),
        ROOT / "api.py",
        ROOT / "train/loss.py",
    ]
    found = [p.name for p in places if re.search(r"is_cpu|device\.type == .cpu.", p.read_text(encoding="utf-8"))]
    assert set(found) <= {"kernels_cpu.py"}


LONG, MANY = 80, 8  # lines of a function without its docstring, and its parameters
EXEMPT = (
    *("litgpt.commands.", "litgpt.finetune.", "litgpt.api", "litgpt.train.optimizers", "litgpt.data."),  # options
    "litgpt.compat.",  # LitGPT's signatures
)


@pytest.mark.parametrize("module", MODULES)
def test_functions_are_short(module):
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            has_docstring = ast.get_docstring(node) is not None
            docstring = node.body[0].end_lineno - node.body[0].lineno + 1 if has_docstring else 0
            n_lines = node.end_lineno - node.lineno + 1 - docstring
            assert n_lines <= LONG, f"{node.name} has {n_lines} lines"
            arguments = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
            n = len([a for a in arguments if a not in ("self", "cls")])
            assert n <= MANY or module.startswith(EXEMPT), f"{node.name} has {n} parameters"
