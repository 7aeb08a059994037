"""Where a run begins: its own checkpoint, another run's state, given weights, or chance, in this order."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
from corpora import write
from short_runs import SIZES, WORDS, StopAtTwo, lines_of, recipe

from mixln_jax import config as configs
from mixln_jax import main
from mixln_jax.models import families, placements
from mixln_jax.models.hf import llama as hf_llama
from mixln_jax.runs import start_weights, weights
from mixln_jax.system.errors import CheckpointError, Stopped, UsageError
from mixln_jax.training import loop

BERT = {'model.family': 'bert', 'task.name': 'masked_language', 'model.vocab_size': 260}
GOLDEN = pathlib.Path(__file__).parents[1] / 'golden'


@pytest.fixture(scope='module')
def corpus(tmp_path_factory):
    rng, path = np.random.default_rng(0), tmp_path_factory.mktemp('data') / 'train.json.gz'
    return write(path, [' '.join(rng.choice(WORDS, rng.integers(2, 12))) for _ in range(120)])


@pytest.fixture(scope='module')
def finished(corpus, tmp_path_factory):
    """A run from chance, with its checkpoint of step 2."""
    workdir = tmp_path_factory.mktemp('runs') / 'whole'
    main.run(recipe(corpus), workdir)
    return workdir


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """An exported Mix-LN network of other weights than any seed here gives."""
    path = tmp_path_factory.mktemp('exported') / 'folder'
    model = families.from_config(configs.Model(norm_position='mix', **SIZES))
    hf_llama.save(path, model, jax.jit(model.init)(jax.random.key(77))['params'])
    return path


@pytest.fixture
def begun(monkeypatch):
    """What runs begin with: [(first step, weights)]."""
    found, fit = [], loop.fit

    def watched(state, *others, first, **options):
        found.append((first, jax.device_get(state.params)))
        return fit(state, *others, first=first, **options)

    monkeypatch.setattr(loop, 'fit', watched)
    return found


def equal(one, other):
    return all(jax.tree.leaves(jax.tree.map(np.array_equal, one, other)))


class TestInitFrom:
    @pytest.mark.parametrize(
        'mesh',
        [{}, pytest.param({'mesh.fsdp': 2, 'mesh.tensor': 2}, marks=pytest.mark.slow)],
        ids=['one', 'fsdp and tensor'],
    )
    def test_a_hugging_face_folder(self, corpus, folder, tmp_path, begun, mesh):
        main.run(recipe(corpus, init_from=f'hf:{folder}', **mesh), tmp_path)
        [(first, params)] = begun
        assert first == 1 and equal(params, hf_llama.load(folder)[1])
        lines = lines_of(tmp_path)
        assert [line['step'] for line in lines] == [1, 2, 3, 4] and lines[-1]['train/loss'] < lines[0]['train/loss']
        assert json.loads((tmp_path / 'config.json').read_text())['init_from'] == f'hf:{folder}'

    @pytest.mark.parametrize('path, step', [('', 4), ('checkpoints/2', 2)])
    def test_a_run_of_ours_gives_its_weights_alone(self, corpus, finished, tmp_path, begun, path, step):
        main.run(recipe(corpus, init_from=str(finished / path), num_steps=2), tmp_path)
        [(first, params)] = begun
        assert first == 1 and equal(params, weights.load(finished / f'checkpoints/{step}').params)
        assert lines_of(tmp_path)[0]['tokens'] == lines_of(finished)[0]['tokens']  # the data start anew

    def test_weights_in_bfloat16(self, corpus, folder, tmp_path, begun):
        main.run(recipe(corpus, init_from=f'hf:{folder}', param_dtype='bfloat16', num_steps=1), tmp_path)
        [(_, params)] = begun
        rounded = jax.tree.map(lambda leaf: np.asarray(leaf).astype('bfloat16'), hf_llama.load(folder)[1])
        assert equal(params, rounded) and params['norm']['scale'].dtype == 'bfloat16'

    def test_an_own_checkpoint_comes_first(self, corpus, finished, folder, tmp_path, begun):
        shutil.copytree(finished, tmp_path / 'run', ignore=shutil.ignore_patterns('4'))
        (tmp_path / 'run/metrics.jsonl').write_text((finished / 'metrics.jsonl').read_text())
        main.run(recipe(corpus, init_from='hf:/nowhere', resume_from='/nowhere'), tmp_path / 'run')
        assert [first for first, _ in begun] == [3]
        assert lines_of(tmp_path / 'run') == lines_of(finished)

    @pytest.mark.parametrize('name', ['pre', 'post', 'mix', 'sandwich', 'lns', 'deepnorm_official'])
    def test_golden_folders(self, name):
        """The authors' folders do not say their placement: the run's is taken."""
        placement = (
            name if name in (*placements.PLACEMENTS, *placements.SCHEMES) else 'deepnorm'
        )  # which has the same tensors
        sizes = dict(vocab_size=128, hidden_size=32, intermediate_size=88, num_heads=4, num_layers=8)
        model = families.from_config(configs.Model(norm_position=placement, **sizes))
        found = start_weights.initial(f'hf:{GOLDEN / name}', model)
        assert equal(found, hf_llama.load(GOLDEN / name, placement)[1])
        assert jax.tree.map(np.shape, found) == jax.tree.map(lambda leaf: leaf.shape, model.shapes()['params'])

    @pytest.mark.parametrize(
        'changes, message',
        [
            (
                {'norm_position': 'pre'},
                r'its network has norm_position post\*1,pre\*2, config.model.norm_position is pre',
            ),
            ({'hidden_size': 32}, 'its network has hidden_size 16, config.model.hidden_size is 32'),
            ({'num_layers': 4}, 'its network has num_layers 3, config.model.num_layers is 4'),
            ({'num_kv_heads': 1}, 'its network has num_kv_heads 2, config.model.num_kv_heads is 1'),
            ({'head_dim': 16}, 'its network has head_dim 8, config.model.head_dim is 16'),
            ({'attention_bias': True}, 'its network has attention_bias False, config.model.attention_bias is True'),
            ({'tie_word_embeddings': True}, 'its network has tie_word_embeddings False, .* is True'),
            ({'rope_type': 'llama3'}, 'its network has rope_type default, config.model.rope_type is llama3'),
            ({'rope_theta': 5e5}, 'its network has rope_theta 10000.0, config.model.rope_theta is 500000.0'),
            ({'vocab_size': 258}, 'its network has vocab_size 259, config.model.vocab_size is 258'),
            ({'vocab_size': 259 + 1025}, 'its network has vocab_size 259, config.model.vocab_size is 1284'),
        ],
    )
    def test_another_network_is_named(self, finished, folder, changes, message):
        model = families.from_config(configs.Model(**(dict(norm_position='mix', **SIZES) | changes)))
        for where in (f'hf:{folder}', str(finished)):
            with pytest.raises(UsageError, match=f'^config.init_from={where}: {message}'):
                start_weights.initial(where, model)

    def test_another_tokenizer_is_warned_of(self, finished, capsys):
        model = families.from_config(configs.Model(norm_position='mix', **SIZES))
        own = weights.load(finished).tokenizer.fingerprint
        for tokenizer, warned in ((None, False), (own, False), ('another', True)):
            start_weights.initial(str(finished), model, tokenizer)
            said = capsys.readouterr().err
            assert (f'another tokenizer: that in {finished}/tokenizer' in said) == warned and said.count('\n') == warned

    def test_new_tokens(self, finished, folder, capsys):
        """Each begins with the mean of the vectors of the old ones; what pads the tables stays 0."""
        model = families.from_config(configs.Model(norm_position='mix', **(SIZES | {'vocab_size': 261})))
        for where in (folder, finished):
            old = weights.load(where).params
            found = start_weights.initial(f'hf:{where}' if where == folder else str(where), model)
            assert '2 new tokens begin with the mean of the 259 vectors' in capsys.readouterr().out
            assert equal(found['layers'], old['layers'])
            for table, known in (
                (found['embed']['embedding'], old['embed']['embedding']),
                (found['head']['kernel'].T, old['head']['kernel'].T),
            ):
                known = np.float64(known)[:259]
                np.testing.assert_array_equal(table[:259], known)
                np.testing.assert_allclose(table[259:261], np.tile(known.mean(0), (2, 1)), rtol=0, atol=1e-7)
                assert not table[261:].any() and np.abs(table[259]).max() > 1e-4

    def test_removed_layers_have_other_constants(self, tmp_path):
        model = families.from_config(configs.Model(norm_position='lns', **SIZES))
        params = jax.jit(model.init)(jax.random.key(0))['params']
        hf_llama.save(tmp_path / 'cut', model.clone(layer_index=(1, 3, 4), depth=4), params)
        with pytest.raises(UsageError, match='its layer 2 is layer 3 of 4, with other constants'):
            start_weights.initial(f'hf:{tmp_path / "cut"}', model)
        hf_llama.save(tmp_path / 'whole', model, params)
        assert equal(start_weights.initial(f'hf:{tmp_path / "whole"}', model), params)

    @pytest.mark.parametrize(
        'where, kind, message',
        [
            ('hf:nowhere', UsageError, 'nowhere/config.json does not exist'),
            ('nowhere', UsageError, 'nowhere is not a folder'),
            (str(GOLDEN / 'pre'), UsageError, 'not a run of ours; a Hugging Face folder is hf:/'),
            (f'hf:{GOLDEN.parents[1]}', UsageError, 'config.json does not exist'),
            (f'hf:{GOLDEN}/pre', CheckpointError, 'no tensor model.layers.0.post_feedforward_layernorm.weight'),
        ],
    )
    def test_what_is_not_there(self, where, kind, message):
        sizes = dict(vocab_size=128, hidden_size=32, intermediate_size=88, num_heads=4, num_layers=8)
        model = families.from_config(configs.Model(norm_position='mix', **sizes))
        with pytest.raises(kind, match=f'^config.init_from={where}: .*{message}'):
            start_weights.initial(where, model)


class TestFamilies:
    """Weights of one family for a run of the other."""

    def test_a_bert_of_hugging_face_starts_no_run(self, corpus, tmp_path):
        (tmp_path / 'bert').mkdir()
        (tmp_path / 'bert/config.json').write_text('{"model_type": "bert"}')
        where = f'hf:{tmp_path / "bert"}'
        for family, changes in (('llama', {}), ('llama', {'model.norm_position': 'pre+prores'}), ('bert', BERT)):
            message = f'^config.init_from={where}: .*/bert is a BERT, config.model.family is {family}: only'
            with pytest.raises(UsageError, match=message) as error:
                main.run(recipe(corpus, init_from=where, **changes), tmp_path / 'run')
            assert '\n' not in str(error.value)

    def test_a_llama_for_a_bert(self, corpus, finished, folder, tmp_path):
        for where in (f'hf:{folder}', str(finished)):
            message = f'^config.init_from={where}: its network has family llama, config.model.family is bert$'
            with pytest.raises(UsageError, match=message):
                main.run(recipe(corpus, init_from=where, **BERT), tmp_path / 'run')


class TestResumeFrom:
    @pytest.mark.parametrize('mesh', [{}, {'mesh.fsdp': 2}], ids=['one', 'fsdp'])
    def test_goes_on_in_another_folder(self, corpus, finished, folder, tmp_path, begun, mesh):
        """Comes before init_from; bit for bit on the same mesh."""
        before = sorted(finished.rglob('*'))
        changes = {'resume_from': str(finished / 'checkpoints/2'), 'init_from': f'hf:{folder}', **mesh}
        main.run(recipe(corpus, **changes), tmp_path)
        assert [first for first, _ in begun] == [3]
        lines, theirs = lines_of(tmp_path), lines_of(finished)[2:]
        assert [line['step'] for line in lines] == [3, 4] and sorted(finished.rglob('*')) == before
        if not mesh:
            assert lines == theirs
            assert equal(*(weights.load(run / 'checkpoints/4').params for run in (tmp_path, finished)))
        np.testing.assert_allclose(lines[-1]['train/loss'], theirs[-1]['train/loss'], rtol=1e-5)

    def test_a_run_that_a_signal_ended(self, corpus, finished, tmp_path, begun):
        """Its newest checkpoint, also where the evaluation of that step is still to come."""
        with pytest.raises(Stopped):
            main.run(recipe(corpus), tmp_path / 'one', StopAtTwo())
        main.run(recipe(corpus, resume_from=str(tmp_path / 'one')), tmp_path / 'two')
        assert [first for first, _ in begun] == [1, 3]
        both = [line for run in ('one', 'two') for line in lines_of(tmp_path / run)]
        assert both == lines_of(finished)

    @pytest.mark.parametrize(
        'changes, kind, message',
        [
            ({}, UsageError, 'it is trained to its end, step 4'),
            (
                {'num_steps': 9, 'optim.clip_norm': 1.0},
                UsageError,
                r'checkpoint 4 holds a run of another configuration: optim.clip_norm \(was 0.0, is 1.0\); init_from',
            ),
            ({'num_steps': 3}, UsageError, r'it is at step 4, after the last one \(config.num_steps=3\)'),
            ({'model.hidden_size': 32}, CheckpointError, r'checkpoints/4: params/.* is .*, this run needs'),
        ],
    )
    def test_another_run(self, corpus, finished, tmp_path, changes, kind, message):
        with pytest.raises(kind, match=f'^config.resume_from={finished}: .*{message}'):
            main.run(recipe(corpus, resume_from=str(finished), **changes), tmp_path)

    @pytest.mark.parametrize(
        'where, message', [('nowhere', 'is not a folder'), (str(GOLDEN / 'pre'), 'not a run of ours')]
    )
    def test_no_run(self, corpus, tmp_path, where, message):
        with pytest.raises(UsageError, match=f'^config.resume_from={where}: .*{message}'):
            main.run(recipe(corpus, resume_from=where), tmp_path)

    def test_a_damaged_checkpoint_is_named_and_stays(self, corpus, finished, tmp_path):
        shutil.copytree(finished, tmp_path / 'copy')
        about = tmp_path / 'copy/checkpoints/2/about/metadata'
        about.write_text(about.read_text().replace('"tokens"', '"token5"'))
        with pytest.raises(CheckpointError, match='^config.resume_from=.*checkpoints/2: its JSON has changed'):
            main.run(recipe(corpus, resume_from=str(tmp_path / 'copy/checkpoints/2')), tmp_path / 'new')
        assert (tmp_path / 'copy/checkpoints/2').is_dir()


def test_numbers_that_are_auto_are_those_of_the_run_that_goes_on(corpus, tmp_path, capsys):
    """One begun when lion's b2 was 0.999 goes on so, also in another work directory; a new one has the published."""
    lion, shown = {'optim.name': 'lion'}, 'optimiser lion: b1 0.9, b2 {:g}\n'
    with pytest.raises(Stopped):
        main.run(recipe(corpus, **lion, **{'optim.b2': 0.999}), tmp_path / 'run', StopAtTwo())
    for where, changes, b2 in (
        ('run', {}, 0.999),
        ('next', {'resume_from': str(tmp_path / 'run/checkpoints/2')}, 0.999),
        ('new', {'num_steps': 1}, 0.99),
    ):
        capsys.readouterr()
        main.run(recipe(corpus, **lion, **changes), tmp_path / where)
        assert shown.format(b2) in capsys.readouterr().out
        assert json.loads((tmp_path / where / 'config.json').read_text())['optim']['b2'] == b2
    with pytest.raises(UsageError, match=r'optim.b2 \(was 0.99, is 0.95\)'):
        main.run(recipe(corpus, num_steps=1, **lion, **{'optim.b2': 0.95}), tmp_path / 'new')


def test_learned_factors_start_as_they_were_given(corpus, tmp_path, begun):
    """Admin's are measured before a run from chance, and kept where weights are given."""
    main.run(recipe(corpus, **{'model.norm_position': 'admin'}), tmp_path / 'first')
    main.run(
        recipe(corpus, **{'model.norm_position': 'admin', 'init_from': str(tmp_path / 'first')}), tmp_path / 'next'
    )
    omega = [params['layers']['segment_0']['mlp_residual_scale'] for _, params in begun]
    trained = weights.load(tmp_path / 'first').params['layers']['segment_0']['mlp_residual_scale']
    assert omega[0].std(axis=1).max() == 0 and omega[0].min() > 0 and not np.all(omega[0] == 1)
    np.testing.assert_array_equal(omega[1], trained)
    assert trained.std() > 0


@pytest.mark.parametrize(
    'theirs, ours, message',
    [
        ({'scale_embed': True}, {}, ''),  # which goes into the exported weights
        ({}, {'scale_embed': True}, 'has scale_embed False, config.model.scale_embed is True'),
        ({'norm_groups': 4}, {'norm_groups': 2}, 'has norm_groups 4, config.model.norm_groups is 2'),
    ],
)
def test_networks_that_mean_something_else_by_their_weights(tmp_path, theirs, ours, message):
    networks = [
        families.from_config(configs.Model(norm_position='group_pre', **(SIZES | changes)))
        for changes in (theirs, ours)
    ]
    params = jax.jit(networks[0].init)(jax.random.key(0))['params']
    hf_llama.save(tmp_path / 'folder', networks[0], params)
    if not message:
        found = start_weights.initial(f'hf:{tmp_path}/folder', networks[1])
        table = {'embedding': 4 * params['embed']['embedding']}  # times the root of the width
        assert equal(found, params | {'embed': table}) and np.any(table['embedding'])
        return
    with pytest.raises(UsageError, match=message):
        start_weights.initial(f'hf:{tmp_path}/folder', networks[1])


def test_no_folder_behind_hf():
    with pytest.raises(UsageError, match='config.init_from=hf:: hf: must be followed by a folder'):
        start_weights.initial('hf:', families.from_config(configs.Model(**SIZES)))
