"""The recipe's tables and its picture: loss over the three phases, perplexity of text, exact answers by question."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from rich.console import Console
from rich.table import Table

from examples.quickstart.report import HELD_OUT, SWAPPED, TRAIN, folder_bytes, read_metrics, series

START = "start"


def show_summary(folder: Path, summary: dict[str, Any], console: Console) -> None:
    """Draws the picture and prints the tables."""
    draw(folder, summary)
    console.print(phase_table(summary))
    console.print(answer_table(summary))
    phases = summary["phases"]
    captions = ", ".join(f"{score['exact']:.1%} after {phase}" for phase, score in summary["captions"].items())
    console.print(f"exactly right captions of unseen pairs: {captions}")
    unchanged = "bit-identical to" if summary["logits_unchanged_by_s1.1"] else "OTHER THAN"
    console.print(f"logits of text after s1.1: {unchanged} those before")
    console.print(
        f"perplexity of the LLM under transformers: {summary['perplexity_of_the_llm']:.3f}; with the same weights as "
        f"the start, logits differ by at most {summary['largest_difference_to_transformers']:.1e}"
    )
    training = sum(seconds for name, seconds in summary["seconds"].items() if name.startswith("train"))
    console.print(f"time: {summary['total_seconds']:.0f} s, training {training:.0f} s of it")
    for what, name in (
        ("picture", "recipe.png"),
        ("figures", "summary.json"),
        ("worst answers", "s2/heldout/worst.html"),
    ):
        console.print(f"  {what:14} {folder / name}")
    console.print(f"  {'models':14} {', '.join(str(folder / phase / 'hf') for phase in phases)}")
    console.print(f"  {'disk':14} {folder_bytes(folder) / 1e9:.1f} GB")
    console.print(f"[dim]Pictures: {summary['attribution']}[/dim]")


def phase_table(summary: dict[str, Any]) -> Table:
    """One row a phase."""
    table = Table(title="The three phases", title_justify="left")
    for name in ("phase", "steps", "samples", "tokens/s", "loss", "held-out loss", "perplexity of text"):
        table.add_column(name, justify="left" if name == "phase" else "right")
    table.add_row("before", "", "", "", "", "", f"{summary['perplexity_at_the_start']:.2f}")
    for name, phase in summary["phases"].items():
        held_out = (f"{_source(key)} {loss:.3f}" for key, loss in phase["heldout"].items())
        table.add_row(
            name,
            f"{phase['train_steps']:,}",
            f"{phase['samples']:,}",
            f"{phase['tokens_per_second']:,.0f}",
            f"{phase['first_loss']:.2f} to {phase['loss']:.2f}",
            "\n".join(held_out),
            f"{phase['perplexity']:.2f}",
        )
    return table


def _source(key: str) -> str:
    """``captions`` of ``loss/heldout_captions``; a single source has no name."""
    return key.removeprefix("loss").removeprefix("/heldout_")


def answer_table(summary: dict[str, Any]) -> Table:
    """One row a kind of question."""
    table = Table(title="Exactly right, on scenes with unseen pairs, after s2", title_justify="left")
    for name in ("", "right", "pictures swapped", "most frequent answer", "asked"):
        table.add_column(name, justify="left" if not name else "right")
    for kind, score in summary["answers"].items():
        swapped = summary["answers_swapped"][kind]["exact"]
        guess = f"{score['most_frequent_answer']:.1%}"
        table.add_row(kind, f"{score['exact']:.1%}", f"{swapped:.1%}", guess, str(score["num"]))
    return table


def draw(folder: Path, summary: dict[str, Any]) -> None:
    """Three panels side by side."""
    figure, panels = plt.subplots(1, 3, figsize=(15, 4.5), width_ratios=(2.2, 1, 1.5), layout="constrained")
    _draw_losses(panels[0], folder, list(summary["phases"]))
    _draw_perplexities(panels[1], summary)
    _draw_answers(panels[2], summary)
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(folder / "recipe.png", dpi=110)
    plt.close(figure)


def _draw_losses(axes: Any, folder: Path, phases: list[str]) -> None:
    """Training loss and held-out losses, one phase behind the other."""
    offset, colours = 0, {"captions": HELD_OUT, "text": "black", "questions": SWAPPED}
    for phase in phases:
        records = read_metrics(folder / phase / "logs" / "metrics.jsonl")
        steps, losses = series([record for record in records if record["kind"] == "train"], "loss")
        axes.plot([offset + step for step in steps], losses, color=TRAIN, linewidth=1, label=_once(axes, "training"))
        held_out = [record for record in records if record["kind"] == "evaluation"]
        for key in held_out[0] if held_out else ():
            if key.startswith("loss"):
                name = _source(key) or "captions"
                places, values = series(held_out, key)
                label = _once(axes, f"held-out {name}")
                axes.plot([offset + place for place in places], values, "o-", color=colours[name], label=label)
        axes.annotate(
            phase, (offset, 1), xycoords=("data", "axes fraction"), xytext=(4, -12), textcoords="offset points"
        )
        offset += steps[-1]
        if phase != phases[-1]:
            axes.axvline(offset, color="black", linestyle=":", linewidth=1)
    axes.set(xlabel="step", ylabel="loss (nats per learned token)", yscale="log", title="Loss")
    axes.legend(frameon=False, fontsize=9, loc="upper center", bbox_to_anchor=(0.36, 1))


def _once(axes: Any, label: str) -> str | None:
    """A label that the legend does not have yet."""
    return None if label in axes.get_legend_handles_labels()[1] else label


def _draw_perplexities(axes: Any, summary: dict[str, Any]) -> None:
    values = {"before": summary["perplexity_at_the_start"]}
    values |= {name: phase["perplexity"] for name, phase in summary["phases"].items()}
    bars = axes.bar(list(values), list(values.values()), color=HELD_OUT)
    axes.bar_label(bars, fmt="%.2f")
    axes.set(title="Perplexity of held-out text", ylim=(0, 1.15 * max(values.values())))


def _draw_answers(axes: Any, summary: dict[str, Any]) -> None:
    kinds = list(summary["answers"])
    rows = (
        ("right", HELD_OUT, [summary["answers"][kind]["exact"] for kind in kinds]),
        ("pictures swapped", SWAPPED, [summary["answers_swapped"][kind]["exact"] for kind in kinds]),
        ("most frequent answer", TRAIN, [summary["answers"][kind]["most_frequent_answer"] for kind in kinds]),
    )
    for number, (label, colour, shares) in enumerate(rows):
        places = [place + 0.27 * (number - 1) for place in range(len(kinds))]
        axes.bar(places, [100 * share for share in shares], 0.25, color=colour, label=label)
    axes.set_xticks(range(len(kinds)), kinds, fontsize=9)
    axes.set(title="Exact answers, unseen pairs (%)", ylim=(0, 125))
    axes.set_yticks(range(0, 101, 20))
    axes.legend(frameon=False, fontsize=9, loc="upper center", ncols=3, columnspacing=0.8, handlelength=1)
