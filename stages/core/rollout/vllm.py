"""Rollouts by vLLM, in one or several server processes beside the trainer: the policy is handed over by version.

A LoRA policy goes as adapter files under a new name, so the name that answers is the version. A whole model is written
and loaded in place, by servers that are ours alone; before and after each batch they are asked which version they hold.
"""

import contextlib
import secrets
import shutil
import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from stages.core.rollout.client import Client, Request, ServerError, spread
from stages.core.rollout.protocol import Completion, EngineError, Sampling
from stages.core.rollout.vllm_servers import Server, VllmOptions, check_server, open_servers, stop_servers

if TYPE_CHECKING:
    from stages.core.rollout.policy_files import PolicyFiles

__all__ = ["VllmEngine", "VllmOptions"]

CLOSE_SECONDS = 5.0  # for a server that is not ours to forget our adapter
PROBE = Request((1,), 0)
ONE_TOKEN = Sampling(1, 1.0, ())


@dataclass(frozen=True)
class Batch:
    """Requests to one version of the policy, and what has been answered."""

    requests: Sequence[Request]
    sampling: Sampling
    version: int
    model: str  # the version's name on the servers
    done: dict[int, Completion] = field(default_factory=dict)

    def missing(self) -> list[int]:
        """Places of the requests that nobody has answered."""
        return [place for place in range(len(self.requests)) if place not in self.done]


@dataclass
class VllmEngine:
    """Samples from vLLM servers; made by `start`."""

    policy: "PolicyFiles"
    options: VllmOptions
    folder: Path  # logs and handed-over weights
    servers: list[Server]  # those that are left
    lost: dict[str, str] = field(default_factory=dict)  # server -> why it was given up
    version: int | None = None
    nonce: str = field(default_factory=lambda: secrets.token_hex(4))  # our names are nobody else's, in no other run
    lock: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def start(cls, policy: "PolicyFiles", options: VllmOptions, folder: Path) -> "VllmEngine":
        """An engine whose servers answer, and serve this policy.

        Raises UserError where vLLM is not installed, does not start, or cannot serve the policy.
        """
        folder = folder.resolve()
        folder.mkdir(parents=True, exist_ok=True)
        engine = cls(policy, options, folder, open_servers(policy, options, folder))
        try:
            engine._sweep()
            for server in engine.servers:
                if server.own is not None:
                    server.own.wait(options.start_timeout_s)
            for server in engine.servers:
                check_server(server, options, engine._try_policy)
        except BaseException:
            engine.close()
            raise
        return engine

    def __enter__(self) -> "VllmEngine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def sync(self, version: int) -> None:
        """Hands over the policy as it is now; completions from here on carry `version`.

        Servers that fail are given up; raises EngineError when none is left.
        """
        with self.lock, self._awake():
            before, self.version = self.version, None
            with self._written(f"v{version}", keep=True) as folder:
                self._on_each(lambda server: self._load(server, version, before, folder))
            if before is not None and before != version:
                shutil.rmtree(self.folder / f"v{before}", ignore_errors=True)
            self.version = version

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, seeds: Sequence[Sequence[int]]
    ) -> list[list[Completion]]:
        """For each prompt one completion a seed; what a lost server owed is asked of the others.

        Raises EngineError, naming the servers, when none is left.
        """
        requests = [Request(tuple(prompt), seed) for prompt, own in zip(prompts, seeds, strict=True) for seed in own]
        with self.lock, self._awake():
            if self.version is None:
                raise EngineError("rollout engine vllm: no policy has been handed over")
            batch = Batch(requests, sampling, self.version, self._name(self.version))
            while missing := batch.missing():
                shares = spread(missing, len(self.servers))
                share_of = {server.name: share for server, share in zip(self.servers, shares, strict=True) if share}
                self._on_each(lambda server, own=share_of: self._serve(server, batch, own.get(server.name, [])))
        flat = iter([batch.done[place] for place in range(len(requests))])
        return [[next(flat) for _ in own] for own in seeds]

    def close(self) -> None:
        """Stops the servers that are ours, and takes our adapter off the others; may be called again.

        Calls that another thread has under way end in an error.
        """
        stop_servers(self.servers)
        for server in list(self.servers):  # a failing call in another thread takes its server off
            server.client.hang_up()
            if server.own is None and self.version is not None:
                last = Client(server.client.address, token=server.client.token, timeout_s=CLOSE_SECONDS)
                with contextlib.suppress(ServerError):
                    last.unload_adapter(self._name(self.version))
        self.servers, self.version = [], None
        self._sweep()

    def _serve(self, server: Server, batch: Batch, places: Sequence[int]) -> None:
        """Has one server answer the requests at `places`.

        Raises ServerError at its first failure; adapters' answers before that stay, each has its version in it.
        """
        if not places:
            return
        by_name = self.policy.form == "adapter"
        model = batch.model if by_name else server.model
        failed = threading.Event()
        answers: dict[int, Completion] = {}

        def ask(place: int) -> None:
            if failed.is_set():
                return
            try:
                answers[place] = server.client.complete(model, batch.requests[place], batch.sampling, batch.version)
            except ServerError:
                failed.set()
                raise

        if not by_name:
            server.client.check_weights(batch.model)
        with ThreadPoolExecutor(min(len(places), self.options.batch_size)) as pool:
            calls = [pool.submit(ask, place) for place in places]
        if by_name:
            batch.done.update(answers)
        for call in calls:
            call.result()
        if not by_name:
            server.client.check_weights(batch.model)
            batch.done.update(answers)

    def _load(self, server: Server, version: int, before: int | None, folder: Path) -> None:
        """Makes one server answer by the policy in `folder`."""
        if self.policy.form == "full":
            server.client.load_weights(self._name(version), folder)
            return
        if before == version:
            server.client.unload_adapter(self._name(version))
        server.client.load_adapter(self._name(version), folder)
        if before is not None and before != version:
            server.client.unload_adapter(self._name(before))

    def _try_policy(self, server: Server) -> None:
        """Raises ServerError where the server cannot answer, or cannot take the policy's adapter."""
        server.client.complete(server.model, PROBE, ONE_TOKEN, 0)
        if self.policy.form == "adapter":
            name = f"{self._name(0)}-trial"
            with self._written("trial") as folder:
                server.client.load_adapter(name, folder)
                server.client.complete(name, PROBE, ONE_TOKEN, 0)
                server.client.unload_adapter(name)

    def _on_each(self, act: Callable[[Server], None]) -> None:
        """Runs `act` on all servers at once; those where it fails are given up.

        Raises EngineError when none is left.
        """

        def attempt(server: Server) -> str | None:
            try:
                act(server)
            except ServerError as error:
                return str(error)
            return None

        servers = list(self.servers)  # `close` in another thread may take them off meanwhile
        with ThreadPoolExecutor(max(1, len(servers))) as pool:
            problems = list(pool.map(attempt, servers))
        for server, problem in zip(servers, problems, strict=True):
            if problem is not None:
                self._give_up(server, problem)
        if not self.servers:
            told = "; ".join(f"{name}: {problem}" for name, problem in self.lost.items())
            raise EngineError(f"rollout engine vllm: no server is left ({told or 'closed'})")

    def _give_up(self, server: Server, problem: str) -> None:
        if server.own is not None:
            if not server.own.is_running():
                problem = f"{problem}; its process ended"
            problem = f"{problem}; see {server.own.log}"
            server.own.stop()
        self.lost[server.name] = problem
        if server in self.servers:
            self.servers.remove(server)

    @contextlib.contextmanager
    def _awake(self) -> Generator[None]:
        """While it is open, servers that sleep between rollouts have their memory."""
        if not self.options.sleep:
            yield
            return
        self._on_each(lambda server: server.client.wake())
        yield
        self._on_each(lambda server: server.client.doze())

    @contextlib.contextmanager
    def _written(self, name: str, *, keep: bool = False) -> Generator[Path]:
        """A new folder of ours with the policy in it; it goes at the end unless `keep`."""
        folder = self.folder / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        try:
            self.policy.write(folder)
            yield folder
        finally:
            if not keep:
                shutil.rmtree(folder, ignore_errors=True)

    def _sweep(self) -> None:
        """Removes the weights that were handed over, of a killed run too."""
        for left in self.folder.glob("v[0-9]*"):
            shutil.rmtree(left, ignore_errors=True)

    def _name(self, version: int) -> str:
        """What servers call a version of ours."""
        return f"policy-{self.nonce}-v{version}"
