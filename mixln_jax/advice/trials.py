"""The runs that an advice rests on: what they change in a recipe, and what their lines show."""

import dataclasses
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from mixln_jax import config as configs
from mixln_jax.advice import judgement
from mixln_jax.advice.judgement import Verdict
from mixln_jax.models import placements
from mixln_jax.system.errors import UsageError

FRACTIONS = 1 / 2, 1 / 4, 1 / 8  # of a ramp's bound: the rates that are confirmed, the highest first
LINES = 1000  # of metrics.jsonl in a run, at most
NAME = re.compile('(recipe|post[^-]+(e-[0-9]+)?)-(ramp|rate)-')  # of what runs leave in the folder
ALWAYS: dict[str, Any] = {  # what all runs have, whatever the recipe says
    'optim.schedule': 'constant', 'collapse': 'stop', 'eval.every': 0, 'eval.samples': 0, 'analysis.tokens': 0,
    'profile.steps': 0, 'checkpoint.keep': 1, 'checkpoint.keep_every': 0, 'checkpoint.best': '',
    'log_every': 5, 'stability.every': 20, 'checkpoint.every': 100,  # at least
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Setting:
    """A number of Post-LN layers of the recipe."""

    layers: int
    post_layers: int  # layers with a Post-LN sub-layer
    post_ratio: float | None  # None: as in the recipe

    @property
    def name(self) -> str:
        """Part of a folder's name."""
        return 'recipe' if self.post_ratio is None else f'post{self.post_ratio:g}'

    def describe(self) -> str:
        """Returns the setting in a few words."""
        ratio = '' if self.post_ratio is None else f' (post_ratio={self.post_ratio:g})'
        return f'{self.post_layers} of {self.layers} layers Post-LN{ratio}'


@dataclasses.dataclass(frozen=True)
class Trial:
    """A run: its learning rate rises linearly over `warmup` steps to `rate`, and stays there."""

    setting: Setting
    rate: float
    warmup: int
    steps: int
    seed: int | None = None  # of weights and data; None: as in the recipe

    @property
    def ramp(self) -> bool:
        """Whether the rate rises to the end, as in KEEL (arXiv 2601.19895)."""
        return self.warmup == self.steps - 1

    @property
    def name(self) -> str:
        """Name of its folder: runs of equal names are the same run."""
        kind = 'ramp' if self.ramp else f'rate-warmup{self.warmup}'
        seed = '' if self.seed is None else f'-seed{self.seed}'
        return f'{self.setting.name}-{kind}-{self.rate:g}-{self.steps}{seed}'

    def describe(self) -> str:
        """Returns the rate, and the seed if it is given."""
        return f'rate {self.rate:g}' + ('' if self.seed is None else f', seed {self.seed}')

    def overrides(self) -> list[tuple[str, str]]:
        """Returns the changes of the recipe, (key, text)."""
        values = ALWAYS | {
            'num_steps': self.steps,
            'optim.warmup_steps': self.warmup,
            'optim.learning_rate': self.rate,
            'log_every': max(ALWAYS['log_every'], self.steps // LINES),
            'stability.every': max(ALWAYS['stability.every'], self.steps // LINES),
            'checkpoint.every': max(ALWAYS['checkpoint.every'], self.steps // 4),
        }
        if self.setting.post_ratio is not None:
            values['model.post_ratio'] = self.setting.post_ratio
        if self.seed is not None:
            values |= {'seed': self.seed, 'data.seed': self.seed}
        return [(key, f'{value}') for key, value in values.items()]

    def judge(self, lines: Sequence[Mapping[str, Any]], planned: int) -> Verdict:
        """Returns the verdict on its lines; `planned`: steps of the recipe."""
        if not self.ramp:
            return judgement.judge(lines, self.warmup, planned=planned)
        verdict = judgement.judge(lines, None)
        if verdict.state != judgement.UNDECIDED:
            return verdict
        return Verdict(judgement.UNDECIDED, None, (f'it did not collapse while the rate rose to {self.rate:g}',))


def settings(config: configs.Config, ratios: Sequence[float]) -> list[Setting]:
    """Returns the settings to try: the recipe's own, and under `mix` those of `ratios`, most Post-LN layers first.

    Raises UsageError if `ratios` have no meaning, or are out of range.
    """
    model, layers = config.model, config.model.num_layers
    if model.norm_position.partition('+')[0].strip() != 'mix':
        if ratios:
            raise UsageError(
                f'--ratios has a meaning for config.model.norm_position=mix, not for {model.norm_position}'
            )
        rows = [placements.PLACEMENTS[name] for name in placements.resolve(model.norm_position, layers)]
        return [Setting(layers, sum(row.attention.post or row.mlp.post for row in rows), None)]
    if bad := next((ratio for ratio in ratios if not 0 <= ratio <= 1), None):
        raise UsageError(f'--ratios: {bad:g} is not between 0 and 1')
    wanted = ratios or (model.post_ratio, model.post_ratio / 2)
    counts = [placements.post_layers(layers, ratio) for ratio in ratios]
    if twice := next((count for count in counts if counts.count(count) > 1), None):
        raise UsageError(f'--ratios: two of them are {twice} of {layers} layers')
    by_count = {placements.post_layers(layers, ratio): ratio for ratio in reversed(wanted)}
    return [Setting(layers, count, by_count[count]) for count in sorted(by_count, reverse=True)]


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which runs are made, before the first one has ended."""

    settings: list[Setting]
    ramp_to: float
    ramp_steps: int
    warmup: int  # of the recipe
    own_rate: float
    planned: int  # steps of the recipe
    decays: bool  # the rate of the recipe
    rates: tuple[float, ...]  # given by the user; empty: fractions of the bound
    seeds: int | None  # of each rate, 0 to seeds - 1; None: that of the recipe
    limit: int | None  # steps of all runs

    @property
    def confirm_steps(self) -> int:
        """Steps of a run at the real warm-up."""
        return judgement.enough_steps(self.warmup)

    def ramp(self, setting: Setting) -> Trial:
        """Returns the run whose rate rises until the network diverges."""
        return Trial(setting, self.ramp_to, self.ramp_steps - 1, self.ramp_steps)

    def confirming(self, setting: Setting, bound: float | None) -> list[list[Trial]]:
        """Returns the runs at the real warm-up, those of each rate, the highest first: the first rate at which all of
        them train is the answer.

        Rates above `bound` are left out; None: the ramp was survived.
        """
        top = self.ramp_to if bound is None else bound
        seeds = [None] if self.seeds is None else range(self.seeds)
        rates = self.rates or (*(float(f'{top * part:.2g}') for part in FRACTIONS), self.own_rate)
        return [
            [Trial(setting, rate, self.warmup, self.confirm_steps, seed) for seed in seeds]
            for rate in sorted({*rates}, reverse=True)
            if rate < top or bound is None
        ]

    def budget(self) -> str:
        """Returns the number of runs and steps at most, in words."""
        each = (len(self.rates) or len(FRACTIONS) + 1) * (self.seeds or 1)
        runs = len(self.settings) * (1 + each)
        steps = len(self.settings) * (self.ramp_steps + each * self.confirm_steps)
        each_of = f'for each of {len(self.settings)} settings ' if len(self.settings) > 1 else ''
        which = 'one trains' if (self.seeds or 1) == 1 else f'those of a rate with all {self.seeds} seeds train'
        limit = '' if self.limit is None else f', of which --steps allows {self.limit:,}'
        return (
            f'at most {runs} runs with {steps:,} steps{limit}: {each_of}a ramp of {self.ramp_steps:,} steps to '
            f'{self.ramp_to:g}, then up to {each} runs of {self.confirm_steps:,} steps '
            f'({self.warmup:,} of them warm up) until {which}; the recipe has {self.planned:,} steps'
        )


def ramp_bound(lines: Sequence[Mapping[str, Any]], verdict: Verdict) -> float | None:
    """Returns the last learning rate of a ramp before its collapse, the signs of one, or a loss that is not finite: an
    upper bound; None: there was none of them."""
    if verdict.step is None:
        return None
    rates = [line['train/learning_rate'] for line in lines if line['step'] < verdict.step]
    return rates[-1] if rates else 0.0


def folder(workdir: pathlib.Path, trial: Trial) -> pathlib.Path:
    """Returns the work directory of a run."""
    return workdir / trial.name
