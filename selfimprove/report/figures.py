"""How numbers are written: three digits, no zero before the point below one, a true minus sign."""

MINUS = "−"
FIRM = "\u00a0"  # a space that no line ends at


def number(value: float | None, digits: int = 3) -> str:
    """`.712`, `12.346`; a dash where it is unknown."""
    if value is None:
        return "–"
    text = f"{abs(value):.{digits}f}"
    text = text.removeprefix("0") if abs(value) < 1 and digits else text
    return f"{MINUS}{text}" if value < 0 and any(c in "123456789" for c in text) else text


def signed(value: float | None) -> str:
    """`+.103`, `−.021`."""
    return "–" if value is None else number(value) if value < 0 else f"+{number(value)}"


def p_value(value: float) -> str:
    """`p < .001`, `p = .034`."""
    text = "< .001" if value < 0.001 else "= 1" if value > 0.9995 else f"= {number(value)}"
    return f"p {text}".replace(" ", FIRM)


def plain(value: float | None) -> str:
    """Four significant digits, for quantities of any size: `0.0001`, `−23.71`, `1,024`."""
    if value is None:
        return "–"
    text = f"{value:,.4g}" if abs(value) < 10_000 else f"{value:,.0f}"
    return text.replace("-", MINUS)


def short(value: float | None) -> str:
    """Three digits after the point where they say enough, else `plain`: `.717`, `5.848`, `94.26`, `1,024`."""
    return plain(value) if value is not None and abs(value) >= 10 else number(value)


def count(value: float | None) -> str:
    """`12,345`."""
    return "–" if value is None else f"{value:,.0f}"


def seconds(value: float) -> str:
    """`4.2 s`, `12 min 03 s`, `5 h 07 min`."""
    if value < 60:
        return f"{value:.1f} s"
    whole = round(value)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def usd(value: float) -> str:
    """`$0.0421`."""
    return f"${value:.4f}" if value < 100 else f"${value:,.2f}"
