"""What is known of devices: peak speed."""

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


def mfu(flops_per_sec, device_kind, devices):
    """Model FLOPs utilisation against the datasheet's peak; None where that is unknown."""
    peak = PEAK_FLOPS.get(device_kind)
    return flops_per_sec / (peak * devices) if peak else None


# Kind of device as JAX names it, its memory in bytes (datasheets).
HARDWARE = {
    'v4': ('TPU v4', 32 * 2**30),
    'v5e': ('TPU v5 lite', 16 * 2**30),
    'v5p': ('TPU v5', 95 * 2**30),
    'v6e': ('TPU v6 lite', 32 * 2**30),
    'a100': ('NVIDIA A100-SXM4-80GB', 80 * 2**30),
    'h100': ('NVIDIA H100 80GB HBM3', 80 * 2**30),
    'h200': ('NVIDIA H200', 141 * 10**9),
}
# Cycles a second (datasheets: the peak over what all matrix units do in a cycle).
CLOCK = {'TPU v4': 1.05e9, 'TPU v5 lite': 1.5e9, 'TPU v5': 1.75e9, 'TPU v6 lite': 1.75e9}
