"""Which labels of preference pairs DPO can learn from. Imports no torch: `launch plan` asks too."""

from collections.abc import Sequence

from data.encoded import EncodedPreference
from data.errors import UserError


def refuse_margins(rows: Sequence[EncodedPreference]) -> None:
    """Raises UserError where pairs ask for a margin: DPO's loss has none, only weight and p_chosen."""
    with_margin = [row for row in rows if row.margin != 0]
    if with_margin:
        first = with_margin[0]
        raise UserError(
            f"dpo.data: {len(with_margin)} of {len(rows)} pairs have a margin ({first.margin:g} in {first.origin}), "
            "which DPO cannot learn from; take the column `margin` out of the rows, or use rm and ppo"
        )
