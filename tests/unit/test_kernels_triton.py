"""Triton's kernels without a GPU: their arithmetic in its interpreter, their machine code for Hopper from its compiler,
and their shapes on a device that poses as one. Speed alone is left to a GPU.
"""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from navil_megatron.config.errors import UserError
from navil_megatron.kernels import triton_kernels
from navil_megatron.kernels.torch_kernels import TORCH_KERNELS
from navil_megatron.layers.kernels import HeadNorms
from tests.conftest import REPOSITORY
from tools.bench import attention_heads as bench
from tools.bench.written_bytes import watching_writes

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="this torch came without Triton")
HOPPER = 90
NORMS = {"weights", "is_visual"}


def test_arithmetic_in_the_interpreter() -> None:
    """In a process of its own: Triton reads once, at import, how its kernels run."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.triton_bodies"],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "are right" in done.stdout


def compile_for_hopper(kernel: Any, constants: dict[str, Any], absent: set[str]) -> None:
    """To what a GPU's own assembler takes, as a launch with BF16 rows would ask for it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = dict.fromkeys(kernel.arg_names, "*bf16") | dict.fromkeys(("order", "inverse"), "*i64")
    types |= {"rotary": "*fp32", "sums": "*fp32", "is_visual": "*i1", "epsilon": "fp32"}
    types |= dict.fromkeys(("num_rows", "num_heads", "num_groups", "width"), "i32")
    fixed = {**constants, **dict.fromkeys(absent & set(kernel.arg_names))}
    signature = {name: "constexpr" if name in fixed else types[name] for name in kernel.arg_names}
    aligned = [n for n, name in enumerate(kernel.arg_names) if signature[name][0] == "*" or name == "width"]
    source = ASTSource(kernel, signature, fixed, {(n,): [["tt.divisibility", 16]] for n in aligned})
    built = triton.compile(source, target=GPUTarget("cuda", HOPPER, 32))
    assert len(built.asm["cubin"]) > 0
    ptx: str = built.asm["ptx"]
    assert "ld.global.v4" in ptx and "st.global.v4" in ptx  # 16 bytes at once
    assert "cvt.rn.bf16" in ptx  # to the nearest
    assert "atom." not in ptx and "red.global" not in ptx  # the same sums in every run


@pytest.mark.parametrize(
    ("head_dim", "dim", "absent"),
    [(128, 2, set()), (128, 2, NORMS), (64, 1, {*NORMS, "order", "inverse"})],
    ids=["norms", "no-norms", "encoder-in-place"],
)
def test_heads_compile_for_hopper(
    head_dim: int, dim: int, absent: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from navil_megatron.kernels import triton_attention_heads as heads

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    half, block = heads._block(48, head_dim)
    constants = {"DIM": dim, "D": head_dim, "HALF": half, "BLOCK": block}
    compile_for_hopper(heads._forward_kernel, constants, absent)
    rows, without = (1, {*absent, "qkv", "sums"}) if "weights" in absent else (heads.ROWS, absent)
    compile_for_hopper(heads._backward_kernel, {**constants, "ROWS": rows}, without)


@pytest.mark.parametrize("absent", [set(), {"weights"}], ids=["weights", "none"])
def test_swiglu_compiles_for_hopper(absent: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from navil_megatron.kernels import triton_swiglu

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for kernel in (triton_swiglu._forward_kernel, triton_swiglu._backward_kernel):
        compile_for_hopper(kernel, {"BLOCK": triton_swiglu.BLOCK}, absent)


@pytest.mark.parametrize("name", bench.CASES)
def test_fused_rows_are_written_once_each_way(name: str) -> None:
    """On a device that only poses as a GPU, where nothing runs: shapes, types, and what the operators would write."""
    kernels = triton_kernels.with_triton(TORCH_KERNELS)
    with FakeTensorMode():
        rows = bench.given(bench.CASES[name], 64, torch.bfloat16, torch.device("cpu"))
        fields = rows._asdict().items()
        rows = rows._replace(**{field: x.detach().to("cuda") for field, x in fields if isinstance(x, torch.Tensor)})
        norms = None
        if rows.weights is not None:
            norms = HeadNorms(rows.weights, rows.order >= rows.num_text, bench.EPSILON)
        rotary = bench.cos_sin(rows.angles)
        with watching_writes() as written:
            outputs = kernels.attention_heads(rows.qkv, rows.fused, rows.order, rotary, norms)
            grad, of_weights = kernels.attention_heads_gradient(
                outputs, rows.qkv, rows.fused, rows.inverse, rotary, norms
            )
        assert (grad.shape, grad.dtype, grad.device) == (rows.qkv.shape, torch.bfloat16, rows.qkv.device)
        assert of_weights is None if rows.weights is None else of_weights.shape == rows.weights.shape
    once = rows.qkv.nbytes
    assert written["navil::attention_heads"] == once
    assert once <= written["navil::attention_heads_gradient"] < 1.05 * once
    assert written.total() < 2.05 * once


def test_swiglu_writes_what_it_returns() -> None:
    kernels = triton_kernels.with_triton(TORCH_KERNELS)
    with FakeTensorMode():
        gate_up = torch.empty(7, 1, 96, device="cuda", dtype=torch.bfloat16)
        weights = torch.empty(7, 1, device="cuda", dtype=torch.bfloat16)
        for given in (None, weights):
            with watching_writes() as written:
                output = kernels.swiglu(gate_up, given)
                grad, of_weights = kernels.swiglu_gradient(output, gate_up, given)
            assert (output.shape, output.dtype, output.device) == ((7, 1, 48), torch.bfloat16, gate_up.device)
            assert grad.shape == gate_up.shape
            assert of_weights is None if given is None else of_weights.shape == given.shape
            assert written.total() == output.nbytes + grad.nbytes + (0 if given is None else given.nbytes)


def test_a_torch_without_triton_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_kernels, "find_spec", lambda name: None)
    with pytest.raises(
        UserError, match="Triton, which torch for CUDA brings along and which is not installed"
    ) as caught:
        triton_kernels.with_triton(TORCH_KERNELS)
    assert "\n" not in str(caught.value)
