"""The product of both modalities: the values of plain torch, one product where there were two and a copy, nothing kept
that can be gathered again, and collectives under the products.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from navil_megatron.kernels import modality_product
from tests.engine.conftest import Place
from tests.engine.host import run_rehearsed
from tests.engine.runs import distance
from tests.held_memory import watching
from tests.ranks import start_session, tiny_config
from tests.tolerances import BF16_KERNELS, FP8_ROUNDING

RECIPES = ["none", "delayed", "tensorwise", "blockwise"]
ROWS, IN, OUT = 512, 256, 384
SETUP = "get_num_cublas_streams"
"""Asked for once a process."""
SPLITS = {"both": 128, "mostly text": 384, "no text": 0, "no image": ROWS}
"""Text rows. On the second of two ranks that share out the rows there may be none."""


def recipe(fp8: str) -> Any:
    from transformer_engine.common import recipe

    kinds = {"delayed": recipe.DelayedScaling, "tensorwise": recipe.Float8CurrentScaling}
    return None if fp8 == "none" else kinds.get(fp8, recipe.Float8BlockScaling)()


def draw(seed: int, *shape: int) -> torch.Tensor:
    """Rows of very different sizes by modality, which share no scale."""
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return (values * torch.linspace(0.5, 4, shape[0]).unsqueeze(-1)).bfloat16()


class Layer:
    """A product of the engine with weights of its own, the same for all layers of a seed."""

    def __init__(self, device: str, bias: bool = False, fused: bool = False, columns: slice = slice(None)) -> None:
        from navil_megatron.kernels import te_kernels

        width = len(range(OUT)[columns])
        with torch.device(device):
            self.linears = [te_kernels.build_linear(IN, width, bias=bias, dtype=torch.bfloat16) for _ in range(2)]
        with torch.no_grad():
            for number, linear in enumerate(self.linears):
                linear.weight.copy_(draw(10 + number, OUT, IN)[columns])
                if bias:
                    linear.bias.copy_(draw(20 + number, OUT, 1)[columns, 0])
        self.product = te_kernels.ModalityProduct(*self.linears, fuse_wgrad_accumulation=fused)
        self.parameters = [parameter for linear in self.linears for parameter in linear.parameters()]

    def step(self, rows: torch.Tensor, grad: torch.Tensor, num_text: int, fp8: str, *how: Any) -> list[torch.Tensor]:
        """Output and gradients: of the rows, of the parameters."""
        import transformer_engine.pytorch as te

        for parameter in self.parameters:
            parameter.grad = None
        rows = rows.clone().requires_grad_()
        # Delayed scaling has scales that fit from the second pass on.
        for _ in range(2 if fp8 == "delayed" else 1):
            rows.grad = None
            for parameter in self.parameters:
                parameter.grad = None
            with te.autocast(enabled=fp8 != "none", recipe=recipe(fp8)):
                output = self.product(rows, num_text, *(how or (None, False)))
            output.backward(grad)
        return [output.detach(), rows.grad, *(parameter.grad for parameter in self.parameters)]


def expected(rows: torch.Tensor, grad: torch.Tensor, layer: Layer, num_text: int) -> list[torch.Tensor]:
    """The same in FP32."""
    leaves = [part.detach().float().requires_grad_() for part in (rows, *layer.parameters)]
    weights, biases = leaves[1 :: len(layer.parameters) // 2], leaves[2::2] if len(leaves) > 3 else (None, None)
    parts = zip(leaves[0].split([num_text, len(rows) - num_text]), weights, biases, strict=True)
    output = torch.cat([torch.nn.functional.linear(part, weight, bias) for part, weight, bias in parts])
    output.backward(grad.float())
    return [output.detach(), *(leaf.grad for leaf in leaves)]


def on_one_rank(rank: int, world_size: int, device: str) -> dict[str, float]:
    found = {}
    for fp8 in RECIPES:
        for name, num_text in SPLITS.items():
            for bias in (False, True):
                layer = Layer(device, bias)
                rows, grad = draw(1, ROWS, IN).to(device), draw(2, ROWS, OUT).to(device)
                ours, theirs = layer.step(rows, grad, num_text, fp8), expected(rows, grad, layer, num_text)
                assert len(ours) == len(theirs) == (6 if bias else 4)
                for part, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
                    found[f"{fp8}, {name}, bias {bias}, {part}"] = distance(mine.float(), other)
    return found


def test_values_of_every_recipe(place: Place) -> None:
    (found,) = place.run(1, on_one_rank, place.device)
    limits = {name: BF16_KERNELS if name.startswith("none") else FP8_ROUNDING for name in found}
    assert {name: value for name, value in found.items() if not value <= limits[name]} == {}


def on_two_ranks(rank: int, world_size: int, device: str) -> dict[str, float]:
    found = {}
    half, width = ROWS // 2, OUT // 2
    columns = slice(rank * width, (rank + 1) * width)
    config = tiny_config(parallel={"tensor_model_parallel_size": 2, "sequence_parallel": True})
    with start_session(rank, world_size, config) as session:
        rows, grad = draw(1, ROWS, IN).to(device), draw(2, ROWS, OUT).to(device)
        for fp8 in RECIPES:
            for name, num_text in SPLITS.items():
                for sequence_parallel in (False, True):
                    whole, layer = Layer(device), Layer(device, columns=columns)
                    theirs = expected(rows, grad, whole, num_text)
                    share = slice(rank * half, (rank + 1) * half) if sequence_parallel else slice(None)
                    ours = layer.step(
                        rows[share], grad[:, columns].contiguous(), num_text, fp8, session.groups.tp, sequence_parallel
                    )
                    cuts = ((slice(None), columns), share, columns, columns)
                    case = f"{fp8}, {name}, {'shared out' if sequence_parallel else 'whole'}"
                    for part, (mine, other, cut) in enumerate(zip(ours, theirs, cuts, strict=True)):
                        found[f"{case}, {part}"] = distance(mine.float(), other[cut])
                    alone = Layer(device, columns=columns).step(rows, grad[:, columns].contiguous(), num_text, fp8)[0]
                    found[f"{case}, as alone"] = distance(ours[0].float(), alone.float())  # the same scales
    return found


def test_values_on_two_ranks(place: Place) -> None:
    """A rank's share may hold no row of a modality, and still every rank takes the same scale of it."""
    limits = {"none": BF16_KERNELS, **dict.fromkeys(RECIPES[1:], FP8_ROUNDING)}
    same = 0 if place.device == "cpu" else BF16_KERNELS
    for found in place.run(2, on_two_ranks, place.device):
        assert len(found) == 4 * 4 * 2 * 5
        far = {
            name: value
            for name, value in found.items()
            if not value <= (same if name.endswith("as alone") else limits[name.split(",")[0]])
        }
        assert far == {}


def trained_alone(rank: int, world_size: int, device: str) -> list[str]:
    """What went wrong where one matrix, or both, are frozen."""
    wrong = []
    rows, grad = draw(1, ROWS, IN).to(device), draw(2, ROWS, OUT).to(device)
    for fp8 in RECIPES:
        for fused in (False, True):
            results = {}
            for trained in ((True, True), (True, False), (False, True), (False, False)):
                layer = Layer(device, fused=fused)
                for linear, needed in zip(layer.linears, trained, strict=True):
                    linear.weight.requires_grad_(needed)
                    linear.weight.main_grad = torch.ones(OUT, IN, dtype=torch.float32, device=device)
                _, grad_rows, *gradients = layer.step(rows, grad, 128, fp8)
                if fused:
                    gradients = [
                        linear.weight.main_grad - 1 if linear.weight.requires_grad else None for linear in layer.linears
                    ]
                results[trained] = [grad_rows, *gradients]
            for trained, found in results.items():
                for part, needed in zip((0, 1, 2), (True, *trained), strict=True):
                    both = results[True, True][part]
                    right = torch.equal(found[part], both) if needed else found[part] is None
                    if not right:
                        wrong.append(f"{fp8}, fused {fused}, {trained}, {part}")
    return wrong


def test_frozen_matrices(place: Place) -> None:
    """The others' gradients do not change, whichever of the two is frozen."""
    assert place.run(1, trained_alone, place.device) == [[]]


def kept(rank: int, world_size: int) -> dict[str, int]:
    """Bytes that a layer keeps for its backward pass, of rows that are gathered and of rows that are not."""
    import transformer_engine.pytorch as te

    found = {}
    config = tiny_config(parallel={"tensor_model_parallel_size": 2, "sequence_parallel": True})
    with start_session(rank, world_size, config) as session:
        for fp8 in RECIPES:
            for name, how in {"alone": (None, False), "gathered": (session.groups.tp, True)}.items():
                layer = Layer("cpu")
                rows = draw(1, ROWS, IN)[: ROWS // (2 if name == "gathered" else 1)].clone().requires_grad_()
                with te.autocast(enabled=fp8 != "none", recipe=recipe(fp8)), watching(layer.parameters) as held:
                    layer.product(rows, 128, *how)
                found[f"{fp8}, {name}"] = held.num_bytes
    return found


def test_gathered_rows_are_not_kept() -> None:
    """Of what is gathered a rank keeps its own share, in the type in which it is sent."""
    share, scales = ROWS // 2 * IN, 2 * 4
    strips = (ROWS // 128) * IN * 4  # columnwise scales of blocks
    expected = {
        "none, alone": 4 * share,
        "none, gathered": 2 * share,
        "delayed, alone": 2 * share + scales,
        "delayed, gathered": share + scales,
        "tensorwise, alone": 2 * share + scales,
        "tensorwise, gathered": share + scales,
        "blockwise, alone": 2 * share + strips,
        "blockwise, gathered": 2 * share,
    }
    assert run_rehearsed(2, kept) == [expected, expected]


class Copies(TorchDispatchMode):
    """Counts concatenations."""

    num = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.num += func is torch.ops.aten.cat.default
        return func(*args, **kwargs or {})


def counted(rank: int, world_size: int) -> dict[str, tuple[dict, int]]:
    from tests.engine.standin import calls

    found = {}
    for fp8 in RECIPES:
        layer = Layer("cpu")
        calls.CALLS.clear()
        with Copies() as copies:
            layer.step(draw(1, ROWS, IN), draw(2, ROWS, OUT), 128, fp8.replace("delayed", "tensorwise"))
        found[fp8] = ({name: num for name, num in calls.count().items() if name != SETUP}, copies.num)
    return found


def test_one_product_and_no_copy() -> None:
    """Forward and backward; three tensors of each modality are quantized, each once."""
    (found,) = run_rehearsed(1, counted)
    assert found.pop("none") == ({"te_general_grouped_gemm": 3}, 0)
    assert found == dict.fromkeys(found, ({"te_general_grouped_gemm": 3, "quantize": 6}, 0))


@contextmanager
def noted(events: list[str]) -> Iterator[None]:
    """Notes when collectives of a product start and end, beside what the stand-in is asked for."""
    from tests.engine.standin import calls

    class Work:
        def __init__(self, name: str, work: Any) -> None:
            self.name, self.work = name, work

        def wait(self) -> None:
            self.work.wait()
            note(f"{self.name} ends")

    def note(event: str) -> None:
        events.extend(call.name for call in calls.CALLS if call.name != SETUP)
        calls.CALLS.clear()
        events.append(event)

    def watched(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def start(*args: Any, async_op: bool, **options: Any) -> Any:
            note(f"{name} starts" if async_op else name)
            work = original(*args, async_op=async_op, **options)
            return Work(name, work) if async_op else work

        return start

    originals = {name: getattr(modality_product, f"{name}_single") for name in ("all_gather", "reduce_scatter")}
    for name, original in originals.items():
        setattr(modality_product, f"{name}_single", watched(name, original))
    calls.CALLS.clear()
    try:
        yield
        note("end")
    finally:
        for name, original in originals.items():
            setattr(modality_product, f"{name}_single", original)


def in_order(rank: int, world_size: int) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    config = tiny_config(parallel={"tensor_model_parallel_size": 2, "sequence_parallel": True})
    with start_session(rank, world_size, config) as session:
        for fp8 in ("none", "tensorwise", "blockwise"):
            layer = Layer("cpu")
            with noted(found.setdefault(fp8, [])):
                layer.step(draw(1, ROWS // 2, IN), draw(2, ROWS, OUT), 128, fp8, session.groups.tp, True)
    return found


def test_collectives_run_under_products() -> None:
    """The rows come while the input's gradient is computed, which is summed while the weights' are."""
    product = "te_general_grouped_gemm"
    backward = [
        "all_gather starts",
        product,
        "reduce_scatter starts",
        "all_gather ends",
        product,
        "reduce_scatter ends",
    ]
    for found in run_rehearsed(2, in_order):
        assert found["none"] == ["all_gather", product, *backward, "end"]
        for fp8, sent_as_fp8 in (("tensorwise", True), ("blockwise", False)):
            events = [event for event in found[fp8] if event not in ("quantize", "fp8_transpose")]
            assert events == found["none"]
            assert (found[fp8][0] == "quantize") == sent_as_fp8
            assert found[fp8].count("fp8_transpose") == 2 * sent_as_fp8
