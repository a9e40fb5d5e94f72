"""An upper bound of a run's memory that costs nothing, for runs that fit by far."""

from typing import TYPE_CHECKING

from litgpt.model.devices import DTYPES

if TYPE_CHECKING:
    from litgpt.train.run import Run

STATE = 16  # bytes per trained weight: a float32 gradient, its copy, and two moments
FEATURES = 16  # numbers kept per token and layer, in units of the widths of attention and MLP
LOGITS = 4096  # positions whose logits exist at the same time, in float32, with their gradients


def upper_bound(run: "Run", rows: int) -> float:
    """More bytes than a run can take on one device. Its options are checked and its data is loaded.

    Args:
        rows: Rows of a micro-batch.
    """
    config, itemsize = run.base_model.config, DTYPES[run.precision_name].itemsize
    n_trained = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    lengths = run.train_rows.lengths
    tokens = int(lengths.topk(min(rows, len(lengths))).values.sum())
    experts = config.n_expert_per_token * (config.moe_intermediate_size or config.intermediate_size)
    experts += config.shared_size
    layers = [config.of_layer(i) for i in range(config.n_layer)]
    size, wide = max(c.head_size for c in layers), max(c.intermediate_size for c in layers)
    width = config.n_embd + config.n_head * size + max(wide, experts)
    kept = tokens * (config.n_layer + 1) * FEATURES * width * 4
    logits = 3 * 4 * LOGITS * config.padded_vocab_size
    return 2 * run.n_parameters * itemsize + STATE * n_trained + kept + logits
