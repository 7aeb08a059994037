"""The evaluation command: the numbers of the run itself, and what it refuses."""

import json
import math
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

from mixln_jax import evaluate, main, recipes
from mixln_jax.evaluation import loop as evaluation
from mixln_jax.runs import log, weights
from mixln_jax.system import errors

ROOT = pathlib.Path(__file__).parents[2]
GOLDEN = ROOT / 'tests/golden'


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """Micro-batches of 4, which see the text in twos; the last evaluation stops long before the split ends."""
    folder = tmp_path_factory.mktemp('run')
    keys = {
        'num_steps': 3, 'batch_size': 8, 'accumulate': 2, 'seq_length': 16, 'eval.tokens': 300, 'eval.every': 0,
        'model.num_layers': 2, 'model.hidden_size': 16, 'model.num_heads': 2, 'model.intermediate_size': 24,
        'mesh.data': 1, 'model.norm_position': 'post,pre', 'compute_dtype': 'bfloat16',
        'analysis.tokens': 0,
    }  # fmt: skip
    main.run(recipes.load(f'{ROOT}/configs/quickstart.py', [(key, str(value)) for key, value in keys.items()]), folder)
    return folder


def command(capsys, *words):
    """(exit code, standard output, standard error)."""
    code = evaluate.main([str(word) for word in words])
    return code, *capsys.readouterr()


@pytest.mark.parametrize('batch_size', [None, 8, 1])
def test_the_numbers_are_those_of_the_run(run, tmp_path, capsys, batch_size):
    words = ['--batch_size', batch_size] if batch_size else []
    code, shown, _ = command(capsys, '--checkpoint', run, '--out', tmp_path / 'a/out.json', *words)
    assert code == 0
    last, found = log.read_metrics(run / 'metrics.jsonl')[-1], json.loads((tmp_path / 'a/out.json').read_text())
    assert found['checkpoint'] == f'{run}/checkpoints/3' and found['step'] == last['step'] == 3
    assert found['eval/tokens'] == last['eval/tokens'] == 384 and found['split'] == 'validation'
    for name in ('eval/loss', 'eval/perplexity', 'eval/bits_per_byte'):
        assert found[name] == pytest.approx(last[name], rel=1e-5), name  # eight devices, not one
    assert f'perplexity {last["eval/perplexity"]:.2f}' in shown and f'{run}/checkpoints/3' in shown


def test_another_stretch_of_text(run):
    found = weights.load(run)
    whole, more, other = (
        evaluation.evaluate_run(found, *of) for of in ((None, 300), (None, 1000), ('train', 300))
    )  # fmt: skip
    assert (whole['eval/tokens'], more['eval/tokens'], other['eval/tokens']) == (384, 1024, 384)
    assert len({values['eval/loss'] for values in (whole, more, other)}) == 3


def test_weights_that_are_not_finite(run):
    found = weights.load(run)
    found.params['norm']['scale'] = found.params['norm']['scale'] * math.nan
    with pytest.raises(errors.NumericsError, match='checkpoints/3: the evaluation loss is not finite'):
        evaluation.evaluate_run(found)


@pytest.mark.parametrize(
    'words, message',
    [
        (['--checkpoint', '{folder}/nowhere'], 'nowhere is not a folder'),
        (['--checkpoint', '{golden}/pre'], 'pre is a Hugging Face folder, which names no text .* give --tasks'),
        (['--checkpoint', '{run}', '--batch_size', '3'], '--batch_size 3 does not divide .* config.batch_size=8'),
        (['--checkpoint', '{run}', '--batch_size', '0'], '--batch_size must be at least 1'),
        (['--checkpoint', '{run}', '--tokens', '0'], '--tokens must be at least 1'),
        (['--checkpoint', '{run}', '--limit', '5'], '--limit has no meaning without --tasks'),
        (['--checkpoint', '{run}', '--tasks', 'a', '--split', 'train'], '--split has no meaning with --tasks'),
        (['--checkpoint', '{run}', '--tasks', 'a', '--task_path', '{folder}/no'], '--task_path .*/no is not a folder'),
        (['--checkpoint', '{run}', '--tasks', 'a', '--data_path', 'x'], '--data_path has no meaning with --tasks'),
        (['--checkpoint', '{run}', '--data_path', 'x'], '--data_path has no meaning for data.source=stdlib'),
        (['--checkpoint', '{run}', '--tasks', ' , '], "--tasks ' , ' names no task"),
        *(
            (['--checkpoint', '{run}', '--tasks', 'a', '--limit', limit], f'--limit: invalid .* value: .{limit}')
            for limit in ('1.5', 'nan', 'inf', '-0.5', '1e3.5')
        ),
        (['--checkpoint', '{run}', '--tasks', 'a', '--limit', '0.0'], '--limit must be at least 1'),
        (['--checkpoint', '{run}', '--norm_position', 'pre'], 'is a run of ours, which knows its placement'),
        (['--split', 'train'], '--checkpoint'),
    ],
)
def test_bad_input_is_one_line(run, tmp_path, capsys, words, message):
    words = [word.format(run=run, golden=GOLDEN, folder=tmp_path) for word in words]
    code, _, said = command(capsys, *words)
    assert code == 2
    assert said.count('\n') == 1
    assert re.search(message, said), said


def test_text_of_another_python_is_refused(run, tmp_path, capsys):
    run = shutil.copytree(run, tmp_path / 'run')
    about = json.loads((run / 'environment.json').read_text())
    about['eval_data']['source'] = 'python-3.0.0-another'
    (run / 'environment.json').write_text(json.dumps(about))
    code, _, said = command(capsys, '--checkpoint', run)
    assert code == 4 and said.count('\n') == 1
    assert f'the data is not what the run in {run} saw: source differs (the text that comes with Python' in said
    assert command(capsys, '--checkpoint', run, '--split', 'train')[0] == 0  # as that split is what it was


def test_without_the_harness(run, capsys, monkeypatch):
    monkeypatch.delitem(sys.modules, 'mixln_jax.evaluation.harness', raising=False)
    monkeypatch.delattr('mixln_jax.evaluation.harness', raising=False)  # the package keeps it too
    monkeypatch.setitem(sys.modules, 'lm_eval', None)  # as where it is not installed
    code, _, said = command(capsys, '--checkpoint', run, '--tasks', 'arc_easy')
    assert (code, said) == (2, 'mixln_jax: --tasks needs the lm-evaluation-harness: pip install lm_eval\n')


def test_nothing_else_imports_the_harness():
    lines = (
        'import sys, mixln_jax.main, mixln_jax.evaluate\n'
        'assert not {"lm_eval", "mixln_jax.evaluation.harness"} & {*sys.modules}'
    )
    subprocess.run([sys.executable, '-c', lines], cwd=ROOT, check=True)
