"""What the experiment varies, and which rate is tried next."""

import dataclasses
import re
from collections.abc import Iterator, Mapping

SEEDS = (0, 1, 2)
STUDIES = 'border', 'long', 'changes'
RATES = tuple(2.5e-4 * 2 ** (number / 2) for number in range(17))  # 2.5e-4 to 6.4e-2
START = 6  # the first rate where nothing is known: 2e-3

# Deep, narrow networks on batches of 8 x 64 bytes; b2 and clipping as in the authors' runs; the rate is constant.
BASE: Mapping[str, object] = {
    'batch_size': 8, 'seq_length': 64, 'num_steps': 400, 'log_every': 5, 'stability.every': 10, 'eval.every': 0,
    'eval.tokens': 4096, 'checkpoint.every': 0, 'analysis.tokens': 0, 'model.hidden_size': 32,
    'model.intermediate_size': 96, 'model.num_heads': 2, 'optim.warmup_steps': 50, 'optim.schedule': 'constant',
    'optim.clip_norm': 0, 'optim.b2': 0.999,
}  # fmt: skip

PLACEMENTS: Mapping[str, Mapping[str, object]] = {
    'post': {'model.norm_position': 'post'},
    'mix 1/2': {'model.norm_position': 'mix', 'model.post_ratio': 0.5},
    'mix 1/4': {'model.norm_position': 'mix', 'model.post_ratio': 0.25},
    'mix 1/8': {'model.norm_position': 'mix', 'model.post_ratio': 0.125},
    'deepnorm': {'model.norm_position': 'deepnorm'},
    'pre': {'model.norm_position': 'pre'},
}
DEPTHS = (24, 40, 64)

# One change at a time, of networks of 40 layers.
CHANGES: dict[str, Mapping[str, object]] = {
    'warm-up 10': {'optim.warmup_steps': 10},
    'warm-up 150': {'optim.warmup_steps': 150},
    'clip 1': {'optim.clip_norm': 1},
    'b2 0.95': {'optim.b2': 0.95},
    'init 0.02': {'model.init_std': 0.02},
    'post rate x 1/4': {'optim.rate_factors': 'post=0.25'},
    'eps 1e-16': {'optim.eps': 1e-16},
    'ProRes': {'model.ramp_steps': 5},  # and +prores: the last layer is ramped up after 200 steps
}
CHANGED = ('post', 'mix 1/2')

# Five times as long, networks of 24 layers: as above, with a warm-up of a tenth as in the public log, and with cures.
LONG: Mapping[str, object] = {'num_steps': 2000, 'log_every': 10, 'collapse': 'stop'}
LONGER: dict[str, Mapping[str, object]] = {
    '2,000 steps': LONG,
    '2,000 steps, warm-up 200': {**LONG, 'optim.warmup_steps': 200},
    '2,000 steps, clip 1': {**LONG, **CHANGES['clip 1']},
    '2,000 steps, b2 0.95': {**LONG, **CHANGES['b2 0.95']},
    '2,000 steps, post rate x 1/4': {**LONG, **CHANGES['post rate x 1/4']},
}


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is trained at several rates."""

    study: str  # of STUDIES
    placement: str
    layers: int
    change: str = ''

    @property
    def name(self) -> str:
        words = self.study, self.placement, str(self.layers), self.change
        return '-'.join(re.sub('[ ,]', '', word).replace('/', 'of') for word in words if word)

    @property
    def keys(self) -> dict[str, object]:
        """The changes of the recipe, without rate and seed."""
        change = (CHANGES | LONGER).get(self.change, {})
        keys = {**BASE, **PLACEMENTS[self.placement], 'model.num_layers': self.layers, **change}
        if self.change == 'ProRes':
            keys['model.norm_position'] = f'{keys["model.norm_position"]}+prores'
        return keys


def settings() -> Iterator[Setting]:
    """Yields all settings, those first from which others start."""
    for layers in (40, 24, 64):
        for placement in PLACEMENTS:
            yield Setting('border', placement, layers)
    for change in LONGER:
        for placement in CHANGED:
            yield Setting('long', placement, 24, change)
    for change in CHANGES:
        for placement in CHANGED:
            yield Setting('changes', placement, 40, change)


Outcomes = Mapping[tuple[Setting, int], Mapping[int, bool]]  # of a setting and seed, by number of the rate: it trains


def border(outcomes: Mapping[int, bool]) -> tuple[int | None, int | None]:
    """Returns the numbers of the highest rate that trains and of the lowest above it that does not; None: not known."""
    low = max((number for number, trains in outcomes.items() if trains), default=None)
    high = min((n for n, trains in outcomes.items() if not trains and (low is None or n > low)), default=None)
    return low, high


def next_rate(outcomes: Outcomes, setting: Setting, seed: int) -> int | None:
    """Returns the number of the rate to try next; None: the border is known, or beyond all rates.

    The first one is that where the same setting has its border with another seed, else where a similar one has it; from
    there it goes up or down. A gap, as a finer grid of rates leaves, is bisected.
    """
    known = outcomes.get((setting, seed), {})
    low, high = border(known)
    if low is None and high is None:
        return _similar(outcomes, setting)
    if low is None:
        return high - 1 if high else None
    if high is None:
        return low + 1 if low + 1 < len(RATES) else None
    return (low + high) // 2 if high - low > 1 else None


def _similar(outcomes: Outcomes, setting: Setting) -> int:
    found = [
        (_distance(setting, other), low)
        for (other, _), known in outcomes.items()
        if (low := border(known)[0]) is not None and other.placement == setting.placement
    ]
    return min(found, default=(0, START))[1]


def _distance(one: Setting, other: Setting) -> tuple[bool, bool, int]:
    return one != other, one.change != other.change, abs(one.layers - other.layers)
