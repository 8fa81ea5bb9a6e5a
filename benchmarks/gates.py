"""How often a rule of promotion promotes, and what becomes of the champion where no gate looks.

python -m benchmarks.gates --idx $MNIST_IDX_DIR --work_dir /tmp/gates

Models of other seeds are trained once. Again and again the test set is cut in two halves at
random: 5,000 images that the gate sees, 5,000 that it never sees. Each time, every rule is asked
about the same models in the same order:

- twenty challengers against one champion;
- a chain of twenty nightly retrains, each judged against the champion of its night;
- the same, where every night's labels are a little worse than the last one's, or better.

The rules are those of `pipeline.gate`, and one that takes no notice of which rows two models
differ on: "not below the champion's 95 % interval". The network is preset core's, smaller and
trained for fewer epochs unless asked for otherwise.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks import gates_pool
from benchmarks.gates_pool import NUM_CLASSES, Night
from pipeline import gate
from pipeline.metrics import PAIRED, wilson_interval
from pipeline.rules import AT_LEAST_AS_GOOD, SIGNIFICANTLY_BETTER, Rules

NIGHTS = 20
WITHIN_INTERVAL = "within_interval"

Rule = Callable[[dict[str, Any]], bool]  # of a report that compares with the champion
Draw = Callable[[np.random.Generator], Sequence[int]]  # models, the first champion first


class Scored(NamedTuple):
    """Models scored on one test set: right, bool [models, rows]; labels, int [rows]."""

    right: np.ndarray
    labels: np.ndarray


class Chains(NamedTuple):
    """What became of a champion, chain by chain; accuracies of the first and of the last one.

    Attributes:
        promotions: int [chains].
        seen: on the gate's half, float [chains, 2].
        unseen: on the other half, float [chains, 2].
        seen_classes: what each class gained on the gate's half, float [chains, classes].
        unseen_classes: the same on the other half.
    """

    promotions: np.ndarray
    seen: np.ndarray
    unseen: np.ndarray
    seen_classes: np.ndarray
    unseen_classes: np.ndarray


class Twenty(NamedTuple):
    """Of the challengers of one champion: promoted, and promoted though worse on unseen images."""

    promoted: np.ndarray
    worse: np.ndarray


# The rules


def by_the_gate(promote_if: str) -> Rule:
    """A rule of the gate's, its floors and its look at each class included."""
    rules = Rules(promote_if=promote_if)

    def promotes(report: dict[str, Any]) -> bool:
        names = [row["name"] for row in report["per_class"]]
        checks = gate.judge(
            report,
            rules,
            class_names=names,
            leaked=0,
            inherited=gate.Inherited(),
            was_left=False,
            champion_classes=names,
        )
        return all(check.passed for check in checks)

    return promotes


def within_interval(report: dict[str, Any]) -> bool:
    """Whether the accuracy is not below the Wilson interval of the champion's."""
    total = sum(row["support"] for row in report["per_class"])
    interval = wilson_interval(report["baseline"]["correct"], total)
    return interval is not None and bool(report["accuracy"] >= interval[0])


RULES: dict[str, Rule] = {
    AT_LEAST_AS_GOOD: by_the_gate(AT_LEAST_AS_GOOD),
    SIGNIFICANTLY_BETTER: by_the_gate(SIGNIFICANTLY_BETTER),
    WITHIN_INTERVAL: within_interval,
}


def compare(scored: Scored, rows: np.ndarray, model: int, champion: int) -> dict[str, Any]:
    """What of a report the rules look at, of a model beside the champion on some rows."""
    mine, theirs = scored.right[model, rows], scored.right[champion, rows]
    outcome = 2 * ~mine + ~theirs  # the places of metrics.PAIRED
    cells = np.bincount(4 * scored.labels[rows] + outcome, minlength=4 * NUM_CLASSES)
    paired = [
        {"label": label, **dict(zip(PAIRED, counts, strict=True))}
        for label, counts in enumerate(cells.reshape(NUM_CLASSES, 4).tolist())
    ]
    per_class = []
    for row in paired:
        support, correct = sum(row[o] for o in PAIRED), row["both"] + row["only_model"]
        accuracy = correct / support if support else None
        name = str(row["label"])
        per_class.append({**row, "name": name, "support": support, "accuracy": accuracy})
    return {
        "accuracy": float(mine.mean()),
        "correct": int(mine.sum()),
        "per_class": per_class,
        "baseline": {"correct": int(theirs.sum()), "paired": paired},
    }


# What they lead to


def halves(random: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The rows that the gate sees, and those that it never sees."""
    rows = random.permutation(size)
    return rows[: size // 2], rows[size // 2 :]


def champions(scored: Scored, rows: np.ndarray, order: Sequence[int], rule: Rule) -> list[int]:
    """The champion after each night of a chain; the first model of the order is the first."""
    found = [order[0]]
    for challenger in order[1:]:
        promoted = rule(compare(scored, rows, challenger, found[-1]))
        found.append(challenger if promoted else found[-1])
    return found


def class_gains(scored: Scored, rows: np.ndarray, first: int, last: int) -> np.ndarray:
    """By how much a model's accuracy is above another's in each class: float [classes]."""
    labels = scored.labels[rows]
    support = np.bincount(labels, minlength=NUM_CLASSES)
    accuracies = [
        np.bincount(labels, scored.right[model, rows], NUM_CLASSES) / np.maximum(support, 1)
        for model in (first, last)
    ]
    return np.asarray(accuracies[1] - accuracies[0])


def run_chains(
    scored: Scored, draw: Draw, count: int, rules: Mapping[str, Rule] = RULES
) -> dict[str, Chains]:
    """Runs chains, each with its own order of models and its own halves, under every rule."""
    found: dict[str, list[tuple[Any, ...]]] = {name: [] for name in rules}
    for chain in range(count):
        random = np.random.default_rng(chain)
        order = draw(random)
        seen, unseen = halves(random, len(scored.labels))
        for name, rule in rules.items():
            served = champions(scored, seen, order, rule)
            ends = [served[0], served[-1]]
            promotions = sum(a != b for a, b in itertools.pairwise(served))
            of_ends = [scored.right[ends][:, rows].mean(axis=1) for rows in (seen, unseen)]
            gains = [class_gains(scored, rows, *ends) for rows in (seen, unseen)]
            found[name].append((promotions, *of_ends, *gains))
    return {name: Chains(*map(np.stack, zip(*rows, strict=True))) for name, rows in found.items()}


def run_twenties(
    scored: Scored, draw: Draw, count: int, rules: Mapping[str, Rule] = RULES
) -> dict[str, Twenty]:
    """Puts challengers before one champion, which stays; each time others, on other halves."""
    found: dict[str, list[tuple[int, int]]] = {name: [] for name in rules}
    for turn in range(count):
        random = np.random.default_rng(turn)
        champion, *challengers = draw(random)
        seen, unseen = halves(random, len(scored.labels))
        correct = scored.right[:, unseen].sum(axis=1)
        reports = [compare(scored, seen, model, champion) for model in challengers]
        for name, rule in rules.items():
            promoted = [m for m, r in zip(challengers, reports, strict=True) if rule(r)]
            worse = sum(bool(correct[model] < correct[champion]) for model in promoted)
            found[name].append((len(promoted), worse))
    return {name: Twenty(*np.array(rows).T) for name, rows in found.items()}


def any_of(models: Sequence[int]) -> Draw:
    """Draws a champion and its challengers in any order, each model at most once."""
    return lambda random: random.permutation(models)[: NIGHTS + 1].tolist()


def one_of_each(groups: Sequence[Sequence[int]]) -> Draw:
    """Draws a model of each group, in the order of the groups."""
    return lambda random: [int(random.choice(group)) for group in groups]


# Tables


def print_twenties(found: Mapping[str, Twenty]) -> None:
    """One line for each rule."""
    print("\ntwenty challengers of other seeds, one champion")
    print(f"{'':22}{'promoted of 20':>24}{'worse, of those':>17}")
    print(f"{'':22}{'mean':>8}{'5 %':>8}{'95 %':>8}{'promoted':>17}")
    for name, (promoted, worse) in found.items():
        low, high = np.percentile(promoted, (5, 95))
        share = 100 * worse.sum() / max(1, promoted.sum())
        print(f"{name:22}{promoted.mean():8.2f}{low:8.0f}{high:8.0f}{share:15.1f} %")


def print_chains(title: str, found: Mapping[str, Chains]) -> None:
    """One line for each rule; accuracies in per cent, what they differ by in points."""
    print(f"\n{title}")
    heads = ("promo-", "gate's half", "unseen half", "", "unseen", "", "chains")
    below = ("tions", "first   last", "first   last", "flattery", "gain", "worst 5 %", "that fell")
    widths = (8, 16, 16, 10, 9, 11, 11)
    for row in (heads, below):
        cells = [text.rjust(width) for text, width in zip(row, widths, strict=True)]
        print(" " * 22 + "".join(cells))
    for name, (promotions, seen, unseen, *_) in found.items():
        ends = [100 * half.mean(axis=0) for half in (seen, unseen)]
        gain = 100 * (unseen[:, 1] - unseen[:, 0])
        cells = [f"{first:9.2f}{last:7.2f}" for first, last in ends]
        print(
            f"{name:22}{promotions.mean():8.2f}{''.join(cells)}{ends[0][1] - ends[1][1]:+10.2f}"
            f"{gain.mean():+9.2f}{np.percentile(gain, 5):+11.2f}{100 * (gain < 0).mean():9.1f} %"
        )


def print_classes(found: Mapping[str, Chains]) -> None:
    """One line for each rule, on the class of each chain that lost most; in points."""
    heads = "".join(half.rjust(20) for half in ("gate's half", "unseen half"))
    print(f"\nthe class that lost most{heads}")
    print(" " * 24 + f"{'mean':>9}{'worst 5 %':>11}" * 2)
    for name, chains in found.items():
        cells = ""
        for gains in (chains.seen_classes, chains.unseen_classes):
            worst = 100 * gains.min(axis=1)
            cells += f"{worst.mean():+9.2f}{np.percentile(worst, 5):+11.2f}"
        print(f"{name:24}{cells}")


def print_pool(scored: Scored, groups: Sequence[Sequence[int]], percent: int) -> None:
    """How good the models are, on all test images."""
    print(f"{'labels of chance':>16}{'models':>8}{'accuracy':>10}{'deviation':>11}")
    for step in range(0, len(groups), 5):
        accuracy = 100 * scored.right[groups[step]].mean(axis=1)
        deviation = f"{accuracy.std(ddof=1):11.3f}" if len(accuracy) > 1 else ""
        print(f"{step * percent:14} %{len(accuracy):8}{accuracy.mean():10.2f}{deviation}")


def main() -> None:
    """Trains what is missing, asks the rules, and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--idx", type=Path, required=True, help="the folder of MNIST's archives")
    parser.add_argument("--work_dir", type=Path, help="keeps answers (default: temporary)")
    parser.add_argument("--seeds", type=int, default=42, help="models of clean labels")
    parser.add_argument("--spoiled_seeds", type=int, default=2, help="models of each worse night")
    parser.add_argument("--percent", type=int, default=2, help="more labels of chance each night")
    parser.add_argument("--chains", type=int, default=1000, help="of each kind")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--hidden_units", type=int, nargs="+", default=[256, 128])
    flags = parser.parse_args()
    if flags.seeds <= NIGHTS:
        parser.error(f"--seeds {flags.seeds}: expected more than {NIGHTS}")
    if flags.spoiled_seeds < 1:
        parser.error(f"--spoiled_seeds {flags.spoiled_seeds}: expected at least 1")
    with tempfile.TemporaryDirectory() as temporary:
        report(flags, flags.work_dir or Path(temporary))


def report(flags: argparse.Namespace, work_dir: Path) -> None:
    """Prints every table."""
    from trainer.config import PRESETS

    units = tuple(flags.hidden_units)
    config = dataclasses.replace(PRESETS["core"], epochs=flags.epochs, hidden_units=units)
    nights = [[Night(seed) for seed in range(flags.seeds)]]
    for night in range(1, NIGHTS + 1):
        seeds = range(100 * night, 100 * night + flags.spoiled_seeds)
        nights.append([Night(seed, night * flags.percent) for seed in seeds])
    everyone = [model for group in nights for model in group]
    groups = [[everyone.index(model) for model in group] for group in nights]
    mnist = gates_pool.read_mnist(flags.idx)
    answers = gates_pool.answers(mnist, everyone, config, work_dir)
    scored = Scored(answers == mnist.test_labels, mnist.test_labels)

    print_pool(scored, groups, flags.percent)
    print_twenties(run_twenties(scored, any_of(groups[0]), flags.chains))
    for title, draw in (
        ("a chain of twenty nights, other seeds", any_of(groups[0])),
        ("every night's labels a little worse", one_of_each(groups)),
        ("every night's labels a little better", one_of_each(groups[::-1])),
    ):
        found = run_chains(scored, draw, flags.chains)
        print_chains(title, found)
        print_classes(found)


if __name__ == "__main__":
    main()
