"""The metrics that config.checkpoint.best may name: those that evaluations of the task have."""

import pytest

from mixln_jax import config as configs
from mixln_jax.models import families
from mixln_jax.runs import best
from mixln_jax.system.errors import UsageError
from mixln_jax.tasks import build

SIZES = {'vocab_size': 259, 'hidden_size': 8, 'intermediate_size': 8, 'num_layers': 1, 'num_heads': 2}
NEVER = {
    'instructions': ({}, 'eval/bits_per_byte'),
    'language': ({}, 'eval/accuracy'),
    'preference': ({'init_from': 'x'}, 'eval/perplexity'),
    'online': ({'init_from': 'x', 'task.online.reward': 'a:b', 'task.online.beta': 0.0, 'seq_length': 256}, 'eval/kl'),
}


@pytest.mark.parametrize('name', NEVER)
def test_a_name_that_is_never_logged_is_refused(name):
    changes, wrong = NEVER[name]
    values = configs.default()
    values.task.name = name
    values.model.update(**SIZES)
    with values.unlocked():
        values.update_from_flattened_dict(changes)
    config = configs.build(values)
    task = build.from_config(config, families.from_config(config.model))
    best.check_metric('eval/loss', task)
    with pytest.raises(UsageError, match=f'config.checkpoint.best=.{wrong}. is no metric.*has eval/loss'):
        best.check_metric(wrong, task)
