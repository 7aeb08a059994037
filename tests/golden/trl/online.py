"""Writes online.json, what TRL's GRPO and RLOO trainers make of given log-probabilities:

pip install trl==1.16.0 torch==2.13.0 transformers==5.24.0
python tests/golden/trl/online.py
"""

import json
import pathlib
from unittest import mock

import numpy as np
import torch
from trl import GRPOTrainer, RLOOTrainer

CLIP, BETA = 0.2, 0.04


def trainer(log_probs, **settings):
    """A stand-in for a trainer, as far as `_compute_loss` reads it."""
    self = mock.MagicMock()
    self._get_per_token_logps_and_entropies.return_value = (log_probs, torch.zeros_like(log_probs), None)
    self.configure_mock(
        aux_loss_enabled=False, epsilon_low=CLIP, epsilon_high=CLIP, top_entropy_quantile=1.0, use_vllm=False,
        off_policy_mask_threshold=None, importance_sampling_level='token', loss_type='dapo',
        current_gradient_accumulation_steps=1, _entropy_bonus_enabled=False, **settings,
    )  # fmt: skip
    self.args.configure_mock(delta=None, use_bias_correction_kl=False, steps_per_generation=1)
    self.accelerator.num_processes = 1
    self.accelerator.gather.side_effect = lambda values: values
    return self


def main():
    """Writes the file."""
    rng = np.random.default_rng(0)
    old = rng.normal(-2, 0.5, (6, 5))
    new, reference = (old + rng.normal(0, 0.15, old.shape) for _ in range(2))
    mask = np.arange(5) < np.array([5, 3, 1, 4, 2, 5])[:, None]
    advantages = np.array([1.5, -0.5, -2, 0.3, -1, 0.7])
    arrays = {
        'old': old,
        'log_probs': new,
        'reference': reference,
        'mask': mask.astype(float),
        'advantages': advantages,
    }
    arrays = {name: np.float32(values) for name, values in arrays.items()}
    result = {name: values.tolist() for name, values in arrays.items()} | {'clip': CLIP, 'beta': BETA}
    given = {name: torch.tensor(values) for name, values in arrays.items()}
    ids = torch.zeros((6, 5), dtype=torch.long)
    inputs = {
        'prompt_ids': ids[:, :1], 'prompt_mask': ids[:, :1], 'completion_ids': ids,
        'completion_mask': given['mask'], 'advantages': given['advantages'], 'old_per_token_logps': given['old'],
        'old_logps': (given['old'] * given['mask']).sum(1), 'ref_per_token_logps': given['reference'],
        'num_items_in_batch': given['mask'].sum(),
    }  # fmt: skip
    for name, kind, beta in (('grpo', GRPOTrainer, 0.0), ('grpo_kl', GRPOTrainer, BETA), ('rloo', RLOOTrainer, 0.0)):
        log_probs = given['log_probs'].clone().requires_grad_()
        loss = kind._compute_loss(trainer(log_probs, beta=beta), mock.MagicMock(), inputs)
        loss.backward()
        result[name] = {'loss': loss.item(), 'gradient': log_probs.grad.tolist()}
    pathlib.Path(__file__).with_suffix('.json').write_text(json.dumps(result, indent=1) + '\n')


if __name__ == '__main__':
    main()
