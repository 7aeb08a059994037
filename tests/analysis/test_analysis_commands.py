"""The analyses as commands: what they write of runs and folders, what they refuse; networks without some layers."""

import importlib
import json
import pathlib
import re
import shutil
import types

import corpora
import events
import jax
import numpy as np
import pytest
from hf_folders import PLACEMENTS, network

from mixln_jax import config as configs
from mixln_jax import evaluate, export, main, recipes, trees
from mixln_jax.analysis import drop, samples, subjects
from mixln_jax.data import batches, squad, tokenizers
from mixln_jax.evaluation import loop as evaluation
from mixln_jax.models.hf import bert as hf_bert
from mixln_jax.models.hf import llama as hf_llama
from mixln_jax.report import figures
from mixln_jax.runs import log, weights
from mixln_jax.system.errors import DataError, UsageError
from mixln_jax.tasks import question_answering
from mixln_jax.tasks.language import Language

ROOT = pathlib.Path(__file__).parents[2]
JOBS = {
    'angular': ['angular'],
    'variance': ['contribution', 'variance'],
    'drop': ['perplexity'],
    'gradients': ['gradients', 'matrices'],
}


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp('runs') / 'small'
    texts = [f'text {n}, which has {"many " * (n % 5)}words' for n in range(300)]
    path = corpora.write(folder.parent / 'text.jsonl', texts)
    keys = {
        'data.source': 'jsonl', 'data.path': str(path),
        'num_steps': 4, 'batch_size': 8, 'seq_length': 16, 'checkpoint.every': 2, 'eval.tokens': 1000, 'eval.every': 0,
        'model.num_layers': 3, 'model.hidden_size': 16, 'model.num_heads': 2, 'model.intermediate_size': 24,
        'model.norm_position': 'post,pre*2', 'analysis.every': 2, 'analysis.tokens': 100,
        'accumulate': 2, 'mesh.data': 2, 'seed': 7,
    }  # fmt: skip
    main.run(recipes.load(f'{ROOT}/configs/quickstart.py', [(key, str(value)) for key, value in keys.items()]), folder)
    return folder


def command(job, *words):
    return importlib.import_module(f'mixln_jax.analysis.{job}').main([str(word) for word in words])


def content(folder):
    return json.loads((folder / 'result.json').read_text())


def test_a_run_has_them_in_its_records(run):
    lines = log.read_metrics(run / 'metrics.jsonl')
    assert [line['step'] for line in lines if 'analysis/grad_norm' in line] == [2, 4]
    scalars, images = events.read(run)
    assert scalars == events.of_lines(lines, pictures=['analysis/angular_matrix'])
    assert [step for step, _ in scalars['analysis/perplexity_drop/003']] == [2, 4]
    [(tag, shown)] = images.items()  # an image, not a number a cell
    assert tag == 'analysis/angular_matrix' and [step for step, _ in shown] == [2, 4]
    for (_, pixels), line in zip(shown, [line for line in lines if tag in line], strict=True):
        np.testing.assert_array_equal(pixels, figures.image(figures.heat_map(line[tag])))
    assert not np.array_equal(shown[0][1], shown[1][1])


@pytest.mark.parametrize('job', JOBS)
def test_a_run(run, job, capsys):
    assert command(job, '--checkpoint', run, '--tokens', 300, *(['--rows', 8] if job == 'gradients' else [])) == 0
    folder = run / 'analysis' / job
    assert sorted(path.name for path in folder.glob('*.png')) == [f'{name}.png' for name in JOBS[job]]
    assert sorted(path.name for path in folder.glob('*.svg')) == [f'{name}.svg' for name in JOBS[job]]
    found = content(folder)
    assert found['job'] == job and found['definition'] and found['unit'] and found['source']
    assert found['settings']['tokens'] == 300 and found['environment']['versions']
    [result] = found['results']
    assert (result['label'], result['step'], result['norm_position']) == ('small', 4, ['post', 'pre', 'pre'])
    assert result['checkpoint'] == f'{run}/checkpoints/4'
    at_least = 256 if job == 'gradients' else 300  # of whole gradients, 8 rows each
    assert result['tokens'] == 16 * result['rows'] >= at_least
    assert result['text']['split'] == 'validation' and result['text']['seq_length'] == 16 and result['text']['source']
    assert found['figures'] == JOBS[job]
    shown = capsys.readouterr().out
    assert f'{run}/checkpoints/4, step 4 on {result["tokens"]} tokens' in shown
    assert [line.split()[:2] for line in shown.splitlines() if line.split()[:1] in (['1'], ['3'])] == [
        ['1', 'post'],
        ['3', 'pre'],
    ]


def test_what_is_written_of_each(run):
    """Shapes, errors, and numbers that another room knows."""
    for job in JOBS:
        assert command(job, '--checkpoint', run, '--tokens', 10**6, *(['--rows', 8] if job == 'gradients' else [])) == 0
    angles, stream, drops, norms = (content(run / 'analysis' / job)['results'][0] for job in JOBS)
    assert np.shape(angles['distance']['mean']) == np.shape(angles['distance']['standard_error']) == (4, 4)
    assert len(stream['variance']['mean']) == 4 and len(stream['contribution']['mlp']['standard_error']) == 3
    assert stream['theory'][:1] == [None] and len(stream['theory']) == 4 and stream['theory_constant'] > 0
    whole = evaluation.evaluate_run(weights.load(run), num_tokens=10**9)
    for name in ('loss', 'perplexity'):
        assert drops['metrics'][name]['value'] == pytest.approx(whole[f'eval/{name}'], rel=1e-5)
        assert 0 < drops['metrics'][name]['standard_error'] < drops['metrics'][name]['value']
    assert drops['tokens'] == whole['eval/tokens']
    assert set(norms['matrices']) == {f'attention/{name}' for name in 'qkvo'} | {
        f'mlp/{name}' for name in ('gate', 'up', 'down')
    }
    assert norms['gradients'] == norms['rows'] // 8 == drops['rows'] // 8 > 1 and all(norms['layers']['standard_error'])
    assert norms['tokens'] == 16 * norms['rows']


def test_several_checkpoints_and_the_beginning(run, tmp_path):
    words = ['--tokens', 128, '--rows', 8, '--out', tmp_path]
    assert command('gradients', '--checkpoint', run, '--steps', 'init,all', *words) == 0
    results = content(tmp_path)['results']
    assert [result['step'] for result in results] == [0, 2, 4]
    assert [result['label'] for result in results] == ['small at init', 'small step 2', 'small step 4']
    assert len({tuple(result['layers']['mean']) for result in results}) == 3
    found = weights.load(run)
    first = jax.jit(found.model.init)(jax.random.key(7))['params']
    begun = subjects.open_subject(subjects.places([run], subjects.INITIAL)[0])
    jax.tree.map(np.testing.assert_array_equal, begun.params, first)


def test_admin_begins_with_what_it_measures(run, tmp_path):
    """The factors that a run measures before its first step are measured again for `--steps init`."""
    keys = {'model.norm_position': 'admin', 'num_steps': 1, 'optim.learning_rate': 1e-30, 'analysis.tokens': 0}
    keys |= {'batch_size': 8, 'seq_length': 16, 'eval.tokens': 100, 'model.num_layers': 2, 'model.hidden_size': 18}
    recipe = recipes.load(f'{ROOT}/configs/quickstart.py', [(key, str(value)) for key, value in keys.items()])
    main.run(recipe, tmp_path / 'run')
    begun = subjects.open_subject(subjects.places([tmp_path / 'run'], subjects.INITIAL)[0]).params
    trained = weights.load(tmp_path / 'run').params
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), begun, trained)
    assert (np.asarray(begun['layers']['segment_0']['mlp_residual_scale']) != 1).all()


def test_a_folder_and_a_text_of_its_own(tmp_path, capsys):
    tokenizer = tokenizers.Bytes()
    model, params = network('mix', vocab_size=tokenizer.vocab_size)
    hf_llama.save(tmp_path / 'folder', model, params, tokenizer)
    settings = tmp_path / 'folder/config.json'
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {'max_position_embeddings': 32}))
    path = corpora.write(tmp_path / 'text.jsonl.gz', [f'text number {n}' * (n % 3 + 1) for n in range(9)])
    words = ['--checkpoint', tmp_path / 'folder', '--text', path, '--seq_length', 12, '--out', tmp_path / 'out']
    assert command('drop', *words, '--blocks', '1, 2', '--batch_size', '1e8') == 0  # more than there are
    [head] = [line for line in capsys.readouterr().out.splitlines() if line.startswith('layer')]
    assert [title.strip() for title in head.split('  ')[-2:]] == ['change in loss', 'change in perplexity']
    [result] = content(tmp_path / 'out')['results']
    assert (result['rows'], result['step'], result['label']) == (9, None, 'folder')
    assert [len(result['metrics']['loss']['drop'][block]['mean']) for block in '12'] == [3, 2]
    charts = lambda: sorted(path.name for path in (tmp_path / 'out').glob('*.png'))  # noqa: E731
    assert charts() == ['perplexity.png', 'perplexity_2.png']
    assert command('drop', *words, '--blocks', '2') == 0
    assert charts() == ['perplexity_2.png']  # nothing of an earlier result stays
    assert command('angular', *words, '--positions', 'last') == 2
    assert f'{tmp_path}/out has the results of mixln_jax.analysis.drop' in capsys.readouterr().err
    words[-1] = tmp_path / 'other'
    assert command('angular', *words, '--positions', 'last') == 0
    assert content(tmp_path / 'other')['results'][0]['tokens'] == 9
    one = corpora.write(tmp_path / 'one.txt', ['a text alone'])
    words[3:6] = [one, '--seq_length', 48]
    assert command('angular', *words) == 0
    said = capsys.readouterr()
    assert 'folder was trained on rows of up to 32 tokens, not 48' in said.err and ' of 1 rows' in said.out
    assert command('angular', *words, '--split', 'train') == 4
    assert '--text holds only one document' in capsys.readouterr().err


def test_what_a_text_is_follows_from_its_files(tmp_path):
    """Not from how they are named on the command line: JSON is never measured as plain text."""
    folder, tokenizer = tmp_path / 'text', tokenizers.Bytes()
    folder.mkdir()
    texts = [f'text number {n} of several' for n in range(12)]
    for name in ('a.jsonl', 'b.NDJSON', 'c.json.gz', 'd'):
        corpora.write(folder / name, [f'{name} {text}' for text in texts])
    made = lambda path: samples.text(subject, f'{path}', seq_length=48)  # noqa: E731
    weights = types.SimpleNamespace(
        config=None, data_mode='pad', max_length=64, tokenizer=tokenizer, where='nowhere', params=None
    )
    model = types.SimpleNamespace(config=configs.Model(vocab_size=259))
    subject = types.SimpleNamespace(weights=weights, model=model, task=Language(model))
    rows, said = made(f'{folder}/*')
    assert len(rows) == 48  # a document each, where raw JSON would be one of each file
    assert tokenizer.decode(rows.read([13]).ids[0]) == 'b.NDJSON text number 1 of several'
    names = ','.join(f'{folder}/{name}' for name in ('d', 'c.json.gz', 'b.NDJSON', 'a.jsonl', '../text/a.jsonl'))
    assert made(names)[1] == said
    (folder / 'e.txt').write_text('Plain text.')
    rows, _ = made(folder / 'e.txt')
    assert tokenizer.decode(rows.read([0]).ids[0]) == 'Plain text.'
    with pytest.raises(DataError, match=f'^{folder}/a.jsonl is JSON lines and {folder}/e.txt plain text'):
        made(f'{folder}/*')
    for wrong, message in (
        ('none', '--text: there is no file none'),
        ('gs://a/b', '--text: gs://a/b is not a file of'),
    ):
        with pytest.raises(DataError, match=f'^{message}'):
            made(wrong)


def test_drops_of_tasks(run, monkeypatch):
    """The metric without a layer less that with all, of every block, with the errors of two independent values."""
    asked, worth = [], np.array([1.0, 10.0, 100.0])  # what each layer adds to the metric

    def open_harness(options):
        model = types.SimpleNamespace(layer_mask=None)

        def evaluate():
            value = float(worth @ np.asarray(model.layer_mask))
            errors = {'acc_stderr,none': 3.0 if value == 111 else 4.0, 'em_stderr,strict': 'N/A'}
            return '', {'results': {'arc': {'alias': 'arc', 'acc,none': value, 'em,strict': -value, **errors}}}

        asked.append(options.tasks)
        return lambda found: (model, evaluate)

    monkeypatch.setattr(drop, 'open_harness', open_harness)
    assert command('drop', '--checkpoint', run, '--tokens', 100, '--blocks', '1, 2', '--tasks', 'a, b') == 0
    found = content(run / 'analysis/drop')['results'][0]['metrics']
    assert asked == ['a, b'] and {*found} == {'loss', 'perplexity', 'arc/acc', 'arc/em,strict'}
    accuracy = {'mean': [-1, -10, -100], 'standard_error': [5, 5, 5]}
    of_two = {'mean': [-11, -110], 'standard_error': [5, 5]}
    assert found['arc/acc'] == {'value': 111, 'standard_error': 3, 'drop': {'1': accuracy, '2': of_two}}
    assert found['arc/em,strict']['drop']['1'] == {'mean': [1, 10, 100], 'standard_error': [None] * 3}
    assert {'arc_acc.png', 'arc_acc_2.png'} <= {path.name for path in (run / 'analysis/drop').iterdir()}


def test_a_bos_where_the_tokenizer_puts_one():
    begun = samples._WithStart(tokenizers.Bytes(), [257])
    assert begun.encode('ab').tolist() == [257, 97, 98] and begun.encode('abc', 2).tolist() == [257, 97]
    assert samples._WithStart(tokenizers.Bytes(), []).encode('ab').tolist() == [97, 98] and begun.eos_id == 258


def test_what_is_measured_and_how_it_is_called(run, tmp_path, monkeypatch):
    other = tmp_path / 'elsewhere' / 'small'
    shutil.copytree(run, other)
    labels = lambda *given, steps=None: [place.label for place in subjects.places(given, steps)]  # noqa: E731
    assert labels(run) == ['small'] and labels(run / 'checkpoints/2', run) == ['small step 2', 'small']
    assert labels(run, run / 'checkpoints/4', run) == ['small']  # once each
    assert labels(run, other) == [f'{run.parent.name}/small', 'elsewhere/small']
    assert labels(run, steps=' init, all ,2,') == ['small at init', 'small step 2', 'small step 4']
    monkeypatch.chdir(run / 'checkpoints')
    assert labels('2') == ['small step 2']
    monkeypatch.setenv('HOME', str(run.parent))
    assert labels('~/small', '~/small/checkpoints/2') == ['small', 'small step 2']


def test_a_network_that_is_not_finite_hides_no_other(run, tmp_path, capsys):
    model, params = network('mix', vocab_size=259)
    for name, value in (('good', 1), ('bad', 1e36)):
        head = {'kernel': np.asarray(params['head']['kernel']) * np.float32(value)}
        hf_llama.save(tmp_path / name, model, params | {'head': head}, tokenizers.Bytes())
    path = corpora.write(tmp_path / 'text.jsonl', ['a text', 'and one more'])
    words = ['--text', path, '--seq_length', 8, '--out', tmp_path / 'out']
    assert command('drop', '--checkpoint', tmp_path / 'bad', tmp_path / 'good', *words) == 6
    assert capsys.readouterr().err == f'mixln_jax: {tmp_path}/bad: its drop is not finite\n'
    assert [result['label'] for result in content(tmp_path / 'out')['results']] == ['good']


def test_all_is_checked_before_anything_is_measured(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(subjects, 'open_subject', lambda *_: pytest.fail('it was opened'))
    (tmp_path / 'file').touch()
    (tmp_path / 'strange').mkdir()
    (tmp_path / 'strange/result.json').write_text('[1')
    for words, message in (
        ([run, 'nowhere'], 'nowhere is not a folder'),
        ([run, tmp_path], 'is neither a run of ours'),
        ([run, '--out', tmp_path / 'file'], 'file cannot be written to: File exists'),
        ([run, '--out', tmp_path / 'strange'], 'strange/result.json: not the result of an analysis'),
        ([run, '--blocks', '0'], '--blocks 0: give distinct integers'),
        ([run, '--tasks', 'a', '--task_path', tmp_path / 'no'], 'no is not a folder'),
    ):
        assert command('drop', '--checkpoint', *words) == 2
        said = capsys.readouterr().err
        assert message in said and len(said.splitlines()) == 1


def test_ctrl_c_is_one_line(run, capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(subjects, 'open_subject', interrupted)
    assert command('angular', '--checkpoint', run) == 75
    assert capsys.readouterr().err == 'mixln_jax: stopped by SIGINT\n'


class TestBert:
    """A folder with transformers' own numbers of two SQuAD files; see tests/golden/README.md."""

    FOLDER = ROOT / 'tests/golden/squad'

    def test_the_drop_of_its_answers(self, tmp_path, capsys):
        words = ['--checkpoint', self.FOLDER, '--squad', self.FOLDER / 'v1.json', '--seq_length', 32]
        assert command('drop', *words, '--out', tmp_path, '--blocks', '1,2', '--batch_size', 8) == 0
        [result] = content(tmp_path)['results']
        model, params = hf_bert.load(self.FOLDER)
        examples = squad.read(self.FOLDER / 'v1.json')
        features = squad.make_features(examples, squad.open_tokenizer(self.FOLDER), max_length=32, max_query=8)
        L = len(model.norm_position)
        compiled = question_answering._logits._cache_size()
        scores = [
            question_answering.evaluate(model, params, features, examples, 4, keep) for keep in (None, *drop.masks(L))
        ]
        assert question_answering._logits._cache_size() == compiled + 1
        for name in ('exact_match', 'f1'):
            whole, *without = (100 * of[name].mean() for of in scores)
            metric = result['metrics'][name]
            assert metric['value'] == pytest.approx(whole)
            np.testing.assert_allclose(metric['drop']['1']['mean'], np.array(without) - whole, atol=1e-9)
            assert len(metric['drop']['2']['mean']) == L - 1
        assert result['questions'] == len(examples) and any(result['metrics']['f1']['drop']['1']['mean'])
        assert sorted(path.name for path in tmp_path.glob('*.svg')) == [
            'exact_match.svg',
            'exact_match_2.svg',
            'f1.svg',
            'f1_2.svg',
        ]
        assert 'change in f1' in capsys.readouterr().out

    @pytest.mark.parametrize('job', ['angular', 'variance'])
    def test_its_stream(self, tmp_path, job):
        """Of the tokens of questions and texts; padding is neither seen nor counted."""
        squads = json.loads((self.FOLDER / 'v1.json').read_text())
        for paragraph in squads['data'][0]['paragraphs']:
            paragraph['context'] = paragraph['context'][:60]  # so that rows of either length hold all of it
            for asked in paragraph['qas']:  # whose answers do not stand in the rest
                asked['answers'] = [{'text': answer['text']} for answer in asked['answers']]
        (tmp_path / 'short.json').write_text(json.dumps(squads))
        words = ['--checkpoint', self.FOLDER, '--squad', tmp_path / 'short.json', '--tokens', 10**6]
        found = []
        for length in (36, 39):
            assert command(job, *words, '--seq_length', length, '--out', tmp_path / 'out') == 0
            found.append(content(tmp_path / 'out')['results'][0])
        name = {'angular': 'distance', 'variance': 'variance'}[job]
        short, long = (np.array(result[name]['mean']) for result in found)
        assert found[0]['rows'] == found[1]['rows'] == 8 and found[0]['tokens'] == found[1]['tokens'] < 8 * 36
        np.testing.assert_allclose(short, long, rtol=1e-5, atol=1e-6)
        assert short.shape[0] == len(found[0]['norm_position']) + 1 and abs(short[0] - short[1]).max() > 0.1

    def test_the_gradients_of_its_loss(self, tmp_path):
        """The mean norm of the gradients of 8 rows each."""
        words = ['--checkpoint', self.FOLDER, '--squad', self.FOLDER / 'v1.json', '--seq_length', 32]
        assert command('gradients', *words, '--out', tmp_path, '--tokens', 10**6, '--rows', 8) == 0
        [result] = content(tmp_path)['results']
        model, params = hf_bert.load(self.FOLDER)
        asked = squad.read(self.FOLDER / 'v1.json')
        features = squad.make_features(asked, squad.open_tokenizer(self.FOLDER), max_length=32, max_query=8)
        task = question_answering.QuestionAnswering(model)

        def loss(params, batch):
            losses = task.losses(params, batch)
            return losses.per_example.mean()  # every question says where its answer is

        order = batches.order(features, 0, np.arange(16)).reshape(2, 8)  # six are left over
        norms = [trees.layer_norms(jax.grad(loss)(params, features.batch(rows)))[0] for rows in order]
        assert result['gradients'] == 2 and len(features) == 22 and features.answer_mask.all()
        np.testing.assert_allclose(result['layers']['mean'], np.mean(norms, axis=0), rtol=1e-5)

    @pytest.mark.parametrize(
        'job, words, message, code',
        [
            ('angular', [], 'is a BERT; give --squad FILE', 2),
            ('drop', ['--squad', 'none.json'], 'none.json: not readable JSON', 4),
            ('drop', ['--squad', 'SQUAD', '--tasks', 'arc_easy'], '--tasks has no meaning with --squad', 2),
            ('drop', ['--squad', 'SQUAD', '--seq_length', '1000'], '--seq_length 1000: .* positions', 2),
            ('drop', ['--squad', 'SQUAD', '--seq_length', '5'], '--seq_length 5: too short for a question', 2),
            ('drop', ['--squad', 'SQUAD', '--tokens', '5'], '--tokens has no meaning .* all questions', 2),
            ('drop', ['--squad', 'SQUAD', '--split', 'all'], '--split has no meaning with --squad', 2),
            ('angular', ['--norm_position', 'post'], 'is a BERT, which has Post-LN', 2),
            ('gradients', [], 'is a BERT; give --squad FILE', 2),
        ],
    )
    def test_bad_input_is_one_line(self, tmp_path, capsys, job, words, message, code):
        words = [str(self.FOLDER / 'v1.json') if word == 'SQUAD' else word for word in words]
        assert command(job, '--checkpoint', self.FOLDER, '--out', tmp_path, *words) == code
        said = capsys.readouterr().err
        assert re.search(message, said) and len(said.splitlines()) == 1, said

    def test_other_networks_and_other_commands(self, run, tmp_path, capsys):
        assert command('drop', '--checkpoint', run, '--squad', self.FOLDER / 'v1.json') == 2
        assert 'small/checkpoints/4 is not a BERT that answers questions' in capsys.readouterr().err
        for other in (evaluate, export):
            words = ['--checkpoint', str(self.FOLDER), '--out', str(tmp_path / 'out')]
            assert other.main(words) == 5
            assert re.search('sees both sides|family bert cannot be written', capsys.readouterr().err)


@pytest.mark.parametrize(
    'job, words, message, code',
    [
        ('angular', [], 'required: --checkpoint', 2),
        ('angular', ['--checkpoint', 'nowhere'], 'nowhere is not a folder', 2),
        ('angular', ['--checkpoint', 'RUN', '--tokens', '0'], '--tokens must be at least 1', 2),
        ('angular', ['--checkpoint', 'RUN', '--batch_size', '-3'], '--batch_size must be at least 1', 2),
        ('angular', ['--checkpoint', 'RUN', '--positions', 'first'], "invalid choice: 'first'", 2),
        ('variance', ['--checkpoint', 'RUN', '--steps', '3'], "has no checkpoint '3' .there is init, 2, 4", 2),
        ('variance', ['--checkpoint', 'RUN/checkpoints/2', '--steps', 'all'], 'is not the folder of a run', 2),
        ('variance', ['--checkpoint', 'RUN', '--norm_position', 'pre'], 'which knows its placement', 2),
        ('variance', ['--checkpoint', 'RUN', '--split', 'test'], 'has no split test', 4),
        ('variance', ['--checkpoint', 'RUN', '--text', 'none.txt'], 'none.txt', 4),
        ('variance', ['--checkpoint', 'RUN', '--seq_length', '1'], '--seq_length must be at least 2', 2),
        ('gradients', ['--checkpoint', 'RUN', '--rows', '12'], '--rows 12 is not a multiple of --batch_size 8', 2),
        ('gradients', ['--checkpoint', 'RUN', '--tokens', '20', '--rows', '64'], 'raise --tokens or lower --rows', 2),
        ('drop', ['--checkpoint', 'RUN', '--blocks', '1,4'], '--blocks 1,4: .*/checkpoints/4 has 3 layers', 2),
        ('drop', ['--checkpoint', 'RUN', '--blocks', 'x'], '--blocks x: give distinct integers', 2),
        ('drop', ['--checkpoint', 'RUN', '--blocks', ' , '], '--blocks , : give distinct integers', 2),
        ('drop', ['--checkpoint', 'RUN', '--tokens', '1e3.5'], '--tokens: invalid int value', 2),
        ('angular', ['--checkpoint', 'RUN', '--text', 'x', '--data_path', 'x'], 'has no meaning with --text', 2),
        ('angular', ['--checkpoint', 'RUN', '--squad', 'x', '--data_path', 'x'], '--data_path .* with --squad', 2),
        ('variance', ['--checkpoint', 'RUN', '--data_path', 'none.jsonl'], '--data_path: there is no file none', 4),
        ('drop', ['--checkpoint', 'RUN', '--limit', '0', '--tasks', 'a'], '--limit must be at least 1', 2),
        ('drop', ['--checkpoint', 'RUN', '--limit', '3'], '--limit has no meaning without --tasks', 2),
        ('angular', ['--checkpoint', 'GOLDEN'], 'is not a run of ours, .* give --out DIR', 2),
        ('angular', ['--checkpoint', 'GOLDEN', '--out', 'OUT'], 'names no text; give --text FILES', 2),
        ('angular', ['--checkpoint', 'GOLDEN', '--out', 'OUT', '--text', 'README'], 'holds no tokenizer', 2),
    ],
)
def test_bad_input_is_one_line(run, tmp_path, capsys, job, words, message, code):
    names = {
        'RUN': str(run),
        'GOLDEN': str(ROOT / 'tests/golden/pre'),
        'OUT': str(tmp_path),
        'README': str(ROOT / 'README.md'),
    }
    words = [re.sub('RUN|GOLDEN|OUT|README', lambda match: names[match[0]], word) for word in words]
    assert command(job, *words) == code
    said = capsys.readouterr().err
    assert re.search(message, said), said
    assert len(said.splitlines()) == 1


class TestRemovedLayers:
    @pytest.mark.parametrize('norm_position', PLACEMENTS)
    def test_a_pruned_network_is_the_masked_one(self, norm_position):
        """Every layer in turn, and two at once, under every placement."""
        model, params = network(norm_position)
        found = weights.Weights(model, params, 'here')
        ids = np.arange(10).reshape(2, 5)
        masked = jax.jit(lambda keep: model.apply({'params': params}, ids, keep=keep)[0])
        keeps = [*drop.masks(3), [True, False, False]]
        for keep in keeps:
            removed = {at + 1 for at in range(3) if not keep[at]}
            pruned = weights.without_layers(found, removed)
            assert pruned.model.layer_index == tuple(at + 1 for at in range(3) if keep[at]) and pruned.model.depth == 3
            logits, _ = pruned.model.apply({'params': pruned.params}, ids)
            expected = masked(np.array(keep))
            scale = np.abs(expected).max()
            np.testing.assert_allclose(logits / scale, expected / scale, rtol=0, atol=1e-5)
            assert np.abs(expected - masked(np.ones(3, bool))).max() > 1e-3 * scale

    def test_the_command(self, run, tmp_path, capsys):
        """Its folder, opened as any other, has the loss that the drop job gives for the layer."""
        assert export.main(['--checkpoint', str(run), '--out', str(tmp_path / 'out'), '--remove_layers', '2']) == 0
        assert json.loads((tmp_path / 'out/export.json').read_text())['removed_layers'] == [2]
        model, _ = hf_llama.load(tmp_path / 'out')
        assert (model.layer_index, model.depth, model.norm_position) == ((1, 3), 3, ('post', 'pre'))
        # Length and mode of rows go with an export.
        path = corpora.write(tmp_path / 'text.jsonl', [f'text {n:010}' for n in range(12)])
        words = ['--text', path]
        assert command('drop', '--checkpoint', tmp_path / 'out', *words, '--out', tmp_path / 'pruned') == 0
        assert command('drop', '--checkpoint', run, *words, '--out', tmp_path / 'whole') == 0
        [pruned], [whole] = (content(tmp_path / name)['results'] for name in ('pruned', 'whole'))
        assert pruned['text'] == whole['text'] and pruned['text']['mode'] == 'concat'
        assert pruned['tokens'] == whole['tokens'] and pruned['layer_index'] == [1, 3]
        loss = whole['metrics']['loss']
        without = loss['value'] + loss['drop']['1']['mean'][1]
        assert pruned['metrics']['loss']['value'] == pytest.approx(without, abs=1e-5)
        # One layer more: layers keep their numbers.
        words = ['--checkpoint', str(tmp_path / 'out'), '--out', str(tmp_path / 'again'), '--remove_layers']
        assert export.main([*words, '2']) == 2 and 'has the layers 1, 3' in capsys.readouterr().err
        assert export.main([*words, '3']) == 0 and hf_llama.load(tmp_path / 'again')[0].layer_index == (1,)
        assert json.loads((tmp_path / 'again/export.json').read_text())['data_mode'] == 'concat'

    def test_what_is_refused(self, run, tmp_path, capsys):
        for removed, message in (
            ('4', 'there is no layer 4: .* has the layers 1, 2, 3'),
            ('0', 'there is no layer 0'),
            ('1,2,3', 'all 3 layers'),
            ('two', "'two': numbers from 1 are needed"),
            ('', 'numbers from 1 are needed'),
        ):
            words = ['--checkpoint', str(run), '--out', str(tmp_path / 'out'), '--remove_layers', removed]
            assert export.main(words) == 2
            said = capsys.readouterr().err
            assert re.search(message, said) and len(said.splitlines()) == 1
        assert not (tmp_path / 'out').exists()
        model, params = network('peri,pre*2')
        with pytest.raises(UsageError, match=r'layer 1 \(peri\) cannot be removed before a layer of pre'):
            weights.without_layers(weights.Weights(model, params, 'here'), {1})
