"""What the outputs of a network mean, by name: one class of several, several labels, numbers, or a word per position.

| name | outputs | targets | information in the outputs | margin: distance at which |
|---|---|---|---|---|
| ``"categorical"`` | logits of classes | class indices ``(N,)`` | ``diag(p) − p pᵀ`` | the class changes |
| ``"bernoulli"`` | logits of labels | 0 or 1, ``(N, C)`` | ``diag(p(1 − p))`` | any label flips |
| ``"gaussian"`` | predictions | numbers ``(N, C)`` | the identity | any moves by ``tolerance`` |
| ``"token"`` | logits of words ``(N, T, V)`` | indices ``(N, T)`` | ``diag(p) − p pᵀ`` per position | not measured |

Everything is at outputs over a temperature T, which for ``"gaussian"`` is the standard deviation σ of the errors: the
information in the input is then ``Jᵀ J / σ²``.

Source: ours.
Cost: algebra on N × C outputs; no forward or backward pass.
"""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor

from lightning_robust.functional._validation.arguments import check_choice, check_floating, expected_but_got
from lightning_robust.functional._validation.tensors import check_given_logits
from lightning_robust.functional.input_space._categorical import Categorical
from lightning_robust.functional.input_space._independent import Bernoulli, Gaussian
from lightning_robust.functional.input_space._likelihood import ColumnLikelihood, Likelihood, check_temperature
from lightning_robust.functional.input_space._token import Token, check_positions

__all__ = [
    "NAMES",
    "ColumnLikelihood",
    "Likelihood",
    "LikelihoodName",
    "check_positions",
    "check_temperature",
    "column_likelihood_of",
    "fit_temperature",
    "likelihood_of",
]

LikelihoodName = Literal["categorical", "bernoulli", "gaussian", "token"]
NAMES: tuple[str, ...] = get_args(LikelihoodName)
_KINDS: dict[str, type[Likelihood]] = {kind.name: kind for kind in (Categorical, Bernoulli, Gaussian, Token)}


def likelihood_of(name: str, tolerance: float | None = None) -> Likelihood:
    """The likelihood of a name.

    Args:
        name: ``"categorical"``, ``"bernoulli"``, ``"gaussian"`` or ``"token"``.
        tolerance: How far an output may move, in its own units, before that counts as a change: for margins with
            ``"gaussian"``.

    Raises:
        ValueError: If the name is unknown, or the tolerance not positive, or not for this likelihood.
    """
    kind = _KINDS[check_choice("likelihood", name, NAMES)]
    if tolerance is not None and kind is not Gaussian:
        expected = f"None with likelihood {name!r}, because only 'gaussian' has one"
        raise ValueError(expected_but_got("tolerance", expected, tolerance))
    return kind(tolerance)


def column_likelihood_of(name: str, tolerance: float | None = None) -> ColumnLikelihood:
    """The same of outputs ``(N, C)``, where the gradients of all outputs are taken.

    Raises:
        ValueError: As :func:`likelihood_of`, or if outputs have several positions.
    """
    kind = likelihood_of(name, tolerance)
    if not isinstance(kind, ColumnLikelihood):
        raise ValueError(
            f"Expected another likelihood than {name!r}, because gradients of all words at all positions are too many"
            " to take. `lightning_robust.functional.fim_spectral_norm_matrix_free` and `FisherSpectralNorm` do without"
            " them."
        )
    return kind


def fit_temperature(logits: Tensor, targets: Tensor, *, likelihood: LikelihoodName = "categorical") -> Tensor:
    """Temperature at which ``logits / T`` have the smallest negative log-likelihood.

    With few errors or none, half a pseudo-sample that misses by the median margin keeps it finite. It is gone once the
    true errors together miss by half as much: see :mod:`lightning_robust.functional.input_space.temperature`. The
    result is continuous in the data and proportional to the scale of the logits. Logits that do worse than even odds
    get the upper end of the range, 10⁴ times the largest margin, which makes the odds even.

    Classes of vanishing probability have a vanishing influence, whatever number masks them. Those that are impossible
    at any temperature that suits the others are left out altogether, as if the network did not have them: those with a
    logit of −∞, and those with a logit more than 746 nats, and more than 30 times the range of the others, below them.
    Samples whose target is left out do not count, because no temperature makes it possible. Samples that have diverged
    do not count, either: those whose margin is more than a hundred times larger than that of nine of ten samples,
    because a single one of them would set the temperature of all. The temperature is 1 if no sample counts.

    Args:
        logits: ``(N, C)``; −∞ where a class is masked.
        targets: ``(N,)``, class indices; ``(N, C)`` with the other likelihoods.
        likelihood: With ``"bernoulli"``, logits are those of C labels, each fitted as a class of two. With
            ``"gaussian"`` the temperature is the root mean square of the residuals ``logits − targets``, 1 without any.
            With ``"token"``, logits are ``(N, T, V)`` and targets ``(N, T)``, −100 where a position does not count;
            the temperature is found between 2⁻⁸ and 2⁸, to within 0.1 %, and the smoothing is that of
            :mod:`lightning_robust.functional.input_space.loss_curves`.

    Returns:
        ``()``, positive.

    Raises:
        ValueError: If shapes do not match, or a target is not a class, a label or a number.

    Source: Guo et al. 2017, arXiv 1706.04599; the treatment of separable samples is ours.
    """
    kind = likelihood_of(likelihood)
    if isinstance(kind, ColumnLikelihood):
        check_given_logits(logits, fewest=kind.fewest_outputs)
    else:
        check_floating("logits", logits, "(N, T, V)")
        kind.check_outputs(logits, num_samples=len(logits))
    return kind.fit(logits, targets).temperature.to(logits)
