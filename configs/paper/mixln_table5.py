"""Mix-LN Table 5 (arXiv 2412.13795): perplexity of LLaMA 1B on C4 by the share of Post-LN layers. Cells: 0, 0.25, 1.

python -m mixln_jax.main --config configs/paper/mixln_table5.py:0.25 --config.data.data_dir=data
python -m mixln_jax.sweep --config configs/paper/mixln_table5.py --config.data.data_dir=data --workdir runs/table5
"""

from mixln_jax import recipes

TOKENS = {'1b': 5.0e9}
PERPLEXITY = {'0': 18.65, '0.167': 18.34, '0.25': 18.18, '0.33': 18.41, '0.417': 18.55, '0.5': 18.86, '1': 1434.0}
CELLS = {share: ('1b', {'model.post_ratio': float(share)}, value) for share, value in PERPLEXITY.items()}


def get_config(cell='0.25'):  # the paper's choice
    return recipes.cell(__file__, 'Mix-LN Table 5', CELLS, TOKENS, cell)


def sweep():
    for share in CELLS:
        expected = get_config(share).expected
        yield {
            'model.post_ratio': share,
            'expected.perplexity': expected.perplexity,
            'expected.source': expected.source,
        }
