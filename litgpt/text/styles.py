"""LitGPT's named prompt styles: fixed texts around a prompt."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Optional

from litgpt.errors import UserError
from litgpt.text.chat_template import Message, PromptStyle, Rendered


@dataclass(frozen=True)
class NamedStyle(PromptStyle):
    """A fixed text around the prompt; the answer follows it and ends with the tokenizer's EOS.

    The names in braces are replaced in one pass, so braces in a row stay as they are. A style without `with_input` puts
    an input below the prompt, after an empty line; LitGPT drops it there.

    Args:
        name: As in `--data.prompt_style`.
        text: With `{prompt}`, and with `{system}` if it can show a system message.
        system: The system message of a row that has none; if this is empty too, `{system}` shows nothing.
        system_frame: What stands for `{system}` in the text: the system message, with what is around it.
        with_input: The text for a prompt that has an input, with `{input}` besides.
        input_system: As `system`, for `with_input`.
        close: What ends an answer that another prompt follows; that prompt stands in what `text` has after `{system}`.
            None if the style is for one prompt only.
    """

    name: str
    text: str
    system: str = ""
    system_frame: str = "{system}"
    with_input: str = ""
    input_system: str = ""
    close: Optional[str] = None
    own_special_tokens = False  # the tokenizer adds BOS, and the answer ends with EOS

    def prompt(self, messages: Sequence[Message], tools: Optional[list] = None) -> str:
        """The text that the answer to the last message follows.

        Args:
            messages: At most one of the system, then user and assistant in turn, the last of the user.
            tools: There must be none: no named style shows them.

        Raises:
            UserError: this style cannot show such messages.
        """
        has_system = bool(messages) and messages[0]["role"] == "system"
        system, turns = messages[0]["content"] if has_system else "", messages[has_system:]
        self.check(system, turns, bool(tools))
        first = turns[0]
        with_input = bool(self.with_input and first.get("input"))
        system = system or (self.input_system if with_input else self.system)
        shown = fill(self.system_frame, system=system) if system else ""
        if with_input:
            text = fill(self.with_input, system=shown, prompt=first["content"], input=first["input"])
        else:
            text = fill(self.text, system=shown, prompt=joined(first))
        for answer, user in zip(turns[1::2], turns[2::2]):
            turn = fill(self.text.rpartition("{system}")[2], prompt=joined(user))
            text += f"{answer['content']}{self.close}{turn}"
        return text

    def check(self, system: str, turns: Sequence[Message], tools: bool) -> None:
        style, roles = f"the prompt style {self.name!r}", [m["role"] for m in turns]
        if len(turns) % 2 == 0 or any(role != ("user", "assistant")[i % 2] for i, role in enumerate(roles)):
            got = ", ".join(roles) or "none"
            raise UserError(f"{style} needs messages of user and assistant in turn, the last of the user; got {got}")
        if tools or any(m.get("tool_calls") for m in turns):
            raise UserError(f"{style} shows no tools and no calls of them (chat and chatml may)")
        if system and "{system}" not in self.text:
            able = ", ".join(name for name, other in STYLES.items() if "{system}" in other.text)
            raise UserError(f"{style} shows no system message (these do: chat, chatml, {able})")
        if len(turns) > 1 and self.close is None:
            able = ", ".join(name for name, other in STYLES.items() if other.close is not None)
            raise UserError(f"{style} is for one prompt, not for several turns (for these: chat, chatml, {able})")

    def render_row(
        self, messages: Sequence[Message], tools: Optional[list] = None, turn_end: Optional[str] = None
    ) -> Rendered:
        """A whole conversation that ends with an answer, and where the assistant's words are.

        An answer inside the conversation ends behind the stop token that the style writes; the last one has none yet.
        """
        prompt, answers = self.prompt(messages[:-1], tools or messages[-1].get("tool_calls")), []
        for i, message in enumerate(messages[:-1]):
            if message["role"] == "assistant":
                start = len(self.prompt(messages[:i]))
                answers.append((start, start + len(message["content"] + (self.close or "").rstrip()), i))
        text = prompt + messages[-1]["content"]
        return Rendered(text, [*answers, (len(prompt), len(text), len(messages) - 1)])

    def jinja(self, bos: str, eos: str) -> str:
        """The style as a chat template for other programs. A style for one prompt shows the last one, as `litgpt chat`.

        Args:
            bos: What the tokenizer puts before a text by itself.
            eos: The token that ends an answer.
        """
        joined = "(message.content + ('\\n\\n' + message.input if message.input else ''))"
        first = shown_as(self.text, self.system, self.system_frame, prompt=joined)
        if self.with_input:
            values = {"prompt": "message.content", "input": "message.input"}
            with_input = shown_as(self.with_input, self.input_system, self.system_frame, **values)
            first = f"({with_input} if message.input else {first})"
        blocks = {
            "NO_SYSTEM": "false" if "{system}" in self.text else "system",
            "ONE_PROMPT": "true" if self.close is None else "false",
            "BOS": quoted(bos),
            "FIRST": first,
            "LATER": expression(self.text.rpartition("{system}")[2], prompt=joined),
            "EOS": quoted(eos),
            "CLOSE": quoted(self.close or ""),
        }
        return re.sub("|".join(blocks), lambda found: blocks[found[0]], JINJA)


JINJA = """\
{%- set system = messages[0].content if messages and messages[0].role == 'system' else '' %}
{%- set turns = messages[1:] if messages and messages[0].role == 'system' else messages %}
{%- if tools or NO_SYSTEM %}
    {{- raise_exception('This prompt style does not show such messages.') }}
{%- endif %}
{%- set ns = namespace(start=0) %}
{%- for message in turns %}
    {%- if message.role == 'user' and ONE_PROMPT %}
        {%- set ns.start = loop.index0 %}
    {%- endif %}
{%- endfor %}
{{- BOS }}
{%- for message in turns[ns.start:] %}
    {%- if message.role == 'user' and loop.first %}
        {{- FIRST }}
    {%- elif message.role == 'user' %}
        {{- LATER }}
    {%- elif message.role == 'assistant' and not message.tool_calls %}
        {{- message.content + (EOS if loop.last else CLOSE) }}
    {%- else %}
        {{- raise_exception('This prompt style does not show such messages.') }}
    {%- endif %}
{%- endfor %}
"""


def shown_as(text: str, system: str, frame: str, **values: str) -> str:
    """What a text of a style is in a template, with the system message of the conversation or else the style's own.
    `values` are expressions for the other names in braces."""
    framed = expression(frame, system=f"(system or {quoted(system)})")
    shown = framed if system else f"({framed} if system else '')"
    return expression(text, system=f"({shown})", **values)


def expression(text: str, **values: str) -> str:
    """`fill` as an expression of a template; `values` are expressions too."""
    parts = [
        values.get(part, quoted(f"{{{part}}}")) if i % 2 else quoted(part) for i, part in enumerate(fields_of(text))
    ]
    return " + ".join(part for part in parts if part != quoted("")) or quoted("")


def quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def fill(text: str, **values: str) -> str:
    """`text` with each `{name}` replaced by its value; what a value holds is not looked at."""
    parts = fields_of(text)  # text, name, text, name, ...
    return "".join(values.get(part, f"{{{part}}}") if i % 2 else part for i, part in enumerate(parts))


@cache
def fields_of(text: str) -> list[str]:
    return re.split(r"\{(\w+)\}", text)


def joined(message: Message) -> str:
    """The content of a message, with its input, if it has one, below."""
    return f"{message['content']}\n\n{message['input']}" if message.get("input") else message["content"]


def chatml(name: str, system: str = "") -> NamedStyle:
    text = "{system}<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
    return NamedStyle(name, text, system, "<|im_start|>system\n{system}<|im_end|>\n", close="<|im_end|>\n")


_TASK = "Below is an instruction that describes a task"
_WITH_INPUT = ", paired with an input that provides further context"
_COMPLETES = ". Write a response that appropriately completes the request.\n\n"
_INSTRUCTION = "{system}### Instruction:\n{prompt}\n\n"
_RESPONSE = "### Response:\n"
_SYS = "<<SYS>>\n{system}\n<</SYS>>\n\n"
_PHI_4 = "{system}<|im_start|>user<|im_sep|>{prompt}<|im_end|><|im_start|>assistant<|im_sep|>"
_PHI_4_MINI = "{system}<|user|>{prompt}<|end|><|assistant|>"

STYLES = {
    style.name: style
    for style in (
        NamedStyle("none", "{prompt}", with_input="{prompt}\n{input}"),
        NamedStyle(
            "alpaca",
            _INSTRUCTION + _RESPONSE,
            _TASK + _COMPLETES,
            with_input=_INSTRUCTION + "### Input:\n{input}\n\n" + _RESPONSE,
            input_system=_TASK + _WITH_INPUT + _COMPLETES,
        ),
        NamedStyle("flan", _INSTRUCTION + _RESPONSE, _TASK + _COMPLETES),
        NamedStyle("longform", _INSTRUCTION + _RESPONSE, _TASK + _WITH_INPUT + _COMPLETES),
        NamedStyle(
            "stablelm-alpha",
            "<|SYSTEM|>{system}<|USER|>{prompt}<|ASSISTANT|>",
            "# StableLM Tuned (Alpha version)\n"
            "- StableLM is a helpful and harmless open-source AI language model developed by StabilityAI.\n"
            "- StableLM is excited to be able to help the user, but will refuse to do anything that could be "
            "considered harmful to the user.\n"
            "- StableLM is more than just an information source, StableLM is also able to write poetry, short "
            "stories, and make jokes.\n"
            "- StableLM will refuse to participate in anything that could harm a human.",
        ),
        NamedStyle("stablelm-zephyr", "<|user|>\n{prompt}<|endoftext|>\n<|assistant|>\n", close="<|endoftext|>\n"),
        NamedStyle("falcon", "{prompt}\nAnswer:"),
        NamedStyle(  # the doubled braces and the joined words are what models were trained with
            "llama2-function-calling",
            '<FUNCTIONS>{{"function": "search_bing", "description": "Search the web for content on Bing. This allows '
            'users to search online/the internet/the web for content.", "arguments": [{{"name": "query", "type": '
            '"string", "description": "The search query string"}}]}}</FUNCTIONS>\n\n'
            "[INST]{system}{prompt}[/INST]\n\n",
            "You are a helpful, respectful and honest assistant. Always answer as helpfully as"
            "possible. Your only response should be JSON formatted functions",
            _SYS,
        ),
        NamedStyle(
            "llama2",
            "[INST] {system} {prompt} [/INST] ",
            "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while being "
            "safe.  Your answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, or "
            "illegal content. Please ensure that your responses are socially unbiased and positive in nature.\n\n"
            "If a question does not make any sense, or is not factually coherent, explain why instead of answering "
            "something not correct. If you don't know the answer to a question, please don't share false information.",
            _SYS,
        ),
        NamedStyle(
            "freewilly2",
            "{system}### User:\n{prompt}\n\n### Assistant:\n",
            "This is a system prompt, please behave and help the user.",
            "### System:\n{system}\n\n",
        ),
        NamedStyle("platypus", "### Instruction:\n\n{prompt}\n\n### Response:\n"),
        NamedStyle("stablecode", "###Instruction\n{prompt}###Response\n"),
        NamedStyle("codellama", "[INST] {system}{prompt} [/INST]", system_frame=_SYS),
        NamedStyle("phi-1", "{prompt}\n\nAnswer:"),
        NamedStyle("phi-2", "Instruct: {prompt}\nOutput:"),
        NamedStyle(
            "phi-3",
            "{system}<|user|>\n{prompt}<|end|>\n<|assistant|>\n",
            "You are a helpful assistant.",
            "<|system|>\n{system}<|end|>\n",
            close="<|end|>\n",
        ),
        NamedStyle("phi-4", _PHI_4, system_frame="<|im_start|>system<|im_sep|>{system}<|im_end|>", close="<|im_end|>"),
        NamedStyle(
            "phi-4-reasoning",
            _PHI_4,
            "You are Phi, a language model trained by Microsoft to help users. Your role as an assistant involves "
            "thoroughly exploring questions through a systematic thinking process before providing the final precise "
            "and accurate solutions. This requires engaging in a comprehensive cycle of analysis, summarizing, "
            "exploration, reassessment, reflection, backtracing, and iteration to develop well-considered thinking "
            "process. Please structure your response into two main sections: Thought and Solution using the specified "
            "format: <think> {Thought section} </think> {Solution section}. In the Thought section, detail your "
            "reasoning process in steps. Each step should include detailed considerations such as analysing questions, "
            "summarizing relevant findings, brainstorming new ideas, verifying the accuracy of the current steps, "
            "refining any errors, and revisiting previous steps. In the Solution section, based on various attempts, "
            "explorations, and reflections from the Thought section, systematically present the final solution that "
            "you deem correct. The Solution section should be logical, accurate, and concise and detail necessary "
            "steps needed to reach the conclusion. Now, try to solve the following question through the above "
            "guidelines:",
            "<|im_start>system<|im_sep|>{system}<|im_end|>",  # without a bar, as published
            close="<|im_end|>",
        ),
        NamedStyle("phi-4-mini", _PHI_4_MINI, system_frame="<|system|>{system}<|end|>", close="<|end|>"),
        NamedStyle(
            "phi-4-mini-reasoning",
            _PHI_4_MINI,
            "Your name is Phi, an AI math expert developed by Microsoft.",
            "<|system|>{system}<|end|>",
            close="<|end|>",
        ),
        NamedStyle(
            "tinyllama",
            "{system}<|user|>\n{prompt}</s>\n<|assistant|>\n",
            "You are a friendly chatbot who always gives helpful, detailed, and polite answers.",
            "<|system|>\n{system}</s>\n",
            close="</s>\n",
        ),
        NamedStyle(
            "gemma",
            "<start_of_turn>user\n{prompt}<end_of_turn>\n<start_of_turn>model\n",
            close="<end_of_turn>\n",
        ),
        NamedStyle(
            "llama3",
            "<|begin_of_text|>{system}<|start_header_id|>user<|end_header_id|>\n\n"
            "{prompt}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
            "You are a helpful assistant.",
            "<|start_header_id|>system<|end_header_id|>\n\n{system}<|eot_id|>",
            close="<|eot_id|>",
        ),
        NamedStyle("olmo", "<|endoftext|><|user|>\n{prompt}\n<|assistant|>\n"),
        chatml("qwen2.5", "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."),
        chatml("qwen2.5-math", "Please reason step by step, and put your final answer within \\boxed{}."),
        chatml(
            "qwq",
            "You are a helpful and harmless assistant. You are Qwen developed by Alibaba. "
            "You should think step-by-step.",
        ),
        chatml("qwen3"),
        chatml("smollm2", "You are a helpful AI assistant named SmolLM, trained by Hugging Face"),
        chatml(
            "salamandra",
            "I am Salamandra, an AI language model developed at the Barcelona Supercomputing Centre (BSC) by the "
            "Language Technologies Unit. My knowledge base was last updated on August 2023. "
            "Today Date: 2024-09-30\n"
            "Soy Salamandra, un modelo lingüístico de IA desarrollado en el Barcelona Supercomputing Centre (BSC) por "
            "la Language Technologies Unit. Mi base de conocimientos se actualizó por última vez en agosto de 2023.\n"
            "Soc Salamandra, un model de llenguatge d'IA desenvolupat al Barcelona Supercomputing Centre (BSC) per la "
            "Language Technologies Unit.",
        ),
    )
}
STYLES["default"] = STYLES["none"]  # another name of it
PromptStyle.named = {**STYLES}
