"""How a command answers: text for people or one JSON object, and the exit status."""

import contextlib
import json
import os
import sys
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, TextIO

from data.errors import UserError
from stages.core.context import Interrupted
from stages.core.rollout.protocol import EngineError

FAILED = 1
MENDABLE = 2
STOPPED = 75


@dataclass(frozen=True)
class Answer:
    """What a command found: `data` for machines, `show` prints the same for people."""

    data: dict[str, Any]
    show: Callable[[], None]
    status: int = 0


def answering(action: Callable[[], Answer], *, as_json: bool) -> int:
    """The exit status of `action`, its answer printed; what the user can mend becomes one line per problem."""
    with _machine_output() if as_json else contextlib.nullcontext() as machine:
        try:
            answer = action()
        except UserError as error:
            answer = Answer({"status": "error", "problems": list(error.problems)}, lambda: None, MENDABLE)
            for problem in error.problems:
                print(f"error: {problem}", file=sys.stderr)
        except EngineError as error:
            answer = Answer({"status": "error", "problems": [str(error)]}, lambda: None, FAILED)
            print(f"error: {error}", file=sys.stderr)
        except Interrupted as error:
            reason = str(error) or "stopped between stages"
            answer = Answer({"status": "stopped", "reason": reason}, lambda: None, STOPPED)
            print(f"{reason}; the same command resumes", file=sys.stderr)
        if machine is None:
            answer.show()
        else:
            machine.write(json.dumps(answer.data, ensure_ascii=False, default=str) + "\n")
    return answer.status


@contextlib.contextmanager
def _machine_output() -> Generator[TextIO]:
    """The real stdout, while whatever libraries print there, from C code too, goes to stderr."""
    sys.stdout.flush()
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as real:
        os.dup2(2, 1)
        try:
            yield real
        finally:
            sys.stdout.flush()
            real.flush()
            os.dup2(real.fileno(), 1)
