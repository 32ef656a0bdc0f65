"""Intervals of a drop, against exact enumeration, closed forms and simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from penjing.tasks import Task, from_arrays, interval
from penjing.tasks.interval import Comparison, error_of, exact_bounds, fewest_images


def task(score=None) -> Task:
    images = np.zeros((40, 4, 4, 1), np.uint8)
    made = from_arrays(images, np.arange(40) % 2)
    made.custom_score = score
    return made


def scores(right: np.ndarray, target: Tensor) -> Tensor:
    """Class scores ``[N, 2]`` of a model that is right where ``right`` says so."""
    guess = torch.where(torch.from_numpy(right), target, 1 - target)
    return torch.nn.functional.one_hot(guess, 2).float()


def compared(lost: int, gained: int, images: int) -> Comparison:
    low, high = exact_bounds(lost, gained, images)
    drop = (lost - gained) / images
    values = {"images": images, "lost": lost, "gained": gained}
    return Comparison(drop=drop, drop_low=low, drop_high=high, **values)


def missed(images: int, only_first: float, only_second: float, error: float) -> float:
    """Probability, summed over all outcomes, that the drop is above its upper bound."""
    drop, total = only_first - only_second, 0.0
    chances = [only_first, only_second, 1 - only_first - only_second]
    for lost in range(images + 1):
        for gained in range(images + 1 - lost):
            if exact_bounds(lost, gained, images, error)[1] < drop:
                rest = images - lost - gained
                total += stats.multinomial.pmf([lost, gained, rest], images, chances)
    return total


RATES = [(0.02, 0.0), (0.1, 0.0), (0.15, 0.1), (0.3, 0.3), (0.05, 0.2), (0.5, 0.2), (0.9, 0.05)]


def test_upper_bounds_of_twelve_images_hold_as_often_as_stated() -> None:
    found = [missed(12, *rates, error=0.05) for rates in RATES]
    assert max(found) <= 0.05
    assert max(found) > 0.02, "a bound that is never exceeded tells less than it could"


@pytest.mark.slow
@pytest.mark.parametrize("error", [0.05, 0.05 / 32])
def test_upper_bounds_of_forty_images_hold_as_often_as_stated(error: float) -> None:
    assert max(missed(40, *rates, error=error) for rates in RATES) <= error


@pytest.mark.parametrize("images", [20, 100, 1000])
def test_without_a_change_the_bound_is_that_of_a_rate_of_zero(images: int) -> None:
    """``1 - 0.05 ** (1 / n)``, Clopper and Pearson's for no case among n, or a little more."""
    closed = 1 - 0.05 ** (1 / images)
    low, high = exact_bounds(0, 0, images)
    assert closed <= high <= 1.05 * closed
    assert low == -high


def test_of_many_images_the_bound_is_the_normal_distributions() -> None:
    lost, gained, images = 700, 500, 20_000
    spread = math.sqrt((lost + gained) / images - ((lost - gained) / images) ** 2)
    expected = (lost - gained) / images + 1.645 * spread / math.sqrt(images)
    assert exact_bounds(lost, gained, images)[1] == pytest.approx(expected, rel=0.03)


@given(st.integers(0, 15), st.integers(0, 15), st.integers(30, 300))
@settings(max_examples=8, deadline=None)
def test_bounds_enclose_what_was_seen_and_mirror(lost: int, gained: int, images: int) -> None:
    low, high = exact_bounds(lost, gained, images)
    assert -1 <= low < (lost - gained) / images < high <= 1
    assert exact_bounds(gained, lost, images) == (-high, -low)
    assert exact_bounds(lost + 1, gained, images)[1] > high - 1e-3
    wider = exact_bounds(lost, gained, images, 0.001)
    assert wider[0] < low and high < wider[1]


def test_only_images_that_one_model_alone_has_right_count() -> None:
    target = torch.arange(40) % 2
    first, second = np.ones(40, bool), np.ones(40, bool)
    first[:3] = second[2:7] = False  # both are wrong on the third
    found = interval.compare(task(), scores(first, target), scores(second, target), target)
    assert (found.lost, found.gained, found.images) == (4, 2, 40)
    assert found.drop == pytest.approx(2 / 40)
    assert (found.drop_low, found.drop_high) == exact_bounds(4, 2, 40)
    assert found.agreement == pytest.approx(34 / 40) and found.agreement_images == 40
    assert found.divergence is not None and found.divergence > 0


def test_a_score_of_the_users_own_that_counts_right_images_is_exact_too() -> None:
    def own(output: Tensor, target: Tensor) -> float:
        return float((output.argmax(1) == target).float().mean())

    target, dice = torch.arange(40) % 2, np.random.default_rng(0)
    outputs = [scores(dice.random(40) < 0.9, target) for _ in range(2)]
    found = [interval.compare(task(score), *outputs, target) for score in (None, own)]
    assert found[0].model_dump() == pytest.approx(found[1].model_dump())


def mean_error(output: Tensor, target: Tensor) -> float:
    return -float((output[:, 0] - target).square().mean())


def root_mean_error(output: Tensor, target: Tensor) -> float:
    return -math.sqrt(-mean_error(output, target))


@pytest.mark.parametrize("score", [mean_error, root_mean_error])
def test_the_bootstraps_bounds_are_those_of_the_delta_method(score) -> None:
    dice, count = np.random.default_rng(1), 400
    target = torch.from_numpy(dice.integers(0, 2, count)).float()
    before, after = (
        (target + torch.from_numpy(dice.normal(0, spread, count)))[:, None] for spread in (0.3, 0.4)
    )
    found = interval.compare(task(score), before, after, target)
    errors = [(out[:, 0] - target).square().double() for out in (before, after)]
    if score is root_mean_error:
        errors = [each / (2 * each.mean().sqrt()) for each in errors]
    half = 1.645 * float((errors[1] - errors[0]).std()) / math.sqrt(count)
    assert found.lost is None
    assert found.drop == pytest.approx(score(before, target) - score(after, target))
    assert found.drop_high - found.drop == pytest.approx(half, rel=0.15)
    assert found.drop - found.drop_low == pytest.approx(half, rel=0.15)


def test_the_bootstrap_is_repeatable_and_does_not_take_no_change_for_certainty() -> None:
    target = torch.arange(50).float() % 2
    output = target[:, None] + 0.1
    found = interval.compare(task(root_mean_error), output, output, target)
    assert found == interval.compare(task(root_mean_error), output, output, target)
    assert found.drop == 0 and found.drop_high == pytest.approx(1 - 0.05 ** (1 / 50))
    assert found.divergence == 0


def test_a_score_that_few_images_do_not_allow_gives_no_bounds() -> None:
    def picky(output: Tensor, target: Tensor) -> float:
        if len(target.unique()) < len(target):
            raise ValueError("every target once, please")
        return float(output.max())

    target = torch.arange(20).float()
    found = interval.compare(task(picky), target[:, None], target[:, None] - 1, target)
    assert found.drop == pytest.approx(1.0)
    assert found.bounds() is None
    assert found.state(5.0) == "cannot be told"


def test_three_states() -> None:
    """1000 images of which 100 are lost: 8 to 12 points, roughly."""
    found = compared(100, 0, 1000)
    assert found.state(0.15) == "met"
    assert found.state(0.10) == "cannot be told"
    assert found.state(0.05) == "missed"
    assert Comparison(drop=0.0).state(0.5) == "cannot be told", "never on the estimate alone"


def test_the_more_points_are_looked_at_the_wider_their_bounds() -> None:
    assert error_of(1) == pytest.approx(0.05)
    assert error_of(5) == error_of(8) == pytest.approx(0.05 / 8)
    for found in (compared(12, 8, 500), Comparison(images=9, drop=0.1, drop_low=0, drop_high=0.3)):
        widths = [high - low for low, high in map(found.bounds, (1, 2, 4, 8))]
        assert widths == sorted(widths) and len(set(widths)) == 4
    assert found.bounds(1) == (0, pytest.approx(0.3))


@pytest.mark.parametrize(("limit", "points"), [(0.01, 1), (0.01, 30), (0.05, 4)])
def test_fewest_images_are_those_from_which_a_perfect_model_passes(limit, points) -> None:
    fewest = fewest_images(limit, points)
    assert compared(0, 0, round(1.03 * fewest)).state(limit, points) == "met"
    assert compared(0, 0, fewest - 1).state(limit, points) == "cannot be told"


@pytest.mark.parametrize(("lost", "gained"), [(40, 40), (25, 20), (12, 6)])
def test_as_many_images_as_are_said_to_be_needed_tell(lost: int, gained: int) -> None:
    limit, seen = 0.01, compared(lost, gained, 1000)
    needed = seen.images_needed(limit)
    assert needed is not None and needed > 1000
    times = needed / 1000
    more = compared(round(1.25 * times * lost), round(1.25 * times * gained), round(1.25 * needed))
    fewer = compared(round(0.7 * times * lost), round(0.7 * times * gained), round(0.7 * needed))
    assert more.state(limit) == "met"
    assert fewer.state(limit) == "cannot be told"


def test_agreement_on_further_images_counts() -> None:
    found = Comparison(agreement=0.9, agreement_images=10).and_agreement(torch.ones(90))
    assert (found.agreement, found.agreement_images) == (pytest.approx(0.99), 100)
    # Clopper and Pearson: of 100 images 1 differs, the upper bound is 4.66 %.
    assert found.surely_agrees(0.0467) and not found.surely_agrees(0.0465)


@pytest.mark.slow
def test_bounds_hold_for_many_candidates_at_once() -> None:
    """2000 studies of 20 candidates, each just worse than the limit: how often is any called met?"""
    dice, images, limit = np.random.default_rng(0), 400, 0.05
    wrong = 0
    for _ in range(2000):
        outcomes = dice.multinomial(images, [0.0525, 0.002, 0.9455], size=20)
        found = {(int(lost), int(gained)) for lost, gained, _ in outcomes}
        wrong += any(
            exact_bounds(*pair, images, error_of(20))[1] <= limit
            for pair in found
            if pair[0] - pair[1] < limit * images
        )
    assert wrong / 2000 <= 0.05
