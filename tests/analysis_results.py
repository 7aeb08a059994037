"""Results of analyses, as result.json holds them, with invented numbers."""

import numpy as np

from mixln_jax.report import figures

L = 3
_RNG = np.random.default_rng(0)


def measured(values):
    """Returns means with standard errors of a hundredth."""
    values = np.asarray(values, float)
    return {'mean': values.tolist(), 'standard_error': np.abs(values / 100).tolist()}


def result(job, step=10, **changes):
    """Returns one element of results of a network of L layers."""
    vector = lambda: measured(_RNG.uniform(1, 2, L))  # noqa: E731
    matrix = np.abs(np.arange(L + 1)[:, None] - np.arange(L + 1)) / 10
    keys = {
        'angular': {'distance': {'mean': matrix.tolist(), 'standard_error': None}, 'positions': 'all'},
        'drop': {
            'metrics': {
                'perplexity': {
                    'value': 33.25,
                    'standard_error': 0.5,
                    'drop': {'1': measured([7000.5, 1.625, None]), '2': measured([2.0, 3.0])},
                },
                'arc_easy/acc': {'value': 0.5, 'standard_error': None, 'drop': {'1': measured([-0.125, 0, 0.0625])}},
            }
        },
        'gradients': {
            'layers': vector(),
            'matrices': {name: vector() for name in figures.MATRICES},
            'outside': {'embed': {'mean': 0.375, 'standard_error': None}},
            'gradients': 4,
            'rows_per_gradient': 32,
        },
        'variance': {
            'variance': measured([0.0625, 1, 2, 4]),
            'contribution': {'attention': vector(), 'mlp': vector()},
            'theory': [None, 1.0, 2.0, 4.0],
            'theory_constant': 0.875,
        },
    }[job]
    about = {'label': f'one step {step}', 'step': step, 'norm_position': ['post', 'pre', 'pre'], 'tokens': 65_536}
    about |= {'layer_index': [1, 2, 3], 'text': {'source': 'ab12', 'split': 'validation', 'mode': 'pad'}}
    return about | keys | changes
