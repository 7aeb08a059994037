"""What datasheets state about accelerators: peak speed, memory, clock."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Device:
    """One device; None: not known, or not needed."""

    flops: float  # per second, dense bfloat16
    memory: int | None = None  # bytes
    clock: float | None = None  # cycles per second: `flops` over the FLOPs of all matrix units in a cycle
    name: str | None = None  # in a topology such as v5e:8x8


GIB = 2**30
DEVICES = {  # by JAX's `device_kind`
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
# JAX's `device_kind` by the name that `plan --topology` takes.
KINDS = {device.name: kind for kind, device in DEVICES.items() if device.name}


def mfu(flops_per_sec: float, device_kind: str, devices: int) -> float | None:
    """Returns the model FLOPs utilisation, as a share of the datasheet's peak; None for a device that is not listed."""
    device = DEVICES.get(device_kind)
    return flops_per_sec / (device.flops * devices) if device else None
