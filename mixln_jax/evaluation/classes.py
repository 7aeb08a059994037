"""What a network takes the images of each class for."""

import collections
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from mixln_jax.tasks.classification import Classification


class Confusions:
    """Counts images by their class and the class that a network holds likeliest."""

    def __init__(self, task: Classification):
        self._likeliest = jax.jit(task.likeliest)
        self._counts: dict[int, collections.Counter[int]] = collections.defaultdict(collections.Counter)

    def add(self, params: Any, batch: Mapping[str, jax.Array], step: Any = None) -> None:
        """Counts the images of a batch; `step` is the number of updates that made the weights, as in Context."""
        found = jax.device_get((batch['example_mask'], batch['labels'], self._likeliest(params, batch, step)))
        for real, label, answer in zip(*(values.tolist() for values in found), strict=True):
            if real:
                self._counts[label][answer] += 1

    def by_class(self, names: Sequence[str]) -> list[dict[str, Any]]:
        """Returns, for each class that has images, in the order of labels: `class` (its name), `images` (how many),
        `accuracy` (the share of them that is right) and `taken_for` {name: images}, the most frequent first."""
        return [
            {
                'class': names[label],
                'images': answers.total(),
                'accuracy': answers[label] / answers.total(),
                'taken_for': {names[answer]: n for answer, n in answers.most_common() if answer != label and n},
            }
            for label, answers in sorted(self._counts.items())
        ]
