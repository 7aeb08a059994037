"""The evaluation before the first update of a run that starts from given weights."""

import numpy as np
import pytest
from corpora import write
from short_runs import WORDS, StopAtTwo, lines_of, recipe

from mixln_jax import main
from mixln_jax.report import command
from mixln_jax.runs import log
from mixln_jax.system.errors import CheckpointError, Stopped


@pytest.fixture(scope='module')
def corpus(tmp_path_factory):
    rng, path = np.random.default_rng(0), tmp_path_factory.mktemp('data') / 'train.json.gz'
    return write(path, [' '.join(rng.choice(WORDS, rng.integers(2, 12))) for _ in range(120)])


@pytest.fixture(scope='module')
def base(corpus, tmp_path_factory):
    path = tmp_path_factory.mktemp('runs') / 'base'
    main.run(recipe(corpus), path)
    return path


def test_the_loss_before_the_first_update(corpus, base, tmp_path):
    values = recipe(corpus, init_from=str(base), **{'eval.samples': 1})
    main.run(values, tmp_path / 'run')
    first, *rest = lines_of(tmp_path / 'run')
    before = lines_of(base)
    assert first['step'] == first['tokens'] == 0 and [line['step'] for line in rest] == [1, 2, 3, 4]
    assert {*first} == {'step', 'tokens', *(name for name in before[-1] if name.startswith('eval/'))}
    assert first['eval/loss'] == before[-1]['eval/loss']
    assert {path.name for path in (tmp_path / 'run/samples').iterdir()} == {'0.jsonl', '2.jsonl', '4.jsonl'}
    assert before[0]['step'] == 1, 'a run from scratch has none'
    with pytest.raises(Stopped):
        main.run(values, tmp_path / 'again', stop=StopAtTwo())
    main.run(values, tmp_path / 'again')
    assert lines_of(tmp_path / 'again') == [first, *rest]
    values.eval.first = False
    main.run(values, tmp_path / 'without')
    assert lines_of(tmp_path / 'without') == rest
    command.run([str(tmp_path / 'run'), str(base)], str(tmp_path / 'report'))


def test_a_start_that_was_cut_short_writes_it_again(tmp_path):
    for _ in range(2):
        metrics = log.Metrics(tmp_path)
        assert metrics.lines == []
        metrics.add(0, {'tokens': 0, 'eval/loss': 1.5})
        metrics.flush()
        metrics.close()
    assert log.read_metrics(tmp_path / 'metrics.jsonl') == [{'step': 0, 'tokens': 0, 'eval/loss': 1.5}]
    (tmp_path / 'metrics.jsonl').write_text('{"step": -1}\n')
    with pytest.raises(CheckpointError, match='metrics.jsonl:1 is step -1, after step -1'):
        log.read_metrics(tmp_path / 'metrics.jsonl')
