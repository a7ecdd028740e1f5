"""What the outputs of a network mean, by name: one class of several, several labels, or numbers.

| name | outputs | targets | information in the outputs | margin: distance at which |
|---|---|---|---|---|
| ``"categorical"`` | logits of classes | class indices ``(N,)`` | ``diag(p) − p pᵀ`` | the class changes |
| ``"bernoulli"`` | logits of labels | 0 or 1, ``(N, C)`` | ``diag(p(1 − p))`` | any label flips |
| ``"gaussian"`` | predictions | numbers ``(N, C)`` | the identity | any moves by ``tolerance`` |

Everything is at outputs over a temperature T, which for ``"gaussian"`` is the standard deviation σ of the errors: the
information in the input is then ``Jᵀ J / σ²``.

Source: ours.
Cost: algebra on N × C outputs; no forward or backward pass.
"""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor

from lightning_robust.functional._validation.arguments import check_choice, expected_but_got
from lightning_robust.functional._validation.tensors import check_given_logits
from lightning_robust.functional.input_space._categorical import Categorical
from lightning_robust.functional.input_space._independent import Bernoulli, Gaussian
from lightning_robust.functional.input_space._likelihood import Likelihood, check_temperature

__all__ = ["NAMES", "Likelihood", "LikelihoodName", "check_temperature", "fit_temperature", "likelihood_of"]

LikelihoodName = Literal["categorical", "bernoulli", "gaussian"]
NAMES: tuple[str, ...] = get_args(LikelihoodName)
_KINDS: dict[str, type[Likelihood]] = {kind.name: kind for kind in (Categorical, Bernoulli, Gaussian)}


def likelihood_of(name: str, tolerance: float | None = None) -> Likelihood:
    """The likelihood of a name.

    Args:
        name: ``"categorical"``, ``"bernoulli"`` or ``"gaussian"``.
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

    Returns:
        ``()``, positive.

    Raises:
        ValueError: If shapes do not match, or a target is not a class, a label or a number.

    Source: Guo et al. 2017, arXiv 1706.04599; the treatment of separable samples is ours.
    """
    kind = likelihood_of(likelihood)
    check_given_logits(logits, fewest=kind.fewest_outputs)
    return kind.fit(logits, targets).temperature.to(logits)
