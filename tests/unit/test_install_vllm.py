"""What `make vllm` installs: vLLM's own requirements, but for what breaks beside a CPU torch."""

from pathlib import Path

import pytest

from launch.install_vllm import detect_build, needed


def test_what_is_needed_is_what_holds_here_without_extras():
    requirements = [
        "regex",
        "requests>=2.33",
        "mistral_common[image]>=1.11",
        'torch==2.13.0+cpu; platform_machine != "imaginary"',
        'torch==2.13.0; platform_machine == "imaginary"',
        "torchaudio",
        "TorchVision",
        'torchcodec>=0.14; platform_machine != "imaginary"',
        'pandas; extra == "bench"',
        'six>=1.16; python_version > "3.0"',
        'old; python_version < "3.0"',
    ]
    expected = ["regex", "requests>=2.33", "mistral_common[image]>=1.11", "torch==2.13.0+cpu", "six>=1.16"]
    assert needed(requirements) == expected


@pytest.mark.parametrize(
    ("script", "build"),
    [
        ("echo 'GPU 0: NVIDIA H200 (UUID: x)'", "gpu"),
        ("echo 'No devices were found'", "cpu"),
        ("exit 9", "cpu"),
        (None, "cpu"),
    ],
)
def test_the_build_is_told_by_the_driver(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str | None, build: str
):
    if script is not None:
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}")
    assert detect_build() == build
