"""Verdicts on losses and signs, without a run; and the files of losses that a user gives."""

import dataclasses
import gzip
import json
import math

import pytest

from mixln_jax import advise
from mixln_jax import config as configs
from mixln_jax.advice import judgement, losses
from mixln_jax.advice.judgement import judge
from mixln_jax.advice.runner import Runner
from mixln_jax.system.errors import DataError

# The public log of a LLaMA-350M on C4, 12 of 24 layers Post-LN: warm-up of 6,000 of 60,000 steps at a rate of 1e-3.
C4_MIX = {
    1000: 5.268, 2000: 4.208, 3000: 3.854, 4000: 3.685, 5000: 3.592, 6000: 3.541, 7000: 3.479, 8000: 7.308, 9000: 7.275,
    10_000: 7.275, 15_000: 7.268, 20_000: 7.267, 25_000: 7.268, 29_000: 7.266,
}  # fmt: skip
C4_PRE = {
    1000: 5.189, 2000: 4.215, 3000: 3.847, 4000: 3.677, 5000: 3.577, 6000: 3.514, 7000: 3.446, 8000: 3.397, 9000: 3.361,
    10_000: 3.331, 15_000: 3.233, 20_000: 3.167, 25_000: 3.118, 29_000: 3.083,
}  # fmt: skip
ENTROPY = 7.27


def lines(losses, until=math.inf):
    return [{'step': step, 'train/loss': loss} for step, loss in losses.items() if step <= until]


def every_five(function, until=300):
    """Lines of a run whose losses are a function of the step."""
    return lines({step: function(step) for step in range(5, until + 1, 5)})


@pytest.mark.parametrize('until', [1000, 5000, 6000, 7000])
def test_a_healthy_beginning_is_not_called_stable(until):
    verdict = judge(lines(C4_MIX, until), 6000, ENTROPY, planned=60_000)
    assert verdict.state == judgement.UNDECIDED
    assert 'the losses end at step' in verdict.reasons[0] and 'needed are 12,000 steps' in verdict.reasons[0]
    assert verdict.not_tried == (f'steps {until + 1:,} to 60,000',)


def test_a_collapse_in_public():
    assert judge(lines(C4_MIX, 8000), 6000, ENTROPY).state != judgement.TRAINED
    for until in (9000, 10_000, 29_000):
        for warmup in (6000, None):  # it had been healthy before, whenever the warm-up ended
            verdict = judge(lines(C4_MIX, until), warmup, ENTROPY)
            assert (verdict.state, verdict.step) == (judgement.COLLAPSED, 8000)
            assert (
                verdict.sentence() == 'collapsed at step 8000'
                and 'at step 7,000 the loss (mean of up to 20 steps) was 52% below' in verdict.reasons[0]
            )


@pytest.mark.parametrize(
    'until, warmup, state',
    [(10_000, 6000, 'undecided'), (15_000, 6000, 'trained'), (29_000, 6000, 'trained'), (29_000, None, 'undecided')],
)
def test_trained_as_far_as_tried(until, warmup, state):
    verdict = judge(lines(C4_PRE, until), warmup, ENTROPY)
    assert verdict.state == state and verdict.not_tried == (f'any step after {until:,}',)
    assert 'stable' not in f'{verdict}{verdict.sentence()}'


def test_losses_near_the_frequencies():
    """Bytes: entropy 3.3. A network that never learns more is judged after the warm-up, and not if it gets better."""
    falling = lambda step: 5.5 - 2.2 * min(step, 60) / 60  # noqa: E731
    assert judge(every_five(falling), 40, 3.3).state == judgement.COLLAPSED
    assert judge(every_five(falling), 40, 3.3).step == 65  # the mean of 20 steps comes near
    assert judge(every_five(falling), 250, 3.3).state == judgement.UNDECIDED
    assert judge(every_five(falling, 130), 40, 3.3).state == judgement.UNDECIDED  # too short
    learning = lambda step: 3.45 - 0.3 * step / 300  # noqa: E731
    assert judge(every_five(learning), 40, 3.3).state == judgement.UNDECIDED
    assert 'not yet 5% below' in judge(every_five(learning), 40, 3.3).reasons[0]
    slow = lambda step: 5.5 - 0.01 * step / 300  # noqa: E731
    assert judge(every_five(slow), 40, 3.3).state == judgement.UNDECIDED
    trained = lambda step: max(2.4, falling(step) - step / 300)  # noqa: E731
    assert judge(every_five(trained), 40, 3.3).state == judgement.TRAINED


def test_a_spike_is_no_collapse():
    spike = lambda step: 3.4 if 150 <= step < 190 else max(2.4, 5.5 - step / 20)  # noqa: E731
    verdict = judge(every_five(spike, 400), 40, 3.3)
    assert verdict.state == judgement.SIGNS and 'the last loss is 27% below' in verdict.reasons[1]


def test_signs_and_losses_that_are_not_finite():
    made = [line | {'stability/grad_ratio': 1e-3} for line in every_five(lambda step: 2.4)]
    verdict = judge(made, 40, 3.3)
    assert (verdict.state, verdict.step) == (judgement.SIGNS, 25) and 'vanishes' in verdict.reasons[0]
    for bad in (None, math.nan, math.inf):
        made[-1]['train/loss'] = bad
        assert judge(made, 40, 3.3).sentence() == 'not finite at step 300'
    assert judge([], 40, 3.3).state == judge([{'step': 3, 'eval/loss': 2.0}], 40, 3.3).state == judgement.UNDECIDED


def test_the_distance_is_of_the_mean_of_twenty_steps():
    made = judgement.with_distances(lines({1: 4.0, 10: 2.0, 21: 3.0, 60: 1.0}), 4.0)
    assert [line[judgement.DISTANCE] for line in made] == [0, 0.25, 0.375, 0.75]


@pytest.mark.parametrize(
    'text',
    [
        ''.join(json.dumps({'step': step, 'loss': loss}) + '\n' for step, loss in C4_MIX.items()),
        ''.join(json.dumps({'step': step, 'train/loss': loss, 'x': 1}) + '\n' for step, loss in C4_MIX.items()),
        'step,loss\n' + ''.join(f'{step},{loss}\n' for step, loss in C4_MIX.items()),
        '# a log\n\n' + ''.join(f'{step}\t{loss}\n' for step, loss in C4_MIX.items()),
        ''.join(f'  {step}   {loss}\r\n' for step, loss in C4_MIX.items()),
    ],
)
def test_files_of_losses(tmp_path, text):
    path = tmp_path / 'losses'
    path.write_text(text)
    assert losses.read(str(path)) == lines(C4_MIX)


def test_a_work_directory_tells_its_warm_up(tmp_path, capsys):
    config = configs.default()
    config.num_steps, config.optim.warmup_steps = 60_000, 6000
    (tmp_path / 'config.json').write_text(json.dumps(dataclasses.asdict(configs.build(config))))
    text = ''.join(json.dumps(line) + '\n' for line in lines(C4_PRE, 15_000))
    (tmp_path / 'metrics.jsonl').write_text(text)
    for path in (tmp_path, tmp_path / 'metrics.jsonl'):
        assert advise.main(['--losses', str(path), '--entropy', f'{ENTROPY}']) == 0
        out = capsys.readouterr().out
        assert 'metrics.jsonl: trained as far as tried' in out and 'not tried: steps 15,001 to 60,000' in out
    assert advise.main(['--losses', str(tmp_path), '--entropy', f'{ENTROPY}', '--warmup', '10000']) == 0
    assert 'needed are 20,000 steps' in capsys.readouterr().out  # given by hand


@pytest.mark.parametrize(
    'content, problem',
    [
        (b'', 'has no losses'),
        (b'{"step": 1}\n', 'has no losses'),
        (b'{"step": 1, "loss": 2}\n{"step": 1, "loss": 2}\n', 'line 2: step 1 is there twice'),
        (b'{"step": 1, "loss": 2}\n{"step": 2, "lo', 'line 2: not JSON'),
        (b'{"loss": 2}\n', 'line 1: no step'),
        (b'{"step": true, "loss": 2}\n', 'True is not a step'),
        (b'{"step": 1.5, "loss": 2}\n', '1.5 is not a step'),
        (b'{"step": 1e999, "loss": 2}\n', 'inf is not a step'),
        (b'{"step": 1, "loss": "x"}\n', "'x' is not a loss"),
        (b'{"step": 1, "loss": [2]}\n', 'is not a loss'),
        (b'{"step": 1, "loss": 2, "stability/grad_ratio": "x"}\n', 'grad_ratio is not a number'),
        (b'step,loss\nstep,loss\n', "line 2: 'step' is not a step"),
        (b'1,2,3\n', '3 columns, not 2'),
        (b'1\n', '1 column, not 2'),
        (gzip.compress(b'1,2\n', mtime=0), 'is compressed; unpack it first'),
        (b'1 -2\n', "'-2' is not a loss"),
        (b'[1, 2]\n', 'is not a'),
        (b'\xff\xfe\x00', 'not a text'),
        (b'{' * 100_000, 'not JSON'),
    ],
)
def test_malformed_files_get_one_line(tmp_path, content, problem):
    path = tmp_path / 'losses'
    path.write_bytes(content)
    with pytest.raises(DataError, match='losses') as raised:
        losses.read(str(path))
    assert problem in str(raised.value) and '\n' not in str(raised.value)


def test_the_command_on_losses(tmp_path, capsys):
    path = tmp_path / 'log.csv'
    path.write_text('step,loss\n' + ''.join(f'{step},{loss}\n' for step, loss in C4_MIX.items() if step <= 9000))
    assert advise.main(['--losses', str(path), '--entropy', '7.27']) == 0
    assert f'{path}: collapsed at step 8000\n' in capsys.readouterr().out
    path.write_text('step,loss\n' + ''.join(f'{step},{loss}\n' for step, loss in C4_MIX.items() if step <= 7000))
    assert advise.main(['--losses', str(path), '--entropy', '7.27', '--warmup', '6000']) == 0
    out = capsys.readouterr().out
    assert f'{path}: not decided\n  because the losses end at step 7,000, 1,000 steps after' in out
    assert 'not tried: any step after 7,000' in out and 'stable' not in out


@pytest.mark.parametrize(
    'words, code, problem',
    [
        ([], 2, '--config FILE or --losses FILE is missing'),
        (['--losses', 'no/such'], 4, 'there is no file no/such'),
        (['--losses', '.'], 4, 'it is a folder'),
        (['--losses', 'FILE'], 2, '--entropy X is missing'),
        (['--losses', 'FILE', '--entropy', '0'], 2, '--entropy must be above 0'),
        (['--losses', 'FILE', '--entropy', 'nan'], 2, '--entropy'),
        (['--losses', 'FILE', '--entropy', '7', '--warmup', '-1'], 2, '--warmup must be at least 0'),
        (['--losses', 'FILE', '--entropy', '7', '--to', '1'], 2, '--to has no meaning with --losses'),
        (['--losses', 'FILE', '--entropy', '7', '--config.seed=1'], 2, '--config.KEY has no meaning'),
        (['--config', 'configs/quickstart.py', '--entropy', '7'], 2, '--entropy has no meaning with --config'),
        (['--config', 'configs/quickstart.py', '--to', '-1'], 2, '--to must be above 0'),
        (['--config', 'configs/quickstart.py', '--steps', '0'], 2, '--steps must be at least 1'),
        (['--config', 'configs/quickstart.py', '--ramp-steps', '1'], 2, '--ramp_steps must be at least 2'),
        (['--config', 'configs/quickstart.py', '--rates', '1e-3,x'], 2, '--rates'),
        (['--config', 'configs/quickstart.py', '--rates', '0'], 2, '--rates: a learning rate must be above 0'),
        (['--config', 'configs/quickstart.py', '--rates', '1e39'], 2, 'and at most 1e38, not 1e+39'),
        (['--config', 'configs/quickstart.py', '--rates', '1e-3,0.001'], 2, '--rates: two of the rates are equal'),
        (['--config', 'configs/quickstart.py', '--ratios', '0.5,0.51'], 2, '--ratios: two of them are 3 of 6 layers'),
        (['--config', 'configs/quickstart.py', '--steps', '5'], 2, 'a ramp, has 240 steps already'),
        (['--config', 'configs/quickstart.py', '--workdir', ''], 2, '--workdir is empty'),
        (['--config', 'configs/quickstart.py', '--workdir', 'configs'], 2, 'which is not of an adviser'),
        (['--config', 'configs/quickstart.py', '--workdir', 'README.md'], 2, '--workdir'),
        (['--config', 'configs/quickstart.py', '--ratios', ','], 2, '--ratios is empty'),
        (['--config', 'configs/quickstart.py', '--ratios', '1.5'], 2, '--ratios: 1.5 is not between 0 and 1'),
        (['--config', 'configs/quickstart.py', '--ratios=0.5', '--config.model.norm_position=pre'], 2, '--ratios has'),
        (
            ['--config', 'configs/quickstart.py', '--config.num_epochs=1', '--config.num_steps=0'],
            2,
            '--config.num_epochs=0 --config.num_steps=N',
        ),
        (['--config', 'configs/quickstart.py', '--workdir', 'gs://x'], 2, '--workdir'),
        (['--config', 'no.py'], 2, 'there is no file no.py'),
        (['--config', 'configs/quickstart.py', '--ratio', '1'], 2, '--ratio'),
    ],
)
def test_options_that_are_not_valid(tmp_path, monkeypatch, capsys, words, code, problem):
    path = tmp_path / 'losses.csv'
    path.write_text('1,2\n')
    monkeypatch.setattr(Runner, 'run', lambda *_: pytest.fail('a run was started'))
    assert advise.main([str(path) if word == 'FILE' else word for word in words]) == code
    captured = capsys.readouterr()
    assert problem in captured.err and captured.err.count('\n') == 1
