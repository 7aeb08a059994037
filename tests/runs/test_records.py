"""The numbers of records: TensorBoard read back, speed by a fake clock, perplexity, entropy, the closing table."""

import json
import math
import types

import events
import jax.numpy as jnp
import numpy as np
import pytest
from corpora import Texts

from mixln_jax import config as configs
from mixln_jax.data import batches, rows, tokenizers
from mixln_jax.models import families, network
from mixln_jax.runs import log
from mixln_jax.system import hardware
from mixln_jax.tasks import language
from mixln_jax.training import meter


@pytest.fixture
def seconds(monkeypatch):
    """A clock that stands still but where a test moves it on: seconds[0]."""
    now = [1000.0]
    monkeypatch.setattr(meter, 'time', types.SimpleNamespace(perf_counter=lambda: now[0]))
    return now


class TestTensorBoard:
    def write(self, folder, lines, **options):
        board = log.Metrics(folder, **options)
        for line in lines:
            board.add(line['step'], {name: value for name, value in line.items() if name != 'step'})
            board.flush()
        board.close()

    def shown(self, folder, pictures=()):
        """What TensorBoard shows, once it is seen that metrics.jsonl holds the same."""
        lines = [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()]
        scalars, images = events.read(folder)
        assert scalars == events.of_lines(lines, pictures)
        return scalars, images

    def test_tags_steps_and_values(self, tmp_path):
        lines = [
            {'step': 2, 'tokens': 7, 'train/loss': 5.5, 'layers/grad_norm': [1.5, math.nan, 2.5]},
            {'step': 4, 'tokens': 15, 'train/loss': math.inf, 'perf/mfu': None, 'layers/grad_norm': [0.5, 3.5, 4.5]},
        ]
        self.write(tmp_path, lines)
        scalars, images = self.shown(tmp_path)
        assert scalars == {
            'tokens': [(2, 7), (4, 15)],
            'train/loss': [(2, 5.5)],
            'layers/grad_norm/001': [(2, 1.5), (4, 0.5)],
            'layers/grad_norm/002': [(4, 3.5)],
            'layers/grad_norm/003': [(2, 2.5), (4, 4.5)],
        }
        assert not images

    def test_pictures(self, tmp_path):
        """As images, pixel by pixel, and never as numbers."""

        def picture(value):
            return (np.array(value)[:, None, None] + np.arange(15).reshape(1, 5, 3)).astype(np.uint8)

        lines = [{'step': step, 'map': [10 * step, 100]} for step in (1, 3)]
        self.write(tmp_path, lines, pictures={'map': picture})
        scalars, images = self.shown(tmp_path, ['map'])
        assert not scalars and list(images) == ['map'] and [step for step, _ in images['map']] == [1, 3]
        for (_, pixels), line in zip(images['map'], lines, strict=True):
            np.testing.assert_array_equal(pixels, picture(line['map']))

    # What a run had shown; steps after its checkpoint are lost, also that step's own where its line was not complete.
    @pytest.mark.parametrize('open_line, kept', [(None, [1, 2, 3]), ({'step': 3, 'loss': 30.0}, [1, 2])])
    def test_a_cut_resume_forgets_what_is_lost(self, tmp_path, open_line, kept):
        self.write(tmp_path, [{'step': step, 'loss': step + 0.5} for step in (1, 2, 3, 4, 5, 6)])
        again = log.Metrics(tmp_path, 3, open_line)
        assert [line['step'] for line in again.lines] == kept
        if open_line:
            again.add(3, {'eval': 3.25})
        again.add(4, {'loss': 40.0})
        again.flush()
        again.close()
        third = {'loss': [(3, 30.0), (4, 40.0)], 'eval': [(3, 3.25)]} if open_line else {'loss': [(3, 3.5), (4, 40.0)]}
        expected = {name: [*([(1, 1.5), (2, 2.5)] if name == 'loss' else []), *of] for name, of in third.items()}
        assert self.shown(tmp_path)[0] == expected


class Silent:
    """Signs of a run that has none."""

    def add(self, step, values):
        pass

    def line(self, values):
        return {}


class TestSpeed:
    """Two devices, two steps a line, a clock that the test moves."""

    KIND, PEAK = 'TPU v4', 275e12

    @pytest.fixture
    def meter(self, tmp_path, seconds):
        lines = log.Metrics(tmp_path)
        yield meter.Meter(
            lines,
            tmp_path,
            task=language.Language(None),
            num_steps=10,
            log_every=2,
            log_also=lambda step: False,
            tokens=100,
            positions_per_step=80,
            flops_per_position=11e12,
            devices=[types.SimpleNamespace(device_kind=self.KIND, platform='cpu')] * 2,
            first_line={'perf/compile_sec': 9.5},
            signs=Silent(),
            save_debug=None,
        )
        lines.close()

    def step(self, meter, number, tokens, loss=2.0):
        values = {
            'bad_step': 0,
            'tokens': tokens,
            'weight': tokens,
            'loss': loss,
            'grad_norm': 1.0,
            'learning_rate': 0.1,
        }
        values = {name: jnp.asarray(value, jnp.float32) for name, value in values.items()}
        values['layer_grad_norm'] = jnp.asarray([0.5, 0.25])
        meter.add(number, values, {'inputs': np.zeros((2, 40))}, None)

    def two_steps(self, meter, seconds, first, loss=2.0):
        """12 s: 3 s of waiting, of which 1 s passed while a step was running, and 4 s of hooks, left out."""
        running, done = (types.SimpleNamespace(is_ready=lambda ready=ready: ready) for ready in (False, True))
        for number, tokens, output, wait in ((first, 30, running, 1), (first + 1, 50, done, 2)):
            with meter.waiting((number - 1, {'loss': output}, None)):
                seconds[0] += wait
            seconds[0] += 2.5
            self.step(meter, number, tokens, loss)
        with meter.paused():
            seconds[0] += 4.0
        return dict(meter._metrics.open_line)

    def test_by_hand(self, meter, seconds, tmp_path, capsys):
        first = self.two_steps(meter, seconds, 1)
        speed = {name.removeprefix('perf/'): value for name, value in first.items() if name.startswith('perf/')}
        assert speed.pop('peak_memory_gb') is None  # a CPU does not say
        assert speed == {
            'tokens_per_sec': 10.0,
            'tokens_per_sec_per_device': 5.0,
            'step_time': 4.0,
            'data_wait_frac': 0.25,
            # 160 positions of 11 TFLOPs each in 8 s on two devices of 275 TFLOP/s
            'mfu': pytest.approx(160 * 11 / 8 / (2 * 275)),
            'compile_sec': 9.5,
        }
        assert (first['tokens'], first['train/tokens_per_step'], first['train/positions_per_step']) == (180, 50, 80)
        assert first['train/real_token_frac'] == 50 / 80 and first['layers/grad_norm'] == [0.5, 0.25]
        # 8 steps of 4 s are left.
        assert capsys.readouterr().out == (
            'step  2/10  20%  loss 2.0000  ppl 7.39  grad 1.000  lr 1.00e-01  5 tok/s/device  mfu 40.0%'
            '  data wait 25.0%  eta 0:00:32\n'
        )
        # The next line counts from the last one on: the pause after it is left out, and nothing was compiled.
        second = self.two_steps(meter, seconds, 3)
        assert 'perf/compile_sec' not in second
        assert (second['perf/step_time'], second['perf/tokens_per_sec'], second['tokens']) == (4.0, 10.0, 260)
        assert second['perf/data_wait_frac'] == 0.25

    def test_a_loss_whose_exponential_is_none(self, meter, seconds, tmp_path):
        self.two_steps(meter, seconds, 1, loss=800.0)
        meter.flush()
        [line] = [json.loads(line) for line in (tmp_path / 'metrics.jsonl').read_text().splitlines()]
        assert line['train/loss'] == 800 and line['train/perplexity'] is None

    def test_kinds_of_devices(self):
        assert hardware.mfu(275e12, 'TPU v4', 4) == 0.25 and hardware.mfu(1e12, 'cpu', 1) is None


def test_perplexity():
    assert language.perplexity(0.0) == 1 and language.perplexity(30) == pytest.approx(1.0686474581524463e13, rel=1e-14)
    assert language.perplexity(700) == pytest.approx(1.0142320547350045e304, rel=1e-12)
    assert language.perplexity(800) == math.inf
    assert language.Language(None).summary({'sum': 60.0, 'weight': 2})['perplexity'] == pytest.approx(
        1.0686474581524463e13, rel=1e-14
    )


def test_flops_of_a_position():
    """1000 weights without a table of 100; 3 layers, rows of 7, width 5."""
    assert network.flops_per_position(1100, 100, 3, 5, 7) == 6 * 1000 + 6 * 3 * 7 * 5


def test_entropy_of_tokens_is_of_those_that_count():
    """Three padded rows, each an epoch long: what is predicted are a b </s>, b </s> and </s>, never padding."""
    texts = rows.Documents(Texts(['xab', 'yb', 'z']), tokenizers.Bytes(), 8)
    model = families.from_config(configs.Model(vocab_size=259, hidden_size=8, num_heads=2))
    training = batches.training(texts, seed=0, batch_size=3)
    found = language.Language(model).baseline(map(training.__getitem__, range(1000)))
    # a: 1 in 6, b: 2 in 6, </s>: 3 in 6; of 6,000 tokens, whose correction for three kinds is 2 / 12,000.
    entropy = math.log(6) / 6 + math.log(3) / 3 + math.log(2) / 2
    assert found == pytest.approx(entropy + 2 / 12_000, rel=1e-12)


class TestClosingTable:
    LINE = {
        'step': 9, 'eval/loss': 3.25, 'eval/perplexity': 25.790339917193062, 'eval/bits_per_byte': None,
        'layers/grad_norm': [0.5, 2.0, 0.25], 'analysis/angular_distance': [0.4, None, 0.05],
    }  # fmt: skip

    def test_by_hand(self):
        """Bars of 14 blocks at most, in eighths of one."""
        assert log.summary_table(self.LINE, ('post', 'pre', 'lns')).splitlines() == [
            'eval loss 3.25   perplexity 25.79',
            'layer  placement  gradient norm            angular distance across it',
            '    1  post         0.5000 ███▌             0.4000 ██████████████',
            '    2  pre          2.0000 ██████████████  - ',
            '    3  lns          0.2500 █▊               0.0500 █▊',
        ]

    def test_without_analyses(self):
        line = {name: value for name, value in self.LINE.items() if 'analysis' not in name}
        rows = log.summary_table(line, ('post', 'pre', 'lns')).splitlines()
        assert rows[3] == '    2  pre          2.0000 ██████████████  - '
