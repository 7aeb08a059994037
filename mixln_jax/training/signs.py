"""The signs of a coming collapse during training: `stability/*` of the metrics lines."""

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from mixln_jax import config as configs
from mixln_jax import trees
from mixln_jax.analysis import stability
from mixln_jax.models import placements
from mixln_jax.system import console
from mixln_jax.training.collapse import Collapse

Values = Mapping[str, Any]  # metrics of a step, on the host


class Signs:
    """Turns the metrics of steps into the signs of a metrics line.

    A sign that has no meaning for a run is absent, or None where others of its kind have one.
    """

    def __init__(
        self,
        config: configs.Config,
        params: Any,
        network: Any,
        entropy: Callable[[], float | None],
        about: Mapping[str, Any],
        lines: Sequence[Mapping[str, Any]],
    ) -> None:
        """Starts to watch a run.

        Args:
            config: of the run.
            params, network: trained weights and all weights, or their shapes.
            entropy: returns `Task.baseline`.
            about: JSON object of the checkpoint that the run continues from, whose `signs` are what `record` returned.
            lines: all metrics lines; they become more while the run goes on.
        """
        record = about.get('signs', {})
        self.losses, self.grad_norms = (stability.Spikes(record.get(name)) for name in ('loss', 'grad_norm'))
        optim = config.optim
        self._on, self._clip_norm, self._entropy = config.stability.every > 0, optim.clip_norm, entropy
        self._eps = optim.eps if optim.name in ('adam', 'adamw') else None
        self._sizes = trees.layer_sizes(params, network)
        model = config.model
        first = placements.PLACEMENTS[placements.resolve(model.norm_position, model.num_layers, model.post_ratio)[0]]
        self._first_is_post = first.attention.post and first.mlp.post
        warmup, losses = optim.warmup(config.num_steps), self.losses.window
        self._collapse = Collapse(config.collapse, warmup, entropy, about['step'], losses, record)
        self._watch, self._lines, self._judged = stability.Watch(), lines, len(lines)
        for line in lines:
            self._watch.add(line)

    def add(self, step: int, values: Values) -> None:
        """Takes the metrics of the next step. If the network has collapsed, warns once or raises NumericsError."""
        self.losses.add(float(values['loss']))
        self.grad_norms.add(float(values['grad_norm']))
        self._collapse.add(step, float(values['loss']))

    def keep(self, step: int) -> int | None:
        """Returns the step whose checkpoint has to stay when `step`, the last one, is saved; see Collapse."""
        return self._collapse.keep(step, self.losses.mean(stability.SMOOTH))

    def record(self) -> dict[str, Any]:
        """Returns what a checkpoint keeps, so that a run that continues has the same lines."""
        return {'loss': self.losses.record(), 'grad_norm': self.grad_norms.record()} | self._collapse.record()

    def line(self, values: Values) -> dict[str, Any]:
        """Returns the signs after the step that was added last, whose metrics are `values`. Warns once if those of the
        lines before point to a coming collapse."""
        if not self._on:
            return {}
        self._judge()
        norms, total = np.asarray(values['layer_grad_norm'], np.float64), float(values['grad_norm'])
        clip = min(1.0, self._clip_norm / total) if self._clip_norm and total else 1.0
        with np.errstate(divide='ignore', invalid='ignore'):  # nan and infinity become None
            rms = clip * norms / np.sqrt(self._sizes)
            ratio = float(norms[0] / norms[-1])
        return {
            'stability/grad_ratio': ratio,
            'stability/grad_growth': self._growth(ratio),
            'stability/update_ratio': np.asarray(values['layer_update_ratio'], np.float64).tolist(),
            'stability/grad_to_eps': (rms / self._eps).tolist() if self._eps else None,
            'stability/entropy_distance': self._distance(),
            'stability/spike_score': self.losses.score,
            'stability/grad_spike_score': self.grad_norms.score,
        }

    def _judge(self) -> None:
        new, self._judged = self._lines[self._judged :], len(self._lines)
        for warned in filter(None, map(self._watch.add, new)):
            console.say(
                f'mixln_jax: warning: step {warned.step}: the network may collapse: {warned.reason}; a lower learning '
                'rate, a longer warm-up (config.optim.warmup_ratio) or fewer Post-LN layers may help',
                file=sys.stderr,
            )

    def _growth(self, ratio: float) -> float | None:
        if not self._first_is_post:  # that of Pre-LN networks is large, and changes much
            return None
        return stability.growth(ratio, [line.get('stability/grad_ratio') for line in self._lines[-stability.WINDOW :]])

    def _distance(self) -> float | None:
        entropy = self._entropy()
        return (entropy - self.losses.mean(stability.SMOOTH)) / entropy if entropy else None
