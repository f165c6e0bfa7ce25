"""The shape of token rows, as users ask for it; checked without torch."""

from __future__ import annotations

from layerbits.errors import UserError

PACKINGS = ("packed", "padded")


def check_length(key: str, tokens: int) -> int:
    """Tokens of a row.

    Args:
        key: What the user calls them.
        tokens: How many.

    Raises:
        UserError: They are too few to predict one.
    """
    if tokens < 2:
        raise UserError(f"{key}={tokens} leaves no token to predict; use 2 or more")
    return tokens


def check_rows(packing: str, seq_len: int, batch_size: int) -> None:
    """Checks the rows that a run scores on.

    Raises:
        UserError: The packing is not known, or a number is too small.
    """
    if packing not in PACKINGS:
        raise UserError(f"dataset.packing={packing} is not known; use one of {', '.join(PACKINGS)}")
    check_length("autoquant.seq_len", seq_len)
    if batch_size < 1:
        raise UserError(f"autoquant.batch_size={batch_size} is not a number of rows; use 1 or more")


def check_samples(samples: int | None, captions: int) -> None:
    """Checks how many of the calibration captions are scored on.

    Args:
        samples: How many, from the first on; ``None`` = all.
        captions: How many there are.

    Raises:
        UserError: There are not as many, or none is asked for.
    """
    if samples is not None and not 1 <= samples <= captions:
        raise UserError(
            f"autoquant.num_score_samples={samples} must be between 1 and the {captions} calibration captions; choose "
            "another or a larger dataset.size"
        )


def check_held_out(rows: int, batch_size: int) -> None:
    """Checks how many held-out rows are measured on, and how many at once.

    Raises:
        UserError: A number is too small, or the rows fill no whole batches.
    """
    if rows < 1:
        raise UserError(f"rows={rows} is nothing to probe on; use 1 or more")
    if batch_size < 1:
        raise UserError(f"batch_size={batch_size} is not a number of rows; use 1 or more")
    if rows > batch_size and rows % batch_size:
        raise UserError(
            f"rows={rows} is not a multiple of batch_size={batch_size}; use rows={rows - rows % batch_size}, or change "
            "batch_size"
        )
