"""Numbers that follow from losses, counts and times."""

import math

# Datasheet peaks in dense bfloat16 FLOP/s of one device, by what JAX calls it.
PEAK_FLOPS = {
    'NVIDIA H200': 989e12,
    'NVIDIA H100 80GB HBM3': 989e12,
    'NVIDIA H100 PCIe': 756e12,
    'NVIDIA A100-SXM4-80GB': 312e12,
    'NVIDIA A100-SXM4-40GB': 312e12,
    'TPU v3': 61.5e12,  # a device is a core, half a chip
    'TPU v4': 275e12,
    'TPU v5 lite': 197e12,
    'TPU v5': 459e12,
    'TPU v6 lite': 918e12,
}


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


def flops_per_position(num_params, embedding_params, num_layers, attention_width, seq_length):
    """FLOPs of training on one position: 6 N + 6 L T A; N parameters without the input embedding, which counts where it
    is the head too, A features of all query heads together; attention causal, no remat."""
    return 6 * (num_params - embedding_params) + 6 * num_layers * seq_length * attention_width


def mfu(flops_per_sec, device_kind, devices):
    """Model FLOPs utilisation against the datasheet's peak; None where that is unknown."""
    peak = PEAK_FLOPS.get(device_kind)
    return flops_per_sec / (peak * devices) if peak else None
