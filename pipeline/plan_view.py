"""The plan for people: text on stdout, trained tokens in colour on a terminal and between brackets elsewhere."""

from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from pipeline.plan import StagePlan
from pipeline.plan_choices import Place, cheapest
from pipeline.plan_data import DataPlan, Piece
from pipeline.plan_memory import peak_bytes
from pipeline.plan_time import Seconds
from stages.core.speed import ASSUMPTIONS

_ACTIONS = {"skip": "skipped", "resume": "resumed", "build": "built"}
_BAR = 40
_TEXT = 400  # characters of one piece of an example


def print_plan(plans: Sequence[StagePlan], console: Console, place: Place | None = None) -> None:
    """Prints each stage's plan for a place."""
    place = place or Place()
    for plan in plans:
        console.print(Text(f"{plan.stage}: would be {_ACTIONS[plan.action]} ({plan.why})", style="bold"))
        _print_data(plan.data, console)
        for line in plan.batches:
            console.print(f"  batches  {line}")
        if plan.engine:
            console.print(f"  rollouts {plan.engine}", highlight=False, markup=False)
        _print_memory(plan.memory, console, place)
        _print_choices(plan, console)
        if plan.seconds is not None:
            for line in _time_lines(plan.seconds, place):
                console.print(f"  time     {line}", highlight=False, markup=False)
        console.print()
    if any(plan.seconds is not None for plan in plans):
        console.print(f"times rest on {ASSUMPTIONS}")


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


def _print_memory(memory: dict[str, int] | str, console: Console, place: Place) -> None:
    if isinstance(memory, str):
        console.print(f"  memory   {memory}")
        return
    for part, size in memory.items():
        if size:
            console.print(f"  memory   {part:<42} {size_text(size):>10}")
    each = f"at most at once, on each of {place.ranks} devices" if place.ranks > 1 else "at most at once, estimated"
    console.print(f"  memory   {each:<42} {size_text(peak_bytes(memory)):>10}")


def _print_choices(plan: StagePlan, console: Console) -> None:
    best = cheapest(plan.choices)
    for choice in plan.choices:
        name = choice.strategy + (f", {choice.offload} offloaded" if choice.offload != "none" else "")
        fits = "fits" if choice.fits else "does not fit"
        mark = "   <- the cheapest that fits" if choice is best else ""
        text = f"{name:<28} {size_text(choice.bytes):>10}  {fits:<12} {seconds_text(choice.seconds):>8}{mark}"
        console.print(f"  strategy {text}", highlight=False, markup=False)
    if plan.choices and best is None:
        console.print("  strategy none fits; take more devices, smaller batches, LoRA or gradient_checkpointing")


def _time_lines(seconds: Seconds, place: Place) -> list[str]:
    phases = ", ".join(f"{name} {seconds_text(each)}" for name, each in seconds.phases.items())
    lines = [f"one {seconds.unit}: {seconds_text(seconds.total)} on {place.ranks} x {place.device} ({phases})"]
    if place.ranks > 1:
        lines.append(f"each rank sends {size_text(round(seconds.sent_bytes))} in it")
    return lines


def seconds_text(seconds: float) -> str:
    """`12 ms`, `3.2 s` or `14.5 min`."""
    if seconds < 1:
        return f"{seconds * 1e3:.0f} ms"
    return f"{seconds:.1f} s" if seconds < 600 else f"{seconds / 60:.1f} min"


def size_text(size: int) -> str:
    """`1.5 GB` or `12 MB`, decimal."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
