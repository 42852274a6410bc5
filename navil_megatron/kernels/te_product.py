"""Rows that lie matrix by matrix, each through its own: one grouped product of Transformer Engine, in BF16 or FP8.

The engine's ``GroupedLinear`` sends nothing, asks the first matrix alone whether gradients are wanted, and keeps the
rows that it is given. Here a column layer's collectives run under the products, its gathered rows are not kept, and any
matrix may be frozen or without rows. Scales and types of numbers are the engine's, by the recipe that is entered around
the call.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
import transformer_engine.pytorch as te
from torch import Tensor, nn
from torch.distributed import ProcessGroup, ReduceOp
from transformer_engine.pytorch.cpp_extensions import general_grouped_gemm
from transformer_engine.pytorch.module.base import get_dummy_wgrad
from transformer_engine.pytorch.quantization import FP8GlobalStateManager
from transformer_engine.pytorch.quantized_tensor import prepare_for_saving, restore_from_func_ctx
from transformer_engine.pytorch.tensor import Float8BlockQuantizer, Float8CurrentScalingQuantizer, Float8Quantizer
from transformer_engine.pytorch.tensor.storage.float8_tensor_storage import Float8TensorStorage

from navil_megatron.kernels.modality_product import start_gather, start_reduce
from navil_megatron.kernels.torch_kernels import grouped_product

LAYOUTS = {"fprop": "TN", "dgrad": "NN", "wgrad": "NT"}
"""The engine's words for the three products of a linear, and how each reads its operands."""


class WeightsAlone:
    """Leaves ``_extra_state`` out of state dicts: torch asks for it only where a class has its own methods."""

    get_extra_state = nn.Module.get_extra_state
    set_extra_state = nn.Module.set_extra_state


class QuantizedOnce(WeightsAlone):
    """A linear of the engine that holds quantized weights from one microbatch of a step to the next: megatron-core's
    schedules mark each first one, and None, after the last, lets go of them. Without a mark each call quantizes.
    """

    _fp8_workspaces: dict[str, Any]
    _is_first_microbatch: bool | None = None

    @property
    def is_first_microbatch(self) -> bool | None:
        """None: outside a schedule."""
        return self._is_first_microbatch

    @is_first_microbatch.setter
    def is_first_microbatch(self, value: bool | None) -> None:
        self._is_first_microbatch = value
        if value is not False:
            self._fp8_workspaces.clear()


class GroupedProduct(QuantizedOnce, te.GroupedLinear):
    """The matrices of linears of one size. The linears hold the weights; this has what the engine's recipes know of
    them, and nothing to save.
    """

    def __init__(self, linears: Sequence[Any], fuse_wgrad_accumulation: bool):
        self._set_up(len(linears), linears[0].weight, fuse_wgrad_accumulation)
        self.linears = tuple(linears)  # in a tuple they are no children, which would name their weights twice

    def _set_up(self, num_matrices: int, weight: Tensor, fuse_wgrad_accumulation: bool) -> None:
        output_size, input_size = weight.shape[-2:]
        options = {"params_dtype": weight.dtype, "fuse_wgrad_accumulation": fuse_wgrad_accumulation}
        super().__init__(num_matrices, input_size, output_size, bias=False, device="meta", **options)
        for number in range(num_matrices):
            self.register_parameter(f"weight{number}", None)

    def weights(self) -> list[Any]:
        """The matrices."""
        return [linear.weight for linear in self.linears]

    def biases(self) -> list[Tensor]:
        """Of all matrices or of none."""
        return [linear.bias for linear in self.linears if linear.use_bias]

    def forward(
        self, rows: Tensor, sizes: Sequence[int], group: ProcessGroup | None = None, sequence_parallel: bool = False
    ) -> Tensor:
        """Multiply; a matrix without rows leaves zero gradients.

        Args:
            rows: [r, in], those of the first matrix first, or this rank's share of them under sequence parallelism.
            sizes: Rows of each matrix, of all ranks.
            group: Tensor-parallel ranks that share the input; ``None``: no collective.
            sequence_parallel: The ranks hold shares of the rows, which are gathered first.

        Returns:
            [r of all ranks, out].
        """
        rows = self.prepare_forward(rows, num_gemms=self.num_gemms)
        try:
            inputs, weights, *_, gradients = self._get_quantizers()
            with_backward = torch.is_grad_enabled()
            call = _Call(
                self,
                tuple(sizes),
                group,
                gathers=group is not None and sequence_parallel,
                recipe=FP8GlobalStateManager.get_fp8_recipe() if self.fp8 else None,
                input_quantizers=inputs,
                weight_quantizers=weights,
                gradient_quantizers=gradients,
                with_backward=with_backward,
                updates_scales=self.fp8 and with_backward and FP8GlobalStateManager.is_first_fp8_module(),
            )
            output: Tensor = _Product.apply(rows, call, *self.weights(), *self.biases())
            return output
        finally:
            self.end_forward()
            if self.is_first_microbatch:
                self.is_first_microbatch = False

    def weight_operand(self, number: int, weight: Tensor, quantizer: Any, columnwise: bool) -> Any:
        """A matrix as the engine's products take it."""
        name = f"weight{number}"
        held = self._fp8_workspaces.get(name)
        if held is None:
            held = quantized(weight.detach(), quantizer, rowwise=True, columnwise=columnwise)
            if quantizer is not None and self.is_first_microbatch is not None:
                self._fp8_workspaces[name] = held
        return held


class StackProduct(GroupedProduct):
    """Several experts of a modality, whose matrices are one weight [e, out, in]: in FP8 by the engine, which must know
    each expert's rows on the host and takes multiples of ``row_multiple``, and in BF16 by torch.
    """

    def __init__(self, holder: nn.Module, row_multiple: int):
        weight = holder.get_parameter("weight")
        self._set_up(len(weight), weight, fuse_wgrad_accumulation=False)
        self.holders = (holder,)
        self.pad = te.Fp8Padding(len(weight), row_multiple)
        self.unpad = te.Fp8Unpadding(len(weight), row_multiple)

    def weights(self) -> list[Any]:
        """The matrices, as views whose gradients torch puts together."""
        return list(self.holders[0].get_parameter("weight").unbind())

    def biases(self) -> list[Tensor]:
        """None."""
        return []

    def forward(self, rows: Tensor, ends: Tensor) -> Tensor:  # type: ignore[override]
        """See ``layers.kernels``."""
        if not FP8GlobalStateManager.is_fp8_enabled():
            return grouped_product(self.holders[0], rows, ends)
        sizes = ends.diff(prepend=ends.new_zeros(1)).tolist()
        padded, padded_sizes = self.pad(rows, sizes)
        output: Tensor = self.unpad(super().forward(padded, padded_sizes), sizes)
        return output


@dataclass(frozen=True, slots=True)
class _Call:
    """One pass through a ``GroupedProduct``. Operands of the engine's products are listed for used matrices alone."""

    product: GroupedProduct
    sizes: tuple[int, ...]
    group: Any
    """``ProcessGroup``; None: no collective."""
    gathers: bool
    recipe: Any
    """None: BF16."""
    input_quantizers: Sequence[Any]
    weight_quantizers: Sequence[Any]
    gradient_quantizers: Sequence[Any]
    with_backward: bool
    updates_scales: bool
    """The backward pass of this product is the last that delayed scaling waits for."""

    @property
    def used(self) -> list[int]:
        """Matrices that have rows."""
        return [number for number, size in enumerate(self.sizes) if size]

    @property
    def gathers_fp8(self) -> bool:
        """One scale for all of a matrix's rows can be known before they are sent."""
        return self.gathers and isinstance(self.input_quantizers[0], Float8Quantizer | Float8CurrentScalingQuantizer)

    def multiply(
        self,
        kind: str,
        numbers: Sequence[int],
        left: Sequence[Any],
        right: Sequence[Any],
        outputs: list[Tensor],
        biases: Sequence[Tensor] = (),
    ) -> None:
        """The products of these matrices, one after the other in one output, or of ``wgrad`` into one each."""
        if not numbers:
            return
        options = getattr(self.recipe, f"fp8_gemm_{kind}", None)
        general_grouped_gemm(
            list(left),
            list(right),
            outputs,
            [None] * len(numbers),
            outputs[0].dtype,
            layout=LAYOUTS[kind],
            m_splits=[self.sizes[number] for number in numbers],
            grad=kind != "fprop",
            bias=[biases[number].detach() for number in numbers] if biases else None,
            use_bias=bool(biases),
            accumulate=kind == "wgrad" and self.product.fuse_wgrad_accumulation,
            use_split_accumulator=kind != "fprop" if options is None else options.use_split_accumulator,
            single_output=kind != "wgrad",
        )

    def operands(self, rows: Tensor, quantizers: Sequence[Any], rowwise: bool, columnwise: bool) -> list[Any]:
        """Each matrix's rows: ``rowwise`` for a product with the matrix, ``columnwise`` for its gradient."""
        parts = rows.split(self.sizes)
        return [quantized(parts[number], quantizers[number], rowwise, columnwise) for number in self.used]

    def weight_operands(self, weights: Sequence[Tensor]) -> list[Any]:
        """The matrices, for the input's gradient too."""
        return [
            self.product.weight_operand(number, weights[number], self.weight_quantizers[number], self.with_backward)
            for number in self.used
        ]

    def to_fp8(self, rows: Tensor) -> tuple[Tensor, list[Tensor]]:
        """This rank's share [r, in] as bytes, and for each matrix one over the scale that all ranks took."""
        start, share = torch.distributed.get_rank(self.group) * len(rows), len(rows)
        ends = [min(max(end - start, 0), share) for end in accumulate(self.sizes)]
        sizes = [end - begin for begin, end in pairwise((0, *ends))]
        parts, quantizers = rows.split(sizes), self.input_quantizers
        if isinstance(quantizers[0], Float8CurrentScalingQuantizer):
            quantizers = self._with_scales(parts)
        sent, inverse_scales = torch.empty_like(rows, dtype=torch.uint8), []
        for part, place, quantizer in zip(parts, sent.split(sizes), quantizers, strict=True):
            target = quantizer.create_tensor_from_data(place, part.dtype)
            target._scale_inv = target._scale_inv.view(1)
            inverse_scales.append(target._scale_inv)
            if len(part):
                quantizer.set_usage(rowwise=True, columnwise=False)
                quantizer.update_quantized(part, target)
        return sent, inverse_scales

    def _with_scales(self, parts: Sequence[Tensor]) -> list[Float8Quantizer]:
        """Scales by the largest value on any rank; the engine's own sum over ranks is skipped by one without rows."""
        zero = parts[0].new_zeros((), dtype=torch.float32)
        largest = torch.stack(
            [torch.linalg.vector_norm(part, torch.inf, dtype=torch.float32) if len(part) else zero for part in parts]
        )
        torch.distributed.all_reduce(largest, ReduceOp.MAX, group=self.group)
        scales = self.recipe.fp8_format.value.max_fwd / largest
        scales = torch.where((largest > 0) & scales.isfinite(), scales, 1.0).split(1)
        pairs = zip(scales, self.input_quantizers, strict=True)
        return [Float8Quantizer(scale, torch.empty_like(scale), quantizer.dtype) for scale, quantizer in pairs]

    def from_fp8(self, whole: Tensor, inverse_scales: Sequence[Tensor], columnwise: bool) -> list[Any]:
        """The gathered bytes as operands; the engine's products read gradients of matrices from a transposed copy."""
        parts, operands = whole.split(self.sizes), []
        for number in self.used:
            operand = Float8TensorStorage(
                data=parts[number],
                fp8_scale_inv=inverse_scales[number],
                fp8_dtype=self.input_quantizers[number].dtype,
                fake_dtype=torch.bfloat16,
            )
            operand.update_usage(rowwise_usage=not columnwise, columnwise_usage=columnwise)
            operands.append(operand)
        return operands


def quantized(matrix: Tensor, quantizer: Any, rowwise: bool, columnwise: bool) -> Any:
    """As the engine's products take a matrix; only blocks can be quantized columnwise alone."""
    if quantizer is None:
        return matrix
    quantizer.set_usage(rowwise=rowwise or not isinstance(quantizer, Float8BlockQuantizer), columnwise=columnwise)
    return quantizer(matrix)


class _Product(torch.autograd.Function):
    """Under sequence parallelism the rows are gathered again in the backward pass while the input gradient is computed;
    that gradient is reduced while the weights' are.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, call: _Call, *parameters: Tensor) -> Tensor:
        """See ``GroupedProduct.forward``; ``parameters`` are the weights and then the biases, if there are any."""
        count = len(call.sizes)
        weights, biases = parameters[:count], parameters[count:]
        ctx.call, ctx.trained = call, [call.with_backward and needed for needed in ctx.needs_input_grad[2 : 2 + count]]
        keeps = any(ctx.trained)
        kept: list[Any] = []
        if call.gathers_fp8:
            sent, inverse_scales = call.to_fp8(rows)
            whole, _ = start_gather(sent, call.group, async_op=False)
            operands, kept = call.from_fp8(whole, inverse_scales, columnwise=False), [sent, *inverse_scales]
        elif call.gathers:
            whole, _ = start_gather(rows, call.group, async_op=False)
            operands, kept = call.operands(whole, call.input_quantizers, rowwise=True, columnwise=False), [rows]
        else:
            whole = rows
            operands = kept = call.operands(whole, call.input_quantizers, rowwise=True, columnwise=keeps)
        ctx.matrices = call.weight_operands(weights)
        output = rows.new_empty(len(whole), call.product.out_features)
        call.multiply("fprop", call.used, ctx.matrices, operands, [output], biases)
        if keeps:
            if call.recipe is not None and not call.gathers:
                for operand in operands:
                    operand.update_usage(rowwise_usage=False, columnwise_usage=True)
            tensors, ctx.tensor_objects = prepare_for_saving(*kept)
            ctx.save_for_backward(*tensors)
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the rows, and of the weights and biases that are trained."""
        call, count, needs_weights = ctx.call, len(ctx.call.sizes), any(ctx.trained)
        operands = restore_from_func_ctx(ctx) if needs_weights else []
        grad_output = grad_output.contiguous()
        gathering, grad_input, reducing = None, None, None
        if needs_weights and call.gathers:
            whole, gathering = start_gather(operands[0], call.group, async_op=True)
        gradients = call.operands(grad_output, call.gradient_quantizers, rowwise=True, columnwise=needs_weights)
        if ctx.needs_input_grad[0]:
            grad_input = grad_output.new_empty(len(grad_output), call.product.in_features)
            call.multiply("dgrad", call.used, ctx.matrices, gradients, [grad_input])
            if call.group is not None:
                grad_input, reducing = start_reduce(grad_input, call.group, call.gathers)
        if gathering is not None:
            gathering.wait()
            operands = (
                call.from_fp8(whole, operands[1:], columnwise=True)
                if call.gathers_fp8
                else call.operands(whole, call.input_quantizers, rowwise=False, columnwise=True)
            )
        weight_gradients = _weight_gradients(call, operands, gradients, ctx.trained)
        parts = zip(grad_output.split(call.sizes), ctx.needs_input_grad[2 + count :], strict=False)
        bias_gradients = [part.sum(0) if needed else None for part, needed in parts]
        if reducing is not None:
            reducing.wait()
        if call.updates_scales:
            FP8GlobalStateManager.reduce_and_update_fp8_tensors(forward=False)
        return grad_input, None, *weight_gradients, *bias_gradients


def _weight_gradients(
    call: _Call, operands: list[Any], gradients: list[Any], trained: Sequence[bool]
) -> list[Tensor | None]:
    """One for each matrix that is trained. Where the product adds them to ``main_grad``, megatron-core is told so and
    given, as by the engine, a tensor that it does not read.
    """
    results: list[Tensor | None] = [None] * len(trained)
    into: dict[int, Tensor] = {}
    for number, weight in enumerate(call.product.weights()):
        if not trained[number]:
            continue
        if call.product.fuse_wgrad_accumulation:
            into[number], weight.grad_added_to_main_grad = weight.main_grad, True
            results[number] = get_dummy_wgrad(list(weight.shape), weight.dtype)
        else:
            results[number] = into[number] = (torch.empty_like if call.sizes[number] else torch.zeros_like)(weight)
    chosen = [place for place, number in enumerate(call.used) if trained[number]]
    call.multiply(
        "wgrad",
        [call.used[place] for place in chosen],
        [operands[place] for place in chosen],
        [gradients[place] for place in chosen],
        [into[call.used[place]] for place in chosen],
    )
    return results
