"""Numbers as people read them: sizes, spans of time, counts and rates."""


def bytes_in_words(count: int) -> str:
    """A size in decimal units: `812 B`, `4.2 kB`, `1.3 GB`."""
    if count < 1000:
        return f"{count} B"
    # 999.95 of a unit would print as 1000.0.
    power = next((each for each in (1, 2, 3) if count < 999.95 * 1000**each), 4)
    return f"{count / 1000**power:.1f} {('kB', 'MB', 'GB', 'TB')[power - 1]}"


def seconds_in_words(seconds: float) -> str:
    """A span of time: `0.3 s`, `42 s`, `3 min 05 s`, `2 h 10 min`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def rate_in_words(rate: float, unit: str) -> str:
    """A rate per second, or per minute where it is slower: `1,204 positions/s`."""
    if rate >= 9.95:
        return f"{rate:,.0f} {unit}/s"
    if rate >= 0.95:
        return f"{rate:.1f} {unit}/s"
    return f"{rate * 60:.1f} {unit}/min"


def count_in_words(count: int, thing: str) -> str:
    """`1 document`, `1,024 documents`."""
    return f"{count:,} {thing}" + ("" if count == 1 else "s")


def share_in_words(share: float) -> str:
    """A part of a whole: `0%`, `4.1%`, `38%`, `> 999%`; `-` where there is no number."""
    if share != share:
        return "-"
    if share > 9.995:
        return "> 999%"
    digits = 1 if 0 < share < 0.0995 else 0
    return f"{100 * share:.{digits}f}%"
