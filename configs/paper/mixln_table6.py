"""Mix-LN Table 6 (arXiv 2412.13795): perplexity of LLaMA 250M on C4 by placement. Its Pre-LN is 1.5 above Table 1's.

python -m mixln_jax.main --config configs/paper/mixln_table6.py:sandwich --config.data.data_dir=data
"""

from mixln_jax import recipes

TOKENS = {'250m': 3.9e9}
PERPLEXITY = {'pre': 23.39, 'admin': 24.82, 'group_pre': 23.10, 'sandwich': 23.26, 'mix': 22.33}
CELLS = {scheme: ('250m', {'model.norm_position': scheme}, value) for scheme, value in PERPLEXITY.items()}


def get_config(cell=''):
    return recipes.cell(__file__, 'Mix-LN Table 6', CELLS, TOKENS, cell)
