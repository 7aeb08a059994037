"""The pure part of the signs of a coming collapse: the spike score, and the rule on metrics lines."""

import json
import math

import numpy as np
import pytest

from mixln_jax.analysis import stability

ENTROPY = 7.27  # of C4's tokens
# Losses of the public log of a LLaMA-350M: Mix-LN, 12 of 24 layers Post-LN, warm-up of 6,000 steps.
C4 = {
    1000: 5.268,
    2000: 4.208,
    3000: 3.854,
    4000: 3.685,
    5000: 3.592,
    6000: 3.541,
    7000: 3.479,
    8000: 7.308,
    9000: 7.275,
}


def test_spike_score_by_brute_force():
    rng = np.random.default_rng(0)
    values = 3 + 0.1 * rng.normal(size=1500)
    values[[50, 150, 700, 1300]] += (2, 2, -2, 3)  # the first one has too few values before it
    spikes, expected, judged = stability.Spikes(), 0, 0
    for number, value in enumerate(values.tolist()):
        before = values[max(0, number - 1000) : number]
        if len(before) >= 100:
            judged += 1
            expected += abs(value - before.mean()) >= 7 * before.std()
        spikes.add(value)
        if number == 777:
            spikes = stability.Spikes(json.loads(json.dumps(spikes.record())))
        assert spikes.score == (expected / judged if judged else None)
    assert expected == 3 and spikes.mean(20) == pytest.approx(values[-20:].mean())
    assert stability.Spikes().score is None


def lines(name, values, first=100, every=10):
    """Metrics lines with one sign."""
    return [{'step': first + every * number, name: value} for number, value in enumerate(values)]


@pytest.mark.parametrize(
    'name, values, step',
    [
        ('grad_ratio', [0.5, 4e-3, 6e-3, 4e-3, None, 3e-3], 150),  # twice in a row, of the lines that have it
        ('grad_ratio', [0.5, 4e-3, 6e-3, 4e-3, 6e-3], None),
        ('grad_ratio', [1e4, 1e5, 1e6], None),  # ramps begin like this
        ('grad_growth', [1.0, 6.0, 4.0, 6.0, None, 7.0], 150),
        ('grad_growth', [None, 6.0, 4.0, 6.0, 5.0], None),
        ('grad_to_eps', [[1e4, 11.0], [1e4, 9.0], [8.0, None]], 120),
        ('grad_to_eps', [[None, None], None, [1e4, 9.0], [1e4, 11.0]], None),
        ('entropy_distance', [0.3, 0.4, 0.35, 0.29, 0.28], 140),
        ('entropy_distance', [-0.7, -0.1, 0.0, -0.05, -0.05], None),  # a loss on its way down
        ('attention_logits', [[1.0, 700.0], [5.0, 800.0]], None),  # but the loss is not known to be near
    ],
)
def test_rule_of_each_sign(name, values, step):
    warned = stability.coming_collapse(lines(f'stability/{name}', values))
    assert (warned and warned.step) == step


@pytest.mark.parametrize('distance, step', [(0.04, 110), (0.06, None), (None, None)])
def test_large_logits_and_a_loss_near_the_frequencies(distance, step):
    made = lines('stability/attention_logits', [[1.0, 101.0]] * 3)
    warned = stability.coming_collapse([line | {'stability/entropy_distance': distance} for line in made])
    assert (warned and warned.step) == step


def test_growth_is_over_the_median_of_what_is_known():
    before = [None, 8.0, math.nan, 2.0, 4.0, 2.0]
    assert stability.growth(30.0, before) is None  # four are not enough
    assert stability.growth(30.0, [*before, 3.0]) == 10.0
    assert stability.growth(30.0, [0.1] * 5) == 30.0
    assert stability.growth(30.0, [30.0] * 1000 + [10.0] * 1000) == 3.0


def test_first_steps_are_not_judged():
    """Weights of 0, as of new adapters and heads, leave others without gradient for a while."""
    assert stability.coming_collapse(lines('stability/grad_ratio', [0.0] * 19, first=1, every=1)) is None
    assert stability.coming_collapse(lines('stability/grad_ratio', [0.0] * 21, first=1, every=1)).step == 21


def test_a_collapse_in_public():
    """The losses alone are healthy up to step 7,000."""
    distances = {step: (ENTROPY - loss) / ENTROPY for step, loss in C4.items()}
    made = [{'step': step, 'stability/entropy_distance': distance} for step, distance in distances.items()]
    assert stability.coming_collapse(made[:7]) is None
    assert stability.coming_collapse(made).step == 9000
    watch = stability.Watch()
    assert [line['step'] for line in [*made, *made[-2:]] if watch.add(line)] == [9000]  # once
