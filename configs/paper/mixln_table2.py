"""Mix-LN Table 2 (arXiv 2412.13795): accuracies in per cent after fine-tuning. Cells: 250m_mix, 1b_pre and so on.

python -m mixln_jax.main --config configs/paper/mixln_table2.py:250m_mix \
    --config.init_from=runs/mixln_table1_250m_mix --config.data.path=commonsense_170k.json
python -m mixln_jax.evaluate --checkpoint runs/mixln_table2_250m_mix --num_fewshot 5 \
    --tasks mmlu,boolq,arc_easy,piqa,hellaswag,openbookqa,winogrande

The authors published no code for it. What stands here is OwLore's script for LISA, the only fine-tuning code of the
first author: 2 layers drawn every 3 steps, linear decay from 3e-4 without warm-up, 16 rows of 512 tokens, one pass.
Which data they used, and that it is the file above, is a guess; here records of a row do not see each other, there they
do. The rows of 1B Post-LN and DeepNorm are left out: Table 1 shows networks that have collapsed.
"""

from mixln_jax import recipes

TASKS = 'mmlu', 'boolq', 'arc_easy', 'piqa', 'hellaswag', 'openbookqa', 'winogrande'
ACCURACY = {
    '250m_post': (22.95, 37.83, 26.94, 52.72, 26.17, 11.60, 49.56),
    '250m_deepnorm': (23.60, 37.86, 36.62, 61.10, 25.69, 15.00, 49.57),
    '250m_pre': (24.93, 38.35, 40.15, 63.55, 26.34, 16.20, 49.01),
    '250m_mix': (26.53, 56.12, 41.68, 66.34, 30.16, 18.00, 50.56),
    '1b_pre': (26.54, 62.20, 45.70, 67.79, 30.96, 17.40, 50.51),
    '1b_mix': (27.99, 61.93, 48.11, 68.50, 31.35, 18.80, 55.93),
}
CHANGES = {
    'init_from': 'runs/pretrained',
    'batch_size': 16,
    'seq_length': 512,
    'num_steps': 0,
    'num_epochs': 1.0,
    'seed': 111,
    'task.name': 'instructions',
    'data.source': 'jsonl',
    'data.path': 'commonsense_170k.json',
    'data.template': 'llm_adapters',
    'data.mode': 'pack',
    'data.held_out': 0.01,
    'tune.method': 'lisa',
    'tune.layers': 2,
    'tune.interval': 3,
    'optim.name': 'adamw',
    'optim.learning_rate': 3e-4,
    'optim.weight_decay': 0.0,
    'optim.schedule': 'linear',
    'optim.warmup_ratio': 0.0,
    'optim.min_ratio': 0.0,
}
CELLS = {
    name: (
        name.partition('_')[0],
        CHANGES | {'model.norm_position': name.partition('_')[2]},
        ','.join(f'{task}={value}' for task, value in zip(TASKS, row, strict=True)),
    )
    for name, row in ACCURACY.items()
}


def get_config(cell=''):
    return recipes.cell(__file__, 'Mix-LN Table 2', CELLS, {}, cell)
