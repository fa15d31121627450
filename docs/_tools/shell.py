"""Commands and files that a page shows are run and written when the site is built, and their real output is shown.

    ```{file} model.py
    ...                          (shown, and written into the page's own folder)
    ```

    ```{shell}
    calipers inspect model.py:build     (shown, run there, and what it prints shown below)
    ```

Options of ``shell``: ``exit`` the code that is expected (0), ``quiet`` shows no output, ``lines`` at most so many.
Results are kept by what led to them: the code of the project and all that the page wrote and ran before.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, ClassVar

from docutils import nodes
from docutils.parsers.rst import directives
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

SETTINGS = {"COLUMNS": "100", "NO_COLOR": "1"}
LIMIT = 300  # seconds for one command
Done = dict[str, Any]


class Written(SphinxDirective):
    """A file of the page's folder, shown with its name."""

    has_content = True
    required_arguments = 1
    option_spec: ClassVar[Any] = {"language": directives.unchanged}

    def run(self) -> list[nodes.Node]:
        name, text = self.arguments[0], "\n".join(self.content) + "\n"
        record(self, ("file", name, text))
        language = self.options.get("language") or {".py": "python", ".yml": "yaml"}.get(
            Path(name).suffix, "text"
        )
        block = nodes.literal_block(text, text, language=language)
        title = nodes.caption("", "", nodes.literal(name, name))
        box = nodes.container(
            "", title, block, literal_block=True, classes=["literal-block-wrapper"]
        )
        self.set_source_info(block)
        return [box]


class Shell(SphinxDirective):
    """Commands and what they print."""

    has_content = True
    option_spec: ClassVar[Any] = {
        "exit": directives.nonnegative_int,
        "quiet": directives.flag,
        "lines": directives.positive_int,
    }

    def run(self) -> list[nodes.Node]:
        text = "\n".join(self.content)
        wanted = self.options.get("exit", 0)
        done = result(self, text)
        if done["code"] != wanted:
            raise self.error(
                f"exit code {done['code']}, not {wanted}: {text}\n{done['out']}\n{done['err']}"
            )
        shown: list[nodes.Node] = [nodes.literal_block(text, text, language="sh")]
        lines = [line.rstrip() for line in done["out"].rstrip().splitlines()]
        if lines and "quiet" not in self.options:
            if len(lines) > (most := self.options.get("lines", len(lines))):
                lines = [*lines[:most], "..."]
            out = "\n".join(lines)
            shown.append(nodes.literal_block(out, out, language="text", classes=["printed"]))
        for node in shown:
            self.set_source_info(node)
        return shown


def record(directive: SphinxDirective, step: tuple[str, ...]) -> list[tuple[str, ...]]:
    """All steps of the page up to this one, which is added."""
    steps: list[tuple[str, ...]] = directive.env.temp_data.setdefault("shell_steps", [])
    steps.append(step)
    return steps


def result(directive: SphinxDirective, text: str) -> Done:
    """What the block did, from the cache, or by doing in the page's folder what has not been done there yet."""
    steps = record(directive, ("shell", text))
    cache = Path(directive.config.shell_cache)
    folder = cache / hashlib.sha256(directive.env.docname.encode()).hexdigest()[:12]
    kept = cache / f"{_digest(steps)}.json"
    if kept.exists():
        found: Done = json.loads(kept.read_text(encoding="utf-8"))
        return found
    state = folder.with_suffix(".state")
    at = state.read_text() if state.exists() else ""
    first = next((n for n in range(len(steps), 0, -1) if _digest(steps[:n]) == at), 0)
    if not first:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    done: Done = {}
    for n in range(first, len(steps)):
        state.unlink(missing_ok=True)
        kind, *rest = steps[n]
        if kind == "file":
            (folder / rest[0]).write_text(rest[1], encoding="utf-8")
        else:
            done = run(rest[0], folder)
        state.write_text(_digest(steps[: n + 1]))
    kept.write_text(json.dumps(done), encoding="utf-8")
    return done


def _digest(steps: list[tuple[str, ...]]) -> str:
    return hashlib.sha256(json.dumps(steps).encode()).hexdigest()[:24]


def run(text: str, folder: Path) -> Done:
    """What the commands print; they stop at the first that fails.

    A line that calls one of `PROGRAMS` and nothing else runs in a forked copy of this process, which has torch in
    memory already; everything else in a shell.
    """
    out, err = folder.with_suffix(".out"), folder.with_suffix(".err")
    code = 0
    with out.open("w+", encoding="utf-8") as stdout, err.open("w+", encoding="utf-8") as stderr:
        for line in text.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if not words:
                continue
            plain = words[0] in PROGRAMS and not set("|<>;&$`*") & set(line)
            start = forked if plain and hasattr(os, "fork") else shell
            code = start(words, line, folder, stdout, stderr)
            if code:
                break
        stdout.seek(0)
        stderr.seek(0)
        return {"code": code, "out": stdout.read(), "err": stderr.read()}


def forked(words: list[str], _: str, folder: Path, stdout: IO[str], stderr: IO[str]) -> int:
    """The exit code of the program, run by a copy of this process."""
    stdout.flush()
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 1
    try:
        os.dup2(stdout.fileno(), 1)
        os.dup2(stderr.fileno(), 2)
        sys.stdout, sys.stderr = (
            os.fdopen(1, "w", encoding="utf-8"),
            os.fdopen(2, "w", encoding="utf-8"),
        )
        os.chdir(folder)
        os.environ.update(SETTINGS)
        signal.alarm(LIMIT)
        logging.disable(logging.NOTSET)
        sys.argv = words
        sys.path.insert(0, str(folder))
        PROGRAMS[words[0]](words)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def shell(_: list[str], line: str, folder: Path, stdout: IO[str], stderr: IO[str]) -> int:
    """The exit code of a line of shell."""
    stdout.flush()
    path = f"{_programs(folder.parent)}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["/bin/sh", "-e", "-c", line],
        cwd=folder,
        env={**os.environ, **SETTINGS, "PATH": path},
        stdout=stdout,
        stderr=stderr,
        timeout=LIMIT,
        check=False,
    )
    return done.returncode


def _calipers(_: list[str]) -> None:
    from calipers.cli import main

    main()


def _checker(_: list[str]) -> None:
    from calipers_check.__main__ import script

    script()


def _python(words: list[str]) -> None:
    sys.argv = words[1:]
    runpy.run_path(words[1], run_name="__main__")


PROGRAMS: dict[str, Callable[[list[str]], None]] = {
    "calipers": _calipers,
    "calipers-check": _checker,
    "python": _python,
}
SCRIPTS = {
    "calipers": "-c 'from calipers.cli import main; main()'",
    "calipers-check": "-c 'from calipers_check.__main__ import script; script()'",
    "python": "",
}


def _programs(cache: Path) -> Path:
    """A folder with this checkout's console scripts and this interpreter, whatever is installed."""
    folder = cache / "bin"
    folder.mkdir(parents=True, exist_ok=True)
    for name, start in SCRIPTS.items():
        file = folder / name
        file.write_text(f'#!/bin/sh\nexec "{sys.executable}" {start} "$@"\n')
        file.chmod(0o755)
    return folder


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_config_value("shell_cache", "", "env")
    app.add_directive("file", Written)
    app.add_directive("shell", Shell)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
