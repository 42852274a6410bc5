"""A whole run with three experts per modality: its records tell the balance, and its export has the engine's loss."""

from dataclasses import replace
from pathlib import Path

import torch

from navil_megatron.cli import main
from navil_megatron.config.precision import PrecisionConfig
from tests.e2e.runs import World, make_run, records, train_in_rank
from tests.e2e.test_train import exported_loss, held_out_loss_in_rank
from tests.ranks import run_ranks
from tests.tolerances import EXPORT


def test_records_and_export(world: World, tmp_path: Path) -> None:
    sections = {"parallel": {"ep": 2}, "training": {"train_steps": 4}, "precision": {"type": "bf16"}, "evaluation": {}}
    config = make_run(world, tmp_path, **sections)
    language = replace(config.model.language, num_experts=3, experts_per_token=2)
    config = replace(config, model=replace(config.model, language=language))
    run_ranks(2, train_in_rank, config)
    for record in records(config, "train"):
        for modality in ("text", "visual"):
            worst = record[f"{modality}_expert_imbalance_worst_layer"]
            # Each expert is chosen for at most every token, two of three experts being chosen.
            assert 1 <= record[f"{modality}_expert_imbalance"] <= worst <= 1.5
            assert 0 < record[f"{modality}_router_entropy"] <= 1
            assert 0 < record[f"{modality}_router_aux_loss"] <= 3
            assert record[f"{modality}_router_z_loss"] > 0
    folder = Path(config.checkpoint.directory)
    assert main(["convert", "to-hf", str(folder), str(tmp_path / "hf"), "--json"]) == 0
    in_fp32 = replace(config, precision=PrecisionConfig(type="fp32"))
    found = exported_loss(world, tmp_path / "hf")
    for expected in run_ranks(2, held_out_loss_in_rank, in_fp32, folder):
        torch.testing.assert_close(found, expected, **EXPORT)
