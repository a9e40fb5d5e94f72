"""The built-in model, what it is made from, and what it is finetuned on."""

import re
from itertools import islice
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from litgpt.__main__ import main
from litgpt.checkpoint.find import find_folder
from litgpt.data.pico import PicoSums, PicoText, in_words, sums
from litgpt.methods.model_source import ModelSource


def folder():
    return find_folder(Path("pico"))


def test_it_is_small_and_loads_in_transformers():
    assert sum(p.stat().st_size for p in folder().iterdir() if p.is_file()) <= 2_000_000
    theirs = AutoModelForCausalLM.from_pretrained(folder(), dtype=torch.float32).eval()
    source = ModelSource.open(folder())
    ours = source.model(torch.float32, torch.device("cpu"))
    ids = torch.randint(6, 640, (2, 200), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, rtol=0, atol=1e-4)
    messages = [{"role": "user", "content": "What colour is the frog?"}]
    tokenizer = AutoTokenizer.from_pretrained(folder())
    expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert source.tokenizer().encode(source.style().prompt(messages), special=False) == expected


def test_it_chats(capsys):
    for prompt, answer in (("What colour is the frog?", "The frog is green."), ("Say forty two again.", "forty two.")):
        main(["generate", "pico", "--prompt", prompt, "--temperature", "0", "--precision", "32-true"])
        assert capsys.readouterr().out.endswith(f"{answer}\n")


def test_sums():
    rows = sums()
    assert len(rows) == len(set(rows)) == 3240
    assert ("What is forty two plus seventeen?", "fifty nine.") in rows
    assert in_words(119) == "one hundred and nineteen" and in_words(70) == "seventy"
    parts = {name: [row["messages"][0]["content"] for row in make()] for name, make in PicoSums(seed=3).parts().items()}
    assert len(parts["val"]) == 300 and not set(parts["val"]) & set(parts["train"])
    assert sorted(parts["val"] + parts["train"]) == sorted(question for question, _ in rows)


def test_no_sum_is_in_the_pretraining():
    for row in islice(PicoText(n_rows=20000).make(), 20000):
        text = row["text"] if "text" in row else " ".join(m["content"] for m in row["messages"])
        assert "plus" not in text and "What is" not in text


def test_a_few_steps_teach_it_the_form_of_an_answer(tmp_path, capsys):
    """Through its own chat template, from the finetune to the adapter's answer."""
    more = "--train.max_steps 8 --train.lr_warmup_steps 2 --data.n_val 30 --eval.exact_match null".split()
    main(["finetune", "lora", "--config", "pico/lora", *more, "--out_dir", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    before, after = (float(x) for x in re.search(r"validation loss +([\d.]+) -> ([\d.]+)", printed).groups())
    assert before > 3 and after < 1
    final = str(tmp_path / "out" / "final")
    main(["generate", final, "--prompt", "What is twenty plus thirty?", "--temperature", "0"])
    answer = capsys.readouterr().out.strip().rpartition("<|assistant|>")[2]
    assert answer in {a for _, a in sums()}


@pytest.mark.long
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_it_learns_to_add(tmp_path, capsys, seed):
    """Held-out sums: under 20 % right before, over 80 % after."""
    words = ["--seed", seed, "--data.seed", seed, "--out_dir", tmp_path / "out"]
    main(["finetune", "lora", "--config", "pico/lora", *map(str, words)])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("exact answers, ")]
    before, after = (int(line.split()[3]) / int(line.split()[5]) for line in lines)
    assert before < 0.2 and after > 0.8
