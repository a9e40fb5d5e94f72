"""Files from strangers cannot run a command, read another file or take all the memory: refused in one line."""

import ast
import json
import os
import pickle
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import litgpt
from litgpt.__main__ import main
from litgpt.checkpoint.folder import Checkpoint
from litgpt.errors import UserError
from litgpt.storage.outputs import SUMS, write_sums
from litgpt.text.chat_template import ChatTemplate
from litgpt.text.prompts import load_style
from litgpt.train.resume.state import STATE, damage
from tests.conftest import save_llama
from tests.runs import go, words


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """What an attack would leave."""
    return tmp_path / "attacked"


def refused(command: list[str], mark: Path, capsys: pytest.CaptureFixture) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(command)
    error = str(capsys.readouterr().err)
    assert stop.value.code == 2 and error.count("litgpt: error: ") == 1 and error.count("\n") == 1, error
    assert not mark.exists(), error
    return error


# pickles


class Attack:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize("kind", ["torch", "pickle", "inside", "other fields", "no state"])
def test_a_pickle_that_runs_a_command(kind, base, rows_file, tmp_path, mark, capsys):
    """In the place of a state, in a folder whose sums are right."""
    out = tmp_path / "out"
    assert go("lora", base, rows_file, out, "--train.pause_after", 3) == 75
    step = out / "step-000003"
    if kind == "pickle":
        (step / STATE).write_bytes(pickle.dumps(Attack(mark)))
    else:
        state = torch.load(step / STATE, weights_only=True)
        told = {
            "torch": Attack(mark),
            "inside": state | {"progress": state["progress"] | {"steps": Attack(mark)}},
            "other fields": state | {"random": {"cpu": 1}, "settings": [1]},
            "no state": [1, 2],
        }
        torch.save(told[kind], step / STATE)
    write_sums(step, step=3)
    assert damage(step) is None
    error = refused(words("lora", base, rows_file, out, "--resume", "true"), mark, capsys)
    assert f"{step / STATE} cannot be read" in error
    if kind == "torch":
        torch.load(step / STATE, weights_only=False)
        assert mark.exists(), "this attack would not have worked anyway"


def test_every_torch_load_loads_weights_only():
    """And nothing else of the package unpickles, or reads YAML that makes objects."""
    for file in Path(litgpt.__file__).parent.rglob("*.py"):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            name = ast.unparse(call.func)
            if name == "torch.load":
                given = {k.arg: ast.unparse(k.value) for k in call.keywords}
                assert given.get("weights_only") == "True", file
            if name == "yaml.load":
                assert "SafeLoader" in ast.unparse(call.args[1]), file
            assert name not in ("yaml.unsafe_load", "yaml.full_load", "eval", "exec", "pickle.load"), file
        names = [a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names]
        assert not {"pickle", "dill", "marshal", "shelve"} & {*names}, file


# names and headers


@pytest.mark.parametrize("name", ["../../x/model.safetensors", "/etc/passwd", "a/../model.safetensors"])
def test_an_index_that_names_a_file_elsewhere(name, llama, tmp_path, tokenizer_file, mark, capsys):
    folder = save_llama(tmp_path / "model", tokenizer_file, shards=True)
    index = folder / "model.safetensors.index.json"
    fields = json.loads(index.read_text())
    fields["weight_map"]["lm_head.weight"] = name
    index.write_text(json.dumps(fields))
    error = refused(["generate", str(folder)], mark, capsys)
    assert "outside its folder" in error


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x"])
def test_a_list_of_sums_that_names_a_file_elsewhere(name, tmp_path):
    (tmp_path / "c").mkdir()
    (tmp_path / "x").write_text("")
    (tmp_path / "c" / SUMS).write_text(json.dumps({"step": 1, "files": {name: [0, 0]}}))
    problem = damage(tmp_path / "c")
    assert problem is not None and SUMS in problem and repr(name) in problem


@pytest.mark.parametrize("length", [10 * 2**30, 2**63, 2**64 - 1, 200 * 2**20])
def test_a_header_of_ten_gigabytes(length, tmp_path, tokenizer_file, mark, capsys):
    folder = save_llama(tmp_path / "model", tokenizer_file)
    with open(folder / "model.safetensors", "wb") as f:
        f.write(struct.pack("<Q", length) + b"{")
        f.truncate(min(8 + length, 20 * 2**30))  # sparse: the file says the same
    error = refused(["generate", str(folder)], mark, capsys)
    assert "model.safetensors is damaged" in error


def test_tensors_that_lie_outside_the_file(tmp_path, tokenizer_file):
    folder = save_llama(tmp_path / "model", tokenizer_file)
    for fields in (
        {"x": {"dtype": "F32", "shape": [10**12], "data_offsets": [0, 4 * 10**12]}},
        {"x": {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 8]}},
        {"x": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}},
    ):
        header = json.dumps(fields).encode()
        (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
        with pytest.raises(UserError, match="damaged"):
            Checkpoint(folder)


# templates

TEMPLATES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__ }}",
    "{{ messages[0].items.__globals__ }}",
    "{{ raise_exception.__globals__['__builtins__'] }}",
    "{{ strftime_now.__globals__.datetime }}",
    "{{ cycler.__init__.__globals__.os.popen('touch MARK').read() }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ lipsum.__globals__.os.system('touch MARK') }}",
    "{{ self._TemplateReference__context }}",
    "{% include '/etc/hostname' %}",
    "{% import '/etc/hostname' as x %}",
    "{% extends '/etc/hostname' %}",
    "{{ open('/etc/hostname').read() }}",
    "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    "{{ ('{0.__class__}' | attr('format'))(messages) }}",
    "{{ messages | attr('__class__') }}",
    "{{ messages.append(1) }}",
    "{% for i in range(10**10) %}{% endfor %}",
    "{{ 1 / 0 }}",
    "{{ [][5][3] }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ messages | map('int') | sum(start='a') }}",
]


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_template_cannot_leave_its_sandbox(template, mark, llama):
    style = ChatTemplate(template.replace("MARK", str(mark)), {"bos_token": "<s>"})
    host = Path("/etc/hostname")
    secret = host.read_text().strip() if host.is_file() else "root:"
    try:
        text = style.render([{"role": "user", "content": "hello"}], True)
    except UserError as e:
        text = str(e)
        assert text.startswith(("the chat template refuses", "The chat template is not valid"))
    assert not mark.exists() and "<class" not in text and "builtin" not in text
    assert not secret or secret not in text


def test_a_template_in_a_folder(tmp_path, tokenizer_file, mark, capsys):
    folder = save_llama(tmp_path / "model", tokenizer_file)
    (folder / "chat_template.jinja").write_text("{% include '/etc/passwd' %}")
    error = refused(["generate", str(folder), "--prompt", "hello"], mark, capsys)
    assert "the chat template refuses these messages" in error and "root:" not in error


# YAML


def test_yaml_that_makes_objects(tmp_path, llama, mark, capsys):
    attack = f"!!python/object/apply:os.system ['touch {mark}']"
    config = tmp_path / "hyperparameters.yaml"
    for text in (f"seed: {attack}\n", f"data: {attack}\n", attack):
        config.write_text(text)
        error = refused(["finetune", "lora", str(llama), "--config", str(config)], mark, capsys)
        assert str(config) in error and "tag" in error
    style = tmp_path / "prompt_style.yaml"
    style.write_text(f"prompt_style: {attack}\n")
    with pytest.raises(UserError, match=r"(?s)prompt_style\.yaml .* tag"):
        load_style(tmp_path)
    for flags in (["--data", attack], ["--optimizer", f"{{lr: {attack}}}"], ["--train", attack], ["--seed", attack]):
        refused(["finetune", "lora", str(llama), *flags], mark, capsys)
    assert yaml.unsafe_load("!!python/object/apply:os.path.join ['a']") == "a"  # the attack is a real one


def popen(mark: Path) -> dict[str, Any]:
    return {"class_path": "subprocess.Popen", "init_args": {"args": ["touch", str(mark)]}}


PLACES: list[tuple[str, ...]] = [
    ("data",),
    ("data", "init_args", "json_path"),
    ("data", "init_args", "columns"),
    ("data", "init_args", "columns", "output"),
    ("optimizer",),
    ("optimizer", "init_args", "lr"),
    ("optimizer", "init_args", "betas"),
    ("optimizer", "init_args", "args"),  # of AdamW8bit, which has no types: anything goes there
    ("optimizer", "init_args", "min_8bit_size"),
    ("train",),
    ("train", "max_norm"),
    ("log", "metadata"),
    ("log", "metadata", "a"),
    ("seed",),
    ("out_dir",),
    ("lora_targets",),
]


@pytest.mark.parametrize("place", PLACES, ids=".".join)
def test_a_recipe_cannot_call_what_it_likes(place, llama, rows_file, tmp_path, mark, capsys):
    if place[-1] in ("args", "min_8bit_size"):
        pytest.importorskip("bitsandbytes")
    name = "AdamW8bit" if place[-1] in ("args", "min_8bit_size") else "torch.optim.AdamW"
    fields: dict[str, Any] = {
        "data": {"class_path": "JSON", "init_args": {"json_path": str(rows_file), "val_split_fraction": 0.1}},
        "optimizer": {"class_path": name, "init_args": {}},
        "train": {"max_steps": 1},
        "out_dir": str(tmp_path / "out"),
        "accelerator": "cpu",
    }
    inner = fields
    for key in place[:-1]:
        inner = inner.setdefault(key, {})
    inner[place[-1]] = popen(mark)
    config = tmp_path / "recipe.yaml"
    config.write_text(yaml.safe_dump(fields))
    refused(["finetune", "lora", str(llama), "--config", str(config)], mark, capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "path", ["os.system", "subprocess.run", "builtins.eval", "litgpt.data.data_module.TokenizedDataset"]
)
def test_functions_and_other_classes_are_no_data_set_and_no_optimizer(path, llama, tmp_path, mark, capsys):
    init = {"command": f"touch {mark}"}
    for name, message in (("data", "no such data set"), ("optimizer", "no such optimizer")):
        config = tmp_path / "recipe.yaml"
        config.write_text(yaml.safe_dump({name: {"class_path": path, "init_args": init}}))
        error = refused(["finetune", "lora", str(llama), "--config", str(config)], mark, capsys)
        assert f"--{name} {path}" in error and message in error


def test_a_model_config_cannot_name_a_class(llama, tmp_path, mark, capsys):
    """Its values have no type, so the library would take a class there."""
    for fields in (popen(mark), {"model_type": popen(mark)}, {"model_type": "llama", "a": [{"b": popen(mark)}]}):
        config = tmp_path / "recipe.yaml"
        config.write_text(yaml.safe_dump({"model_config": fields, "tokenizer_dir": str(llama)}))
        assert "subprocess.Popen must not be here" in refused(["pretrain", "--config", str(config)], mark, capsys)
