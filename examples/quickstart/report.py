"""The quickstart's table and its two pictures: the curves, and a contact sheet of held-out scenes."""

import io
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from PIL import Image
from rich.console import Console
from rich.table import Table

from navil_megatron.data.shards.source import Source

RIGHT, WRONG = "#1a7f37", "#cf222e"
TAIL_BYTES = 16_384
TRAIN, HELD_OUT, SWAPPED = "#9aa4b2", "#0969da", "#bc4c00"


def read_metrics(path: Path) -> list[dict]:
    """Every record of ``metrics.jsonl``, without a last line that is still being written."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def last_record(path: Path, kind: str) -> dict | None:
    """The newest record of a kind, or None; looks at the end of the file alone."""
    if not path.exists():
        return None
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL_BYTES))
        lines = file.read().split(b"\n")[:-1]
    records = (json.loads(line) for line in reversed(lines) if line.startswith(b"{"))
    return next((record for record in records if record["kind"] == kind), None)


def show_summary(folder: Path, summary: dict, console: Console) -> None:
    """Draws both pictures and prints the table."""
    draw_curves(folder, summary)
    draw_contact_sheet(folder)
    table = Table(title="NaViL quickstart", show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column(justify="right")
    rows = {
        "training loss": f"{summary['loss']:.4f}",
        "held-out loss": f"{summary['heldout_loss']:.4f}",
        "held-out loss, images swapped": f"{summary['heldout_loss_swapped']:.4f}",
        "exact captions of unseen combinations": f"{summary['exact_match']:.1%}",
        "exact captions, images swapped": f"{summary['exact_match_swapped']:.1%}",
        "held-out scenes": f"{summary['heldout_samples']:,}",
        "tokens/s": f"{summary['tokens_per_second']:,.0f}",
        "samples/s": f"{summary['samples_per_second']:,.0f}",
        "waiting for data": f"{summary['data_wait_share']:.2%} of the step time",
        "padding": f"{summary['padding_share']:.2%} of the tokens",
        "steps (resumed at)": f"{summary['train_steps']:,} ({summary['resumed_at_step']:,})",
        "training samples": f"{summary['train_samples']:,}",
        "parameters": f"{summary['parameters']:,}",
        "exported folder": f"{folder_bytes(folder / 'hf') / 1e6:.1f} MB",
        "training time": f"{summary['train_seconds']:.0f} s",
        "time in all": f"{summary['total_seconds']:.0f} s",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table)
    for what, name in (
        ("curves", "curves.png"),
        ("held-out scenes", "captions.png"),
        ("figures", "summary.json"),
        ("metrics, TensorBoard", "logs"),
        ("checkpoints", "checkpoints"),
        ("Hugging Face folder", "hf"),
    ):
        console.print(f"  {what:22} {folder / name}")
    console.print(f"[dim]Pictures: {summary['attribution']}[/dim]")


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def draw_curves(folder: Path, summary: dict) -> None:
    """Loss over steps, with the stop in the middle, and throughput."""
    records = read_metrics(folder / "logs" / "metrics.jsonl")
    train = [record for record in records if record["kind"] == "train"]
    held_out = [record for record in records if record["kind"] == "evaluation"]
    figure, (losses, speed) = plt.subplots(1, 2, figsize=(12, 4.5), width_ratios=(2, 1), layout="constrained")
    losses.plot(*series(train, "loss"), color=TRAIN, linewidth=1, label="training")
    losses.plot(*series(held_out, "loss"), "o-", color=HELD_OUT, label="held-out: unseen combinations")
    losses.plot(*series(held_out, "loss_swapped_images"), "s--", color=SWAPPED, label="held-out, images swapped")
    losses.axvline(summary["resumed_at_step"], color="black", linestyle=":", linewidth=1)
    losses.annotate(
        "stopped, resumed", (summary["resumed_at_step"], 1), xycoords=("data", "axes fraction"),
        xytext=(4, -12), textcoords="offset points", fontsize=9,
    )  # fmt: skip
    losses.set(xlabel="step", ylabel="loss (nats per caption token)", yscale="log", title="Loss")
    losses.legend(frameon=False)
    speed.plot(*series(train, "text_tokens_per_second"), color=HELD_OUT, linewidth=1, label="text")
    speed.plot(*series(train, "visual_tokens_per_second"), color=SWAPPED, linewidth=1, label="visual")
    speed.set(xlabel="step", ylabel="tokens/s", title="Throughput, two CPU ranks", ylim=(0, None))
    speed.legend(frameon=False, loc="lower right")
    for axes in (losses, speed):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(folder / "curves.png", dpi=110)
    plt.close(figure)


def series(records: list[dict], name: str) -> tuple[list[int], list[float]]:
    """Steps and values of one metric."""
    return [record["step"] for record in records], [record[name] for record in records]


def draw_contact_sheet(folder: Path, columns: int = 6, rows: int = 5) -> None:
    """Held-out scenes with what the model says of them; what it got wrong comes first, and in red."""
    samples = json.loads((folder / "captions.json").read_text())["samples"]
    wrong = [sample for sample in samples if sample["generated"] != sample["caption"]]
    right = [sample for sample in samples if sample["generated"] == sample["caption"]]
    chosen = (wrong[: columns * rows // 3] + right)[: columns * rows]
    source = Source(folder / "data" / "heldout.index")
    figure, grid = plt.subplots(rows, columns, figsize=(2.6 * columns, 2.35 * rows), layout="constrained")
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, sample in zip(grid.flat, chosen, strict=False):
        image = Image.open(io.BytesIO(source.read_image(sample["index"], 0))).convert("RGB")
        axes.imshow(image)
        is_right = sample["generated"] == sample["caption"]
        axes.set_title(wrap(sample["generated"]), fontsize=8.5, color=RIGHT if is_right else WRONG)
        if not is_right:
            axes.text(0.5, -0.04, f"truth: {wrap(sample['caption'])}", fontsize=7, ha="center", va="top",
                      transform=axes.transAxes)  # fmt: skip
    figure.suptitle(f"Unseen combinations: {len(right)} of {len(samples)} captions exactly right", fontsize=13)
    figure.savefig(folder / "captions.png", dpi=100)
    plt.close(figure)


def wrap(caption: str) -> str:
    """A caption on lines of at most about 30 letters, broken at its relations."""
    for relation in (" left of ", " above "):
        caption = caption.replace(relation, f"{relation.rstrip()}\n")
    return caption
