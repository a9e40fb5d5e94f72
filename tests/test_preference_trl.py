"""Preference training against `trl`: the same rows in the same order, one micro-batch per step, 20 steps."""

import csv
import json
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from litgpt.__main__ import main
from litgpt.data import JSON
from litgpt.data.batches import steps_of_rows
from litgpt.data.tokens import ANSWER, IN_LOSS, TokenizedRows
from litgpt.text.tokenizer import Tokenizer
from tests.conftest import save_llama, some

pytestmark = pytest.mark.skipif(find_spec("trl") is None, reason="trl is not installed")
SEED, STEPS, GLOBAL, RATE = 7, 20, 6, 2e-3
CASES: dict[str, tuple[str, list[str], dict[str, Any]]] = {  # the command, its flags, and the options in trl
    **{
        f"dpo {loss}": ("dpo", ["--preference.loss", loss], {"loss_type": [loss]})
        for loss in ("sigmoid", "hinge", "apo_zero", "ipo", "sigmoid_norm")
    },
    "dpo robust": (
        "dpo",
        ["--preference.loss", "robust", "--preference.label_smoothing", "0.1"],
        {"loss_type": ["robust"], "label_smoothing": 0.1},
    ),
    "dpo with sft": (
        "dpo",
        ["--preference.sft_weight", "0.3", "--preference.beta", "0.4"],
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.3], "beta": 0.4},
    ),
    "orpo": ("orpo", [], {}),
    "cpo": ("cpo", ["--preference.label_smoothing", "0.1"], {"loss_type": "sigmoid", "label_smoothing": 0.1}),
    "simpo": ("simpo", ["--preference.beta", "2"], {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": 2.0}),
    "kto": ("kto", ["--preference.desirable_weight", "1.3"], {"desirable_weight": 1.3}),
}


def make_rows(n: int, labels: bool) -> list[dict[str, Any]]:
    g = torch.Generator().manual_seed(3)

    def text(least: int) -> str:
        letters = torch.randint(97, 123, (int(torch.randint(least, 18, (1,), generator=g)),), generator=g)
        return " " + "".join(chr(int(c)) for c in letters)

    rows: list[dict[str, Any]] = []
    for _ in range(n):
        if labels:
            label = bool(torch.rand((), generator=g) < 0.6)
            rows.append({"prompt": text(3), "completion": text(2), "label": label})
        else:
            rows.append({"prompt": text(3), "chosen": text(2), "rejected": text(2)})
    return rows


def tokens(rows: TokenizedRows, i: int) -> dict[str, Any]:
    """A row with the columns of trl."""
    found: dict[str, Any] = {"prompt": "-", "chosen": "-", "rejected": "-", "prompt_ids": rows.prompt(i)}
    for name, (ids, mask) in zip(("chosen", "rejected"), rows.sequences(i)):
        n = int(((mask & (ANSWER | IN_LOSS)) == ANSWER | IN_LOSS).nonzero()[0])
        assert ids[:n].tolist() == rows.prompt(i)
        found[f"{name}_ids"] = ids[n:].tolist()
    return found


def trainer_of(name: str, llama: Path, out: Path, rows: Iterable[dict[str, Any]], options: dict[str, Any]) -> Any:
    from datasets import Dataset
    from torch.utils.data import SequentialSampler
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if name == "dpo":
        from trl import DPOConfig as Config
        from trl import DPOTrainer as Trainer
    elif name == "kto":
        from trl import KTOConfig as Config
        from trl import KTOTrainer as Trainer
    elif name == "orpo":
        from trl.experimental.orpo import ORPOConfig as Config
        from trl.experimental.orpo import ORPOTrainer as Trainer
    else:
        from trl.experimental.cpo import CPOConfig as Config
        from trl.experimental.cpo import CPOTrainer as Trainer

    class InOrder(Trainer):  # type: ignore[misc, valid-type]
        def _get_train_sampler(self, *args: Any) -> Any:
            return SequentialSampler(self.train_dataset)

        def _prepare_dataset(self, dataset: Any, *args: Any) -> Any:
            return dataset

        def tokenize_row(self, row: dict[str, Any], model: Any = None) -> dict[str, Any]:
            made = {"prompt_input_ids": row["prompt_ids"], "prompt_attention_mask": [1] * len(row["prompt_ids"])}
            for side in ("chosen", "rejected"):
                ids, n = row["prompt_ids"] + row[f"{side}_ids"], len(row["prompt_ids"])
                made |= {f"{side}_input_ids": ids, f"{side}_attention_mask": [1] * len(ids)}
                made |= {f"{side}_labels": [-100] * n + ids[n:]}
            return made

    config = Config(
        output_dir=str(out),
        per_device_train_batch_size=GLOBAL,
        max_steps=STEPS,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=0.0,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
        **options,
    )
    tokenizer = AutoTokenizer.from_pretrained(llama, pad_token="</s>")
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    return InOrder(model=model, args=config, processing_class=tokenizer, train_dataset=Dataset.from_list(list(rows)))


@pytest.mark.parametrize("case", some(CASES, "dpo sigmoid"))
def test_curves_of_trl(case, tokenizer_file, tmp_path):
    name, flags, options = CASES[case]
    llama = save_llama(tmp_path / "model", tokenizer_file)
    file = tmp_path / "rows.json"
    file.write_text(json.dumps(make_rows(40, labels=name == "kto")))
    common = f"--method full --data.prompt_style none --data.val_split_fraction 0 --out_dir {tmp_path / 'out'} "
    common += f"--precision 32-true --seed {SEED} --train.max_steps {STEPS} --train.global_batch_size {GLOBAL} "
    common += f"--train.lr_schedule constant --train.lr_warmup_steps 0 --optimizer.lr {RATE} --accelerator cpu "
    common += "--optimizer.weight_decay 0 --train.epochs 9 --train.micro_batch_size 2"
    main(["finetune", name, str(llama), str(file), *common.split(), *flags])
    with open(tmp_path / "out" / "metrics.csv", newline="") as f:
        ours = list(csv.DictReader(f))

    data = JSON(str(file), prompt_style="none", val_split_fraction=0)
    data.unit = "label" if name == "kto" else "pair"
    rows = data.load(Tokenizer(llama), llama, 256).train
    order: list[dict[str, Any]] = []
    for _, numbers in zip(range(STEPS), steps_of_rows(len(rows), GLOBAL, None, SEED)):
        made = [tokens(rows, i) for i in numbers]
        if name == "kto":
            rejected = [bool(rows.row(i)[1][-1] & 4) for i in numbers]
            following = [*made[1:], *made[:1]]
            made = [
                {
                    "prompt_ids": row["prompt_ids"],
                    "completion_ids": row["chosen_ids"],
                    "label": not bad,
                    "KL_completion_ids": other["chosen_ids"],
                }
                for row, other, bad in zip(made, following, rejected)
            ]
        order += made
    trainer = trainer_of(name, llama, tmp_path / "trl", order, options)
    trainer.train()
    history = [line for line in trainer.state.log_history if "loss" in line]
    assert len(history) == len(ours) == STEPS
    compared = [key for key in ours[0] if key in ("loss", "kl") or ("/" in key and not key.startswith("val_"))]
    assert len(compared) == 7 and all(any(line[key] for line in ours) for key in compared)
    for mine, theirs in zip(ours, history):
        for key in compared:
            assert bool(mine[key]) == (key in theirs)
            if mine[key]:
                assert float(mine[key]) == pytest.approx(theirs[key], abs=1e-4, rel=1e-5), (mine["step"], key)
    assert float(ours[-1]["loss"]) < float(ours[0]["loss"])
