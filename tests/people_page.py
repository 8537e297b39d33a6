"""The annotators' page as a process of its own: pairs, a ledger and links below one folder.

`python -m tests.people_page FOLDER CONFIG_JSON`, with FOLDER/pairs.json holding [prompt, first, second] by pair.
"""

import json
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from stages.core.judge.ledger import Ledger
from stages.label.people.config import PeopleConfig
from stages.label.people.desk import Desk, ShownPair
from stages.label.people.serve import serve_people


def main(folder: Path, fields: str) -> None:
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    rows = json.loads((folder / "pairs.json").read_text(encoding="utf-8"))
    pairs = [ShownPair(f"pair {place}", row[0], (row[1], row[2])) for place, row in enumerate(rows)]
    config = PeopleConfig.model_validate_json(fields)
    with Ledger(folder / "ledger.sqlite") as ledger:
        ended = serve_people(
            Desk(pairs, ledger, config, seed=0),
            config,
            links_file=folder / "links.json",
            should_stop=stop.is_set,
            say=lambda message: print(message, flush=True),
            progress=lambda finished: print(f"finished {finished}", flush=True),
        )
    print("ended" if ended else "stopped", flush=True)


class Page:
    """The page's process on one port; it can be killed and started again."""

    def __init__(self, folder: Path, rows: Sequence[Sequence[object]], **fields: object) -> None:
        self.folder = folder
        (folder / "pairs.json").write_text(json.dumps(rows), encoding="utf-8")
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.fields = {"repeat_share": 0, **fields, "port": self.port}
        self.links: dict[str, str] = {}
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "tests.people_page", str(self.folder), json.dumps(self.fields)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        for line in iter(self.process.stdout.readline, ""):
            if "Ctrl-C" in line:
                return
            name, link = line.split(": ", 1)
            self.links[name] = link.strip()
        raise AssertionError(f"the page ended with {self.process.wait()}")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def verdicts(self) -> list[tuple[str, str, str]]:
        """(annotator, pair, verdict) of everything that stands."""
        with Ledger(self.folder / "ledger.sqlite") as ledger:
            asked = {verdict.key: ledger.question(verdict.key) or {} for verdict in ledger.verdicts()}
            given = ledger.verdicts("annotator:")
        return [(each.source.removeprefix("annotator:"), asked[each.key]["pair"], each.value) for each in given]


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
