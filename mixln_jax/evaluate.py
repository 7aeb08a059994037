"""Evaluation: loss, perplexity and bits per byte over a fixed stretch of text, weighed by tokens.

`python -m mixln_jax.evaluate --checkpoint DIR` evaluates trained weights on the run's own text, or with --tasks in the
lm-evaluation-harness (`pip install lm_eval`).
"""

from mixln_jax.system.signals import stop

if __name__ == '__main__':
    stop.install()  # before the imports, and for good: what is written is whole or not there

# ruff: noqa: E402
import argparse
import contextlib
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from mixln_jax.data import rows as data_rows
from mixln_jax.evaluation.harness_options import OF_TEXT, add_task_options, open_harness
from mixln_jax.evaluation.loop import evaluate_run
from mixln_jax.runs import weights
from mixln_jax.runs.weights import Weights
from mixln_jax.system import cli, console, files, outputs
from mixln_jax.system.errors import CheckpointError, UsageError
from mixln_jax.tasks.build import TASKS


def _text(loaded: Weights, options: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """Returns the line and the JSON object of an evaluation on text, without --tasks."""
    values = evaluate_run(loaded, options.split, options.tokens, options.batch_size, options.data_path)
    assert loaded.config is not None, 'evaluate_run refuses others'
    split = options.split or loaded.config.eval.split
    numbers = {name.removeprefix('eval/'): value for name, value in values.items()}
    tokens = numbers.pop('tokens')
    task = TASKS[loaded.config.task.name]
    decimals = {name: task.digits if name == task.headline else 4 for name in numbers}
    shown = '  '.join(
        f'{name.replace("_", " ")} {value:.{decimals[name]}f}' for name, value in numbers.items() if value is not None
    )
    return f'{split}: {shown}  ({tokens:,} tokens)', {'split': split} | values


def _place(out: str) -> pathlib.Path:
    """Returns where to write results. Raises UsageError if a file there holds anything else."""
    path = outputs.resolve(out)
    try:
        ours = not path.exists() or {'checkpoint', 'step'} <= {*files.read_json(path, UsageError)}
    except UsageError:
        ours = False
    if not ours:
        raise UsageError(f'--out {out} is there already and holds no results of an evaluation; take another name')
    return path


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns its exit code."""
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

    def job() -> None:
        options = cli.parse(parser, argv)
        for name in ('batch_size', 'tokens'):
            if (value := getattr(options, name)) is not None and value < 1:
                raise UsageError(f'--{name} must be at least 1')
        for name in OF_TEXT:
            if options.tasks and getattr(options, name) is not None:
                raise UsageError(f'--{name} has no meaning with --tasks')
        with contextlib.ExitStack() as closing:
            if options.out is not None:  # before anything is measured
                closing.enter_context(outputs.writing(out := _place(options.out)))
            harness = open_harness(options)
            loaded = weights.load(options.checkpoint, norm_position=options.norm_position)
            if not (loaded.config or loaded.model.causal):
                raise CheckpointError(f'{loaded.where} sees both sides of a token, so it does not predict the next one')
            shown, values = harness(loaded)[1]() if harness else _text(loaded, options)
            console.say(f'{loaded.where}', shown)
            if options.out is not None:
                outputs.write_json(out, {'checkpoint': loaded.where, 'step': loaded.step} | values)

    return cli.call(job, show_traceback='--traceback' in argv)


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
