"""Evaluation: loss, perplexity and bits per byte over a fixed stretch of text, weighed by tokens."""

import jax

from mixln_jax import mesh as meshes
from mixln_jax import metrics


def evaluate(
    eval_step, params, batches, *, at_a_time, byte_lengths, num_tokens, sharding, check=lambda: None, official=False
):
    """Evaluates on batches until at least `num_tokens` target tokens have been seen or the batches end.

    Args:
        eval_step: (params, batch) -> (sum of losses, count), compiled.
        params: the weights.
        batches: iterable of dicts of numpy arrays [B,T], the same in every process; see data/layout.py.
        at_a_time: batches between looks at `num_tokens`, so that smaller batches see the same text.
        byte_lengths: [V], bytes of text that each token id stands for.
        num_tokens: when to stop.
        sharding: of the batches' arrays on devices.
        check: called before each batch; may raise to stop early.
        official: whether to give `eval/perplexity_official` besides.

    Returns:
        {'eval/loss', 'eval/perplexity', 'eval/tokens', 'eval/bits_per_byte'}.
    """
    sums, counts, num_bytes = [], [], 0
    for batch in batches:
        check()
        sums.append(eval_step(params, meshes.place(batch, sharding))[0])
        counts.append(int(batch['weights'].sum()))
        num_bytes += float((byte_lengths[batch['targets']] * batch['weights']).sum())
        if len(sums) > 1:
            sums[-2] = jax.device_get(sums[-2])  # the batch before: keeps the device busy and its queue short
        if sum(counts) >= num_tokens and len(sums) % at_a_time == 0:
            break
    sums = [float(jax.device_get(total)) for total in sums]
    values = metrics.evaluation(sum(sums), sum(counts), num_bytes)
    return values | ({'eval/perplexity_official': metrics.official_perplexity(sums, counts)} if official else {})
