"""What the analyses share: options, opening, progress, result.json and figures.

A job is a module with NAME, DEFINITION, UNIT, SOURCE, `measure` (numbers of one network), `draw` (figures of many) and
`columns` (what its table shows by layer).
"""

import argparse
import pathlib

import jax
import numpy as np
from tqdm import tqdm

from mixln_jax import exits, figures, record
from mixln_jax import mesh as meshes
from mixln_jax.analysis import subjects
from mixln_jax.exits import UsageError

TOKENS, BATCH_SIZE = 65_536, 8


def everywhere(values, model):
    """Inside jit: `values` whole on every device of the model's mesh, so that every process can read them."""
    return jax.lax.with_sharding_constraint(values, meshes.replicated(model.stream_sharding.mesh))


def by_row(compiled, model, batches):
    """Runs a function on batches of numpy arrays.

    Args:
        compiled: batch on the devices -> a tree of sums over each row's tokens, [B,...].
        model: says where a batch's rows lie.
        batches: iterable, see subjects.sample.

    Returns:
        (tree [R,...] of all rows, counts [R]: tokens of each).
    """
    sums, counts = [], []
    for batch in batches:
        sums.append(jax.device_get(compiled(meshes.place(batch, model.stream_sharding))))
        counts.append(batch['weights'].sum(-1))
    return jax.tree.map(lambda *of_batches: np.concatenate(of_batches), *sums), np.concatenate(counts)


def run(job, work, argv, add_options=lambda add: None):
    """A job's command; returns its exit code.

    Args:
        job: the module.
        work: (Subject, options, texts) -> the numbers of one network, a dict; `texts(subject, last=False)` gives its
            batches, with a progress bar.
        argv: words of the command.
        add_options: (add_argument), for options of the job's own.
    """
    parser = argparse.ArgumentParser(
        prog=f'python -m mixln_jax.analysis.{job.NAME}',
        description=job.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        '--checkpoint',
        required=True,
        nargs='+',
        metavar='DIR',
        help='runs, <run>/checkpoints/<step>, or Hugging Face',
    )
    add('--steps', metavar='STEP,...', help='of every run: init, numbers, all that are kept [the newest]')
    add('--out', metavar='DIR', help="folder for the results of all [each run's own analysis/<job>]")
    add('--norm_position', metavar='P', help='placement of a Hugging Face folder that does not say it')
    add('--text', metavar='FILES', help="measure on these .jsonl or text files [the run's own text]")
    add('--squad', metavar='FILE.json', help='a BERT reads the questions and texts of this SQuAD file')
    add('--split', metavar='SPLIT', help='of the text [config.eval.split; of --text all]')
    add('--seq_length', type=int, metavar='T', help="tokens in a row [the run's; of a Hugging Face folder 256]")
    add('--tokens', type=int, default=TOKENS, metavar='N', help=f'real tokens to measure on, at least [{TOKENS:,}]')
    add('--batch_size', type=int, default=BATCH_SIZE, metavar='B', help=f'rows at a time [{BATCH_SIZE}]')
    add_options(add)
    add('--traceback', action='store_true', help='show where an error comes from')

    def command():
        options = exits.parse(parser, argv)
        for name in ('tokens', 'batch_size'):
            if getattr(options, name) < 1:
                raise UsageError(f'--{name} must be at least 1')
        if options.seq_length is not None and options.seq_length < 2:
            raise UsageError('--seq_length must be at least 2')
        paths = subjects.paths(options.checkpoint, options.steps)
        by_folder = {}
        for path, step in paths:
            by_folder.setdefault(_folder(job, options, path), []).append((path, step))
        for folder, of_folder in by_folder.items():
            results = [_result(path, step, options, work) for path, step in of_folder]
            _write(job, folder, results, options)

    return exits.call(command, show_traceback='--traceback' in argv)


def _folder(job, options, path):
    """Where the results of a checkpoint go."""
    if options.out:
        return pathlib.Path(options.out)
    run = path.parents[1] if path.parent.name == 'checkpoints' else path
    if not (run / 'checkpoints').is_dir() and path.is_dir():
        raise UsageError(f'{path} is not a run of ours, which would keep its results; give --out DIR')
    return run / 'analysis' / job.NAME


def _result(path, step, options, work):
    """The entry of one network in result.json."""
    subject = subjects.open_subject(path, step, options.norm_position, options.batch_size)
    about = {}

    def texts(subject, last=False):
        if options.squad:
            singles = subjects.rows_of_questions(subjects.questions(subject, options.squad, options.seq_length)[0])
        else:
            rows = subjects.text(subject, options.text, options.split, options.seq_length)
            singles = subjects.rows_of_text(rows)
        batches = subjects.sample(singles, options.tokens, options.batch_size, last)
        counts = np.concatenate([batch['weights'].sum(-1) for batch in batches])
        about.update(tokens=int(counts.sum()), rows=int((counts > 0).sum()))
        return tqdm(batches, desc=subject.label, leave=False, disable=None)

    numbers = work(subject, options, texts)
    model = subject.model
    return {
        'label': subject.label,
        'checkpoint': subject.found.where,
        'step': subject.found.step,
        'norm_position': list(model.norm_position),
        'layer_index': list(model.layer_index),
        **about,
        **numbers,
    }


def _write(job, folder, results, options):
    """Writes result.json and the figures, and prints the table of each network."""
    kept = {name: value for name, value in vars(options).items() if name not in ('checkpoint', 'out', 'traceback')}
    content = {
        'job': job.NAME,
        'definition': job.DEFINITION,
        'unit': job.UNIT,
        'source': job.SOURCE,
        'settings': kept,
        'environment': record.environment(jax.devices()),
        'results': results,
    }
    content = record.finite(jax.tree.map(_plain, content, is_leaf=lambda value: value is None))
    record.write_json(folder / 'result.json', content)
    for result in content['results']:
        record.say(*_table(result, job.columns(result)), '')
    for name, figure in job.draw(content['results']).items():
        figures.save(figure, folder, name)
    record.say(f'{folder}: result.json, {", ".join(sorted(path.name for path in folder.glob("*.png")))}')


def _table(result, columns):
    """A line a layer, of {title: [L]}."""
    about = f' step {result["step"]}' if result['step'] is not None else ''
    yield f'{result["checkpoint"]},{about} on {result["tokens"]:,} tokens of {result["rows"]:,} rows'
    yield f'{"layer":>5}  {"placement":<16}' + ''.join(f'  {title:>16}' for title in columns)
    for l, name in enumerate(result['norm_position']):
        numbers = ['-' if column[l] is None else f'{column[l]:.6g}' for column in columns.values()]
        yield f'{result["layer_index"][l]:>5}  {name:<16}' + ''.join(f'  {number:>16}' for number in numbers)


def _plain(value):
    """numpy's numbers and arrays as Python's."""
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value
