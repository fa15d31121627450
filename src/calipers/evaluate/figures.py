"""A report's figures as files for papers: SVG by itself, PNG and PDF through cairosvg (extra ``figures``)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from markupsafe import Markup

from calipers.errors import DataError
from calipers.evaluate.curve import Curve
from calipers.evaluate.report import bracket_bar, class_bars, cost_bars, curve_plot, margins
from calipers.evaluate.result import Audit
from calipers.files import write_atomically

KINDS = (".svg", ".png", ".pdf")
SCALE = 3.0  # of PNG files: three pixels for each unit of the drawing
# the page's colours on white paper: converters know neither variables nor preferences
STYLE = (
    "text{fill:#333;font:12px Helvetica,Arial,sans-serif}"
    ".robust{fill:#0072b2}.unknown{fill:#7f8992}.broken{fill:#c26a00}"
    ".plain{fill:#56606b}.plus{fill:#d55e00}.minus{fill:#005ab5}.ink{stroke:#56606b;fill:none}"
    ".zero{stroke:#1b1f24;stroke-dasharray:4 3;fill:none}.cross{stroke:#fff;stroke-dasharray:2 4;opacity:.8;fill:none}"
    ".frame,.grid-line{stroke:#d3d9df;fill:none}"
    "image{image-rendering:pixelated}.line{stroke-width:2}.band{opacity:.38}"
    ".faint{fill:#7f8992;opacity:.18}.robust-line{stroke:#0072b2}.broken-line{stroke:#c26a00}"
)
RUNS = ("#0072b2", "#c26a00", "#00805f", "#a8467f", "#5a5fc0", "#6b6b6b")
STYLE += "".join(f".run{i}{{fill:{c}}}.run{i}-line{{stroke:{c}}}" for i, c in enumerate(RUNS))
STYLE += ".line{fill:none}"


def standalone(svg: str | Markup) -> str:
    """A page's picture as a file of its own: with its colours, on white."""
    head, _, rest = str(svg).partition(">")  # as Markup it would escape what is put in
    space = '<svg xmlns="http://www.w3.org/2000/svg"'
    box = head.partition('viewBox="0 0 ')[2].partition('"')[0].split()
    size = f' width="{box[0]}" height="{box[1]}"'
    white = '<rect width="100%" height="100%" fill="#fff"/>'
    return f"{head.replace('<svg', space, 1)}{size}><style>{STYLE}</style>{white}{rest}"


def figures(audit: Audit, curve: Curve | None = None) -> dict[str, str]:
    """The report's figures by name, as SVG texts."""
    found = {
        "bracket": bracket_bar(audit),
        "margins": margins(audit)[0],
        "classes": class_bars(audit),
        "costs": cost_bars(audit),
    }
    if curve is not None:
        found["curve"] = curve_plot(curve)
    return {name: standalone(svg) for name, svg in found.items()}


def converted(svg: str, kind: str) -> bytes:
    """An SVG text as a file of the ending ``kind``.

    Raises:
        ValueError: another ending.
        DataError: .png and .pdf need cairosvg.
    """
    if kind == ".svg":
        return svg.encode()
    if kind not in KINDS:
        raise ValueError(f"{kind or 'a file without an ending'}: write one of {', '.join(KINDS)}")
    try:
        import cairosvg
    except (ImportError, OSError):  # OSError: the cairo library itself is missing
        raise DataError(
            f"{kind} needs cairosvg and the cairo library; pip install 'calipers[figures]', or write .svg"
        ) from None
    if kind == ".png":
        return bytes(cairosvg.svg2png(bytestring=svg.encode(), scale=SCALE))
    return bytes(cairosvg.svg2pdf(bytestring=svg.encode()))


def save(folder: str | Path, drawn: Mapping[str, str]) -> str:
    """Write each figure as NAME.svg, .png and .pdf; why the last two are missing, or nothing."""
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    for name, svg in drawn.items():
        write_atomically(place / f"{name}.svg", svg)
    try:
        for name, svg in drawn.items():
            for kind in KINDS[1:]:
                write_atomically(place / f"{name}{kind}", converted(svg, kind))
    except DataError as error:
        return str(error)
    return ""
