"""Mix-LN Table 8 (arXiv 2412.13795): perplexity of LLaMA 130M on C4 with scaled initialisation and scaled embeddings.

Scaled Embed is Takase et al.'s (arXiv 2312.16903): deviation sqrt(2 / 5D), times sqrt(D). Cells: pre, mix_init,
mix_init_embed and so on.

python -m mixln_jax.main --config configs/paper/mixln_table8.py:mix_init --config.data.data_dir=data
"""

from mixln_jax import recipes

TOKENS = {'130m': 2.2e9}
INIT = {'model.init': 'scaled'}
SWITCHES = {
    '': {},
    '_init': INIT,
    '_init_embed': INIT | {'model.scale_embed': True, 'model.embed_std': (2 / (5 * 768)) ** 0.5},
}
PERPLEXITY = {'pre': (32.18, 30.63, 31.28), 'mix': (29.95, 29.77, 31.19)}
CELLS = {
    f'{scheme}{name}': ('130m', {'model.norm_position': scheme} | switches, value)
    for scheme, row in PERPLEXITY.items()
    for (name, switches), value in zip(SWITCHES.items(), row, strict=True)
}


def get_config(cell=''):
    return recipes.cell(__file__, 'Mix-LN Table 8', CELLS, TOKENS, cell)
