"""Gives advice: makes the runs of a plan, prints the verdicts and what was not tried, and writes advice.json."""

import dataclasses
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from mixln_jax import config as configs
from mixln_jax import recipes
from mixln_jax.advice import judgement, losses, trials
from mixln_jax.advice.judgement import Verdict
from mixln_jax.advice.runner import Runner
from mixln_jax.advice.trials import Plan, Setting, Trial
from mixln_jax.system import console, files, outputs, signals
from mixln_jax.system.errors import UsageError

FILE, METRICS = 'advice.json', 'metrics.jsonl'


@dataclasses.dataclass
class Findings:
    """What is known about a setting."""

    setting: Setting
    bound: float | None = None  # upper bound of the rate by the ramp
    ramp: Verdict | None = None  # None: the ramp was not made
    runs: list[tuple[Trial, Verdict]] = dataclasses.field(default_factory=list)
    trained: float | None = None  # the highest rate at which the runs with all seeds trained as far as tried
    left_out: list[str] = dataclasses.field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Returns a JSON object."""
        return {
            'post_layers': self.setting.post_layers,
            'layers': self.setting.layers,
            'post_ratio': self.setting.post_ratio,
            'ramp': self.ramp and {'upper_bound': self.bound} | dataclasses.asdict(self.ramp),
            'runs': [{'learning_rate': trial.rate, 'seed': trial.seed, 'warmup': trial.warmup, 'steps': trial.steps,
                      'folder': trial.name} | dataclasses.asdict(verdict) for trial, verdict in self.runs],
            'learning_rate': self.trained,
            'not_tried': self.left_out,
        }  # fmt: skip


def judge_file(path: str, entropy: float | None, warmup: int | None) -> None:
    """Prints the verdict on a file of losses or a work directory. Raises DataError and UsageError for what cannot be
    judged."""
    given, planned = files.local(path, '--losses'), None
    run = given.parent if given.name == METRICS else given
    if (run / METRICS).is_file() and (run / 'config.json').is_file():
        path, config = f'{run / METRICS}', configs.read(run / 'config.json')
        planned = config.num_steps
        warmup = config.optim.warmup(planned) if warmup is None else warmup
    lines = losses.read(path)
    if entropy is None and not any(line.get(judgement.DISTANCE) is not None for line in lines):
        raise UsageError(
            f'--entropy X is missing: {path} has no {judgement.DISTANCE}; X is the loss, in nats, of a network that '
            'knows only how frequent each token is'
        )
    verdict = judgement.judge(lines, warmup, entropy, planned)
    console.say(f'{path}: {verdict.sentence()}', *_details(verdict))


def advise(
    recipe: str, overrides: Sequence[tuple[str, str]], workdir: str, options: dict[str, Any], stop: signals.Stop
) -> None:
    """Makes the runs, prints the advice and writes it into `workdir`.

    Args:
        recipe: FILE[:ARG].
        overrides: changes of the recipe, (key, text).
        workdir: folder for the runs.
        options: `to`, `ramp_steps`, `rates`, `ratios`, `seeds`, `steps`, as in `make_plan`.
        stop: whose signal handlers are installed.

    Raises:
        Stopped, Exit: see Runner.run.
    """
    config = configs.build(recipes.load(recipe, overrides))
    plan = make_plan(config, **options)
    folder = outputs.resolve(workdir, '--workdir')
    _check_folder(folder)
    with outputs.writing_into(folder, '--workdir'):
        console.say(
            f'{recipe}: {plan.budget()}', f'runs are in {folder}; the same command goes on after an interruption'
        )
        _say_ignored(plan, overrides)
        runner = Runner(folder, recipe, overrides, plan.planned, stop)
        findings, spent = [], 0
        for setting in plan.settings:
            made = Findings(setting)
            findings.append(made)
            spent = _study(made, plan, runner, spent)
        text = describe(findings, plan)
        console.say('', *text)
        outputs.write_json(
            folder / FILE,
            {'recipe': recipe, 'overrides': dict(overrides), 'budget': plan.budget(), 'steps_spent': spent,
             'settings': [made.to_json() for made in findings], 'advice': text},
        )  # fmt: skip


def _check_folder(folder: pathlib.Path) -> None:
    """Raises UsageError for a folder that holds something else than the runs of an adviser."""
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    names = [name for name in names if name != outputs.LOCK]
    if names and not any(name == FILE or trials.NAME.match(name) for name in names):
        raise UsageError(f'--workdir {folder} holds {names[0]}, which is not of an adviser; give another --workdir')


def _say_ignored(plan: Plan, overrides: Sequence[tuple[str, str]]) -> None:
    """Warns of keys that the user gave and that the runs do not have."""
    fixed = dict(plan.ramp(plan.settings[0]).overrides())
    ignored = [f'config.{key}={text}' for key, text in overrides if key in trials.ALWAYS and fixed[key] != text]
    if ignored:
        console.say(f'mixln_jax: warning: {", ".join(ignored)}: these runs have their own values', file=sys.stderr)


def make_plan(
    config: configs.Config,
    to: float,
    ramp_steps: int | None,
    rates: Sequence[float],
    ratios: Sequence[float],
    seeds: int | None,
    steps: int | None,
) -> Plan:
    """Returns the plan for a recipe. Raises UsageError for what cannot be planned.

    Args:
        config: of the recipe.
        to: last rate of the ramp.
        ramp_steps: its length; None: as long as a confirming run, KEEL's 5,000 at most.
        rates: to confirm; empty: fractions of the bound, and the recipe's own.
        ratios: values of post_ratio; empty: the recipe's and half of it.
        seeds: runs of each rate, with seeds 0 to seeds - 1; None: one, with that of the recipe.
        steps: of all runs, at most; None: no limit.
    """
    if config.num_epochs:
        raise UsageError(
            'epochs do not say how long the warm-up is: give --config.num_epochs=0 --config.num_steps=N, the steps of '
            'the whole run'
        )
    if config.task.name == 'online':
        raise UsageError('config.task.name=online: a loss of online learning does not show a collapse')
    for option, given in (('--to', [to]), ('--rates', rates)):
        if bad := [rate for rate in given if not 0 < rate <= 1e38]:
            raise UsageError(f'{option}: a learning rate must be above 0 and at most 1e38, not {bad[0]:g}')
    if len({*rates}) < len(rates):
        raise UsageError('--rates: two of the rates are equal')
    warmup = config.optim.warmup(config.num_steps)
    length = ramp_steps or min(5000, judgement.enough_steps(warmup))
    if steps is not None and steps < length:
        raise UsageError(f'--steps {steps}: the first run, a ramp, has {length} steps already (--ramp_steps)')
    return Plan(
        trials.settings(config, ratios), to, length, warmup, config.optim.learning_rate, config.num_steps,
        config.optim.schedule != 'constant', tuple(rates), seeds, steps,
    )  # fmt: skip


def _study(made: Findings, plan: Plan, runner: Runner, spent: int) -> int:
    """Makes the runs of a setting and fills its findings. Returns the steps spent so far."""
    console.say(f'{made.setting.describe()}:')
    ramp = plan.ramp(made.setting)
    if not _fits(ramp, plan, spent):
        made.left_out.append(f'everything ({plan.limit:,} steps were allowed)')
        return spent
    made.ramp, lines = runner.run(ramp)
    spent += lines[-1]['step'] if lines else 0
    made.bound = trials.ramp_bound(lines, made.ramp)
    console.say(f'  ramp to {ramp.rate:g} in {ramp.steps:,} steps: {_bound_text(made)}', *_signs_of(made.ramp))
    for runs in plan.confirming(made.setting, made.bound):
        if made.trained is None:
            spent = _confirm(made, runs, plan, runner, spent)
        else:
            made.left_out.append(f'rate {runs[0].rate:g}, as a higher one trained')
    return spent


def _confirm(made: Findings, runs: Sequence[Trial], plan: Plan, runner: Runner, spent: int) -> int:
    """Makes the runs of a rate, one for each seed, until one does not train. Returns the steps spent so far."""
    for trial in runs:
        if not _fits(trial, plan, spent):
            made.left_out.append(f'{trial.describe()} (--steps {plan.limit:,})')
            return spent
        verdict, lines = runner.run(trial)
        spent += lines[-1]['step'] if lines else 0
        made.runs.append((trial, verdict))
        console.say(f'  {trial.describe()}: {verdict.sentence()}: {"; ".join(verdict.reasons)}')
        if verdict.state != judgement.TRAINED:
            return spent
    made.trained = runs[0].rate
    return spent


def _fits(trial: Trial, plan: Plan, spent: int) -> bool:
    return plan.limit is None or spent + trial.steps <= plan.limit


def _bound_text(made: Findings) -> str:
    if made.ramp is None or made.bound is None:
        return 'no collapse, so there is no upper bound'
    return f'{made.ramp.sentence()}: {made.bound:.2g} is an upper bound'


def _signs_of(verdict: Verdict) -> list[str]:
    return [f'    {reason}' for reason in verdict.reasons]


def _details(verdict: Verdict) -> list[str]:
    return [
        *(f'  because {reason}' for reason in verdict.reasons),
        *(f'  not tried: {one}' for one in verdict.not_tried),
    ]


def describe(findings: Sequence[Findings], plan: Plan) -> list[str]:
    """Returns the advice as lines for people."""
    lines = []
    for made in findings:
        trained = made.trained
        seeds = f' with {plan.seeds} seeds' if plan.seeds and plan.seeds > 1 else ''
        text = 'no rate trained' if trained is None else f'trains at a peak rate of {trained:g}{seeds}, as far as tried'
        if made.ramp is None:
            text = 'not tried'
        elif made.bound is not None:
            text += f' (upper bound {made.bound:.2g})'
        lines.append(f'{made.setting.describe()}: {text}')
        own = [verdict for trial, verdict in made.runs if trial.rate == plan.own_rate]
        if own:  # the last one: those before it trained
            lines.append(f"  at the recipe's own rate, {plan.own_rate:g}: {own[-1].sentence()}")
        elif made.bound is not None and plan.own_rate >= made.bound:
            lines.append(f"  the recipe's own rate, {plan.own_rate:g}, is not below the upper bound")
        elif trained and plan.own_rate < trained:
            lines.append(f"  the recipe's own rate, {plan.own_rate:g}, is lower")
        lines += [f'  not tried: {one}' for one in made.left_out]
    best = next((made for made in findings if made.trained), None)
    if best and best.trained:
        ratio = best.setting.post_ratio
        changes = [] if ratio is None else [f'--config.model.post_ratio={ratio:g}']
        lines.append(' '.join(['most Post-LN layers that trained:', *changes,
                               f'--config.optim.learning_rate={best.trained:g}']))  # fmt: skip
    steps = plan.confirm_steps
    later = [f'steps {steps + 1:,} to {plan.planned:,} of the recipe'] if plan.planned > steps else []
    later += ['the decay of the rate'] if plan.decays else []
    lines.append(f'not tried at all: {", ".join([*later, "other seeds", "other data", "rates between these"])}')
    return lines
