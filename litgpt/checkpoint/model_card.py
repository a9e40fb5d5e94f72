"""The model card of a result: `README.md`, for people, and for the hub, which reads the YAML at its beginning."""

import re
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

import yaml

from litgpt.checkpoint.hub import PICO, repository_id
from litgpt.errors import UserError
from litgpt.storage.files import is_there, parse_yaml, read_json, read_text
from litgpt.storage.outputs import CARD
from litgpt.text.prompts import chat_templates

ADAPTER = "adapter_config.json"
LEGAL = re.compile(r"(LICENSE|LICENCE|NOTICE|USE_POLICY)(\.(txt|md))?", re.IGNORECASE)  # files of a base
LEGAL_BYTES = 2**20
LICENSE = ("license", "license_name", "license_link")  # fields that pass from a base to its results
TRAINING = "## Training"
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM accepts as --max-lora-rank


@dataclass
class Facts:
    """What a card says that does not follow from the files beside it.

    Args:
        base: The base model on the hub, if it is known.
        training: Lines about the training.
        data_sets: The data sets on the hub among the training data.
        license: The fields of `LICENSE` that are known.
    """

    base: Optional[str] = None
    training: Sequence[str] = ()
    data_sets: Sequence[str] = ()
    license: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of_base(cls, base: Path) -> "Facts":
        """What a result takes over from the folder of its base."""
        fields = front_matter(card_text(base))
        return cls(repository_id(base), license={k: fields[k] for k in LICENSE if is_text(fields.get(k))})

    @classmethod
    def of_source(cls, source: Path, base: Path) -> "Facts":
        """What a copy of a result, or of an adapter merged into its base, takes over: the facts of the result's card,
        or if it has none, of the base, which is `source` itself if that is not an adapter."""
        text = card_text(source)
        training = re.search(rf"^{TRAINING}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
        if training is None:
            return cls.of_base(base)
        fields = front_matter(text)
        known = fields.get("base_model")
        data_sets = fields.get("datasets")
        return cls(
            known if is_text(known) else repository_id(base) if base != source else None,
            training[1].strip().splitlines(),
            [name for name in data_sets if is_text(name)] if isinstance(data_sets, list) else [],
            {k: fields[k] for k in LICENSE if is_text(fields.get(k))},
        )


def write_card(folder: Path, name: str, facts: Facts, legal: Optional[Path]) -> None:
    """Write the card of a result that is otherwise complete, and copy the license files from the folder `legal`.

    `name` is the title.
    """
    for file in legal.iterdir() if legal is not None else ():
        if LEGAL.fullmatch(file.name) and file.is_file() and file.stat().st_size <= LEGAL_BYTES:
            shutil.copyfile(file, folder / file.name)
    config = read_json(folder / ADAPTER) if is_there(folder / ADAPTER) else None
    is_lora = config is not None and config.get("peft_type") == "LORA"
    relation = "adapter" if config is not None else "finetune" if facts.training else "quantized"
    fields: dict[str, Any] = {"base_model": facts.base, "base_model_relation": relation} if facts.base else {}
    fields["library_name"] = "transformers" if config is None else "peft" if is_lora else "litgpt"
    fields |= {"pipeline_tag": "text-generation", "tags": ["litgpt", *(["lora"] if is_lora else [])], **facts.license}
    if facts.data_sets:
        fields["datasets"] = list(facts.data_sets)
    sections = [f"# {name}", introduction(facts, config)]
    sections += ["\n".join([TRAINING, "", *facts.training])] if facts.training else []
    sections += [usage(folder, "."), license_text(facts, folder)]
    front = yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)
    text = f"---\n{front}---\n\n" + "\n\n".join(section for section in sections if section) + "\n"
    (folder / CARD).write_text(text, encoding="utf-8", newline="\n")


def introduction(facts: Facts, config: Optional[dict[str, Any]]) -> str:
    base = f"[{facts.base}](https://huggingface.co/{facts.base})" if facts.base else ""
    if config is None:
        made = "finetuned with" if base and facts.training else "trained with" if facts.training else "written by"
        return f"{base or 'A model'}{',' * bool(base)} {made} litgpt, in Hugging Face format."
    if base:
        return f"An adapter for {base}, trained with litgpt. The base is loaded with it."
    if Path(str(config.get("base_model_name_or_path"))).resolve() == PICO.resolve():
        return f"An adapter for pico, the small model in the litgpt package. `{ADAPTER}` has the path of the base."
    return (
        f"An adapter, trained with litgpt. Its base has no known name on the hub: `{ADAPTER}` gives the path where it "
        "was on the machine of the training. Elsewhere, load the base yourself, or pass it to litgpt with `--base`."
    )


def usage(folder: Path, name: str) -> str:
    """How to use a result in several programs. `name` is its path, or its name on the hub."""
    config = read_json(folder / ADAPTER) if is_there(folder / ADAPTER) else None
    where = "run in this folder" if name == "." else name
    parts = [f"## Use\n\nWith litgpt ({where}):\n\n```bash\nlitgpt chat {name}\n```"]
    if config is None or config.get("peft_type") == "LORA":
        parts.append(
            f"With transformers{' and peft' * (config is not None)}:\n\n```python\n{snippet(folder, name)}\n```"
        )
        parts.append(f"With vLLM:\n\n```bash\n{vllm_command(config, name)}\n```")
        parts.append(f"With Ollama, as a GGUF file:\n\n```bash\nlitgpt export {name} --to ollama\n```")
    else:
        parts.append("Only litgpt reads this kind of adapter.")
    return "\n\n".join(parts)


def snippet(folder: Path, name: str) -> str:
    """A program that lets the model answer."""
    adapter = is_there(folder / ADAPTER)
    model = "AutoPeftModelForCausalLM" if adapter else "AutoModelForCausalLM"
    names = "AutoTokenizer" if adapter else f"{model}, AutoTokenizer"
    lines = ["from peft import AutoPeftModelForCausalLM"] if adapter else []
    lines += [
        f"from transformers import {names}",
        "",
        f'name = "{name}"',
        "tokenizer = AutoTokenizer.from_pretrained(name)",
        f'model = {model}.from_pretrained(name, dtype="auto")',
    ]
    if "default" in chat_templates(folder):
        lines += [
            'messages = [{"role": "user", "content": "Hello!"}]',
            "prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)",
            'ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]',
        ]
    else:
        lines.append('ids = tokenizer("Once upon a time", return_tensors="pt")["input_ids"]')
    lines += [
        "answer = model.generate(input_ids=ids, max_new_tokens=100)[0, ids.shape[1] :]",
        "print(tokenizer.decode(answer, skip_special_tokens=True))",
    ]
    return "\n".join(lines)


def vllm_command(config: Optional[dict[str, Any]], name: str) -> str:
    """The command that serves a model, or an adapter over its base where vLLM can do that."""
    if config is None:
        return f"vllm serve {name}"
    base, rank = str(config.get("base_model_name_or_path")), int(config.get("r") or 8)
    unsupported = [config.get(key) for key in ("use_dora", "modules_to_save", "target_parameters")]
    if (
        any(unsupported)
        or "lm_head" in (config.get("target_modules") or [])
        or rank > RANKS[-1]
        or Path(base).is_absolute()
    ):
        return f"litgpt merge_lora {name} --out_dir merged\nvllm serve merged"
    allowed = next(r for r in RANKS if r >= rank)
    return f"vllm serve {base} --enable-lora --max-lora-rank {allowed} --lora-modules adapter={name}"


def license_text(facts: Facts, folder: Path) -> str:
    files = sorted(path.name for path in folder.iterdir() if LEGAL.fullmatch(path.name))
    named = facts.license.get("license_name") or facts.license.get("license")
    if not (facts.base or named or files):
        return ""
    text = f"## License\n\nThe license of the base model applies{f': {named}' if named else ''}."
    return f"{text} See {', '.join(files)}." if files else text


def card_text(folder: Path) -> str:
    """The card in a folder; empty if there is none, or it is not readable."""
    with suppress(UserError):
        return read_text(folder / CARD)
    return ""


def front_matter(text: str) -> dict[str, Any]:
    """The YAML fields at the beginning of a card; empty if there are none, or they are not valid."""
    match = re.match(r"\ufeff?---\r?\n(.*?)^---\s*$", text, re.MULTILINE | re.DOTALL)
    with suppress(UserError):
        fields = parse_yaml(match[1], CARD) if match else None
        return fields if isinstance(fields, dict) else {}
    return {}


def is_text(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= 200 and value.isprintable()
