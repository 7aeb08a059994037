"""The benchmark of the train step: its table and record, and bad input; what the campaign of damage counts."""

import json

import pytest

from benchmarks import train_step
from benchmarks.campaign import __main__ as campaign
from benchmarks.campaign import judging

SMALL = ['--device', 'cpu', '--dtype', 'float32', '--placements', 'pre', '--rounds', '2', '--steps', '1']


@pytest.mark.slow
def test_contenders_take_turns_and_one_that_fails_hides_no_other(tmp_path, capsys):
    words = [
        '--cases',
        'llama_9m:2x16',
        '--with',
        'model.remat=dots',
        'model.num_heads=7',
        'XLA_FLAGS=--xla_no_such_flag=1',
        *SMALL,
        '--out',
        str(tmp_path),
    ]
    assert train_step.main(words) == 0
    [path] = tmp_path.glob('cpu-*.json')
    rows = {row['contender']: row for row in json.loads(path.read_text())['rows']}
    assert rows['pre']['ratios'] == [1, 1] and rows['pre']['tokens'] == 32
    assert len(rows['pre, model.remat=dots']['all_seconds']) == 2 and rows['pre, model.remat=dots']['ratios'] != [1, 1]
    assert rows['pre, XLA_FLAGS=--xla_no_such_flag=1']['error'] == 'its process died'
    assert 'num_heads' in rows['pre, model.num_heads=7']['error']
    lines = capsys.readouterr().out.splitlines()[-4:]
    assert [line.split(' | ')[1] for line in lines] == list(rows)
    assert path.with_suffix('.md').read_text().splitlines()[-4:] == lines


@pytest.mark.parametrize(
    'words, message',
    [
        (['--cases', 'llama_9m'], '--cases llama_9m: RECIPE:BxT is needed'),
        (['--cases', 'nothing:1x16', *SMALL], 'nothing could be measured: '),
    ],
)
def test_bad_input_is_one_line(tmp_path, capsys, words, message):
    assert train_step.main([*words, '--out', str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert message in said and len(said.splitlines()) == 1 and not list(tmp_path.iterdir())


def test_the_campaign_counts_what_is_broken(monkeypatch, capsys):
    """An outcome is counted, a broken contract and an end that is none of ours are printed with what made them."""

    def part(base, count=3):
        yield from (judging.judged('row', 'good', str, 'as saved') for _ in range(count - 1))
        yield judging.judged('row', 'flip 7', judging.refused, ZeroDivisionError('x'))

    monkeypatch.setattr(campaign, 'Base', lambda folder: None)
    monkeypatch.setattr(campaign, 'PARTS', {'part': part})
    assert campaign.campaign([]) == 1
    broken, *table = capsys.readouterr().out.splitlines()
    assert (
        broken.startswith('BROKEN: row: flip 7: ZeroDivisionError: x') and table[-1] == '| row | 3 | 2 as saved | 1 |'
    )
