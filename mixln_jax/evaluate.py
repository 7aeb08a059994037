"""Evaluation: loss, perplexity and bits per byte over a fixed stretch of text, weighed by tokens.

`python -m mixln_jax.evaluate --checkpoint DIR` evaluates trained weights on the run's own text, with --tasks in the
lm-evaluation-harness (`pip install lm_eval`), or with --against by its answers, compared with those of other weights.
With --texts a reward network scores texts.
"""

from mixln_jax.system.signals import stop

if __name__ == '__main__':
    stop.install()  # before the imports, and for good: what is written is whole or not there

# ruff: noqa: E402
import argparse
import contextlib
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

from mixln_jax.data import rows as data_rows
from mixln_jax.evaluation import comparison, prompts, rewards
from mixln_jax.evaluation.generation import json_lines
from mixln_jax.evaluation.harness_options import OF_TASKS, OF_TEXT, add_task_options, open_harness
from mixln_jax.evaluation.loop import evaluate_run
from mixln_jax.runs import encoder as encoders
from mixln_jax.runs import weights
from mixln_jax.runs.weights import Weights
from mixln_jax.system import cli, console, files, outputs
from mixln_jax.system.errors import CheckpointError, UsageError
from mixln_jax.tasks import build

OF_COMPARISON = ('prompts', 'reward', 'start', 'max_new_tokens', 'temperature', 'seed')  # options only with --against


def _text(loaded: Weights, options: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """Returns the line and the JSON object of an evaluation on text, without --tasks."""
    by_class = options.out is not None
    values = evaluate_run(loaded, options.split, options.tokens, options.batch_size, options.data_path, by_class)
    assert loaded.config is not None, 'evaluate_run refuses others'
    split = options.split or loaded.config.eval.split
    numbers = {name.removeprefix('eval/'): value for name, value in values.items() if name != 'classes'}
    tokens = numbers.pop('tokens')
    task = build.from_config(loaded.config, loaded.model)
    decimals = {name: task.digits if name == task.headline else 4 for name in numbers}
    shown = '  '.join(
        f'{name.replace("_", " ")} {value:.{decimals[name]}f}' for name, value in numbers.items() if value is not None
    )
    return f'{split}: {shown}  ({task.units(tokens):,.0f} {task.unit})', {'split': split} | values


def _add_comparison_options(add: Callable[..., Any]) -> None:
    """Adds the options that `_comparison` reads; `add` is a parser's add_argument."""
    add('--against', metavar='DIR', help='compare the answers with those of these weights')
    add('--prompts', metavar='FILE.jsonl', help='against: what both answer: `prompt`, `messages` or `instruction`')
    add('--reward', metavar='R', help="against: as task.online.reward [the run's own]")
    add('--start', metavar='DIR', help='against: the weights that both began with, for the KL divergence from them')
    add('--max_new_tokens', type=int, metavar='N', help='against: tokens of an answer, at most [128]')
    add('--temperature', type=float, metavar='X', help='against: of the samples; 0: the likeliest tokens [1.0]')
    add('--seed', type=int, metavar='N', help='against: of the samples [0]')


def _comparison(options: argparse.Namespace) -> Callable[[Weights], tuple[str, dict[str, Any]]] | None:
    """Returns the function from Weights to the lines and the JSON object of a comparison; None without --against.

    Raises UsageError for an option that is missing, out of range or has no meaning; DataError as `prompts.read`.
    """
    if options.against is None:
        for name in OF_COMPARISON:
            if getattr(options, name) is not None:
                raise UsageError(f'--{name} has no meaning without --against')
        return None
    for name in (*OF_TEXT, 'tasks', *OF_TASKS):
        if getattr(options, name) is not None:
            raise UsageError(f'--{name} has no meaning with --against')
    if options.prompts is None:
        raise UsageError('--against needs --prompts FILE.jsonl')
    if options.max_new_tokens is not None and not 1 <= options.max_new_tokens < 2**24:
        raise UsageError('--max_new_tokens must be at least 1')
    if options.seed is not None and not 0 <= options.seed < 2**32:
        raise UsageError('--seed must be from 0 to 2^32 - 1')
    temperature = 1.0 if options.temperature is None else options.temperature
    if not 0 <= temperature <= 1000:
        raise UsageError('--temperature must be from 0 to 1000')
    given = prompts.read(options.prompts)

    def compare(loaded: Weights) -> tuple[str, dict[str, Any]]:
        reward = options.reward or (loaded.config.task.online.reward if loaded.config else '')
        if not reward:
            raise UsageError('--against needs --reward: module:function, or the folder of a reward network')
        size = options.batch_size or 32
        tokenizer = encoders.of_weights(loaded).tokenizer
        opened, _ = rewards.open_reward(reward, '--reward', comparison.mesh_for(size), size, tokenizer)
        other, start = (path and weights.load(path) for path in (options.against, options.start))
        result = comparison.compare(
            loaded,
            other,
            given,
            opened,
            start,
            max_new=options.max_new_tokens or 128,
            temperature=temperature,
            seed=options.seed or 0,
            batch_size=size,
        )
        about = {'against': other.where, 'reward_of': reward, 'prompts_of': options.prompts}
        return f'against {other.where}\n{comparison.shown(result)}', about | result

    return compare


def _score(options: argparse.Namespace, closing: contextlib.ExitStack) -> None:
    """Prints how a reward network scores the texts of a file, and writes each of them with its reward.

    Raises UsageError for an option that has no meaning; DataError as `rewards.read`; and as `rewards.Scorer`.
    """
    for name in (*OF_TEXT, 'tasks', *OF_TASKS, 'against', *OF_COMPARISON):
        if getattr(options, name) is not None:
            raise UsageError(f'--{name} has no meaning with --texts')
    if options.out is not None:
        out = outputs.resolve(options.out)
        if out.exists():
            raise UsageError(f'--out {options.out} is there already; take another name')
        closing.enter_context(outputs.writing(out))
    texts, size = rewards.read(options.texts), options.batch_size or 32
    loaded = weights.load(options.checkpoint, norm_position=options.norm_position)
    found = rewards.Scorer(loaded, comparison.mesh_for(size), size).score(texts)
    about = rewards.summary(found)
    console.say(
        f'{loaded.where}', f'{about["texts"]:,} texts: reward {about["reward"]:.4f}, spread {about["reward_std"]:.4f}'
    )
    if options.out is not None:
        outputs.write(
            out, json_lines({**text.fields, 'reward': float(r)} for text, r in zip(texts, found, strict=True))
        )


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
        description="Evaluates weights: on the run's own text, in the lm-evaluation-harness, or against other weights.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add('--checkpoint', required=True, metavar='DIR', help='a run, <run>/checkpoints/<step> or a Hugging Face folder')
    add('--norm_position', metavar='P', help='placement of a Hugging Face folder that does not say it')
    add(
        '--batch_size',
        type=int,
        metavar='B',
        help="rows at a time [the run's micro-batch; with --tasks or --against 32]",
    )
    add('--out', metavar='FILE.json', help='write the results here too; of images also those of each class')
    add('--split', metavar='SPLIT', help="of the run's data [config.eval.split]")
    add('--tokens', type=int, metavar='N', help='target tokens, at least [config.eval.tokens]')
    add('--data_path', metavar='PATH', help=data_rows.MOVED)
    add_task_options(add)
    _add_comparison_options(add)
    add(
        '--texts',
        metavar='FILE.jsonl',
        help='score these with a reward network; --out then is JSON lines with `reward`',
    )
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
            if options.texts is not None:
                _score(options, closing)
                return
            if options.out is not None:  # before anything is measured
                closing.enter_context(outputs.writing(out := _place(options.out)))
            compare, harness = _comparison(options), open_harness(options)
            loaded = weights.load(options.checkpoint, norm_position=options.norm_position)
            if not loaded.config and loaded.model.obstacle:
                raise CheckpointError(f'{loaded.where} {loaded.model.obstacle}')
            if compare:
                shown, values = compare(loaded)
            else:
                shown, values = harness(loaded)[1]() if harness else _text(loaded, options)
            console.say(f'{loaded.where}', shown)
            if options.out is not None:
                outputs.write_json(out, {'checkpoint': loaded.where, 'step': loaded.step} | values)

    return cli.call(job, show_traceback='--traceback' in argv)


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
