"""The hardware that a plan is for: memory, rates and bandwidths, and where each default comes from."""

from dataclasses import dataclass

RESERVED_GB = 3.0
"""Memory that no tensor of ours gets: the CUDA context, NCCL's buffers, what the allocator cannot place."""
PEAK_TFLOPS = 989
"""Dense BF16 of an H100 SXM, for MFU."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """Figures of one GPU and its links; defaults are published ones for an H100 SXM and no measurement of ours."""

    gpus: int  # GPUs of the run
    hbm: float = 80.0  # memory of a GPU, in GB (10^9 bytes)
    gpus_per_node: int = 8  # GPUs that NVLink joins
    nvlink: float = 450.0
    """GB/s that a GPU sends inside its node: half of the 900 GB/s that count both directions."""
    network: float = 50.0  # GB/s that a GPU sends to another node: one 400 Gb/s port a GPU
    rate: float = 466.0
    """TFLOP/s of model FLOPs while a GPU computes: what Megatron-LM publishes for a dense 7.1B in BF16 (47% MFU)."""
    hbm_bandwidth: float = 3350.0  # GB/s of memory traffic in the update, which computes next to nothing

    @property
    def usable_bytes(self) -> float:
        """What tensors may take of a GPU."""
        return (self.hbm - RESERVED_GB) * 1e9

    def link(self, num_ranks: int, stride: int) -> float:
        """Bytes a second between ranks of a group that lie ``stride`` apart."""
        return (self.nvlink if num_ranks * stride <= self.gpus_per_node else self.network) * 1e9

    def assumptions(self) -> tuple[str, ...]:
        """One line for each figure that the plan rests on."""
        return (
            f"compute: {self.rate:g} TFLOP/s a GPU while it computes (Megatron-LM's published BF16 figure for a dense "
            "7.1B on H100 is 466); not measured here, set --rate",
            f"links: {self.nvlink:g} GB/s a GPU inside a node of {self.gpus_per_node}, {self.network:g} GB/s to other "
            "nodes; collectives at ring cost, nothing overlapped",
            f"memory: {self.hbm:g} GB less {RESERVED_GB:g} GB for the CUDA context, NCCL and the allocator; not yet "
            "compared with a GPU",
        )


def ring_share(collective: str, num_ranks: int) -> float:
    """Share of a collective's payload that a rank sends on a ring."""
    once = (num_ranks - 1) / num_ranks
    return {"all-reduce": 2 * once, "send": 1.0}.get(collective, once)
