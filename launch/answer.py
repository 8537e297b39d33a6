"""How a command answers: text for people or one JSON object, and the exit status."""

import atexit
import contextlib
import json
import os
import sys
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, NoReturn, TextIO

from data.errors import SharedUserError, UserError
from launch.cluster import RankError
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
        answer = _outcome(action)
        if machine is None:
            answer.show()
        elif _rank() == "0":
            machine.write(json.dumps(answer.data, ensure_ascii=False, default=str) + "\n")
    return answer.status


def _outcome(action: Callable[[], Answer]) -> Answer:
    """The answer of `action`, or what its failure comes to, told on stderr; what all ranks say the first one tells."""
    try:
        return action()
    except UserError as error:
        rank = _rank()
        for problem in error.problems if rank == "0" or not isinstance(error, SharedUserError) else ():
            print(f"error: {problem}" if rank == "0" else f"error on rank {rank}: {problem}", file=sys.stderr)
        return Answer({"status": "error", "problems": list(error.problems)}, _nothing, MENDABLE)
    except EngineError as error:
        print(f"error: {error}", file=sys.stderr)
        return Answer({"status": "error", "problems": [str(error)]}, _nothing, FAILED)
    except RankError as error:
        print(f"error: {error}", *(f"  | {line}" for line in error.lines), sep="\n", file=sys.stderr)
        return Answer({"status": "error", "problems": [str(error)], "log": error.lines}, _nothing, FAILED)
    except Interrupted as error:
        reason = str(error) or "stopped between stages"
        if _rank() == "0":
            print(f"{reason}; the same command resumes", file=sys.stderr)
        return Answer({"status": "stopped", "reason": reason}, _nothing, STOPPED)


def is_rank() -> bool:
    """Whether torchrun, srun or their kin started this process as one of several."""
    return "RANK" in os.environ


def end_rank(status: int) -> NoReturn:
    """Ends a rank's process once all it said is out, without Python's shutdown.

    A thread of gloo or NCCL may still be letting go of the last message's tensors, for which it asks the interpreter.
    One that is shutting down ends that thread instead, and C++ then aborts a process that has done its work.
    """
    atexit._run_exitfuncs()  # pyright: ignore[reportPrivateUsage]  there is no public way
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _rank() -> str:
    """This process's place among those that torchrun, srun or their kin started; 0 by itself."""
    return os.environ.get("RANK", "0")


def _nothing() -> None:
    """What is left to show after an error."""


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
