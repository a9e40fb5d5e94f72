"""`litgpt download`"""

import re
import sys
from pathlib import Path
from typing import Optional

from litgpt.checkpoint.download import download
from litgpt.checkpoint.hub import CHECKPOINTS, PICO, repositories, repository_named
from litgpt.errors import UserError, nearest, remark
from litgpt.model.config import Config, known_models

TIED = re.compile(  # models whose published head is the embedding; in models.yaml they have a separate head
    r"(Code)?[Gg]emma-|falcon-|Llama-3\.2-[13]B|Qwen2\.5-(Coder-|Math-)?(0\.5|1\.5|3)B|Qwen3-(0\.6|1\.7|4)B"
    r"|Qwen3\.5-(0\.8|2|4)B|SmolLM2|OLMo-1B|Phi-4-mini|LFM2-"
)


def main(
    repo_id: list[str],
    revision: Optional[str] = None,
    tokenizer_only: bool = False,
    access_token: Optional[str] = None,
    checkpoint_dir: Path = CHECKPOINTS,
    overwrite: bool = False,
    convert_checkpoint: Optional[bool] = None,
    dtype: Optional[str] = None,
    model_name: Optional[str] = None,
) -> None:
    """Download a model from the Hugging Face hub to checkpoints/ORG/NAME, or list the known models.

    `litgpt download list` lists all known models, `litgpt download list llama 8b` those whose name has these words.

    Args:
        repo_id: The model as ORG/NAME, or words from its name; or `list`, and words to search for.
        revision: A branch, tag or commit.
        tokenizer_only: Download everything but the weights.
        access_token: Token for private and gated models. Default: HF_TOKEN, or the token of `hf auth login`.
        checkpoint_dir: Create the folder ORG/NAME in this folder.
        overwrite: Replace downloaded files that were changed afterwards.
        convert_checkpoint: Ignored. Folders are used as they are downloaded.
        dtype: Ignored. Weights keep their published type.
        model_name: Ignored. The config.json tells the model.
    """
    if dtype is not None:
        remark(
            f"--dtype {dtype} has no effect: weights keep their type. Pass --precision to the command that uses them."
        )
    if model_name is not None:
        remark(f"--model_name {model_name} has no effect: config.json describes the model.")
    if repo_id[:1] == ["list"]:
        show(matching(repo_id[1:]), repo_id[1:])
        return
    if repo_id == [PICO.name]:
        raise UserError("pico is built in. There is nothing to download.")
    only = repository_named(repo_id[0]) if len(repo_id) == 1 else None
    if only is None and len(repo_id) == 1 and "/" in repo_id[0]:
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", repo_id[0]):
            raise UserError(f"{repo_id[0]!r} is not a model name. Expected ORG/NAME.{near(repo_id[0])}")
        only = repo_id[0]
    found = [only] if only else matching(repo_id)
    if len(found) != 1:
        show(found, repo_id)
        print("litgpt: several models match. Download one by its full name.", file=sys.stderr)
        return
    download(found[0], checkpoint_dir, revision, access_token, tokenizer_only, overwrite)


def matching(words: list[str]) -> list[str]:
    """The known repositories whose names have all words, in any case."""
    return [r for r in dict.fromkeys(repositories()) if all(word.lower() in r.lower() for word in words)]


def show(found: list[str], words: list[str]) -> None:
    """Print the models with their sizes and context lengths. Raises `UserError` if there are none."""
    if not found:
        hint = near(" ".join(words))
        raise UserError(f"No known model has {' and '.join(words)} in its name.{hint} Name any other as ORG/NAME.")
    for repo_id in found:
        config = Config.from_name(repo_id)
        print(f"{repo_id:50} {parameters(config) / 1e9:7.2f} B parameters {config.block_size:9,} tokens")


def near(word: str) -> str:
    return nearest(word, [*repositories(), *known_models()])


def parameters(config: Config) -> int:
    """The approximate number of parameters of a published model, without norms and biases."""
    width, layers = config.n_embd, config.n_layer
    n = config.padded_vocab_size * width * (1 if TIED.match(config.name) else 2)
    n += sum(inputs * outputs for i in range(layers) for _, inputs, outputs in config.mixing(i))
    n_matrices = 2 if config.mlp_class_name == "GptNeoxMLP" else 3
    experts = sum(config.mlp_class(i) == "LLaMAMoE" for i in range(layers)) * (
        config.n_expert + config.shared_expert_gate
    )
    return n + width * (n_matrices * sum(sum(config.mlp_sizes(i)) for i in range(layers)) + experts)
