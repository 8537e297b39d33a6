"""Recorded verdicts of real judges on real pairs, replayed by an endpoint: what the report says of them is what can be
counted in the files, here by hand."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.judge_server import JudgeServer
from tests.labelling import figures_of, label_here, rows_of, write_config

DATA = Path(__file__).parents[3] / "shared" / "data"
LLMBAR, PANDALM = DATA / "llmbar", DATA / "pandalm-testset"
AS_RECORDED = {"attempts": 1, "max_concurrency": 16, "constrained": False}

pytestmark = [
    pytest.mark.real_data,
    pytest.mark.slow,
    pytest.mark.skipif(not DATA.is_dir(), reason="../shared is missing"),
]


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def kappa(pairs: Sequence[tuple[str, str]]) -> float:
    """Cohen's kappa from its definition."""
    count = len(pairs)
    labels = {label for pair in pairs for label in pair}
    first, second = Counter(one for one, _ in pairs), Counter(other for _, other in pairs)
    observed = sum(one == other for one, other in pairs) / count
    expected = sum(first[label] * second[label] for label in labels) / count**2
    return (observed - expected) / (1 - expected)


@pytest.mark.parametrize("judge", ["GPT-4", "ChatGPT", "LLaMA2", "PaLM2"])
def test_llmbar_judges_in_both_orders(tmp_path: Path, judge: str) -> None:
    pairs: list[dict[str, Any]] = []
    recorded: dict[tuple[str, str, str], str | None] = {}  # as shown -> A, B, or nothing that can be read
    truth: list[tuple[int, str | None, str | None]] = []  # gold, winner as given, winner swapped
    for subset in ("Natural", "GPTInst", "Neighbor"):
        for place, row in enumerate(read(LLMBAR / subset / f"{judge}-Vanilla.json")):
            prompt, (one, two) = f"[{subset} {place}] {row['input']}", (row["output_1"], row["output_2"])
            given, swapped = (row["results"][0][f"swap = {swap}"]["winner"] for swap in (False, True))
            recorded[prompt, one, two] = {"1": "A", "2": "B"}.get(given)
            recorded[prompt, two, one] = {"2": "A", "1": "B"}.get(swapped)
            truth.append((row["label"], given, swapped))
            pairs.append({"prompt": prompt, "responses": [one, two], "label": row["label"]})

    def replay(data: Mapping[str, Any]) -> str:
        key = (data["conversation"][0]["content"], data["response_A"], data["response_B"])
        return recorded[key] or "raw:no idea"

    with JudgeServer(script=replay) as server:
        config = write_config(tmp_path, server, pairs, judge=AS_RECORDED, addressing="ask")
        label_here(config, tmp_path / "out")
    figures = figures_of(tmp_path / "out")
    answered = [(gold, given, swapped) for gold, given, swapped in truth if given and swapped]
    assert len(truth) == 326
    assert figures["labels"]["quarantined"] == len(truth) - len(answered)
    assert figures["labels"]["by_rule"] == 0
    found = figures["judges"]["scripted"]
    consistent = [(str(gold), given) for gold, given, swapped in answered if given == swapped]
    right = sum(gold == given for gold, given in consistent)
    assert found["inconsistent"] == pytest.approx(1 - len(consistent) / len(answered))
    assert found["human_agreement"] == pytest.approx(right / len(answered))
    said = [(str(gold), str(given) if given == swapped else "tie") for gold, given, swapped in answered]
    assert found["human_kappa"] == pytest.approx(kappa(said))
    assert found["human_kappa_low"] < found["human_kappa"] < found["human_kappa_high"]
    first = sum(given == "1" for _, given, _ in answered) + sum(swapped == "2" for _, _, swapped in answered)
    assert found["first_preferred"] == pytest.approx(first / (2 * len(answered)))
    written = rows_of(tmp_path / "out" / "label" / "preferences.jsonl")
    assert Counter(row["p_chosen"] for row in written) == Counter(
        1.0 if given == swapped else 0.5 for _, given, swapped in answered
    )


@pytest.mark.parametrize(("file", "key"), [("gpt-3.5-turbo", "gpt_result"), ("pandalm-7b", "pandalm_result")])
def test_pandalm_judges_beside_three_people(tmp_path: Path, file: str, key: str) -> None:
    verdicts = {row["idx"]: str(row[key]).lower() for row in read(PANDALM / f"{file}-testset-v1.json")}
    names = {"1": "A", "2": "B", "0": "tie", "tie": "tie"}
    pairs: list[dict[str, Any]] = []
    expected: list[tuple[str, str]] = []
    sides: dict[str, tuple[str, str, str | None]] = {}
    for row in read(PANDALM / "testset-v1.json"):
        prompt = f"[{row['idx']}] {row['instruction']}\n{row['input']}"
        people, votes = Counter(str(row[f"annotator{n}"]) for n in (1, 2, 3)).most_common(1)[0]
        has_words = all(any(map(str.isalnum, str(row[name]))) for name in ("response1", "response2"))
        if not all(isinstance(row[name], str) for name in ("response1", "response2")) or not has_words:
            continue  # no text, or no words: nothing to ask a judge about
        if row["response1"] == row["response2"]:
            continue
        human = names[people] if votes > 1 else None
        verdict = names.get(verdicts[row["idx"]])
        sides[prompt] = row["response1"], row["response2"], verdict
        pairs.append({"prompt": prompt, "responses": [row["response1"], row["response2"]], "label": human})
        if human is not None and verdict is not None:
            expected.append((human, verdict))

    def replay(data: Mapping[str, Any]) -> str:
        """The recorded verdict, whichever of the two is shown first: only one order was recorded."""
        one, _, verdict = sides[data["conversation"][0]["content"]]
        if verdict in (None, "tie"):
            return verdict or "raw:garbage"
        return "A" if (data["response_A"] == one) == (verdict == "A") else "B"

    with JudgeServer(script=replay) as server:
        judge = {**AS_RECORDED, "both_orders": False}
        label_here(write_config(tmp_path, server, pairs, judge=judge, addressing="ask"), tmp_path / "out")
        assert len(server.calls) == len(pairs) > 900
    figures = figures_of(tmp_path / "out")
    found = figures["judges"]["scripted"]
    assert figures["labels"]["by_rule"] == 0
    assert found["human_pairs"] == len(expected)
    assert found["human_agreement"] == pytest.approx(sum(one == other for one, other in expected) / len(expected))
    assert found["human_kappa"] == pytest.approx(kappa(expected))
