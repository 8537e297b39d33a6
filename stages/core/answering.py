"""Frozen policies that answer prompts: as the stages hold them that sample without training, and an engine for each."""

import contextlib
from collections.abc import Generator
from pathlib import Path
from typing import Literal

from stages.core import ranks
from stages.core.bank import BankBuilder, PolicyBank, View
from stages.core.models import load_model, resolve_model
from stages.core.rollout.choice import choose_engine
from stages.core.rollout.config import EngineConfig
from stages.core.rollout.native import NativeEngine
from stages.core.rollout.policy_files import PolicyFiles, policy_files
from stages.core.rollout.protocol import RolloutEngine
from stages.core.rollout.start import FOLDER, computing_dtype, start_engine
from stages.core.trunk import Trunk, read_adapter


def load_view(source: str, name: str, builder: BankBuilder) -> View:
    """A frozen policy; adapters on the base that `builder` holds already share it."""
    found = resolve_model(source)
    if builder.frozen is not None and builder.frozen_base == found.base:
        trunk = builder.frozen
    else:
        trunk = Trunk(load_model(found.base, head="lm", dtype=builder.shared.dtype), builder.device)
        trunk.check_head()
    if builder.frozen is None:
        builder.frozen, builder.frozen_base = trunk, found.base
    if found.adapter is None:
        return View(trunk, None)
    config, weights, _ = read_adapter(found.adapter)
    trunk.add_adapter(name, config, weights)
    return View(trunk, name)


@contextlib.contextmanager
def engine_of(
    source: str,
    view: View,
    config: EngineConfig,
    section: Literal["eval.rollout", "label.rollout"],
    *,
    max_length: int,
    responses: int,
    out: Path,
) -> Generator[RolloutEngine]:
    """An engine that has the policy as its version 0, for up to `responses` at once; it is closed in the end."""
    engine = start_engine(
        ranks.from_main(choose_engine(config, section)),
        config,
        NativeEngine(view.trunk, view.adapter),
        lambda: files_of(source, view),
        max_length=max_length,
        responses=responses,
        folder=out / FOLDER,
    )
    with contextlib.closing(engine):
        engine.sync(0)
        yield engine


def files_of(source: str, view: View) -> PolicyFiles:
    """How a server gets the policy: its adapter, or the whole model as it was read."""
    found, dtype = resolve_model(source), computing_dtype(view.trunk)
    if view.adapter is not None:
        return policy_files(PolicyBank(view, view, source, found.base, 1.0), dtype)
    return PolicyFiles(
        found.base,
        "full",
        dtype,
        # Read anew: adapters may stand on the one in memory, and would be saved with it.
        lambda folder: load_model(found.base, head="lm", dtype=dtype).save_pretrained(str(folder)),
    )
