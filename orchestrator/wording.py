"""Counts and lists in sentences."""

from __future__ import annotations

from collections.abc import Sequence


def counted(count: float, noun: str, plural: str | None = None) -> str:
    """A count with its noun.

    Example:
        >>> counted(1, "unit"), counted(3, "unit"), counted(0.5, "GPU")
        ('1 unit', '3 units', '0.5 GPUs')
    """
    number = f"{count:g}" if isinstance(count, float) else str(count)
    return f"{number} {noun if count == 1 else plural or noun + 's'}"


def listed(words: Sequence[str], most: int = 3) -> str:
    """Words as an enumeration, abbreviated where there are more than `most`.

    Raises:
        ValueError: no words.

    Example:
        >>> listed(["a"]), listed(["a", "b", "c"]), listed(["a", "b", "c", "d", "e"])
        ('a', 'a, b and c', 'a, b and 3 others')
    """
    if not words:
        raise ValueError("An enumeration needs at least one word.")
    if len(words) == 1:
        return words[0]
    shown = list(words)
    if len(words) > most:
        rest = len(words) - most + 1
        shown = [*words[: most - 1], f"{rest} others"]
    return f"{', '.join(shown[:-1])} and {shown[-1]}"


def bytes_text(size: int) -> str:
    """A size in decimal units.

    Example:
        >>> bytes_text(999), bytes_text(61_000_000)
        ('999 B', '61 MB')
        >>> bytes_text(223_790_000)
        '224 MB'
    """
    amount = float(size)
    for unit in ("B", "kB", "MB", "GB"):
        if round(amount) < 1000:
            return f"{amount:.0f} {unit}"
        amount /= 1000
    return f"{amount:.0f} TB"
