"""The report of made runs: every number is on the page, nothing on it is fetched, malformed files hide nothing else."""

import dataclasses
import html.parser
import json
import re

import numpy as np
import pytest
from analysis_results import L, measured, result

from mixln_jax import config as configs
from mixln_jax.report import command as report
from mixln_jax.report import inputs, numbers, overview, results, sections, style
from mixln_jax.tasks.build import TASKS
from mixln_jax.tasks.question_answering import QuestionAnswering

LINES = (
    {'step': 5, 'tokens': 500, 'train/loss': 4.5, 'train/grad_norm': 2.0, 'eval/perplexity': 99.5},
    {'step': 10, 'tokens': 1000, 'train/loss': None, 'eval/perplexity': 33.25, 'eval/loss': 3.5},
)


def write_analysis(folder, job, *results, **changes):
    content = {'job': job, 'definition': f'what <{job}> is', 'unit': f'unit of {job}', 'source': 'A & B 2025'}
    (folder / 'analysis' / job).mkdir(parents=True)
    (folder / f'analysis/{job}/result.json').write_text(json.dumps(content | {'results': results} | changes))


@pytest.fixture
def made(tmp_path, monkeypatch):
    """Makes a work directory, in which `lines` and `data` are what metrics.jsonl and environment.json say."""
    monkeypatch.chdir(tmp_path)

    def make(name, lines=LINES, data=None, **changes):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        config = configs.default()
        config.num_steps, config.model.num_layers = 10, L
        config.update_from_flattened_dict(changes)
        values = config.to_dict()
        values['model'] |= {'norm_position': ['post', 'pre', 'pre'], 'layer_index': [1, 2, 3], 'depth': 3}
        (folder / 'config.json').write_text(json.dumps(values))
        environment = {'commit': 'c37492b0123456789-dirty', 'devices': {'kind': 'TPU v5', 'count': 4}}
        (folder / 'environment.json').write_text(json.dumps(environment | ({'data': data} if data else {})))
        (folder / 'metrics.jsonl').write_text(''.join(f'{json.dumps(line)}\n' for line in lines))
        return folder

    return make


class Reader(html.parser.HTMLParser):
    """Headings, images, cells and the text of a page; raises AssertionError for tags that are not closed."""

    def __init__(self, text):
        super().__init__()
        self.open, self.images, self.headings, self.cells, self.text = [], [], [], [], ''
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        if tag == 'img':
            self.images.append(dict(attributes))
        if tag in ('th', 'td'):
            self.cells.append('')
        if tag not in ('meta', 'link', 'img'):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if 'style' in self.open:
            return
        self.text += data
        if self.open and self.open[-1] in ('th', 'td'):
            self.cells[-1] += data
        if self.open and re.fullmatch('h[1-6]', self.open[-1]):
            self.headings.append(data)


def read(folder='report'):
    with open(f'{folder}/report.html') as page, open(f'{folder}/report.md') as text:
        return page.read(), text.read()


def test_the_whole_page(made, capsys):
    """Two runs, one with all analyses: figures, numbers, tokens, commands for what is missing, and nothing fetched."""
    one = made('one', **{'expected.perplexity': 30.0, 'expected.source': 'Table <1>'})
    two = made('two', **{'optim.learning_rate': 0.0125, 'data.path': 'a|b<script>'})
    for job in ('angular', 'drop', 'variance'):
        write_analysis(one, job, result(job))
    write_analysis(one, 'gradients', result('gradients'), result('gradients', step=0))
    evolving = {f'analysis/{name}': [1.0, 2.0, None] for name in ('angular_distance', 'grad_norm', 'variance')}
    with open(one / 'metrics.jsonl', 'a') as lines:
        lines.write(json.dumps({'step': 11, 'tokens': 1100, **evolving}) + '\n')

    assert report.main([str(one), str(two)]) == 0
    shown = capsys.readouterr()
    assert len([line for line in shown.out.splitlines() if line.startswith('|')]) == 4 and not shown.err
    assert shown.out.splitlines()[-1] == 'wrote report/report.html and report/report.md'
    page, text = read()
    seen = Reader(page)

    for said in (page, text):  # what is only in these runs
        for number in ('33.25', '+3.25 (+10.8%)', '99.5', '0.0125', '7,000 ± 70', '1.625 ± 0.016', '-0.125', '0.375'):
            assert number in said, number
        for word in (
            'post x 1, pre x 2',
            'c37492b012-dirty',
            '4 x TPU v5',
            '65,536',
            'unit of drop',
            '0.875',
            '33.25 ± 0.5',
        ):
            assert word in said, word
        for job in results.ANALYSES:
            assert f'python -m mixln_jax.analysis.{job} --checkpoint {two}' in said
        assert f'--checkpoint {one}' not in said
    assert 'What <drop> is.' in seen.text and 'A & B 2025' in seen.text and '<drop>' not in page
    assert 'a|b<script>' in seen.cells and '<script' not in page and 'a\\|b&lt;script&gt;' in text
    assert 'optim.learning_rate' in seen.cells and 'optim.schedule' not in seen.cells

    assert seen.headings[0] == 'Runs side by side'
    assert {'At initialisation', 'Change in perplexity without 2 layers in a row'} <= set(seen.headings)
    # Training 4; angular 1; drop 3; gradients 2 at two steps; variance 2; evolution 3.
    assert len(seen.images) == 4 + 1 + 3 + 4 + 2 + 3
    assert all(image['src'].startswith('data:image/svg+xml;base64,') and image['alt'] for image in seen.images)
    assert not re.search(r'(src|href)="(?!data:|#)|url\(|@import|http', page)


def test_the_same_bytes_again(made):
    one = made('one')
    write_analysis(one, 'angular', result('angular'))
    assert report.main([str(one), '--out', 'first']) == report.main([str(one), '--out', 'second']) == 0
    assert read('first') == read('second')


def test_runs_of_one_name_are_told_apart(made, capsys):
    folders = [str(made('a/run')), str(made('b/run'))]
    assert report.main(folders) == 0
    assert '| a/run | ' in capsys.readouterr().out
    assert {'a/run', 'b/run'} <= set(Reader(read()[0]).cells)
    assert f'`python -m mixln_jax.analysis.drop --checkpoint {" ".join(folders)}`' in read()[1]


def test_the_newest_step_counts(made):
    """Whatever the order in the file; without a step (Hugging Face's folders) a result counts as old."""
    one = made('one')
    write_analysis(one, 'angular', *(result('angular', step=step) for step in (600, 2400, None)))
    [run], _, _ = inputs.read([str(one)])
    assert [found['step'] for found in run.results('angular')] == [None, 600, 2400]
    section = sections.compose([run], overview.overview([run]))[3]
    assert section.tables[0].rows == [('one', 'one step 2400', '2,400', '65,536', 'all')]


MALFORMED = {
    'no JSON': '{',
    'a list': '[]',
    'no results': '{"results": []}',
    'another shape': json.dumps({'results': [result('angular', distance={'mean': [[0.0, 1.0], [1.0, 0.0]]})]}),
    'a negative error': json.dumps(
        {'results': [result('angular') | {'distance': {'mean': [[0.0] * 4] * 4, 'standard_error': [[-1.0] * 4] * 4}}]}
    ),
    'words': json.dumps({'results': [result('angular', distance={'mean': 'far'})]}),
    'a part': json.dumps({'results': [{'label': 'one', 'norm_position': ['pre']}]}),
    'a step': json.dumps({'results': [result('angular', step='last')]}),
    'tokens': json.dumps({'results': [result('angular', tokens='many')]}),
    'placements': json.dumps({'results': [result('angular', norm_position=['post', 2, 'pre'])]}),
    'layers': json.dumps({'results': [result('angular', layer_index=[1, 2])]}),
    'a text': json.dumps({'results': [result('angular', text='books')]}),
    'a number in words': json.dumps({'results': [result('angular', distance={'mean': [['1'] * 4] * 4})]}),
}


@pytest.mark.parametrize('content', MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_result(made, capsys, content):
    """It is named in one line, exit 5; the run's other numbers are shown, and it counts as not measured."""
    one = made('one')
    write_analysis(one, 'angular')
    (one / 'analysis/angular/result.json').write_text(content)
    runs, [problem], _ = inputs.read([str(one)])
    assert 'analysis/angular/result.json: not the result of mixln_jax.analysis.angular: ' in str(problem)
    assert problem.code == 5 and len(str(problem).splitlines()) == 1
    assert runs[0].name == 'one' and not runs[0].analyses


def test_words_for_numbers(made, capsys):
    """In metrics.jsonl they hide the run alone, in a result the analysis."""
    one, two, three = made('one'), made('two'), made('three')
    with (one / 'metrics.jsonl').open('a') as file:
        file.write('{"step": 11, "tokens": 1100, "layers/grad_norm": [1.0, "2"]}\n')
    wrong = result('drop')
    wrong['metrics']['perplexity']['value'] = 'much'
    write_analysis(two, 'drop', wrong)
    write_analysis(three, 'drop', result('drop'))
    assert report.main([str(one), str(two), str(three)]) == 5
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and 'one/metrics.jsonl: layers/grad_norm of step 11 is not a number' in said[0]
    assert 'two/analysis/drop/result.json: not' in said[1] and '7,000' in read()[0]


@pytest.mark.parametrize('job', ['drop', 'gradients', 'variance'])
def test_a_result_of_another_depth(made, job):
    one = made('one')
    write_analysis(one, job, result(job, norm_position=['pre'] * 5))
    _, [problem], _ = inputs.read([str(one)])
    assert f'analysis/{job}/result.json: not' in str(problem)


def test_layers_of_a_pruned_network_and_other_texts(made):
    """Rows of tables are numbers of layers; numbers from other texts are marked."""
    one, two = made('one'), made('two')
    write_analysis(one, 'gradients', result('gradients'))
    shorter = {'mode': 'concat', 'source': 'ab12', 'split': 'validation'}
    write_analysis(two, 'gradients', result('gradients', layer_index=[1, 2, 4], text=shorter))
    assert report.main([str(one), str(two)]) == 0
    page, text = read()
    warning = 'Not measured on the same text, so not to be compared. The results differ in how rows are made '
    assert warning + '(pad: one; concat: two).' in page
    table = text.split('Gradient norm by layer:')[1].split('\n\n')[1].splitlines()[2:]
    cells = [[cell.strip() for cell in row.strip('|').split('|')] for row in table]
    assert [row[0] for row in cells] == ['1', '2', '3', '4']
    assert cells[2][1] and not cells[2][2] and cells[3][2] and not cells[3][1]


def test_a_problem_hides_nothing_else(made, capsys):
    one, two = made('one'), made('two')
    write_analysis(one, 'drop', {'label': 'one'})
    (one / 'environment.json').write_text('[')
    (two / 'metrics.jsonl').write_text('no line\n')
    assert report.main(['nowhere', str(two), str(one)]) == 5
    shown = capsys.readouterr()
    assert '33.25' in shown.out and len([line for line in shown.out.splitlines() if line.startswith('|')]) == 3
    for line, file in zip(
        shown.err.splitlines(),
        ('nowhere/config.json', 'two/metrics.jsonl:1', 'one/environment.json', 'one/analysis/drop/result.json'),
        strict=True,
    ):
        assert file in line and line.startswith('mixln_jax: ')
    assert '33.25' in read()[0]


def test_a_run_that_has_not_begun(made):
    one = made('one')
    (one / 'metrics.jsonl').unlink()
    (one / 'environment.json').unlink()
    assert report.main([str(one)]) == 0
    page, text = read()
    assert 'No step is logged yet.' in text and not Reader(page).images and '0 of 10' in page


def test_where_it_cannot_be_written(made, capsys, tmp_path):
    (tmp_path / 'file').touch()
    for out in ('file', 'file/under'):
        assert report.main([str(made(f'run-{out[-5:]}'.replace('/', ''))), '--out', out]) == 2
        error = capsys.readouterr().err
        assert f'{out} cannot be written to: ' in error and len(error.splitlines()) == 1


def test_curves_are_thinned_to_means():
    """A number that is not finite does not count; a part without any is a gap."""
    lines = [{'step': i, 'tokens': i, 'a': 2.0 * i} for i in range(1200)]
    lines[1]['a'] = lines[1199]['a'] = None
    x, y = sections._thinned(*sections._numbers(lines, 'a'))
    assert len(x) == sections.MOST_POINTS and x[0] == 9.5 and y[0] == pytest.approx(378 / 19) and y[1] == 59
    assert sections._thinned(*sections._numbers([{'step': 1}], 'a')) == ([], [])
    assert np.isnan(sections._thinned([1, 2], [None, 3])[1][0])


def logged(perplexity, bits=None, step=10, tokens=153_600):
    """The lines of a run that was evaluated once, at its last step."""
    return ({'step': step, 'tokens': tokens, 'eval/perplexity': perplexity, 'eval/bits_per_byte': bits},)


def table(text, caption='Last evaluation'):
    """The rows of a table in markdown, each {column: cell}."""
    lines = text[text.index(caption) :].split('\n\n')[1].splitlines()
    head, _, *rows = [[cell.strip() for cell in line.strip('|').split('|')] for line in lines]
    return [dict(zip(head, row, strict=True)) for row in rows]


class TestComparison:
    """The first table: a row for all runs that differ in seeds alone, and what keeps runs from being compared."""

    def test_seeds_in_one_row(self, made):
        """Perplexities 30, 32 and 37: mean 33, standard error sqrt(13 / 3); bits 1.0, 1.1 and 1.5: sqrt(0.07 / 3)."""
        rate = {'optim.learning_rate': 0.0125}
        folders = [
            made('late', logged(31.0, 1.3), **rate, **{'data.seed': 5}),
            made('a-0', logged(30.0, 1.0)),
            made('began', ()),
            made('a-1', logged(32.0, 1.1), seed=1),
            made('lost', logged(None), seed=3),
            made('a-2', logged(37.0, 1.5), seed=1, **{'data.seed': 2}),
            made('again', logged(29.0, 1.0)),  # the seeds of a-0: no further sample
            made('partial', logged(33.5, step=5), seed=9),
        ]
        assert report.main([*map(str, folders)]) == 0
        page, text = read()
        rows = table(text)
        assert [(row['run'], row['perplexity'], row['bits per byte'], row['steps']) for row in rows] == [
            ('again', '29.00', '1.000', '10'),
            ('late', '31.00', '1.300', '10'),
            ('a-0, a-1, a-2', '33.00 ± 2.1 (3)', '1.200 ± 0.15 (3)', '10'),
            ('partial', '33.50', '-', '5 of 10'),
            ('lost', 'not finite', '-', '10'),
            ('began', '-', '-', '0 of 10'),
        ]
        # The keys that differ, without the seeds; no column without content.
        columns = ['run', 'perplexity', 'bits per byte', 'placement', 'optim.learning_rate', 'steps', 'tokens']
        assert list(rows[0]) == columns and [row['optim.learning_rate'] for row in rows[1:3]] == ['0.0125', '0.001']
        assert rows[0]['tokens'] == '153,600'
        runs = {row['run']: row for row in table(text, 'What was run')}
        assert (runs['a-2']['seed'], runs['a-2']['data.seed'], runs['a-2']['perplexity']) == ('1', '2', '37.00')
        assert 'partial is unfinished: step 5 of 10, evaluated at step 5.' in text
        assert 'began is unfinished: step 0 of 10, not evaluated yet.' in text and 'a-1 is' not in text
        # Runs of one row have one colour, each its own dash, and a dot before each name.
        looks = {run.name: style.look({'colour': run.colour}, 0) for run in inputs.read(map(str, folders))[0]}
        of_row = [looks[f'a-{seed}'] for seed in range(3)]
        assert len({colour for colour, _ in of_row}) == 1 and len({f'{dash}' for _, dash in of_row}) == 3
        assert len({f'{look}' for look in looks.values()}) == len(looks)
        cell = page[: page.index('</span>a-2</span>')].rpartition('<th')[2]
        assert cell.count('class="dot"') == 3 and '</span>a-0,</span> ' in cell

    def test_seeds_are_columns_where_no_row_has_several(self, made):
        folders = [made('a', logged(30.0)), made('b', logged(31.0), seed=1, **{'optim.b2': 0.5})]
        assert report.main([*map(str, folders)]) == 0
        assert [(row['seed'], row['optim.b2']) for row in table(read()[1])] == [('0', '0.999'), ('1', '0.5')]

    def test_runs_on_other_text_are_not_one_row(self, made):
        """The same configuration, but the files that data.path names have changed."""
        one = made('a', logged(30.0), {'source': 'ab', 'tokenizer': 'cd'})
        two = made('b', logged(31.0), {'source': 'ef', 'tokenizer': 'cd'}, seed=1)
        assert report.main([str(one), str(two)]) == 0
        assert [row['run'] for row in table(read()[1])] == ['a', 'b']

    DATA = {'source': 'a' * 32, 'tokenizer': 'b' * 32, 'mode': 'pad', 'seq_length': 256}

    @pytest.mark.parametrize(
        'data, keys, said',
        [
            ({}, {}, None),
            ({'source': 'c' * 32}, {}, 'the documents (a; b)'),
            ({'tokenizer': 'c' * 32}, {}, 'the tokenizer (a; b)'),
            (
                {'mode': 'pack', 'seq_length': 128},
                {},
                'how rows are made (pad: a; pack: b) and the length of rows (256: a; 128: b)',
            ),
            ({}, {'eval.split': 'train'}, 'the split (validation: a; train: b)'),
            ({}, {'eval.tokens': 500}, 'the number of tokens to evaluate on (1000: a; 500: b)'),
            # Of prepared rows the digest follows the tokenizer, and says nothing of the documents.
            ({'source': 'c' * 32, 'tokenizer': 'd' * 32}, {'data.source': 'tokens'}, 'the tokenizer (a; b)'),
            ({'source': 'c' * 32}, {'data.source': 'tokens'}, 'the documents (a; b)'),
        ],
    )
    def test_other_text_is_a_warning(self, made, capsys, data, keys, said):
        lines = [{'step': 10, 'tokens': 9, 'eval/perplexity': 30.0, 'eval/tokens': 1000, 'eval/bits_per_byte': 1.25}]
        evaluated = {'eval.tokens': 1000}
        folders = [
            made('a', lines, self.DATA, **evaluated),
            made('b', lines, self.DATA | data, **(evaluated | keys)),
        ]
        assert report.main([*map(str, folders)]) == 0
        warning = f'Perplexity cannot be compared. The runs differ in {said}. Bits per byte can be compared'
        for text in (capsys.readouterr().err, *read()):
            assert (warning in text) if said else ('cannot be compared' not in text), text

    def test_who_is_apart_is_named_alone(self, made):
        folders = [made(f'a{i}', data=self.DATA, seed=i) for i in range(4)]
        folders.append(made('b', data=self.DATA | {'tokenizer': 'other'}))
        [warning] = overview.overview(inputs.read([*map(str, folders)])[0]).warnings
        assert 'differ in the tokenizer (other: b; all others).' in warning

    def test_text_that_is_not_known(self, made):
        folders = [made('a', data=self.DATA), made('b', data='words'), made('c')]
        [*_, note] = overview.overview(inputs.read([*map(str, folders)])[0]).notes
        assert note == 'The text that b, c read is not known: environment.json does not name it.'

    def test_a_run_that_was_not_finite(self, made):
        """debug/report.json says from when on; one of an attempt before says nothing of a run that is further."""
        for name, step in (('bad', 7), ('old', 3)):
            (made(name, LINES[:1]) / 'debug').mkdir()
            with open(f'{name}/debug/report.json', 'w') as file:
                json.dump({'step': step}, file)
        notes = overview.overview(inputs.read(['bad', 'old'])[0]).notes
        assert notes[0] == 'bad is unfinished: step 5 of 10, evaluated at step 5; not finite from step 7 on.'
        assert notes[1] == 'old is unfinished: step 5 of 10, evaluated at step 5.'

    @pytest.mark.parametrize(
        'line', [{'tokens': None}, {'eval/perplexity': [1.0]}, {'eval/tokens': None}, {'step': 9.5}]
    )
    def test_lines_that_no_run_writes(self, made, line):
        made('a', [{'step': 10, 'tokens': 9, 'eval/perplexity': 30.0, 'eval/tokens': 5} | line], self.DATA)
        assert report.main(['a']) == 0

    def test_the_same_folder_twice(self, made):
        made('a')
        assert report.main(['a', './a', 'a/']) == 0 and len(table(read()[1])) == 1


@pytest.mark.parametrize(
    'value, shown',
    [(153_600, '153,600'), (1_234.5678, '1,235'), (999.94, '999.9'), (0.00012345, '0.0001234'), (-7000.4, '-7,000'),
     (1.5e12, '1.5e+12'), (0.0, '0')],
)  # fmt: skip
def test_numbers_for_people(value, shown):
    assert numbers.short(value) == shown


def test_layers_at_one_step_are_lines_of_all_runs(made):
    """Heat maps only of runs that were measured several times, besides lines of each run's last."""
    key = 'analysis/grad_norm'
    folders = [
        made('a', [{'step': 10, key: [1.0, 2.0, 3.0]}]),
        made('b', [{'step': 10, key: [2.0, 3.0, None]}], seed=1),
    ]
    runs, _, _ = inputs.read(map(str, folders))
    [part] = sections.compose(runs, overview.overview(runs))[-1].parts
    [picture] = part.pictures
    assert picture.caption == 'At step 10.' and 'a from 1 to 3; b from 2 to 3' in picture.alt
    [ax] = picture.figure.axes
    np.testing.assert_equal([line.get_ydata() for line in ax.lines], [[1, 2, 3], [2, 3, np.nan]])

    folders.append(made('c', [{'step': step, key: [step, 2.0, 3.0]} for step in (5, 8)]))
    runs, _, _ = inputs.read(map(str, folders))
    [part] = sections.compose(runs, overview.overview(runs))[-1].parts
    lines, heat = part.pictures
    assert lines.caption == 'At the last step that was measured of each, from 8 to 10.'
    assert [line.get_ydata()[0] for line in lines.figure.axes[0].lines] == [1, 2, 8]
    assert heat.alt.startswith('Heat map of c')


def classified(accuracy, last=0.5):
    """The lines of a run that knows no perplexity; it was evaluated at steps 5 and 10."""
    return [
        {'step': 5, 'tokens': 500, 'train/loss': 2.0, 'eval/accuracy': 0.25, 'eval/loss': 2.5},
        {'step': 10, 'tokens': 1000, 'train/loss': 1.5, 'eval/accuracy': accuracy, 'eval/loss': last},
    ]


def with_headline(monkeypatch, headline, lower=('loss',), digits=4, task=QuestionAnswering):
    """Puts a task with another headline in the place of masked language modelling; returns the key that selects it."""
    attributes = {'headline': headline, 'lower': lower, 'digits': digits}
    monkeypatch.setitem(TASKS, 'masked_language', type('Other', (task,), attributes))
    return {'task.name': 'masked_language'}


class TestHeadline:
    """What runs are compared by is what their task states; a new task needs nothing in the report."""

    def test_every_task_states_one(self):
        assert [inputs.Headline.of_task(task) for task in TASKS.values()]
        [choices] = [field.metadata['choices'] for field in dataclasses.fields(configs.Task) if field.name == 'name']
        assert set(TASKS) == set(choices)

    def test_a_run_from_before_tasks_had_names_is_language_modelling(self, made):
        folder = made('old')
        values = json.loads((folder / 'config.json').read_text())
        del values['task']
        (folder / 'config.json').write_text(json.dumps(values))
        assert report.main(['old']) == 0
        assert [row['perplexity'] for row in table(read()[1])] == ['33.25']

    def test_accuracy(self, made, capsys, monkeypatch):
        """The highest first, four decimals, in every table, figure, caption and warning."""
        text = {'source': 'ab', 'tokenizer': 'cd'}
        lines = classified(0.75) + [{'step': 11, 'tokens': 1100, 'analysis/accuracy_drop': [0.25, -0.125, None]}]
        task = with_headline(monkeypatch, 'accuracy')
        low = made('low', lines, text, **task)
        high = made('high', classified(0.875), text | {'source': 'ef'}, seed=1, **task)
        drop = {'accuracy': {'value': 0.75, 'drop': {'1': measured([-0.5, 0, 0.25])}}}
        drop = {'loss': drop['accuracy'], 'arc_easy/acc': drop['accuracy'], **drop}
        write_analysis(low, 'drop', result('drop', metrics=drop))
        assert report.main([str(low), str(high)]) == 0
        page, text = read()
        rows = table(text)
        assert [(row['run'], row['accuracy']) for row in rows] == [('high', '0.8750'), ('low', '0.7500')]
        assert 'Last evaluation of each run, highest accuracy first' in text
        assert [row['accuracy'] for row in table(text, 'What was run')] == ['0.7500', '0.8750']
        by_step = table(text, 'Accuracy in evaluation, by step')
        assert by_step == [
            {'step': '5', 'low': '0.2500', 'high': '0.2500'},
            {'step': '10', 'low': '0.7500', 'high': '0.8750'},
        ]
        assert 'Accuracy cannot be compared. The runs differ in the documents' in capsys.readouterr().err
        seen = Reader(page)
        assert 'Accuracy in evaluation.' in seen.text and 'Change in accuracy without each layer' in seen.headings
        drops = [heading for heading in seen.headings if heading.startswith('Change in')]
        assert drops[:3] == [f'Change in {name} without each layer' for name in ('accuracy', 'arc_easy/acc', 'loss')]
        assert 'erplexity' not in page + text and 'its per byte' not in page + text

    def test_loss(self, made, monkeypatch):
        lines = [{'step': 10, 'tokens': 9, 'eval/loss': loss} for loss in (2.5, 1.25)]
        task = with_headline(monkeypatch, 'loss')
        folders = [made('worse', lines[:1], **task), made('better', lines[1:], **task)]
        assert report.main([*map(str, folders)]) == 0
        assert [(row['run'], row['loss']) for row in table(read()[1])] == [('better', '1.2500'), ('worse', '2.5000')]

    def test_a_headline_of_several_words(self, made, monkeypatch):
        task = with_headline(monkeypatch, 'exact_match', digits=1)
        made('a', [{'step': 10, 'tokens': 9, 'eval/exact_match': 81.25, 'eval/loss': 1.0}], **task)
        assert report.main(['a']) == 0
        page, text = read()
        assert [row['exact match'] for row in table(text)] == ['81.2']
        assert '## Exact match' in text and 'erplexity' not in page + text

    def test_the_loss_without_layers(self, made, monkeypatch):
        """What is measured during training where a headline is no function of the loss."""
        task = with_headline(monkeypatch, 'accuracy')
        made('a', classified(0.75) + [{'step': 11, 'tokens': 11, 'analysis/loss_drop': [0.5, 0.25, 0.125]}], **task)
        assert report.main(['a']) == 0
        assert 'Change in loss without each layer' in Reader(read()[0]).headings

    def test_runs_of_two_kinds(self, made, monkeypatch):
        """Each has a column of its own; neither is a sample of the other."""
        made('a', logged(30.0)), made('c', (), seed=1)
        made('b', classified(0.75), **with_headline(monkeypatch, 'accuracy'))
        assert report.main(['b', 'c', 'a']) == 0
        text = read()[1]
        rows = table(text)
        assert [(row['run'], row['perplexity'], row['accuracy']) for row in rows] == [
            ('a', '30.00', '-'),
            ('b', '-', '0.7500'),
            ('c', '-', '-'),
        ]
        assert 'lowest perplexity first, highest accuracy first' in text and '## Perplexity and accuracy' in text
        assert list(table(text, 'Accuracy in evaluation')[0]) == ['step', 'b']


def test_the_first_columns_fit_a_narrow_screen(made):
    """Of the first table the name and then the perplexity, whatever else differs."""
    made('a', **{'data.path': 'x' * 300}), made('b', **{'model.norm_eps': 1e-5})
    assert report.main(['a', 'b']) == 0
    assert list(table(read()[1])[0])[:2] == ['run', 'perplexity']
