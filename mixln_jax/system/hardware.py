"""What datasheets state of accelerators: peak speed, memory, clock."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Device:
    """A device: `flops` per second in dense bfloat16, bytes of `memory`, `clock` in cycles per second (the peak over
    what all matrix units do in a cycle), and its `name` in a topology such as v5e:8x8; None: not known, or not used."""

    flops: float
    memory: int | None = None
    clock: float | None = None
    name: str | None = None


GIB = 2**30
DEVICES = {  # by what JAX calls them
    'NVIDIA H200': Device(989e12, 141 * 10**9, name='h200'),
    'NVIDIA H100 80GB HBM3': Device(989e12, 80 * GIB, name='h100'),
    'NVIDIA H100 PCIe': Device(756e12),
    'NVIDIA A100-SXM4-80GB': Device(312e12, 80 * GIB, name='a100'),
    'NVIDIA A100-SXM4-40GB': Device(312e12),
    'TPU v3': Device(61.5e12),  # a device is a core, half a chip
    'TPU v4': Device(275e12, 32 * GIB, 1.05e9, 'v4'),
    'TPU v5 lite': Device(197e12, 16 * GIB, 1.5e9, 'v5e'),
    'TPU v5': Device(459e12, 95 * GIB, 1.75e9, 'v5p'),
    'TPU v6 lite': Device(918e12, 32 * GIB, 1.75e9, 'v6e'),
}
KINDS = {device.name: kind for kind, device in DEVICES.items() if device.name}  # what `plan --topology` knows


def mfu(flops_per_sec: float, device_kind: str, devices: int) -> float | None:
    """Returns the model FLOPs utilisation against the datasheet's peak; None for a device that is not listed."""
    device = DEVICES.get(device_kind)
    return flops_per_sec / (device.flops * devices) if device else None
