import dataclasses
import itertools

import numpy as np
import pytest

from benchmarks import gates, gates_pool
from benchmarks.gates import RULES, WITHIN_INTERVAL, Chains, Scored, Twenty
from benchmarks.gates_pool import Night
from pipeline.rules import AT_LEAST_AS_GOOD, SIGNIFICANTLY_BETTER

LABELS = np.repeat(np.arange(10), 50)  # row 50 * c is the first of class c
EVERY_ROW = np.arange(500)
GATE_RULES = (AT_LEAST_AS_GOOD, SIGNIFICANTLY_BETTER)
CHAMPION = range(0, 500, 10)  # the rows that it has wrong: 5 of each class


def scored(*wrong):
    """Models by the rows of `LABELS` that each has wrong."""
    right = np.ones((len(wrong), len(LABELS)), bool)
    for model, rows in enumerate(wrong):
        right[model, list(rows)] = False
    return Scored(right, LABELS)


def promoted_by(challenger, champion=CHAMPION):
    """Which rules promote, of models given by their wrong rows."""
    compared = gates.compare(scored(champion, challenger), EVERY_ROW, 1, 0)
    return [name for name, rule in RULES.items() if rule(compared)]


def test_a_comparison_counts_the_rows_by_class_and_outcome():
    models = scored([0, 1, 2, 50], [1, 2, 3, 4, 51, 499])
    report = gates.compare(models, EVERY_ROW, model=1, champion=0)
    assert (report["correct"], report["accuracy"]) == (494, 0.988)
    assert report["baseline"]["correct"] == 496
    outcomes = ("both", "only_model", "only_baseline", "neither")
    counts = [tuple(row[o] for o in outcomes) for row in report["baseline"]["paired"]]
    even = (50, 0, 0, 0)
    assert counts == [(45, 1, 2, 2), (48, 1, 1, 0), *[even] * 7, (49, 0, 1, 0)]
    rows = [(row["name"], row["support"], row["accuracy"]) for row in report["per_class"]]
    assert rows[:2] == [("0", 50, 0.92), ("1", 50, 0.98)] and rows[9] == ("9", 50, 0.98)


def test_a_comparison_is_of_the_rows_it_is_given_alone():
    models = scored([0, 1, 2, 50], [1, 2, 3, 4, 51, 499])
    report = gates.compare(models, np.array([0, 3, 51]), model=1, champion=0)
    assert (report["correct"], report["baseline"]["correct"]) == (1, 2)
    assert [row["support"] for row in report["per_class"]] == [2, 1, *[0] * 8]
    assert report["per_class"][9]["accuracy"] is None


@pytest.mark.parametrize(
    ("challenger", "expected"),
    [
        # The champion has 50 of 500 wrong; the interval of its 450 reaches down to 0.8705, 436.
        (CHAMPION, [AT_LEAST_AS_GOOD, WITHIN_INTERVAL]),
        (range(10, 500, 10), [AT_LEAST_AS_GOOD, WITHIN_INTERVAL]),  # 1 to 0
        (range(40, 500, 10), [AT_LEAST_AS_GOOD, WITHIN_INTERVAL]),  # 4 to 0: p 0.0625
        (range(50, 500, 10), [AT_LEAST_AS_GOOD, SIGNIFICANTLY_BETTER, WITHIN_INTERVAL]),  # 0.031
        ([*CHAMPION, 1], [WITHIN_INTERVAL]),
        ([*CHAMPION, *range(1, 500, 36)], [WITHIN_INTERVAL]),  # 14 fewer
        ([*CHAMPION, *range(1, 500, 34)], []),  # 15 fewer
        # Better over all classes, and class 0 ruined: 0 to 10, p 0.001, times ten classes.
        ([*range(0, 50, 10), *range(1, 11)], [WITHIN_INTERVAL]),
    ],
)
def test_which_rules_promote(challenger, expected):
    assert promoted_by(challenger) == expected


def test_a_chain_is_judged_against_the_champion_of_its_night():
    models = scored(range(4), range(5), range(3), range(4), range(2), [])

    def served(name):
        return gates.champions(models, EVERY_ROW, range(6), RULES[name])

    assert served(AT_LEAST_AS_GOOD) == [0, 0, 2, 2, 4, 5]
    assert served(SIGNIFICANTLY_BETTER) == [0, 0, 0, 0, 0, 0]  # 4 to 0 is p 0.0625
    assert served(WITHIN_INTERVAL) == [0, 1, 2, 3, 4, 5]


def test_small_steps_lead_downhill_where_each_is_within_the_interval():
    models = scored(*(range(0, 3 * night) for night in range(10)))  # 3 more wrong each night
    assert not RULES[WITHIN_INTERVAL](gates.compare(models, EVERY_ROW, 9, 0))
    assert gates.champions(models, EVERY_ROW, range(10), RULES[WITHIN_INTERVAL])[-1] == 9


def test_the_ends_of_chains_are_scored_on_both_halves():
    models = scored(range(0, 40), range(0, 20))
    chains = gates.run_chains(models, lambda _: [0, 1], 3)
    assert list(chains) == list(RULES)
    for found in chains.values():
        assert found.promotions.tolist() == [1, 1, 1]
        np.testing.assert_allclose(found.seen + found.unseen, [[1.84, 1.92]] * 3)
        assert len(set(found.seen[:, 0])) == 3  # each chain has halves of its own
        # Class 0 gains 20 of its 50 rows, shared out by the halves; no other changes.
        seen, unseen = found.seen_classes, found.unseen_classes
        assert (seen[:, 0] > 0).all() and (unseen[:, 0] > 0).all()
        assert not seen[:, 1:].any() and not unseen[:, 1:].any()


def test_what_each_class_gains():
    models = scored([0, 1, 2, 50], [1, 499])
    gains = gates.class_gains(models, EVERY_ROW, 0, 1)
    np.testing.assert_allclose(gains, [0.04, 0.02, *[0] * 7, -0.02], atol=1e-12)
    few = gates.class_gains(models, np.array([0, 3, 499]), 0, 1)
    np.testing.assert_allclose(few, [0.5, *[0] * 8, -1])


def test_challengers_that_are_promoted_and_worse_where_nobody_looked():
    champion, seed = [0, 1], 0
    random = np.random.default_rng(seed)
    seen, unseen = gates.halves(random, 500)
    models = scored(champion, champion, unseen[:9], seen[:9])
    found = gates.run_twenties(models, lambda _: [0, 1, 2, 3], 1)
    assert [int(found[name].promoted[0]) for name in RULES] == [2, 0, 2]
    assert [int(found[name].worse[0]) for name in RULES] == [1, 0, 1]


def test_halves_share_no_row_and_leave_none_out():
    seen, unseen = gates.halves(np.random.default_rng(3), 10_000)
    assert len(seen) == len(unseen) == 5000
    assert sorted([*seen, *unseen]) == list(range(10_000))


def test_draws():
    random = np.random.default_rng(0)
    drawn = gates.any_of(range(30))(random)
    assert len(set(drawn)) == len(drawn) == 21 and set(drawn) < set(range(30))
    assert gates.one_of_each([[4], [2], [7]])(random) == [4, 2, 7]
    assert {gates.one_of_each([[1, 2]])(random)[0] for _ in range(50)} == {1, 2}


def test_labels_go_bad_in_one_way_night_after_night():
    labels = np.zeros(1000, np.int64)
    spoiled = {percent: gates_pool.spoil(labels, percent) for percent in (0, 20, 40, 100)}
    assert not spoiled[0].any() and not labels.any()
    assert (spoiled[20] > 0).sum() <= 200
    touched = spoiled[20] > 0
    assert (spoiled[40][touched] == spoiled[20][touched]).all()
    assert sorted(set(spoiled[100])) == list(range(10))  # chance may draw the right one too


def test_the_tables(capsys):
    halves = [np.array([[0.97, 0.98], [0.97, 0.98]]), np.array([[0.97, 0.972], [0.97, 0.96]])]
    gains = [np.array([[0.1, -0.01], [-0.03, 0]]), np.array([[0.0, 0.0], [-0.02, -0.06]])]
    found = {"a_rule": Chains(np.array([1, 2]), *halves, *gains)}
    gates.print_chains("a title", found)
    gates.print_classes(found)
    gates.print_twenties({"a_rule": Twenty(np.array([4, 6]), np.array([1, 0]))})
    lines = capsys.readouterr().out.splitlines()
    assert [" ".join(line.split()) for line in lines if line.startswith("a_rule")] == [
        "a_rule 1.50 97.00 98.00 97.00 96.60 +1.40 -0.40 -0.94 50.0 %",
        "a_rule -2.00 -2.90 -3.00 -5.70",
        "a_rule 5.00 4 6 10.0 %",
    ]


# Real models, fewer and smaller than those of the benchmark.

SEEDS = range(10)
SPOILED = (20, 40, 60)


@pytest.fixture(scope="module")
def config():
    from trainer.config import PRESETS

    return dataclasses.replace(PRESETS["core"], epochs=1, hidden_units=(32,))


@pytest.fixture(scope="module")
def mnist(mnist_dir):
    return gates_pool.read_mnist(mnist_dir)


@pytest.fixture(scope="module")
def pool(mnist, config, tmp_path_factory):
    """Models of clean labels, then one each of labels ever worse."""
    nights = [*map(Night, SEEDS), *(Night(100, percent) for percent in SPOILED)]
    found = gates_pool.answers(mnist, nights, config, tmp_path_factory.mktemp("pool"))
    return Scored(found == mnist.test_labels, mnist.test_labels)


@pytest.mark.campaign
def test_a_model_of_the_pool_is_what_the_trainer_makes_of_its_seed(mnist, config, tmp_path):
    import tensorflow as tf

    from trainer import data, sources, trained

    nights = [Night(3), Night(4, 50), Night(5)]
    found = gates_pool.answers(mnist, nights, config, tmp_path)
    strategy = tf.distribute.MirroredStrategy(["CPU:0"])
    source = sources.Resident(data.Examples(mnist.images, mnist.labels), 5)
    alone = trained.build(
        dataclasses.replace(config, seed=5), strategy, trained.Splits(source, None), 10
    )
    alone.train(*data.cut(source.order(0), config.batch_size), 0)
    logits = alone.model(tf.constant(mnist.test_images)).numpy()
    assert (found[2] == logits.argmax(axis=1)).all()
    assert (found[0] != found[2]).any() and (found[1] != found[2]).any()

    (file,) = tmp_path.rglob("seed3_*.npy")
    np.save(file, np.zeros(10_000, np.uint8))  # kept answers are taken, nothing is trained again
    again = gates_pool.answers(mnist, nights, config, tmp_path)
    assert not again[0].any() and (again[1:] == found[1:]).all()


@pytest.mark.campaign
@pytest.mark.parametrize("rule", GATE_RULES)
def test_on_the_gates_half_no_champion_falls(pool, rule):
    promotions = 0
    for chain in range(200):
        random = np.random.default_rng(chain)
        order = random.permutation(len(pool.right)).tolist()
        seen, _ = gates.halves(random, 10_000)
        correct = pool.right[:, seen].sum(axis=1)
        served = gates.champions(pool, seen, order, RULES[rule])
        after = correct[served]
        changes = [(a, b) for a, b in itertools.pairwise(served) if a != b]
        assert (np.diff(after) >= 0).all()
        if rule == SIGNIFICANTLY_BETTER:
            assert all(correct[b] > correct[a] for a, b in changes)
        promotions += len(changes)
    assert promotions > 0


@pytest.mark.campaign
def test_what_is_significantly_better_is_at_least_as_good(pool):
    seen, _ = gates.halves(np.random.default_rng(0), 10_000)
    correct = pool.right[:, seen].sum(axis=1)
    promoted = dict.fromkeys(RULES, 0)
    for champion in range(len(correct)):
        for challenger in set(range(len(correct))) - {champion}:
            report = gates.compare(pool, seen, challenger, champion)
            says = {name: rule(report) for name, rule in RULES.items()}
            for name in RULES:
                promoted[name] += says[name]
            assert says[AT_LEAST_AS_GOOD] or not says[SIGNIFICANTLY_BETTER]
            if correct[challenger] < correct[champion]:
                assert not says[AT_LEAST_AS_GOOD]
            else:
                assert says[WITHIN_INTERVAL]
    assert 0 < promoted[SIGNIFICANTLY_BETTER] < promoted[AT_LEAST_AS_GOOD]
    assert promoted[AT_LEAST_AS_GOOD] < promoted[WITHIN_INTERVAL]


@pytest.mark.campaign
def test_without_pairs_a_champion_falls_on_both_halves(pool):
    clean = list(SEEDS)
    chains = gates.run_chains(pool, gates.any_of(clean), 100)
    fell = {name: (found.seen[:, 1] < found.seen[:, 0]).any() for name, found in chains.items()}
    assert fell == {AT_LEAST_AS_GOOD: False, SIGNIFICANTLY_BETTER: False, WITHIN_INTERVAL: True}
    found = chains[WITHIN_INTERVAL]
    assert ((found.seen[:, 1] < found.seen[:, 0]) & (found.unseen[:, 1] < found.unseen[:, 0])).any()


@pytest.mark.campaign
def test_choosing_on_one_half_flatters(pool):
    chains = gates.run_chains(pool, gates.any_of(list(SEEDS)), 300)
    flattery = {
        name: (found.seen[:, 1] - found.unseen[:, 1]).mean() for name, found in chains.items()
    }
    first = chains[AT_LEAST_AS_GOOD]
    assert flattery[AT_LEAST_AS_GOOD] > abs((first.seen[:, 0] - first.unseen[:, 0]).mean())
    assert flattery[AT_LEAST_AS_GOOD] > flattery[WITHIN_INTERVAL]
