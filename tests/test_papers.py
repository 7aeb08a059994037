"""Recipes of the papers' tables, the table of sizes in docs/, and the report."""

import functools
import json
import pathlib
import re

import jax
import pytest

from mixln_jax import config as configs
from mixln_jax import main, recipes
from mixln_jax.models import families
from mixln_jax.report import command as report
from mixln_jax.sweeps import grid
from mixln_jax.system.errors import UsageError
from mixln_jax.tasks import build

ROOT = pathlib.Path(__file__).parents[1]
PAPER = ROOT / 'configs/paper'
# Millions of positions of a run (steps times 512 times 256), and parameters by hand.
SIZES = {
    '71m': (1311, 70_578_688), '130m': (2621, 134_105_856), '250m': (5243, 247_370_496), '350m': (7864, 367_969_280),
    '1b': (13107, 1_339_082_752),
}  # fmt: skip
# Some cells of every table, typed from the papers, and how many there are.
CELLS = {
    'mixln_table1': (16, {'71m_post': 35.18, '130m_deepnorm': 27.17, '250m_pre': 21.92, '1b_mix': 18.18}),
    'mixln_table5': (7, {'0': 18.65, '0.33': 18.41, '0.5': 18.86, '1': 1434}),
    'mixln_table6': (5, {'pre': 23.39, 'admin': 24.82, 'group_pre': 23.10, 'sandwich': 23.26, 'mix': 22.33}),
    'mixln_table8': (6, {'pre': 32.18, 'mix_init': 29.77, 'pre_init_embed': 31.28, 'mix_init_embed': 31.19}),
    'lns_table1': (20, {'130m_post': 26.95, '250m_mix': 21.39, '350m_pre': 19.58, '1b_lns': 15.71}),
}


def load(table, cell):
    return configs.build(recipes.load(f'{PAPER / table}.py:{cell}'))


def cells_of(table):
    with pytest.raises(UsageError, match='is not a cell of') as refused:
        load(table, 'none')
    return str(refused.value).partition('with one of ')[2].split(', ')


def test_every_table_is_here():
    assert {path.stem for path in PAPER.glob('*.py')} == {*CELLS, 'mixln_table2', 'mixln_table3', 'mixln_table4'}


@pytest.mark.parametrize('table', CELLS)
def test_every_cell_builds(table):
    count, some = CELLS[table]
    names = cells_of(table)
    assert len(names) == count
    for name in names:
        config = load(table, name)
        builds(config.model)
        [size] = [size for size, (_, number) in SIZES.items() if number == by_hand(config.model)]
        assert round(config.num_steps * config.batch_size * config.seq_length / 1e6) == SIZES[size][0]
        assert config.expected.perplexity > 15 and name in config.expected.source
        # What they report are real tokens, no more than the positions.
        assert 0 < config.expected.tokens < config.num_steps * config.batch_size * config.seq_length
    assert {name: load(table, name).expected.perplexity for name in some} == some


@functools.cache  # most cells have the network of another
def builds(sizes):
    jax.eval_shape(families.from_config(sizes).init, jax.random.key(0))


def by_hand(model):
    D, F = model.hidden_size, model.intermediate_size
    return 2 * model.vocab_size * D + model.num_layers * (4 * D * D + 3 * D * F + 2 * D) + D


AVERAGES = {
    '250m_post': 32.54, '250m_deepnorm': 35.63, '250m_pre': 36.93, '250m_mix': 41.34, '1b_pre': 43.01, '1b_mix': 44.66,
}  # fmt: skip


def test_fine_tuning():
    """The accuracies of Table 2 have the averages that the paper prints."""
    assert cells_of('mixln_table2') == [*AVERAGES]
    for name, average in AVERAGES.items():
        config = load('mixln_table2', name)
        builds(config.model)
        size, scheme = name.split('_')
        assert config.model.norm_position == scheme and SIZES[size][1] == by_hand(config.model)
        assert (config.task.name, config.tune.method, config.num_epochs) == ('instructions', 'lisa', 1)
        tasks = configs.task_accuracies(config.expected.tasks)
        assert [*tasks] == ['mmlu', 'boolq', 'arc_easy', 'piqa', 'hellaswag', 'openbookqa', 'winogrande']
        assert sum(tasks.values()) / 7 == pytest.approx(average, abs=0.005), name
        assert not config.expected.perplexity and config.expected.source == f'Mix-LN Table 2, {name}'


def test_human_feedback():
    """Table 3: three stages of each network, each from the one before; one reward model judges both."""
    names = cells_of('mixln_table3')
    assert names == [f'{placement}_{stage}' for placement in ('pre', 'mix') for stage in ('sft', 'reward', 'online')]
    for name in names:
        placement, stage = name.split('_')
        config = load('mixln_table3', name)
        assert config.model.norm_position == placement and by_hand(config.model) == SIZES['1b'][1]
        task = build.from_config(config, families.from_config(config.model))
        before = f'mixln_table1_1b_{placement}' if stage == 'sft' else f'mixln_table3_{placement}_sft'
        assert config.init_from == f'runs/{before}'
        learned, rate = {'sft': ('instructions', 1e-5), 'reward': ('reward', 2e-5), 'online': ('online', 2e-7)}[stage]
        assert (config.task.name, config.optim.learning_rate) == (learned, rate) and isinstance(
            task, build.TASKS[learned]
        )
        assert not config.expected.perplexity and not config.expected.tasks
    online = [load('mixln_table3', f'{placement}_online') for placement in ('pre', 'mix')]
    assert [config.task.online.reward for config in online] == ['runs/mixln_table3_pre_reward'] * 2
    assert '0.75' in online[0].expected.source and '1.32' in online[1].expected.source
    assert online[0].task.online == online[1].task.online and online[0].task.online.algorithm == 'remax'


def test_images():
    """Table 4: two sizes, each with two placements that differ in nothing else."""
    accuracies = {'ti_pre': 0.6730, 'ti_mix': 0.6734, 's_pre': 0.7599, 's_mix': 0.7640}
    assert cells_of('mixln_table4') == [*accuracies]
    for name, accuracy in accuracies.items():
        config, (size, scheme) = load('mixln_table4', name), name.split('_')
        builds(config.model)
        assert (config.model.norm_position, config.model.hidden_size) == (scheme, {'ti': 192, 's': 384}[size])
        assert (config.expected.accuracy, config.expected.source) == (accuracy, f'Mix-LN Table 4, {name}')
        assert not config.expected.perplexity and not config.expected.tokens


def test_what_the_cells_change():
    assert load('mixln_table5', '0.33').model.post_ratio == 0.33
    assert families.from_config(load('mixln_table5', '0.33').model).norm_position.count('post') == 8
    assert set(families.from_config(load('mixln_table5', '0').model).norm_position) == {'pre'}
    scaled = load('mixln_table8', 'pre_init_embed').model
    assert (scaled.init, scaled.scale_embed, scaled.embed_std) == ('scaled', True, pytest.approx((2 / 3840) ** 0.5))
    assert not load('mixln_table8', 'mix_init').model.scale_embed
    assert load('lns_table1', '350m_lns').model.norm_position == 'lns'


def test_a_table_as_a_sweep():
    """Table 5, whose cells are those that FILE:CELL gives, what the paper expects included."""
    cells = grid.make_cells(file := f'{PAPER}/mixln_table5.py', (), grid.combine((), recipes.sweep(file), []))
    shares = [cell.name.removeprefix('post_ratio=') for cell in cells]
    assert shares == cells_of('mixln_table5')
    assert [cell.config for cell in cells] == [load('mixln_table5', share) for share in shares]


def test_a_table_without_a_cell():
    with pytest.raises(
        UsageError, match=r"mixln_table1.py: '' is not a cell of Mix-LN Table 1; FILE:CELL with one of 71"
    ):
        recipes.load(str(PAPER / 'mixln_table1.py'))


def test_cells_have_work_directories_of_their_own():
    options, _ = main.parse(['--config', f'{PAPER}/mixln_table5.py:0.25'])
    assert options.workdir == 'runs/mixln_table5_0.25'


@pytest.mark.slow  # 13 sizes under every scheme
def test_the_sizes_in_the_docs_are_those_of_the_networks():
    lines = [line for line in (ROOT / 'docs/sizes.md').read_text().splitlines() if re.match(r'\| \d', line)]
    assert len(lines) == 13
    head = [line for line in (ROOT / 'docs/sizes.md').read_text().splitlines() if line.startswith('| size')][0]
    schemes = [word.strip(' `') for word in head.split('|')[4:-1]]
    for line in lines:
        size, _, *numbers = [word.strip() for word in line.split('|')[1:-1]]
        for scheme, number in zip(schemes, numbers[1:], strict=True):
            values = recipes.load(f'{ROOT}/configs/llama_{size}.py', [('model.norm_position', scheme)])
            model = configs.build(values).model
            params = jax.eval_shape(families.from_config(model).init, jax.random.key(0))['params']
            assert f'{families.from_config(model).num_params(params):,}' == number, (size, scheme)


class TestReport:
    @pytest.fixture(autouse=True)
    def elsewhere(self, tmp_path, monkeypatch):
        """The report's own folder goes into the working directory."""
        monkeypatch.chdir(tmp_path)

    def run(self, folder, got, step=10, **expected):
        folder.mkdir()
        config = configs.default()
        config.num_steps, config.model.num_layers, config.model.norm_position = 10, 3, 'post,pre*2'
        config.expected.update(expected)
        values = config.to_dict()
        values['model'] |= {'norm_position': ['post', 'pre', 'pre'], 'layer_index': [1, 2, 3], 'depth': 3}
        (folder / 'config.json').write_text(json.dumps(values))
        lines = [{'step': 5, 'tokens': 500, 'eval/perplexity': 99.0}, {'step': step, 'tokens': 1_200_000_000}]
        if got:
            lines[1]['eval/perplexity'] = got
        (folder / 'metrics.jsonl').write_text(''.join(f'{json.dumps(line)}\n' for line in lines))
        return str(folder)

    def test_got_paper_and_difference(self, tmp_path, capsys):
        one = self.run(tmp_path / 'one', 33.0, perplexity=30.0, source='Mix-LN Table 1, 71m_mix')
        two = self.run(tmp_path / 'two', None, step=7)
        assert report.main([one, two]) == 0
        head, _, first, second = [
            [word.strip() for word in line.split('|')[1:-1]]
            for line in capsys.readouterr().out.splitlines()
            if line.startswith('|')
        ]
        placed = {'placement': 'post x 1, pre x 2', 'tokens': '1,200,000,000'}
        assert dict(zip(head, first, strict=True)) == placed | {
            'run': 'one',
            'perplexity': '33.00',
            'paper': '30.00',
            'difference': '+3.00 (+10.0%)',
            'steps': '10',
            'source': 'Mix-LN Table 1, 71m_mix',
        }
        nothing = dict.fromkeys(('paper', 'difference', 'source'), '-')
        assert dict(zip(head, second, strict=True)) == placed | nothing | {
            'run': 'two',
            'perplexity': '99.00',
            'steps': '7 of 10',
        }

    def test_folders_that_are_no_runs_are_skipped(self, tmp_path, capsys):
        """With one note, also a Hugging Face folder, a file, and the folder of an older report."""
        one = self.run(tmp_path / 'one', 33.0)
        began = self.run(tmp_path / 'began', None)
        (tmp_path / 'began/metrics.jsonl').unlink()
        others = [str(tmp_path / name) for name in ('exported', 'notes', 'todo.txt')]
        (tmp_path / 'exported').mkdir(), (tmp_path / 'notes').mkdir(), (tmp_path / 'todo.txt').touch()
        (tmp_path / 'exported/config.json').write_text('{"architectures": ["LlamaForCausalLM"]}')
        assert report.main([one, *others, began]) == 0
        shown = capsys.readouterr()
        assert '33.00' in shown.out and '0 of 10' in shown.out
        assert shown.err == (
            f'mixln_jax: warning: skipped 3 that are not runs: {", ".join(others)} (no config.json of a run)\n'
        )
        assert report.main([others[0], 'nowhere', *others[1:]]) == 2
        said = capsys.readouterr().err.splitlines()
        assert len(said) == 2 and 'nowhere/config.json' in said[0] and ', '.join(others) in said[1]

    def test_a_damaged_configuration_is_no_reason_to_skip(self, tmp_path, capsys):
        """What was a run is named, exit 2, and the others are shown."""
        one, two = self.run(tmp_path / 'one', 33.0), self.run(tmp_path / 'two', 34.0)
        (tmp_path / 'two/config.json').write_text('{"seed": 0, "mod')
        assert report.main([one, two]) == 2
        shown = capsys.readouterr()
        assert '33.00' in shown.out and 'two/config.json: not the configuration of a run' in shown.err

    def test_the_last_perplexity_counts(self, tmp_path, capsys):
        """Also where it was not finite, which is null in metrics.jsonl."""
        one = self.run(tmp_path / 'one', 33.0)
        with open(tmp_path / 'one/metrics.jsonl', 'a') as lines:
            lines.write('{"step": 20, "eval/perplexity": null}\n')
        assert report.main([one]) == 0
        assert 'not finite' in capsys.readouterr().out

    @pytest.mark.parametrize('words, message', [(['nowhere'], 'nowhere/config.json'), ([], 'required')])
    def test_bad_input(self, capsys, words, message):
        assert report.main(words) == 2
        error = capsys.readouterr().err
        assert message in error and len(error.splitlines()) == 1
