"""Mix-LN Table 3 (arXiv 2412.13795): the final reward of LLaMA-1B after learning from human feedback, Pre-LN 0.75 and
Mix-LN 1.32. Cells: pre_sft, pre_reward, pre_online, mix_sft, mix_reward, mix_online.

    for stage in sft reward online; do for p in pre mix; do
      python -m mixln_jax.main --config configs/paper/mixln_table3.py:${p}_$stage; done; done
    python -m mixln_jax.evaluate --checkpoint runs/mixln_table3_mix_online --against runs/mixln_table3_pre_online \
        --prompts prompts.jsonl --reward runs/mixln_table3_pre_reward --max_new_tokens 512

The authors published no setting, data or reward model for it. The numbers are those of a network that is not public, so
no run can meet them, and `expected` names them in words alone. What stands here is the comparison: both networks go the
same way and are judged by one reward model, that of Pre-LN; --reward runs/mixln_table3_mix_reward asks the other one.

The settings are those of ReMax (Li et al. 2023, arXiv 2310.10505) in Adam-mini's examples/RLHF, the likely ancestor:
supervised fine-tuning for 3 passes, 20 rows of 1,024 tokens, cosine with 10 steps of warm-up; a reward model from it, 1
pass at 2e-5; ReMax at 2e-7 with 12 answers a step, 512 tokens each for prompt and answer, KL weight 0.1 (there of one
token, here of the answer, in the reward), evaluated every 20 steps. Batches there are of each of an unknown number of
GPUs. Guesses are the rate of the first stage, the batch of the second, one pass of prompts, and the template. The runs
of Table 1 have seen no more than 256 tokens in a row.
"""

from mixln_jax import recipes

TEMPLATE = {'data.source': 'jsonl', 'data.template': 'alpaca', 'num_steps': 0, 'optim.schedule': 'cosine'}
SFT = TEMPLATE | {
    'task.name': 'instructions',
    'data.path': 'answers.jsonl',
    'data.mode': 'pack',
    'batch_size': 20,
    'seq_length': 1024,
    'num_epochs': 3.0,
    'optim.name': 'adamw',
    'optim.learning_rate': 1e-5,
    'optim.warmup_steps': 10,
    'optim.min_ratio': 0.0,
}
REWARD = TEMPLATE | {
    'task.name': 'reward',
    'data.path': 'pairs.jsonl',
    'data.mode': 'pad',
    'batch_size': 20,
    'seq_length': 2048,  # of both answers
    'num_epochs': 1.0,
    'optim.name': 'adamw',
    'optim.learning_rate': 2e-5,
}
ONLINE = TEMPLATE | {
    'task.name': 'online',
    'task.online.algorithm': 'remax',
    'task.online.reward': 'runs/mixln_table3_pre_reward',
    'task.online.completions': 1,
    'task.online.max_new_tokens': 512,
    'task.online.beta': 0.1,
    'data.path': 'prompts.jsonl',
    'data.mode': 'pad',
    'batch_size': 12,
    'seq_length': 1024,
    'num_epochs': 1.0,
    'optim.name': 'adamw',
    'optim.learning_rate': 2e-7,
    'eval.every': 20,
}


def _changes(placement, stage):
    before = {'sft': f'runs/mixln_table1_1b_{placement}'}.get(stage, f'runs/mixln_table3_{placement}_sft')
    keys = {'sft': SFT, 'reward': REWARD, 'online': ONLINE}[stage]
    return keys | {'init_from': before, 'model.norm_position': placement}


CELLS = {
    f'{placement}_{stage}': ('1b', _changes(placement, stage), '')
    for placement in ('pre', 'mix')
    for stage in ('sft', 'reward', 'online')
}
REPORTED = {'pre_online': 0.75, 'mix_online': 1.32}


def get_config(cell=''):
    config = recipes.cell(__file__, 'Mix-LN Table 3', CELLS, {}, cell)
    if cell in REPORTED:
        config.expected.source += f': a final reward of {REPORTED[cell]} by a reward model that is not public'
    return config
