"""A server that answers as it is told to, for what a real one does not do on demand: cut, stale and slow answers."""

import json
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = Callable[[str, dict[str, Any]], tuple[int, Any]]


@contextmanager
def serving(answer: Answer, *, seen: list[dict[str, str]] | None = None, drip: float = 0.0) -> Generator[str]:
    """The address of a server that gives `answer(path, body)`, a status and a JSON value, to every request.

    Where that raises ConnectionError, the connection closes without an answer. With `drip`, one byte of it each so many
    seconds. `seen` collects the requests' headers.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if seen is not None:
                seen.append(dict(self.headers))
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            try:
                status, value = answer(self.path, json.loads(body) if body else {})
            except ConnectionError:
                self.close_connection = True  # as of a server that dies
                return
            content = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            for start in range(0, len(content), 1 if drip else len(content)):
                try:
                    self.wfile.write(content[start : start + (1 if drip else len(content))])
                except OSError:
                    return  # the caller has given up
                time.sleep(drip)

        do_POST = do_GET

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def completion(body: dict[str, Any], tokens: list[int], **changes: Any) -> dict[str, Any]:
    """A reply of /v1/completions to `body` as vLLM 0.32 writes it, but for `changes` of its choice or its model."""
    model = changes.pop("model", body["model"])
    ends = tokens[-1:] and tokens[-1] in body["stop_token_ids"]
    choice = {
        "index": 0,
        "text": "",
        "logprobs": {"token_logprobs": [-0.5] * len(tokens)},
        "finish_reason": "stop" if ends else "length",
        "token_ids": tokens,
        "prompt_token_ids": body["prompt"],
    }
    return {"model": model, "choices": [choice | changes]}
