"""The experiment on collapses: its search, what it records of a run, and the page, which shows what it found."""

import pytest

from benchmarks.collapse import results, show, studies
from benchmarks.collapse.studies import RATES, Setting

SETTING = Setting('border', 'post', 40)


def bisected(trains, outcomes, seed=0, setting=SETTING):
    """Returns the numbers of the rates that are tried, until none is left."""
    tried, known = [], outcomes.setdefault((setting, seed), {})
    while (number := studies.next_rate(outcomes, setting, seed)) is not None:
        assert number not in known and 0 <= number < len(RATES)
        tried.append(number)
        known[number] = trains(number)
    return tried


@pytest.mark.parametrize('edge', range(-1, len(RATES)))
def test_bisection_finds_the_border(edge):
    outcomes = {}
    tried = bisected(lambda number: number <= edge, outcomes)
    low, high = studies.border(outcomes[SETTING, 0])
    assert (low, high) == (edge if edge >= 0 else None, edge + 1 if edge + 1 < len(RATES) else None)
    again = bisected(lambda number: number <= edge, outcomes, seed=1)  # where the first seed has it
    assert len(again) <= 2 or edge < 0
    deeper = Setting('border', 'post', 64)
    assert edge < 0 or bisected(lambda number: number <= edge, outcomes, setting=deeper)[0] == edge
    assert bisected(lambda number: True, {}, setting=Setting('border', 'pre', 40))[0] == studies.START
    assert len(set(tried)) == len(tried)


def test_a_gap_that_a_finer_grid_leaves_is_bisected():
    assert studies.next_rate({(SETTING, 0): {3: True, 9: False}}, SETTING, 0) == 6


def test_names_and_keys_of_settings():
    names = [setting.name for setting in studies.settings()]
    assert len(set(names)) == len(names)
    ramped = next(setting for setting in studies.settings() if setting.change == 'ProRes')
    assert ramped.keys['model.norm_position'] == 'post+prores' and ramped.keys['model.num_layers'] == 40


def line(step, distance, ratio=1.0, logits=(1.0,)):
    return {
        'step': step, 'train/loss': 1.0, 'train/grad_norm': 0.5, 'train/learning_rate': 1e-3,
        results.DISTANCE: distance, 'stability/grad_ratio': ratio, 'stability/grad_to_eps': [500.0, None],
        'stability/update_ratio': [0.02], 'stability/attention_logits': list(logits),
    }  # fmt: skip


def test_when_a_network_has_collapsed():
    healthy = [line(step, 0.1) for step in (10, 20, 30, 40)]
    assert results.collapse([line(10, 0.0), line(20, 0.1), line(30, 0.04), line(40, 0.0)], healthy) == 30
    assert results.collapse([line(10, 0.0), line(20, 0.0), line(30, 0.0), line(40, 0.08)], healthy) is None
    assert results.collapse([line(10, 0.2), line(20, 0.1)], healthy) is None
    assert results.collapse([line(10, 0.02), line(20, 0.02)], [line(10, 0.04), line(20, 0.04)]) is None  # no worse
    assert results.collapse([line(30, 0.06), line(40, 0.06)], [line(step, 0.2) for step in (30, 40)]) is None


def test_first_crossings_in_two_lines_running():
    lines = [line(20, 0.2), line(30, 0.12, ratio=0.02), line(40, 0.1, ratio=0.02, logits=(3.0, 50.0)), line(50, 0.2)]
    found = results.crossings(lines)
    assert found['grad_ratio < 0.03'] == 40 and found['grad_ratio < 0.01'] is None and not found['grad_ratio > 3']
    assert found['grad_to_eps < 1000'] == 30 and found['grad_to_eps < 300'] is None
    assert found['attention_logits > 30'] is None and found['update_ratio > 0.01'] == 30
    assert found['fall > 0.05'] == 40 and found['fall > 0.1'] is None


def test_growth_is_over_the_median_of_the_lines_before():
    made = [
        line(step, 0.2) | {'train/grad_norm': norm} for step, norm in enumerate((1, 2, 3, 4, 5, 20, 20, 20), start=20)
    ]
    found = results.crossings(made)  # 20 over 3, 3.5 and 4
    assert found['grad_norm/median > 5'] == 26 and found['grad_norm/median > 10'] is None
    assert [value for _, value in results.series(made, 'grad_norm/median')] == [20 / 3, 20 / 3.5, 5]


def test_results_grow(tmp_path):
    row = {'study': 'border', 'placement': 'post', 'layers': 40, 'change': '', 'seed': 0, 'rate': '0.002', 'trains': 1}
    results.store(tmp_path / 'r.csv', [row, row | {'seed': 1}])
    results.store(tmp_path / 'r.csv', [row | {'seed': 2}, row | {'seed': 1, 'trains': 0}])
    made = results.load(tmp_path / 'r.csv')
    assert [(one['seed'], one['trains']) for one in made] == [('0', '1'), ('1', '0'), ('2', '1')]


def test_the_page_shows_the_results(tmp_path, capsys):
    show.main(['--out', str(tmp_path)])
    shown, page = capsys.readouterr().out, (results.RESULTS / 'README.md').read_text(encoding='utf-8')
    missing = [row for row in shown.splitlines() if row.startswith('| ') and row not in page]
    assert not missing
    for figure in tmp_path.iterdir():
        assert figure.name in page
