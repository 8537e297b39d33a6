"""Two hosts on one machine: network namespaces joined by a cable, an sshd in each."""

import os
import shutil
import subprocess
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

PORT = 2222
REASON = "network namespaces cannot be made here"


@dataclass(frozen=True)
class TwoHosts:
    """Their addresses, what a command in the first one is prefixed with, and the environment that lets ssh in."""

    addresses: tuple[str, str]
    inside: tuple[str, ...]
    environment: dict[str, str]

    def hostfile(self, folder: Path, slots: int = 1) -> Path:
        """A hostfile with both."""
        path = folder / "hostfile"
        path.write_text("".join(f"{address} slots={slots}\n" for address in self.addresses))
        return path


def why_not() -> str:
    """Why two hosts cannot be had here; empty where they can."""
    missing = [name for name in ("ip", "ssh", "pdsh", "ssh-keygen") if shutil.which(name) is None]
    if missing or not Path("/usr/sbin/sshd").is_file():
        return f"{REASON}: {', '.join([*missing, 'sshd'][:1])} is not installed"
    name = f"rlhf-{os.getpid()}-try"
    if subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False).returncode:
        return REASON
    _run("ip", "netns", "del", name)
    return ""


@contextmanager
def two_hosts(folder: Path) -> Generator[TwoHosts]:
    """Both hosts, taken down again with all that runs in them."""
    names = tuple(f"rlhf-{os.getpid()}-{place}" for place in ("a", "b"))
    net = f"10.203.{os.getpid() % 250}"
    addresses = (f"{net}.1", f"{net}.2")
    servers: list[subprocess.Popen[bytes]] = []
    try:
        for name in names:
            _run("ip", "netns", "add", name)
            _run("ip", "-n", name, "link", "set", "lo", "up")
        _run(
            "ip", "link", "add", "host0", "netns", names[0], "type", "veth", "peer", "name", "host1", "netns", names[1]
        )
        for place, (name, address) in enumerate(zip(names, addresses, strict=True)):
            _run("ip", "-n", name, "addr", "add", f"{address}/24", "dev", f"host{place}")
            _run("ip", "-n", name, "link", "set", f"host{place}", "up")
        key = _keys(folder)
        servers += [_sshd(folder, name, address) for name, address in zip(names, addresses, strict=True)]
        for name, address in zip(names, addresses, strict=True):
            _wait_for_ssh(name, address, key)
        yield TwoHosts(addresses, ("ip", "netns", "exec", names[0]), {"PDSH_SSH_ARGS_APPEND": _options(key)})
    finally:
        for server in servers:
            server.kill()
            server.wait()
        for name in names:
            pids = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=False).stdout
            for pid in pids.split():
                subprocess.run(["kill", "-9", pid], capture_output=True, check=False)
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def _options(key: Path) -> str:
    return (
        f"-p {PORT} -i {key} -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null "
        "-o IdentitiesOnly=yes -o LogLevel=ERROR"
    )


def _keys(folder: Path) -> Path:
    for name in ("user", "host"):
        _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name))
    return folder / "user"


def _sshd(folder: Path, name: str, address: str) -> "subprocess.Popen[bytes]":
    config = folder / f"sshd-{name}"
    config.write_text(
        f"Port {PORT}\nListenAddress {address}\nHostKey {folder / 'host'}\nPidFile none\n"
        f"AuthorizedKeysFile {folder / 'user.pub'}\nStrictModes no\nUsePAM no\nPermitRootLogin yes\n"
        "PasswordAuthentication no\n"
    )
    Path("/run/sshd").mkdir(exist_ok=True)  # sshd wants it for privilege separation
    return subprocess.Popen(
        ["ip", "netns", "exec", name, "/usr/sbin/sshd", "-D", "-f", str(config), "-E", f"{config}.log"]
    )


def _wait_for_ssh(name: str, address: str, key: Path) -> None:
    command = ["ip", "netns", "exec", name, "ssh", "-o", "BatchMode=yes", *_options(key).split(), address, "true"]
    for _ in range(50):
        if subprocess.run(command, capture_output=True, check=False).returncode == 0:
            return
        time.sleep(0.1)
    raise AssertionError(f"no sshd at {address}")


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)
