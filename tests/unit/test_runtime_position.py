"""What hooks on a model note of its passes, seen from inside its layers, forward and backward."""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from navil_megatron.runtime.position import Position


class _Seen(torch.autograd.Function):
    """Says where the forward and the backward pass are."""

    @staticmethod
    def forward(ctx, states: Tensor, see) -> Tensor:
        ctx.see = see
        see()
        return states.clone()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        ctx.see()
        return gradient, None


class _Layer(nn.Module):
    def __init__(self, number: int, see) -> None:
        super().__init__()
        self.layer_number, self.see = number, see

    def forward(self, states: Tensor) -> tuple[Tensor, None]:
        return _Seen.apply(states, self.see), None


class _Stage(nn.Module):
    """Layers 3 and 4 of a whole model, wrapped as data parallelism wraps it."""

    def __init__(self, see, recompute: bool = False) -> None:
        super().__init__()
        self.module = nn.ModuleDict(
            {"decoder": nn.ModuleDict({"layers": nn.ModuleList([_Layer(n, see) for n in (3, 4)])})}
        )
        self.recompute = recompute

    def forward(self, states: Tensor) -> Tensor:
        for layer in self.module["decoder"]["layers"]:
            states = checkpoint(layer, states, use_reentrant=True)[0] if self.recompute else layer(states)[0]
        return states


def test_passes_and_layers_are_noted_by_their_numbers() -> None:
    position, seen = Position(), []
    stage = _Stage(lambda: seen.append((position.step, str(position))))
    position.follow([stage])
    steps = position.steps(iter("ab"), 6)
    for _ in range(2):
        assert str(position).endswith("layers.2" if seen else "") and next(steps) in "ab" and str(position) == ""
        outputs = [stage(torch.ones(1, requires_grad=True)) for _ in range(2)]
        for output in outputs:
            output.backward()
    in_step = [
        *[f"last began forward of microbatch {n}, module decoder.layers.{layer}" for n in (1, 2) for layer in (2, 3)],
        *[f"last began backward of microbatch {n}, module decoder.layers.{layer}" for n in (1, 2) for layer in (3, 2)],
    ]
    assert seen == [(step, words) for step in (7, 8) for words in in_step]


def test_what_is_computed_again_is_of_the_backward_pass() -> None:
    position, seen = Position(), []
    stage = _Stage(lambda: seen.append(position.last), recompute=True)
    position.follow([stage])
    stage(torch.ones(1, requires_grad=True)).backward()
    layers = ("decoder.layers.2", "decoder.layers.3")
    again = [("backward", 1, layer) for layer in reversed(layers) for _ in range(2)]
    assert seen == [("forward", 1, layer) for layer in layers] + again


def test_evaluation_counts_apart_and_each_chunk_for_itself() -> None:
    position, seen = Position(), []
    stages = [_Stage(lambda: seen.append(position.last[:2])) for _ in range(2)]
    position.follow(stages)
    for stage in stages:
        stage(torch.ones(1))
        stage.eval()(torch.ones(1))
        stage.train()(torch.ones(1))
    assert seen[::2] == [("forward", 1), ("evaluation", 1), ("forward", 2)] * 2
