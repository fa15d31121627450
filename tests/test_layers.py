"""The layers of DESIGN.md, section 3, and what no module may do: read from the syntax trees."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "src"
FILES = {
    ".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p
    for p in ROOT.rglob("*.py")
}
TREES = {name: ast.parse(path.read_text()) for name, path in FILES.items()}
NAMES = sorted(TREES)

# what each part may import besides itself; the longest matching prefix counts
L0 = {
    "errors",
    "files",
    "describe",
    "rounding",
    "searches",
    "grid",
    "work",
    "sets",
    "spec",
    "bracket",
    "confidence",
}
L1 = L0 | {"graph", "vnnlib"}
L2 = L1 | {"ops"}
ATTACKS = L0 | {"seeds"}
BOUNDS = L2 | {"seeds", "programs"}
L4 = BOUNDS | {"bounds"}
L5 = L4 | {"attacks", "exact", "", "data"}  # "": the version
TOP = L5 | {"downloads", "images", "evaluate", "models", "zoo", "api", "training", "recipes"}
TOP |= {"reproduce", "methods", "doctor", "cli", "serve"}
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "seeds": {"errors"},
    "files": set(),
    "describe": set(),
    "confidence": set(),
    "rounding": set(),
    "programs": {"errors"},
    "searches": set(),
    "grid": {"errors", "rounding", "searches"},
    "work": set(),
    "sets": {"errors", "rounding", "searches", "grid"},
    "spec": {"errors", "sets"},
    "bracket": {"errors", "sets", "spec", "work"},
    "graph": {"errors"},
    "vnnlib": {"errors", "sets", "spec", "graph"},
    "ops": L1,
    "attacks": ATTACKS,
    "bounds": BOUNDS,
    "exact": L4,
    "downloads": {"errors", "files"},
    "images": {"errors"},
    "data": {"errors", "files", "downloads", "images"},
    "zoo": {"errors", "graph", "data"},
    "models": {"errors", "files", "graph", "zoo"},
    "training": L5 | {"zoo", "models"},
    "evaluate": L5,
    "api": L5 | {"evaluate", "models", "zoo"},
    "recipes": TOP,
    "reproduce": L5 | {"training", "models"},
    "serve": L5 | {"evaluate", "models", "zoo"},
    "methods": L5 | {"training"},
    "doctor": L5,
    "cli": TOP,
    "": TOP,
}

# modules that lie above their package: nothing in it may import them
ABOVE = {"calipers.graph.inspect": {"ops"}}


def part(module: str) -> str:
    """``calipers.graph.capture`` belongs to ``graph``; the package itself to the empty name."""
    return module.split(".")[1] if "." in module else ""


def imports(name: str) -> set[str]:
    """Every module that ``name`` imports, wherever in the file, as an absolute dotted name."""
    found: set[str] = set()
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name} line {node.lineno}: relative import"
            assert node.module
            modules = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {m if m in TREES else node.module for m in modules}
    return found


@pytest.mark.parametrize("name", [n for n in NAMES if n.split(".")[0] == "calipers"])
def test_a_layer_imports_only_lower_ones(name: str) -> None:
    assert part(name) in ALLOWED, f"{name}: give its layer a line in this test"
    allowed = ALLOWED[part(name)] | {part(name)} | ABOVE.get(name, set())
    own = {m for m in imports(name) if m.split(".")[0] == "calipers"}
    wrong = {m for m in own if part(m) not in allowed}
    assert not wrong, f"{name} imports {sorted(wrong)}"


def test_the_table_keeps_the_rules_of_the_design() -> None:
    """The rules that no edit of the table above may give up."""
    for layer in ("attacks", "sets", "spec", "bracket"):
        assert not ALLOWED[layer] & {"graph", "ops", "bounds", "exact", "evaluate", "cli"}
    assert "attacks" not in ALLOWED["bounds"] | ALLOWED["exact"]
    for layer, allowed in ALLOWED.items():
        if layer not in ("cli", "api", "", "recipes", "serve"):
            assert not allowed & {"cli", "evaluate", "recipes"}


def test_no_neighbour_imports_a_module_that_lies_above() -> None:
    for above in ABOVE:
        users = [n for n in NAMES if above in imports(n) and part(n) == part(above)]
        assert users == []


def test_the_checker_imports_numpy_and_onnx_alone() -> None:
    own = [name for name in NAMES if name.split(".")[0] == "calipers_check"]
    assert own
    for name in own:
        packages = {m.split(".")[0] for m in imports(name)}
        wrong = packages - set(sys.stdlib_module_names) - {"numpy", "onnx", "calipers_check"}
        assert not wrong, f"{name} imports {sorted(wrong)}"


HEAVY = (
    "onnx",
    "onnxruntime",
    "jinja2",
    "highspy",
    "scipy",
    "ray",
    "sklearn",
    "matplotlib",
    "safetensors",
    "PIL",
    "cairosvg",
    "starlette",
)


@pytest.mark.parametrize("package", HEAVY)
def test_heavy_packages_are_imported_in_one_module_each(package: str) -> None:
    users = [
        n
        for n in NAMES
        if n.startswith("calipers.") and package in {m.split(".")[0] for m in imports(n)}
    ]
    if package == "onnx":  # the reader and the writer of ONNX files are one family of modules
        assert all(n.startswith("calipers.graph.onnx") for n in users), users
    else:
        assert len(users) <= 1, users


def test_torch_export_is_used_in_capture_alone() -> None:
    def uses(name: str) -> bool:
        exported = any(m.startswith("torch.export") for m in imports(name))
        return exported or any(
            isinstance(n, ast.Attribute) and ast.unparse(n) == "torch.export"
            for n in ast.walk(TREES[name])
        )

    assert [n for n in NAMES if uses(n)] == ["calipers.graph.capture"]


UNSAFE = ("pickle", "dill", "cloudpickle", "marshal")
LOADS = {
    "torch.load": ("weights_only", True),
    "np.load": ("allow_pickle", False),
    "numpy.load": ("allow_pickle", False),
}


def called(node: ast.Call) -> list[str]:
    """What is wrong with a call."""
    name = ast.unparse(node.func)
    given = {k.arg: getattr(k.value, "value", None) for k in node.keywords}
    found = [f"{name}()"] if name in ("print", "eval", "exec", "breakpoint") else []
    if name in LOADS and given.get(LOADS[name][0]) is not LOADS[name][1]:
        found.append(f"{name} without {LOADS[name]}")
    bad = (("weights_only", False), ("allow_pickle", True))
    return found + [f"{k}={v}" for k, v in bad if k in given and given[k] is v]


def offence(node: ast.AST) -> list[str]:
    """What is wrong with a node; `pickle` may be imported for the name of its error."""
    match node:
        case ast.Import(names=names):
            return [a.name for a in names if a.name.split(".")[0] in UNSAFE[1:]]
        case ast.ImportFrom(module=str(module)) if module.split(".")[0] in UNSAFE:
            return [module]
        case ast.Attribute(value=ast.Name(id="pickle"), attr=attr) if attr != "UnpicklingError":
            return [f"pickle.{attr}"]
        case ast.ExceptHandler(type=None):
            return ["bare except"]
        case ast.Assert():
            return ["assert"]
        case ast.Call():
            return called(node)
    return []


def offences(tree: ast.AST) -> list[str]:
    """Forbidden constructs, each with its line."""
    return [
        f"{getattr(node, 'lineno', 0)}: {text}" for node in ast.walk(tree) for text in offence(node)
    ]


EXCEPTED = {
    "calipers.bracket": "assert",  # narrows a type after __post_init__
    "calipers.bounds.recorded": "exec()",  # of names that it has made itself
}


@pytest.mark.parametrize("name", NAMES)
def test_no_module_unpickles_prints_or_swallows(name: str) -> None:
    allowed = EXCEPTED.get(name)
    assert [o for o in offences(TREES[name]) if o.split(": ")[1] != allowed] == []


@pytest.mark.parametrize(
    "source",
    [
        "import dill", "pickle.loads(b)", "pickle.Unpickler(f)", "from pickle import load",
        "torch.load(p)", "torch.load(p, weights_only=False)",
        "np.load(p)", "np.load(p, allow_pickle=True)", "f(allow_pickle=True)", "print(1)", "eval('1')",
        "try:\n  f()\nexcept:\n  pass", "assert x",
    ],
)  # fmt: skip
def test_each_offence_is_seen(source: str) -> None:
    assert offences(ast.parse(source))


def test_safe_loading_is_no_offence() -> None:
    assert (
        offences(
            ast.parse(
                "torch.load(p, weights_only=True); np.load(p, allow_pickle=False); c.print(1)"
            )
        )
        == []
    )
