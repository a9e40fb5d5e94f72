"""Make the built-in model `pico` anew: its tokenizer and configuration, or, after `litgpt pretrain --config pico`, its
weights.

    python tools/make_pico.py tokenizer
    litgpt pretrain --config pico
    python tools/make_pico.py weights out/pretrain/pico/final
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from litgpt.data.pico import PicoText, sums

FOLDER = Path(__file__).resolve().parent.parent / "litgpt" / "pico"
VOCABULARY = 640
SPECIAL = ["<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": [1, 5],
    "dtype": "bfloat16",
}
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def write_json(name: str, fields: dict) -> None:
    (FOLDER / name).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def make_tokenizer() -> None:
    """Byte-level BPE, trained on the text that the model is pretrained on and on the sums."""
    rows = list(PicoText(n_rows=20000).make())
    texts = [row["text"] if "text" in row else " ".join(m["content"] for m in row["messages"]) for row in rows]
    texts += [f"{question} {answer}" for question, answer in sums()]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    FOLDER.mkdir(exist_ok=True)
    tokenizer.save(str(FOLDER / "tokenizer.json"))
    fields = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    write_json("tokenizer_config.json", {**fields, "model_max_length": 256, "chat_template": TEMPLATE})
    write_json("config.json", CONFIG | {"vocab_size": tokenizer.get_vocab_size()})
    write_json("generation_config.json", {"bos_token_id": 0, "eos_token_id": [1, 5]})
    print(f"{tokenizer.get_vocab_size()} tokens")


def take_weights(folder: Path) -> None:
    """The weights of a finished run, in bfloat16."""
    weights = {name: tensor.to(torch.bfloat16) for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(weights, FOLDER / "model.safetensors", metadata={"format": "pt"})
    (FOLDER / "model.safetensors").chmod(0o644)
    print(f"{sum(p.stat().st_size for p in FOLDER.iterdir() if p.is_file()):,} bytes in {FOLDER.name}")


if __name__ == "__main__":
    if sys.argv[1:] == ["tokenizer"]:
        make_tokenizer()
    elif sys.argv[1:2] == ["weights"] and len(sys.argv) == 3:
        take_weights(Path(sys.argv[2]))
    else:
        sys.exit(__doc__)
