"""Which word a language model is to predict at each position, from the entries of a batch."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_robust.functional._validation.outputs import IGNORED


def words_to_predict(ids: Tensor, labels: Tensor, mask: object = None) -> Tensor:
    """Labels ``(N, T)`` in the places of the logits that predict them, −100 where a position does not count.

    Labels that are the ids themselves are moved by one position, as the models of ``transformers`` do within their
    losses: the logits at a position are about the next word. Other labels stay where they are. Padding does not count.

    Args:
        ids: ``(N, T)``, or something else.
        labels: Of the same shape; those of any other are returned as they are.
        mask: An ``attention_mask`` of the same shape, 0 at padding, if the batch has one.
    """
    integer = not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)
    if labels.ndim != 2 or not integer:
        return labels
    words = labels
    counted = mask.to(labels.device) != 0 if isinstance(mask, Tensor) and mask.shape == labels.shape else None
    if counted is not None:
        words = words.masked_fill(~counted, IGNORED)
    if not are_the_ids(ids, words):
        return words
    moved = torch.cat([words[:, 1:], torch.full_like(words[:, :1], IGNORED)], dim=1)
    return moved if counted is None else moved.masked_fill(~counted, IGNORED)


def are_the_ids(ids: Tensor, labels: Tensor) -> bool:
    """Whether labels, where they count, are the ids at the same positions."""
    if ids.shape != labels.shape or ids.is_floating_point():
        return False
    counted = labels != IGNORED
    return bool(counted.any()) and bool((ids.to(labels.device) == labels)[counted].all())
