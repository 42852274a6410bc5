"""kernels/provider.py: what the config names runs, or one line says what is missing and what to do."""

import dataclasses
import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from navil_megatron.config.errors import UserError
from navil_megatron.config.run import NaViLConfig
from navil_megatron.config.runtime import RuntimeConfig
from navil_megatron.dry_run import dry_run
from navil_megatron.kernels import apex_kernels, te_install
from navil_megatron.kernels.provider import choose_kernels
from navil_megatron.kernels.torch_kernels import TORCH_KERNELS
from navil_megatron.runtime.platform import Platform
from tests.ranks import tiny_config

CPU_BUILD = torch.version.cuda is None
ENGINE_MODULES = ("transformer_engine", "transformer_engine.common")


def run_with(**runtime: str) -> NaViLConfig:
    return dataclasses.replace(tiny_config(), runtime=RuntimeConfig(device="cuda", **runtime))


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that comes first on the path; what is imported from it is forgotten again."""
    monkeypatch.syspath_prepend(tmp_path)
    for name in ENGINE_MODULES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    importlib.invalidate_caches()
    yield tmp_path
    for name in ENGINE_MODULES:
        sys.modules.pop(name, None)


def install_engine(folder: Path, version: str, extension: str = "transformer_engine_torch.so") -> None:
    """A folder that looks like Transformer Engine's, with a library that is none."""
    (folder / "transformer_engine" / "common").mkdir(parents=True)
    for package in ("transformer_engine", "transformer_engine/common"):
        (folder / package / "__init__.py").write_text("")
    (folder / "transformer_engine" / extension).write_text("no library")
    if version:
        (folder / f"transformer_engine-{version}.dist-info").mkdir()
        metadata = f"Metadata-Version: 2.1\nName: transformer-engine\nVersion: {version}\n"
        (folder / f"transformer_engine-{version}.dist-info" / "METADATA").write_text(metadata)
    importlib.invalidate_caches()


def test_torch_needs_nothing_on_a_cpu() -> None:
    assert choose_kernels(tiny_config()) is TORCH_KERNELS


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="this torch came without Triton")
def test_a_gpu_gets_kernels_of_triton() -> None:
    kernels = choose_kernels(run_with())
    for name in ("attention_heads", "attention_heads_gradient", "swiglu", "swiglu_gradient"):
        assert getattr(kernels, name) is not getattr(TORCH_KERNELS, name)


@pytest.mark.parametrize("start", [lambda config: Platform.from_config(config.runtime, 0), dry_run])
def test_transformer_engine_on_a_cpu(start: Callable[[NaViLConfig], object]) -> None:
    runtime = RuntimeConfig(device="cpu", kernels="transformer_engine")
    with pytest.raises(UserError) as caught:
        start(tiny_config(data={"seq_length": 2048}, precision={"type": "bf16"}, runtime=runtime))
    assert str(caught.value) == (
        'runtime.kernels = "transformer_engine" needs runtime.device = "cuda", found "cpu"; set kernels = "torch"'
    )


@pytest.mark.skipif(importlib.util.find_spec("transformer_engine") is not None, reason="Transformer Engine is here")
def test_transformer_engine_absent() -> None:
    with pytest.raises(UserError) as caught:
        choose_kernels(run_with(kernels="transformer_engine"))
    message = str(caught.value)
    assert message.startswith('runtime.kernels = "transformer_engine", but transformer_engine is not installed; pip ')
    assert message.endswith('(docs/hopper.md), or set runtime.kernels = "torch"')
    assert "\n" not in message


@pytest.mark.parametrize(
    ("version", "extension", "expected"),
    [
        ("2.20.2", "other.so", "has no part for torch"),
        ("", "transformer_engine_torch.so", "was copied there, not installed"),
        ("2.8.0", "transformer_engine_torch.so", "transformer_engine is 2.8.0, expected 2.20"),
        ("2.21.0", "transformer_engine_torch.so", "transformer_engine is 2.21.0, expected 2.20"),
        ("2.20.2", "transformer_engine_torch.so", "is a CPU build" if CPU_BUILD else "does not load beside torch"),
    ],
)
def test_transformer_engine_that_cannot_run(packages: Path, version: str, extension: str, expected: str) -> None:
    install_engine(packages, version, extension)
    problem = te_install.installation_problem()
    assert problem is not None
    assert expected in problem
    assert "\n" not in problem


def test_apex_absent() -> None:
    with pytest.raises(UserError) as caught:
        choose_kernels(run_with(gradient_accumulation_fusion="apex"))
    message = str(caught.value)
    assert message.startswith(
        'runtime.gradient_accumulation_fusion = "apex", but NVIDIA Apex\'s amp_C is not installed; pip install'
    )
    assert "\n" not in message


def test_apex_built_for_another_torch(packages: Path) -> None:
    """The loader's own words say what does not fit."""
    (packages / "amp_C.so").write_text("no library")
    importlib.invalidate_caches()
    problem = apex_kernels.extension_problem("amp_C")
    assert problem is not None
    assert problem.startswith("NVIDIA Apex's amp_C does not load: ")
    assert "amp_C.so" in problem and "\n" not in problem
