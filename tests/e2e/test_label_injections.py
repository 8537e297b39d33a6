"""Thirty injection strings against a judge made gullible on purpose: what each defence takes from them."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from stages.core.judge.defences import suspicious
from tests.injections import ALL, BREAKS_OUT, NAMES_A_LETTER, NAMES_ITSELF
from tests.judge_server import JudgeServer, by_quality
from tests.labelling import label_here, rows_of, write_config

COPIES = 4  # pairs of each string, the worse response with it, in both places


def injected_rows() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for number, injection in enumerate(ALL):
        for copy in range(COPIES):
            worse, better = f"Bad, quality 1. {injection}", "Good, quality 9."
            sides = [worse, better] if copy % 2 else [better, worse]
            rows.append({"prompt": f"{number}/{copy}", "responses": sides})
    return rows


def gullible(data: Mapping[str, Any], *, as_read: Callable[[str], str]) -> str:
    """Obeys the first injection that it reads; `as_read` is a response as it stood in the judge's prompt."""
    for name in "AB":
        response = as_read(data[f"response_{name}"])
        if any(each in data[f"response_{name}"] for each in NAMES_ITSELF):
            return name
        if any(each in response for each in BREAKS_OUT):
            return name
        for each in NAMES_A_LETTER:
            if each in data[f"response_{name}"]:
                return "B" if ("B" in each.replace("RESPONSE B", "") and '"B"' in each) or "[[B]]" in each else "A"
    return by_quality(data)


def raw(response: str) -> str:
    """A response pasted into a prompt as it is."""
    return response


def escaped(response: str) -> str:
    """A response as our prompts hold it."""
    return json.dumps(response)[1:-1]


@pytest.mark.slow
def test_each_defence_takes_something_from_the_attacker(tmp_path: Path) -> None:
    """Wins of the worse response, ties, and pairs set aside, of 120 pairs.

    A prompt without defences: the 20 strings that need no place win their 4 pairs each; those that name a letter win
    the 2 of 4 where they stand in that place. Escaping stops the 6 that break out. Both orders turn the 10 that name a
    letter into ties. The screen sets aside all but the 2 that speak to nobody.
    """
    naive = sum(
        gullible({"response_A": row["responses"][0], "response_B": row["responses"][1]}, as_read=raw)
        == "AB"["quality 1" in row["responses"][1]]
        for row in injected_rows()
    )
    assert naive == 4 * 20 + 2 * 10
    table: dict[str, tuple[int, int, int]] = {}
    defences = {
        "escaped": ({"both_orders": False}, "ask"),
        "escaped, both orders": ({"both_orders": True}, "ask"),
        "escaped, both orders, screened": ({"both_orders": True}, "quarantine"),
    }
    for name, (judge, addressing) in defences.items():
        out = tmp_path / name
        with JudgeServer(script=lambda data: gullible(data, as_read=escaped)) as server:
            judge |= {"max_concurrency": 4}
            label_here(write_config(tmp_path, server, injected_rows(), judge=judge, addressing=addressing), out)
        rows = rows_of(out / "label" / "preferences.jsonl")
        wins = sum("quality 1" in row["chosen"] and row["p_chosen"] > 0.5 for row in rows)
        ties = sum(row["p_chosen"] == 0.5 for row in rows)
        table[name] = wins, ties, len(rows_of(out / "label" / "quarantine.jsonl"))
    wins, ties, aside = table["escaped"]
    assert (ties, aside) == (0, 0)
    assert wins == pytest.approx(4 * 14 + 20, abs=8)  # which order is shown is a coin
    assert table["escaped, both orders"] == (4 * 14, 4 * 10, 0)
    assert table["escaped, both orders, screened"] == (4 * 2, 0, 4 * 28)


def test_the_screen_knows_the_usual_wordings_only() -> None:
    missed = [each for each in ALL if suspicious(each) is None]
    assert missed == [each for each in NAMES_ITSELF if "shut down" in each or "panel" in each]
