"""The figures, by name. Every number is of LEDGER.md, or of arithmetic that is shown here."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.figures.ledger import after, numbers, row, sentence
from benchmarks.figures.svg import Bar, bars, groups

_FIRST = "The engine on one H200: Qwen3.5-27B-FP8 shapes"
_THIRD = "The engine on one H200, third round: power is the limit"
_GRAPHS = "Steps with prompts as CUDA graphs"
_AGENTS = "Sessions of an agent on a CPU: memory for 10 of 50, a kill -9 half way"

# 27B shapes: GDN layers, value heads, and a state's rows and columns.
_LAYERS, _HEADS, _ROWS, _COLUMNS = 48, 48, 128, 128
_COPY = 4.27e12  # bytes a second of a large copy on an H200


def state_traffic() -> str:
    """What moving the states takes, by scheme and number of drafts: arithmetic.

    The other scheme reads a state and writes one for each token that is verified. The window form
    reads it, and writes it when its W = max(16, 3 (k + 1)) rows cannot take k + 1 more: where all
    drafts are accepted, every (W - k) / (k + 1) steps.
    """
    whole = 256 * _LAYERS * _HEADS * _ROWS * _COLUMNS * 4 / _COPY * 1e3  # ms to move all, once
    rows = []
    for drafts in (0, 1, 3, 5):
        name = f"{drafts} draft{'' if drafts == 1 else 's'}"
        window = max(16, 3 * (drafts + 1))
        rows.append(Bar(f"{name}, a state a token", (whole, whole * (drafts + 1))))
        rows.append(Bar("window form", (whole, whole * (drafts + 1) / (window - drafts))))
    return bars(
        "Moving all recurrent states in a step of 256 rows, fp32",
        "ms at 4.27 TB/s",
        ("read", "written"),
        rows,
    )


def decode_step() -> str:
    """Where the milliseconds of a decode step of 256 rows went, then and later."""
    first = sentence(_FIRST, "Where the 50 ms go:")
    third = sentence(_THIRD, "Where the 48.8 ms of a decode step go:")
    parts = [
        ("FP8 products", after(first, "FP8 products"), after(third, "FP8 products")),
        (
            "states",
            after(first, "GDN state") + after(first, "its coefficients"),
            after(third, "GDN state") + after(third, "convolution"),
        ),
        ("attention", after(first, "attention"), after(third, "attention")),
        ("heads", after(first, "draft head"), after(third, "lm_head")),
        (
            "norms, quantising",
            after(first, "gates and norms"),
            after(third, "gates and norms"),
        ),
    ]
    totals = (
        50.0,
        numbers(row(_THIRD, "decode step at 256 rows, some 900 tokens of context, ms")[3])[0],
    )
    rows = []
    for at, (label, total) in enumerate(
        zip(("first round", "third round"), totals, strict=True), 1
    ):
        known = [float(part[at]) for part in parts]
        rows.append(Bar(label, [*known, total - sum(known)], f"{total:.1f} ms"))
    names = [*(part[0] for part in parts), "rest and idle"]
    return bars("A decode step of 256 rows, one draft, 27B in FP8 on an H200", "ms", names, rows)


def mixed_steps() -> str:
    """Steps with prompts: launched one by one by the host, and as graphs."""
    rows = []
    for name, label, nth in (
        ("64 tokens alone", "64 tokens", 0),
        ("512", "512 tokens", 0),
        ("1,024", "1,024 tokens", 0),
        ("2,048", "2,048 tokens", 0),
        ("64 behind 8,192", "64 behind 8,192 cached", 0),
        ("226 rows beside 64", "226 rows beside 64", 0),
        ("512", "226 rows beside 512", 1),
        ("1,450", "226 rows beside 1,450", 0),
    ):
        cells = row(_GRAPHS, name, nth)
        eager, graph = numbers(cells[1])[1], numbers(cells[2])[1]
        rows.append(Bar(label, (eager, graph)))
    return groups(
        "A step with a prompt, wall time", "ms", ("launched one by one", "as two graphs"), rows
    )


def energy() -> str:
    """Joules of steps, and the power that they draw."""
    cells = row(_GRAPHS, "a prompt of 64 / 512 tokens alone")
    joules, watts = numbers(cells[3]), numbers(cells[4])
    rows = [
        Bar("a prompt of 64", (joules[0],), f"{joules[0]:.1f} J at {watts[0]:.0f} W"),
        Bar("a prompt of 512", (joules[1],), f"{joules[1]:.1f} J at {watts[1]:.0f} W"),
    ]
    for name, label in (("1,450 alone", "a prompt of 1,450"), ("226 rows alone", "226 rows")):
        cells = row(_GRAPHS, name)
        (j,), (w,) = numbers(cells[3]), numbers(cells[4])
        rows.append(Bar(label, (j,), f"{j:.1f} J at {w:.0f} W"))
    cells = row(_GRAPHS, "226 rows beside 64 / 512 / 1,450")
    for size, j, w in zip((64, 512, 1450), numbers(cells[3]), numbers(cells[4]), strict=True):
        rows.append(Bar(f"226 rows beside {size:,}", (j,), f"{j:.1f} J at {w:.0f} W"))
    return bars("Energy of a step, limit of the GPU 700 W", "joules", ("a step",), rows)


def chunk_size() -> str:
    """Prompt tokens of a mixed step: what they cost in gaps between tokens."""
    rows = []
    for name in ("2,048", "1,536, the default from here on", "1,280", "1,024"):
        cells = row(_GRAPHS, name, 1 if name in ("2,048", "1,024") else 0)
        rows.append(Bar(f"{name.partition(', t')[0]} tokens", (numbers(cells[2])[1],),
                        f"{numbers(cells[2])[1]:.0f} ms, {cells[1]} tok/s"))  # fmt: skip
    return bars("Prompt tokens beside decoding rows", "ITL p99, ms", ("ITL p99",), rows)


def prefixes() -> str:
    """What of 50 sessions of an agent was computed, with and without lower tiers."""
    rows = []
    for name, label in (
        ("all, with host memory and files", "with host memory and files"),
        ("all, without lower tiers", "device alone"),
    ):
        cells = row(_AGENTS, name)
        new, computed = numbers(cells[1])[0], numbers(cells[2])[0]
        rows.append(Bar(label, (new, computed - new), f"{cells[3]} x the new tokens"))
    return bars(
        "Tokens computed in 50 sessions, memory for 10", "tokens", ("new", "computed again"), rows
    )


FIGURES: dict[str, Callable[[], str]] = {
    "state_traffic": state_traffic,
    "decode_step": decode_step,
    "mixed_steps": mixed_steps,
    "energy": energy,
    "chunk_size": chunk_size,
    "prefixes": prefixes,
}
