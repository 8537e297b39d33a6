"""Runs the page until the lead annotator ends the labelling, or the run is told to stop."""

import queue
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import uvicorn

from data.errors import UserError
from stages.label.people.app import Change, build_app
from stages.label.people.config import PeopleConfig
from stages.label.people.desk import Desk
from stages.label.people.links import is_loopback, links_of, tokens_of

_LOOKS_PER_SECOND = 10


def serve_people(
    desk: Desk,
    config: PeopleConfig,
    *,
    links_file: Path,
    should_stop: Callable[[], bool],
    say: Callable[[str], None],
    progress: Callable[[int], None],
) -> bool:
    """Serves the page and prints the links; True where the labelling was ended, False where it was only stopped.

    `progress` is told the number of finished pairs after each change, in the caller's thread. Raises UserError where
    the address cannot be listened on.
    """
    tokens = tokens_of(config.annotators, links_file)
    events: queue.SimpleQueue[tuple[Change, int]] = queue.SimpleQueue()
    app = build_app(desk, tokens, changed=lambda what: events.put((what, desk.finished_pairs())))
    with _listen(config) as listening:
        _say_links(config, links_of(tokens, config.host, listening.getsockname()[1]), say)
        options = uvicorn.Config(
            app, log_level="warning", access_log=False, server_header=False, lifespan="off", timeout_graceful_shutdown=2
        )
        server = uvicorn.Server(options)
        # In a thread of its own: the signals stay with the run, which knows what to do about them.
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, name="label page")
        thread.start()
        try:
            return _until_the_end(events, thread, should_stop, progress)
        finally:
            server.should_exit = True
            thread.join()


def _until_the_end(
    events: "queue.SimpleQueue[tuple[Change, int]]",
    thread: threading.Thread,
    should_stop: Callable[[], bool],
    progress: Callable[[int], None],
) -> bool:
    while not should_stop():
        try:
            what, finished = events.get(timeout=1 / _LOOKS_PER_SECOND)
        except queue.Empty:
            if not thread.is_alive():
                raise RuntimeError("the page's server has ended by itself") from None
            continue
        if what == "end":
            return True
        progress(finished)
    return False


def _listen(config: PeopleConfig) -> socket.socket:
    try:
        family = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((config.host, config.port), family=family)
    except OSError as error:
        raise UserError(
            f"label.people.host={config.host}, port={config.port}: cannot be listened on ({error.strerror or error}); "
            "use another, or port 0 for any free one"
        ) from error


def _say_links(config: PeopleConfig, links: dict[str, str], say: Callable[[str], None]) -> None:
    for name, link in links.items():
        say(f"{name}: {link}")
    if not is_loopback(config.host):
        say("the page is plain HTTP: on a network that others can read, put it behind TLS or an SSH tunnel")
    lead = next(iter(links))
    say(f"{lead} ends the labelling, in the overview (key o); Ctrl-C stops it, and the same command goes on")
