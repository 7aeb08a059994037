"""Loss against learning rate: values, sensitivity and paired differences, against numbers worked out by hand."""

import json
import math

import numpy as np
import pytest

from mixln_jax import config as configs
from mixln_jax import sweep
from mixln_jax.report import command as report
from mixln_jax.report import inputs, sensitivity, sweeps
from mixln_jax.runs import sweep_folder
from mixln_jax.runs.sweep_cells import flat
from mixln_jax.runs.sweep_folder import Definition, Ending

VOCABULARY, LAST = 1000, 10
# {(placement, rate): losses of seeds 0, 1, 2}
LOSSES = {
    ('pre', 1e-3): (3.0, 3.1, 2.9),
    ('pre', 1e-2): (2.5, 2.6, 2.7),
    ('pre', 1e-1): (4.0, 4.1, 4.2),
    ('post', 1e-3): (2.8, 2.8, 2.7),
    ('post', 1e-2): (5.0, 9.0, 6.0),  # of seed 1: more than at initialisation
    ('post', 1e-1): (5.5, 5.6, math.nan),  # seed 0 collapsed, seed 2 was not finite
}
ENDINGS = {
    ('post', 1e-1, 0): Ending('collapsed', 6, 'mixln_jax: step 7: the network has collapsed', 7),
    ('post', 1e-1, 2): Ending('not finite', 6, 'mixln_jax: step 3: the loss is not finite', 3),
}


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """The folder of a sweep of 18 cells that have ended, one that is pruned, one that failed and one that runs."""
    folder = tmp_path_factory.mktemp('sweep')
    keys, cells = ('model.norm_position', 'optim.learning_rate', 'seed', 'data.seed'), {}
    three = {(*at, seed): loss for at, losses in LOSSES.items() for seed, loss in enumerate(losses)}
    for (placement, rate, seed), loss in (three | {('post', 0.5, 0): 1.0, ('pre', 0.5, 1): 1.0}).items():
        name = f'norm_position={placement},learning_rate={rate:g},seed={seed}'
        cells[name] = dict(zip(keys, (placement, rate, seed, seed), strict=True))
        ending = ENDINGS.get((placement, rate, seed), Ending('pruned' if rate == 0.5 else 'done', 0, ''))
        lines = [{'step': 5, 'tokens': 5, 'train/loss': 4.0, 'eval/loss': 2.0}]
        if ending.step:
            lines = [{'step': 2, 'tokens': 2, 'train/loss': 3.0, 'eval/loss': 1.5}]  # healthy before
            lines += [{'step': 7, 'tokens': 7, 'train/loss': loss}] * (ending.state == 'collapsed')
        elif ending.state == 'done':
            lines += [{'step': LAST, 'tokens': LAST, 'train/loss': loss + 1, 'eval/loss': loss}]
        write_run(folder / name, lines, cells[name])
        if (placement, rate) != ('pre', 0.5):  # that one runs
            sweep_folder.write_ending(folder / name, ending)
    cells['learning_rate=2'] = {'optim.learning_rate': 2.0}
    sweep_folder.write_ending(folder / 'learning_rate=2', Ending('failed', 4, 'mixln_jax: no text'))
    sweep_folder.write_definition(folder, Definition('tiny.py', keys, flat(configs.build(config_with({}))), cells))
    return folder


def config_with(changes):
    config = configs.default()
    config.num_steps, config.model.vocab_size, config.model.num_layers = LAST, VOCABULARY, 3
    config.update_from_flattened_dict(changes)
    return config


def write_run(run, lines, changes):
    run.mkdir(parents=True)
    values = config_with(changes).to_dict()
    names = [values['model']['norm_position']] * 3
    values['model'] |= {'norm_position': names, 'layer_index': [1, 2, 3], 'depth': 3}
    (run / 'config.json').write_text(json.dumps(values))
    (run / 'metrics.jsonl').write_text(''.join(f'{json.dumps(line)}\n' for line in lines))


def curves_of(folder):
    runs, problems, _ = inputs.read([str(folder)])
    assert not problems
    return runs, {curve.label: curve for curve in sensitivity.curves(runs)}


def test_values_and_sensitivity(folder):
    _, found = curves_of(folder)
    assert {*found} == {'pre', 'post'}
    for name in ('pre', 'post'):
        curve = found[name]
        assert curve.initial == pytest.approx(6.907755278982137, abs=1e-12)  # log 1000
        table = np.array([LOSSES[name, rate] for rate in (1e-3, 1e-2, 1e-1)])
        table = np.where(np.isnan(table), 6.907755278982137, np.minimum(table, 6.907755278982137))
        values = [curve.values_at(rate) for rate in curve.rates]
        assert [[at_rate[seed, seed] for seed in range(3)] for at_rate in values] == pytest.approx(table)
        by_seed = table.mean(0) - table.min(0)
        mean, error, count = sensitivity.sensitivity(curve, sensitivity.common_rates([*found.values()]))
        assert (mean, error, count) == (
            pytest.approx(by_seed.mean(), abs=1e-12),
            pytest.approx(math.sqrt(sum((by_seed - by_seed.mean()) ** 2) / 2 / 3), abs=1e-12),
            3,
        )
    assert (found['pre'].best, found['post'].best) == (1e-2, 1e-3)
    assert [found['post'].collapsed(rate) for rate in (1e-3, 1e-2, 1e-1)] == [0, 0, 2]


def test_paired_differences(folder):
    _, found = curves_of(folder)
    pre, post = found['pre'], found['post']
    difference = np.array([0.3, 0.2, 0.0])  # post at 1e-3 minus pre at 1e-2
    expected = (difference.mean(), difference.std(ddof=1) / math.sqrt(3), 3)
    assert sensitivity.paired(pre.values_at(1e-2), post.values_at(1e-3)) == pytest.approx(expected)
    fewer = {seeds: value for seeds, value in post.values_at(1e-3).items() if seeds != (1, 1)}
    assert sensitivity.paired(pre.values_at(1e-2), fewer)[::2] == pytest.approx((0.15, 2))
    assert sensitivity.paired(pre.values_at(1e-2), {})[2] == 0


def test_the_tables(folder):
    section = sweeps.sweep_section(curves_of(folder)[0])
    losses, best, differences, endings = section.tables
    assert losses.head == ('setting', '0.001', '0.01', '0.1')
    assert losses.rows[0] == ('pre', '3.0000 ± 0.058 (3)', '2.6000 ± 0.058 (3)', '4.1000 ± 0.058 (3)')
    assert losses.rows[1][3] == '6.0026 ± 0.45 (3), 2 collapsed'
    assert best.rows[1][:3] == ('post', '0.001 (lowest swept)', '2.7667 ± 0.033 (3)') and best.rows[1][4] == '2 of 9'
    [row] = differences.rows
    assert (row[0], row[1], row[4]) == ('post', '-0.2333 ± 0.033 (3)', '+0.1667 ± 0.088 (3)')
    assert [row[1:5] for row in endings.rows] == [
        ('collapsed at 7', '0.1', '0', '5.5000'),
        ('not finite at 3', '0.1', '2', '-'),
        ('pruned', '0.5', '0', '-'),
    ]
    [picture] = section.pictures
    assert 'pre 2.6000 at 0.01; post 2.7667 at 0.001 (lowest swept)' in picture.alt
    assert best.rows[0][1] == '0.01'
    assert section.notes[0].startswith('The best rate is at the edge of the rates for post (lowest swept): a rate')


def test_placements_are_called_as_they_were_swept(folder):
    """Where that is clear; other runs by the placements of their layers."""
    runs, _ = curves_of(folder)
    keys = ['model.norm_position', 'model.post_ratio']
    words = [dict(zip(keys, (run.swept[keys[0]], 0.5), strict=True)) for run in runs]

    def labels(all_swept):
        for run, swept in zip(runs, all_swept, strict=True):
            run.swept = swept
        return [curve.label for curve in sensitivity.curves(runs)]

    assert labels(words) == ['pre, post_ratio=0.5', 'post, post_ratio=0.5']
    assert labels([{keys[0]: 'mix'} for _ in runs]) == ['pre x 3', 'post x 3']  # mix of two depths or shares
    assert labels([{}, *words[1:]]) == ['pre x 3', 'post x 3']
    assert labels([{keys[0]: word[keys[0]], 'seed': 0} for word in words]) == ['pre', 'post']


def test_the_loss_at_initialisation_is_measured_where_it_can_be(tmp_path):
    for rate, first in ((1e-3, 5.0), (1e-2, 5.2)):
        lines = [{'step': 0, 'tokens': 0, 'eval/loss': first}, {'step': LAST, 'tokens': 1, 'eval/loss': 9.0}]
        write_run(tmp_path / f'{rate}', lines, {'optim.learning_rate': rate, 'model.norm_position': 'pre'})
    runs, _, _ = inputs.read([str(tmp_path / '0.001'), str(tmp_path / '0.01')])
    [curve] = sensitivity.curves(runs)
    assert (curve.label, curve.edge) == ('pre x 3', 'lowest swept')
    assert curve.initial == pytest.approx(5.1) and {*curve.values.values()} == {curve.initial}
    assert 'evaluated at step 0' in sweeps.sweep_section(runs).notes[1]
    assert sweeps.sweep_section(runs[:1]) is None


def test_show_and_report(folder, tmp_path, capsys, monkeypatch):
    assert sweep.main(['--show', str(folder)]) == 0
    shown = capsys.readouterr().out
    assert '21 cells of tiny.py: 16 done, 1 collapsed, 1 not finite, 1 pruned, 1 failed, 1 interrupted' in shown
    rows = (folder / 'results/results.csv').read_text().splitlines()
    assert len(rows) == 22 and rows[0].startswith('cell,model.norm_position,optim.learning_rate,seed,data.seed,state,')
    assert '"norm_position=post,learning_rate=0.1,seed=0",post,0.1,0,0,collapsed,7,7,1.5,2,5.5' in rows
    assert (folder / 'results/rates.svg').exists() and 'Loss by learning rate' in shown
    monkeypatch.chdir(tmp_path)
    assert report.main([str(folder)]) == 0
    assert 'at equal seeds, in pairs' in (tmp_path / 'report/report.md').read_text()


@pytest.mark.parametrize(
    'name, content, said',
    [
        ('sweep.json', None, 'no sweep is there (sweep.json is missing)'),
        ('sweep.json', '{', 'not the definition of a sweep'),
        ('sweep.json', '{"config": 1, "keys": [], "fixed": {}, "cells": {}}', 'config is not a text; put back'),
        ('sweep.json', '{"config": "", "keys": [], "fixed": {}, "cells": {"../x": {}}}', "'../x' is not a cell"),
        ('sweep.json', '{"config": "", "keys": 3, "fixed": {}, "cells": {}}', 'not the definition of a sweep'),
    ],
)
def test_malformed(tmp_path, capsys, name, content, said):
    if content:
        (tmp_path / name).write_text(content)
    assert sweep.main(['--show', str(tmp_path)]) == 2
    shown = capsys.readouterr().err
    assert said in shown and len(shown.splitlines()) == 1
    assert report.main([str(tmp_path), '--out', str(tmp_path / 'out')]) == 2
