"""Numbers that follow from losses, counts and times."""

import math


def evaluation(loss_sum, tokens, num_bytes):
    """`eval/*` of a sum of token losses (nats), the tokens and the bytes of text that they stand for."""
    loss = loss_sum / tokens
    return {
        'eval/loss': loss,
        'eval/perplexity': perplexity(loss),
        'eval/tokens': tokens,
        'eval/bits_per_byte': loss_sum / math.log(2) / num_bytes if num_bytes else None,
    }


def official_perplexity(sums, counts):
    """What the Mix-LN authors' code reports of n batches: exp of the sum of the batches' mean losses over n + 1, for
    its count starts at one (torchrun_main.py, evaluate_model). It is too low."""
    means = [total / count for total, count in zip(sums, counts, strict=True) if count]
    return perplexity(sum(means) / (len(means) + 1))


def perplexity(loss):
    """exp(loss), infinite where that overflows."""
    return math.exp(loss) if loss < 709 else math.inf
