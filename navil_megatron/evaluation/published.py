"""The figures that the paper reports on 14 public benchmarks, and where ours go beside them.

The one place they are written; docs/evaluation.md shows ``render_table()``. A star marks what NaViL's authors measured
themselves for a model of others; ``-``: not reported.
"""

from collections.abc import Iterable
from typing import NamedTuple


class Benchmark(NamedTuple):
    """One benchmark, and what two toolkits call it."""

    name: str
    split: str
    lmms_eval: str
    vlmevalkit: str
    points: float = 1.0
    """What one point of an average is worth in its own unit: MME sums to 2800, OCRBench to 1000."""


BENCHMARKS = (
    Benchmark("MMVet", "test", "mmvet", "MMVet"),
    Benchmark("MMMU", "val", "mmmu_val", "MMMU_DEV_VAL"),
    Benchmark("MMBench-EN", "test", "mmbench_en_test", "MMBench_TEST_EN"),
    Benchmark("MME", "sum", "mme", "MME", 28),
    Benchmark("MathVista", "mini", "mathvista_testmini", "MathVista_MINI"),
    Benchmark("OCRBench", "test", "ocrbench", "OCRBench", 10),
    Benchmark("CCBench", "test", "mmbench_cn_cc", "CCBench"),
    Benchmark("TextVQA", "val", "textvqa_val", "TextVQA_VAL"),
    Benchmark("ScienceQA-IMG", "test", "scienceqa_img", "ScienceQA_TEST"),
    Benchmark("GQA", "test-dev", "gqa", "GQA_TestDev_Balanced"),
    Benchmark("DocVQA", "test", "docvqa_test", "DocVQA_TEST"),
    Benchmark("AI2D", "test", "ai2d", "AI2D_TEST"),
    Benchmark("ChartQA", "test", "chartqa", "ChartQA_TEST"),
    Benchmark("InfoVQA", "test", "infovqa_test", "InfoVQA_TEST"),
)
GENERAL = tuple(benchmark.name for benchmark in BENCHMARKS[:7])
QUESTIONS = tuple(benchmark.name for benchmark in BENCHMARKS[7:])
ELEVEN = tuple(benchmark.name for benchmark in BENCHMARKS if benchmark.name not in {"CCBench", "ScienceQA-IMG", "GQA"})
"""Those on which the paper reports the 9B."""

FIGURES = {
    "ours, 2B": "- - - - - - - - - - - - - -",
    "NaViL-2B": "78.3 41.8 71.2 1822 50.0 796 83.9 76.9 95.0 59.8 85.4 74.6 78.0 56.0",
    "InternVL-2.5-2B": "60.8 43.6 74.7 2138 51.3 804 81.7 74.3 96.2 61.2 88.7 74.9 79.2 60.9",
    "Qwen2VL-2B": "49.5 41.1 74.9 1872 43.0 809 53.7 79.7 78.2* 60.3* 90.1 74.7 73.5 65.5",
    "Mono-InternVL": "40.1 33.7 65.5 1875 45.7 767 66.3 72.6 93.6 59.5 80.0 68.6 73.7 43.0",
    "EVEv2-7B": "45.0 39.3 66.3 1709 60.0* 702 30.8* 71.1 96.2 62.9 77.4* 74.8 73.9 45.8*",
    "SAIL-7B": "46.3 38.6* 70.1 1719 57.0 783 24.3* 77.1 93.3 58.0* 78.4* 76.7 69.7* 47.3*",
    "ours, 9B": "- - - - - - - - - - - - - -",
    "NaViL-9B": "79.6 54.7 76.5 2225 66.7 837 - 77.2 - - 90.6 82.4 85.4 70.2",
    "InternVL-2.5-8B": "62.8 56.0 84.6 2344 64.4 822 - 79.1 - - 91.9 84.5 84.8 75.7",
    "Qwen2.5-VL-7B": "67.1 58.6 83.5 2347 68.2 864 - 84.9 - - 95.7 83.9 87.3 82.6",
}
"""Model -> a figure for each benchmark, in its own unit. Fill in the two rows of ours."""


def figures_of(model: str) -> dict[str, str]:
    """Benchmark -> figure."""
    return {benchmark.name: figure for benchmark, figure in zip(BENCHMARKS, FIGURES[model].split(), strict=True)}


def average(model: str, names: Iterable[str]) -> float | None:
    """The mean over some benchmarks as the paper takes it, MME / 28 and OCRBench / 10; ``None`` if one is missing."""
    found, points = figures_of(model), {benchmark.name: benchmark.points for benchmark in BENCHMARKS}
    figures = [(found[name].rstrip("*"), points[name]) for name in names]
    if any(figure == "-" for figure, _ in figures):
        return None
    return sum(float(figure) / worth for figure, worth in figures) / len(figures)


def render_table() -> str:
    """The figures as a Markdown table, a benchmark a row."""
    columns = {model: figures_of(model) for model in FIGURES}
    rows = [
        [f"{one.name} ({one.split})", *(found[one.name] for found in columns.values()), one.lmms_eval, one.vlmevalkit]
        for one in BENCHMARKS
    ]
    for title, names in (("7 general", GENERAL), ("7 questions", QUESTIONS), ("11 of the 9B", ELEVEN)):
        means = (average(model, names) for model in FIGURES)
        rows.append([f"mean of {title}", *("-" if mean is None else f"{mean:.1f}" for mean in means), "", ""])
    header = ["benchmark (split)", *FIGURES, "lmms-eval", "VLMEvalKit"]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows))
