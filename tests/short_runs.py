"""Runs of four steps: their recipe, a signal in step 2, and the lines that they write."""

import json

import jax

from mixln_jax import config as configs
from mixln_jax import main
from mixln_jax.models import families
from mixln_jax.models.hf import llama as hf_llama
from mixln_jax.runs import workdir

WORDS = 'the quick brown fox jumps over one lazy dog and an evil queen'.split()  # noqa: SIM905
# The same network as a recipe of its own.
FILE = """
from mixln_jax import config

def get_config():
    c = config.default()
    c.batch_size, c.seq_length, c.num_steps, c.device = 4, 16, 4, 'cpu'
    c.model.update(vocab_size=259, hidden_size=16, intermediate_size=24, num_layers=3, num_heads=2)
    c.data.update(source='stdlib', tokenizer='bytes')
    return c
"""
SIZES = dict(vocab_size=259, hidden_size=16, intermediate_size=24, num_layers=3, num_heads=2)


def recipe(corpus, **changes):
    """Returns the configuration of a run of four steps on the texts of `corpus`."""
    config = configs.default()
    config.batch_size, config.seq_length, config.num_steps, config.log_every = 8, 16, 4, 1
    config.compute_dtype, config.device, config.mesh.data = 'float32', 'cpu', 1
    config.model.update(scan_unroll='1', **SIZES)
    config.data.update(source='jsonl', path=str(corpus), tokenizer='bytes')
    config.eval.update(every=2, tokens=100)
    config.checkpoint.every, config.analysis.tokens = 2, 0
    with config.unlocked():
        config.update_from_flattened_dict(changes)
    return config


def saved_config(config):
    """The content of the config.json of a run."""
    return workdir.resolved_config(config, families.from_config(config.model, num_outputs=config.task.num_outputs))


def exported(folder):
    """Writes a Mix-LN network as a Hugging Face folder, for runs to start from; returns it."""
    model = families.from_config(configs.Model(norm_position='mix', **SIZES))
    hf_llama.save(folder, model, jax.jit(model.init)(jax.random.key(77))['params'])
    return folder


class StopAtTwo(main.stop.__class__):
    """Acts like a signal that comes in step 2."""

    def reached(self, step):
        self.requested = 'SIGTERM' if step == 2 else None
        return step == 2


def lines_of(workdir):
    """Returns the lines of metrics.jsonl without speed."""
    lines = map(json.loads, (workdir / 'metrics.jsonl').read_text().splitlines())
    return [{name: value for name, value in line.items() if not name.startswith('perf/')} for line in lines]
