"""What may change when a run goes on: the keys written out here, which docs/contracts.md lists, and no others."""

import json
import pathlib
import re

import pytest

from mixln_jax import config as configs
from mixln_jax import main, recipes
from mixln_jax.runs import continuation
from mixln_jax.system.errors import UsageError

ROOT = pathlib.Path(__file__).parents[2]
# A new key is refused until somebody puts it here, into config.py as one that may change, and into docs/contracts.md.
MAY_CHANGE = {
    *('device', 'accumulate', 'log_every', 'model.remat', 'model.scan_unroll', 'model.attention'),
    *(
        'data.workers',
        'data.path',
        'data.validation_path',
        'data.skip_bad',
        'data.data_dir',
        'data.tokenizer_path',
        'init_from',
        'resume_from',
    ),
    *('eval.every', 'eval.tokens', 'eval.split', 'eval.samples', 'eval.first'),
    *('checkpoint.every', 'checkpoint.keep', 'checkpoint.keep_every', 'checkpoint.minutes', 'checkpoint.best'),
    *('mesh.data', 'mesh.fsdp', 'mesh.tensor'),
    *('processes.timeout', 'processes.secret', 'processes.stall'),
    *('analysis.every', 'analysis.tokens'),
    *('stability.every', 'stability.rows'),
    *('profile.start', 'profile.steps'),
    *('expected.perplexity', 'expected.tokens', 'expected.tasks', 'expected.accuracy', 'expected.source'),
}
RESOLVED = configs.flatten(configs.Config()) | {
    'model.norm_position': ['post', 'pre', 'pre'],
    'model.layer_index': [1, 2, 3],
    'model.depth': 3,
}


def nested(flat):
    """A dict of groups, as config.json holds it."""
    made = {}
    for key, value in flat.items():
        group, _, name = key.rpartition('.')
        (made.setdefault(group, {}) if group else made)[name] = value
    return made


def another(value):
    """A value of the same type that is not this one."""
    if isinstance(value, bool):
        return not value
    return value + ('x' if isinstance(value, str) else [1] if isinstance(value, list) else 1)


def named(message):
    """The keys that a refusal names."""
    return re.findall(r'([\w.]+) \(was ', message)


@pytest.mark.parametrize('key', sorted(RESOLVED))
def test_every_key(key):
    """In either direction, and where an older config.json lacks the key, which then had its default."""
    changed = RESOLVED | {key: another(RESOLVED[key])}
    for before, now in ((RESOLVED, changed), (changed, RESOLVED)):
        if key in MAY_CHANGE:
            continuation.check_same_run('there', nested(before), nested(now), 'way out')
            continue
        with pytest.raises(UsageError, match='^there holds a run of another configuration') as refused:
            continuation.check_same_run('there', nested(before), nested(now), 'way out')
        assert named(str(refused.value)) == [key] and str(refused.value).endswith('; way out')
    if key in configs.flatten(configs.Config()) and key not in MAY_CHANGE and key != 'model.norm_position':
        older = nested({name: value for name, value in RESOLVED.items() if name != key})
        continuation.check_same_run('there', older, nested(RESOLVED), 'way out')
        with pytest.raises(UsageError, match=re.escape(f': {key} (was {RESOLVED[key]}, is {changed[key]})')):
            continuation.check_same_run('there', older, nested(changed), 'way out')


def test_a_key_that_is_not_known_here():
    """Of a work directory that a later version has begun."""
    with pytest.raises(UsageError, match=r'optim.new \(was 1, is None\)'):
        continuation.check_same_run('there', nested(RESOLVED | {'optim.new': 1}), nested(RESOLVED), 'way out')


def test_accumulate_under_the_authors_means():
    """Which depend on how many micro-batches there are."""
    official = RESOLVED | {'compat': 'official'}
    with pytest.raises(UsageError, match=r'accumulate \(was 1, is 2\)'):
        continuation.check_same_run('there', nested(official), nested(official | {'accumulate': 2}), 'way out')


def test_the_docs_list_the_same():
    """A group stands for all of its keys."""
    text = ' '.join((ROOT / 'docs/contracts.md').read_text().split())
    [sentence] = re.findall(r'The following keys may change when a run continues: (.*?)\. With `compat', text)
    words = re.findall(r'`([\w.*]+)`', sentence)
    listed = {key for key in RESOLVED for word in words if re.fullmatch(re.escape(word).replace(r'\*', r'\w+'), key)}
    assert listed == MAY_CHANGE <= RESOLVED.keys()


def test_a_whole_refusal(tmp_path, capsys):
    """Exit code 2 and one line with all keys that differ and none that may; nothing in the work directory changes."""
    recipe = tmp_path / 'recipe.py'
    sizes = 'vocab_size=259, hidden_size=16, intermediate_size=24, num_layers=3, num_heads=2'
    recipe.write_text(
        'from mixln_jax import config\n\n\ndef get_config():\n    made = config.default()\n'
        f"    made.device, made.batch_size = 'cpu', 8\n    made.model.update({sizes})\n    return made\n"
    )
    resolved = nested(configs.flatten(configs.build(recipes.load(str(recipe)))) | {
        'model.norm_position': ['post', 'pre', 'pre'], 'model.layer_index': [1, 2, 3], 'model.depth': 3,
    })  # fmt: skip
    run = tmp_path / 'run'
    (run / 'checkpoints/3').mkdir(parents=True)
    (run / 'config.json').write_text(json.dumps(resolved))
    words = ['--config', str(recipe), '--workdir', str(run), '--config.seed=5', '--config.log_every=1']
    words += ['--config.model.norm_position=lns*2,pre', '--config.optim.clip_norm=1.0', '--config.eval.every=7']
    assert main.main([*words, '--config.data.source=stdlib']) == 2
    error = capsys.readouterr().err
    assert named(error) == ['data.source', 'model.norm_position', 'optim.clip_norm', 'seed']
    assert 'seed (was 0, is 5)' in error and error.startswith(f'mixln_jax: {run} ') and error.count('\n') == 1
    assert json.loads((run / 'config.json').read_text()) == resolved
