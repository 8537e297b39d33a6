"""What the client of a vLLM server sends, and what it refuses to take for an answer."""

import time
from typing import Any

import pytest

from stages.core.rollout.client import Client, Request, ServerError, spread
from stages.core.rollout.protocol import Completion, Sampling
from tests.stub_server import completion, serving

REQUEST = Request((5, 6), 9)
SAMPLING = Sampling(3, 0.5, (1, 2))


def ask(answer: Any, *, timeout_s: float = 5.0, drip: float = 0.0) -> Completion:
    """What a client makes of a server with this answer to everything."""
    with serving(answer, drip=drip) as address:
        return Client(address, token=None, timeout_s=timeout_s).complete("policy-v4", REQUEST, SAMPLING, 4)


def test_a_request_says_all_that_decides_the_answer():
    bodies: list[dict[str, Any]] = []
    headers: list[dict[str, str]] = []

    def answer(path: str, body: dict[str, Any]) -> tuple[int, Any]:
        bodies.append(body | {"path": path})
        return 200, completion(body, [7, 1])

    with serving(answer, seen=headers) as address:
        found = Client(address, token="secret", timeout_s=5).complete("policy-v4", REQUEST, SAMPLING, 4)
    assert found == Completion((7, 1), (-0.5, -0.5), True, None, 4)
    (body,) = bodies
    assert body["path"] == "/v1/completions"
    assert (body["model"], body["prompt"], body["seed"]) == ("policy-v4", [5, 6], 9)
    assert (body["max_tokens"], body["temperature"], body["stop_token_ids"]) == (3, 0.5, [1, 2])
    assert body["ignore_eos"] is True  # only the end tokens that every engine knows end a response
    whole = ("n", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
    assert [body[name] for name in whole] == [1, 1, 0, 0, 1, 0, 0]
    assert headers[0]["Authorization"] == "Bearer secret"


def test_a_response_that_reached_the_limit_is_not_finished():
    assert ask(lambda _, body: (200, completion(body, [7, 8, 9]))).finished is False


@pytest.mark.parametrize(
    ("tokens", "changes", "reason"),
    [
        ([7, 8], {}, "short answer: 2 of 3 tokens"),
        ([], {}, "short answer: 0 tokens"),
        ([7, 1], {"logprobs": {"token_logprobs": [-1.0]}}, "2 tokens with 1 log-probabilities"),
        ([7, 1], {"logprobs": None}, "without what was asked for"),
        ([7, 1], {"token_ids": None}, "without what was asked for"),
        ([7, 1, 8], {"finish_reason": "stop"}, "end token is not at its end"),
        ([7, 1, 8], {"finish_reason": "length"}, "end token is not at its end"),
        ([7, 8], {"finish_reason": "abort"}, "ended by 'abort'"),
        ([7, 1], {"model": "policy-v3"}, "asked for policy-v4, and 'policy-v3' answered"),
        ([7, 1], {"prompt_token_ids": [5]}, "another prompt"),
        ([7, 1], {"logprobs": {"token_logprobs": [-1.0, None]}}, "log-probabilities that are none"),
        ([7, 1], {"logprobs": {"token_logprobs": [-1.0, 0.5]}}, "log-probabilities that are none"),
    ],
)
def test_what_is_not_exactly_the_answer_is_refused(tokens: list[int], changes: dict[str, Any], reason: str):
    with pytest.raises(ServerError, match=reason):
        ask(lambda _, body: (200, completion(body, tokens, **changes)))


@pytest.mark.parametrize("reply", [{}, {"choices": []}, [1], "text", {"model": "policy-v4", "choices": [{}, {}]}])
def test_a_reply_of_another_kind_is_refused(reply: Any):
    with pytest.raises(ServerError, match=r"without what was asked for|answered"):
        ask(lambda *_: (200, reply))


def test_a_status_other_than_200_gives_the_servers_own_reason():
    error = {"error": {"message": "The model\n`policy-v4` does not exist."}}
    with pytest.raises(ServerError, match=r"/v1/completions: status 404, The model `policy-v4` does not exist\."):
        ask(lambda *_: (404, error))


def test_a_server_that_drips_is_given_up_at_the_time_out():
    began = time.monotonic()
    with pytest.raises(ServerError, match=r"/v1/completions: no answer within 0\.5 s"):
        ask(lambda _, body: (200, completion(body, [7, 1])), timeout_s=0.5, drip=0.1)
    assert time.monotonic() - began < 2


def test_a_server_that_says_nothing_is_given_up_at_the_time_out():
    def answer(*_: Any) -> tuple[int, Any]:
        time.sleep(3)
        return 200, {}

    began = time.monotonic()
    with pytest.raises(ServerError, match=r"no answer within 0\.5 s"):
        ask(answer, timeout_s=0.5)
    assert time.monotonic() - began < 2


@pytest.mark.parametrize("address", ["http://127.0.0.1:9", "/nowhere/socket"])
def test_nobody_there_is_an_error_of_one_line(address: str):
    with pytest.raises(ServerError) as caught:
        Client(address, token=None, timeout_s=1).get("/health")
    assert "\n" not in str(caught.value)


def test_weights_are_those_that_were_loaded_last():
    def answer(path: str, _: dict[str, Any]) -> tuple[int, Any]:
        return 200, {"weight_version": "a-v2"} if path == "/weight_info" else {}

    with serving(answer) as address:
        client = Client(address, token=None, timeout_s=5)
        client.check_weights("a-v2")
        with pytest.raises(ServerError, match="asked for weights a-v1, and it has 'a-v2'"):
            client.check_weights("a-v1")


def test_requests_are_dealt_out_evenly():
    assert spread(range(5), 2) == [[0, 2, 4], [1, 3]]
    assert spread([3], 2) == [[3], []]


def test_after_hanging_up_nothing_is_asked_any_more():
    asked: list[str] = []
    with serving(lambda path, _: (200, asked.append(path) or {})) as address:
        client = Client(address, token=None, timeout_s=5)
        client.get("/first")
        client.hang_up()
        with pytest.raises(ServerError, match="nobody waits"):
            client.get("/second")
    assert asked == ["/first"]
