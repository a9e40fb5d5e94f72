"""lm-eval's tasks of each kind over files of a test, as YAML."""

import json
from pathlib import Path
from typing import Any

import yaml

KINDS: dict[str, dict[str, Any]] = {
    "choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "Sentence: {{begin}}",
        "doc_to_target": 0,
        "doc_to_choice": "{{[good, bad, good + ' ' + bad]}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "pairs": {  # whole sentences against each other, with nothing before them
        "output_type": "multiple_choice",
        "doc_to_text": "",
        "doc_to_target": 0,
        "doc_to_choice": "{{[begin + ' ' + good, begin + ' ' + bad]}}",
        "metric_list": [{"metric": "acc"}],
    },
    "likelihood": {
        "output_type": "loglikelihood",
        "doc_to_text": "They say {{begin}} ",  # a blank that belongs to the answer
        "doc_to_target": "{{good}}",
        "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
    },
    "rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{(begin + ' ' + good + ' ') * repeat}}",  # several windows
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    },
    "generation": {
        "output_type": "generate_until",
        "doc_to_text": "{{begin}}",
        "doc_to_target": "{{good}}",
        "generation_kwargs": {"until": ["\n", "."], "max_gen_toks": 24},
        "metric_list": [{"metric": "exact_match"}],
    },
}
WORDS = "the quick brown fox jumps over a lazy dog and then it runs away from them all".split()


def made_rows(n: int) -> list[dict[str, Any]]:
    def words(i: int, count: int) -> str:
        return " ".join(WORDS[(i * 5 + k * (i % 7 + 1)) % len(WORDS)] for k in range(count))

    return [
        {"begin": words(i, i % 9 + 1), "good": words(i + 3, i % 3 + 1), "bad": words(i + 8, i % 2 + 1), "repeat": 25}
        for i in range(n)
    ]


def write_tasks(folder: Path, rows: list[dict[str, Any]], shots: int = 0, **more: Any) -> Path:
    """A folder of tasks named as `KINDS` over these rows; the first ones serve as examples."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, fields in KINDS.items():
        task = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": str(file)},
            "test_split": "train",
            "fewshot_split": "train",
            "num_fewshot": shots if name in ("choice", "generation") else 0,
            "metadata": {"version": 1.0},
            **fields,
            **more,
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))
    return folder
