"""Masked language modelling: what is hidden, what is learned, and a BERT that trains, resumes and is analysed."""

import dataclasses
import functools
import json

import corpora
import jax
import numpy as np
import pytest

from mixln_jax import config as configs
from mixln_jax import evaluate as evaluate_command
from mixln_jax import export, main
from mixln_jax.analysis import drop, gradients, variance
from mixln_jax.data import layout
from mixln_jax.models import bert, families
from mixln_jax.program import step
from mixln_jax.runs import weights
from mixln_jax.system.errors import DataError, Stopped, UsageError
from mixln_jax.tasks import build
from mixln_jax.tasks.masked_language import MaskedLanguage
from mixln_jax.tasks.task import Context

V, T, MASK = 260, 24, 259
SIZES = dict(
    family='bert', vocab_size=V, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=2, num_positions=T
)


def task(rate=0.15, **changes):
    model = families.from_config(configs.Model(norm_position='post', **(SIZES | changes)), 'float32')
    return MaskedLanguage(model, 'pad', T, rate, MASK)


def batch(places, ids=None, real=None):
    """Rows of random bytes; the last of their tokens ends the document."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 256, (len(places), T)).astype(np.int32) if ids is None else ids
    loss_mask = np.ones(ids.shape, np.float32) if real is None else (np.arange(T) < real).astype(np.float32)
    return {'inputs': ids, 'targets': ids, 'loss_mask': loss_mask, 'place': np.array(places, np.uint32)}


def prepared(of, rows, seed=0, number=0):
    return jax.device_get(jax.jit(lambda rows: of.prepare(rows, step.step_key(seed, number), True))(rows))


class TestWhatIsHidden:
    def test_shares(self):
        """Of 100,000 tokens 15 % are chosen, of these 80 % the mask, 10 % another token, 10 % themselves."""
        rows = batch(range(4200))
        seen = prepared(task(), rows)
        chosen = seen['loss_mask'] == 1
        error = 5 * np.sqrt(0.25 / chosen.sum())  # more than 5 standard deviations of each share
        assert abs(chosen.mean() - 0.15) < 5 * np.sqrt(0.15 * 0.85 / chosen.size)
        was, now = rows['inputs'][chosen], seen['inputs'][chosen]
        assert abs((now == MASK).mean() - 0.8) < error and abs((now == was).mean() - 0.1) < error
        other = now[(now != MASK) & (now != was)]
        assert abs(len(other) / len(now) - 0.1) < error and other.min() < 10 and other.max() > 240
        np.testing.assert_array_equal(seen['inputs'][~chosen], rows['inputs'][~chosen])
        np.testing.assert_array_equal(seen['targets'], rows['inputs'])

    def test_padding_and_ends_are_not_chosen_but_ends_are_seen(self):
        seen = prepared(task(rate=1.0), batch(range(3), real=[[5], [1], [T]]))
        assert seen['loss_mask'].sum(1).tolist() == [5, 1, T]
        assert seen['token_mask'].sum(1).tolist() == [6, 2, T]  # with the token that ends the document
        assert seen['token_mask'][0].tolist() == [1] * 6 + [0] * (T - 6)

    def test_packed_documents(self):
        tokens = np.zeros((1, 9), layout.TOKEN)
        tokens['id'], tokens['end'] = [[1, 2, 0, 3, 0, 4, 5, 0, 9]], [[0, 0, 1, 0, 1, 0, 0, 1, 0]]
        rows = layout.Layout('pack', 9, 0)
        [mask] = task().position_mask(rows.batch(rows.block(tokens)))
        assert mask.tolist() == [1] * 8

    def test_it_depends_on_seed_step_and_place_alone(self):
        rows = batch(range(8))
        one = prepared(task(), rows)
        part = prepared(task(), {name: values[5:7] for name, values in rows.items()})
        for name in ('inputs', 'loss_mask'):
            np.testing.assert_array_equal(part[name], one[name][5:7])
        for changed in (dict(number=1), dict(seed=1)):
            assert (prepared(task(), rows, **changed)['loss_mask'] != one['loss_mask']).mean() > 0.1
        assert (prepared(task(), batch(range(8, 16)))['loss_mask'] != one['loss_mask']).mean() > 0.1


def test_the_loss_is_that_of_hidden_tokens():
    """Against logits of the whole vocabulary and a plain log-softmax in float64."""
    of, rows = task(rate=0.3), batch(range(4), real=[[T], [9], [3], [17]])
    params = of.model.init(jax.random.key(0))['params']
    params = jax.tree.map(lambda leaf: leaf + 0.1 * jax.random.normal(jax.random.key(leaf.size), leaf.shape), params)
    seen = prepared(of, rows)
    losses = of.losses(params, seen, Context())
    logits = np.float64(of.model.apply({'params': params}, seen)[0])
    assert logits.shape == (4, T, V)
    picked = np.take_along_axis(logits, rows['inputs'][..., None], -1)[..., 0]
    of_token = (np.log(np.exp(logits).sum(-1)) - picked) * seen['loss_mask']
    np.testing.assert_allclose(losses.per_example, of_token.sum(1), rtol=1e-5, atol=1e-5)
    assert float(losses.sum) == pytest.approx(of_token.sum(), rel=1e-5)
    assert losses.weight == seen['loss_mask'].sum() and losses.metrics['tokens'] == seen['token_mask'].sum()
    assert losses.example_weight.tolist() == seen['loss_mask'].sum(1).tolist()


def test_padding_and_other_documents_do_not_matter():
    of = task()
    params = of.model.init(jax.random.key(0))['params']
    logits = jax.jit(lambda batch: of.model.apply({'params': params}, batch)[0])
    ids = np.arange(2, 2 + T)[None].astype(np.int32)
    mask = (np.arange(T) < 7)[None].astype(np.float32)
    alone = logits({'inputs': ids[:, :7]})
    np.testing.assert_allclose(logits({'inputs': ids, 'token_mask': mask})[:, :7], alone, rtol=0, atol=1e-5)
    assert np.abs(logits({'inputs': ids})[:, :7] - alone).max() > 1e-4
    segments = np.array([[1] * 7 + [2] * (T - 7)], np.int32)
    positions = np.array([[*range(7), *range(T - 7)]], np.int32)
    packed = logits({'inputs': ids, 'segment_ids': segments, 'positions': positions})
    np.testing.assert_allclose(packed[:, :7], alone, rtol=0, atol=1e-5)
    np.testing.assert_allclose(packed[:, 7:], logits({'inputs': ids[:, 7:]}), rtol=0, atol=1e-5)


class TestNetwork:
    @pytest.mark.parametrize('norm_position', ['post', 'pre', 'mix', 'deepnorm', 'peri', 'lns'])
    def test_parameters_and_flops(self, norm_position):
        """By hand: 12 matrices and biases a layer, three tables, the transform before the head, norms with biases."""
        model = families.from_config(configs.Model(norm_position=norm_position, **SIZES))
        params = model.shapes()['params']
        D, F, L = 16, 24, 2
        norms = {'post': 2, 'pre': 2, 'mix': 2, 'deepnorm': 2, 'peri': 4, 'lns': 2}[norm_position]
        layer = 4 * (D * D + D) + D * F + F + F * D + D + norms * 2 * D
        final = 0 if norm_position in ('post', 'deepnorm') else 2 * D  # the last layer ends in a norm of its own
        whole = L * layer + (V + T + 2) * D + 2 * D + D * D + D + 2 * D + final
        assert model.num_params(params) == whole
        assert params['words']['embedding'].shape == (384, D)  # padded to a multiple of 128
        assert model.flops_per_position(params, T) == 6 * (whole - (T + 2) * D) + 12 * L * T * D

    def test_initial_weights(self):
        model = families.from_config(configs.Model(norm_position='post', **SIZES))
        params = model.init(jax.random.key(0))['params']
        table = np.asarray(params['words']['embedding'])
        assert not table[V:].any() and abs(table[:V].std() - 0.02) < 0.002
        assert abs(np.asarray(params['positions']['embedding']).std() - 0.02) < 0.003
        assert params['transform']['kernel'].std() > 0.01 and not params['transform']['bias'].any()

    @pytest.mark.parametrize(
        'changes, message',
        [
            (dict(num_kv_heads=1), 'config.model.num_kv_heads=1 has no meaning for config.model.family=bert'),
            (dict(rope_theta=5.0), 'config.model.rope_theta=5.0 has no meaning'),
            (dict(family='llama'), 'config.model.num_positions=24 has no meaning for config.model.family=llama'),
        ],
    )
    def test_keys_without_a_meaning(self, changes, message):
        with pytest.raises(UsageError, match=message):
            families.from_config(configs.Model(**(SIZES | changes)))


def recipe(corpus, **changes):
    config = configs.default()
    config.update(batch_size=8, seq_length=T, num_steps=6, log_every=1, compute_dtype='float32')
    config.model.update(norm_position='mix', post_ratio=0.5, init_std=0.1, embed_std=0.1, **SIZES)
    config.task.name = 'masked_language'
    config.data.update(source='jsonl', path=str(corpus), tokenizer='bytes')
    config.optim.update(learning_rate=1e-2)
    config.eval.update(every=3, tokens=500)
    config.checkpoint.update(every=3)
    config.analysis.update(every=3, tokens=100)
    config.update_from_flattened_dict(changes)
    return config


@pytest.fixture(scope='module')
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp('text') / 'text.jsonl'
    rng = np.random.default_rng(0)
    corpora.write(path, [' '.join(rng.choice(['one', 'two', 'three'], rng.integers(2, 9))) for _ in range(300)])
    return path


@pytest.fixture(scope='module')
def run(corpus, tmp_path_factory):
    workdir = tmp_path_factory.mktemp('run') / 'run'
    main.run(recipe(corpus), workdir)
    return workdir


def lines(workdir):
    found = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
    timed = ('perf/',)
    return [{key: value for key, value in line.items() if not key.startswith(timed)} for line in found]


class StopAtFour(main.stop.__class__):
    """A signal that comes after step 4."""

    def reached(self, step):
        if step == 4:
            self.requested = 'SIGTERM'
        return bool(self.requested)


class TestRun:
    def test_it_learns_and_says_what(self, run):
        first, *_, last = lines(run)
        assert last['train/loss'] < first['train/loss'] and last['eval/perplexity'] == pytest.approx(
            np.exp(last['eval/loss'])
        )
        assert 'eval/bits_per_byte' not in last and last['tokens'] > 6 * 8 * 5
        assert len(last['analysis/perplexity_drop']) == len(last['analysis/grad_norm']) == 2

    def test_exact_resume(self, run, corpus, tmp_path):
        with pytest.raises(Stopped):
            main.run(recipe(corpus), tmp_path / 'run', StopAtFour())
        main.run(recipe(corpus), tmp_path / 'run')
        assert lines(tmp_path / 'run') == lines(run)

    @pytest.mark.parametrize(
        'changes',
        [
            {'accumulate': 4, 'mesh.data': 2},
            *(
                pytest.param(mesh, marks=pytest.mark.slow)
                for mesh in ({'mesh.data': 8}, {'mesh.data': 2, 'mesh.fsdp': 2, 'mesh.tensor': 2})
            ),
        ],
    )
    def test_the_mesh_and_accumulation_change_no_draw(self, run, corpus, tmp_path, changes):
        changes = {'eval.every': 0, 'analysis.tokens': 0, 'checkpoint.every': 0} | changes
        main.run(recipe(corpus, **changes), tmp_path / 'run')
        for one, other in zip(lines(tmp_path / 'run'), lines(run), strict=True):
            assert one['train/loss'] == pytest.approx(other['train/loss'], rel=2e-5)
            assert one['tokens'] == other['tokens']

    def test_it_is_evaluated_as_in_training(self, run, capsys):
        assert evaluate_command.main(['--checkpoint', str(run)]) == 0
        assert f'loss {lines(run)[-1]["eval/loss"]:.4f}' in capsys.readouterr().out
        assert weights.load(run).model.head == bert.WORDS

    @pytest.mark.parametrize('job', [drop, gradients, variance])
    def test_analyses(self, run, tmp_path, job):
        words = ['--checkpoint', str(run), '--out', str(tmp_path / 'out'), '--tokens', '200', '--batch_size', '4']
        words += ['--rows', '4'] if job is gradients else []
        assert job.main(words) == 0
        [result] = json.loads((tmp_path / 'out/result.json').read_text())['results']
        assert result['tokens'] >= 200 or job is gradients

    def test_what_it_cannot_do(self, run, tmp_path, capsys):
        assert export.main(['--checkpoint', str(run), '--out', str(tmp_path / 'out')]) == 5
        assert 'of the family bert cannot be written' in capsys.readouterr().err
        pytest.importorskip('lm_eval')
        from mixln_jax.evaluation import harness

        with pytest.raises(UsageError, match='does not predict the next one'):
            harness.Harness(weights.load(run), 1)


@pytest.mark.parametrize(
    'changes, message',
    [
        ({'task.name': 'language'}, 'family=bert attends to both sides'),
        ({'model.family': 'llama', 'model.num_positions': 512}, 'masked_language needs a network that sees both sides'),
        ({'task.mask_id': 260}, 'config.task.mask_id=260 is not below config.model.vocab_size=260'),
        ({'model.vocab_size': 259}, 'mask_id=-1 is id 258, which texts use too: .* at least 260'),
        ({'compat': 'official'}, 'config.compat=official has no meaning for config.task.name=masked_language'),
        ({'seq_length': 48}, 'config.seq_length=48 is more than config.model.num_positions=24'),
        ({'task.mask_rate': 1e-9}, 'the evaluation has nothing to predict: raise config.eval.tokens'),
        ({'model.rope_factor': 4.0}, 'config.model.rope_factor=4.0 has no meaning for config.model.family=bert'),
        ({'task.mask_rate': 0.0}, 'config.task.mask_rate must be above 0'),
    ],
)
def test_bad_configurations(corpus, tmp_path, changes, message):
    with pytest.raises((UsageError, DataError), match=message):
        main.run(recipe(corpus, **changes), tmp_path / 'run')


def test_tasks_of_equal_runs_are_equal(corpus):
    config = configs.build(recipe(corpus))
    make = functools.partial(families.from_config, config.model, 'float32')
    one, other = build.from_config(config, make()), build.from_config(config, make())
    assert one == other and hash(one) == hash(other)
    assert one != dataclasses.replace(other, mask_rate=0.5)
