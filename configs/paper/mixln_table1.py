"""Mix-LN Table 1 (arXiv 2412.13795): perplexity on C4 by placement and size. Cells: 71m_mix, 1b_pre and so on.

python -m mixln_jax.main --config configs/paper/mixln_table1.py:71m_mix --config.data.data_dir=data
"""

from mixln_jax import recipes

TOKENS = {'71m': 1.1e9, '130m': 2.2e9, '250m': 3.9e9, '1b': 5.0e9}
PERPLEXITY = {
    'post': (35.18, 26.95, 1409.09, 1411.54),
    'deepnorm': (34.87, 27.17, 22.77, 1410.94),
    'pre': (34.77, 26.78, 21.92, 18.65),
    'mix': (33.12, 26.07, 21.39, 18.18),
}
CELLS = {
    f'{size}_{scheme}': (size, {'model.norm_position': scheme}, value)
    for scheme, row in PERPLEXITY.items()
    for size, value in zip(TOKENS, row, strict=True)
}


def get_config(cell=''):
    return recipes.cell(__file__, 'Mix-LN Table 1', CELLS, TOKENS, cell)
