"""Ramps (+prores): every placement at a step against the float64 reference, the grammar, what a run's step reaches."""

import dataclasses
import functools
import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from builders import SIZES, assert_gradients, make, text, to_jax
from corpora import write
from hf_folders import edit, logits, network
from short_runs import WORDS, StopAtTwo, lines_of, recipe

from mixln_jax import config as configs
from mixln_jax import export, main, replay
from mixln_jax.analysis import angular, variance
from mixln_jax.data import batches
from mixln_jax.data import rows as data_rows
from mixln_jax.distributed import mesh as meshes
from mixln_jax.evaluation.loop import evaluate_run
from mixln_jax.models import placements, transformer
from mixln_jax.models.hf import llama as hf_llama
from mixln_jax.program.program import Program
from mixln_jax.runs import start_weights, weights
from mixln_jax.system.errors import CheckpointError, Stopped, UsageError
from mixln_jax.tasks.language import Language
from mixln_jax.tasks.task import Context
from mixln_jax.training import start

T, MIDDLE = 10, 17  # of three layers the first is ramped up, the second has 0.85, the third 0.567
HEADS = dict(heads=4, kv_heads=2)
LISTS = {f'{name}+prores': (f'{name}+prores',) * 3 for name in placements.PLACEMENTS} | {
    'mix+prores': ('post+prores', 'pre+prores', 'pre+prores'),
    'post+prores,pre*2': ('post+prores', 'pre', 'pre'),
    'hybridnorm_star+prores': ('hybridnorm_first+prores', 'hybridnorm+prores', 'hybridnorm+prores'),
}


def losses(model, params, batch, step):
    found = Language(model).losses(params, batch, Context(step=step))
    return found.sum / found.weight


@pytest.mark.parametrize('norm_position', LISTS)
def test_forward_and_gradient_equal_the_float64_reference(norm_position):
    rng, names = np.random.default_rng(7), LISTS[norm_position]
    weights, batch = reference.init(rng, names, **SIZES), text(rng)
    model = make(norm_position, ramp_steps=T)
    assert model.norm_position == names and len(model.shapes()['params']['layers']) == len({*names})
    arguments = batch['inputs'], batch['targets'], batch['loss_mask'], names

    @jax.jit
    def ours(params, step):
        logits, out = model.apply({'params': params}, batch['inputs'], capture=True, step=step)
        return out['hidden'], logits, jax.value_and_grad(lambda p: losses(model, p, batch, step))(params)

    def check(step, expected_step):
        expected = reference.forward(weights, batch['inputs'], names, ramp=(T, expected_step), **HEADS)
        hidden, logits, (loss, grads) = ours(to_jax(model, weights), jnp.int32(step))
        np.testing.assert_allclose(hidden, expected[0], rtol=0, atol=2e-5)
        np.testing.assert_allclose(logits, expected[1], rtol=0, atol=2e-5)
        of_loss = reference.loss(weights, *arguments, ramp=(T, expected_step), **HEADS)
        np.testing.assert_allclose(loss, of_loss, rtol=0, atol=2e-6)
        if step == MIDDLE:
            expected = reference.gradients(weights, *arguments, ramp=(T, expected_step), **HEADS)
            assert_gradients(grads, to_jax(model, expected), 1e-5)

    check(MIDDLE, MIDDLE)
    check(100, 10**9)
    for step, others in ((MIDDLE, MIDDLE + 1), (MIDDLE, 10**9), (0, 1)):  # the comparison must be able to fail
        if not (norm_position == 'post+prores,pre*2' and step == MIDDLE):  # whose ramp is over
            with pytest.raises(AssertionError):
                check(step, others)
    check(0, 0)


def test_a_done_ramp_is_no_ramp():
    """Without a step, and without one the weights' own, the program is that of the placement alone."""

    def text_of(model):
        params = jax.eval_shape(model.init, jax.random.key(0))['params']
        ids = jax.ShapeDtypeStruct((2, 5), jnp.int32)
        return jax.jit(lambda params, ids: model.apply({'params': params}, ids)[0]).lower(params, ids).as_text()

    plain, ramped = make('mix'), make('mix+prores')
    assert text_of(ramped) == text_of(plain) != text_of(ramped.clone(trained_steps=3))


def test_the_own_step_of_weights_and_one_that_is_traced_give_the_same_bits():
    rng = np.random.default_rng(1)
    ids = rng.integers(0, 11, (2, 5))
    model = make('sandwich+prores', ramp_steps=7, ramp_offset=2)
    params = to_jax(model, reference.init(rng, model.norm_position, **SIZES))
    apply = jax.jit(lambda model, params, step: model.apply({'params': params}, ids, step=step)[0], static_argnums=0)
    for step in range(0, 21):
        own = apply(model.clone(trained_steps=step), params, None)
        np.testing.assert_array_equal(own, apply(model, params, jnp.int32(step)))
        assert np.array_equal(own, apply(model, params, None)) == (step + 2 >= 21)
        factors = placements.PLACEMENTS['pre+prores'].mlp.ramp_factors((1, 2, 3), 7, step + 2)['ramp']
        np.testing.assert_allclose(factors, [reference.prores(l, 7, step + 2) for l in (1, 2, 3)], rtol=1e-6)
        assert factors.dtype == np.float32 and np.array_equal(factors == 1, np.array([7, 14, 21]) <= step + 2)


@pytest.mark.parametrize(
    'value, names',
    [
        ('pre+prores', 'pre+prores*4'),
        ('mix+prores', 'post+prores,pre+prores*3'),
        ('pre_post+prores', 'pre+prores*4'),
        ('hybridnorm_star+prores', 'hybridnorm_first+prores,hybridnorm+prores*3'),
        (' post+prores * 2, pre,lns+prores', 'post+prores,post+prores,pre,lns+prores'),
    ],
)
def test_names(value, names):
    found = placements.resolve(value, 4)
    assert found == placements.resolve(names, 4) and placements.resolve(','.join(found), 4) == found
    assert all(placements.has_ramp([name]) == name.endswith('+prores') for name in found)


@pytest.mark.parametrize(
    'value, words',
    [
        (
            'mix+proress',
            r"^config.model.norm_position='mix\+proress': \+proress after 'mix' is not one of \+prores,",
        ),
        ('+prores', r"^config.model.norm_position='\+prores': '\+prores' is not a name or name\*count$"),
        ('pre+prores+prores', r"^config.model.norm_position='pre\+prores\+prores': 'pre' has \+prores twice$"),
        ('pre*2,lns+proress', r"\+proress after 'lns' is not one of \+prores, did you mean prores"),
        ('pre*2,lns+prores+prores', "'lns' has .prores twice"),
        ('pre+', r"nothing follows the \+ after 'pre', where \+prores is expected"),
        ('mix+prores*3', "'mix' is a scheme"),
        ('pree+prores', "'pree' is not one of .*did you mean pre"),
        ('pre*3+prores', 'is not a name'),
        ('prores', r'\+prores goes after a name, as in pre\+prores'),
    ],
)
def test_bad_names(value, words):
    with pytest.raises(UsageError, match=words) as found:
        placements.resolve(value, 3)
    assert '\n' not in str(found.value)


def test_names_of_the_authors_code():
    assert placements.official('deepnorm+prores') == 'deepnorm_official+prores'
    assert [placements.official(name) for name in ('deepnorm', 'pre', 'pre+prores')] == [
        'deepnorm_official', 'pre', 'pre+prores',
    ]  # fmt: skip


def test_warnings():
    names = ('post+prores', 'pre+prores', 'pre')
    [warning] = placements.warnings(names, 'auto', 0.1, num_steps=1999, ramp_steps=1000)
    assert warning.startswith('the ramp of layer 2 takes 2,000 steps, the run 1,999')
    assert not list(placements.warnings(names, 'auto', 0.1, num_steps=2000, ramp_steps=1000))
    assert not list(placements.warnings(('post', 'pre'), 'auto', 0.1, num_steps=1, ramp_steps=1000))
    assert 'scaled' in next(placements.warnings(('lns+prores',), 'scaled', 0.1))


def test_the_theory_is_about_layers_whose_ramp_is_done():
    names = ('pre', 'pre+prores', 'lns+prores', 'post+prores')
    factors = placements.growth_factors(names, (1, 2, 3, 4), 4, 10, 25)
    np.testing.assert_allclose(factors, [1, 1, np.nan, np.nan])
    for step in (30, None):
        np.testing.assert_allclose(placements.growth_factors(names, (1, 2, 3, 4), 4, 10, step), [1, 1, 3**-0.5, np.nan])


@pytest.mark.parametrize('norm_position', ['mix+prores', pytest.param('admin+prores', marks=pytest.mark.slow)])
def test_train_and_evaluation_step(norm_position):
    """The update after t has the loss that the evaluation finds at t, with offset and micro-batches; on a mesh too."""
    rng = np.random.default_rng(0)
    batch = text(rng, B=8, T=6)
    batch = {name: values.astype(np.float32 if name == 'loss_mask' else np.int32) for name, values in batch.items()}
    batch |= batches.marks(np.arange(8), np.ones(8, bool))
    sizes = make(norm_position, num_layers=4, ramp_steps=2, ramp_offset=1).config
    config = configs.Config(
        batch_size=8, seq_length=6, num_steps=8, accumulate=2, compute_dtype='float32', device='cpu', model=sizes,
    )  # fmt: skip
    found = []
    for shape in ((1, 1, 1), (2, 2, 2)):
        program = Program(config, meshes.make_mesh(configs.Mesh(*shape), jax.devices('cpu')))
        placed = jax.device_put(batch, meshes.batch_sharding(program.mesh))
        train_step, eval_step = program.compile()
        state = program.init(jax.random.key(0))
        if program.model.measured():
            state = program.measure_factors(state, placed)
            assert np.all(state.params['layers']['segment_0']['mlp_residual_scale'] > 0)
        of_train, of_eval = [], []
        for _ in range(4):
            half = {name: jax.device_put(batch[name][::2], placed[name].sharding) for name in batch}
            other = {name: jax.device_put(batch[name][1::2], placed[name].sharding) for name in batch}
            sums = [eval_step(state.params, part, state.step) for part in (half, other)]
            of_eval.append(sum(part['sum'] for part in sums) / sum(part['weight'] for part in sums))
            state, metrics = train_step(state, placed)
            of_train.append(float(metrics['loss']))
        np.testing.assert_allclose(of_eval, of_train, rtol=1e-6)
        found.append(of_train)
    np.testing.assert_allclose(found[1], found[0], rtol=1e-5)


def test_other_networks_take_no_step():
    for name, needed in (('mix', None), ('mix+prores', 5), ('post+prores,pre*2', 5)):
        assert transformer.needed_step(make(name), 5) == needed


def test_steps_and_offset_are_checked_together():
    values = {'num_steps': 2**31 - 5, 'model': dataclasses.asdict(configs.Model(ramp_offset=5))}
    with pytest.raises(UsageError, match='config.num_steps plus config.model.ramp_offset must be below'):
        configs.build(values)


@pytest.fixture(scope='module')
def corpus(tmp_path_factory):
    rng, path = np.random.default_rng(0), tmp_path_factory.mktemp('data') / 'train.json.gz'
    return write(path, [' '.join(rng.choice(WORDS, rng.integers(2, 12))) for _ in range(120)])


def of_run(corpus, **changes):
    """A recipe of four steps, in which the third layer would be ramped up after six."""
    keys = {'model.norm_position': 'mix+prores', 'model.ramp_steps': 2, 'eval.every': 1, 'checkpoint.every': 1}
    keys['model.init_std'] = 0.3  # so that branches matter
    return recipe(corpus, **keys | {'checkpoint.keep': 5, 'analysis.tokens': 100, 'analysis.every': 2} | changes)


@pytest.fixture(scope='module')
def finished(corpus, tmp_path_factory):
    workdir = tmp_path_factory.mktemp('runs') / 'whole'
    main.run(of_run(corpus), workdir)
    return workdir


def evaluated(path):
    return evaluate_run(weights.load(path), num_tokens=100)['eval/loss']


class StopAtOne(main.stop.__class__):
    """A signal that comes in step 1."""

    def reached(self, step):
        self.requested = 'SIGTERM' if step == 1 else None
        return step == 1


class TestRuns:
    """Where a ramp stands in a run, after it, and in a run that begins with its weights."""

    def test_checkpoints_are_evaluated_at_their_step(self, finished):
        """As the run itself did, and not as another step would have it."""
        assert [weights.load(finished / f'checkpoints/{step}').model.trained_steps for step in (1, 4)] == [1, 4]
        lines = {line['step']: line for line in lines_of(finished)}
        for step in (1, 2, 4):
            loss = evaluated(finished / f'checkpoints/{step}')
            assert loss == pytest.approx(lines[step]['eval/loss'], rel=1e-6)
        found = weights.load(finished / 'checkpoints/2')
        done = dataclasses.replace(found, step=10**6)
        assert abs(evaluate_run(done, num_tokens=100)['eval/loss'] - lines[2]['eval/loss']) > 1e-4

    def test_analyses_during_training_are_those_of_the_checkpoint(self, finished):
        [line] = [line for line in lines_of(finished) if line['step'] == 2]
        assert variance.main(['--checkpoint', str(finished / 'checkpoints/2'), '--tokens', '100']) == 0
        [result] = json.loads((finished / 'analysis/variance/result.json').read_text())['results']
        np.testing.assert_allclose(result['variance']['mean'][1:], line['analysis/variance'], rtol=1e-5)
        for name in ('attention', 'mlp'):
            found = result['contribution'][name]['mean']
            np.testing.assert_allclose(found, line[f'analysis/contribution_{name}'], rtol=1e-5)
        assert all(value is None for value in result['theory'])  # no Pre-LN layer is ramped up

    def test_at_the_start_no_layer_does_anything(self, finished):
        words = ['--checkpoint', str(finished), '--steps', 'init', '--tokens', '100']
        assert angular.main(words) == 0 and variance.main(words) == 0
        [result] = json.loads((finished / 'analysis/angular/result.json').read_text())['results']
        np.testing.assert_allclose(result['distance']['mean'], np.zeros((4, 4)), atol=1e-3)
        [result] = json.loads((finished / 'analysis/variance/result.json').read_text())['results']
        assert result['contribution']['mlp']['mean'] == result['contribution']['attention']['mean'] == [0, 0, 0]

    def test_resumes_exactly_in_the_middle(self, corpus, finished, tmp_path):
        with pytest.raises(Stopped):
            main.run(of_run(corpus), tmp_path, stop=StopAtTwo())
        main.run(of_run(corpus), tmp_path)
        assert lines_of(tmp_path) == lines_of(finished)
        one, other = (weights.load(path).params for path in (tmp_path, finished))
        jax.tree.map(np.testing.assert_array_equal, one, other)

    @pytest.mark.slow
    def test_the_ramp_of_given_weights_goes_on(self, corpus, finished, tmp_path, capsys):
        """Their evaluation is that of the new run before its first step, and so on from run to run; a rerun resumes."""
        source, offsets = finished / 'checkpoints/3', []
        for name, num_steps in (('a', 2), ('b', 3)):
            before = weights.load(source)
            of = functools.partial(of_run, corpus, init_from=str(source), num_steps=num_steps)
            if name == 'a':
                with pytest.raises(Stopped):
                    main.run(of(**{'optim.warmup_ratio': 0.5}), tmp_path / name, stop=StopAtOne())
                main.run(of(**{'optim.warmup_ratio': 0.5}), tmp_path / name)
            else:
                main.run(of(), tmp_path / name)
            lines = lines_of(tmp_path / name)
            assert [line['step'] for line in lines] == [*range(1, num_steps + 1)]
            config = configs.read(tmp_path / name / 'config.json')
            offsets.append(config.model.ramp_offset)
            rows = data_rows.open_rows_of_run(finished, before.config, 'train', before.tokenizer)
            batch = batches.training(rows, seed=0, batch_size=8)[0]
            found = Language(before.model).losses(before.params, batch)
            assert lines[0]['train/loss'] == pytest.approx(float(found.sum / found.weight), rel=1e-6)
            others = Language(before.model.clone(trained_steps=None)).losses(before.params, batch)
            assert abs(others.sum - found.sum) / found.weight > 1e-4
            source = tmp_path / name
        assert offsets == [3, 5]
        main.run(of(), tmp_path / 'b')
        assert 'already finished' in capsys.readouterr().out
        with pytest.raises(UsageError, match=r'model.ramp_offset \(was 5, is 0\)'):
            main.run(of(**{'model.ramp_offset': 0}), tmp_path / 'b')
        assert weights.load(tmp_path / 'b').model.config.ramp_offset == 5
        done = of_run(corpus, init_from=str(tmp_path / 'b'))
        assert start_weights.ramp_offset(configs.build(done)) == 6  # 5 + 3, but after 6 it is done

    def test_other_ramps_are_refused(self, corpus, finished, tmp_path):
        for change, words in (
            ({'model.ramp_steps': 3}, r'its network has ramp_steps 2, config.model.ramp_steps is 3'),
            ({'model.norm_position': 'mix'}, r'its network has norm_position post\+prores\*1,pre\+prores\*2'),
        ):
            with pytest.raises(UsageError, match=words):
                main.run(of_run(corpus, init_from=str(finished), **change), tmp_path / 'run')

    def test_networks_without_a_ramp_have_no_offset(self, corpus, tmp_path):
        config = configs.build(recipe(corpus, init_from='hf:/nowhere'))
        assert start.with_ramp_offset(config) is config

    def test_export_in_the_middle(self, corpus, finished, tmp_path):
        """Bit for bit, also without a layer; a run that begins with the folder goes on with the ramp."""
        out, cut = tmp_path / 'out', tmp_path / 'cut'
        assert export.main(['--checkpoint', str(finished), '--out', str(out)]) == 0
        assert export.main(['--checkpoint', str(finished), '--out', str(cut), '--remove_layers', '2']) == 0
        content = json.loads((out / 'config.json').read_text())
        assert [content[name] for name in ('model_type', 'ramp_steps', 'ramp_step')] == ['mixln', 2, 4]
        ramps = [layer['mlp'].get('ramp', 1) for layer in content['placements']]
        assert ramps == [1, 1, pytest.approx(2 / 3)]
        pruned = json.loads((cut / 'config.json').read_text())['placements']
        assert pruned == [content['placements'][at] for at in (0, 2)]
        edit(out, ramp_step=3)
        with pytest.raises(CheckpointError, match='placements is not that of norm_position'):
            weights.load(out)
        edit(out, ramp_step=4)
        for changes, offset in (({}, 4), ({'ramp_step': -1}, None), ({'ramp_step': None, 'placements': None}, 6)):
            edit(out, **changes)
            config = configs.build(of_run(corpus, init_from=f'hf:{out}'))
            if offset is None:
                with pytest.raises(CheckpointError, match='ramp_step=-1 is not a number of steps'):
                    start_weights.ramp_offset(config)
            else:
                assert start_weights.ramp_offset(config) == offset

    def test_a_bad_step_is_replayed_at_its_own(self, finished, tmp_path, capsys):
        """The batch of step 3, with the weights of step 2, has the loss that training had."""
        found = weights.load(finished / 'checkpoints/2')
        rows = data_rows.open_rows_of_run(finished, found.config, 'train', found.tokenizer)
        batch = batches.training(rows, seed=0, batch_size=8)[2]
        shutil.copytree(finished / 'checkpoints/2', tmp_path / 'debug/checkpoints/2')
        np.savez(tmp_path / 'debug/batch_3.npz', **batch)
        replay.replay(tmp_path, None)
        said = re.search(r'mean ([\d.]+)', capsys.readouterr().out)[1]
        losses = Language(found.model).losses(found.params, batch).per_example / batch['loss_mask'].sum(-1)
        assert float(said) == pytest.approx(float(losses.mean()), abs=1e-4)
        done = Language(found.model.clone(trained_steps=None)).losses(found.params, batch)
        assert abs(float((done.per_example / batch['loss_mask'].sum(-1)).mean()) - float(said)) > 1e-3


@pytest.mark.parametrize('norm_position', LISTS)
def test_folders_in_mid_ramp_are_bitwise_the_same(tmp_path, norm_position):
    model, params = network(norm_position, ramp_steps=T, ramp_offset=5)
    model = model.clone(trained_steps=MIDDLE - 5)
    hf_llama.save(tmp_path / 'out', model, params)
    again, found = hf_llama.load(tmp_path / 'out')
    jax.tree.map(np.testing.assert_array_equal, found, params)
    assert (again.norm_position, again.trained_steps) == (model.norm_position, MIDDLE)
    np.testing.assert_array_equal(logits(again, found), logits(model, params))
    if norm_position != 'post+prores,pre*2':
        assert not np.array_equal(logits(model, params), logits(model.clone(trained_steps=None), params))


@pytest.mark.parametrize('steps', [None, 3 * T])
def test_ramped_up_pre_ln_is_stock_llama(tmp_path, steps):
    model, params = network('pre+prores', ramp_steps=T)
    hf_llama.save(tmp_path / 'out', model.clone(trained_steps=steps), params)
    config = json.loads((tmp_path / 'out/config.json').read_text())
    assert (config['model_type'], config.get('ramp_step')) == ('llama', steps)
    assert not {'placements', 'auto_map'} & {*config}
    again, found = hf_llama.load(tmp_path / 'out')
    assert again.norm_position == ('pre+prores',) * 3
    np.testing.assert_array_equal(logits(again, found), logits(model, params))
    np.testing.assert_array_equal(logits(again, found), logits(network('pre')[0], params))
