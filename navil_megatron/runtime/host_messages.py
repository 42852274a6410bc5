"""Bytes in host memory from one rank to another, over a group that nobody else uses meanwhile."""

import torch
from torch.distributed import ProcessGroup, Work


def start_send(content: memoryview, to: int, group: ProcessGroup) -> list[Work]:
    """Begins to send; the bytes stay as they are until all of the result was waited for."""
    messages = [torch.tensor([len(content)])]
    if len(content):
        messages.append(torch.frombuffer(content, dtype=torch.uint8))
    started = [torch.distributed.isend(message, to, group=group) for message in messages]
    return [work for work in started if work is not None]


def receive(source: int, group: ProcessGroup) -> memoryview:
    """What a rank sends; waits for it."""
    size = torch.zeros(1, dtype=torch.int64)
    torch.distributed.recv(size, source, group=group)
    content = torch.empty(int(size), dtype=torch.uint8)
    if len(content):
        torch.distributed.recv(content, source, group=group)
    return memoryview(content.numpy())
