"""The plan for people: text on stdout, trained tokens in colour on a terminal and between brackets elsewhere."""

from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from pipeline.plan import StagePlan
from pipeline.plan_data import DataPlan, Piece

_ACTIONS = {"skip": "skipped", "resume": "resumed", "build": "built"}
_BAR = 40
_TEXT = 400  # characters of one piece of an example


def print_plan(plans: Sequence[StagePlan], console: Console) -> None:
    """Prints each stage's plan."""
    for plan in plans:
        console.print(Text(f"{plan.stage}: would be {_ACTIONS[plan.action]} ({plan.why})", style="bold"))
        _print_data(plan.data, console)
        for line in plan.batches:
            console.print(f"  batches  {line}")
        if plan.engine:
            console.print(f"  rollouts {plan.engine}", highlight=False, markup=False)
        _print_memory(plan.memory, console)
        console.print()


def _print_data(data: DataPlan, console: Console) -> None:
    if data.unchecked:
        console.print(f"  rows     {data.unchecked}")
        return
    console.print(f"  rows     {data.summary}")
    for refusal in data.refused:
        console.print(f"  refused  {refusal}")
    if hidden := data.rows["refused"] + data.rows.get("ptx_refused", 0) - len(data.refused):
        console.print(f"  refused  … and {hidden} more")
    most = max((rows for _, _, rows in data.histogram), default=1)
    for low, high, rows in data.histogram:
        console.print(f"  tokens   {low:>5}-{high:<5} {'█' * round(_BAR * rows / most):<{_BAR}} {rows}")
    for pieces in data.examples:
        console.print(example_text(pieces, coloured=console.is_terminal))


def example_text(pieces: Sequence[Piece], *, coloured: bool) -> Text:
    """One example, the loss mask made visible."""
    text = Text("  example  ")
    for piece in pieces:
        shown = piece.text if len(piece.text) <= _TEXT else f"{piece.text[: _TEXT // 2]} … {piece.text[-_TEXT // 2 :]}"
        if coloured:
            text.append(shown, style="green" if piece.trained else "dim")
        else:
            text.append(f"⟦{shown}⟧" if piece.trained else shown)
    return text


def _print_memory(memory: dict[str, int] | str, console: Console) -> None:
    if isinstance(memory, str):
        console.print(f"  memory   {memory}")
        return
    total = sum(memory.values())
    for part, size in memory.items():
        if size:
            console.print(f"  memory   {part:<34} {size_text(size):>10}")
    console.print(f"  memory   {'together, estimated':<34} {size_text(total):>10}")


def size_text(size: int) -> str:
    """`1.5 GB` or `12 MB`, decimal."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
