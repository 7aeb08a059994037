"""A network of the size of configs/llama_130m.py learns a file in the format of Commonsense170K: a JSON array, or a
JSON object a line, of {instruction, input, output, answer}.

python -m mixln_jax.main --config configs/finetune/commonsense.py --config.init_from=runs/mix130m \
    --config.data.path=commonsense_170k.json

Rate, schedule, rows and passes as in OwLore's script for LISA, which the Mix-LN authors most likely used for Table 2;
but rows are packed so that records do not see each other, and every weight is trained.
"""

from mixln_jax import config


def get_config():
    c = config.default()
    c.init_from = 'runs/mix130m'
    c.batch_size, c.seq_length = 16, 512
    c.num_steps = 3000  # about one pass over 170,000 records, of which three to four fill a row
    c.model.update(hidden_size=768, intermediate_size=2048, num_heads=12, num_layers=12)
    c.task.name = 'instructions'
    c.data.update(source='jsonl', path='commonsense_170k.json', template='llm_adapters', mode='pack', held_out=0.01)
    c.optim.update(
        name='adamw', learning_rate=3e-4, weight_decay=0.0, schedule='linear', warmup_ratio=0.0, min_ratio=0.0
    )
    c.eval.update(every=500, tokens=100_000)
    c.checkpoint.every = 500
    return c
