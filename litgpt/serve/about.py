"""What the chat page shows besides answers: the defaults of the server, and facts about each model."""

import re
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from litgpt.checkpoint.model_card import Facts
from litgpt.errors import UserError
from litgpt.generate.inference_model import InferenceModel
from litgpt.serve.models import ModelRegistry
from litgpt.serve.settings import Settings
from litgpt.train.examples import QUESTIONS, read_examples
from litgpt.train.resume.folder import EXAMPLES

SHOWN = ("base", "method", "data", "training rows", "validation loss")  # of the table of a model card
ROW = re.compile(r"\| (.+?) \| (.*) \|")
DETAILS = re.compile("`|, hash [0-9a-f]+$")
OPEN_REASONING = re.compile(r"<think(ing)?>\s*\Z")


def about_models(registry: ModelRegistry, settings: Settings) -> dict[str, Any]:
    models = [{"id": name, **about_model(model)} for name, model in registry.models.items()]
    return {"defaults": {**asdict(settings.sampling), "max_tokens": settings.max_new_tokens}, "models": models}


def about_model(model: InferenceModel) -> dict[str, Any]:
    source = model.source
    facts = Facts.of_source(source.folder, source.checkpoint.folder)
    rows = [found.groups() for line in facts.training if (found := ROW.fullmatch(line))]
    prompt = ""
    with suppress(UserError):  # a style may not accept it
        prompt = model.style.prompt([{"role": "user", "content": "Hello"}])
    return {
        "training": [(key, DETAILS.sub("", value).replace("\\|", "|")) for key, value in rows if key in SHOWN],
        "questions": questions(source.folder.resolve().parent),
        "single_turn": model.style.single_turn,
        "reasoning": OPEN_REASONING.search(prompt) is not None,
    }


def questions(run: Path) -> list[str]:
    """Prompts of validation rows that a run recorded in its output folder."""
    with suppress(UserError):
        return [line["question"] for line in read_examples(run / EXAMPLES) if "question" in line][:QUESTIONS]
    return []
