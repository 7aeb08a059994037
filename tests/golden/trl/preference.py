"""Writes preference.json, what TRL's DPO and reward trainers make of given log-probabilities and scores:

pip install trl==1.16.0 torch==2.13.0 transformers==5.24.0
python tests/golden/trl/preference.py
"""

import json
import pathlib
from unittest import mock

import numpy as np
import torch
from trl import DPOTrainer, RewardTrainer

BETA, CENTRE = 0.3, 0.05


def trainer(**settings):
    """A stand-in for a trainer, as far as its loss reads it."""
    self = mock.MagicMock()
    self.configure_mock(
        aux_loss_enabled=False, ld_alpha=None, precompute_ref_logps=True, f_divergence_type='reverse_kl', beta=BETA,
        label_smoothing=0.0, use_weighting=False, loss_weights=[1.0], **settings,
    )  # fmt: skip
    self.accelerator.gather.side_effect = self.accelerator.gather_for_metrics.side_effect = lambda values: values
    self.args.configure_mock(center_rewards_coefficient=settings.get('centre'))
    return self


def preference(name, given):
    """The loss and gradient of a loss type; the rows of `given` are chosen, then rejected answers."""
    log_probs, mask = given['log_probs'].clone().requires_grad_(), given['mask']
    outputs = mock.MagicMock()
    outputs.log_probs = log_probs * mask
    outputs.is_top1, outputs.entropy, outputs.mean_logits = mask.bool(), mask, mask
    chosen, rejected = (given['reference'] * mask).sum(1).chunk(2)
    before = torch.zeros((len(mask), 1))
    inputs = {
        'input_ids': torch.zeros((len(mask), mask.shape[1] + 1), dtype=torch.long),
        'attention_mask': torch.ones((len(mask), mask.shape[1] + 1)),
        'completion_mask': torch.cat([before, mask], 1), 'ref_chosen_logps': chosen, 'ref_rejected_logps': rejected,
    }  # fmt: skip
    loss = DPOTrainer._compute_loss(trainer(loss_types=[name]), lambda **_: outputs, inputs, False)
    loss.backward()
    return {'loss': loss.item(), 'gradient': log_probs.grad.tolist()}


def reward(scores, margin, centre):
    """The loss and gradient of scores, chosen, then rejected ones."""
    scores = scores.clone().requires_grad_()
    outputs = mock.MagicMock()
    outputs.logits = scores[:, None]
    inputs = {'attention_mask': torch.ones((len(scores), 1))} | ({'margin': margin} if margin is not None else {})
    loss = RewardTrainer.compute_loss(trainer(centre=centre), lambda **_: outputs, inputs)
    loss.backward()
    return {'loss': loss.item(), 'gradient': scores.grad.tolist()}


def main():
    """Writes the file."""
    rng = np.random.default_rng(0)
    log_probs = rng.normal(-2, 0.5, (6, 5))
    arrays = {
        'log_probs': log_probs,
        'reference': log_probs + rng.normal(0, 0.5, (6, 5)),
        'mask': np.arange(5) < np.array([5, 3, 1, 4, 2, 5])[:, None],
        'scores': rng.normal(0, 2, 6),
        'margin': rng.uniform(0, 2, 3),
    }
    arrays = {name: np.float32(values) for name, values in arrays.items()}
    result = {name: values.tolist() for name, values in arrays.items()} | {'beta': BETA, 'centre': CENTRE}
    given = {name: torch.tensor(values) for name, values in arrays.items()}
    result |= {name: preference(name, given) for name in ('sigmoid', 'ipo', 'sigmoid_norm')}
    result['reward'] = reward(given['scores'], None, None)
    result['reward_margin_centre'] = reward(given['scores'], given['margin'], CENTRE)
    pathlib.Path(__file__).with_suffix('.json').write_text(json.dumps(result, indent=1) + '\n')


if __name__ == '__main__':
    main()
