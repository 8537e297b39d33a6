"""Whether a hub id can be had, asked once: the libraries would ask for minutes where there is no network."""

from pathlib import Path
from typing import Literal

from data.errors import UserError

_SECONDS = 10.0  # to wait for the hub's answer


def require_on_hub(hub_id: str, kind: Literal["model", "dataset"]) -> None:
    """Returns where the hub knows the id, or a copy of it is on this disk already.

    Raises UserError for an id that the hub does not know, and where the hub does not answer.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HTTPError, RepositoryNotFoundError  # pyright: ignore[reportPrivateImportUsage]

    if (Path(constants.HF_HUB_CACHE) / f"{kind}s--{hub_id.replace('/', '--')}").is_dir():
        return
    try:
        HfApi().repo_info(hub_id, repo_type=kind, timeout=_SECONDS)
    except RepositoryNotFoundError as error:
        raise UserError(
            f"{hub_id}: neither a folder or file here nor a {kind} on the hub; check the spelling, or log in if it is "
            "private"
        ) from error
    except (OSError, HTTPError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{hub_id}: no folder or file here, and the hub does not answer ({reason}); check the path, or the network"
        ) from error
