"""LayerNorm Scaling, Table 1 (arXiv 2502.05795): perplexity on C4 by placement and size. Cells: 130m_lns, 1b_pre, ...

python -m mixln_jax.main --config configs/paper/lns_table1.py:130m_lns --config.data.data_dir=data
"""

from mixln_jax import recipes

TOKENS = {'130m': 2.2e9, '250m': 3.9e9, '350m': 6.0e9, '1b': 8.9e9}
PERPLEXITY = {
    'post': (26.95, 1409.79, 1368.33, 1390.75),
    'deepnorm': (27.17, 22.77, 1362.59, 1409.08),
    'mix': (26.07, 21.39, 1363.21, 1414.78),
    'pre': (26.73, 21.92, 19.58, 17.02),
    'lns': (25.76, 20.35, 18.20, 15.71),
}
CELLS = {
    f'{size}_{scheme}': (size, {'model.norm_position': scheme}, value)
    for scheme, row in PERPLEXITY.items()
    for size, value in zip(TOKENS, row, strict=True)
}


def get_config(cell=''):
    return recipes.cell(__file__, 'LNS Table 1', CELLS, TOKENS, cell)
