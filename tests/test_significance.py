import itertools
import math
from fractions import Fraction

import pytest
from scipy import stats

from pipeline.significance import holm_adjusted, p_value


@pytest.mark.parametrize(
    ("wins", "losses", "expected"),
    [
        (0, 0, 1.0),
        (0, 1, 1.0),
        (1, 0, 1 / 2),
        (1, 1, 3 / 4),
        (2, 0, 1 / 4),
        (0, 2, 1.0),
        (5, 0, 1 / 32),
        (4, 1, 6 / 32),  # C(5,4) + C(5,5)
        (1, 4, 31 / 32),  # all but none
        (8, 2, 56 / 1024),  # C(10,8) + C(10,9) + C(10,10) = 45 + 10 + 1
        (15, 2, 154 / 131072),  # C(17,2) + C(17,1) + C(17,0) = 136 + 17 + 1
    ],
)
def test_p_value_by_hand(wins, losses, expected):
    assert p_value(wins, losses) == expected


def test_p_value_is_the_binomial_test_of_scipy():
    for rows in range(1, 41):
        for wins in range(rows + 1):
            oracle = stats.binomtest(wins, rows, 0.5, alternative="greater").pvalue
            assert p_value(wins, rows - wins) == pytest.approx(oracle, rel=1e-12)


@pytest.mark.parametrize(
    ("wins", "losses"), [(600, 400), (510, 490), (490, 510), (3000, 2800), (990, 10)]
)
def test_p_value_of_many_rows(wins, losses):
    oracle = stats.binomtest(wins, wins + losses, 0.5, alternative="greater").pvalue
    assert p_value(wins, losses) == pytest.approx(oracle, rel=1e-9)


def test_p_value_is_rounded_once():
    rows = 1200
    for wins in (0, 1, 580, 599, 600, 601, 640, 1199, 1200):
        exact = Fraction(sum(math.comb(rows, k) for k in range(wins, rows + 1)), 2**rows)
        assert p_value(wins, rows - wins) == float(exact)


def test_two_sides_overlap_in_the_draw_alone():
    for wins in range(30):
        for losses in range(30):
            draw = math.comb(wins + losses, wins) / 2 ** (wins + losses)
            assert p_value(wins, losses) + p_value(losses, wins) == pytest.approx(1 + draw)


def test_p_value_falls_with_every_win():
    values = [p_value(wins, 20) for wins in range(200)]
    assert all(later < earlier for earlier, later in itertools.pairwise(values[1:]))


def test_p_value_too_small_for_a_float():
    assert p_value(5000, 0) == 0.0


@pytest.mark.parametrize(("wins", "losses"), [(-1, 3), (3, -1)])
def test_negative_counts(wins, losses):
    with pytest.raises(ValueError, match="expected counts of at least 0"):
        p_value(wins, losses)


@pytest.mark.parametrize(
    ("p_values", "adjusted"),
    [
        ([], []),
        ([0.25], [0.25]),
        ([0.5, 0.125], [0.5, 0.25]),
        ([0.125, 0.125], [0.25, 0.25]),
        ([0.0625, 0.25, 0.125], [0.1875, 0.25, 0.25]),
        ([0.25, 0.0625, 0.25], [0.5, 0.1875, 0.5]),  # 2 x 0.25, then 0.25, never falling
        ([0.75, 0.75, 1.0], [1.0, 1.0, 1.0]),
        ([0.0, 1.0], [0.0, 1.0]),
    ],
)
def test_holm_by_hand(p_values, adjusted):
    assert holm_adjusted(p_values) == adjusted


def test_holm_holds_its_promise_on_fair_coins():
    """All pairs of two questions of up to 7 rows, weighed by how likely they are."""
    alpha, rows = Fraction(1, 20), 7
    weights = [Fraction(math.comb(rows, k), 2**rows) for k in range(rows + 1)]
    error = sum(
        weights[a] * weights[b]
        for a in range(rows + 1)
        for b in range(rows + 1)
        if min(holm_adjusted([p_value(a, rows - a), p_value(b, rows - b)])) <= alpha
    )
    # Of one question, 7 of 7 (1/128) is significant after doubling, 6 of 7 (8/128) is not.
    assert error == 1 - Fraction(127, 128) ** 2
    assert error <= alpha


def test_holm_rejects_what_the_step_down_procedure_rejects():
    """Against the procedure as Holm states it, which stops at the first that is not rejected."""
    grid = [k / 64 for k in range(0, 65, 4)]
    alpha = 0.125
    for a in grid:
        for b in grid:
            for c in grid:
                rejected = set()
                for rank, (p, index) in enumerate(sorted([(a, 0), (b, 1), (c, 2)])):
                    if p > alpha / (3 - rank):
                        break
                    rejected.add(index)
                adjusted = holm_adjusted([a, b, c])
                assert {i for i in range(3) if adjusted[i] <= alpha} == rejected
