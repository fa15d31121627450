"""Pages that are written when the site is built, from the tables in the code: `docs/generated`."""

from __future__ import annotations

from pathlib import Path

from calipers.methods import SIDES, statement

HERE = Path(__file__).parents[1] / "generated"
FIELDS = {
    "guarantee": "Guarantee",
    "cost": "Cost",
    "loose": "When loose",
    "paper": "Paper",
}
METHODS = """What each method promises, what it costs, when its result is far from the truth, and where it comes from.
Costs are in passes of the network for one example; a gradient is two. `calipers methods NAME` prints a card in the
terminal, `calipers explain` what each method finds for an example of yours."""


def write() -> None:
    """All of them; a page that is as it was keeps its time, so that Sphinx leaves it alone."""
    HERE.mkdir(exist_ok=True)
    for name, text in (("methods.md", methods()),):
        page = HERE / name
        if not page.exists() or page.read_text(encoding="utf-8") != text:
            page.write_text(text, encoding="utf-8")


def methods() -> str:
    """A card for each method of `calipers.methods`."""
    parts = ["# Method cards", METHODS]
    for side in SIDES:
        title, _, meaning = side.title.partition(": ")
        parts.append(f"({side.name}-methods)=\n## {title}")
        parts.append(f"{meaning[:1].upper()}{meaning[1:]}." if meaning else "Beside the registers.")
        for name, method in side.methods.items():
            card = side.cards[name]._asdict()
            anchor = f"({side.name}-{name.replace('_', '-').lower()})="
            fields = [f":{title}: {escape(card[field])}" for field, title in FIELDS.items()]
            function = f":Function: `{method.__module__}.{method.__qualname__}`"
            parts += [f"{anchor}\n### {name}", escape(statement(method))]
            parts.append("\n".join([*fields, function]))
    return "\n\n".join(parts) + "\n"


def escape(text: str) -> str:
    """A docstring's words as Markdown: stars are products, double backticks code."""
    return text.replace("``", "`").replace("*", r"\*").replace("$", r"\$")
