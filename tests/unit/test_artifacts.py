"""Artifacts: atomic publication under failing disks, and nothing damaged ever read as whole."""

import errno
import json
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from data import artifacts
from data.artifacts import (
    MANIFEST,
    Artifact,
    FileEntry,
    Parent,
    hash_files,
    publish_folder,
    read_artifact,
    read_manifest,
    sha256_json,
    write_atomically,
    write_manifest,
)
from data.errors import UserError
from tests.failing_disk import count_operations, failing_at

FILES = {"weights/model.bin": bytes(range(256)) * 4, "config.yaml": b"name: x\n", "weights/empty.txt": b""}


def write_files(folder: Path) -> None:
    for name, content in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """A finished artifact with files, scratch and metrics."""
    folder = tmp_path / "sft"
    folder.mkdir()
    write_files(folder)
    for scratch in ("checkpoints", "trackers"):
        (folder / scratch).mkdir()
        (folder / scratch / "state.bin").write_bytes(b"state")
    write_manifest(
        folder,
        Artifact(
            "policy", "sft", "abc", parents=[Parent("../toy", "00")], files=hash_files(folder), metrics={"m": 1.5}
        ),
    )
    return folder


def test_a_written_artifact_reads_back_whole(finished: Path) -> None:
    artifact = read_artifact(finished, kind="policy")
    assert (artifact.kind, artifact.stage, artifact.key) == ("policy", "sft", "abc")
    assert artifact.parents == [Parent("../toy", "00")]
    assert artifact.metrics == {"m": 1.5}
    assert set(artifact.files) == set(FILES)  # neither scratch nor the manifest itself
    assert artifact.files["config.yaml"].bytes == 8
    # sha256 of no bytes, as published everywhere
    empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert artifact.files["weights/empty.txt"] == FileEntry(0, empty)


def test_a_json_digest_ignores_the_order_of_keys() -> None:
    assert sha256_json({"a": 1, "b": [1, 2]}) == sha256_json({"b": [1, 2], "a": 1})
    assert sha256_json({"a": 1}) != sha256_json({"a": 2})


def test_another_kind_is_refused_by_name(finished: Path) -> None:
    with pytest.raises(UserError, match=r"a policy \(from stage sft\), where a reward_model is needed"):
        read_artifact(finished, kind="reward_model")


def test_a_folder_without_a_manifest_is_unfinished(finished: Path) -> None:
    (finished / MANIFEST).unlink()
    with pytest.raises(UserError, match="not a finished stage"):
        read_artifact(finished)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(finished: Path, name: str) -> None:
    (finished / name).unlink()
    with pytest.raises(UserError, match=f"{name}: missing"):
        read_artifact(finished)


def test_every_truncation_and_every_flipped_bit_is_found(finished: Path) -> None:
    generator = random.Random(0)
    for name in ("weights/model.bin", "config.yaml"):
        path, content = finished / name, FILES[name]
        offsets = {generator.randrange(len(content)) for _ in range(20)}
        for offset in offsets:
            path.write_bytes(content[:offset])
            with pytest.raises(UserError, match=f"{name}: {offset} bytes, {len(content)} expected"):
                read_artifact(finished)
        for _ in range(100):
            place, bit = generator.randrange(len(content)), 1 << generator.randrange(8)
            path.write_bytes(content[:place] + bytes([content[place] ^ bit]) + content[place + 1 :])
            with pytest.raises(UserError, match=f"{name}: its sha256"):
                read_artifact(finished)
        path.write_bytes(content)
    assert read_artifact(finished).key == "abc"


def test_every_problem_is_a_line_of_its_own(finished: Path) -> None:
    (finished / "config.yaml").unlink()
    (finished / "weights/model.bin").write_bytes(b"")
    with pytest.raises(UserError) as caught:
        read_artifact(finished)
    assert len(caught.value.problems) == 2


def test_a_damaged_manifest_is_an_error_and_no_traceback(finished: Path) -> None:
    path = finished / MANIFEST
    content = path.read_text()
    for damaged in [content[:cut] for cut in range(0, len(content) - 2, 7)] + ["[]", "null", "3", '{"files": 3}']:
        path.write_text(damaged)
        with pytest.raises(UserError, match="damaged manifest"):
            read_manifest(finished)
    for key in ("kind", "files", "parents"):
        path.write_text(json.dumps({name: value for name, value in json.loads(content).items() if name != key}))
        with pytest.raises(UserError, match="damaged manifest"):
            read_manifest(finished)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="damaged manifest"):
        read_manifest(finished)


def test_a_published_folder_replaces_the_old_one_whole(tmp_path: Path) -> None:
    target = tmp_path / "new" / "weights"
    publish_folder(target, write_files)
    assert {path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file()} == set(FILES)
    publish_folder(target, lambda folder: (folder / "only.txt").write_text("new") and None)
    assert [path.name for path in target.iterdir()] == ["only.txt"]
    assert [path.name for path in target.parent.iterdir()] == ["weights"]


def test_a_writer_that_fails_leaves_the_old_folder_and_no_rubbish(tmp_path: Path) -> None:
    target = tmp_path / "weights"
    publish_folder(target, write_files)

    def fail(folder: Path) -> None:
        (folder / "half").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        publish_folder(target, fail)
    assert hash_files(target).keys() == FILES.keys()
    assert [path.name for path in tmp_path.iterdir()] == ["weights"]


def test_what_a_killed_publication_left_is_removed_by_the_next(tmp_path: Path) -> None:
    for left_over in (".weights.tmp-1", ".weights.tmp-old", ".other.tmp-1"):
        (tmp_path / left_over).mkdir()
        (tmp_path / left_over / "half").write_text("half")
    publish_folder(tmp_path / "weights", write_files)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".other.tmp-1", "weights"]


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_fails_at_any_point_leaves_the_old_folder_or_the_new(tmp_path: Path, error: int) -> None:
    def publish(folder: Path, text: str) -> None:
        def write(temporary: Path) -> None:
            write_files(temporary)
            write_atomically(temporary / "version.txt", text)

        publish_folder(folder / "weights", write)

    publish(tmp_path / "dry", "old")
    total = count_operations(lambda: publish(tmp_path / "dry", "new"))
    assert total > 10
    for k in range(total):
        folder = tmp_path / str(k)
        publish(folder, "old")
        with pytest.raises(OSError, match=os.strerror(error)), failing_at(k, error):
            publish(folder, "new")
        assert (folder / "weights" / "version.txt").read_text() in ("old", "new"), k
        assert set(FILES) < set(hash_files(folder / "weights")), k
        publish(folder, "later")
        assert (folder / "weights" / "version.txt").read_text() == "later"
        assert [path.name for path in folder.iterdir()] == ["weights"], k


def test_a_file_written_atomically_is_old_or_new_under_a_failing_disk(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    write_atomically(path, "old")
    rewrite: Callable[[], None] = lambda: write_atomically(path, "new")  # noqa: E731
    for k in range(count_operations(rewrite)):
        write_atomically(path, "old")
        with pytest.raises(OSError, match="space"), failing_at(k, errno.ENOSPC):
            rewrite()
        assert path.read_text() in ("old", "new")


def test_everything_is_flushed_before_the_rename_that_shows_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[Path] = []
    fsync_path = artifacts.fsync_path
    monkeypatch.setattr(artifacts, "fsync_path", lambda path: (flushed.append(path), fsync_path(path))[1])
    rename = Path.rename

    def checked(source: Path, target: Path) -> Path:
        if not source.name.endswith("weights"):
            assert {path for path in source.rglob("*")} | {source} <= set(flushed)
        return rename(source, target)

    monkeypatch.setattr(Path, "rename", checked)
    publish_folder(tmp_path / "weights", write_files)
    assert flushed[-1] == tmp_path  # the rename itself
