"""The toy world's judge behind a real HTTP endpoint: an LLM's stand-in that knows the true quality and errs as told.

It listens on this machine alone, while it is open, and answers only those who have its token.
"""

import hashlib
import json
import math
import re
import secrets
import threading
from collections.abc import Iterable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self

from data.errors import UserError
from data.rows import Message, Text
from data.toy import quality
from stages.core.judge.config import ToyJudge
from stages.core.judge.prompts import LEAST, MOST

_DATA = re.compile(r"^BEGIN (\w+)\n(.*)\nEND \1$", re.M)
_ROWS = ("prompts.jsonl", "eval_prompts.jsonl")


def toy_verdict(judge: ToyJudge, row: Mapping[str, Any], first: str, second: str) -> str:
    """A, B or tie: by Bradley-Terry on true quality, some turned around, some for the first whatever it is.

    Which ones is drawn from the responses alone, so the same question has the same answer; noise falls alike on both
    orders of a pair.
    """
    ordered = sorted([first, second])
    preferred, turned = _draw("preference", *ordered), _draw("noise", *ordered)
    if _draw("position", first, second) < judge.position_bias:
        return "A"
    low, high = (quality(response, row) for response in ordered)
    if low == high:
        return "tie"
    lower_wins = preferred < 1 / (1 + math.exp(min(500.0, judge.sharpness * (high - low))))
    winner = ordered[0] if lower_wins != (turned < judge.noise) else ordered[1]
    return "A" if winner == first else "B"


def toy_points(judge: ToyJudge, row: Mapping[str, Any], response: str) -> int:
    """1 to 10, from true quality 0 to 1; `noise` of them turned around."""
    points = LEAST + round((MOST - LEAST) * quality(response, row))
    return LEAST + MOST - points if _draw("noise", response) < judge.noise else points


def _draw(*parts: str) -> float:
    """A number in [0, 1) that depends on the parts alone."""
    digest = hashlib.sha256(json.dumps(parts).encode()).digest()
    return int.from_bytes(digest[:7], "big") / 2**56


def read_world(folder: Path) -> list[dict[str, Any]]:
    """The rows of the toy stage that hold the answers. Raises UserError where it has not written them."""
    paths = [folder / name for name in _ROWS]
    if missing := [path for path in paths if not path.is_file()]:
        raise UserError(
            f"judge.toy: no {missing[0]}; it judges the toy world only, so add `toy:` and base_model stage:toy"
        )
    return [json.loads(line) for path in paths for line in path.read_text(encoding="utf-8").splitlines()]


class ToyServer:
    """The judge at `base_url` while it is open; a context manager."""

    def __init__(self, judge: ToyJudge, rows: Iterable[Mapping[str, Any]]) -> None:
        self.judge = judge
        self.token = secrets.token_hex(16)
        self.rows = {_words(row["prompt"]): row for row in rows}
        toy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                status, answer = toy.respond(self.path, self.headers.get("Authorization"), body)
                content = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, format: str, *args: Any) -> None:
                """Nothing: the ledger says what was asked."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.base_url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def respond(self, path: str, authorization: str | None, body: bytes) -> tuple[int, dict[str, Any]]:
        """Status and body of the answer to one call."""
        if authorization != f"Bearer {self.token}":
            return 401, _error("no such token")
        if path != "/v1/chat/completions":
            return 404, _error(f"no {path} here")
        sent = "\n".join(str(message["content"]) for message in json.loads(body)["messages"])
        found = _DATA.search(sent)
        data = json.loads(found[2]) if found else {}
        row = self.rows.get(_words(data.get("conversation", "")))
        if row is None:
            return 400, _error("not a question about the toy world")
        if "response" in data:
            answer: dict[str, Any] = {"score": toy_points(self.judge, row, data["response"])}
        else:
            answer = {"verdict": toy_verdict(self.judge, row, data["response_A"], data["response_B"])}
        text = json.dumps({"reasoning": "By the answer key.", **answer} if "reasoning" in sent else answer)
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        usage = {"prompt_tokens": len(sent.split()), "completion_tokens": len(text.split())}
        return 200, {"object": "chat.completion", "model": "toy", "choices": [choice], "usage": usage}


def _error(message: str) -> dict[str, Any]:
    return {"error": {"message": message}}


def _words(prompt: Text | list[Message]) -> str:
    return prompt if isinstance(prompt, str) else "\n".join(turn["content"] for turn in prompt)
