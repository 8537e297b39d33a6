"""The report's figures, worked by hand."""

import pytest

from stages.label.judging import Opinion, Outcome, canary_points
from stages.label.pairs import Pair, mixed_in
from stages.label.report import label_figures, length_bias, position_figures


def outcome(label: float | None, *, known: float | None = None, source: str = "judge:m", asked: bool = True) -> Outcome:
    opinions = (Opinion(label, (1, 2), (1.0, 0.0)),) if asked else ()
    return Outcome(Pair("p", "short", "the longer one", known=known), label, source, opinions=opinions)


def test_counts_and_rates() -> None:
    """Five pairs: two labelled by the judge (one tie), one by rule, one abstention, one without an answer."""
    pairs = [
        outcome(1.0),
        outcome(0.5),
        outcome(0.0, source="rule:no words", asked=False),
        outcome(None),
        outcome(None, asked=False),
    ]
    figures = label_figures(pairs)
    expected = {"pairs": 5, "labelled": 3, "by_rule": 1, "quarantined": 1, "abstentions": 1, "ties": 1}
    assert {name: figures[name] for name in expected} == expected
    assert figures["tie_rate"] == pytest.approx(1 / 3)
    assert figures["abstention_rate"] == pytest.approx(1 / 5)
    assert figures["longer_preferred"] == 0.5  # of the first and the third, the third is for the longer one


def test_length_bias_leaves_out_ties_and_equal_lengths() -> None:
    """Longer preferred in 2 of 3: (9, 4, first), (4, 9, second), not (9, 4, second)."""
    sized = [(9, 4, 1.0), (4, 9, 0.2), (9, 4, 0.0), (5, 5, 1.0), (9, 4, 0.5), (9, 4, None)]
    figures = length_bias(sized)
    assert figures["longer_preferred"] == pytest.approx(2 / 3)
    assert figures["longer_preferred_low"] < 2 / 3 < figures["longer_preferred_high"]
    assert length_bias([(5, 5, 1.0)]) == {}


def test_position_bias() -> None:
    """A then A changes with the order, so do B then B and A then tie; A then B and tie then tie do not: 3 of 5.

    Verdicts for what was shown first: A, A of the first, A of the second, A of the fourth: 4 of the 7 that are no tie.
    """
    shown = [(1.0, 1.0), (1.0, 0.0), (0.5, 0.5), (1.0, 0.5), (0.0, 0.0)]
    figures = position_figures([Opinion(None, (), each) for each in shown])
    assert figures["inconsistent"] == pytest.approx(3 / 5)
    assert figures["first_preferred"] == pytest.approx(4 / 7)
    assert "inconsistent" not in position_figures([Opinion(1.0, (), (1.0,))])


@pytest.mark.parametrize(
    ("label", "known", "points"), [(1.0, 1.0, 1.0), (0.8, 0.0, 0.0), (0.5, 1.0, 0.5), (None, 0.0, 0.5), (0.1, 0.0, 1.0)]
)
def test_canary_points(label: float | None, known: float, points: float) -> None:
    assert canary_points(outcome(label, known=known)) == points


def test_canaries_are_spread_evenly_and_the_pairs_keep_their_order() -> None:
    pairs = [Pair(str(place), "a", "b") for place in range(10)]
    canaries = [Pair(f"c{place}", "a", "b", canary=True) for place in range(2)]
    order = [pair.prompt for pair in mixed_in(pairs, canaries)]
    assert [each for each in order if not each.startswith("c")] == [str(place) for place in range(10)]
    assert [order.index("c0"), order.index("c1")] == [3, 9]


def test_the_row_of_a_label() -> None:
    pair = Pair("p", "one", "two", "file:3")
    row = pair.preference(0.25, source="judge:m", ledger=[4, 5])
    assert row == {
        "prompt": "p",
        "chosen": "two",
        "rejected": "one",
        "p_chosen": 0.75,
        "source": "judge:m",
        "ledger_ids": [4, 5],
        "origin": "file:3",
    }
    assert pair.preference(0.5, source="s", ledger=[])["chosen"] == "one"
