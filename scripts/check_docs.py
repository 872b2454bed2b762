"""Checks README.md, CHANGELOG.md and docs/: code runs, YAML parses, commands exist, links lead somewhere.

``mkdocs build --strict`` comes first (see the Makefile): it checks the links between the pages under docs/. Here:

- every ```python block runs (see docblocks.py for the exceptions), every ```yaml block parses;
- every ``dray`` and ``make`` command in ```console and ```sh blocks names real commands, options and targets;
- links and anchors of the pages outside docs/ lead somewhere;
- the built site loads nothing from other hosts.
"""

# ruff: noqa: S603, T201 - a script: it prints, and runs what this repository holds
from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import click
import yaml
from docblocks import Block, blocks, prose
from markdown.extensions.toc import slugify

from dray.cli import cli

ROOT = Path(__file__).resolve().parent.parent
OUTSIDE = [ROOT / "README.md", ROOT / "CHANGELOG.md"]
PAGE_TIMEOUT_S = 120
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)[^)]*\)")
HEADING = re.compile(r"^#{1,6}\s+(.+?)\s*#*$", re.MULTILINE)
FOREIGN = re.compile(r"<(?:script|link|img|iframe)\b[^>]*?(?:src|href)=\"((?:https?:)?//[^\"]+)\"")
SHELL_END = {"|", "||", "&&", ";", "&", ">", ">>", "<", "2>", "2>&1"}


def check_page(page: Path) -> list[str]:
    """Runs the page's Python in a process and a directory of its own; checks its YAML and commands."""
    name = page.relative_to(ROOT)
    problems = []
    for block in blocks(page):
        if block.language in {"yaml", "yml"}:
            problems += check_yaml(block, name)
        elif block.language in {"console", "sh", "bash", "shell"}:
            problems += [f"{name}:{line}: {problem}" for line, problem in check_commands(block)]
    if failure := run_code(page):
        problems.append(f"{name}: {failure}")
    return problems


def run_code(page: Path) -> str | None:
    """Runs the page's Python; returns what went wrong. Whatever the page started ends with it."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("DRAY_")}
    with tempfile.TemporaryDirectory(prefix="dray-docs-") as scratch:
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "scripts" / "run_page.py"), str(page)],
            cwd=scratch, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, start_new_session=True,
        )  # fmt: skip
        try:
            output, _ = process.communicate(timeout=PAGE_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return f"its code did not end within {PAGE_TIMEOUT_S} s\n{process.communicate()[0]}"
    return f"a code block failed\n{output}" if process.returncode else None


def check_yaml(block: Block, name: Path) -> list[str]:
    try:
        list(yaml.safe_load_all(block.code))
    except yaml.YAMLError as error:
        return [f"{name}:{block.line}: this is not YAML: {error}"]
    return []


def check_commands(block: Block) -> Iterator[tuple[int, str]]:
    """Yields (line, problem). In console blocks a command starts with ``$``, in sh blocks each line is one."""
    number = block.line
    for logical in re.split(r"(?<!\\)\n", block.code):
        line, height = logical.replace("\\\n", " ").strip(), logical.count("\n") + 1
        if block.language == "console":
            line = line[2:] if line.startswith("$ ") else ""
        try:
            words = shlex.split(line, comments=True)
        except ValueError as error:
            yield number, f"the shell would not understand this: {error}"
            words = []
        for command in split_commands(words):
            if problem := check_command(command):
                yield number, f"`{shlex.join(command)}`: {problem}"
        number += height


def split_commands(words: list[str]) -> Iterator[list[str]]:
    """The commands of a pipeline, without environment assignments and redirections' targets."""
    command: list[str] = []
    for word in [*words, ";"]:
        if word not in SHELL_END:
            if command or not re.match(r"^[A-Z_][A-Z0-9_]*=", word):
                command.append(word)
        elif command:
            yield command
            command = []


def check_command(words: list[str]) -> str | None:
    program, *arguments = words
    if program == "make":
        targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
        unknown = [word for word in arguments if "=" not in word and not word.startswith("-") and word not in targets]
        return f"no such target: {unknown[0]}" if unknown else None
    if program == "dray":
        return check_dray(cli, arguments)
    return None


def check_dray(command: click.Command, words: list[str]) -> str | None:
    """Walks the words down the command tree without running anything; returns what is wrong with them."""
    context = click.Context(command, info_name="dray")
    positional = 0
    rest = iter(words)
    for word in rest:
        if word.startswith("-") and word != "-":
            name, given, value = word.partition("=")
            option = find_option(command, context, name)
            if option is None:
                return f"no option {name}"
            if not option.is_flag and not option.count:
                value = value if given else next(rest, "")
                if isinstance(option.type, click.Choice) and value not in option.type.choices:
                    return f"{name} is one of {', '.join(map(str, option.type.choices))}, not {value!r}"
        elif isinstance(command, click.Group):
            found = command.get_command(context, word)
            if found is None:
                return f"no command {word!r}"
            command, context = found, click.Context(found, parent=context, info_name=word)
        else:
            positional += 1
    return check_positional(command, context, positional)


def find_option(command: click.Command, context: click.Context, name: str) -> click.Option | None:
    for parameter in command.get_params(context):
        if isinstance(parameter, click.Option) and name in (*parameter.opts, *parameter.secondary_opts):
            return parameter
    return None


def check_positional(command: click.Command, context: click.Context, given: int) -> str | None:
    arguments = [item for item in command.get_params(context) if isinstance(item, click.Argument)]
    least = sum(1 if item.nargs == -1 else item.nargs for item in arguments if item.required)
    most = None if any(item.nargs == -1 for item in arguments) else sum(item.nargs for item in arguments)
    if given < least or (most is not None and given > most):
        return f"{given} arguments given, {command.name} takes {least} to {most if most is not None else 'any number'}"
    return None


def check_links(page: Path) -> Iterator[str]:
    for number, line in enumerate(prose(page).splitlines(), 1):
        for target in LINK.findall(line):
            if re.match(r"^[a-z]+:", target):
                continue
            path, _, anchor = target.partition("#")
            file = (page.parent / path).resolve() if path else page
            if not file.exists():
                yield f"{page.relative_to(ROOT)}:{number}: dead link: {target}"
            elif anchor and file.suffix == ".md" and anchor not in anchors(file):
                yield f"{page.relative_to(ROOT)}:{number}: no heading for the anchor: {target}"


def anchors(page: Path) -> set[str]:
    headings = HEADING.findall(page.read_text(encoding="utf-8"))
    return {slugify(re.sub(r"[`*]|\[|\]\([^)]*\)", "", heading), "-") for heading in headings}


def check_site(site: Path) -> Iterator[str]:
    pages = list(site.rglob("*.html"))
    if not pages:
        yield "site/ is not built: run `mkdocs build --strict` first"
    for page in pages:
        for address in FOREIGN.findall(page.read_text(encoding="utf-8")):
            yield f"{page.relative_to(ROOT)}: loads {address} from another host"


def main() -> int:
    pages = [*OUTSIDE, *sorted((ROOT / "docs").rglob("*.md"))]
    with ThreadPoolExecutor(2) as pool:
        problems = [problem for found in pool.map(check_page, pages) for problem in found]
    problems += [problem for page in OUTSIDE for problem in check_links(page)]
    problems += check_site(ROOT / "site")
    for problem in problems:
        print(problem, file=sys.stderr)
    count = sum(1 for page in pages for _ in blocks(page))
    print(f"docs: {len(pages)} pages, {count} code blocks, {len(problems)} problems")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
