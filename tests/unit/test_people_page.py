"""The page's server: who may ask what, and that nothing a model wrote becomes more than text."""

import http.client
import json
import socket
import stat
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from threading import Event, Thread

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.errors import UserError
from stages.core.judge.ledger import Ledger
from stages.label.people.config import PeopleConfig
from stages.label.people.desk import Desk, ShownPair
from stages.label.people.links import is_loopback, links_of, tokens_of
from stages.label.people.overview import overview
from stages.label.people.render import as_html, as_turns
from stages.label.people.serve import serve_people

ALLOWED = {
    *("p", "br", "hr", "em", "strong", "s", "code", "pre", "blockquote", "ul", "ol", "li"),
    *("h1", "h2", "h3", "h4", "h5", "h6", "table", "thead", "tbody", "tr", "th", "td"),
}
PIECES = st.sampled_from(
    [
        *("<script>", "</script>", "<img src=x onerror=y>", "[a](javascript:b)", "![a](http://b)", "<http://a.b>"),
        *("```", "`", "\n", "\n\n", "    ", "| a |", "|---|", "&lt;", "&#60;script&#62;", "*", "_", "> ", "- ", "1. "),
        *("[r]: http://a", "[r]", "<!--", "-->", "<![CDATA[", "<?", "\\<", '"', "'", "#", "~~", "a", "\x00", "\u202e"),
    ]
)


class Tags(HTMLParser):
    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[tuple[str, list[tuple[str, str | None]]]] = []
        self.others: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, attrs))

    def handle_comment(self, data):
        self.others.append(data)

    handle_decl = handle_pi = unknown_decl = handle_comment


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.lists(PIECES, max_size=30).map("".join), st.text()))
def test_rendered_text_has_only_the_tags_of_markdown(text):
    parsed = Tags(as_html(text))
    assert {tag for tag, _ in parsed.found} <= ALLOWED
    assert {(tag, name) for tag, attributes in parsed.found for name, _ in attributes} <= {
        ("code", "class"),
        ("ol", "start"),
    }
    assert parsed.others == []


def test_markdown_is_rendered_and_links_are_shown_whole():
    assert as_html("**a**\nb") == "<p><strong>a</strong><br />\nb</p>\n"
    assert as_html("[a](http://b)") == "<p>[a](http://b)</p>\n"
    assert as_html("<b>a</b>") == "<p>&lt;b&gt;a&lt;/b&gt;</p>\n"
    assert "<td>1</td>" in as_html("| a |\n|:-:|\n| 1 |\n")
    assert as_turns([{"role": "user", "content": "hi"}]) == [{"role": "user", "html": "<p>hi</p>\n"}]
    assert as_turns("") == [{"role": "", "html": ""}]


def desk_of(folder: Path, **fields: object) -> tuple[Desk, PeopleConfig]:
    config = PeopleConfig.model_validate({"annotators": ["ada", "bob"], "repeat_share": 0, "port": 0, **fields})
    pairs = [ShownPair(f"pair {place}", f"prompt {place}", ("first", "second")) for place in range(5)]
    return Desk(pairs, Ledger(folder / "ledger.sqlite"), config, seed=0), config


class Served:
    """The page in a thread of this process."""

    def __init__(self, folder: Path) -> None:
        self.desk, config = desk_of(folder)
        self.stop, started = Event(), Event()
        self.said: list[str] = []
        self.finished: list[int] = []
        self.ended: list[bool] = []

        def say(message: str) -> None:
            self.said.append(message)
            if "Ctrl-C" in message:
                started.set()

        def serve() -> None:
            self.ended.append(
                serve_people(
                    self.desk,
                    config,
                    links_file=folder / "links.json",
                    should_stop=self.stop.is_set,
                    say=say,
                    progress=self.finished.append,
                )
            )

        self.thread = Thread(target=serve)
        self.thread.start()
        assert started.wait(20)
        self.tokens = {line.split(": ")[0]: line.rpartition("#")[2] for line in self.said[:2]}
        self.port = int(self.said[0].rpartition(":")[2].partition("/")[0])

    def ask(self, method: str, path: str, body: object = None, *, name: str = "ada", **headers: str):
        """(status, headers, JSON or text) of a request by an annotator."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        headers = {"authorization": f"Bearer {self.tokens.get(name, name)}"} | headers
        connection.request(method, path, None if body is None else json.dumps(body), headers)
        response = connection.getresponse()
        text = response.read().decode()
        connection.close()
        is_json = response.getheader("content-type", "").startswith("application/json")
        return response.status, dict(response.getheaders()), json.loads(text) if is_json else text


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    started = Served(tmp_path)
    yield started
    started.stop.set()
    started.thread.join()


def test_without_a_token_there_is_nothing_but_the_empty_page(served):
    for method, path in (("GET", "/api/task"), ("POST", "/api/answer"), ("POST", "/api/undo"), ("POST", "/api/end")):
        status, _, body = served.ask(method, path, {} if method == "POST" else None, name="guess")
        assert (status, body) == (401, {"error": "no such link"})
    assert served.ask("GET", "/api/task", authorization=f"Basic {served.tokens['ada']}")[0] == 401
    status, headers, page = served.ask("GET", "/", name="")
    assert status == 200
    assert "prompt 0" not in page
    assert "default-src 'none'; script-src 'self'" in headers["content-security-policy"]
    assert "unsafe" not in headers["content-security-policy"]
    assert (headers["x-content-type-options"], headers["referrer-policy"]) == ("nosniff", "no-referrer")
    for path in ("/../app.py", "/%2e%2e/app.py", "/..%2fapp.py", "/page.js/../../app.py", "//etc/passwd"):
        assert served.ask("GET", path)[0] == 404


def test_whoever_starts_it_is_told_who_ends_it(served):
    assert served.said[-1].startswith("ada ends the labelling, in the overview (key o); Ctrl-C")


def test_requests_that_the_page_does_not_make_are_refused(served):
    key = served.ask("GET", "/api/task")[2]["task"]["key"]
    for body in ({}, {"key": key, "choice": "C"}, {"key": key, "choice": "A", "more": 1}, [1], "x", {"key": 1}):
        assert served.ask("POST", "/api/answer", body)[0] == 400
    assert served.ask("POST", "/api/answer", {"key": "x" * 5000, "choice": "A"})[0] == 413
    assert served.ask("GET", "/api/answer")[0] == 404
    assert served.ask("POST", "/api/answer", {"key": key, "choice": "A"}, name="bob")[0] == 409
    assert served.ask("GET", "/api/overview", name="bob")[0] == 403
    assert served.ask("POST", "/api/end", {}, name="bob")[0] == 403
    assert served.desk.answers() == {"ada": [], "bob": []}
    status, _, body = served.ask("POST", "/api/end", {})
    assert (status, body["error"]) == (409, "Nothing is labelled yet; label a pair first.")


def test_a_session_from_the_first_answer_to_the_end(served):
    view = served.ask("GET", "/api/task")[2]
    assert (view["annotator"], view["lead"], view["can_undo"]) == ("ada", True, False)
    assert {view["task"]["left"][0]["html"], view["task"]["right"][0]["html"]} == {"<p>first</p>\n", "<p>second</p>\n"}
    after = served.ask("POST", "/api/answer", {"key": view["task"]["key"], "choice": "tie"})[2]
    assert after["task"]["key"] != view["task"]["key"]
    assert after["progress"]["finished_pairs"] == 1
    undone = served.ask("POST", "/api/undo", {"key": after["task"]["key"]})[2]
    assert undone["task"]["key"] == view["task"]["key"]
    again = served.ask("POST", "/api/undo", {"key": after["task"]["key"]})[2]  # sent twice
    assert again["task"]["key"] == view["task"]["key"]
    served.ask("POST", "/api/answer", {"key": view["task"]["key"], "choice": "A"})
    assert served.ask("GET", "/api/overview")[2]["finished_pairs"] == 1
    assert served.ask("POST", "/api/end", {})[0] == 200
    served.thread.join(20)
    assert served.ended == [True]
    assert served.finished == [1, 0, 1]


def test_stopped_it_has_not_ended(served):
    served.stop.set()
    served.thread.join(20)
    assert served.ended == [False]


def test_a_port_that_is_taken_is_named(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        desk, config = desk_of(tmp_path, port=taken.getsockname()[1])
        with pytest.raises(
            UserError, match=r"label\.people\.host=127\.0\.0\.1, port=\d+: cannot be listened on .*in use"
        ):
            serve_people(
                desk, config, links_file=tmp_path / "l", should_stop=lambda: True, say=print, progress=lambda _: None
            )


def test_links_stay_the_same_and_only_their_owner_can_read_them(tmp_path):
    path = tmp_path / "kept" / "links.json"
    first = tokens_of(["ada", "bob"], path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert all(len(token) == 32 for token in first.values())
    assert first["ada"] != first["bob"]
    later = tokens_of(["cyd", "ada"], path)
    assert list(later) == ["cyd", "ada"]
    assert later["ada"] == first["ada"]
    assert tokens_of(["bob"], path) == {"bob": first["bob"]}
    assert links_of({"ada": "t"}, "::1", 80) == {"ada": "http://[::1]:80/#t"}


@pytest.mark.parametrize(
    ("host", "local"),
    [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("10.1.2.3", False), ("host", False)],
)
def test_which_addresses_reach_this_machine_alone(host, local):
    assert is_loopback(host) == local


def test_the_overview_counts_agreement_by_hand(tmp_path):
    """Both answer all five pairs, bob one of them the other way; both repeats of ada's are turned around."""
    desk, _ = desk_of(tmp_path, overlap=2, repeat_share=0.4)
    for name, odd in (("ada", ()), ("bob", ("pair 2",))):
        while (task := desk.next_task(name)) is not None:
            first = (task.showing == 1) == (task.pair.id not in odd)
            desk.answer(name, task.key, "A" if first != task.swapped else "B")
    found = overview(desk)
    ada, bob = found["annotators"]
    assert (ada["answered"], ada["skipped"], ada["repeats"], ada["same"]) == (7, 0, 2, 0.0)
    assert bob["repeats"] == 2
    (between,) = found["between"]
    assert (between["names"], between["count"], between["share"]) == (["ada", "bob"], 5, 0.8)
    assert between["kappa"] == 0  # ada always prefers the first answer, so chance explains as much
    assert (found["pairs"], found["finished_pairs"]) == (5, 5)
