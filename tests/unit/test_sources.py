"""Every layout and file kind that a SourceConfig can point at, and the real files by config alone."""

import csv
import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from pydantic import ValidationError

from data.errors import UserError
from data.rows import Demonstration, Preference, Prompt
from data.sources import Loaded, SourceConfig, content_digest, load_rows

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared" / "data"
real_data = pytest.mark.skipif(not SHARED.is_dir(), reason="../shared is missing")

USER = {"role": "user", "content": "why?"}
BOT = {"role": "assistant", "content": "so."}
WORSE = {"role": "assistant", "content": "no."}


def load(kind: type, path: Path | str, **fields: object) -> Loaded:
    return load_rows(kind, [SourceConfig(path=str(path), **fields)], run_folder=Path(), seed=0)


def write_lines(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def only_row(kind: type, tmp_path: Path, row: object, **fields: object):
    loaded = load(kind, write_lines(tmp_path / "rows.jsonl", row), **fields)
    assert loaded.refused == []
    assert len(loaded.rows) == 1
    return loaded.rows[0]


# --- file kinds


def test_the_same_rows_from_every_kind_of_file(tmp_path: Path) -> None:
    rows = [{"prompt": f"q{n} é", "response": f"r{n}\n,x"} for n in range(3)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "a.jsonl").write_text(text)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "c.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "d.json").write_text(json.dumps({"data": rows}))
    (tmp_path / "e.json").write_text(text)  # JSON lines under the name .json, as on the hub
    with (tmp_path / "f.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["prompt", "response"])
        writer.writeheader()
        writer.writerows(rows)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "g.parquet")
    expected = [(row["prompt"], row["response"]) for row in rows]
    for path in sorted(tmp_path.iterdir()):
        loaded = load(Demonstration, path)
        assert [(row.prompt, row.response) for row in loaded.rows] == expected, path
        assert loaded.refused == []
    # A glob and a folder read their files in the order of their names.
    assert len(load(Demonstration, tmp_path / "*.json").rows) == 9
    assert [row.origin.rpartition("/")[2] for row in load(Demonstration, tmp_path).rows][::3] == [
        "a.jsonl:1",
        "b.jsonl.gz:1",
        "c.json:2",  # the first item stands on the second line
        "d.json:1",
        "e.json:1",
        "f.csv:1",
        "g.parquet:1",
    ]


def test_items_on_one_line_of_json_are_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('[{"prompt": "q", "response": "r"}, {"prompt": "q", "response": "s"},\n{"prompt": "q"}]')
    loaded = load(Demonstration, path)
    assert [row.origin for row in loaded.rows] == [f"{path}:1", f"{path}:1#2"]
    assert loaded.refused[0].origin == f"{path}:2"


def test_blank_lines_and_a_byte_order_mark_are_no_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "q", "response": "r"}\r\n\r\n  \n{"prompt": "p", "response": "r"}')
    loaded = load(Demonstration, path)
    assert [row.origin for row in loaded.rows] == [f"{path}:1", f"{path}:4"]
    assert loaded.refused == []


def test_a_folder_saved_by_datasets_and_its_splits(tmp_path: Path) -> None:
    import datasets

    splits = {name: datasets.Dataset.from_list([{"prompt": name, "response": "r"}]) for name in ("train", "test")}
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "saved"))
    assert [row.prompt for row in load(Demonstration, tmp_path / "saved").rows] == ["train"]
    assert [row.prompt for row in load(Demonstration, tmp_path / "saved", split="test").rows] == ["test"]
    with pytest.raises(UserError, match="no split 'dev'"):
        load(Demonstration, tmp_path / "saved", split="dev")


def test_sources_that_do_not_exist_say_what_to_do(tmp_path: Path) -> None:
    for path, word in [
        (str(tmp_path / "none.jsonl"), "no such file"),
        ("none.jsonl", "no such file"),
        (str(tmp_path / "*.jsonl"), "matches no file"),
        (str(tmp_path), "matches no file"),
        ("stage:toy/none.jsonl", "run the stage"),
        ("stage:../outside.jsonl", "leaves the run folder"),
    ]:
        with pytest.raises(UserError, match=word):
            load(Demonstration, path)


def test_a_hub_id_out_of_reach_is_named() -> None:
    code = (
        "from pathlib import Path\nfrom data.rows import Prompt\nfrom data.sources import SourceConfig, load_rows\n"
        "load_rows(Prompt, [SourceConfig(path='nobody/nothing')], run_folder=Path(), seed=0)"
    )
    # huggingface_hub reads the variable when it is imported, so this needs a process of its own.
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ended.stderr.splitlines()[-1].startswith("data.errors.UserError: nobody/nothing: no folder or file here, ")


def test_a_stage_file_is_found_in_the_run_folder(tmp_path: Path) -> None:
    (tmp_path / "toy").mkdir()
    write_lines(tmp_path / "toy" / "rows.jsonl", {"prompt": "q"})
    source = SourceConfig(path="stage:toy/rows.jsonl")
    assert load_rows(Prompt, [source], run_folder=tmp_path, seed=0).rows[0].prompt == "q"


# --- rows


def test_columns_are_renamed_and_filled_in(tmp_path: Path) -> None:
    columns = {"prompt": "{instruction}\n{input}", "response": "output"}
    row = {"instruction": "Add {{them}}.", "input": "1, 2", "output": "3"}
    assert only_row(Demonstration, tmp_path, row, columns=columns).prompt == "Add {{them}}.\n1, 2"
    for empty in ("", " ", None):
        assert only_row(Demonstration, tmp_path, {**row, "input": empty}, columns=columns).prompt == "Add {{them}}."
    literal = only_row(Demonstration, tmp_path, row, columns={"prompt": "{{x}} {input}", "response": "output"})
    assert literal.prompt == "{x} 1, 2"
    # Where no field is empty the template's own end stays.
    kept = only_row(Demonstration, tmp_path, row, columns={"prompt": "{input}\n", "response": "output"})
    assert kept.prompt == "1, 2\n"


def test_a_format_reaches_columns_only(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", {"prompt": "q", "output": "r"})
    refused = load(Demonstration, path, columns={"response": "{prompt.__class__}"}).refused
    assert "no column 'prompt.__class__'; the row has output, prompt" in refused[0].reason


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [USER, BOT]},
        {"conversations": [{"from": "human", "value": "why?"}, {"from": "gpt", "value": "so."}]},
        {"prompt": [USER], "completion": [BOT]},
        {"prompt": [USER], "response": "so."},
        {"prompt": "why?", "completion": [BOT]},
        {"prompt": "why?", "messages": [USER, BOT]},  # as in UltraChat
        {"messages": [{"role": "system", "content": ""}, USER, BOT, USER]},  # no turn to learn follows the last
    ],
)
def test_conversational_demonstrations(tmp_path: Path, row: object) -> None:
    read = only_row(Demonstration, tmp_path, row)
    assert (read.prompt, read.response) == ([USER], [BOT])


def test_a_conversation_is_learned_from_its_first_answer_on_but_a_given_prompt_is_not(tmp_path: Path) -> None:
    system = {"role": "system", "content": "Be brief."}
    read = only_row(Demonstration, tmp_path, {"messages": [system, USER, BOT, USER, WORSE]})
    assert (read.prompt, read.response) == ([system, USER], [BOT, USER, WORSE])
    read = only_row(Demonstration, tmp_path, {"prompt": [USER, BOT, USER], "completion": [WORSE]})
    assert (read.prompt, read.response) == ([USER, BOT, USER], [WORSE])


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [USER], "chosen": "so.", "rejected": "no."},
        {"prompt": [USER], "chosen": [BOT], "rejected": [WORSE]},
        {"prompt": [USER], "chosen": BOT, "rejected": WORSE},
        {"prompt": "why?", "chosen": [BOT], "rejected": "no."},
        {"chosen": [USER, BOT], "rejected": [USER, WORSE]},
        {"prompt": "why?", "chosen": [USER, BOT], "rejected": [USER, WORSE]},  # as in UltraFeedback
        {
            "conversations": [{"from": "human", "value": "why?"}],
            "chosen": {"from": "gpt", "value": "so."},
            "rejected": {"from": "gpt", "value": "no."},
        },
    ],
)
def test_conversational_preferences(tmp_path: Path, row: object) -> None:
    read = only_row(Preference, tmp_path, row)
    assert (read.prompt, read.chosen, read.rejected) == ([USER], [BOT], [WORSE])


def test_transcripts_are_split_at_the_last_common_turn(tmp_path: Path) -> None:
    turns = [USER, BOT, USER]
    read = only_row(Preference, tmp_path, {"chosen": [*turns, BOT], "rejected": [*turns, WORSE]})
    assert (read.prompt, read.chosen, read.rejected) == (turns, [BOT], [WORSE])
    opening = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
    # Both answers begin with the same words: the split stands before them.
    row = {"chosen": f"{opening} yes, do", "rejected": f"{opening} yes, don't"}
    read = only_row(Preference, tmp_path, row)
    assert (read.prompt, read.chosen, read.rejected) == (opening, " yes, do", " yes, don't")
    assert only_row(Prompt, tmp_path, row).prompt == opening


def test_preference_numbers(tmp_path: Path) -> None:
    pair = {"prompt": "q", "chosen": "a", "rejected": "b"}
    read = only_row(Preference, tmp_path, {**pair, "margin": "0.5", "weight": 2, "p_chosen": 0.25})
    assert (read.margin, read.weight, read.p_chosen) == (0.5, 2.0, 0.25)
    read = only_row(Preference, tmp_path, {**pair, "margin": None})
    assert (read.margin, read.weight, read.p_chosen) == (0.0, 1.0, 1.0)
    # One blank side is a judgement too (hh-rlhf has four).
    assert only_row(Preference, tmp_path, {**pair, "chosen": " "}).chosen == " "


def test_prompts_keep_their_other_columns(tmp_path: Path) -> None:
    read = only_row(
        Prompt, tmp_path, {"question": "1+1?", "answer": 2, "tags": ["sum"]}, columns={"prompt": "question"}
    )
    assert (read.prompt, read.extra) == ("1+1?", {"answer": 2, "tags": ["sum"]})
    read = only_row(Prompt, tmp_path, {"messages": [USER, BOT], "id": 7})
    assert (read.prompt, read.extra) == ([USER], {"id": 7})


def test_text_is_split_after_the_opening_words(tmp_path: Path) -> None:
    for row in ("  One two  three\nfour five\n", {"text": "One two  three\nfour five"}):
        read = only_row(Demonstration, tmp_path, row, layout="text", prompt_words=3)
        assert (read.prompt, read.response) == ("One two  three", "\nfour five")
        assert only_row(Prompt, tmp_path, row, layout="text", prompt_words=3).prompt == "One two  three"
    story = only_row(
        Demonstration, tmp_path, {"story": "a b c"}, layout="text", prompt_words=2, columns={"text": "story"}
    )
    assert (story.prompt, story.response) == ("a b", " c")
    path = write_lines(tmp_path / "short.jsonl", "only three words", "", 3, {"words": "x"})
    reasons = [refusal.reason for refusal in load(Demonstration, path, layout="text", prompt_words=3).refused]
    assert [reason.split(",")[0] for reason in reasons] == [
        "3 words",
        "no text",
        "the text is not a string",
        "no column 'text'; map it with columns",
    ]
    with pytest.raises(UserError, match="no preference pairs"):
        load(Preference, path, layout="text")


def test_a_ranked_tree(tmp_path: Path) -> None:
    def node(text: str, role: str, *replies: dict, **more: object) -> dict:
        return {"text": text, "role": role, "replies": list(replies), **more}

    follow_up = node("and?", "prompter", node("A", "assistant", rank=1), node("B", "assistant", rank=0))
    tree = node(
        "why?",
        "prompter",
        node("third", "assistant", rank=2),
        node("first", "assistant", follow_up, rank=0),
        node("second", "assistant", rank=1),
        node("unranked", "assistant"),
    )
    path = write_lines(tmp_path / "trees.jsonl", {"message_tree_id": "t", "prompt": tree})

    def words(text: str | list) -> str:
        return text if isinstance(text, str) else "/".join(turn["content"] for turn in text)

    pairs = load(Preference, path, layout="ranked_tree")
    assert [(words(row.prompt), words(row.chosen), words(row.rejected)) for row in pairs.rows] == [
        ("why?", "first", "second"),
        ("why?", "first", "third"),
        ("why?", "second", "third"),
        ("why?/first/and?", "B", "A"),
    ]
    best = load(Demonstration, path, layout="ranked_tree").rows
    assert [(words(row.prompt), words(row.response)) for row in best] == [("why?", "first"), ("why?/first/and?", "B")]
    assert [words(row.prompt) for row in load(Prompt, path, layout="ranked_tree").rows] == ["why?", "why?/first/and?"]


# --- mixtures


def test_weights_repeat_and_thin_rows(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", *({"prompt": f"q{n}"} for n in range(10)))

    def prompts(weight: float, seed: int) -> list[str]:
        source = SourceConfig(path=str(path), weight=weight)
        return [str(row.prompt) for row in load_rows(Prompt, [source], run_folder=tmp_path, seed=seed).rows]

    assert prompts(2, 0) == [f"q{n}" for n in range(10) for _ in range(2)]
    assert len(prompts(0.5, 0)) == len(set(prompts(0.5, 0))) == 5
    assert prompts(0.5, 0) == prompts(0.5, 0) != prompts(0.5, 1)
    assert [prompts(1.3, 0).count(f"q{n}") for n in range(10)].count(2) == 3
    assert load(Prompt, path, weight=0.5).counts[0].used == 5
    assert load(Prompt, path, weight=0.5).counts[0].read == 10
    with pytest.raises(ValidationError):
        SourceConfig(path="x", weight=0)


def test_content_digest_follows_the_bytes_and_not_the_names(tmp_path: Path) -> None:
    first = write_lines(tmp_path / "a.jsonl", {"prompt": "q"})
    second = write_lines(tmp_path / "b.jsonl", {"prompt": "q"})

    def digest(path: Path | str, **fields: object) -> str:
        return content_digest(SourceConfig(path=str(path), **fields), tmp_path)

    assert digest(first) == digest(second)
    both = digest(tmp_path / "*.jsonl")
    assert both != digest(first)
    write_lines(second, {"prompt": "p"})
    assert digest(first) != digest(second)
    assert digest(tmp_path / "*.jsonl") != both
    assert digest("some/dataset") != digest("some/dataset", split="test") != digest("some/dataset", subset="x")


# --- real files, by config alone

ALPACA = {"prompt": "{instruction}\n{input}", "response": "output"}


@real_data
@pytest.mark.real_data
@pytest.mark.parametrize(
    ("kind", "path", "fields", "accepted", "refused"),
    [
        (Preference, "hh-rlhf-harmless-test/test.jsonl.gz", {}, 2312, 0),
        (Prompt, "hh-rlhf-harmless-test/test.jsonl.gz", {}, 2312, 0),
        (Preference, "oasst-trees-100/en_100_tree.jsonl", {"layout": "ranked_tree"}, 754, 0),
        (Demonstration, "oasst-trees-100/en_100_tree.jsonl", {"layout": "ranked_tree"}, 212, 0),
        (Demonstration, "alpaca-5000/alpaca_5000.json", {"columns": ALPACA}, 4998, 2),  # two answers are empty
        (Demonstration, "gsm8k/train.jsonl", {"columns": {"prompt": "question", "response": "answer"}}, 7473, 0),
        (Prompt, "gsm8k/test.jsonl", {"columns": {"prompt": "question"}}, 1319, 0),
        (Demonstration, "llama-factory-demos/alpaca_zh_demo.json", {"columns": ALPACA}, 1000, 0),
        (Preference, "llama-factory-demos/dpo_??_demo.json", {}, 600, 0),
        (Demonstration, "llama-factory-demos/kto_en_demo.json", {}, 300, 0),
        (Demonstration, "tinystories-1000/tinystories_1000.json", {"layout": "text"}, 1000, 0),
        (Prompt, "tinystories-1000/tinystories_1000.json", {"layout": "text"}, 1000, 0),
    ],
)
def test_real_files(kind: type, path: str, fields: dict, accepted: int, refused: int) -> None:
    loaded = load(kind, os.path.join(SHARED, path), **fields)
    assert (len(loaded.rows), len(loaded.refused)) == (accepted, refused)
    assert len({row.origin for row in loaded.rows}) == accepted or "tree" in path
