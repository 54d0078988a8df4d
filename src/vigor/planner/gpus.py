"""Known GPUs, from their makers' data sheets, and the machines that hold them."""

from __future__ import annotations

from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class GPU:
    """A data sheet's numbers."""

    name: str
    memory: float
    """GiB."""
    tflops: float
    """10¹² operations a second in bfloat16 with float32 sums, dense."""
    bandwidth: float
    """GB/s of its memory."""
    link: float
    """GB/s to its neighbours in the machine, one direction: NVLink, or PCIe."""


GPUS = {
    gpu.name: gpu
    for gpu in (
        GPU("RTX-3090", 24, 71, 936, 32),
        GPU("RTX-4090", 24, 165, 1008, 32),
        GPU("L4", 24, 121, 300, 32),
        GPU("A10", 24, 125, 600, 32),
        GPU("A100-40GB", 40, 312, 1555, 300),
        GPU("L40S", 48, 362, 864, 32),
        GPU("A100-80GB", 80, 312, 2039, 300),
        GPU("H100", 80, 989, 3350, 450),
        GPU("H200", 140, 989, 4800, 450),
        GPU("B200", 180, 2250, 8000, 900),
        GPU("MI300X", 192, 1307, 5300, 448),
    )
}
"""By name: NVIDIA's and AMD's public data sheets, SXM or OAM boards where there are any."""
BETWEEN_MACHINES = 25.0
"""GB/s a GPU, one direction: a network card of 200 Gbit/s for each."""
CUDA_BYTES = int(1.5 * GIB)
"""Assumed for CUDA's context, cuBLAS' and NCCL's buffers of a process."""
FRAGMENTED = 0.06
"""Assumed share of a GPU's memory that the caching allocator cannot use."""


@dataclass(frozen=True)
class Machine:
    """The GPUs of a plan."""

    gpu: GPU
    gpus: int
    in_one: int = 8
    """GPUs of one machine."""
    between: float = BETWEEN_MACHINES
    """GB/s a GPU to other machines, one direction."""

    @property
    def usable(self) -> int:
        """Bytes of one GPU that a process can fill."""
        return int(self.gpu.memory * GIB * (1 - FRAGMENTED)) - CUDA_BYTES

    def link(self, processes: int) -> float:
        """Bytes a second that a process exchanges with as many others."""
        return (self.gpu.link if processes <= self.in_one else min(self.gpu.link, self.between)) * 1e9


def closest(memory: float) -> GPU:
    """The slowest known GPU with at least so many GiB; the largest if there is none."""
    enough = [gpu for gpu in GPUS.values() if gpu.memory >= memory]
    least = min((gpu.memory for gpu in enough), default=max(gpu.memory for gpu in GPUS.values()))
    return min((gpu for gpu in GPUS.values() if gpu.memory == least), key=lambda gpu: gpu.tflops * gpu.bandwidth)
