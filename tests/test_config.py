"""Recipes, overrides, and what a user gets for a wrong key."""

import argparse
import json
import pathlib
import pickle
import re
import sys

import jax
import numpy as np
import pytest

from mixln_jax import config as configs
from mixln_jax import main, recipes
from mixln_jax.data.images import augment
from mixln_jax.models import families, placements
from mixln_jax.program import optim
from mixln_jax.system import cli
from mixln_jax.system.errors import UsageError
from mixln_jax.tasks import build

RECIPES = pathlib.Path(__file__).parents[1] / 'configs'
# The authors' JSON files: hidden, MLP, heads, layers, parameters (untied head, final norm included).
SIZES = {
    '9m': (128, 352, 4, 4),
    '20m': (256, 688, 4, 4),
    '35m': (384, 1024, 8, 6),
    '40m': (416, 1024, 8, 8),
    '60m': (512, 1376, 8, 8),
    '71m': (512, 1368, 8, 12),
    '100m': (640, 1708, 10, 12),
    '130m': (768, 2048, 12, 12),
    '250m': (768, 2560, 16, 24),
    '350m': (1024, 2736, 16, 24),
    '1b': (2048, 5461, 32, 24),
    '3b': (2560, 6848, 32, 32),
    '7b': (4096, 11008, 32, 32),
}


@pytest.mark.parametrize('size', SIZES)
def test_recipes_have_the_official_sizes(size):
    config = configs.build(recipes.load(str(RECIPES / f'llama_{size}.py')))
    model, (width, mlp, heads, layers) = config.model, SIZES[size]
    assert (model.hidden_size, model.intermediate_size, model.num_heads, model.num_layers) == (
        width,
        mlp,
        heads,
        layers,
    )
    vocab = 32100 if size == '100m' else 32000
    params = jax.eval_shape(families.from_config(model).init, jax.random.key(0))['params']
    by_hand = 2 * vocab * width + layers * (4 * width**2 + 3 * width * mlp + 2 * width) + width
    assert families.from_config(model).num_params(params) == by_hand
    assert (config.batch_size, config.seq_length, config.data.name) == (512, 256, 'c4/en')


VITS = {'vit_fashion_mnist', 'vit_quickstart', 'vit_ti_cifar10'} | {
    f'vit_{size}16_i1k{suffix}' for size in ('ti', 's') for suffix in ('', '_convnext')
}
OTHERS = {'quickstart', 'books', 'bert_quickstart'} | VITS


def test_every_size_has_a_recipe():
    assert {path.stem for path in RECIPES.glob('*.py')} == {f'llama_{size}' for size in SIZES} | OTHERS


# Parameters of timm's vit_tiny_patch16_224 and vit_small_patch16_224; with sines as positions and no token
# there are 198 D fewer, and with a representation D(D + 1) more.
@pytest.mark.parametrize('size, width, parameters', [('ti', 192, 5_717_416), ('s', 384, 22_050_664)])
def test_vits_have_the_published_sizes(size, width, parameters):
    for name, wanted in (
        (f'vit_{size}16_i1k_convnext', parameters),
        (f'vit_{size}16_i1k', parameters - 198 * width + width * (width + 1)),
    ):
        config = configs.build(recipes.load(str(RECIPES / f'{name}.py')))
        model = families.from_config(config.model)
        assert model.num_params(jax.eval_shape(model.init, jax.random.key(0))['params']) == wanted
        assert (config.model.num_layers, config.data.name, config.optim.name) == (12, 'imagenet2012', 'adamw')
        optim.schedule(config.optim, 200_000), optim.optimizer(config.optim)


@pytest.mark.parametrize('name', sorted(VITS))
def test_images_of_recipes_can_be_varied(name):
    config = configs.build(recipes.load(str(RECIPES / f'{name}.py')))
    task = build.from_config(config, families.from_config(config.model))
    augment.Augmentation(config.data.images, config.model.image_size)
    assert task.batch_spec(2)['images'].shape[1] == config.model.image_size


@pytest.mark.parametrize('norm_position', ['pre', 'post', 'deepnorm', 'lns', 'sandwich', 'res_post', 'mix'])
def test_any_placement_on_a_recipe(norm_position):
    values = recipes.load(str(RECIPES / 'llama_130m.py'), [('model.norm_position', norm_position)])
    model = families.from_config(configs.build(values).model)
    jax.eval_shape(model.init, jax.random.key(0))
    assert len(model.norm_position) == 12


def test_overrides_take_the_type_of_the_key():
    values = recipes.load(
        str(RECIPES / 'quickstart.py'), [('num_steps', '7'), ('optim.learning_rate', '1'), ('deterministic', 'True')]
    )
    config = configs.build(values)
    assert (config.num_steps, config.optim.learning_rate, config.deterministic) == (7, 1.0, True)
    assert isinstance(config.optim.learning_rate, float)


@pytest.mark.parametrize(
    'key, text, value',
    [
        ('num_steps', '1e3', 1000),
        ('num_steps', '1_000', 1000),
        ('num_steps', ' 20.0', 20),
        ('mesh.data', '-1e0', -1),
        ('data.seed', str(2**32 - 1), 2**32 - 1),
        ('eval.tokens', '1E7', 10_000_000),
        ('optim.learning_rate', '1_0e-3', 0.01),
        ('model.scan_unroll', '1', '1'),
        *(('deterministic', text, True) for text in ('1', 'TRUE', 'yes', 'Yes')),
        *(('deterministic', text, False) for text in ('0', 'False', 'NO', 'no ')),
    ],
)
def test_numbers_and_booleans_as_people_write_them(key, text, value):
    assert repr(configs.flatten(configs.build(with_overrides((key, text))))[key]) == repr(value)  # the type too


def with_overrides(*pairs):
    return recipes.load(str(RECIPES / 'quickstart.py'), pairs)


@pytest.mark.parametrize(
    'key, given, value',
    [
        ('num_steps', 1e3, 1000),
        ('num_steps', np.int64(7), 7),
        ('optim.learning_rate', 1, 1.0),
        ('optim.learning_rate', np.float32(0.5), 0.5),
        ('deterministic', 1, True),
        ('deterministic', 0.0, False),
    ],
)
def test_numbers_of_another_type_in_recipes(tmp_path, key, given, value):
    """In a recipe, in nested dicts and in a config.json that someone has edited."""
    group, _, name = key.rpartition('.')
    config = configs.default()
    setattr(config[group] if group else config, name, given)
    for values in (config, config.copy_and_resolve_references(), {group: {name: given}} if group else {name: given}):
        assert repr(configs.flatten(configs.build(values))[key]) == repr(value)
    config = configs.default()
    config.update_from_flattened_dict({key: given})
    assert repr(config.to_dict()) == repr(pickle.loads(pickle.dumps(config)).to_dict())
    assert configs.flatten(config.to_dict())[key] == value


@pytest.mark.parametrize('given', [1.5, np.inf, np.nan, True, '7', None, 1e300])
def test_what_is_no_integer(given):
    with pytest.raises((UsageError, TypeError), match='num_steps'):
        config = configs.default()
        config.num_steps = given
        configs.build(config)
    with pytest.raises(UsageError, match='config.num_steps must be'):
        configs.build({'num_steps': given})


def test_numbers_of_options(capsys):
    parser = argparse.ArgumentParser()
    parser.add_argument('--tokens', type=int)
    parser.add_argument('--mfu', type=float)
    options = cli.parse(parser, ['--tokens', '1e6', '--mfu', '1_0e-1'])
    assert repr((options.tokens, options.mfu)) == '(1000000, 1.0)'
    for option, text in (('tokens', '1e3.5'), ('tokens', '1.5'), ('tokens', 'inf'), ('mfu', 'nan'), ('mfu', 'inf')):
        with pytest.raises(UsageError, match=f'--{option}: invalid .* value: .{text}'):
            cli.parse(parser, [f'--{option}', text])
    assert cli.split_list(' a, b ,,c') == ['a', 'b', 'c'] and not cli.split_list(' , ')


def test_hyphens_in_the_names_of_options(capsys):
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument('--seq_length', type=int)
    parser.add_argument('--data_dir')
    parser.add_argument('words', nargs='*')
    wanted = {'seq_length': 64, 'data_dir': 'my-data', 'words': []}
    for words in (['--seq_length=64', '--data_dir', 'my-data'], ['--seq-length', '64', '--data-dir=my-data']):
        assert vars(cli.parse(parser, words)) == wanted
    assert cli.parse(parser, ['--data-dir=--seq-length']).data_dir == '--seq-length'
    assert cli.parse(parser, ['--', '--seq-length', 'a-b']).words == ['--seq-length', 'a-b']
    others = ['--config.data.path=x-y', '--config.seq-length=1', '--seq-lengths=1']
    assert cli.parse_known(parser, ['--seq-length', '1', *others])[1] == others
    with pytest.raises(UsageError, match='unrecognized arguments: --seq-lengths'):
        cli.parse(parser, ['--seq-lengths'])
    with pytest.raises(UsageError, match='argument --seq_length: invalid int value'):
        cli.parse(parser, ['--seq-length', 'long'])
    with pytest.raises(SystemExit):
        cli.parse(parser, ['--help'])
    assert '--seq_length' in (shown := capsys.readouterr().out) and '--seq-length' not in shown


@pytest.mark.parametrize(
    'path, text, words',
    [
        ('learning_rate', '1', r'unknown key config\.learning_rate, did you mean config\.optim\.learning_rate\?'),
        ('model.batch_size', '1', r'unknown key config\.model\.batch_size, did you mean config\.batch_size\?'),
        ('learning_rte', '1', r'config\.learning_rte, did you mean config\.optim\.learning_rate\?'),
        ('training.learning_rate', '1', r'unknown key config\.training, did you mean config\.optim\.learning_rate\?'),
        ('data.batchsize', '1', r'did you mean config\.batch_size\?'),
        ('path', 'x', r'unknown key config\.path, did you mean config\.data\.path\?'),
        ('split', 'x', r'did you mean config\.data\.split or config\.eval\.split\?'),
        ('zzz', 'x', r'unknown key config\.zzz; --help lists the keys$'),
        ('num_steps', '1e3.5', "config.num_steps must be of type int, not '1e3.5'"),
        ('num_steps', 'inf', "config.num_steps must be of type int, not 'inf'"),
        ('num_steps', 'nan', "config.num_steps must be of type int, not 'nan'"),
        ('num_steps', 'true', 'config.num_steps must be of type int'),
        ('deterministic', '2', 'config.deterministic must be true or false'),
        ('deterministic', '', 'config.deterministic must be true or false'),
        ('modl.num_layers', '3', r'unknown key config\.modl, did you mean config\.model\.num_layers\?'),
        ('model.num_layer', '3', r'unknown key config\.model\.num_layer, did you mean num_layers\?'),
        ('model.num_layers', 'many', "config.model.num_layers must be of type int, not 'many'"),
        ('model.num_layers', '1.5', 'config.model.num_layers must be of type int'),
        ('model', '3', 'config.model is a group of keys'),
        ('num_steps.x', '3', 'config.num_steps.x is not a key'),
        ('deterministic', 'maybe', 'config.deterministic must be true or false'),
        ('optim.learning_rate', 'nan', 'config.optim.learning_rate must be a finite number'),
        ('optim.learning_rate', 'inf', 'config.optim.learning_rate must be a finite number'),
        ('optim.learning_rate', '-1e-3', 'config.optim.learning_rate must be above 0'),
        ('optim.name', 'adamm', 'config.optim.name=.* did you mean adam'),
        ('optim.weight_decay', '0.1', 'config.optim.weight_decay needs'),
        ('model.family', 'gpt', "config.model.family='gpt' is not one of llama, bert"),
        ('model.post_ratio', '1.1', 'config.model.post_ratio must be at most 1'),
        ('model.post_ratio', '-0.1', 'config.model.post_ratio must be at least 0'),
        ('model.num_layers', '0', 'config.model.num_layers must be at least 1'),
        ('model.num_heads', '5', 'config.model.hidden_size=96 is not divisible by config.model.num_heads=5'),
        ('model.num_kv_heads', '2', 'is not divisible by config.model.num_kv_heads=2'),
        ('model.head_dim', '-2', 'config.model.head_dim must be at least 0'),
        ('model.rope_type', 'yarn', "config.model.rope_type='yarn' is not one of default, llama3"),
        ('model.rope_factor', '0.5', 'config.model.rope_factor must be at least 1'),
        (
            'model.rope_low_freq_factor',
            '4',
            'rope_high_freq_factor=4 must be above config.model.rope_low_freq_factor=4',
        ),
        ('model.tie_word_embeddings', 'perhaps', 'config.model.tie_word_embeddings must be true or false'),
        ('num_steps', str(10**20), 'config.num_steps must be below'),
        ('batch_size', str(10**14), 'config.batch_size must be at most'),
        ('seq_length', str(10**12), 'config.seq_length must be at most'),
        ('data.workers', '100000', 'config.data.workers must be at most 1024'),
        ('optim.learning_rate', '1e39', 'config.optim.learning_rate must be at most'),
        ('num_steps', '0', 'config.num_steps must be at least 1'),
        ('num_steps', '-5', 'config.num_steps must be at least 0'),
        ('mesh.data', '0', 'config.mesh.data must be'),
        ('optim.b2', 'abc', "config.optim.b2 must be a number or auto, not 'abc'"),
        ('optim.b2', '', "config.optim.b2 must be a number or auto, not ''"),
        ('optim.b1', '1', 'config.optim.b1 must be below 1'),
        ('optim.eps', 'nan', 'config.optim.eps must be a finite number'),
    ],
)
def test_wrong_values_are_named(path, text, words):
    with pytest.raises(UsageError, match=words):
        configs.build(recipes.load(str(RECIPES / 'quickstart.py'), [(path, text)]))


@pytest.mark.parametrize(
    'recipe, words',
    [
        ('def get_config(:\n', r'recipe\.py:1: SyntaxError'),
        ('x = 3\n', 'a recipe needs a function get_config'),
        ('def get_config():\n    return 3\n', 'get_config returned int'),
        ('raise SystemExit(3)\n', r'recipe\.py:1: SystemExit'),
        ('class Own(BaseException): pass\nraise Own("why")\n', r'recipe\.py:2: Own: why'),
        ('class Own(Exception):\n  def __str__(self): return 1 / 0\nraise Own\n', r'recipe\.py:3: Own: Own'),
        ('def f(): f()\nf()\n', r'recipe\.py:1: RecursionError: '),
        ('(' * 5000, r'recipe\.py'),
        ('x = "\0"\n', r'recipe\.py'),
        (
            'from mixln_jax import config\ndef get_config():\n    c = config.default()\n    c.num_stes = 3\n',
            r'recipe\.py:4: unknown key num_stes, did you mean num_steps\?',
        ),
        (
            'from mixln_jax import config\ndef get_config():\n    c = config.default()\n    c.num_steps = "x"\n',
            r'recipe\.py:4: TypeError.*num_steps',
        ),
    ],
)
def test_errors_in_a_recipe_name_the_line(tmp_path, recipe, words):
    (tmp_path / 'recipe.py').write_text(recipe)
    with pytest.raises(UsageError) as error:
        recipes.load(str(tmp_path / 'recipe.py'))
    assert re.search(words, str(error.value).replace('\n', ' '))


DEFAULT = 'from mixln_jax import config\nc = config.default()\ndef get_config():\n'


@pytest.mark.parametrize(
    'line, words',
    [
        ('c.learning_rate = 3', r'unknown key learning_rate, did you mean config\.optim\.learning_rate\?'),
        ('c.model.learning_rte = 3', r'unknown key learning_rte, did you mean config\.optim\.learning_rate\?'),
        ('c.optim.update(learning_rat=3)', r'unknown key learning_rat, did you mean learning_rate\?'),
        ('c.optimiser.learning_rate = 3', r'unknown key optimiser, did you mean optim\?'),
        ('c.seed = c.learning_rate', r'unknown key learning_rate, did you mean config\.optim\.learning_rate\?'),
        ('c["optim.seed"]', r'unknown key seed, did you mean config\.seed or config\.data\.seed\?'),
        ('c.seed.x', "AttributeError: 'int' object has no attribute 'x'"),
        ('{}["learning_rate"]', "KeyError: 'learning_rate'"),
        ('c.num_steps = 1.5', 'TypeError.*num_steps'),
        ('import json; json.loads("{")', 'JSONDecodeError'),
    ],
)
def test_errors_of_keys_in_a_recipe_say_where_the_key_is(tmp_path, line, words):
    (tmp_path / 'recipe.py').write_text(f'{DEFAULT}    {line}\n    return c\n')
    with pytest.raises(UsageError, match=rf'recipe\.py:4: {words}'):
        recipes.load(str(tmp_path / 'recipe.py'))
    assert not hasattr(configs.default(), 'learning_rate') and configs.default().get('learning_rate', 3) == 3


class TestRecipesArePython:
    def write(self, folder, name, *lines):
        folder.mkdir(exist_ok=True)
        (folder / f'{name}.py').write_text('\n'.join(lines))
        return str(folder / f'{name}.py')

    def test_dataclasses_of_their_own(self, tmp_path):
        """Whose annotations are strings; instances are copied and pickled as those of any module."""
        lines = (
            'from __future__ import annotations',
            'import copy, dataclasses, pickle',
            'from mixln_jax import config',
            '@dataclasses.dataclass',
            'class Mine:',
            '    steps: int = {}',
            '    kind: dataclasses.KW_ONLY = None',
            'def get_config():',
            '    c = config.default()',
            '    c.num_steps = pickle.loads(pickle.dumps(copy.deepcopy(Mine()))).steps',
            '    return c',
        )
        for folder, name, steps in (('a', 'recipe', 10), ('b', 'recipe', 20), ('b', 'json', 30), ('b', 'my v1.2', 40)):
            path = self.write(tmp_path / folder, name, *lines).format()
            pathlib.Path(path).write_text(pathlib.Path(path).read_text().replace('{}', str(steps)))
            assert recipes.load(path).num_steps == steps
        assert sys.modules['json'] is json
        mine = {
            module.Mine for name, module in sys.modules.items() if name.startswith('recipe_') and 'Mine' in vars(module)
        }
        assert len(mine) == 4 and all(pickle.loads(pickle.dumps(kind())) == kind() for kind in mine)

    def test_neighbours_are_those_of_the_folder(self, tmp_path, monkeypatch):
        """Also where another folder's have their names, or modules of Python; none stays."""
        recipe = (
            'import base, statistics',
            DEFAULT,
            '    import later',
            '    c.seed = base.SEED + later.SEED',
            '    statistics.mean',
            '    return c',
        )
        for folder, seed in (('a', 1), ('b', 2), ('cwd', 3)):
            self.write(tmp_path / folder, 'base', f'SEED = {seed}')
            self.write(tmp_path / folder, 'later', f'SEED = 10 * {seed}')
            if folder != 'cwd':
                self.write(tmp_path / folder, 'statistics', 'raise ValueError')
            (tmp_path / folder / 'ml_collections').mkdir()  # no package
        monkeypatch.syspath_prepend(tmp_path / 'cwd')
        monkeypatch.delitem(sys.modules, 'statistics', raising=False)
        before = len(sys.meta_path)
        for folder, seed in (('a', 11), ('b', 22), ('a', 11)):
            assert recipes.load(self.write(tmp_path / folder, 'recipe', *recipe)).seed == seed
        assert not {'base', 'later'} & {*sys.modules} and len(sys.meta_path) == before

    def test_a_recipe_that_is_written_again_at_once(self, tmp_path):
        for seed in range(5):
            path = self.write(tmp_path, 'recipe', DEFAULT, f'    c.seed = {seed}', '    return c')
            assert recipes.load(path).seed == seed
        assert [path.name for path in tmp_path.iterdir()] == ['recipe.py']

    def test_errors_in_a_neighbour(self, tmp_path):
        path = self.write(tmp_path, 'recipe', 'import base')
        for lines, message in ((['', 'x = 1 +'], 'base.py:2: SyntaxError'), (['', '', '1 / 0'], 'base.py:3: ZeroDiv')):
            self.write(tmp_path, 'base', *lines)
            with pytest.raises(UsageError, match=f'^{tmp_path}/{message}'):
                recipes.load(path)

    def test_what_is_not_python(self, tmp_path):
        (tmp_path / 'config.json').write_text('{}')
        with pytest.raises(UsageError, match='config.json is not a Python file'):
            recipes.load(str(tmp_path / 'config.json'))


def test_recipe_with_an_argument(tmp_path):
    (tmp_path / 'recipe.py').write_text(
        'from mixln_jax import config\n\ndef get_config(n):\n'
        '    c = config.default()\n    c.seed = int(n)\n    return c\n'
    )
    assert recipes.load(f'{tmp_path}/recipe.py:5').seed == 5


def test_nested_dicts_are_checked_too():
    with pytest.raises(UsageError, match=r'unknown key config\.optim\.lr'):
        configs.build({'optim': {'lr': 1e-3}})
    with pytest.raises(UsageError, match=r'config\.optim must be a group'):
        configs.build({'optim': 3})


class TestNumbersOrAuto:
    published = {
        'adam': (0.9, 0.999, 1e-8),
        'adamw': (0.9, 0.999, 1e-8),
        'sgd': (0.9, None, None),
        'lion': (0.9, 0.99, None),
        'adafactor': (None, None, None),
        'muon': (0.95, 0.95, 1e-8),
        'galore': (0.9, 0.999, 1e-6),
    }

    @pytest.mark.parametrize('name', published)
    def test_auto_is_what_is_published(self, name):
        values = recipes.load(str(RECIPES / 'llama_9m.py'), [('optim.name', name)])
        assert (values.optim.b1, values.optim.b2, values.optim.eps) == ('auto',) * 3
        for made in (configs.build(values).optim, configs.Optim(name=name)):
            for key, number in zip(('b1', 'b2', 'eps'), self.published[name], strict=True):
                assert getattr(made, key) == number or number is None

    @pytest.mark.parametrize('text, number', [('auto', 0.99), ('0.95', 0.95), ('1e-3', 1e-3), ('0', 0.0)])
    def test_on_the_command_line(self, text, number):
        overrides = [('optim.name', 'lion'), ('optim.b2', text)]
        built = configs.build(recipes.load(str(RECIPES / 'quickstart.py'), overrides)).optim.b2
        assert built == number and type(built) is float

    @pytest.mark.parametrize('given, number', [('0.95', 0.95), ('"auto"', 0.999), ('0', 0.0)])
    def test_in_a_recipe_and_in_json(self, tmp_path, given, number):
        (tmp_path / 'recipe.py').write_text(
            'from mixln_jax import config\n\ndef get_config():\n'
            f'    c = config.default()\n    c.optim.b2 = {given}\n    c.optim.update(eps=1)\n    return c\n'
        )
        made = configs.build(recipes.load(str(tmp_path / 'recipe.py'))).optim
        assert (made.b2, made.eps) == (number, 1.0)
        assert configs.build({'optim': {'b2': json.loads(given)}}).optim.b2 == number

    @pytest.mark.parametrize('value', ['0.9', 'Auto', True, None, [0.9]])
    def test_what_is_neither(self, value):
        with pytest.raises(UsageError, match='config.optim.b1 must be a number or auto, not'):
            configs.build({'optim': {'b1': value}})

    def test_a_run_that_goes_on_keeps_its_own(self):
        earlier = configs.build({'optim': {'name': 'lion', 'b1': 0.0, 'b2': 0.999}})
        made = configs.build({'optim': {'name': 'lion', 'b2': 'auto', 'eps': 0.5}}, earlier).optim
        assert (made.b1, made.b2, made.eps) == (0.0, 0.999, 0.5)
        assert configs.build({'optim': {'name': 'lion', 'b2': 0.9}}, earlier).optim.b2 == 0.9

    def test_help_says_what_it_comes_to(self):
        [line] = [line for line in recipes.help_text().splitlines() if '--config.optim.b2 ' in line]
        assert "0.999 (lion 0.99, muon 0.95); a run that continues keeps its own [float or auto, 'auto']" in line


class TestCommandLine:
    def parse(self, *words):
        return main.parse(words)

    def test_both_spellings_in_any_order(self):
        recipe = str(RECIPES / 'quickstart.py')
        options, config = self.parse('--config.num_steps=3', '--config', recipe, '--config.seed', '4')
        assert (config.num_steps, config.seed, options.workdir) == (3, 4, 'runs/quickstart')

    @pytest.mark.parametrize(
        'recipe, workdir',
        [
            ('configs/quickstart.py', 'runs/quickstart'),
            ('configs/finetune/quickstart.py', 'runs/finetune_quickstart'),
            ('configs/paper/mixln_table5.py:0.25', 'runs/mixln_table5_0.25'),
            ('/a/configs/b/configs/c/d/my.recipe.py', 'runs/c_d_my.recipe'),
            ('a/b/mine.py:x_1', 'runs/mine_x_1'),
        ],
    )
    def test_work_directories_by_the_path_of_a_recipe(self, monkeypatch, tmp_path, recipe, workdir):
        monkeypatch.chdir(tmp_path)
        assert recipes.default_workdir(recipe) == workdir

    def test_recipes_do_not_share_a_work_directory(self):
        """None trains where another does, nor where it begins from."""
        files = [str(path) for path in RECIPES.glob('**/*.py')]
        assert len({recipes.default_workdir(file) for file in files}) == len(files)
        begins = {'finetune/quickstart.py': 'quickstart.py', 'preferences/dpo_quickstart.py': 'finetune/quickstart.py'}
        begins['preferences/reward_quickstart.py'] = 'finetune/quickstart.py'
        for recipe, base in begins.items():
            options, config = self.parse('--config', str(RECIPES / recipe))
            assert config.init_from == recipes.default_workdir(str(RECIPES / base)) != options.workdir

    @pytest.mark.parametrize(
        'words, message',
        [
            ((), '--config FILE is missing'),
            (('--config',), 'expected one argument'),
            (
                ('--config', str(RECIPES / 'quickstart.py'), '--config.seed', '--config.num_steps=3'),
                'config.seed needs',
            ),
            (('--config', str(RECIPES / 'quickstart.py'), '--config.KEY=3'), 'unknown key config.KEY'),
            (('--config', 'nope.py'), 'there is no file nope.py'),
            (('--config', str(RECIPES / 'quickstart.py'), 'more'), "unexpected argument 'more'"),
            (('--config', str(RECIPES / 'quickstart.py'), '--workdri=x'), "unexpected argument '--workdri=x'; --help"),
            (
                ('--config', str(RECIPES / 'quickstart.py'), '--learning_rate=1'),
                "unexpected argument '--learning_rate=1', did you mean --config.optim.learning_rate",
            ),
            (('--config', str(RECIPES / 'quickstart.py'), '--config.seed'), '--config.seed needs a value'),
        ],
    )
    def test_errors(self, words, message):
        with pytest.raises(UsageError, match=message):
            self.parse(*words)

    def test_help_exits_with_0_and_names_every_key(self, capsys):
        with pytest.raises(SystemExit) as end:
            main.main(['--help'])
        assert end.value.code == 0
        shown = capsys.readouterr().out
        lines = {line.split()[0]: line for line in shown.splitlines() if line.strip().startswith('--config.')}
        assert [*lines] == [f'--config.{name}' for name in configs.flatten(configs.Config())]
        listed = re.search(r'\((pre \| .*?)\)', lines['--config.model.norm_position'])[1].split(' | ')
        assert {*listed} == {*placements.PLACEMENTS, *placements.SCHEMES}
        assert 'post*3,pre*9' in lines['--config.model.norm_position']

    def test_help_with_a_recipe_has_its_values(self, capsys):
        words = ['--help', '--config', str(RECIPES / 'quickstart.py'), '--config.optim.b1=0.8']
        with pytest.raises(SystemExit) as end:
            main.main(words)
        assert end.value.code == 0
        shown, recipe = capsys.readouterr().out, with_overrides(('optim.b1', '0.8'))
        values, default = (configs.flatten(of.to_dict()) for of in (recipe, configs.default()))
        for name in values:
            [line] = [line for line in shown.splitlines() if f' --config.{name} ' in line]
            changed = values[name] != default[name]
            assert f', {values[name]!r}{f"; default {default[name]!r}" if changed else ""}]' in line
            assert line.startswith('* ' if changed else '  ')
        assert "[float or auto, 0.8; default 'auto']" in shown and 'quickstart.py' in shown
        assert main.main([*words, '--config.seed=x']) == 2


class TestSchedules:
    def rates(self, **changes):
        schedule = optim.schedule(configs.Optim(learning_rate=2.0, **changes), 100)
        return [float(schedule(step)) for step in range(100)]

    @pytest.mark.parametrize('name', ['cosine', 'linear', 'constant'])
    def test_warm_up_peak_and_end(self, name):
        rates = self.rates(schedule=name)
        assert rates[0] == pytest.approx(0.2)
        assert rates[9] == pytest.approx(2.0)
        assert rates[99] == pytest.approx(2.0 if name == 'constant' else 0.2)
        middle = {'cosine': 0.2 + 1.8 / 2, 'linear': 1.1, 'constant': 2.0}[name]
        assert rates[54] == pytest.approx(middle)

    def test_wsd(self):
        rates = self.rates(schedule='wsd', decay_ratio=0.4)
        assert rates[4] == pytest.approx(1.0) and rates[9:60] == pytest.approx([2.0] * 51)
        assert rates[79] == pytest.approx(1.1) and rates[99] == pytest.approx(0.2)
        assert self.rates(schedule='wsd', decay_ratio=1.0)[99] == pytest.approx(0.2)

    def test_no_warm_up(self):
        assert self.rates(warmup_ratio=0.0, schedule='linear')[0] == pytest.approx(2 - 0.018)


@pytest.mark.parametrize('stall, good', [(0, True), (1, True), (0.999, False), (1e-9, False)])
def test_stacks_are_not_shown_more_often_than_every_second(stall, good):
    """More often Python itself crashes."""
    if good:
        assert configs.build({'processes': {'stall': stall}}).processes.stall == stall
        return
    with pytest.raises(UsageError, match='config.processes.stall=.* must be 0 or at least 1 second'):
        configs.build({'processes': {'stall': stall}})
