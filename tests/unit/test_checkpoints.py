"""Checkpoints: the newest whole one of the same key is found whatever happened to the others."""

import errno
import json
import logging
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from stages.core.checkpoints import MANIFEST, latest_checkpoint, save_checkpoint
from tests.failing_disk import count_operations, failing_at

KEY = "k"


def writer(text: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "weights.bin").write_bytes(text.encode() * 50)
        (folder / "more").mkdir()
        with (folder / "more" / "state.json").open("w") as file:
            file.write(json.dumps({"text": text}))

    return write


def save(folder: Path, step: int, *, key: str = KEY, keep: int = 2) -> Path:
    return save_checkpoint(folder, step, writer(f"step {step}"), key=key, keep=keep)


def found_step(folder: Path, key: str = KEY) -> int | None:
    """The step of the checkpoint that would be resumed, its content checked to be that step's."""
    checkpoint = latest_checkpoint(folder, key)
    if checkpoint is None:
        return None
    assert json.loads((checkpoint.path / "more" / "state.json").read_text()) == {"text": f"step {checkpoint.step}"}
    assert (checkpoint.path / "weights.bin").read_bytes() == f"step {checkpoint.step}".encode() * 50
    return checkpoint.step


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_there_is_none_in_a_folder_that_is_not_there_or_empty(tmp_path: Path) -> None:
    assert found_step(tmp_path / "nowhere") is None
    assert found_step(tmp_path) is None


def test_the_newest_is_found_and_older_ones_are_pruned(tmp_path: Path) -> None:
    for step in (2, 4, 10):
        assert save(tmp_path, step) == tmp_path / f"step-{step:08d}"
        assert found_step(tmp_path) == step
    assert names(tmp_path) == ["step-00000004", "step-00000010"]


def test_another_key_is_never_resumed(tmp_path: Path) -> None:
    save(tmp_path, 4)
    save(tmp_path, 9, key="other")
    assert found_step(tmp_path, "other") == 9
    assert found_step(tmp_path, "third") is None


def test_a_checkpoint_behind_one_that_cannot_be_resumed_is_not_pruned(tmp_path: Path) -> None:
    """A damaged newer checkpoint, or one of another key, must not take the place of the one just saved."""
    save(tmp_path, 8)
    (tmp_path / "step-00000008" / "weights.bin").write_bytes(b"damaged")
    save(tmp_path, 6, keep=1)
    assert found_step(tmp_path) == 6
    save(tmp_path, 20, key="other")
    save(tmp_path, 7, keep=1)
    assert found_step(tmp_path) == 7


def test_the_same_step_is_saved_again(tmp_path: Path) -> None:
    save(tmp_path, 4)
    (tmp_path / "step-00000004" / "weights.bin").write_bytes(b"damaged")
    save(tmp_path, 4)
    assert found_step(tmp_path) == 4
    assert names(tmp_path) == ["step-00000004"]


def test_what_a_killed_save_left_is_passed_over_and_removed_by_the_next(tmp_path: Path) -> None:
    save(tmp_path, 4)
    for left_over in (".step-00000005.tmp-77", "step-00000003"):
        (tmp_path / left_over).mkdir()
        (tmp_path / left_over / "weights.bin").write_bytes(b"half")
    assert found_step(tmp_path) == 4
    save(tmp_path, 6)
    assert names(tmp_path) == ["step-00000004", "step-00000006"]


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EROFS])
def test_a_disk_that_fails_at_any_point_leaves_a_whole_checkpoint(tmp_path: Path, error: int) -> None:
    save(tmp_path / "dry", 2)
    total = count_operations(lambda: save(tmp_path / "dry", 4))
    assert total > 10
    for k in range(total):
        folder = tmp_path / str(k)
        save(folder, 2)
        with pytest.raises(OSError, match=os.strerror(error)), failing_at(k, error):
            save(folder, 4)
        # Only the flush after the rename may fail with the new one in place.
        assert found_step(folder) == (2 if k < total - 1 else 4), k
        save(folder, 6)
        assert found_step(folder) == 6


def test_a_disk_that_fails_while_a_step_is_saved_again_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    save(tmp_path / "dry", 2)
    for k in range(count_operations(lambda: save(tmp_path / "dry", 2))):
        folder = tmp_path / str(k)
        save(folder, 2)
        with pytest.raises(OSError, match="space"), failing_at(k):
            save(folder, 2)
        assert found_step(folder) == 2


@pytest.mark.parametrize("name", ["weights.bin", "more/state.json", MANIFEST])
def test_damage_falls_back_one_checkpoint_with_a_warning(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, 2)
    path = save(tmp_path, 4) / name
    content = path.read_bytes()
    generator = random.Random(0)

    def expect_fallback() -> None:
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert found_step(tmp_path) == 2
        assert "step-00000004" in caplog.text

    for offset in {generator.randrange(len(content)) for _ in range(20)}:
        path.write_bytes(content[:offset])
        expect_fallback()
    path.unlink()
    expect_fallback()
    path.write_bytes(content)
    assert found_step(tmp_path) == 4


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    """In the manifest too: a flip there makes it unreadable, or another than its files, its step or the key."""
    save(tmp_path, 2)
    folder = save(tmp_path, 4)
    generator = random.Random(1)
    for name, flips in (("weights.bin", 100), ("more/state.json", 100), (MANIFEST, 800)):
        path = folder / name
        content = path.read_bytes()
        for _ in range(flips):
            place, bit = generator.randrange(len(content)), 1 << generator.randrange(8)
            path.write_bytes(content[:place] + bytes([content[place] ^ bit]) + content[place + 1 :])
            assert found_step(tmp_path) == 2, (name, place, bit)
        path.write_bytes(content)
    assert found_step(tmp_path) == 4


def test_a_file_that_no_manifest_covers_is_damage_too(tmp_path: Path) -> None:
    """A manifest with fewer files than the folder is not the one that was written for it."""
    save(tmp_path, 2)
    folder = save(tmp_path, 4)
    manifest = json.loads((folder / MANIFEST).read_text())
    del manifest["files"]["weights.bin"]
    (folder / MANIFEST).write_text(json.dumps(manifest))
    assert found_step(tmp_path) == 2


def test_all_damaged_is_none(tmp_path: Path) -> None:
    for step in (2, 4):
        (save(tmp_path, step) / "weights.bin").write_bytes(b"damaged")
    assert found_step(tmp_path) is None
