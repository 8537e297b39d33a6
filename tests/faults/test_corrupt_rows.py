"""Malformed rows among good ones: read = accepted + refused, each with its line and reason, and no good row lost."""

import gzip
import json
import random
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from data.errors import UserError
from data.rows import Demonstration, Preference, Prompt
from data.sources import SourceConfig, load_rows

USER = {"role": "user", "content": "why?"}
BOT = {"role": "assistant", "content": "so."}


def line(**fields: object) -> bytes:
    return json.dumps(fields).encode()


# name -> (a malformed line of a preference file, a word of its reason)
BAD_PAIRS: dict[str, tuple[bytes, str]] = {
    "cut off": (b'{"prompt": "q", "chosen": "a", "rej', "not JSON"),
    "no JSON": (b"prompt,chosen,rejected", "not JSON"),
    "single quotes": (b"{'prompt': 'q'}", "not JSON"),
    "two objects": (b'{"prompt": "q"} {"chosen": "a"}', "not JSON"),
    "nested too deeply": (b"[" * 200_000, "not JSON"),
    "a number too long": (b'{"margin": ' + b"9" * 5000 + b"}", "not JSON"),
    "not UTF-8": (b'{"prompt": "q\xff", "chosen": "a", "rejected": "b"}', "not UTF-8"),
    "Latin-1": ('{"prompt": "é", "chosen": "a", "rejected": "b"}'.encode("latin-1"), "not UTF-8"),
    "half a surrogate pair": (b'{"prompt": "q\\ud800", "chosen": "a", "rejected": "b"}', "Unicode"),
    "null": (b"null", "null"),
    "number": (b"7", "number"),
    "string": (b'"text"', "layout: text"),
    "list": (b'["q", "a", "b"]', "list"),
    "no columns": (b"{}", "no column 'chosen'"),
    "no rejected": (line(prompt="q", chosen="a"), "no column 'rejected'"),
    "no prompt": (line(chosen="a", rejected="b"), "no prompt"),
    "prompt is null": (line(prompt=None, chosen="a", rejected="b"), "prompt is a null"),
    "prompt is a number": (line(prompt=3, chosen="a", rejected="b"), "prompt is a number"),
    "prompt is empty": (line(prompt="", chosen="a", rejected="b"), "prompt is empty"),
    "prompt is blank": (line(prompt=" \n", chosen="a", rejected="b"), "prompt is empty"),
    "chosen is empty": (line(prompt="q", chosen="", rejected="b"), "chosen is empty"),
    "rejected is empty": (line(prompt="q", chosen="a", rejected=""), "rejected is empty"),
    "both blank": (line(prompt="q", chosen=" ", rejected="\n"), "both blank"),
    "the same": (line(prompt="q", chosen="a", rejected="a"), "the same"),
    "chosen is a list of strings": (line(prompt="q", chosen=["a"], rejected="b"), "no object with role"),
    "chosen has no turns": (line(prompt=[USER], chosen=[], rejected="b"), "no turns"),
    "unknown role": (line(prompt=[{"role": "wizard", "content": "q"}], chosen="a", rejected="b"), "role 'wizard'"),
    "role is a number": (line(prompt=[{"role": 1, "content": "q"}], chosen="a", rejected="b"), "role 1"),
    "no role": (line(prompt=[{"content": "q"}], chosen="a", rejected="b"), "role None"),
    "content is null": (line(prompt=[{"role": "user", "content": None}], chosen="a", rejected="b"), "not text"),
    "content is a list": (line(prompt=[{"role": "user", "content": ["q"]}], chosen="a", rejected="b"), "not text"),
    "blank user turn": (line(prompt=[{"role": "user", "content": " "}], chosen="a", rejected="b"), "is empty"),
    "prompt ends with an answer": (line(prompt=[USER, BOT], chosen="a", rejected="b"), "user turn"),
    "transcripts without a beginning": (
        line(chosen=[USER, BOT], rejected=[{"role": "user", "content": "how?"}, BOT]),
        "share no opening",
    ),
    "one transcript begins the other": (line(chosen=[USER, BOT], rejected=[USER, BOT, USER]), "share no opening"),
    "transcripts part at a user turn": (
        line(chosen=[USER, BOT, USER, BOT], rejected=[USER, BOT, {"role": "user", "content": "who?"}, BOT]),
        "user turn",
    ),
    "plain transcripts without a mark": (line(chosen="Human: a", rejected="Human: b"), "no prompt column"),
    "margin NaN": (b'{"prompt": "q", "chosen": "a", "rejected": "b", "margin": NaN}', "margin=nan is not finite"),
    "margin infinite": (b'{"prompt": "q", "chosen": "a", "rejected": "b", "margin": -Infinity}', "not finite"),
    "margin in words": (line(prompt="q", chosen="a", rejected="b", margin="large"), "not a number"),
    "margin a list": (line(prompt="q", chosen="a", rejected="b", margin=[1]), "margin is a list"),
    "weight true": (line(prompt="q", chosen="a", rejected="b", weight=True), "weight is a boolean"),
    "weight negative": (line(prompt="q", chosen="a", rejected="b", weight=-1), "negative"),
    "p_chosen 0": (line(prompt="q", chosen="a", rejected="b", p_chosen=0), "outside (0, 1]"),
    "p_chosen 1.5": (line(prompt="q", chosen="a", rejected="b", p_chosen=1.5), "outside (0, 1]"),
}

BAD_DEMONSTRATIONS: dict[str, tuple[bytes, str]] = {
    "no response": (line(prompt="q", answer="a"), "no response, completion or messages; the row has answer, prompt"),
    "blank response": (line(prompt="q", response="  "), "response is empty"),
    "blank completion": (line(prompt="q", completion=""), "completion is empty"),
    "messages is text": (line(messages="hello"), "messages is a string"),
    "no turns": (line(messages=[]), "no assistant turn"),
    "no answer": (line(messages=[USER]), "no assistant turn"),
    "no question": (line(messages=[BOT]), "user turn"),
    "an empty answer": (line(messages=[USER, {"role": "assistant", "content": ""}]), "assistant turn is empty"),
    "a turn that is text": (line(messages=[USER, "so."]), "no object with role"),
    "unknown ShareGPT role": (line(conversations=[{"from": "bing", "value": "a"}]), "role 'bing'"),
    "ShareGPT without value": (line(conversations=[{"from": "human"}]), "not text"),
}


def load(kind: type, path: Path, **fields: object):
    return load_rows(kind, [SourceConfig(path=str(path), **fields)], run_folder=path.parent, seed=0)


def mixed_file(path: Path, bad: list[bytes], good: list[bytes]) -> dict[int, int]:
    """Writes both kinds in a seeded order; line number -> place in `bad` of each malformed line."""
    entries = [(row, None) for row in good] + [(row, place) for place, row in enumerate(bad)]
    random.Random(0).shuffle(entries)
    path.write_bytes(b"\n".join(row for row, _ in entries) + b"\n")
    return {number: place for number, (_, place) in enumerate(entries, start=1) if place is not None}


@pytest.mark.parametrize(
    ("kind", "cases"),
    [(Preference, BAD_PAIRS), (Demonstration, BAD_DEMONSTRATIONS)],
    ids=["preferences", "demonstrations"],
)
def test_every_malformed_line_is_refused_with_its_line_and_reason(tmp_path: Path, kind: type, cases: dict) -> None:
    reasons = [reason for _, reason in cases.values()] * 3
    bad = [row for row, _ in cases.values()] * 3
    good = [line(prompt=f"q{n}", chosen=f"a{n}", rejected=f"b{n}", response=f"r{n}") for n in range(200)]
    path = tmp_path / "rows.jsonl"
    places = mixed_file(path, bad, good)

    loaded = load(kind, path)

    assert len(loaded.rows) == len(good)
    assert {row.prompt for row in loaded.rows} == {f"q{n}" for n in range(200)}
    assert len(loaded.refused) == len(bad)
    assert loaded.counts[0].read == len(good) + len(bad)
    for refusal in loaded.refused:
        file, number = refusal.origin.rsplit(":", 1)
        assert file == str(path)
        assert reasons[places.pop(int(number))] in refusal.reason
    assert not places


def test_there_are_enough_mutation_classes() -> None:
    assert len(BAD_PAIRS) + len(BAD_DEMONSTRATIONS) >= 25


def test_random_bytes_never_crash_the_reader(tmp_path: Path) -> None:
    """Good rows with bytes changed, removed or repeated at random: every non-blank line is accounted for."""
    chance = random.Random(1)
    path = tmp_path / "rows.jsonl"
    lines: list[bytes] = []
    for n in range(2000):
        row = bytearray(line(prompt=[USER], chosen=f"a{n}", rejected="b", margin=0.5))
        for _ in range(chance.randint(0, 3)):
            place = chance.randrange(len(row))
            row[place : place + chance.randint(0, 2)] = bytes([chance.randrange(256)]) * chance.randint(0, 2)
        lines.append(bytes(row))
    path.write_bytes(b"\n".join(lines))
    num_lines = sum(bool(text.strip()) for text in b"\n".join(lines).split(b"\n"))
    for kind in (Preference, Demonstration, Prompt):
        loaded = load(kind, path)
        assert len(loaded.rows) + len(loaded.refused) == num_lines
        assert all(refusal.reason and refusal.origin.startswith(f"{path}:") for refusal in loaded.refused)


@pytest.mark.parametrize("kept", [0.3, 0.6, 0.99])
def test_a_cut_gz_gives_its_whole_lines_and_one_refusal(tmp_path: Path, kept: float) -> None:
    chance = random.Random(2)
    words = [f"{chance.getrandbits(64):x}" for _ in range(5000)]
    path = tmp_path / "rows.jsonl.gz"
    whole = gzip.compress(b"".join(line(prompt=word, response="r") + b"\n" for word in words))
    path.write_bytes(whole[: int(len(whole) * kept)])
    loaded = load(Demonstration, path)
    assert len(loaded.rows) > 5000 * kept * 0.8
    assert [row.prompt for row in loaded.rows] == words[: len(loaded.rows)]
    assert [refusal.origin for refusal in loaded.refused] == [f"{path}:{len(loaded.rows) + 1}"]
    assert "damaged from here on" in loaded.refused[0].reason


def test_a_flipped_bit_in_a_gz_is_found(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.gz"
    whole = bytearray(gzip.compress(b"".join(line(prompt=f"q{n}", response="r") + b"\n" for n in range(2000))))
    whole[-6] ^= 1  # in the checksum of the content
    path.write_bytes(whole)
    assert len(load(Demonstration, path).refused) == 1


@pytest.mark.parametrize(
    ("name", "content", "word"),
    [
        ("a.jsonl.gz", b"this is no gzip", "gzip"),
        ("a.json", b'[{"prompt": "q", "response": "r"}, {"prompt": ', ":1: not JSON"),
        ("a.json", b'[{"prompt": "q"}\n{"prompt": "q"}]', "comma"),
        ("a.json", b'{"rows": []}', '"data"'),
        ("a.json", b"\xff\xfe", "UTF-8"),
        ("a.parquet", b"PAR1 and then nothing", "Parquet"),
        ("a.csv", b"", "header"),
        ("a.csv", b'prompt,response\nq,"never closed\nq,r\n', "quotes"),
        ("a.xlsx", b"PK", "unknown kind"),
    ],
)
def test_a_file_whose_rows_cannot_be_told_apart_is_a_user_error(
    tmp_path: Path, name: str, content: bytes, word: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError) as raised:
        load(Demonstration, path)
    assert str(path) in str(raised.value)
    assert word in str(raised.value)


def test_csv_rows_are_refused_by_row_number(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(
        b"prompt,chosen,rejected,margin\n"
        b'"two\nlines",a,b,0.5\n'  # row 1, one row over two lines
        b"q,a\n"  # row 2: too few cells
        b"\n"  # no row
        b"q,a,b,1,2\n"  # row 3: too many
        b"q,a,\xe9,1\n"  # row 4: not UTF-8
        b'q,"a"x,b,1\n'  # row 5: text behind a closing quote
        b"q,a,b,\n"  # row 6: no margin given
    )
    loaded = load(Preference, path)
    assert [(row.prompt, row.margin, row.origin) for row in loaded.rows] == [
        ("two\nlines", 0.5, f"{path}:1"),
        ("q", 0.0, f"{path}:6"),
    ]
    assert [refusal.origin for refusal in loaded.refused] == [f"{path}:{row}" for row in (2, 3, 4, 5)]
    for refusal, word in zip(loaded.refused, ["2 cells", "5 cells", "Unicode", "not CSV"], strict=True):
        assert word in refusal.reason


def test_parquet_nulls_and_types_are_refused_by_row_number(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    table = pyarrow.table({"prompt": ["q", None, "q"], "response": ["r", "r", ""], "number": [1, 2, 3]})
    pyarrow.parquet.write_table(table, path)
    loaded = load(Demonstration, path)
    assert [row.origin for row in loaded.rows] == [f"{path}:1"]
    assert [refusal.origin for refusal in loaded.refused] == [f"{path}:2", f"{path}:3"]
    assert len(load(Demonstration, path, columns={"response": "number"}).refused) == 3


def test_a_malformed_message_of_a_tree_costs_only_what_hangs_on_it(tmp_path: Path) -> None:
    def reply(text: object, rank: object, **more: object) -> dict[str, object]:
        return {"text": text, "role": "assistant", "rank": rank, "replies": [], **more}

    tree = {"prompt": {"text": "why?", "role": "prompter", "replies": []}}
    tree["prompt"]["replies"] = [
        reply("good", 0),
        reply("bad", 2),
        reply(None, 1, message_id="m1"),
        reply("gone", 3, deleted=True),
        reply("not ranked", None),
        reply("odd rank", "first"),
    ]
    path = tmp_path / "trees.jsonl"
    path.write_text(json.dumps(tree) + "\n[]\n")
    loaded = load(Preference, path, layout="ranked_tree")
    assert [(row.chosen[0]["content"], row.rejected[0]["content"]) for row in loaded.rows] == [("good", "bad")]
    assert [refusal.origin for refusal in loaded.refused] == [f"{path}:1", f"{path}:1", f"{path}:2"]
    assert "m1 has no text" in loaded.refused[0].reason
    assert "rank 'first'" in loaded.refused[1].reason
