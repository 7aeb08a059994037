"""Mix-LN Table 4 (arXiv 2412.13795): accuracy on ImageNet-1k by placement and size. Cells: ti_pre, s_mix and so on.

python -m mixln_jax.main --config configs/paper/mixln_table4.py:s_mix --config.data.data_dir=data

The authors published neither recipe nor length. That it is ../vit_s16_i1k_convnext.py is a guess; ../vit_s16_i1k.py is
another. A difference from the paper thus says little; one between two cells is between placements alone.
"""

from mixln_jax import recipes

ACCURACY = {'ti': (0.6730, 0.6734), 's': (0.7599, 0.7640)}
CELLS = {
    f'{size}_{scheme}': (f'vit_{size}16_i1k_convnext', {'model.norm_position': scheme}, {'accuracy': value})
    for size, row in ACCURACY.items()
    for scheme, value in zip(('pre', 'mix'), row, strict=True)
}


def get_config(cell=''):
    return recipes.cell(__file__, 'Mix-LN Table 4', CELLS, {}, cell)
