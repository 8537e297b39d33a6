"""A scripted OpenAI-compatible judge on this machine: known verdicts, faults by seed, and a record of every call."""

import asyncio
import contextlib
import hashlib
import json
import random
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

Script = Callable[[Mapping[str, Any]], Any]
"""From the data of a question (`conversation`, `response_A`, …) to the verdict, or to the points."""

FAULTS = (
    *("hang", "429", "500", "reset", "cut body", "cut answer", "wrong schema", "refusal", "filter"),
    *("empty", "nan", "drip"),
)
_DATA = re.compile(r"^BEGIN (\w*)\n(.*)\nEND \1$", re.M)


@dataclass(frozen=True)
class Call:
    """One call as the server saw it."""

    question: str  # hex sha256 of the messages
    at: float  # time.monotonic()
    fault: str | None
    tokens: int = 0
    cost_tokens: tuple[int, int] = (0, 0)
    authorization: str | None = None


def data_of(messages: Sequence[Mapping[str, str]]) -> dict[str, Any]:
    """What is to be judged, from the messages."""
    found = _DATA.search("\n".join(message["content"] for message in messages))
    assert found is not None, messages
    return json.loads(found[2])


def question_id(messages: Sequence[Mapping[str, str]]) -> str:
    """Hex sha256 of the messages."""
    return hashlib.sha256(json.dumps(messages).encode()).hexdigest()


def by_quality(data: Mapping[str, Any]) -> str:
    """A, B or tie by the numbers that stand behind `quality` in the responses."""
    first, second = (int(re.findall(r"quality (\d+)", data[f"response_{name}"])[0]) for name in "AB")
    return "tie" if first == second else "A" if first > second else "B"


@dataclass
class JudgeServer:
    """Serves `script` at `base_url` while it is open; a share `fault_rate` of the calls fails, each in its own way."""

    script: Script = by_quality
    chat: Callable[[Mapping[str, Any]], str] | None = None  # answers by the body of a call, in place of a script
    fault_rate: float = 0.0
    faults: Sequence[str] = FAULTS
    seed: int = 0
    hang_seconds: float = 3.0
    retry_after: str = "0.05"
    delay_seconds: float = 0.0
    not_found: str = "no such path"
    calls: list[Call] = field(default_factory=list)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    most_open: int = 0
    _open: int = 0
    _attempts: dict[str, int] = field(default_factory=dict)

    def __enter__(self) -> Self:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._server = asyncio.run_coroutine_threadsafe(
            asyncio.start_server(self._connection, "127.0.0.1", 0), self._loop
        ).result()
        self.base_url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}/v1"
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _stop(self) -> None:
        self._server.close()
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
                headers = dict(_header(line) for line in head.split("\r\n")[1:] if ": " in line)
                body = await reader.readexactly(int(headers.get("content-length", "0")))
                if not head.startswith("POST /v1/chat/completions "):
                    await self._send(writer, 404, json.dumps({"error": {"message": self.not_found}}).encode())
                    continue
                self._open += 1
                self.most_open = max(self.most_open, self._open)
                try:
                    keep = await self._answer(json.loads(body), headers.get("authorization"), writer)
                finally:
                    self._open -= 1
                if not keep:
                    break
        writer.close()

    def _fault(self, question: str) -> str | None:
        """The fault of this attempt at a question: the same in every run."""
        attempt = self._attempts[question] = self._attempts.get(question, 0) + 1
        draw = random.Random(f"{self.seed} {question} {attempt}")
        return draw.choice(self.faults) if draw.random() < self.fault_rate else None

    async def _answer(self, body: dict[str, Any], authorization: str | None, writer: asyncio.StreamWriter) -> bool:
        messages = body["messages"]
        fault = self._fault(question_id(messages))
        prompt_tokens = sum(len(message["content"].split()) for message in messages)
        used = (prompt_tokens, 5)
        self.bodies.append(body)
        self.calls.append(Call(question_id(messages), time.monotonic(), fault, sum(used), used, authorization))
        if self.delay_seconds:
            await asyncio.sleep(self.delay_seconds)
        if fault == "hang":
            await asyncio.sleep(self.hang_seconds)
            return False
        if fault == "reset":
            connection = writer.get_extra_info("socket")
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            return False
        if fault in ("429", "500"):
            extra = f"Retry-After: {self.retry_after}\r\n" if fault == "429" else ""
            return await self._send(writer, int(fault), b'{"error": {"message": "busy"}}', extra)
        data = {"say": self.chat(body)} if self.chat is not None else data_of(messages)
        content = json.dumps(self._completion(data, fault, used)).encode()
        if fault == "cut body":
            content = content[: len(content) // 2]
        if fault == "drip":
            writer.write(_head(200, len(content)))
            for byte in content:
                writer.write(bytes([byte]))
                await writer.drain()
                await asyncio.sleep(self.hang_seconds / 20)
            return False
        return await self._send(writer, 200, content)

    def _completion(self, data: dict[str, Any], fault: str | None, used: tuple[int, int]) -> dict[str, Any]:
        verdict = f"raw:{data['say']}" if "say" in data else self.script(data)
        name = "score" if "response" in data else "verdict"
        text = (
            verdict if isinstance(verdict, str) and verdict.startswith(("{", "raw:")) else json.dumps({name: verdict})
        )
        text = text.removeprefix("raw:")
        text = {
            "cut answer": text[:-4],
            "wrong schema": json.dumps({"winner": verdict}),
            "refusal": "",
            "empty": "",
            "nan": f'{{"{name}": NaN}}',
        }.get(fault or "", text)
        message: dict[str, Any] = {"role": "assistant", "content": text}
        if fault == "refusal":
            message |= {"content": None, "refusal": "I cannot judge that."}
        finish = {"filter": "content_filter", "cut answer": "length"}.get(fault or "", "stop")
        return {
            "choices": [{"index": 0, "message": message, "finish_reason": finish}],
            "usage": {"prompt_tokens": used[0], "completion_tokens": used[1]},
        }

    async def _send(self, writer: asyncio.StreamWriter, status: int, content: bytes, extra: str = "") -> bool:
        writer.write(_head(status, len(content), extra) + content)
        await writer.drain()
        return True


def _header(line: str) -> tuple[str, str]:
    name, _, value = line.partition(": ")
    return name.lower(), value


def _head(status: int, size: int, extra: str = "") -> bytes:
    return f"HTTP/1.1 {status} OK\r\nContent-Type: application/json\r\nContent-Length: {size}\r\n{extra}\r\n".encode()


def most_in_window(calls: Sequence[Call], seconds: float) -> int:
    """The most calls within any `seconds`."""
    times = sorted(call.at for call in calls)
    return max(
        (sum(start <= other < start + seconds for other in times[i:]) for i, start in enumerate(times)), default=0
    )
