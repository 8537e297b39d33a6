"""Opens the judges of a config: who each one is, and something to ask."""

import contextlib
import json
from collections.abc import AsyncGenerator, Callable
from pathlib import Path

from data.artifacts import MANIFEST, sha256_file
from stages.core.judge.asking import Asker, open_asker
from stages.core.judge.config import JudgeConfig
from stages.core.judge.ledger import Ledger
from stages.core.judge.toy_server import ToyServer, read_world


def identity(judge: JudgeConfig, *, run_folder: Path, local: str | None = None) -> str:
    """What stands for the judge in a question's key: whatever makes it another judge gives it another name.

    `local` is the folder or hub id of a judge in this process.
    """
    if judge.toy is not None:
        world = run_folder / "toy" / MANIFEST
        made = sha256_file(world)[:16] if world.is_file() else ""
        return f"toy {json.dumps(judge.toy.model_dump(), sort_keys=True)} {made}"
    if local is not None:
        manifest = Path(local) / MANIFEST
        return f"{local} {sha256_file(manifest)[:16]}" if manifest.is_file() else local
    return judge.name


@contextlib.asynccontextmanager
async def open_judge(
    judge: JudgeConfig, ledger: Ledger, *, run_folder: Path, say: Callable[[str], None] | None = None
) -> AsyncGenerator[Asker]:
    """An asker of a judge behind HTTP: an endpoint, or the toy world's own, which is served while this is open."""
    with contextlib.ExitStack() as stack:
        base_url = token = None
        if judge.toy is not None:
            server = stack.enter_context(ToyServer(judge.toy, read_world(run_folder / "toy")))
            base_url, token = server.base_url, server.token
        async with open_asker(judge, judge.source, ledger, base_url=base_url, token=token, say=say) as asker:
            yield asker
