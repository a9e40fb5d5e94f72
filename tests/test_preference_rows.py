"""Rows for training on preferences: their forms, what `litgpt data check` says, and the tokens of `trl`."""

import csv
import json
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Optional

import pytest
import torch

from litgpt.__main__ import main
from litgpt.data.columns import match
from litgpt.data.forms import rename, to_row, to_sides
from litgpt.data.json_file import JSON
from litgpt.data.messages import ROLES
from litgpt.data.tokens import ANSWER, IN_LOSS, REJECTED, TokenizedRows
from litgpt.errors import UserError
from litgpt.text.tokenizer import Tokenizer
from litgpt.train.objectives import PreferenceArgs, balance

HERE = "f.jsonl, line 3"


def user(content: str) -> dict:
    return {"role": "user", "content": content}


def bot(content: str, **more: Any) -> dict:
    return {"role": "assistant", "content": content, **more}


Q, A, B = user("q"), bot("a"), bot("b")
CALLS = bot("", tool_calls=[{"function": {"name": "add", "arguments": '{"a": 1}'}}])


def said(row: Optional[Any]) -> Optional[str]:
    """A conversation in short: roles and texts, with "(...)" around answers that are part of the prompt."""
    if row is None:
        return None
    parts = []
    for m in row.messages:
        text = f"{m['role'][0]}:{m['content']}{'+' + m['input'] if m.get('input') else ''}"
        text += "".join(f"<{m[key]}>" for key in ("reasoning_content", "thinking") if m.get(key))
        text += f"[{','.join(c['function']['name'] for c in m['tool_calls'])}]" if m.get("tool_calls") else ""
        parts.append(f"({text})" if m.get("_context") else text)
    return " ".join(parts)


def sides(fields: dict, unit: str = "pair") -> list[tuple[Optional[str], Optional[str]]]:
    form, columns = match(fields, HERE, labels=unit == "label")
    return [(said(a), said(b)) for a, b in to_sides(rename(fields, columns, HERE), form, HERE, unit)]


USUAL = ("u:q a:a", "u:q a:b")
PAIRS: dict[str, tuple[dict, tuple[str, str]]] = {
    "texts": ({"prompt": "q", "chosen": "a", "rejected": "b"}, USUAL),
    "messages": ({"prompt": [Q], "chosen": [A], "rejected": [B]}, USUAL),
    "an implicit prompt": ({"chosen": [Q, A], "rejected": [Q, B]}, USUAL),
    "Anthropic HH": (
        {
            "chosen": "\n\nHuman: q\n\nAssistant: x\n\nHuman: r\n\nAssistant: a",
            "rejected": "\n\nHuman: q\n\nAssistant: x\n\nHuman: r\n\nAssistant: b",
        },
        ("u:q (a:x) u:r a:a", "u:q (a:x) u:r a:b"),
    ),
    "a transcript as the prompt": (
        {"prompt": "\n\nHuman: q\n\nAssistant: x\n\nHuman: r\n\nAssistant:", "chosen": "a", "rejected": "b"},
        ("u:q (a:x) u:r a:a", "u:q (a:x) u:r a:b"),
    ),
    "Orca": ({"system": "s", "question": "q", "chosen": "a", "rejected": "b"}, ("s:s u:q a:a", "s:s u:q a:b")),
    "UltraFeedback, binarized": (
        {"prompt": "q", "prompt_id": "1", "chosen": [Q, A], "rejected": [Q, B], "messages": [Q, A], "score_chosen": 8},
        USUAL,
    ),
    "with the prompt as a column": ({"input": "q", "chosen": [Q, A], "rejected": [Q, B]}, USUAL),
    "LLaMA-Factory, alpaca": (
        {"instruction": "q", "input": "i", "chosen": "a", "rejected": "b", "history": [["x", "y"]]},
        ("u:x (a:y) u:q+i a:a", "u:x (a:y) u:q+i a:b"),
    ),
    "LLaMA-Factory, sharegpt": (
        {
            "conversations": [{"from": "human", "value": "q"}],
            "chosen": {"from": "gpt", "value": "a"},
            "rejected": {"from": "gpt", "value": "b"},
        },
        USUAL,
    ),
    "messages in CSV": (
        {"prompt": json.dumps([Q]), "chosen": json.dumps([A]), "rejected": json.dumps([B])},
        USUAL,
    ),
    "an implicit prompt in CSV": ({"chosen": json.dumps([Q, A]), "rejected": json.dumps([Q, B])}, USUAL),
    "a text in brackets": (
        {"prompt": "[1]", "chosen": '[{"a": 1}]', "rejected": "[]"},
        ('u:[1] a:[{"a": 1}]', "u:[1] a:[]"),
    ),
    "the end of the prompt again": (
        {"prompt": [Q, bot("x"), user("r")], "chosen": [user("r"), A], "rejected": [user("r"), B]},
        ("u:q (a:x) u:r a:a", "u:q (a:x) u:r a:b"),
    ),
    "the chosen answer in the prompt": ({"messages": [Q, A], "chosen": "a", "rejected": "b"}, USUAL),
    "tool calls": ({"prompt": "q", "chosen": [CALLS], "rejected": [B]}, ("u:q a:[add]", "u:q a:b")),
    "a tool's result within an answer": (
        {"prompt": "q", "chosen": [CALLS, {"role": "tool", "content": "3"}, A], "rejected": [B]},
        ("u:q a:[add] t:3 a:a", "u:q a:b"),
    ),
    "reasoning": (
        {"prompt": "q", "chosen": [bot("a", reasoning_content="t")], "rejected": [bot("b", reasoning_content="w")]},
        ("u:q a:a<t>", "u:q a:b<w>"),
    ),
    "reasoning of the row": (
        {"prompt": "q", "chosen": "a", "rejected": "b", "thinking": "t"},
        ("u:q a:a<t>", "u:q a:b"),
    ),
    "several turns": (
        {"chosen": [Q, A, user("r"), A], "rejected": [Q, B, user("s"), B]},
        ("u:q a:a u:r a:a", "u:q a:b u:s a:b"),
    ),
    "equal turns before": (
        {"chosen": [Q, A, user("r"), A], "rejected": [Q, A, user("r"), B]},
        ("u:q (a:a) u:r a:a", "u:q (a:a) u:r a:b"),
    ),
    "an empty answer": ({"prompt": "q", "chosen": "a", "rejected": ""}, ("u:q a:a", "u:q a:")),
}


@pytest.mark.parametrize("name", PAIRS)
def test_pairs(name):
    fields, expected = PAIRS[name]
    assert sides(fields) == [expected]
    good, bad = expected
    assert sides(fields, "label") == [(good, None), (None, bad)]


@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [
        ("Chosen", "REJECTED"),
        ("chosen_response", "rejected_response"),
        ("response_chosen", "response_rejected"),
        ("good answer", "bad answer"),
        ("preferred", "dispreferred"),
        ("Preferred Completion", "Rejected Completion"),
        ("winner", "loser"),
        ("accepted", "rejected"),
    ],
)
@pytest.mark.parametrize("prompt", ["prompt", "instruction", "Query", "input"])
def test_similar_names(prompt, chosen, rejected):
    more = {"chosen_score": 5, "rejected_model": "m", "id": "1"}
    assert sides({prompt: "q", chosen: "a", rejected: "b", **more}) == [USUAL]


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": "q", "good answer": "a", "bad answer": "b", "better answer": "c", "worse answer": "d"},
        {"prompt": "q", "good": "a", "rejected": "b"},
        {"prompt": "q", "answer_0": "a", "answer_1": "b"},
    ],
)
def test_names_that_are_not_clear(fields):
    with pytest.raises(UserError, match="no columns that litgpt recognizes"):
        match(fields, HERE)


def test_two_prompts_are_not_clear():
    with pytest.raises(UserError, match="is missing prompt"):
        sides({"query": "q", "user": "r", "chosen": "a", "rejected": "b"})


BY_RANK = [{"answer": text, "rank": rank} for text, rank in zip("abc", (1, 2, 3))]
BY_SCORE = [{"response": text, "overall_score": score} for text, score in zip("abc", (9.5, 7, 2))]
RANKED = {
    "Nectar": {"prompt": "\n\nHuman: q\n\nAssistant: ", "answers": BY_RANK},
    "UltraFeedback": {"instruction": "q", "completions": BY_SCORE},
    "lists": {"prompt": "q", "responses": ["c", "a", "b"], "scores": [1, 3, 2]},
    "ranks": {"prompt": [Q], "responses": ["c", [A], "b"], "ranks": [3, 1, 2]},
    "CSV": {"Question": "q", "Responses": '["c", "a", "b"]', "Scores": '["1", "3", "2.5"]'},
}


@pytest.mark.parametrize("name", RANKED)
def test_ranked_answers(name):
    assert sides(RANKED[name]) == [USUAL, ("u:q a:a", "u:q a:c")]


def test_scores():
    row = {"prompt": "q", "responses": ["a", "b", "c"]}
    assert sides({**row, "scores": [2, 2, 1]}) == [("u:q a:a", "u:q a:c")]
    assert sides({**row, "scores": [2, 2, 2]}) == []
    assert said(to_row({**row, "scores": [2, 2, 2]}, "ranked", HERE)) == "u:q a:a"
    for scores in ([1, None, 2], [1, 2], [1, float("nan"), 2], ["N/A", 1, 2], [True, 1, 2], None):
        with pytest.raises(UserError, match="has no score"):
            sides({**row, "scores": scores})


@pytest.mark.parametrize(
    ("label", "is_good"),
    [(True, True), (0, False), (1.0, True), ("1", True), ("0", False), ("TRUE", True), (" yes ", True), ("No", False)],
)
@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": "q", "completion": "a"},
        {"prompt": [Q], "completion": [A]},
        {"messages": [Q, A]},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"instruction": "q", "output": "a"},
        {"question": "q", "answer": "a"},
        {"query": "q", "response": "a"},
    ],
)
def test_labels(fields, label, is_good):
    expected = [("u:q a:a", None)] if is_good else [(None, "u:q a:a")]
    for key in ("label", "kto_tag", "Label"):
        assert sides({**fields, key: label}, "label") == expected


def test_a_label_beside_an_instruction_may_be_a_class():
    fields = {"instruction": "q", "output": "a"}
    assert match({**fields, "label": 0}, HERE)[0] == "alpaca"
    assert match({**fields, "kto_tag": False}, HERE)[0] == "label"
    for label in ("good", 2, [True], "", None):
        with pytest.raises(UserError, match=r"Expected true|needs a prompt"):
            sides({"prompt": "q", "completion": "a", "label": label}, "label")


@pytest.mark.parametrize(
    ("fields", "unit", "words"),
    [
        ({"instruction": "q", "output": "a"}, "pair", "chosen and rejected. .* finetune lora.$"),
        ({"prompt": "q", "completion": "a", "label": 1}, "pair", "finetune kto.$"),
        ({"instruction": "q", "output": "a"}, "label", "a label. .* finetune lora.$"),
        ({"prompt": "q", "chosen": "a", "rejected": None}, "pair", "has rejected that is null"),
        ({"prompt": "q", "chosen": "a", "rejected": []}, "pair", "has rejected that is an empty list"),
        ({"chosen": "a", "rejected": "b"}, "pair", "is missing prompt"),
    ],
)
def test_rows_for_other_commands(fields, unit, words):
    with pytest.raises(UserError, match=words):
        sides(fields, unit)


# tokens


def load(model: Path, file: Path, unit: str = "pair", limit: int = 4096, **options: Any) -> Any:
    data = JSON(str(file), **{"val_split_fraction": 0, "prompt_style": "auto", **options})
    data.unit = unit  # type: ignore[assignment]
    return data.load(Tokenizer(model), model, limit)


def write(path: Path, rows: list) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return path


@pytest.mark.long
@pytest.mark.skipif(find_spec("trl") is None, reason="trl is not installed")
@pytest.mark.parametrize("name", ["smollm2", "qwen2.5", "llama-3-8b-instruct", "llama-2"])
def test_tokens_of_trl(name, real_data, tmp_path):
    """The ids of both sides, and where their answers begin. trl also trains a newline after the stop token."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    model = real_data / "tokenizers" / name
    rows = [
        {
            "prompt": [{"role": ROLES[m["from"]], "content": m["value"]} for m in row["conversations"]],
            **{side: [bot(row[side]["value"])] for side in ("chosen", "rejected")},
        }
        for row in json.loads((real_data / "instruct" / "dpo_en_demo.json").read_text())[:20]
    ]
    rows.append({"prompt": [user("Hi")], "chosen": [bot("Hello, you!")], "rejected": [bot("?\n")]})
    ours = load(model, write(tmp_path / "rows.jsonl", rows), limit=100_000)
    tokenizer = AutoTokenizer.from_pretrained(model)
    args = DPOConfig(output_dir=str(tmp_path), max_length=None, report_to=[], use_cpu=True, bf16=False)
    prepare = DPOTrainer._prepare_dataset
    theirs = prepare(SimpleNamespace(_tokenizer=tokenizer), Dataset.from_list(rows), tokenizer, args, "train")
    assert len(ours.train) == len(theirs) == len(rows)
    newline = tokenizer.encode("\n", add_special_tokens=False)
    for i, row in enumerate(theirs):
        for side, (ids, mask) in zip(("chosen", "rejected"), ours.train.sequences(i)):
            assert ids.tolist() == row["prompt_ids"] + row[f"{side}_ids"], (i, side)
            trained = (mask & IN_LOSS).bool()
            assert trained.equal((mask & ANSWER).bool())
            answer = row[f"{side}_ids"]
            n_after = len(newline) if answer[-len(newline) :] == newline and name in ("smollm2", "qwen2.5") else 0
            n = len(row["prompt_ids"])
            assert trained.nonzero().squeeze(1).tolist() == list(range(n, len(ids) - n_after)), (i, side)


def shown(rows: Any, i: int, tokenizer: Tokenizer) -> list[str]:
    """The target tokens of each side, with "|" between runs of them."""
    found = []
    for ids, mask in rows.sequences(i):
        runs, before = "", False
        for token, bits in zip(ids.tolist(), mask.tolist()):
            if bits & IN_LOSS:
                runs += ("" if before or not runs else "|") + tokenizer.decode([token], skip_special=False)
            before = bool(bits & IN_LOSS)
        found.append(runs)
    return found


def test_targets(tmp_path, base):
    """Every assistant message after the prompt that the row wants trained, each with its stop token."""
    rows = [
        {"prompt": "q", "chosen": "yes", "rejected": ""},
        {"chosen": [Q, bot("a"), user("r"), bot("c")], "rejected": [Q, bot("b"), user("s"), bot("d")]},
        {"prompt": "q", "chosen": [bot("no", train=False), user("r"), bot("c")], "rejected": "  "},
        {"prompt": [Q, bot("x", train=True), user("r")], "chosen": "a", "rejected": "b"},
        {"prompt": "q", "chosen": [bot("a", train=False)], "rejected": "b"},
        {"prompt": "q", "chosen": "a", "rejected": "a"},
    ]
    loaded = load(base, write(tmp_path / "r.jsonl", rows), prompt_style="chatml")
    tokenizer, stop = Tokenizer(base), loaded.turn_end
    targets = [[side.replace(stop, ".") for side in shown(loaded.train, i, tokenizer)] for i in range(4)]
    assert targets == [["yes.", "."], ["a.|c.", "b.|d."], ["c.", "  ."], ["x.|a.", "x.|b."]]
    assert (loaded.counts.kept, loaded.counts.no_targets, loaded.counts.identical) == (4, 1, 1)
    masks = [mask & REJECTED for _, mask in loaded.train.sequences(0)]
    assert not masks[0].any() and masks[1].all()


def test_too_long_sides_are_dropped(tmp_path, base):
    rows = [{"prompt": "q", "chosen": "a", "rejected": "b " * 200}, {"prompt": "q", "chosen": "a", "rejected": "b"}]
    file = write(tmp_path / "r.jsonl", rows)
    for too_long in ("cut", "drop"):
        counts = load(base, file, limit=100, too_long=too_long).counts
        assert (counts.kept, counts.too_long, counts.truncated) == (1, 1, 0)
    with pytest.raises(UserError, match=r"line 1 has .* tokens. The limit is 100"):
        load(base, file, limit=100, too_long="error")


def test_labels_beside_instructions(tmp_path, base):
    """Which only KTO reads as labels."""
    file = write(tmp_path / "r.jsonl", [{"Query": "q", "Response": str(i), "Label": i % 2} for i in range(4)])
    loaded = load(base, file, "label")
    assert loaded.train.is_rejected().tolist() == [True, False] * 2 and loaded.counts.forms == {"label": 4}
    loaded = load(base, file, "row")
    assert loaded.counts.forms == {"alpaca": 4} and loaded.counts.ignored == {"Label": 4}
    loaded = load(base, file, "row", columns={"instruction": "Query", "output": "Response", "label": "Label"})
    assert loaded.counts.forms == {"label": 2} and loaded.counts.skipped == 2


def test_both_sides_of_a_row_count_once(tmp_path, base):
    """What a template does not show, and fields that are not read."""
    sides = {name: [bot(name, reasoning_content="so", source="x"), user("more")] for name in ("chosen", "rejected")}
    file = write(tmp_path / "r.jsonl", [{"prompt": "?", **sides}] * 3)
    style = tmp_path / "plain.jinja"
    style.write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    counts = load(base, file, prompt_style=str(style)).counts
    assert counts.lost == {"reasoning": 3} and counts.short_prompts == 3
    assert counts.ignored == {"messages after the last answer": 3, "messages.source": 3}
    dropped = load(base, file, prompt_style=str(style), on_lost="drop_row").counts
    assert (dropped.dropped_lost, dropped.kept) == (3, 0)
    assert load(base, file, prompt_style=str(style), on_lost="as_text").counts.as_text == 3


# `litgpt data check`


def check(capsys: pytest.CaptureFixture, *words: object) -> tuple[int, str]:
    try:
        main(["data", "check", *map(str, words)])
        code = 0
    except SystemExit as e:
        code = int(e.code or 0)
    return code, capsys.readouterr().out


def pairs(n: int, chosen: str = "It is {}.", rejected: str = "It is not {}.") -> list[dict]:
    return [
        {"prompt": f"Which number is {i}?", "chosen": chosen.format(i), "rejected": rejected.format(i)}
        for i in range(n)
    ]


def test_check_of_pairs(tmp_path, base, capsys):
    rows = [*pairs(6), *pairs(1, "same", "same"), *pairs(1, rejected="x " * 300), {**pairs(1)[0], "rejected": None}]
    rows.append({"chosen": [user("One?"), A], "rejected": [user("Two?"), B]})
    file = write(tmp_path / "pairs.jsonl", rows)
    words = [base, file, "--data.val_split_fraction", 0, "--data.prompt_style", "chatml"]
    code, out = check(capsys, *words, "--train.max_seq_length", 100, "--show", 0, "--rows", "2,7,8,10")
    assert code == 1 and "line 9, has rejected that is null" in out
    assert "rows for      litgpt finetune dpo, orpo, simpo, or cpo" in out
    assert "1 bad, 1 too long, 1 with equal answers" in out and "rejected is ignored" not in out
    assert "1 rows dropped: longer than 100 tokens" in out and "Raise --train.max_seq_length." in out
    assert "1 pairs dropped: both answers are the same" in out and "1 pairs have answers to different prompts" in out
    assert "row 7: both answers are the same" in out
    assert "chosen answer:" in out and "[[It is 1." in out
    start = out.index("rejected answer, after the same prompt:\n[[It is not 1.")
    assert out.index("Which number is 1?") < start and "Which number is 1?" not in out[start:]
    assert "rejected answer:\n<|im_start|>user\nTwo?" in out

    code, out = check(capsys, *words, "--data.on_bad_row", "skip", "--list", "identical")
    assert code == 0 and [json.loads(line)["row"] for line in out.splitlines()] == [7]
    code, out = check(capsys, *words, "--data.on_bad_row", "skip", "--json", "--data.prompt_style", "none")
    report = json.loads(out)
    assert report["objective"] == "dpo" and report["counts"]["identical"] == 1 and report["mask_prompt"]
    assert report["answers"].keys() == {"chosen", "rejected"} and report["answers"]["chosen"]["answers"] == 7
    assert report["answers"]["chosen"]["mean_tokens"] < report["answers"]["rejected"]["mean_tokens"]


@pytest.mark.parametrize(("rejected", "warns"), [("It was {}.", False), ("It is a number, namely {}, I think.", True)])
def test_lengths_that_a_model_may_learn(rejected, warns, tmp_path, base, capsys):
    file = write(tmp_path / "pairs.jsonl", pairs(20, rejected=rejected))
    _, out = check(capsys, base, file)
    assert "Mean length of answers: chosen " in out
    assert ("The rejected answers are" in out and "may learn the length" in out) == warns


def labels(path: Path, n_good: int, n_bad: int) -> Path:
    with open(path, "w", newline="") as f:
        writer = csv.writer(f)
        writer.writerow(["Prompt", "Completion", "Label"])
        writer.writerows([f"Number {i}?", f"It is {i}.", "yes" if i < n_good else "no"] for i in range(n_good + n_bad))
    return path


def test_check_of_labels(tmp_path, base, capsys):
    words = [base, labels(tmp_path / "labels.csv", 9, 3), "--data.val_split_fraction", 0]
    code, out = check(capsys, *words)
    assert code == 0 and "rows for      litgpt finetune kto" in out and "undesirable answer:" not in out
    assert "Labels: 9 desirable and 3 undesirable answers." in out and "--preference.undesirable_weight 3." in out
    _, out = check(capsys, *words, "--json", "--preference.desirable_weight", 2)
    report = json.loads(out)
    assert report["objective"] == "kto" and report["weights"] == {"undesirable_weight": 6}
    assert [kind["answers"] for kind in report["answers"].values()] == [9, 3]
    _, out = check(capsys, *words, "--objective", "supervised")
    assert "12 rows have a label; answers whose label is false are skipped." in out and "3 excluded by label" in out


@pytest.mark.parametrize(("n_good", "n_bad"), [(9, 7), (7, 9), (3, 1000), (1000, 3), (8, 8), (4, 3)])
def test_balance(n_good, n_bad):
    """The weight that is recommended is not corrected again."""
    n = n_good + n_bad
    mask = torch.full((n,), IN_LOSS | ANSWER, dtype=torch.uint8)
    mask[n_good:] |= REJECTED
    rows = TokenizedRows(torch.zeros(n), mask, torch.arange(n + 1), torch.zeros(n))
    notes, weights = balance(rows, PreferenceArgs())
    assert bool(weights) == (len(notes) == 2) == (not 1 <= n_good / n_bad <= 4 / 3)
    assert balance(rows, PreferenceArgs(**weights))[1] == {}


OBJECTIVES = {"dpo": (True, "dpo"), "orpo": (False, "dpo"), "kto": (True, "kto"), "supervised": (True, None)}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_objectives(name, tmp_path, base, capsys):
    """The same rows for another command."""
    masked, command = OBJECTIVES[name]
    file = write(tmp_path / "pairs.jsonl", pairs(10))
    words = [base, file, "--data.prompt_style", "chatml", "--data.val_split_fraction", 0, "--objective", name]
    _, out = check(capsys, *words, "--json")
    report = json.loads(out)
    assert report["objective"] == name and report["mask_prompt"] == masked
    assert report["train"]["rows"] == (20 if name == "kto" else 10)
    _, out = check(capsys, *words)
    assert (f"litgpt finetune {command}" in out) == (command is not None)
    assert ("10 rows have a chosen and a rejected answer" in out) == (name == "supervised")
    assert ("the answers, and the prompts of chosen ones" in out) == (name == "orpo")


def test_a_config_of_a_preference_command(tmp_path, base, capsys):
    config = tmp_path / "simpo.yaml"
    config.write_text("method: full\npreference: {beta: 2.0, gamma: 1.0}\nadapter_prompt_length: 4\n")
    file = write(tmp_path / "pairs.jsonl", pairs(10))
    code, out = check(capsys, base, file, "--config", config)
    assert code == 0 and "No problems found." in out
    code, _ = check(capsys, base, "--objective", "dpo")
    assert code == 2


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (pairs(4), "4 rows have a chosen and a rejected answer; chosen is trained, rejected is ignored"),
        ([{"instruction": "q", "output": str(i), "kto_tag": i != 1} for i in range(4)], "4 rows have a label"),
        ([{"question": "q", "responses": ["a", str(i)], "scores": [2, 1]} for i in range(4)], "4 rows have several"),
    ],
)
def test_a_supervised_run_names_the_command(rows, words, tmp_path, base, capsys):
    flags = "--train.max_steps 1 --eval.max_new_tokens null --data.val_split_fraction 0 --accelerator cpu"
    file = write(tmp_path / "rows.jsonl", rows)
    main(["finetune", "lora", str(base), str(file), *flags.split(), "--out_dir", str(tmp_path / "out")])
    found = capsys.readouterr()
    command = "kto" if "label" in words else "dpo"
    assert (found.out + found.err).count(words) == 1 and f"litgpt finetune {command}\n" in found.out + found.err
