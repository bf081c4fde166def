"""Forward passes over a chunk, wrapped for training or not.

Legend: b rows, s tokens, d hidden size, V vocabulary, p tensor-parallel degree.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from megatron_r1.parallel.ddp import unwrap
from megatron_r1.utils.errors import ParallelError

Model = nn.Module | Sequence[nn.Module]


def token_losses(model: Model, batch: Mapping[str, Tensor]) -> Tensor:
    """-log p(label | tokens before it) for every position, not masked: fp32 [b, s]; differentiable.

    `batch`: `tokens`, `labels` [b, s], optionally `segment_ids` [b, s] (attention stays inside equal ids).
    On a pipeline stage that is not the last: the stage's activations [s, b, d] (what the schedule passes on).
    """
    return _chunk(model)(batch["tokens"], batch.get("segment_ids"), batch["labels"], "losses")


def sharded_logits(model: Model, batch: Mapping[str, Tensor]) -> Tensor:
    """Logits of this rank's piece of the vocabulary [b, s, V/p]; on a stage that is not the last its activations [s, b, d]."""
    return _chunk(model)(batch["tokens"], batch.get("segment_ids"), None, "logits")


def logits(model: Model, tokens: Tensor, segment_ids: Tensor | None = None) -> Tensor:
    """Logits over the whole vocabulary [b, s, V]. The model must not be pipelined (ParallelError)."""
    chunk = _unpipelined(model)
    return unwrap(chunk).vocabulary.gather(chunk(tokens, segment_ids, None, "logits"))


def hidden(model: Model, tokens: Tensor, segment_ids: Tensor | None = None) -> Tensor:
    """States after the final norm [b, s, d]. The model must not be pipelined (ParallelError)."""
    return _unpipelined(model)(tokens, segment_ids, None, "hidden")


def _chunk(model: Model) -> nn.Module:
    if isinstance(model, nn.Module):
        return model
    if len(model) == 1:
        return model[0]
    raise ParallelError(
        expected="one model chunk",
        found=f"{len(model)} chunks (virtual pipeline)",
        fix="run an interleaved model through parallel.schedule.forward_backward",
    )


def _unpipelined(model: Model) -> nn.Module:
    chunk = _chunk(model)
    bare = unwrap(chunk)
    if not (bare.pre_process and bare.post_process):
        raise ParallelError(
            expected="a model that is whole along the pipeline",
            found="one pipeline stage",
            fix="load the checkpoint with pipeline: 1 (checkpoints load under any layout), or use parallel.schedule",
        )
    return chunk
