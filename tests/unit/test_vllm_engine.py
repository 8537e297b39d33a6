"""What the engine makes of servers that misbehave, at every request in turn; servers that behave are in tests/e2e."""

import contextlib
import time
from collections import Counter
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from data.errors import UserError
from stages.core.rollout.policy_files import PolicyFiles
from stages.core.rollout.protocol import Completion, EngineError, Sampling
from stages.core.rollout.vllm import VllmEngine, VllmOptions
from tests.stub_server import completion, serving

END = 1
SAMPLING = Sampling(2, 1.0, (END,))
PROMPTS = [[5, place] for place in range(8)]
SEEDS = [[place] for place in range(8)]
POINTS, SLOW_POINTS = 50, 8
TIMEOUT = 1.0
FAULTS = ("dies", "hangs", "is short", "is stale", "forgot the adapter")


@dataclass
class Stub:
    """A server that does as vLLM does, but for one fault from its `at`-th completion of the batch on."""

    fault: str = "none"
    at: int = 0
    adapters: set[str] = field(default_factory=set)
    asked: Counter[str] = field(default_factory=Counter)
    fails_to_load: bool = False

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        """Status and JSON value."""
        self.asked[path] += 1
        if path == "/version":
            return 200, {"version": "0.32.0"}
        if path == "/v1/models":
            return 200, {"data": [{"id": "theirs", "parent": None, "max_model_len": 16}]}
        if path == "/v1/load_lora_adapter":
            if self.fails_to_load:
                return 500, {"error": {"message": "no room"}}
            assert (Path(body["lora_path"]) / "adapter").exists()
            self.adapters.add(body["lora_name"])
            return 200, "Success"
        if path == "/v1/unload_lora_adapter":
            self.adapters.remove(body["lora_name"])
            return 200, "Success"
        assert path == "/v1/completions", path
        return self._complete(body)

    def _complete(self, body: dict[str, Any]) -> tuple[int, Any]:
        if body["logprobs"] == 1:  # the question whether log-probabilities know the temperature
            tops = [{"token_id:1": -1.0 / body["temperature"]}]
            return 200, {"model": body["model"], "choices": [{"logprobs": {"top_logprobs": tops}}]}
        if body["max_tokens"] == 1:
            return 200, completion(body, [7])
        if body["model"] not in self.adapters:
            return 404, {"error": {"message": f"The model `{body['model']}` does not exist."}}
        self.asked["batch"] += 1
        if self.asked["batch"] <= self.at or self.fault == "none":
            return 200, completion(body, [10 + body["seed"], END])
        if self.fault == "dies":
            raise ConnectionError  # the connection closes without an answer
        if self.fault == "hangs":
            time.sleep(2 * TIMEOUT)
        if self.fault == "is short":
            return 200, completion(body, [10 + body["seed"]])
        if self.fault == "is stale":
            return 200, completion(body, [10 + body["seed"], END], model=body["model"].replace("-v2", "-v1"))
        if self.fault == "forgot the adapter":
            self.adapters.clear()
            return 404, {"error": {"message": f"The model `{body['model']}` does not exist."}}
        return 200, completion(body, [10 + body["seed"], END])


def write(folder: Path) -> None:
    (folder / "adapter").touch()


@contextlib.contextmanager
def engine_on(folder: Path, *stubs: Stub, timeout_s: float = TIMEOUT) -> Generator[VllmEngine]:
    """An engine on these servers; each is `first`, `second`, … in errors by its address."""
    with contextlib.ExitStack() as open_servers:
        urls = tuple(open_servers.enter_context(serving(stub.answer)) for stub in stubs)
        options = VllmOptions(max_length=16, urls=urls, timeout_s=timeout_s, batch_size=2)
        policy = PolicyFiles("base", "adapter", "float32", write, rank=4)
        with VllmEngine.start(policy, options, folder) as engine:
            yield engine


def answers(engine: VllmEngine) -> list[Completion]:
    return [each for group in engine.generate(PROMPTS, SAMPLING, SEEDS) for each in group]


EXPECTED = [Completion((10 + place, END), (-0.5, -0.5), True, None, 2) for place in range(8)]


@pytest.mark.parametrize("fault", FAULTS)
def test_at_every_point_what_a_bad_server_owed_is_answered_by_the_good_one(tmp_path: Path, fault: str):
    bad, good = Stub(), Stub()
    with engine_on(tmp_path, bad, good) as engine:
        everyone = list(engine.servers)
        for point in range(SLOW_POINTS if fault == "hangs" else POINTS):
            engine.servers, engine.lost = list(everyone), {}
            bad.adapters, good.adapters, engine.version = set(), set(), None
            bad.asked.clear()
            bad.fault, bad.at = fault, point % 4  # each has four of the eight requests
            engine.sync(2)
            assert answers(engine) == EXPECTED
            assert list(engine.lost) == [everyone[0].name]
            assert [server.name for server in engine.servers] == [everyone[1].name]


@pytest.mark.parametrize("fault", FAULTS)
def test_without_another_server_it_is_an_error_that_names_it_in_time(tmp_path: Path, fault: str):
    reasons = {
        "dies": "/v1/completions: ",
        "hangs": r"/v1/completions: no answer within 1 s",
        "is short": "a short answer: 1 of 2 tokens, and no end token",
        "is stale": r"asked for policy-\w+-v2, and 'policy-\w+-v1' answered",
        "forgot the adapter": r"/v1/completions: status 404, The model `policy-\w+-v2` does not exist",
    }
    stub = Stub(fault, at=5)
    with engine_on(tmp_path, stub) as engine:
        engine.sync(2)
        (name,) = [server.name for server in engine.servers]
        began = time.monotonic()
        with pytest.raises(EngineError, match=f"no server is left .{name}: {reasons[fault]}") as caught:
            answers(engine)
        assert time.monotonic() - began < TIMEOUT + 2
        assert "\n" not in str(caught.value)


def test_a_server_that_fails_to_take_the_policy_is_given_up(tmp_path: Path):
    bad, good = Stub(), Stub()
    with engine_on(tmp_path, bad, good) as engine:
        engine.sync(1)
        bad.fails_to_load = True
        engine.sync(2)
        assert [problem for problem in engine.lost.values()] == ["/v1/load_lora_adapter: status 500, no room"]
        assert answers(engine) == EXPECTED
        good.fails_to_load = True
        with pytest.raises(EngineError, match=r"no room.*no room"):
            engine.sync(3)
        with pytest.raises(EngineError, match="no policy has been handed over"):
            answers(engine)


def test_requests_are_spread_over_the_servers(tmp_path: Path):
    stubs = [Stub(), Stub(), Stub()]
    with engine_on(tmp_path, *stubs) as engine:
        engine.sync(2)
        assert answers(engine) == EXPECTED
    assert sorted(stub.asked["batch"] for stub in stubs) == [2, 3, 3]


def test_at_the_end_no_adapter_and_no_file_of_ours_is_left(tmp_path: Path):
    stub = Stub()
    (tmp_path / "v9").mkdir()  # of a run that was killed
    with engine_on(tmp_path, stub) as engine:
        for version in (1, 2, 2):
            engine.sync(version)
            assert [path.name for path in tmp_path.iterdir()] == [f"v{version}"]
            assert len(stub.adapters) == 1
    assert stub.adapters == set()
    assert list(tmp_path.iterdir()) == []


def test_closing_ends_the_calls_that_another_thread_has_under_way(tmp_path: Path):
    stub = Stub(fault="hangs")
    with ThreadPoolExecutor(1) as thread:
        with engine_on(tmp_path, stub, timeout_s=60) as engine:
            engine.sync(2)
            drawn = thread.submit(answers, engine)
            while stub.asked["batch"] < 2:
                time.sleep(0.01)
            engine.close()
            with pytest.raises(EngineError, match="no server is left"):  # else the answers would come in the end
                drawn.result()
        assert stub.adapters == set()


def test_a_policy_that_a_server_refuses_is_a_users_matter(tmp_path: Path):
    with (
        pytest.raises(UserError, match=r"http://.*: /v1/load_lora_adapter: status 500, no room; start it with VLLM"),
        engine_on(tmp_path, Stub(fails_to_load=True)),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_server_whose_logprobs_leave_the_temperature_out_is_refused(tmp_path: Path):
    stub = Stub()

    def answer(path: str, body: dict[str, Any]) -> tuple[int, Any]:
        return stub.answer(path, body | {"temperature": 1.0} if body else body)

    policy = PolicyFiles("base", "adapter", "float32", write, rank=4)
    with serving(answer) as url, pytest.raises(UserError, match="log-probabilities leave the temperature out"):
        VllmEngine.start(policy, VllmOptions(max_length=16, urls=(url,), timeout_s=5), tmp_path)


def test_another_series_of_vllm_is_refused(tmp_path: Path):
    policy = PolicyFiles("base", "adapter", "float32", write, rank=4)
    with (
        serving(lambda *_: (200, {"version": "0.31.0"})) as url,
        pytest.raises(UserError, match=r"has vllm 0\.31\.0; 0\.32\.\* is needed"),
    ):
        VllmEngine.start(policy, VllmOptions(max_length=16, urls=(url,), timeout_s=5), tmp_path)
