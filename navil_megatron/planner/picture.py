"""A pipeline schedule as an SVG: a line a stage, time from left to right."""

from xml.sax.saxutils import escape

from navil_megatron.planner.schedule import Schedule, Span

WIDTH, LEFT, TOP, ROW, GAP = 960, 82, 62, 30, 8
FORWARD, BACKWARD, FIRST_FORWARD, FIRST_BACKWARD = "#dbe7f5", "#eceff1", "#dcefdc", "#b9dcb9"
TEXT = 'font-family="DejaVu Sans, Helvetica, Arial, sans-serif"'
SHOWN_MICROBATCHES = 8
"""Drawn at most; a step of more goes on in the same way."""


def draw_schedule(schedule: Schedule, title: str) -> str:
    """The first microbatches of a schedule, under a line of title."""
    stages = 1 + max(span.stage for span in schedule.spans)
    shown = [span for span in schedule.spans if span.microbatch < max(SHOWN_MICROBATCHES, 2 * stages)]
    end = max(span.end for span in shown)
    scale = (WIDTH - LEFT - 14) / end
    height = TOP + stages * (ROW + GAP) + 34
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        f'{TEXT} font-size="12" fill="#263238">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
        f'<text x="12" y="20" font-size="13" font-weight="bold">{escape(title)}</text>',
        *_legend(),
    ]
    for stage in range(stages):
        y = TOP + stage * (ROW + GAP)
        lines.append(f'<text x="12" y="{y + ROW / 2 + 4:.1f}">stage {stage}</text>')
        lines.append(f'<rect x="{LEFT}" y="{y}" width="{WIDTH - LEFT - 14}" height="{ROW}" fill="#fafafa"/>')
    for span in shown:
        lines += _box(span, scale)
    y = TOP + stages * (ROW + GAP) + 16
    lines.append(f'<text x="{LEFT}" y="{y}">0</text>')
    lines.append(f'<text x="{WIDTH - 14}" y="{y}" text-anchor="end">{end * 1e3:,.0f} ms</text>')
    return "\n".join([*lines, "</svg>", ""])


def _box(span: Span, scale: float) -> list[str]:
    x, width = LEFT + span.start * scale, (span.end - span.start) * scale
    y = TOP + span.stage * (ROW + GAP)
    colors = (FIRST_FORWARD, FIRST_BACKWARD) if span.chunk == 0 else (FORWARD, BACKWARD)
    color = colors[0] if span.is_forward else colors[1]
    box = f'<rect x="{x:.2f}" y="{y}" width="{width:.2f}" height="{ROW}" fill="{color}" stroke="#607d8b"/>'
    word = f"{'F' if span.is_forward else 'B'}{span.microbatch + 1}"
    if width < 7 * len(word):
        return [box]
    place = f'x="{x + width / 2:.2f}" y="{y + ROW / 2 + 4:.1f}" text-anchor="middle" font-size="11"'
    return [box, f"<text {place}>{word}</text>"]


def _legend() -> list[str]:
    lines, x = [], LEFT
    for color, word in (
        (FIRST_FORWARD, "forward with encoder"),
        (FIRST_BACKWARD, "backward with encoder"),
        (FORWARD, "forward"),
        (BACKWARD, "backward"),
    ):
        lines.append(f'<rect x="{x}" y="34" width="14" height="14" fill="{color}" stroke="#607d8b"/>')
        lines.append(f'<text x="{x + 20}" y="45">{word}</text>')
        x += 34 + 7 * len(word)
    return lines
