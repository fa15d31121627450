"""The four scripts with which the verification competition installs and runs a tool."""

from __future__ import annotations

from pathlib import Path

from calipers import __version__

_HEAD = """#!/usr/bin/env bash
# {what}
set -eu
if [ "${{1:-}}" != v1 ]; then echo "$0: expected the interface version v1 first" >&2; exit 1; fi
here=$(cd "$(dirname "${{BASH_SOURCE[0]}}")" && pwd)
"""
_INSTALL = """
# CALIPERS_PACKAGE may name a wheel, a folder with the sources, or a repository
python3 -m venv "$here/.venv"
"$here/.venv/bin/python" -m pip install --quiet --upgrade pip
"$here/.venv/bin/python" -m pip install --quiet "${CALIPERS_PACKAGE:-calipers==VERSION}"
"$here/.venv/bin/calipers" --version
"""
_PREPARE = """
# Nothing is prepared and no other process is touched. A failure here would skip the rest of the benchmark,
# so a missing file is left to run_instance.sh.
for file in "${3:-}" "${4:-}"; do
    case "$file" in "["*) continue ;; esac
    [ -r "$file" ] || echo "$0: cannot read $file" >&2
done
exit 0
"""
_RUN = """
onnx=$3; vnnlib=$4; out=$5; limit=$6
calipers="$here/.venv/bin/calipers"
[ -x "$calipers" ] || calipers=calipers
case "$onnx" in
    "["*) echo unknown > "$out"; echo "several networks are not supported" >&2; exit 0 ;;
esac
# the answer must be written before the harness ends the script
limit=$(awk -v s="$limit" 'BEGIN { r = s - (s > 5 ? 1.5 : 0.3 * s); print r }')
"$calipers" verify "$onnx" "$vnnlib" --timeout "$limit" > "$out" || true
[ -s "$out" ] || echo unknown > "$out"
sed -i '1s/^timed-out$/timeout/' "$out"
exit 0
"""
_POST = """#!/usr/bin/env bash
# Nothing is left to do after the installation: there is no licence to activate.
exit 0
"""

SCRIPTS = {
    "install_tool.sh": _HEAD.format(what="install_tool.sh v1: once per machine")
    + _INSTALL.replace("VERSION", __version__),
    "post_install.sh": _POST,
    "prepare_instance.sh": _HEAD.format(what="prepare_instance.sh v1 CATEGORY ONNX VNNLIB")
    + _PREPARE,
    "run_instance.sh": _HEAD.format(what="run_instance.sh v1 CATEGORY ONNX VNNLIB OUT TIMEOUT")
    + _RUN,
}


def write_scripts(folder: str | Path) -> list[Path]:
    """All four in ``folder``, which is made if need be, executable.

    Raises:
        ValueError: one of them is there already.
    """
    target = Path(folder)
    there = [name for name in SCRIPTS if (target / name).exists()]
    if there:
        raise ValueError(f"{target}: {', '.join(there)} exists already; name another folder")
    target.mkdir(parents=True, exist_ok=True)
    for name, text in SCRIPTS.items():
        (target / name).write_text(text, encoding="ascii", newline="\n")
        (target / name).chmod(0o755)
    return [target / name for name in SCRIPTS]
