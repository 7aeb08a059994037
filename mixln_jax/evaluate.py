"""Evaluation: loss, perplexity and bits per byte over a fixed stretch of text, weighed by tokens.

`python -m mixln_jax.evaluate --checkpoint DIR` evaluates trained weights on the run's own text, or with --tasks in the
lm-evaluation-harness (`pip install lm_eval`).
"""

import argparse
import contextlib
import dataclasses
import math
import pathlib
import sys

import jax

from mixln_jax import config as configs
from mixln_jax import exits, metrics, outputs, paths, record, weights
from mixln_jax import mesh as meshes
from mixln_jax.data import batches
from mixln_jax.data import rows as data_rows
from mixln_jax.exits import NumericsError, UsageError
from mixln_jax.program import Program

# Options without and with --tasks.
OF_TEXT, OF_TASKS = ('split', 'tokens', 'data_path'), ('task_path', 'limit', 'num_fewshot')


def evaluate(eval_step, params, batches, *, at_a_time, num_tokens, sharding, check=lambda: None, official=False):
    """Evaluates on batches until at least `num_tokens` target tokens have been seen or the batches end.

    Args:
        eval_step: (params, batch) -> (sum of losses, count), compiled.
        params: the weights.
        batches: iterable of dicts of numpy arrays [B,T], the same in every process, with `num_bytes` [B] where the
            text's bytes are known; see `batches.evaluation`.
        at_a_time: batches between looks at `num_tokens`, so that smaller batches see the same text.
        num_tokens: when to stop.
        sharding: of the batches' arrays on devices.
        check: called before each batch; may raise to stop early.
        official: whether to give `eval/perplexity_official` besides.

    Returns:
        {'eval/loss', 'eval/perplexity', 'eval/tokens', 'eval/bits_per_byte'}; the last None without `num_bytes`.
    """
    sums, counts, num_bytes = [], [], 0
    for batch in batches:
        check()
        if num_bytes is not None:
            num_bytes = num_bytes + int(batch['num_bytes'].sum()) if 'num_bytes' in batch else None
        batch = {name: values for name, values in batch.items() if name != 'num_bytes'}
        sums.append(eval_step(params, meshes.place(batch, sharding))[0])
        counts.append(int(batch['weights'].sum()))
        if len(sums) > 1:
            sums[-2] = jax.device_get(sums[-2])  # the batch before: keeps the device busy and its queue short
        if sum(counts) >= num_tokens and len(sums) % at_a_time == 0:
            break
    sums = [float(jax.device_get(total)) for total in sums]
    values = metrics.evaluation(sum(sums), sum(counts), num_bytes)
    return values | ({'eval/perplexity_official': metrics.official_perplexity(sums, counts)} if official else {})


def evaluate_run(found: weights.Weights, split=None, num_tokens=None, batch_size=None, data_path=None):
    """Evaluates the weights of a run as the run itself does, on all devices that share a batch evenly.

    Args:
        found: from `weights.load`.
        split: of the run's data; None: config.eval.split.
        num_tokens: target tokens, at least (or the whole split); None: config.eval.tokens.
        batch_size: rows at a time, a divisor of the run's batch; None: the run's micro-batch.
        data_path: where the run's data is now; None: where it was.

    Returns:
        As `evaluate`.

    Raises:
        UsageError: no run, or a batch that does not divide the run's. DataError: as `rows.open_rows_of_run`.
        NumericsError: the loss is not finite.
    """
    config = found.config
    if not config:
        raise UsageError(f'{found.where} is a Hugging Face folder, which names no text to evaluate on; give --tasks')
    batch_size = batch_size or config.batch_size // config.accumulate
    if config.batch_size % batch_size:
        raise UsageError(f"--batch_size {batch_size} does not divide the run's config.batch_size={config.batch_size}")
    devices = meshes.devices('auto')
    mesh = meshes.make_mesh(configs.Mesh(data=math.gcd(batch_size, len(devices))), devices)
    program = Program(dataclasses.replace(config, batch_size=batch_size, accumulate=1), mesh)
    rows = data_rows.open_rows_of_run(found.workdir, config, split or config.eval.split, found.tokenizer, data_path)
    params = jax.device_put(found.params, jax.tree.map(lambda leaf: leaf.sharding, program.state.params))
    with contextlib.closing(batches.read(batches.evaluation(rows, batch_size, sized=True), 0, workers=0)) as reader:
        values = evaluate(
            program.eval_step,
            params,
            reader,
            at_a_time=config.batch_size // batch_size,
            num_tokens=num_tokens or config.eval.tokens,
            sharding=meshes.batch_sharding(mesh),
            official=config.compat != 'none',
        )
    if not math.isfinite(values['eval/loss']):
        raise NumericsError(f'{found.where}: the evaluation loss is not finite')
    return values


def add_task_options(add):
    """Options for `open_harness`."""
    add('--tasks', metavar='TASK,...', help='tasks of the lm-evaluation-harness: arc_easy,hellaswag')
    add('--task_path', metavar='DIR', help='YAML files that define more tasks')
    add('--limit', type=count_or_share, metavar='N', help='documents of each task, or a share below 1 of them [all]')
    add('--num_fewshot', type=int, metavar='N', help='examples before each document [what the task says]')


def count_or_share(text):
    """How many documents: an integer, or a share of them. Raises ValueError for any other text."""
    value = exits.finite(text)
    return value if 0 < value < 1 else exits.integer(text)


def open_harness(options):
    """Opens the tasks that `add_task_options` names: a function of Weights that gives (Harness, evaluate).

    `evaluate()` gives what `harness.run` does. None without --tasks.

    Raises UsageError for options out of range or without --tasks, where lm_eval is not installed, and as
    `harness.open_tasks`; the function as `Harness`.
    """
    for name, least in (('limit', 1), ('num_fewshot', 0)):
        value = getattr(options, name)
        if value is not None and value < least and not isinstance(value, float):
            raise UsageError(f'--{name} must be at least {least}')
    if not options.tasks:
        for name in OF_TASKS:
            if getattr(options, name) is not None:
                raise UsageError(f'--{name} has no meaning without --tasks')
        return None
    names = exits.listed(options.tasks)
    if not names:
        raise UsageError(f'--tasks {options.tasks!r} names no task')
    if options.task_path and not pathlib.Path(options.task_path).is_dir():
        raise UsageError(f'--task_path {options.task_path} is not a folder')
    try:
        from mixln_jax import harness  # not for those who need no tasks
    except ModuleNotFoundError as error:
        if error.name.partition('.')[0] != 'lm_eval':
            raise
        raise UsageError('--tasks needs the lm-evaluation-harness: pip install lm_eval') from error
    manager = harness.open_tasks(names, options.task_path)

    def of(found):
        model = harness.Harness(found, options.batch_size or 32)
        return model, lambda: harness.run(model, manager, names, options.limit, options.num_fewshot)

    return of


def _text(found, options):
    """The line and JSON object without --tasks."""
    values = evaluate_run(found, options.split, options.tokens, options.batch_size, options.data_path)
    split, bits = options.split or found.config.eval.split, values['eval/bits_per_byte']
    line = (
        f'{split}: loss {values["eval/loss"]:.4f}  perplexity {values["eval/perplexity"]:.2f}  '
        f'bits per byte {"-" if bits is None else format(bits, ".4f")}  ({values["eval/tokens"]:,} tokens)'
    )
    return line, {'split': split} | values


def _place(out):
    """Where to write results. Raises UsageError for a file that is there and holds none."""
    path = outputs.place(out)
    try:
        ours = not path.exists() or {'checkpoint', 'step'} <= {*paths.read_json(path, UsageError)}
    except UsageError:
        ours = False
    if not ours:
        raise UsageError(f'--out {out} is there already and holds no results of an evaluation; take another name')
    return path


def main(argv):
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog='python -m mixln_jax.evaluate',
        description="Evaluates trained weights: on the run's own text, or in the lm-evaluation-harness.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add('--checkpoint', required=True, metavar='DIR', help='a run, <run>/checkpoints/<step> or a Hugging Face folder')
    add('--norm_position', metavar='P', help='placement of a Hugging Face folder that does not say it')
    add('--batch_size', type=int, metavar='B', help="rows at a time [the run's micro-batch; with --tasks 32]")
    add('--out', metavar='FILE.json', help='write the results here too')
    add('--split', metavar='SPLIT', help="of the run's data [config.eval.split]")
    add('--tokens', type=int, metavar='N', help='target tokens, at least [config.eval.tokens]')
    add('--data_path', metavar='PATH', help=data_rows.MOVED)
    add_task_options(add)
    add('--traceback', action='store_true', help='show where an error comes from')

    def job():
        options = exits.parse(parser, argv)
        for name in ('batch_size', 'tokens'):
            if (value := getattr(options, name)) is not None and value < 1:
                raise UsageError(f'--{name} must be at least 1')
        for name in OF_TEXT:
            if options.tasks and getattr(options, name) is not None:
                raise UsageError(f'--{name} has no meaning with --tasks')
        out = None if options.out is None else _place(options.out)  # before anything is measured
        harness = open_harness(options)
        found = weights.load(options.checkpoint, norm_position=options.norm_position)
        shown, values = harness(found)[1]() if harness else _text(found, options)
        record.say(f'{found.where}', shown)
        if out:
            record.write_json(out, {'checkpoint': found.where, 'step': found.step} | values)

    return exits.call(job, show_traceback='--traceback' in argv)


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
