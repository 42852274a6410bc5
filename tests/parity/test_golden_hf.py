"""The exported model (hf/remote_code) against tensors made with the authors' code: every case of the golden folder."""

import json
import re
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional

from navil_megatron.config.model import SPECIAL_TOKENS
from navil_megatron.hf.generate import DTYPE_ARGUMENT
from navil_megatron.hf.remote_code import modeling_navil_chat
from navil_megatron.hf.remote_code.configuration_navil_chat import NaViLChatConfig
from navil_megatron.hf.remote_code.modeling_navil_chat import NaViL
from navil_megatron.hf.remote_code.modeling_navil_vit import plan_patches
from tests.tolerances import GOLDEN, GOLDEN_GRADIENT

ROWS = ("2b_single", "2b_multi", "2b_text", "9b_single", "9b_multi", "9b_text", "2b_win_single", "2b_win_multi")
PACKED = ("2b_pack", "9b_pack")
VARIANTS = [
    (f"{model}_vit_variants", variant)
    for model, variants in {
        "2b": ("w8_none", "w4_none", "w4_full1", "w6_full1"),
        "2b_win": ("w8_none", "w8_full1", "w4_full", "w4_full0_2", "w2_full1"),
    }.items()
    for variant in variants
]
GENERATED = [
    (f"{model}_generate", run)
    for model in ("2b", "9b")
    for run in ("text_plain", "text_special", "text_eos", "image1", "image2")
]


@cache
def load_model(folder: Path) -> NaViL:
    """The golden model, its weights read by transformers from the authors' file."""
    config = NaViLChatConfig.from_pretrained(folder)
    ids = json.loads((folder / "special_tokens.json").read_text())["special_token_ids"]
    config.special_token_ids = [ids[token] for token in SPECIAL_TOKENS]
    return NaViL.from_pretrained(folder, config=config, **{DTYPE_ARGUMENT: torch.float32}).eval()


class Case:
    """One golden case: its model, inputs and expected tensors."""

    def __init__(self, golden_dir: Path, name: str) -> None:
        folder = golden_dir / "public" / "cases" / name
        self.meta: dict[str, Any] = json.loads((folder / "meta.json").read_text())
        self.inputs = load_file(folder / "inputs.safetensors")
        self.expected = load_file(folder / "expected.safetensors")
        self.model = load_model(golden_dir / "public" / self.meta["model"])
        self.model.zero_grad(set_to_none=True)
        self.model.config.vision_config = NaViLChatConfig.from_pretrained(folder).vision_config
        self.model.vision_model.config = self.model.config.vision_config

    def forward_inputs(self, prefix: str = "") -> dict[str, torch.Tensor]:
        """What our forward takes of the case; a text-only case leaves the dummy image out."""
        names = ["input_ids", "attention_mask", "position_ids", "labels"]
        if f"{prefix}pixel_values" in self.inputs and self.inputs.get("image_flags", torch.ones(1)).any():
            names += ["pixel_values", "image_grid_thw"]
        taken = {name: self.inputs[f"{prefix}{name}"] for name in names if f"{prefix}{name}" in self.inputs}
        if "pixel_values" in taken:
            taken["pixel_values"] = taken["pixel_values"].float()
        return taken


def recorded(model: NaViL, inputs: dict[str, Any]) -> tuple[Any, dict[str, torch.Tensor]]:
    """The model's output and the tensors inside it under the golden names."""
    seen: dict[str, torch.Tensor] = {}
    language = model.language_model.model
    attention = getattr(language["layers"][0], "self_attn", None) or language["layers"][0].attention
    watched = {
        "vit.patch_embed": model.vision_model.embeddings,
        "vit.last_hidden_state": model.vision_model,
        "mlp1.out": model.mlp1,
        "llm.layer.0.attn": attention,
        "llm.final_norm": language["norm"],
        **{f"vit.layer.{i}": layer for i, layer in enumerate(model.vision_model.encoder.layers)},
        **{f"llm.layer.{i}": layer for i, layer in enumerate(language["layers"])},
    }
    hooks = [
        module.register_forward_hook(lambda _m, _i, output, name=name: seen.__setitem__(name, output))
        for name, module in watched.items()
    ]
    hooks.append(
        model.language_model.register_forward_pre_hook(
            lambda _m, arguments: seen.__setitem__("llm.inputs_embeds", arguments[0])
        )
    )
    try:
        output = model(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return output, seen


def assert_golden(actual: torch.Tensor, expected: torch.Tensor, name: str) -> None:
    torch.testing.assert_close(
        actual.detach().reshape(expected.shape), expected, **GOLDEN, msg=lambda text: f"{name}: {text}"
    )


def weighted_loss(logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The reference's loss with ``loss_weight``: nothing dropped, every weight in the denominator."""
    losses = functional.cross_entropy(logits[0, :-1], labels[0, 1:], reduction="none", ignore_index=-100)
    return (losses * weights[0, 1:]).sum() / weights[0, 1:].sum()


def assert_gradients(case: Case, loss: torch.Tensor) -> int:
    """Compares every stored gradient and the size of every gradient in the meta file; returns how many tensors."""
    loss.backward()
    parameters = dict(case.model.named_parameters())
    stored = {name.removeprefix("grad."): value for name, value in case.expected.items() if name.startswith("grad.")}
    for name, expected in stored.items():
        torch.testing.assert_close(
            parameters[name].grad, expected, **GOLDEN_GRADIENT, msg=lambda text, name=name: f"{name}: {text}"
        )
    sizes = case.meta.get("gradient", {}).get("l2_sum_absmax_per_parameter", {})
    for name, size in sizes.items():
        gradient = parameters[name].grad
        l2 = 0.0 if gradient is None else gradient.double().norm().item()
        assert l2 == pytest.approx(size["l2"], rel=GOLDEN_GRADIENT["rtol"], abs=GOLDEN_GRADIENT["atol"]), name
    return len(stored)


@pytest.mark.parametrize("name", ROWS)
def test_row_reproduces_every_stored_tensor(golden_dir: Path, name: str) -> None:
    case = Case(golden_dir, name)
    output, seen = recorded(case.model, case.forward_inputs())
    seen["logits"], seen["loss"] = output.logits, output.loss
    seen["loss_weighted"] = weighted_loss(output.logits, case.inputs["labels"], case.inputs["loss_weight"])
    plan_names = {"vit.cu_seqlens", "vit.cu_window_seqlens", "vit.rotary_pos_emb", "vit.window_index"}
    compared = [key for key in case.expected if not key.startswith("grad.") and key not in plan_names]
    compared.remove("llm.visual_token_mask")
    for key in compared:
        assert_golden(seen[key], case.expected[key], key)
    assert {"logits", "loss", "llm.final_norm", "llm.layer.1"} <= set(compared)
    if any(key.startswith("grad.") for key in case.expected):
        assert assert_gradients(case, output.loss) > 5


@pytest.mark.parametrize("name", [name for name in ROWS if "text" not in name])
def test_patch_plan(golden_dir: Path, name: str) -> None:
    case = Case(golden_dir, name)
    plan = plan_patches(case.inputs["image_grid_thw"].tolist(), case.model.config.vision_config)
    assert_golden(plan.angles, case.expected["vit.rotary_pos_emb"], "rotary")
    assert torch.equal(plan.block_order, case.expected["vit.window_index"])
    for lengths, key in ((plan.image_lengths, "vit.cu_seqlens"), (plan.window_lengths, "vit.cu_window_seqlens")):
        assert case.expected[key].diff().tolist() == list(lengths), key


@pytest.mark.parametrize("name", ["2b_text", "9b_text"])
def test_text_only_row_gives_visual_weights_no_gradient(golden_dir: Path, name: str) -> None:
    case = Case(golden_dir, name)
    case.model(**case.forward_inputs()).loss.backward()
    silent = case.meta["gradient_none"] + case.meta["gradient_exactly_zero"]
    # The meta file writes N for every number in a key.
    named = [(re.sub(r"\.\d+\.", ".N.", key), value) for key, value in case.model.named_parameters()]
    assert set(silent) <= {key for key, _ in named}
    for key, parameter in named:
        if key in silent:
            assert parameter.grad is None or not parameter.grad.any(), key


@pytest.mark.parametrize("name", PACKED)
def test_packed_row(golden_dir: Path, name: str) -> None:
    case = Case(golden_dir, name)
    inputs = case.forward_inputs() | {"cu_seqlens": case.inputs["cu_seqlens"]}
    output, seen = recorded(case.model, inputs)
    loss = weighted_loss(output.logits, case.inputs["labels"], case.inputs["loss_weight"])
    assert_golden(output.logits, case.expected["logits"], "logits")
    assert_golden(output.loss, case.expected["loss"], "loss")
    assert_golden(loss, case.expected["loss_weighted"], "loss_weighted")
    for key in ("mlp1.out", "llm.inputs_embeds", "llm.final_norm"):
        assert_golden(seen[key], case.expected[key], key)
    assert assert_gradients(case, loss) > 5


@pytest.mark.parametrize("name", PACKED)
def test_packed_row_equals_its_samples_alone(golden_dir: Path, name: str) -> None:
    case = Case(golden_dir, name)
    model, inputs = case.model, case.inputs
    packed = model(**case.forward_inputs(), cu_seqlens=inputs["cu_seqlens"]).logits
    grids, pixels = inputs["image_grid_thw"], inputs["pixel_values"].float()
    context = model.config.special_token_ids[modeling_navil_chat.CONTEXT]
    for start, end in pairwise(inputs["cu_seqlens"].tolist()):
        ids = inputs["input_ids"][:, start:end]
        num_patches = 4 * int((ids == context).sum())
        num_grids = int((grids.prod(1).cumsum(0) <= num_patches).sum())
        images = {"pixel_values": pixels[:num_patches], "image_grid_thw": grids[:num_grids]} if num_patches else {}
        pixels, grids = pixels[num_patches:], grids[num_grids:]
        assert_golden(model(ids, **images).logits, packed[:, start:end], f"sample at {start}")


@pytest.mark.parametrize(("name", "variant"), VARIANTS)
def test_encoder_variants(golden_dir: Path, name: str, variant: str) -> None:
    case = Case(golden_dir, name)
    settings = {entry["name"]: entry for entry in case.meta["variants"]}[variant]
    vision = case.model.config.vision_config
    vision.window_size, vision.fullatt_block_indexes = settings["window_size"], settings["fullatt_block_indexes"]
    seen: list[torch.Tensor] = []
    hook = case.model.vision_model.register_forward_hook(lambda _m, _i, output: seen.append(output))
    with torch.no_grad():
        features = case.model.extract_feature(case.inputs["pixel_values"].float(), case.inputs["image_grid_thw"])
    hook.remove()
    assert_golden(seen[0], case.expected[f"{variant}/vit.last_hidden_state"], "encoder")
    assert_golden(features, case.expected[f"{variant}/mlp1.out"], "connector")
    plan = plan_patches(case.inputs["image_grid_thw"].tolist(), vision)
    assert torch.equal(plan.block_order, case.expected[f"{variant}/vit.window_index"])
    assert list(plan.window_lengths) == case.expected[f"{variant}/vit.cu_window_seqlens"].diff().tolist()


def test_every_variant_is_tested(golden_dir: Path) -> None:
    for model in ("2b", "2b_win"):
        meta = json.loads((golden_dir / "public" / "cases" / f"{model}_vit_variants" / "meta.json").read_text())
        assert {(f"{model}_vit_variants", entry["name"]) for entry in meta["variants"]} <= set(VARIANTS)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize(("name", "run"), GENERATED)
def test_generated_tokens(golden_dir: Path, name: str, run: str, use_cache: bool) -> None:
    case = Case(golden_dir, name)
    inputs = case.forward_inputs(f"{run}/")
    output = case.model.generate(
        **inputs,
        max_new_tokens=12,
        do_sample=False,
        eos_token_id=case.meta["im_end_id"],
        pad_token_id=case.meta["im_end_id"],
        use_cache=use_cache,
        return_dict_in_generate=True,
        output_logits=True,
    )
    new_tokens = output.sequences[0, inputs["input_ids"].shape[1] :]
    assert new_tokens.tolist() == case.expected[f"{run}/tokens"].tolist()
    assert_golden(torch.cat(output.logits), case.expected[f"{run}/step_logits"], "step logits")
