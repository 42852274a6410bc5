"""The attention that is drawn is the softmax of the golden models, written out in plain torch from their weights."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import linear

from navil_megatron.cli import main
from navil_megatron.config.errors import UserError
from navil_megatron.evaluation.attention import attention_to_image, watching_attention
from navil_megatron.hf.generate import load_for_generation
from tests.parity.test_golden_hf import Case
from tests.tolerances import GOLDEN
from tests.unit.hf_folders import PICTURES, export_example


def queries_and_keys(attention: nn.Module, x: Tensor, is_visual: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """[s, h] -> [s, n, d] and [s, n, d], not rotated; keys repeated for the queries that share them."""
    weights = dict(attention.named_parameters())

    def project(name: str) -> Tensor:
        text, visual = (linear(x, weights[f"{name}{suffix}.weight"]) for suffix in ("", "_ve"))
        return torch.where(is_visual[:, None], visual, text)

    width = attention.head_dim
    if "wqkv.weight" in weights:
        groups = attention.num_groups
        fused = project("wqkv").view(len(x), groups, -1, width)
        query, key = fused[:, :, :-2].reshape(len(x), heads, width), fused[:, :, -2]
    else:
        query, key = (project(f"{name}_proj").view(len(x), -1, width) for name in "qk")
        scales = [
            torch.where(is_visual[:, None, None], weights[f"{name}_norm_ve.weight"], weights[f"{name}_norm.weight"])
            for name in "qk"
        ]
        query, key = (
            part / (part.square().mean(-1, keepdim=True) + attention.q_norm.eps).sqrt() * scale
            for part, scale in zip((query, key), scales, strict=True)
        )
    return query, key.repeat_interleave(heads // key.shape[1], dim=1)


def rotated(x: Tensor, theta: float) -> Tensor:
    """Channel i and i + d/2 as a complex number, turned by the position."""
    half = x.shape[-1] // 2
    angles = torch.arange(len(x))[:, None, None] * theta ** (-torch.arange(half) / half)
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([turned.real, turned.imag], -1)


def plain_softmax(model: nn.Module, x: Tensor, layer: nn.Module, is_visual: Tensor) -> Tensor:
    """[s, s]: what each token gives to each, mean over heads."""
    config = model.config.llm_config
    attention = getattr(layer, "self_attn", None) or layer.attention
    query, key = queries_and_keys(attention, x, is_visual, config.num_attention_heads)
    query, key = rotated(query, config.rope_theta), rotated(key, config.rope_theta)
    scores = torch.einsum("qnd,knd->nqk", query, key) / attention.head_dim**0.5
    hidden = torch.ones(len(x), len(x), dtype=torch.bool).triu(1)
    return scores.masked_fill(hidden, float("-inf")).softmax(-1).mean(0)


@pytest.mark.parametrize("name", ["2b_single", "2b_multi", "9b_single", "9b_multi"])
@torch.inference_mode()
def test_attention_is_the_softmax_of_the_weights(golden_dir: Path, name: str) -> None:
    case = Case(golden_dir, name)
    inputs = {key: value for key, value in case.forward_inputs().items() if key not in ("labels", "attention_mask")}
    is_visual = case.inputs["visual_token_mask"][0].bool()
    visual = is_visual.nonzero().flatten()
    text = (~is_visual).nonzero().flatten()[-5:]
    seen: list[Tensor] = []
    layers = case.model.language_model.model["layers"]
    modules = [getattr(layer, "self_attn", None) or layer.attention for layer in layers]
    hooks = [module.register_forward_pre_hook(lambda _m, arguments: seen.append(arguments[0][0])) for module in modules]
    with watching_attention(case.model, text, visual) as found:
        case.model(**inputs)
    for hook in hooks:
        hook.remove()
    assert len(found) == len(layers)
    for share, x, layer in zip(found, seen, layers, strict=True):
        expected = plain_softmax(case.model, x, layer, is_visual)[text][:, visual].mean(0)
        torch.testing.assert_close(share, expected, **GOLDEN)
        assert 0 < float(share.sum()) < 1


def test_the_verb_draws_and_tells(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A picture of two scales: maps in the shape of their tokens, and all of it in JSON."""
    folder = export_example(tmp_path, "qwen3")
    image = tmp_path / "picture.png"
    PICTURES[0].save(image)
    words = ["attention", str(folder), str(image), "--prompt", "a red<image>square of a star", "--max-new-tokens", "3"]
    for output, scales in (("one.svg", "largest"), ("two.png", "all")):
        assert main([*words, "--output", str(tmp_path / output), "--scales", scales, "--json"]) == 0
        report = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert [sum(parts) for parts in report["share_by_scale"]] == pytest.approx(report["share"])
        assert len(report["share"]) == len(report["maps"]) == 2
        shapes = [(len(grid), len(grid[0])) for grid in report["maps"]["1"]]
        assert shapes == ([(3, 4)] if scales == "largest" else [(2, 3), (3, 4)])
        assert report["num_text_tokens"] > 3
    assert (tmp_path / "one.svg").read_text().startswith("<?xml")
    assert Image.open(tmp_path / "two.png").width > 300


def test_what_cannot_be_drawn_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = export_example(tmp_path, "qwen3")
    captioner = load_for_generation(folder)
    with pytest.raises(UserError, match="no text follows the image"):
        attention_to_image(captioner, PICTURES[2], "<image>", 0)
    PICTURES[2].save(tmp_path / "picture.png")
    place = [str(folder), str(tmp_path / "picture.png"), "--output", str(tmp_path / "out.svg")]
    for wrong in (["--layers", "2"], ["--prompt", "<image><image>"], ["--max-new-tokens", "-1"]):
        assert main(["attention", *place, *wrong]) == 2
        (line,) = [text for text in capsys.readouterr().err.splitlines() if "error" in text]
        assert line.startswith("error: --")
