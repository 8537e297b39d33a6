"""Candidates from policies and endpoints, pairs by strategy, near-duplicates, and a judge in this process."""

import json
import random
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from data.errors import UserError
from pipeline.config import validate
from stages.core.context import Interrupted
from stages.core.judge.ledger import Ledger
from stages.core.judge.question import Question
from stages.label import candidates
from stages.label.candidates import Candidate, choose, distinct, likeness
from stages.label.config import Candidates
from tests.judge_server import JudgeServer
from tests.labelling import figures_of, label_here, rows_of, write_rows
from tests.vllm import tiny_base

PROMPTS = [{"prompt": f"Say {word}."} for word in ("one", "two", "three", "four", "five")]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_base(tmp_path_factory.mktemp("base"))


def by_length(data: Any) -> str:
    """The longer response is the better one."""
    first, second = len(data["response_A"]), len(data["response_B"])
    return "tie" if first == second else "A" if first > second else "B"


def config_file(folder: Path, base: Path, **label: Any) -> Path:
    """A config that samples candidates of the base for PROMPTS."""
    prompts = write_rows(folder / "prompts.jsonl", PROMPTS)
    config = {
        "base_model": str(base),
        "max_length": 64,
        "trackers": [],
        "label": {"prompts": [{"path": str(prompts)}], **label},
    }
    (folder / "config.yaml").write_text(json.dumps(config), encoding="utf-8")
    return folder / "config.yaml"


def test_policies_and_an_endpoint_answer_each_prompt(tmp_path: Path, base: Path) -> None:
    """2 policies x 2 and an endpoint x 2 make 6 candidates, 15 pairs a prompt, but for equal ones."""
    with JudgeServer(script=by_length) as server, JudgeServer(chat=lambda body: f"An answer {body['seed']}") as other:
        sampled = {"per_prompt": 2, "response_length": 6, "temperature": [0.7, 1.3], "near_duplicate": 1.0}
        config = config_file(
            tmp_path,
            base,
            policies=[str(base), str(base)],
            endpoints=[{"base_url": other.base_url, "model": "other"}],
            candidates=sampled,
            judge={"base_url": server.base_url, "model": "scripted"},
        )
        label_here(config, tmp_path / "out")
        assert len(other.calls) == 10
        assert Counter(body["temperature"] for body in other.bodies) == {0.7: 5, 1.3: 5}
        assert len({body["seed"] for body in other.bodies}) == 10
    counts = figures_of(tmp_path / "out")["counts"]
    # The second policy is the first one again, so its two answers repeat the first's.
    assert (counts["prompts"], counts["candidates"], counts["near_duplicates"]) == (5, 30, 10)
    rows = rows_of(tmp_path / "out" / "label" / "preferences.jsonl")
    assert Counter(row["prompt"] for row in rows) == {row["prompt"]: 6 for row in PROMPTS}
    assert all(len(row["chosen"]) > len(row["rejected"]) for row in rows if row["p_chosen"] == 1)


def test_stopped_while_sampling_it_goes_on_where_it_was(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(candidates, "CHUNK_PROMPTS", 2)
    with JudgeServer(script=by_length) as server:
        judge = {"base_url": server.base_url, "model": "scripted"}
        config = config_file(tmp_path, base, candidates={"per_prompt": 2, "response_length": 6}, judge=judge)
        looks = iter([False, False, True, True, True])
        with pytest.raises(Interrupted):
            label_here(config, tmp_path / "stopped", should_stop=lambda: next(looks))
        saved = tmp_path / "stopped" / "label" / "checkpoints" / "policy-0-00000.json"
        written = saved.stat().st_mtime_ns
        assert not saved.with_name("policy-0-00001.json").exists()
        assert label_here(config, tmp_path / "stopped", resume="must").action == "resumed"
        assert saved.stat().st_mtime_ns == written
        label_here(config, tmp_path / "clean")
    stopped, clean = (tmp_path / name / "label" / "preferences.jsonl" for name in ("stopped", "clean"))
    without_ids = [[{**row, "ledger_ids": []} for row in rows_of(path)] for path in (stopped, clean)]
    assert without_ids[0] == without_ids[1]


def test_a_local_judge_prefers_by_the_labels_log_probabilities(tmp_path: Path, base: Path) -> None:
    pairs = [{"prompt": f"{place}?", "responses": [f"First {place}.", f"Second {place}."]} for place in range(4)]
    path = write_rows(tmp_path / "pairs.jsonl", pairs)
    base = shutil.copytree(base, tmp_path / "base")
    shape = json.loads((base / "config.json").read_text(encoding="utf-8"))
    (base / "config.json").write_text(json.dumps({**shape, "max_position_embeddings": 4096}), encoding="utf-8")
    label = {"pairs": [{"path": str(path)}], "judge": {"local": str(base), "on_disagreement": "soft"}}
    config = {"base_model": str(base), "max_length": 64, "trackers": [], "label": label}
    (tmp_path / "config.yaml").write_text(json.dumps(config), encoding="utf-8")
    label_here(tmp_path / "config.yaml", tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(base).float().eval()
    tokenizer = AutoTokenizer.from_pretrained(base)
    with Ledger(tmp_path / "out" / "label" / "ledger.sqlite") as ledger:
        verdicts = {verdict.id: verdict for verdict in ledger.verdicts()}
        assert len(verdicts) == 8
        for verdict in verdicts.values():
            content = ledger.question(verdict.key)
            assert content is not None
            question = Question(**{**content, "responses": tuple(content["responses"]), "principles": ()})
            text = "\n\n".join(message["content"] for message in question.messages())
            prompt = f"{tokenizer.bos_token}User:\n{text}\n\nAssistant:\n"
            ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                logits_V = model(torch.tensor([ids])).logits[0, -1]
            labels = [tokenizer(f"\n{each}", add_special_tokens=False)["input_ids"][-1] for each in "AB"]
            assert verdict.value == pytest.approx(logits_V[labels].softmax(0)[0].item(), abs=1e-5)
    rows = rows_of(tmp_path / "out" / "label" / "preferences.jsonl")
    for row in rows:
        given, swapped = (verdicts[number].value for number in row["ledger_ids"])
        label_first = (given + 1 - swapped) / 2  # the mean of both orders
        assert row["p_chosen"] == pytest.approx(max(label_first, 1 - label_first))


@pytest.mark.parametrize(
    ("strategy", "scores", "expected"),
    [
        ("all", [], {(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)}),
        ("best-worst", [0.1, 0.9, -2.0, 0.3], {(1, 2)}),
        ("best-worst", [1.0, 1.0, 1.0, 1.0], set()),  # none is better
    ],
)
def test_strategies(strategy: str, scores: list[float], expected: set[tuple[int, int]]) -> None:
    score = {"function": "data.toy:gold"} if strategy == "best-worst" else None
    config = Candidates(strategy=strategy, score=score)  # type: ignore[arg-type]
    assert set(choose(4, config, scores, random.Random(0))) == expected
    assert choose(1, config, scores[:1], random.Random(0)) == []


def test_random_pairs_are_different_and_no_more_than_there_are() -> None:
    config = Candidates(strategy="random", pairs_per_prompt=4)
    chosen = choose(4, config, [], random.Random(0))
    assert len(set(chosen)) == 4
    assert len(choose(3, config, [], random.Random(0))) == 3


def test_near_duplicates() -> None:
    """a b c d and a b c e share 3 of 4 words in order: 2 x 3 / 8 = 0.75."""
    assert likeness("a b c d", "A b c e") == 0.75
    assert likeness("Same  words", "same words") == 1.0
    found = [Candidate(text) for text in ("a b c d", "A B C D", "a b c e", "", "x")]
    assert [each.text for each in distinct(found, near_duplicate=0.75)] == ["a b c d", "x"]
    assert [each.text for each in distinct(found, near_duplicate=0.8)] == ["a b c d", "a b c e", "x"]


@pytest.mark.parametrize(
    ("label", "words"),
    [
        ({"prompts": [], "pairs": []}, "name either prompts"),
        ({"pairs": [{"path": "x"}], "policies": ["y"]}, "with pairs nothing is sampled"),
        ({"prompts": [{"path": "x"}], "candidates": {"strategy": "best-worst"}}, "score goes with"),
        (
            {"prompts": [{"path": "x"}], "candidates": {"strategy": "best-worst", "score": {"model": "rm"}}},
            "the rm stage comes after",
        ),
        ({"prompts": [{"path": "x"}], "endpoints": [{"model": "m"}]}, "needs base_url and model"),
    ],
)
def test_sections_that_make_no_sense(label: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        validate({"base_model": "x", "label": label}, [])


def test_rm_and_dpo_learn_from_the_labels_where_nothing_else_is_named() -> None:
    label = {"prompts": [{"path": "x"}], "judge": {"toy": {}}}
    config = validate({"base_model": "x", "label": label, "rm": {}, "dpo": {}}, [])
    assert config.rm is not None
    assert config.dpo is not None
    assert [source.path for source in config.rm.data] == ["stage:label/preferences.jsonl"]
    assert [source.path for source in config.dpo.data] == ["stage:label/preferences.jsonl"]
