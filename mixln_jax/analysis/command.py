"""The command that all analyses share: its options, progress bars, result.json and figures.

A job is a module with NAME, DEFINITION, UNIT, SOURCE, `measure` (numbers of one network), `whole` (those of them that
must be finite), `draw` (figures of many networks) and `columns` (what its table shows by layer).
"""

import argparse
import contextlib
import functools
import os
import pathlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from mixln_jax.analysis import samples, subjects
from mixln_jax.data import rows as data_rows
from mixln_jax.data.examples import Examples
from mixln_jax.distributed import mesh as meshes
from mixln_jax.models.network import Network
from mixln_jax.report import figures
from mixln_jax.runs import environment, log, weights
from mixln_jax.system import cli, console, files, outputs
from mixln_jax.system.errors import NumericsError, UsageError
from mixln_jax.tasks.task import Task

TOKENS, BATCH_SIZE = 65_536, 8


def everywhere(values: Any, model: Network) -> Any:
    """Returns `values` whole on every device of the model's mesh, so that every process can read them; for use inside
    jit."""
    return jax.lax.with_sharding_constraint(values, meshes.replicated(_sharding(model).mesh))


def _sharding(model: Network) -> jax.sharding.NamedSharding:
    """Returns the sharding of the residual stream, which every network that is measured has."""
    assert model.stream_sharding is not None
    return model.stream_sharding


def position_mask(task: Task, batch: Mapping[str, Any]) -> Any:
    """Returns a mask [B,T] of the positions of a batch that count: those that a sample has chosen, else the task's."""
    return batch.get('position_mask', task.position_mask(batch))


def by_row(compiled: Callable[[Any], Any], model: Network, batches: Iterable[Mapping[str, np.ndarray]]) -> Any:
    """Runs a function on batches of numpy arrays.

    Args:
        compiled: takes a batch on the devices; returns a tree of sums over the positions of each row [B,...], and the
            number of these positions [B].
        model: determines how the rows of a batch are sharded.
        batches: batches of numpy arrays; see samples.sample.

    Returns:
        (tree [R,...] of all rows, counts [R]).
    """
    rows = [jax.device_get(compiled(meshes.to_devices(batch, _sharding(model)))) for batch in batches]
    return jax.tree.map(lambda *parts: np.concatenate(parts), *rows)


class Sample:
    """The sample that a network is measured on, which the options of a command choose; `about` describes it."""

    def __init__(self, subject: subjects.Subject, options: argparse.Namespace, label: str):
        """Opens nothing yet; `label` is that of the progress bar."""
        self._subject, self._options, self._label = subject, options, label
        self.about: dict[str, Any] = {}

    @functools.cached_property
    def examples(self) -> Examples:
        """All rows of the questions or of the text."""
        options = self._options
        if options.squad:
            examples: Examples = samples.questions(self._subject, options.squad, options.seq_length)
            self.about['text'] = examples.fingerprint
        else:
            chosen = options.text, options.split, options.seq_length, options.mode, options.data_path
            examples, self.about['text'] = samples.text(self._subject, *chosen)
        return examples

    def batches(self, last: bool = False) -> Iterable[dict[str, np.ndarray]]:
        """Returns the batches of the sample, in a progress bar; see samples.sample."""
        options, parts = self._options, subjects.parts(self._options.batch_size)
        taken = self._subject.task, self.examples, options.tokens or TOKENS, options.batch_size
        batches = samples.sample(*taken, last, parts)
        counts = np.concatenate([batch['position_mask'].sum(-1) for batch in batches])
        self.about.update(tokens=int(counts.sum()), rows=int((counts > 0).sum()))
        return tqdm(batches, desc=self._label, leave=False, disable=None)


def run(
    job: Any,
    work: Callable[..., dict[str, Any]],
    argv: Sequence[str],
    add_options: Callable[[Callable[..., Any]], None] = lambda add: None,
    check: Callable[[argparse.Namespace], None] = lambda options: None,
) -> int:
    """Runs the command of a job; returns its exit code.

    Options and folders are checked before anything is measured. The other networks are measured even if the numbers of
    one are not finite.

    Args:
        job: the module.
        work: (Subject, options, Sample) -> the numbers of one network, a dict.
        argv: arguments of the command.
        add_options: adds the job's own options, given the parser's `add_argument`.
        check: checks them; raises UsageError.
    """
    parser = argparse.ArgumentParser(
        prog=f'python -m mixln_jax.analysis.{job.NAME}',
        description=job.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    places = 'runs, <run>/checkpoints/<step>, or Hugging Face'
    add('--checkpoint', required=True, nargs='+', metavar='DIR', help=places)
    add('--steps', metavar='STEP,...', help='of every run: init, numbers, all that are kept [the newest]')
    add('--out', metavar='DIR', help="folder for the results of all [each run's own analysis/<job>]")
    add('--norm_position', metavar='P', help='placement of a Hugging Face folder that does not say it')
    add('--text', metavar='FILES', help="measure on these .jsonl or text files [the run's own text]")
    add('--squad', metavar='FILE.json', help='a BERT reads the questions and texts of this SQuAD file')
    add('--split', metavar='SPLIT', help='of the text [config.eval.split; of --text all]')
    add('--data_path', metavar='PATH', help=data_rows.MOVED)
    add('--seq_length', type=int, metavar='T', help="tokens in a row [the run's; of a Hugging Face folder up to 256]")
    add('--mode', choices=('pad', 'pack', 'concat'), help="how rows are made [the run's; of a Hugging Face folder pad]")
    add('--tokens', type=int, metavar='N', help=f'real tokens to measure on, at least [{TOKENS:,}]')
    add('--batch_size', type=int, default=BATCH_SIZE, metavar='B', help=f'rows at a time [{BATCH_SIZE}]')
    add_options(add)
    add('--traceback', action='store_true', help='show where an error comes from')

    def command() -> None:
        options = cli.parse(parser, argv)
        _check(options)
        check(options)
        by_folder: dict[pathlib.Path, list[subjects.Place]] = {}
        for place in subjects.places(options.checkpoint, options.steps):
            by_folder.setdefault(_folder(job, options, place), []).append(place)
        with contextlib.ExitStack() as closing:
            for folder in by_folder:
                closing.enter_context(outputs.writing_into(folder))
                _check_free(job, folder)
            _measure_all(job, work, options, by_folder)

    return cli.call(command, show_traceback='--traceback' in argv)


def _measure_all(
    job: Any,
    work: Callable[..., dict[str, Any]],
    options: argparse.Namespace,
    by_folder: Mapping[pathlib.Path, Sequence[subjects.Place]],
) -> None:
    """Measures, writes and draws; the other networks are measured even if there is a problem with one."""
    problems = []
    for folder, places in by_folder.items():
        results = []
        for place in places:
            try:
                results.append(_result(job, place, options, work))
            except (NumericsError, weights.Removed) as error:
                problems.append(error)
                continue
            _write(job, folder, results, options)
            console.say(*_table(results[-1], job.columns(results[-1])), '')
        if results:
            _draw(job, folder, results)
    for problem in problems[:-1]:
        console.say(f'mixln_jax: {problem}', file=sys.stderr)
    if problems:
        raise problems[-1]


def _check(options: argparse.Namespace) -> None:
    """Raises UsageError for options that are out of range or contradict each other."""
    for name, least in (('tokens', 1), ('batch_size', 1), ('seq_length', 2)):
        if (value := getattr(options, name)) is not None and value < least:
            raise UsageError(f'--{name} must be at least {least}')
    for name in ('text', 'split', 'mode', 'norm_position', 'data_path'):
        if options.squad and getattr(options, name) is not None:
            raise UsageError(f'--{name} has no meaning with --squad')
    if options.text and options.data_path and subjects.INITIAL not in cli.split_list(options.steps or ''):
        raise UsageError("--data_path is where the run's own text is; it has no meaning with --text")


def _folder(job: Any, options: argparse.Namespace, place: subjects.Place) -> pathlib.Path:
    """Returns the folder for the results of a checkpoint."""
    if options.out is not None:
        return outputs.resolve(options.out)
    if not place.run:
        raise UsageError(f'{place.folder} is not a run of ours, which would keep its results; give --out DIR')
    return place.run / 'analysis' / job.NAME


def _check_free(job: Any, folder: pathlib.Path) -> None:
    """Raises UsageError if a folder has the results of another job, or takes a figure's name for another file."""
    if (other := _written(folder).get('job', job.NAME)) != job.NAME:
        raise UsageError(f'--out {folder} has the results of mixln_jax.analysis.{other}; give another folder')
    if not _is_ours(folder, job.NAME):
        raise UsageError(f'--out {folder}: {job.NAME}.png or .svg there is no figure of ours; give another folder')


def _written(folder: pathlib.Path) -> dict[str, Any]:
    """Returns the content of a folder's result.json; {} if there is none."""
    path = folder / 'result.json'
    problem = 'not the result of an analysis; give another folder as --out'
    content = files.read_json(path, UsageError, problem) if path.exists() else {}
    if content and not isinstance(content.get('job'), str):
        raise UsageError(f'{path}: {problem}')
    return content


def _is_ours(folder: pathlib.Path, name: Any) -> bool:
    """Returns whether an analysis may write or remove a figure of this name: it does not exist, or an analysis drew it.

    Names come from a result.json too, which may contain anything.
    """
    if not isinstance(name, str) or pathlib.PurePath(name).parts != (name,) or name == '..':
        return False
    paths = [folder / f'{name}.{suffix}' for suffix in ('png', 'svg')]
    existing = [path for path in paths if os.path.lexists(path)]
    plain = all(path.is_file() and not path.is_symlink() for path in existing)
    return not existing or plain and figures.is_drawn(paths[1])


def _result(
    job: Any, place: subjects.Place, options: argparse.Namespace, work: Callable[..., dict[str, Any]]
) -> dict[str, Any]:
    """Returns the entry of one network in result.json. Raises NumericsError if it is not finite."""
    subject = subjects.open_subject(place, options.norm_position, options.batch_size, options.data_path)
    if options.text:
        subject = subject.of_text()
    sample = Sample(subject, options, place.label)
    numbers = work(subject, options, sample)
    if not all(np.isfinite(part).all() for part in job.whole(numbers)):
        raise NumericsError(f'{subject.weights.where}: its {job.NAME} is not finite')
    result = {
        'label': place.label,
        'checkpoint': subject.weights.where,
        'step': subject.weights.step,
        'norm_position': list(subject.model.norm_position),
        'layer_index': list(subject.model.layer_index),
        'reads': subject.task.reads,
    }
    return log.finite(jax.tree.map(_plain, result | sample.about | numbers, is_leaf=lambda value: value is None))


def _write(job: Any, folder: pathlib.Path, results: Sequence[dict[str, Any]], options: argparse.Namespace) -> None:
    """Writes result.json with what has been measured so far."""
    kept = {name: value for name, value in vars(options).items() if name not in ('checkpoint', 'out', 'traceback')}
    content = {
        'job': job.NAME,
        'definition': job.DEFINITION,
        'unit': job.UNIT,
        'source': job.SOURCE,
        'settings': kept | {'tokens': options.tokens or TOKENS},
        'environment': environment.environment(jax.devices()),
        'figures': _written(folder).get('figures', []),
        'results': results,
    }
    outputs.write_json(folder / 'result.json', content)


def _draw(job: Any, folder: pathlib.Path, results: Sequence[dict[str, Any]]) -> None:
    """Writes the figures; those of an earlier result are removed."""
    drawn, content = job.draw(results), _written(folder)
    for name in drawn:
        if not _is_ours(folder, name):
            raise UsageError(f'--out {folder}: {name}.png or .svg there is no figure of ours; result.json is written')
    for name, figure in drawn.items():
        figures.save(figure, folder, name)
    before = content['figures'] if isinstance(content['figures'], list) else []
    for name in before:
        if _is_ours(folder, name) and name not in drawn:
            for suffix in ('png', 'svg'):
                (folder / f'{name}.{suffix}').unlink(missing_ok=True)
    outputs.write_json(folder / 'result.json', content | {'figures': sorted(drawn)})
    console.say(f'{folder}: result.json, {", ".join(f"{name}.png" for name in sorted(drawn))} (.svg)')


def _table(result: Mapping[str, Any], columns: Mapping[str, Sequence[Any]]) -> Iterator[str]:
    """Yields the lines of a table of `columns` {title: [L]}: a head, then one line for each layer."""
    about = f' step {result["step"]}' if result['step'] is not None else ''
    kinds = ('positions', 'images') if result['reads'] == 'images' else ('tokens', 'rows')
    yield f'{result["checkpoint"]},{about} on {result["tokens"]:,} {kinds[0]} of {result["rows"]:,} {kinds[1]}'
    width = max(16, *map(len, result['norm_position']))
    yield f'{"layer":>5}  {"placement":<{width}}' + ''.join(f'  {title:>16}' for title in columns)
    for l, name in enumerate(result['norm_position']):
        numbers = {title: '-' if column[l] is None else f'{column[l]:.6g}' for title, column in columns.items()}
        cells = ''.join(f'  {number:>{max(16, len(title))}}' for title, number in numbers.items())
        yield f'{result["layer_index"][l]:>5}  {name:<{width}}{cells}'


def _plain(value: Any) -> Any:
    """Returns numpy's numbers and arrays as Python's; other values as they are."""
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value
