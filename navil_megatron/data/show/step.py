"""Behind ``navil-megatron data show``: some rows of a step, planned and decoded as a run does it."""

from pathlib import Path
from typing import Any

from navil_megatron.config.errors import UserError
from navil_megatron.config.run import NaViLConfig
from navil_megatron.data.loader import load_run_tokenizer, open_train_sources, plan_run
from navil_megatron.data.microbatches import MicrobatchBuilder
from navil_megatron.data.show.page import render_rows
from navil_megatron.data.show.picture import draw_rows
from navil_megatron.data.show.rows import shown_rows
from navil_megatron.data.types import ALONE


def show_step(config: NaViLConfig, step: int, first_row: int, num_rows: int, output: Path) -> dict[str, Any]:
    """Writes rows of the global batch of a step to a page or a picture, and says what is on it.

    Steps and rows count from 0. ``output`` is an ``.html`` file, or a ``.png`` with bars and images alone.

    Raises:
        UserError: sources or tokenizer do not fit, or the batch has no such row.
    """
    if output.suffix not in (".html", ".png"):
        raise UserError(f"--output {output}: give a page, as rows.html, or bars and images without texts, as rows.png")
    tokenizer = load_run_tokenizer(config)
    sources = open_train_sources(config, tokenizer)
    batch = plan_run(config, sources).step_rows(step)
    rows = batch[first_row : first_row + num_rows]
    if not rows:
        raise UserError(f"row {first_row}: a global batch has {len(batch)} rows; count from 0")
    builder = MicrobatchBuilder(config, sources, tokenizer, place=ALONE)
    sequences = builder.encode(rows)
    microbatch = builder.build(rows)
    fill = microbatch.num_tokens / microbatch.input_ids.size
    title = (
        f"step {step}, rows {first_row} to {first_row + len(rows) - 1} of {len(batch)}, seed {config.training.seed}: "
        f"{fill:.1%} full, {sum(row.cost for row in rows) / len(rows):.3g} FLOPs a row"
    )
    patch, merge = config.model.vision.patch_size, config.model.vision.merge_size
    names = {sample: sources[sample.source].key(sample.number) for row in rows for sample in row.samples}
    shown = shown_rows(sequences, microbatch, tokenizer, patch, merge, names, first_row)
    if output.suffix == ".png":
        draw_rows(shown, title).save(output, "PNG")
    else:
        notes = [f"{bad.shard}: {bad.key}: {bad.reason}; blank, and without loss" for bad in microbatch.failures]
        output.write_text(render_rows(shown, title, patch * merge, notes), encoding="utf-8")
    return {
        "step": step,
        "rows": len(rows),
        "samples": len(microbatch.samples),
        "shrunk_samples": microbatch.num_shrunk,
        "failed_samples": len(microbatch.failures),
        "fill": round(fill, 4),
        "costs": [row.cost for row in rows],
    }
