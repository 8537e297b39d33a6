"""What ranks must agree on before they train: the code, the packages, the config and the folder they write to."""

import os
import platform
import socket
from collections.abc import Mapping
from typing import TYPE_CHECKING

import psutil

from data.artifacts import sha256_json

if TYPE_CHECKING:
    from pipeline.inputs import Run

PACKAGES = ("torch", "transformers", "trl", "peft", "datasets", "accelerate", "deepspeed", "tokenizers", "numpy")


def check_agreement(run: "Run") -> None:
    """Raises UserError on every rank where a host has another environment, config or code than rank 0's."""
    from stages.core import ranks

    token = ranks.from_main(os.urandom(8).hex())
    mark = run.folder / ".ranks"
    if ranks.current().is_main:
        run.folder.mkdir(parents=True, exist_ok=True)
        mark.write_text(token, encoding="utf-8")
    ranks.barrier()
    sees = mark.is_file() and mark.read_text(encoding="utf-8") == token
    found = ranks.gather_lists([(socket.gethostname(), facts(run), sees)])
    if ranks.current().is_main:
        mark.unlink()
    ranks.check_together(disagreements([(host, told) for host, told, _ in found]))
    blind = [f"rank {rank} on {host}" for rank, (host, _, sees) in enumerate(found) if not sees]
    if blind:
        folder = f"{run.folder}: not the same folder on {', '.join(blind)}; give --out on a disk that all hosts share"
        ranks.check_together([folder])


def facts(run: "Run") -> dict[str, str]:
    """What this rank would compute with: name -> version or digest."""
    from pipeline.config import dump_config
    from pipeline.inputs import code_version, package_version

    versions = {name: package_version(name) for name in PACKAGES}
    return {
        "python": platform.python_version(),
        **versions,
        "the code": code_version(),
        "the config": sha256_json(dump_config(run.config)),
        "the devices": _device(),
    }


def disagreements(found: list[tuple[str, Mapping[str, str]]]) -> list[str]:
    """One line for each fact in which ranks differ from rank 0; `found` has (host, facts) of each in order."""
    first_host, expected = found[0]
    lines: dict[str, None] = {}
    for rank, (host, told) in enumerate(found):
        for name, value in told.items():
            if value != expected[name]:
                both = "" if value.startswith("sha256:") or len(value) > 40 else f" ({value}, not {expected[name]})"
                line = (
                    f"rank {rank} on {host} has another {name.removeprefix('the ')} than rank 0 on {first_host}{both}"
                )
                lines[f"{line}; make every host the same"] = None
    return list(lines)


def _device() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def name_interface() -> None:
    """Tells gloo the network interface that leads to rank 0; left to itself it may offer others 127.0.0.1.

    What the user set stands.
    """
    master = os.environ.get("MASTER_ADDR", "127.0.0.1")
    if "GLOO_SOCKET_IFNAME" in os.environ:
        return
    family = socket.AF_INET6 if ":" in master else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:  # sends nothing, only asks for the route
        probe.connect((master, 9))
        own = probe.getsockname()[0]
    for name, addresses in psutil.net_if_addrs().items():
        if any(address.address == own for address in addresses):
            os.environ["GLOO_SOCKET_IFNAME"] = name
