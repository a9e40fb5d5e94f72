"""Finetune a very small model with the real commands: `make demo`, or `python demo.py`.

Needs no download and no other file. The model is a Llama with random weights, the rows say which colour things have,
and everything is written to out/demo. What such a model learns is these colours and nothing else; the point is to see
each command at work, from rows in a file to an answer.
"""

import json
import random
import shlex
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from litgpt.__main__ import main
from litgpt.styles import STYLES

OUT = Path("out/demo")
WIDTH, HIDDEN, LAYERS = 96, 256, 2
COLOURS = {
    "yellow": "lemons bananas canaries sunflowers",
    "red": "cherries tomatoes strawberries rubies",
    "green": "limes frogs cucumbers emeralds",
    "white": "swans snowflakes pearls daisies",
    "black": "ravens tyres panthers olives",
    "orange": "carrots pumpkins tangerines foxes",
}
QUESTIONS = (
    "What colour are {}?",
    "Which colour do {} have?",
    "Name the colour of {}.",
    "Tell me the colour of {}.",
    "I have never seen {}. What colour are they?",
    "How would you paint {}?",
    "Finish the sentence: {} are",
    "In which colour do {} come?",
    "Describe {} with one colour.",
    "Do you know the colour of {}?",
)
QUESTIONS_WITH_INPUT = ("What colour are these?", "Name the colour of the input.")


def make_rows() -> list[dict[str, str]]:
    """One row for every pair of a question and a thing, in the Alpaca form."""
    rows = []
    for colour, things in COLOURS.items():
        for thing in things.split():
            answer = f"{thing.capitalize()} are {colour}."
            rows += [{"instruction": q.format(thing), "input": "", "output": answer} for q in QUESTIONS]
            rows += [{"instruction": q, "input": thing, "output": answer} for q in QUESTIONS_WITH_INPUT]
    random.Random(0).shuffle(rows)
    return rows


def make_tokenizer(rows: list[dict[str, str]], folder: Path) -> int:
    """Train a byte-level tokenizer on the rows as the model will read them. Returns the number of its tokens."""
    users = [{"role": "user", "content": row["instruction"], "input": row["input"]} for row in rows]
    texts = [STYLES["alpaca"].prompt([user]) + row["output"] for user, row in zip(users, rows)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return tokenizer.get_vocab_size()


def make_model(vocab_size: int, folder: Path) -> None:
    """Write a random Llama: `config.json` and `model.safetensors`, with the names that Hugging Face gives them."""
    config: dict[str, object] = {"model_type": "llama", "hidden_act": "silu", "dtype": "float32"}
    config |= {"vocab_size": vocab_size, "hidden_size": WIDTH, "intermediate_size": HIDDEN, "num_hidden_layers": LAYERS}
    config |= {"num_attention_heads": 4, "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "rope_theta": 10000.0}
    config |= {"tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 1}
    (folder / "config.json").write_text(json.dumps(config))
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens": (vocab_size, WIDTH), "lm_head": (vocab_size, WIDTH)}
    shapes["model.norm"] = (WIDTH,)
    for layer in (f"model.layers.{i}" for i in range(LAYERS)):
        shapes |= {f"{layer}.self_attn.{name}_proj": (WIDTH, WIDTH) for name in "qkvo"}
        shapes |= {f"{layer}.mlp.{name}_proj": (HIDDEN, WIDTH) for name in ("gate", "up")}
        shapes |= {f"{layer}.mlp.down_proj": (WIDTH, HIDDEN)}
        shapes |= {f"{layer}.{name}_layernorm": (WIDTH,) for name in ("input", "post_attention")}
    draw = torch.Generator().manual_seed(0)
    weights = {
        f"{name}.weight": torch.randn(shape, generator=draw) / shape[-1] ** 0.5 if len(shape) > 1 else torch.ones(shape)
        for name, shape in shapes.items()
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def litgpt(command: str) -> None:
    """Print a command as one would type it, and run it."""
    print(f"\n$ litgpt {command}", flush=True)
    main(shlex.split(command))


if __name__ == "__main__":
    (OUT / "model").mkdir(parents=True, exist_ok=True)
    rows = make_rows()
    (OUT / "rows.json").write_text(json.dumps(rows, indent=1))
    make_model(make_tokenizer(rows, OUT / "model"), OUT / "model")
    print(f"Made a random Llama in {OUT / 'model'} and {len(rows)} rows in {OUT / 'rows.json'}.")
    litgpt(
        "finetune lora out/demo/model --data JSON --data.json_path out/demo/rows.json --data.val_split_fraction 0.1"
        " --data.mask_prompt true --lora_r 32 --lora_alpha 64 --lora_dropout 0 --lora_key true --lora_projection true"
        " --lora_mlp true --lora_head true --optimizer.lr 0.002 --train.micro_batch_size 16 --train.epochs 20"
        " --train.lr_warmup_steps 10 --train.log_interval 20 --eval.max_new_tokens 12 --precision 32-true"
        " --out_dir out/demo/lora --overwrite true"
    )
    litgpt("validate out/demo/lora/final")
    litgpt("merge_lora out/demo/lora/final --overwrite true")
    litgpt('generate out/demo/lora/final-merged --prompt "Which colour are swans?" --temperature 0')
