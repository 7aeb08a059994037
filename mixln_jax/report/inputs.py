"""What a report reads: runs and the results of analyses."""

import dataclasses
import math
import os
import pathlib

import numpy as np

from mixln_jax import config as configs
from mixln_jax.models import placements
from mixln_jax.report import sections
from mixln_jax.report.overview import SEEDS, colour_key, groups
from mixln_jax.runs import log, workdir
from mixln_jax.system import files
from mixln_jax.system.errors import CheckpointError, UsageError, reading

LARGEST = 2**63  # of a whole number in a file
ANALYSES = ('angular', 'drop', 'gradients', 'variance')


@dataclasses.dataclass(eq=False)
class Run:
    """What a work directory holds."""

    folder: str  # as given
    config: configs.Config
    lines: list  # of metrics.jsonl
    environment: dict
    analyses: dict  # job -> its result.json
    name: str
    colour: int
    debug: dict = dataclasses.field(default_factory=dict)  # what it wrote where a step was not finite

    @property
    def placement(self):
        model = self.config.model
        return placements.spelled(placements.resolve(model.norm_position, model.num_layers, model.post_ratio))

    @property
    def keys(self):
        """{key: value} of the configuration, flat."""
        return configs.flatten(self.config)

    @property
    def seeds(self):
        return tuple(self.keys[name] for name in SEEDS)

    @property
    def step(self):
        return self.lines[-1]['step'] if self.lines else 0

    @property
    def steps(self):
        """How far it has come, a text."""
        last = self.config.num_steps
        return f'{self.step:,}' if self.step == last else f'{self.step:,} of {last:,}'

    @property
    def bad_step(self):
        """The step at which it ended because a loss or gradient was not finite, None where it did not."""
        step = sections.number(self.debug.get('step'))
        return int(step) if self.step < step < LARGEST else None

    @property
    def text(self):
        """{part: value} of what it has read, and of what it is evaluated on; {} where that is not known."""
        data, (_, tokens) = self.environment.get('data'), self.last('eval/tokens')
        if not isinstance(data, dict):
            return {}
        wanted = self.config.eval.tokens
        return data | {'split': self.config.eval.split, 'amount': min(wanted, tokens or wanted)}

    def last(self, key):
        """The newest value of a metric: (step, number), nan where it is not finite; (None, None): never logged."""
        line = next((line for line in reversed(self.lines) if key in line), None)
        return (line['step'], sections.number(line[key])) if line else (None, None)

    def results(self, job):
        """Of an analysis, by step, with the run's name and colour; `checkpoint_label` is their own label."""
        named = [
            {**result, 'label': self.name, 'checkpoint_label': result.get('label'), 'colour': self.colour}
            for result in self.analyses[job]['results']
        ]
        return sorted(named, key=lambda result: -1 if result.get('step') is None else result['step'])


def read(folders):
    """(runs, problems, others) of folders; one with a problem hides no other, and `others` are no runs at all."""
    runs, problems, others = [], [], []
    for path, folder in {pathlib.Path(os.path.realpath(files.local(folder, ''))): folder for folder in folders}.items():
        try:
            if not _is_run(path):
                others.append(folder)
                continue
            config, metrics = configs.read(path / 'config.json'), path / 'metrics.jsonl'
            lines = log.read_metrics(metrics)
            with reading(metrics, CheckpointError):
                _check_lines(metrics, lines)
            run = Run(folder, config, lines, {}, {}, '', len(runs))
            with reading(path / 'config.json', UsageError):
                _ = run.placement
        except (UsageError, CheckpointError) as problem:
            problems.append(problem)
            continue
        runs.append(run)
        for name, job in (
            ('environment', ''),
            ('debug/report', ''),
            *((f'analysis/{job}/result', job) for job in ANALYSES),
        ):
            try:
                content = _content(path / f'{name}.json', job) or {}
            except CheckpointError as problem:
                problems.append(problem)
                continue
            if job and content:
                run.analyses[job] = content
            elif not job:
                setattr(run, 'environment' if name == 'environment' else 'debug', content)
    for run, name in zip(runs, workdir.short_names([run.folder for run in runs]), strict=True):
        run.name = name
    colour_key(groups(runs))
    return runs, problems, others


def _is_run(path):
    """Whether a path, which must exist, has the config.json of a run, be it damaged. Others may have one too, such as
    Hugging Face folders."""
    try:
        return 'model' in files.read_json(path / 'config.json', UsageError)
    except FileNotFoundError:
        if path.exists():
            return False
        raise UsageError(f'there is no {path / "config.json"}') from None
    except UsageError:
        return not path.is_file()


def _check_lines(path, lines):
    """Raises CheckpointError for a value that is not a number, or numbers."""
    for line in lines:
        for name, value in line.items():
            if not _numeric(value):
                raise CheckpointError(f'{path}: {name} of step {line["step"]} is no number')


def _numeric(value):
    """Whether a value, or all in a list of lists, are numbers or None, which stands for one that is not finite."""
    if isinstance(value, list):
        return all(map(_numeric, value))
    if isinstance(value, float):
        return not 1e100 <= abs(value) < math.inf  # no axis can be drawn for what is near the largest float
    return value is None or isinstance(value, int) and abs(value) < LARGEST


def _content(path, job):
    """A JSON file, None where there is none; CheckpointError where it is malformed or not the result of `job`."""
    problem = f'not {f"the result of mixln_jax.analysis.{job}" if job else "what a run writes"}'
    try:
        content = files.read_json(path, CheckpointError, problem)
    except FileNotFoundError:
        return None
    with reading(path, CheckpointError, problem):
        for name in ('definition', 'unit', 'source') if job else ():
            if not isinstance(content.get(name), str | None):
                raise ValueError(f'{name} that is no text')
        for result in content['results'] if job else ():
            _check(job, result)
        if job and not content['results']:
            raise ValueError('it has no results')
    return content


def _check(job, result):
    """Raises ValueError, KeyError or TypeError for an element of `results` that is not as the figures need it."""
    L = len(result['norm_position'])
    for name, kind in (('norm_position', str), ('layer_index', int)):
        if not (isinstance(result[name], list) and {*map(type, result[name])} == {kind} and len(result[name]) == L):
            raise ValueError(f'{name} that is not a list with something of every layer')
    if not _numeric(result['layer_index']) or result['layer_index'] != sorted({*result['layer_index']}):
        raise ValueError('layer_index that does not rise')
    for name in ('step', 'tokens', 'rows', 'gradients', 'rows_per_gradient', 'theory_constant'):
        if isinstance(result.get(name), list) or not _numeric(result.get(name)):
            raise ValueError(f'{name} that is no number')
    for name, kind in (('label', str | None), ('text', dict | None)):
        if not isinstance(result.get(name), kind):
            raise ValueError(f'{name} that is none')
    if any(isinstance(value, list | dict) for value in [*(result.get('text') or {}).values(), result.get('positions')]):
        raise ValueError('a list where one value belongs')
    single = [{'mean': of.get('value'), **of} for of in result['metrics'].values()] if job == 'drop' else []
    single += (result.get('outside') or {}).values() if job == 'gradients' else []
    for one in ([of['mean'], of.get('standard_error')] for of in single):
        if any(isinstance(value, list) for value in one) or not _numeric(one):
            raise ValueError('a value that is no number')
    if job == 'drop' and any(f'{int(block)}' != block for of in single for block in of['drop']):
        raise ValueError('a block that is no number of layers')
    shapes = {
        'angular': lambda: [(result['distance'], (L + 1, L + 1))],
        'gradients': lambda: [
            (result['layers'], (L,)),
            *((values, (L,)) for values in result['matrices'].values()),
        ],
        'variance': lambda: [
            (result['variance'], (L + 1,)),
            *((result['contribution'][name], (L,)) for name in ('attention', 'mlp')),
        ],
        'drop': lambda: [
            (quantity, (L + 1 - int(block),))
            for metric in result['metrics'].values()
            for block, quantity in metric['drop'].items()
        ],
    }
    for quantity, shape in shapes[job]():
        if not _numeric([quantity['mean'], quantity.get('standard_error')]):
            raise ValueError('what is no number among numbers')
        mean, error = np.array(quantity['mean'], float), quantity.get('standard_error')
        error = np.zeros(shape) if error is None else np.array(error, float)
        if not mean.shape == error.shape == shape:
            raise ValueError(f'shapes {mean.shape} and {error.shape} where {shape} belongs')
        if (error < 0).any():
            raise ValueError('a negative standard error')
    if job == 'variance' and result.get('theory') and np.array(result['theory'], float).shape != (L + 1,):
        raise ValueError('theory of another length')
