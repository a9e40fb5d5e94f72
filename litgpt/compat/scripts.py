"""`litgpt.scripts`, `litgpt.eval.evaluate`, and `litgpt.deploy.serve`: the functions of LitGPT's commands."""

from pathlib import Path
from typing import Any, Optional

from litgpt.checkpoint.hub import CHECKPOINTS
from litgpt.commands import convert, download, validate
from litgpt.commands import merge_lora as merge
from litgpt.commands.convert import convert_pretrained_checkpoint as convert_pretrained_checkpoint
from litgpt.commands.evaluate import main as convert_and_evaluate
from litgpt.commands.serve import main as run_server
from litgpt.litgpt_format.names import absent

__all__ = ["convert_and_evaluate", "convert_hf_checkpoint", "convert_lit_checkpoint", "convert_pretrained_checkpoint"]
__all__ += ["download_from_hub", "merge_lora", "run_server", "validate_setup"]
DTYPES = {"float32": "32-true", "bfloat16": "bf16-true", "float16": "16-true"}


def download_from_hub(
    repo_id: str,
    access_token: Optional[str] = None,
    tokenizer_only: bool = False,
    convert_checkpoint: bool = True,
    dtype: Optional[str] = None,
    checkpoint_dir: Path = CHECKPOINTS,
    model_name: Optional[str] = None,
) -> None:
    """Download a model to `checkpoint_dir/ORG/NAME`. It is used as it is: the other arguments have no effect."""
    download.main([repo_id], None, tokenizer_only, access_token, Path(checkpoint_dir))


def convert_hf_checkpoint(
    checkpoint_dir: Path, *, model_name: Optional[str] = None, dtype: Any = None, debug_mode: Optional[bool] = False
) -> None:
    """Add lit_model.pth and model_config.yaml to a Hugging Face folder. Only LitGPT needs them."""
    name: Any = None if dtype is None else str(dtype).removeprefix("torch.")
    convert.convert_to_litgpt(Path(checkpoint_dir), model_name, name, bool(debug_mode))


def convert_lit_checkpoint(checkpoint_dir: Path, output_dir: Path) -> None:
    """Write a Hugging Face folder, with model.pth beside its safetensors. The folder must be empty or missing."""
    convert.convert_from_litgpt(Path(checkpoint_dir), Path(output_dir), model_pth=True)


def merge_lora(checkpoint_dir: Path, pretrained_checkpoint_dir: Optional[Path] = None, precision: Any = None) -> None:
    """Merge a LoRA adapter into its base, in a folder with -merged appended to its name."""
    base = None if pretrained_checkpoint_dir is None else Path(pretrained_checkpoint_dir)
    merge.main(Path(checkpoint_dir), base=base, precision=precision)


def validate_setup(
    checkpoint_dir: Path, model_filename: str = "lit_model.pth", dtype: str = "float32", training: bool = False
) -> None:
    """Check that a model folder is complete. `model_filename` and `training` have no effect."""
    validate.main([Path(checkpoint_dir)], DTYPES.get(dtype, dtype))  # type: ignore[arg-type]


def __getattr__(name: str) -> Any:
    raise absent("litgpt.scripts", name)
