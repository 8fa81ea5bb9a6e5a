"""Is one of two models better, judged on the rows where exactly one of them is right?

On those rows, were both equally good, each would be right like the toss of a fair coin.

Synopsis::

    p_value(15, 2)                     # 0.0012: 15 to 2 is no coin's doing
    holm_adjusted([0.01, 0.04, 0.03])  # [0.03, 0.06, 0.06]
"""

from __future__ import annotations

from collections.abc import Sequence


def p_value(wins: int, losses: int) -> float:
    """How likely a fair coin is to win this often, or more often: the exact one-sided test.

    Computed in whole numbers and rounded once. Small values say that `wins` are more than
    chance; to ask whether a model is worse, its losses are the wins.

    Args:
        wins: rows where only this model is right.
        losses: rows where only the other one is.

    Returns:
        P(X >= wins) for X of Binomial(wins + losses, 1/2); 1 where there are no wins.

    Raises:
        ValueError: a count is negative.

    Source: McNemar 1947, "Note on the sampling error of the difference between correlated
    proportions or percentages", in its exact binomial form (Fagerland, Lydersen and Laake 2013,
    "The McNemar test for binary matched-pairs data").
    """
    if wins < 0 or losses < 0:
        raise ValueError(f"{wins} wins, {losses} losses: expected counts of at least 0")
    rows = wins + losses
    fewer = _ways_up_to(min(losses, wins - 1), rows)
    # Of more than half the rows, at least `wins` come in as many ways as at most `losses`.
    ways = fewer if wins > losses else 2**rows - fewer
    return ways / 2**rows  # of two integers: correctly rounded, however long they are


def _ways_up_to(most: int, rows: int) -> int:
    """How many sequences of so many tosses win at most `most` times: a sum of binomials."""
    total, ways = 0, 1
    for wins in range(most + 1):
        total += ways
        ways = ways * (rows - wins) // (wins + 1)
    return total


def holm_adjusted(p_values: Sequence[float]) -> list[float]:
    """Adjusts the p-values of several questions asked at once, in their order.

    Calling those significant whose adjusted value is at most alpha errs on any question at all
    with a probability of at most alpha, however the questions depend on each other.

    Source: Holm 1979, "A Simple Sequentially Rejective Multiple Test Procedure".
    """
    adjusted = [1.0] * len(p_values)
    largest = 0.0
    in_order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    for rank, index in enumerate(in_order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted
