"""Collectives on one tensor, by the names that the installed torch has: newer versions renamed two."""

import torch.distributed as dist

all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
"""(output, input, group=, async_op=): every rank's rows, one rank after the other."""

reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
"""(output, input, group=, async_op=): this rank's share of the rows, summed over the ranks."""
