"""A word at each of T positions of a sequence, from logits ``(N, T, V)``: a softmax at each position.

The information in the outputs is ``diag(p_t) − p_t p_tᵀ`` at each position that counts, and 0 between positions, so
that ``G = Σ_t J_tᵀ (diag(p_t) − p_t p_tᵀ) J_t`` in the input of the whole sequence. A position does not count if it
has a single word, whose logit is finite where all others are −∞: see :func:`as_positions`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from lightning_robust.functional._validation.arguments import check_kind, class_of
from lightning_robust.functional._validation.outputs import IGNORED
from lightning_robust.functional._validation.tensors import check_finite, check_finite_or_masked
from lightning_robust.functional.input_space._likelihood import Likelihood
from lightning_robust.functional.input_space.float64 import widened, working
from lightning_robust.functional.input_space.loss_curves import SIZE, fit_curves, loss_curves
from lightning_robust.functional.input_space.softmax_root import softmax_root_of_many
from lightning_robust.functional.input_space.temperature import TemperatureFit

_ROOTED = 2**20  # logits whose root is taken at once: 8 MiB in float64, of which it takes about ten


@dataclass(frozen=True)
class Token(Likelihood):
    """Targets are indices of words ``(N, T)``, −100 where a position does not count.

    The temperature is fitted to all positions that count.
    """

    name: ClassVar[str] = "token"
    loss: ClassVar[type[nn.Module]] = nn.CrossEntropyLoss
    has_positions: ClassVar[bool] = True

    def check_outputs(self, outputs: object, *, num_samples: int, inputs: Tensor | None = None) -> None:
        """See :meth:`Likelihood.check_outputs`."""
        if not isinstance(outputs, Tensor) or outputs.ndim != 3 or len(outputs) != num_samples or outputs.shape[2] < 2:
            got = f"shape {tuple(outputs.shape)}" if isinstance(outputs, Tensor) else class_of(outputs)
            raise (ValueError if isinstance(outputs, Tensor) else TypeError)(
                "Expected the model to return logits of shape (N, T, V), of V ≥ 2 words at T positions, with likelihood"
                f" 'token', but for {num_samples} inputs it returned {got}. Logits (N, C) of classes go with likelihood"
                " 'categorical', the default."
            )
        try:
            check_finite_or_masked(outputs.movedim(2, 1), "logits")
        except ValueError:
            if inputs is not None:
                check_finite(inputs, "inputs")
            raise

    def check(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return indices of words ``(N, T)``, int64."""
        check_positions(targets, len(outputs))
        words = targets.to(outputs.device).long()
        (n, t, v), counted = outputs.shape, words != IGNORED
        if words.shape != (n, t):
            raise ValueError(
                f"Expected argument `targets` to hold a word for each position of the logits ({n}, {t}, {v}), but got"
                f" shape {tuple(words.shape)}."
            )
        if (counted & ((words < 0) | (words >= v))).any():
            low, high = int(words[counted].min()), int(words[counted].max())
            raise ValueError(
                f"Expected argument `targets` to lie between 0 and {v - 1}, one of the {v} words of the logits, or to"
                f" be {IGNORED} where a position does not count, but got values from {low} to {high}. If these"
                " positions have another number, pass `loss_fn=nn.CrossEntropyLoss(ignore_index=...)`."
            )
        return words

    def prepared(self, outputs: Tensor) -> Tensor:
        """Logits in their own precision, because they are many; at least float32."""
        return working(outputs)

    def information_at(self, z: Tensor, temperature: float) -> Callable[[Tensor], Tensor]:
        """See :meth:`Likelihood.information_at`. The probabilities are computed once."""
        probs = (z / temperature).softmax(dim=2)

        def times(w: Tensor) -> Tensor:
            mean = (probs * w).sum(dim=2, keepdim=True)
            return (w - mean).mul_(probs).div_(temperature**2)

        return times

    def slope(self, z: Tensor, temperature: float, image: Tensor) -> Tensor:
        """``−2 − E_p[(z/T − E_p z/T) (w − E_p w)²] / Var_p w``, with sums over positions above and below.

        Single precision would not do for the difference of two forms.
        """
        y = z.masked_fill(z.isneginf(), 0.0) / temperature
        probs = (z / temperature).softmax(dim=2)
        squares = (image - (probs * image).sum(dim=2, keepdim=True)).square_().mul_(probs)
        variance = widened(squares.flatten(1).sum(dim=1))
        moved = widened((y - (probs * y).sum(dim=2, keepdim=True)).mul_(squares).flatten(1).sum(dim=1))
        return torch.where(variance > 0, -2 - moved / variance, 0.0)

    def information_times(self, z: Tensor, vectors: Tensor) -> Tensor:
        """``p v − p (pᵀ v)`` at each position."""
        probs = z.softmax(dim=2)[..., None]
        weighted = probs * vectors
        return weighted - probs * weighted.sum(dim=2, keepdim=True)

    def root_times(self, z: Tensor, signs: Tensor) -> Tensor:
        """See :func:`softmax_root`, at each position; words that are not among the most probable take any order."""
        parts = (torch.split(part.flatten(0, 1), max(1, _ROOTED // z.shape[2])) for part in (z, signs))
        roots = [softmax_root_of_many(logits, some) for logits, some in zip(*parts, strict=True)]
        return torch.cat(roots).view_as(z)

    def steepest(self, z: Tensor) -> Tensor:
        """``√(p_ŷ p_k) (e_ŷ − e_k)`` for the most probable word ŷ and the next, at each position."""
        top = z.softmax(dim=2).topk(2, dim=2)
        weights = top.values.prod(dim=2, keepdim=True).sqrt()
        return torch.zeros_like(z).scatter(2, top.indices, weights * z.new_tensor([1.0, -1.0]))

    def evidence_size(self, num_outputs: int) -> int:
        """Three numbers at each of 17 temperatures, and three more, for any number of words."""
        return SIZE

    def evidence(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """See :func:`loss_curves`."""
        return loss_curves(outputs, targets)

    def fit_evidence(self, evidence: Tensor) -> TemperatureFit:
        """See :func:`fit_curves`."""
        return fit_curves(evidence)

    def check_margins(self, sizes: Tensor) -> None:
        """Raise a ``ValueError``: a sequence has no boundary that one word sets."""
        raise ValueError(
            "Expected another likelihood than 'token' for margins, because any of the words of a sequence may change."
            " Leave `linearized_accuracy` out; `fisher_spectral_norm` and the metrics of curvature can be measured."
        )


def check_positions(targets: Tensor, num_samples: int) -> None:
    """Raise a ``ValueError`` unless targets are integers ``(num_samples, T)``."""
    check_kind("targets", targets, Tensor, "a tensor (N, T)")
    integer = not (targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool)
    if not integer or targets.ndim != 2 or len(targets) != num_samples:
        raise ValueError(
            f"Expected argument `targets` to hold the index of a word for each position, integers of shape"
            f" ({num_samples}, T), with likelihood 'token', but got {targets.dtype} of shape {tuple(targets.shape)}."
            f" Positions that do not count have {IGNORED}. One class per sample goes with likelihood 'categorical'."
        )
