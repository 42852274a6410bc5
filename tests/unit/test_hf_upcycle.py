"""One expert per modality becomes several: the same function, the same bits, and every format knows them."""

import json
from pathlib import Path

import pytest
import torch

from navil_megatron.cli import main
from navil_megatron.config.errors import UserError
from navil_megatron.hf.export import convert_to_hf
from navil_megatron.hf.hf_config import hf_config_from_model
from navil_megatron.hf.ingest import convert_from_hf
from navil_megatron.hf.remote_code.configuration_navil_chat import NaViLChatConfig
from navil_megatron.hf.remote_code.modeling_navil_chat import NaViL
from navil_megatron.hf.safetensors_io import TensorFolder
from navil_megatron.hf.upcycle import convert_upcycle
from tests.tolerances import GOLDEN, RANKS
from tests.unit.hf_examples import FAMILIES, tiny_model, write_checkpoint
from tests.whole_checkpoint import read_whole_checkpoint


def logits_of(folder: Path, model) -> torch.Tensor:
    """What an exported folder computes for a row with an image in it."""
    config = NaViLChatConfig(**hf_config_from_model(model, dtype="float32", token_ids={}, image_settings={}))
    plain = NaViL(config).eval()
    plain.load_state_dict(dict(TensorFolder(folder)), strict=True)
    context, start = (model.special_token_id(name) for name in ("<IMG_CONTEXT>", "<img>"))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        return plain(
            input_ids=torch.tensor([[5, 6, start, *[context] * 6, 7, 8, 9, 10]]),
            pixel_values=torch.randn(24, 3, 16, 16, generator=generator),
            image_grid_thw=torch.tensor([[1, 4, 6]]),
            use_cache=False,
        ).logits


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("num_experts", "chosen"), [(2, 1), (5, 3)])
def test_function_and_bits_are_kept(family: str, num_experts: int, chosen: int, tmp_path: Path) -> None:
    model = tiny_model(family)
    write_checkpoint(tmp_path / "one", model)
    convert_upcycle(tmp_path / "one", tmp_path / "several", num_experts=num_experts, experts_per_token=chosen)
    wider, whole = read_whole_checkpoint(tmp_path / "several")
    assert (wider.language.num_experts, wider.language.experts_per_token) == (num_experts, chosen)
    old = read_whole_checkpoint(tmp_path / "one")[1]
    routers = {key for key in whole if ".router." in key}
    assert routers == {f"decoder.layers.mlp.router.{modality}.weight" for modality in ("text", "visual")}
    assert whole.keys() == old.keys() | routers
    for key, tensor in old.items():
        copies = whole[key].unbind(1) if ".mlp.linear_fc" in key and key.startswith("decoder") else [whole[key]]
        assert all(torch.equal(copy, tensor) for copy in copies), key
    for key in routers:
        assert whole[key].std() > 0

    for name in ("one", "several"):
        convert_to_hf(tmp_path / name, tmp_path / f"{name}-hf")
    torch.testing.assert_close(
        logits_of(tmp_path / "several-hf", wider), logits_of(tmp_path / "one-hf", model), **GOLDEN
    )
    convert_from_hf(tmp_path / "several-hf", tmp_path / "again")
    for key, tensor in read_whole_checkpoint(tmp_path / "again")[1].items():
        assert torch.equal(tensor, whole[key]), key


def test_the_router_decides_which_expert_runs(tmp_path: Path) -> None:
    """Once the experts differ, the output depends on them: the equality above is not an accident of unused weights."""
    model = tiny_model("qwen3")
    write_checkpoint(tmp_path / "one", model)
    convert_upcycle(tmp_path / "one", tmp_path / "several", num_experts=3, experts_per_token=2)
    wider = read_whole_checkpoint(tmp_path / "several")[0]
    convert_to_hf(tmp_path / "several", tmp_path / "hf")
    config = NaViLChatConfig(**hf_config_from_model(wider, dtype="float32", token_ids={}, image_settings={}))
    plain = NaViL(config).eval()
    plain.load_state_dict(dict(TensorFolder(tmp_path / "hf")), strict=True)
    experts = plain.language_model.model["layers"][0].mlp
    x = torch.randn(7, model.language.hidden_size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        same = experts(x)
        scores = experts.gate(x).softmax(-1)
        for number, expert in enumerate(experts.experts):
            expert.down_proj.weight.mul_(number + 1)
        weights, chosen = scores.topk(2)
        expected = same * ((chosen + 1) * weights).sum(-1, keepdim=True) / weights.sum(-1, keepdim=True)
        torch.testing.assert_close(experts(x), expected, **RANKS)


def test_seed_decides_the_routers(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "one", tiny_model())
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        convert_upcycle(tmp_path / "one", tmp_path / name, num_experts=2, experts_per_token=1, seed=seed)
    a, b, c = (
        read_whole_checkpoint(tmp_path / name)[1]["decoder.layers.mlp.router.visual.weight"] for name in ("a", "b", "c")
    )
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_what_cannot_be_upcycled_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_checkpoint(tmp_path / "one", tiny_model())
    words = ["convert", "upcycle", str(tmp_path / "one"), str(tmp_path / "new")]
    assert main([*words, "--experts", "2", "--experts-per-token", "3"]) == 2
    assert "experts_per_token = 3 is more than num_experts = 2" in capsys.readouterr().err
    assert main([*words, "--experts", "1"]) == 2
    assert "expected 2 or more" in capsys.readouterr().err
    assert main([*words, "--experts", "100000"]) == 2
    assert "experts in all its layers, more than any model's" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
    assert main([*words, "--experts", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["num_experts"] == 2
    with pytest.raises(UserError, match="2 experts per modality already"):
        convert_upcycle(tmp_path / "new", tmp_path / "more", num_experts=4, experts_per_token=1)
