"""LitGPT's `litgpt.prompts` from Python."""

import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import litgpt.prompts as prompts
import yaml

from litgpt import PromptStyle

CLASSES = """
    Alpaca ChatML CodeLlama Default FLAN Falcon Falcon3 FreeWilly2 Gemma Llama2 Llama2FunctionCalling Llama3 Longform
    OLMo Phi1 Phi2 Phi3 Phi4 Phi4Mini Phi4MiniReasoning Phi4Reasoning Platypus QwQ Qwen2_5 Qwen2_5_Math Qwen3 R1Base
    Salamandra SmolLM2 StableCode StableLMAlpha StableLMZephyr TinyLlama
""".split()
NAMES = """
    alpaca flan longform stablelm-alpha stablelm-zephyr falcon llama2-function-calling llama2 freewilly2 platypus
    stablecode codellama phi-1 phi-2 phi-3 phi-4 phi-4-reasoning phi-4-mini phi-4-mini-reasoning tinyllama gemma llama3
    olmo qwen2.5 qwen2.5-math qwq qwen3 smollm2 salamandra
""".split()
MODELS = {
    "pythia-14m": "Default",
    "Llama-2-7b-hf": "Default",
    "Llama-2-7b-chat-hf": "Llama2",
    "Llama-2-7b-chat-hf-function-calling-v2": "Llama2FunctionCalling",
    "Llama-3.2-1B": "Default",
    "Llama-3.2-1B-Instruct": "Llama3",
    "OLMo-2-1124-7B-DPO": "Llama3",
    "OLMo-1B-hf": "OLMo",
    "Gemma-2-9b-it": "Gemma",
    "Gemma-2-9b": "Default",
    "Mistral-7B-Instruct-v0.3": "CodeLlama",
    "falcon-7b-instruct": "Falcon",
    "Falcon3-1B-Instruct": "Falcon3",
    "phi-1_5": "Phi1",
    "phi-2": "Phi2",
    "Phi-3-mini-4k-instruct": "Phi3",
    "phi-4": "Phi4",
    "Phi-4-mini-instruct": "Phi4Mini",
    "Phi-4-reasoning-plus": "Phi4Reasoning",
    "Phi-4-mini-reasoning": "Phi4MiniReasoning",
    "tiny-llama-1.1b-chat": "TinyLlama",
    "Qwen2.5-0.5B": "Qwen2_5",
    "Qwen2.5-Math-1.5B": "Qwen2_5_Math",
    "QwQ-32B": "QwQ",
    "Qwen3-0.6B": "Qwen3",
    "SmolLM2-135M-Instruct": "SmolLM2",
    "SmolLM2-135M": "Default",
    "R1-Distill-Llama-8B": "R1Base",
}
IDS = {"<|eot_id|>": 5, "User": 6, ":": 7, "Answer": 8, "<|SYSTEM|>": 9, "<|USER|>": 10, "<|ASSISTANT|>": 11}
TOKENIZER = SimpleNamespace(eos_id=2, token_to_id=IDS.__getitem__)


class Shout(PromptStyle):
    def apply(self, prompt, *, sys_prompt=None, **kwargs):
        return f"{prompt.upper()}!"


class Ending(Shout):
    def stop_tokens(self, tokenizer):
        return ([tokenizer.eos_id], [tokenizer.token_to_id("User")])


def test_classes_by_name():
    for name in CLASSES:
        kind = getattr(prompts, name)
        assert issubclass(kind, PromptStyle) and issubclass(kind, prompts.PromptStyle), name
        assert isinstance(kind().apply("a prompt"), str), name


def test_prompt_styles_maps_names_to_classes():
    assert set(NAMES) <= set(prompts.prompt_styles)
    assert all(issubclass(prompts.prompt_styles[name], PromptStyle) for name in NAMES)
    assert prompts.prompt_styles["qwen2.5"] is prompts.Qwen2_5


def test_from_name():
    for name in NAMES:
        assert isinstance(PromptStyle.from_name(name), prompts.prompt_styles[name])
    assert isinstance(PromptStyle.from_name("alpaca"), prompts.Alpaca)


def test_from_name_of_an_unknown_style():
    try:
        PromptStyle.from_name("nonexistent")
    except (KeyError, ValueError):
        return
    raise AssertionError("an unknown name is an error")


def test_from_config():
    for name, kind in MODELS.items():
        assert type(PromptStyle.from_config(SimpleNamespace(name=name))).__name__ == kind, name


def test_model_name_to_prompt_style():
    for name, kind in MODELS.items():
        assert isinstance(prompts.model_name_to_prompt_style(name), getattr(prompts, kind)), name


def test_from_config_of_an_instruct_codellama():
    assert isinstance(prompts.model_name_to_prompt_style("CodeLlama-7b-Instruct-hf"), prompts.CodeLlama)
    assert isinstance(prompts.model_name_to_prompt_style("CodeLlama-34b-Instruct-hf"), prompts.CodeLlama)


def test_default_returns_the_prompt():
    assert prompts.Default().apply("Some text") == "Some text"
    assert prompts.Default().apply("{braces} %s", sys_prompt=None) == "{braces} %s"


def test_alpaca_with_and_without_input():
    style = prompts.Alpaca()
    plain, with_input = style.apply("Do it."), style.apply("Do it.", input="now")
    assert plain.endswith("### Instruction:\nDo it.\n\n### Response:\n") and "### Input" not in plain
    assert with_input.endswith("### Instruction:\nDo it.\n\n### Input:\nnow\n\n### Response:\n")
    assert plain == style.apply("Do it.", input="")
    assert with_input.startswith("Below is an instruction that describes a task, paired with an input")


def test_columns_of_a_row_are_arguments():
    row = {"instruction": "Add.", "input": "1 2", "output": "3", "category": "sums"}
    text = prompts.Alpaca().apply(prompt=row["instruction"], **row)
    assert text == prompts.Alpaca().apply("Add.", input="1 2")


def test_sys_prompt():
    for name in ("llama3", "qwen2.5", "phi-3", "tinyllama", "llama2", "freewilly2", "smollm2", "phi-4"):
        text = PromptStyle.from_name(name).apply("Hello", sys_prompt="SYSTEM MESSAGE")
        assert "SYSTEM MESSAGE" in text and text.index("SYSTEM MESSAGE") < text.index("Hello"), name


def test_texts_of_chat_styles():
    apply = {name: PromptStyle.from_name(name).apply("Hi") for name in NAMES}
    assert apply["gemma"] == "<start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n"
    assert apply["qwen3"] == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert apply["codellama"] == "[INST] Hi [/INST]"
    assert apply["falcon"] == "Hi\nAnswer:"
    assert apply["phi-2"] == "Instruct: Hi\nOutput:"
    assert apply["stablelm-zephyr"] == "<|user|>\nHi<|endoftext|>\n<|assistant|>\n"
    assert apply["olmo"] == "<|endoftext|><|user|>\nHi\n<|assistant|>\n"
    assert apply["llama3"].startswith(
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nYou are a helpful"
    )
    assert prompts.R1Base().apply("Hi") == "<｜User｜>Hi<｜Assistant｜>"
    assert prompts.R1Base().apply("Hi", sys_prompt="S") == "S<｜User｜>Hi<｜Assistant｜>"
    assert prompts.Falcon3().apply("Hi") == "<|user|>\nHi<|endoftext|>\n<|assistant|>\n"


def test_several_messages():
    turns = [
        {"role": "user", "content": "u"},
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "v"},
    ]
    tail = (
        "<|start_header_id|>user<|end_header_id|>\n\nu<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
        "a<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nv<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    opening = "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n{}<|eot_id|>"
    style = prompts.Llama3()
    assert style.apply([{"role": "system", "content": "s"}, *turns]) == opening.format("s") + tail
    assert style.apply(turns) == opening.format("You are a helpful assistant.") + tail
    assert style.apply(turns, sys_prompt="T") == opening.format("T") + tail


def test_chatml_takes_a_system_message():
    turn = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert prompts.ChatML().apply("Hi") == turn
    assert prompts.ChatML("S").apply("Hi") == f"<|im_start|>system\nS<|im_end|>\n{turn}"
    assert prompts.ChatML("S").apply("Hi", sys_prompt="T") == f"<|im_start|>system\nT<|im_end|>\n{turn}"
    assert prompts.ChatML("S").system_message == "S"
    assert issubclass(prompts.Qwen2_5, prompts.ChatML) and prompts.Qwen3().system_message is None


def test_a_chatml_class_of_ones_own():
    class Pirate(prompts.ChatML):
        def __init__(self):
            super().__init__("You are a pirate.")

    assert Pirate().apply("Hi").startswith("<|im_start|>system\nYou are a pirate.<|im_end|>\n")


def test_stop_tokens_are_eos():
    for name in ("alpaca", "gemma", "qwen3", "phi-3", "codellama"):
        assert tuple(map(list, PromptStyle.from_name(name).stop_tokens(TOKENIZER))) == ([2],), name


def test_stop_tokens_of_styles():
    stops = {name: PromptStyle.from_name(name).stop_tokens(TOKENIZER) for name in ("llama3", "falcon", "phi-1")}
    assert stops["llama3"] == ([2], [5])
    assert stops["falcon"] == ([2], [6, 7], [193, 6])
    assert stops["phi-1"] == ([2], [8, 7], [198, 8, 7])
    assert PromptStyle.from_name("stablelm-alpha").stop_tokens(TOKENIZER) == ([2], [9], [11], [10])


def test_a_style_with_only_apply():
    style = Shout()
    assert isinstance(style, PromptStyle)
    assert style.apply("go") == style.apply(prompt="go", input="x", sys_prompt="y") == "GO!"
    assert style.stop_tokens(TOKENIZER) == ([2],)
    assert Ending().stop_tokens(TOKENIZER) == ([2], [6])


def test_has_prompt_style():
    folder = Path(tempfile.mkdtemp())
    assert not prompts.has_prompt_style(folder)
    prompts.save_prompt_style("alpaca", folder)
    assert prompts.has_prompt_style(folder)


def test_save_and_load_by_name():
    folder = Path(tempfile.mkdtemp())
    for name in NAMES:
        prompts.save_prompt_style(name, folder)
        assert isinstance(prompts.load_prompt_style(folder), prompts.prompt_styles[name]), name


def test_the_file_names_the_class():
    folder = Path(tempfile.mkdtemp())
    prompts.save_prompt_style("qwen2.5", folder)
    assert yaml.safe_load((folder / "prompt_style.yaml").read_text()) == {"class_path": "litgpt.prompts.Qwen2_5"}
    prompts.save_prompt_style(prompts.Phi4(), folder)
    assert yaml.safe_load((folder / "prompt_style.yaml").read_text()) == {"class_path": "litgpt.prompts.Phi4"}


def test_save_and_load_a_class_of_ones_own():
    folder = Path(tempfile.mkdtemp())
    sys.modules.setdefault(Shout.__module__, SimpleNamespace(Shout=Shout))
    prompts.save_prompt_style(Shout(), folder)
    assert yaml.safe_load((folder / "prompt_style.yaml").read_text())["class_path"].endswith(".Shout")
    assert prompts.load_prompt_style(folder).apply("go") == "GO!"


def test_load_without_a_file():
    try:
        prompts.load_prompt_style(Path(tempfile.mkdtemp()))
    except FileNotFoundError:
        return
    raise AssertionError("a missing file is an error")


def test_an_input_in_a_style_without_one():
    """LitGPT leaves it out."""
    assert prompts.Phi2().apply("Add.", input="1 2") in ("Instruct: Add.\nOutput:", "Instruct: Add.\n\n1 2\nOutput:")
    assert "1 2" in prompts.Phi2().apply("Add.", input="1 2")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    import runner

    runner.main(globals())
