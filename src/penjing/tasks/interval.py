"""Confidence intervals of the drop in score from the original to another model on the same images.

A drop is the original's score minus the other model's. Where a score is a mean over images of right
(1) and wrong (0), such as top-1, only the images count that one model alone has right, and the
interval is exact: it inverts a test with exact probabilities (Chan and Zhang 1999, Test-based exact
confidence intervals for the difference of two binomial proportions), on the paired design of Tango
(1998, Equivalence test and confidence interval for the difference in proportions for the
paired-sample design), with the worst nuisance parameter within its own interval (Berger and Boos
1994). For other scores images are resampled (paired bootstrap, percentiles expanded for few images
as in Hesterberg 2015, section 5.3, What teachers should know about the bootstrap).
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, Literal, Self

import numpy as np
import torch
from pydantic import BaseModel
from scipy import special, stats
from torch import Tensor

from penjing.tasks import outputs
from penjing.tasks.divergence import columns
from penjing.tasks.task import Task

LEVEL = 0.95
"""Confidence level of the upper bound of a drop, and of the lower bound."""
RESAMPLES = 1000
MOST_COPIED = 2e9
"""Largest count of numbers that all resamples together copy; larger outputs get fewer resamples."""
FEWEST_RESAMPLES = 100
NUISANCE_SHARE = 0.05
"""Share of the error probability that is spent on the interval of the nuisance parameter."""
PRECISION = 0.01
"""Precision of an exact bound, as a share of its distance from the drop."""

State = Literal["met", "cannot be told", "missed"]
Bounds = tuple[float, float]


class Comparison(BaseModel):
    """Comparison of a model with the original on the same images; None where it was not made.

    Attributes:
        images: number of images on which the drop was measured.
        drop: the original's score minus this model's.
        drop_low, drop_high: one-sided 95 % confidence bounds of the drop.
        lost, gained: number of images that the original, or this model, alone has right; None where
            the score does not count images that are right or wrong.
        divergence: mean over the images of ``Task.divergence`` from the original; needs no labels.
        agreement, agreement_images: share of images to which this model gives the original's class.
            Training images count too, unless this model was trained.
    """

    images: int | None = None
    drop: float = 0.0
    drop_low: float | None = None
    drop_high: float | None = None
    lost: int | None = None
    gained: int | None = None
    divergence: float | None = None
    agreement: float | None = None
    agreement_images: int | None = None

    def and_agreement(self, agreed: Tensor | None) -> Self:
        """Return the comparison with the agreement on further images, float ``[N]``, counted in."""
        if agreed is None or self.agreement is None or self.agreement_images is None:
            return self
        count = self.agreement_images + len(agreed)
        same = self.agreement * self.agreement_images + float(agreed.sum())
        return self.model_copy(update={"agreement": same / count, "agreement_images": count})

    def bounds(self, points: int = 1) -> Bounds | None:
        """Return the lower and upper bound of the drop; None where it was not measured.

        Args:
            points: number of models that are compared together. Their upper bounds hold all at once
                with a probability of 95 % (Bonferroni), so that the luckiest does not win by chance.
        """
        if self.drop_low is None or self.drop_high is None:
            return None
        error = error_of(points)
        if self.lost is not None and self.gained is not None and self.images:
            return exact_bounds(self.lost, self.gained, self.images, error)
        wider = _quantile(error) / _quantile(1 - LEVEL)
        low, high = self.drop - self.drop_low, self.drop_high - self.drop
        return self.drop - wider * low, self.drop + wider * high

    def state(self, limit: float, points: int = 1) -> State:
        """Decide by the bounds of the drop whether it is at most ``limit``."""
        known = self.bounds(points)
        if known is None:
            return "cannot be told"
        low, high = known
        if high <= limit + 1e-12:
            return "met"
        return "missed" if low > limit + 1e-12 else "cannot be told"

    def images_needed(self, limit: float, points: int = 1) -> int | None:
        """Estimate the number of images that decide whether the drop is at most ``limit``, if the
        models differ on them as on these; None where no number would, or nothing is known.

        A gain counts as no change: it is chance more often than not.
        """
        if self.drop_high is None or self.images is None or limit <= 0:
            return None
        z, away = _quantile(error_of(points)), limit - max(self.drop, 0.0)
        if not away:
            return None
        if self.lost is not None and self.gained is not None:
            spread = (self.lost + self.gained) / self.images - self.drop**2
        else:
            spread = self.images * ((self.drop_high - self.drop) / _quantile(1 - LEVEL)) ** 2
        # away = z * sqrt(spread / n) + skewness / n; the second term allows for few changes.
        normal, skewness = z * math.sqrt(max(spread, 0.0)), z * z / 4
        root = (normal + math.sqrt(normal**2 + 4 * abs(away) * skewness)) / (2 * abs(away))
        return max(math.ceil(root**2), fewest_images(limit, points))

    def surely_agrees(self, limit: float, points: int = 1) -> bool:
        """Whether the share of images with another class than the original's is at most ``limit``
        with confidence (Clopper and Pearson 1934); needs no labels."""
        if self.agreement is None or not self.agreement_images:
            return False
        others = round((1 - self.agreement) * self.agreement_images)
        error = error_of(points)
        return stats.beta.ppf(1 - error, others + 1, self.agreement_images - others) <= limit


def described(compared: Comparison, points: int = 1) -> str:
    """Write a drop as text: ``0.40% (0.10% to 0.90%, 500 images)``."""
    known = compared.bounds(points)
    if known is None:
        return f"{compared.drop:.2%}"
    return f"{compared.drop:.2%} ({known[0]:.2%} to {known[1]:.2%}, {compared.images} images)"


def unchanged(images: int) -> Comparison:
    """Return the comparison of the original with itself on ``images`` images."""
    same: dict[str, Any] = {"drop_low": 0.0, "drop_high": 0.0, "divergence": 0.0, "agreement": 1.0}
    return Comparison(images=images, agreement_images=images, **same)


def compare(task: Task, original: Any, output: Any, target: Tensor) -> Comparison:
    """Compare ``output`` with the output of the ``original`` for the same images, both in the form in
    which the models return them, given the images' targets ``[N, ...]``."""
    first, second = (_each(task, one, target) for one in (original, output))
    found: dict[str, Any]
    if first is None or second is None:
        found = _resampled(task, original, output, target)
    elif _right_or_wrong(first) and _right_or_wrong(second):
        found = _counted(first, second)
    else:
        found = _averaged((first - second).numpy(), task.score(original, target))
    agreed = agreements(task, original, output)
    return Comparison(
        images=len(target),
        divergence=float(task.divergence(output, original).mean()),
        agreement=None if agreed is None else float(agreed.double().mean()),
        agreement_images=None if agreed is None else len(agreed),
        **found,
    )


def agreements(task: Task, original: Any, output: Any) -> Tensor | None:
    """Return the share of each image's positions to which both outputs give the same class, float64
    ``[N]``; None where they hold no class scores."""
    pairs = zip(task.compared(original), task.compared(output), strict=True)
    for a, b in pairs:
        if a.scores:
            same = a.tensor.argmax(dim=1) == b.tensor.argmax(dim=1)
            return same.reshape(len(same), -1).double().mean(dim=1)
    return None


def error_of(points: int) -> float:
    """Return the error probability of each of ``points`` bounds that together err with 1 - ``LEVEL``.

    It is shared among the next power of two, so that most further points leave bounds as they are.
    """
    return (1 - LEVEL) / 2 ** math.ceil(math.log2(max(points, 1)))


def fewest_images(limit: float, points: int = 1) -> int:
    """Return the smallest number of images on which a model that is right whenever the original is
    has an upper bound of at most ``limit``: ``(1 - limit) ** n <= error``; 0 for a limit of 1."""
    if limit >= 1:
        return 0
    return math.ceil(math.log(error_of(points)) / math.log1p(-limit)) if limit > 0 else 2**62


@lru_cache(maxsize=4096)
def exact_bounds(lost: int, gained: int, images: int, error: float = 1 - LEVEL) -> Bounds:
    """Compute the bounds of the difference of two paired proportions, each with a confidence of at
    least ``1 - error``, from the number of images that only one of the models has right."""
    return -_exact_upper(gained, lost, images, error), _exact_upper(lost, gained, images, error)


def _exact_upper(lost: int, gained: int, images: int, error: float) -> float:
    """Find the largest drop that is not rejected by bisection."""
    found, z = (lost - gained) / images, _quantile(error)

    def rejected(drop: float) -> bool:
        return _probability(lost, gained, images, drop, error) <= error

    low, reach = found, 1.5 * z * math.sqrt(lost + gained + z * z) / images
    while (high := min(found + reach, 1.0)) < 1 and not rejected(high):
        low, reach = high, 2 * reach
    while high - low > PRECISION * (high - found):
        middle = (low + high) / 2
        low, high = (low, middle) if rejected(middle) else (middle, high)
    return high


def _probability(lost: int, gained: int, images: int, drop: float, error: float) -> float:
    """Bound the probability, under ``drop``, of the counts or of any that speak more against it."""
    beyond = NUISANCE_SHARE * error
    least = special.betaincinv(gained, images - gained + 1, beyond / 2) if gained else 0.0
    most = special.betaincinv(gained + 1, images - gained, 1 - beyond / 2) if gained < images else 1
    limits = max(least, -drop, 0.0), min(most, (1 - drop) / 2)
    if limits[0] > limits[1]:
        return beyond
    rates = np.linspace(*limits, 16)[:, None]
    others = np.arange(_last(images, limits[0], -1), _last(images, limits[1], 1) + 1)
    seen = _score(np.array([lost]), np.array([gained]), images, drop)[0]
    allowed = _largest(others, images, drop, seen)
    rest = np.clip((rates + drop) / np.maximum(1 - rates, 1e-12), 0, 1)
    fewer = np.where(allowed < 0, 0.0, special.bdtr(np.maximum(allowed, 0), images - others, rest))
    return float((_chances(others, images, rates) * fewer).sum(axis=1).max()) + beyond


def _chances(counts: np.ndarray, images: int, rates: np.ndarray) -> np.ndarray:
    """Return the binomial probabilities of ``counts`` among ``images`` at ``rates``."""
    ways = special.gammaln([images + 1]) - special.gammaln(counts + 1)
    ways -= special.gammaln(images - counts + 1)
    return np.exp(ways + special.xlogy(counts, rates) + special.xlog1py(images - counts, -rates))


def _last(images: int, rate: float, side: int) -> int:
    """Return a count on one ``side`` of the mean beyond which the probability is negligible."""
    reach = 9 * math.sqrt(images * rate * (1 - rate)) + 20
    return int(min(max(images * rate + side * reach, 0), images))


def _largest(gained: np.ndarray, images: int, drop: float, most: float) -> np.ndarray:
    """Find the largest number lost with a score of at most ``most`` for each of ``gained``, or -1."""
    low, high = np.full(len(gained), -1), images - gained
    while (low < high).any():
        middle = (low + high + 1) // 2
        good = _score(middle, gained, images, drop) <= most + 1e-9
        low, high = np.where(good, middle, low), np.where(good, high, middle - 1)
    return low


def _score(lost: np.ndarray, gained: np.ndarray, images: int, drop: float) -> np.ndarray:
    """Return the signed root of the likelihood ratio of the difference seen against ``drop``."""
    b = -lost - gained + (2 * images - lost + gained) * drop
    c = -gained * drop * (1 - drop)
    # Maximum-likelihood rate of gains under this drop (Tango 1998).
    rate = (np.sqrt(np.maximum(b * b - 8 * images * c, 0)) - b) / (4 * images)
    rate = np.clip(rate, max(-drop, 0.0), (1 - drop) / 2)
    under = _log_likelihood(lost, gained, images, rate + drop, rate)
    best = _log_likelihood(lost, gained, images, lost / images, gained / images)
    return np.sign(lost - gained - images * drop) * np.sqrt(np.maximum(2 * (best - under), 0))


def _log_likelihood(
    lost: np.ndarray, gained: np.ndarray, images: int, loss: np.ndarray, gain: np.ndarray
) -> np.ndarray:
    parts = (lost, loss), (gained, gain), (images - lost - gained, 1 - loss - gain)
    return sum(special.xlogy(count, np.maximum(rate, 1e-300)) for count, rate in parts)


def _each(task: Task, output: Any, target: Tensor) -> Tensor | None:
    """Return the score of each image, float64 ``[N]``, if the task's score is their mean; else
    None."""
    if task.custom_score is None:
        return (columns(outputs.logits(output)).argmax(dim=1) == target).double()
    try:
        values = [task.score(_some(output, [i]), target[i : i + 1]) for i in range(len(target))]
    except Exception:  # Scores such as the area under a curve need more than one image.
        return None
    each = torch.tensor(values, dtype=torch.float64)
    whole = task.score(output, target)
    return each if abs(float(each.mean()) - whole) <= 1e-6 * max(1.0, abs(whole)) else None


def _some(output: Any, images: Any) -> Any:
    return outputs.like(output, [tensor[images] for tensor in outputs.tensors(output)])


def _right_or_wrong(each: Tensor) -> bool:
    return bool(((each == 0) | (each == 1)).all())


def _counted(first: Tensor, second: Tensor) -> dict[str, Any]:
    lost, gained = int((first > second).sum()), int((first < second).sum())
    low, high = exact_bounds(lost, gained, len(first))
    drop = (lost - gained) / len(first)
    return {"drop": drop, "drop_low": low, "drop_high": high, "lost": lost, "gained": gained}


def _averaged(differences: np.ndarray, score: float) -> dict[str, Any]:
    dice, count = np.random.default_rng(0), len(differences)
    drawn = [differences[dice.integers(0, count, count)].mean() for _ in range(RESAMPLES)]
    return _percentiles(float(differences.mean()), np.array(drawn), count, score)


def _resampled(task: Task, original: Any, output: Any, target: Tensor) -> dict[str, Any]:
    count, size = len(target), sum(tensor.numel() for tensor in outputs.tensors(output))
    resamples = int(min(RESAMPLES, max(FEWEST_RESAMPLES, MOST_COPIED / max(size, 1))))
    dice, drawn = np.random.default_rng(0), []
    for _ in range(resamples):
        chosen = torch.from_numpy(dice.integers(0, count, count))
        drawn.append(_drop(task, original, output, target, chosen))
    score = task.score(original, target)
    return _percentiles(score - task.score(output, target), np.array(drawn), count, score)


def _drop(task: Task, original: Any, output: Any, target: Tensor, chosen: Tensor) -> float:
    try:
        before, after = (
            task.score(_some(one, chosen), target[chosen]) for one in (original, output)
        )
    except Exception:  # The images drawn may lack what the score needs, such as a class.
        return math.nan
    return before - after


def _percentiles(drop: float, drawn: np.ndarray, images: int, score: float) -> dict[str, Any]:
    drawn = drawn[np.isfinite(drawn)]
    if len(drawn) < FEWEST_RESAMPLES / 2 or images < 2:
        return {"drop": drop}
    tail = stats.norm.cdf(stats.t.ppf(1 - LEVEL, images - 1) * math.sqrt(images / (images - 1)))
    low, high = np.quantile(drawn, [tail, 1 - tail])
    if high - low < 1e-12:
        # No image differs: at most this share of all images does, each by at most a whole score.
        unseen = (1 - (1 - LEVEL) ** (1 / images)) * max(1.0, abs(score))
        low, high = drop - unseen, drop + unseen
    return {"drop": drop, "drop_low": min(float(low), drop), "drop_high": max(float(high), drop)}


def _quantile(error: float) -> float:
    return float(stats.norm.isf(error))
