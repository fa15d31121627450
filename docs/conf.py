"""How the site is built: `make docs`. Nothing is loaded from the network, neither by the build nor by the pages.

What pages compute is kept and computed again when code in src changes. Whoever writes pages while code changes may set
CALIPERS_DOCS_CACHE to a folder, whose results are then taken as they are.
"""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path

from calipers import __version__

DOCS = Path(__file__).parent
ROOT = DOCS.parent
TOOLS = DOCS / "_tools"
sys.path.insert(0, str(TOOLS))
# The kernels of the executed pages import `figures` and, in a checkout, this very package.
os.environ["PYTHONPATH"] = os.pathsep.join([str(TOOLS), str(ROOT / "src")])
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A profile of our own, so that the reader's IPython settings change no page.
PROFILE = ROOT / "build" / "docs" / "ipython" / "profile_default"
PROFILE.mkdir(parents=True, exist_ok=True)
(PROFILE / "ipython_kernel_config.py").write_text(
    "c = get_config()\nc.IPKernelApp.log_level = 40\n"
)
os.environ["IPYTHONDIR"] = str(PROFILE.parent)


def _sources() -> str:
    """A digest of all code that executed pages call: other code, other results."""
    digest = hashlib.sha256()
    for path in sorted(
        [
            *(ROOT / "src").rglob("*.py"),
            *(TOOLS / f"{name}.py" for name in ("course", "figures", "shell")),
        ]
    ):
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


import pages  # noqa: E402 - found by the line above

pages.write()

project = "Calipers"
author = "The Calipers developers"
copyright = "the Calipers developers, MIT licence"  # noqa: A001 - Sphinx's name
version = release = __version__
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "docstrings",
    "mathml",
    "shell",
]
exclude_patterns = ["_tools", "_build"]
nitpicky = False
suppress_warnings = ["config.cache"]

myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath", "fieldlist"]
myst_heading_anchors = 3
CACHE = Path(os.environ.get("CALIPERS_DOCS_CACHE") or ROOT / "build" / "docs" / f"run-{_sources()}")
shell_cache = str(CACHE / "commands")
nb_execution_mode = "cache"
nb_execution_cache_path = str(CACHE / "pages")
nb_execution_raise_on_error = True
nb_execution_timeout = 300
nb_execution_in_temp = True
nb_merge_streams = True
nb_mime_priority_overrides = [("html", "text/html", 0), ("html", "image/svg+xml", 10)]

autodoc_typehints = "signature"
autodoc_preserve_defaults = True
autodoc_inherit_docstrings = False
autodoc_member_order = "bysource"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
add_module_names = False
napoleon_use_rtype = False

html_theme = "furo"
html_title = f"Calipers {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_math_renderer = "mathml"
html_show_sphinx = False
html_copy_source = False
pygments_style = "friendly"
pygments_dark_style = "monokai"
