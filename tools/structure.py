"""Print the packages of src/coppice: purpose, lines, and imported packages.

python tools/structure.py           print the table, and the imports that wait until a function runs
python tools/structure.py --write   put the table into docs/architecture.md

The exit status is 1 if packages or modules form an import cycle, or if a Python or C file is too
long. Modules may form a cycle only if one of the imports waits until a function runs, or is for
types alone; packages may not form any. A package here is a directory of src/coppice, or a module
directly in it.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "architecture.md"
MAX_LINES = 450
OTHERS = ("bench", "tests", "tools")
TOP = "coppice"
_GENERATED = "# Written by tools/"
_TABLE = re.compile(r"<!-- structure -->\n.*?<!-- end of structure -->\n", re.DOTALL)
_INCLUDE = re.compile(r'^#include "([^"]+)"', re.MULTILINE)
DUTIES = {
    "addresses": "the validator of published ports, egress policies and servers in guests",
    "arguments": "checks of the arguments of public calls that make no request",
    "commands": "the validator of ids, directories, signals and limits of commands in guests",
    "__init__": "the names of the public API, each imported at its first use",
    "__main__": "`python -m coppice`",
    "agent": "the protocol of the guest agent and its client: exec, connections, files, trees; the agent itself is `agent/c`",
    "agent/c": "the guest agent, in C: process 1 of every guest",
    "vmm/launcher": "the launcher of VMM processes, in C",
    "agent/random": "files for guests: OpenSSL and Node.js take every random number from the kernel",
    "boot": "kernels, their modules, and the initramfs",
    "cli": "the command line: it makes requests, and prints the results",
    "client": "the public API: hosts, managers and handles, and their blocking twins",
    "flow": "streams of bytes between servers in guests and clients, over WebSockets too",
    "completion": "blocking work in threads; cleanup that a cancellation does not interrupt",
    "content": "the content-addressed store of images, kernels, initramfs and empty disks",
    "doctor": "checks of the host, each with its cure",
    "errors": "the exception tree; the one map from error to exit code and HTTP status",
    "fork": "the plan of a fan-out, the fan-out, and VMMs that are started ahead",
    "host": "the use cases: each operation is one readable method that takes its request; recovery",
    "archive": "archives of templates: the format, the writer, and the reader of hostile ones",
    "images": "suites, tar archives, docker archives, OCI layouts and images of registries become EROFS images",
    "integrity": "the digests of captures, and `verify`",
    "lazily": "names of a package that are imported at their first use",
    "linux": "interfaces of the kernel: extents, reflinks, page maps, ptrace, control groups",
    "machine": "one instance: its directory, activation, capture, restore and end",
    "memory": "mem-files, the capture of private mappings, and the sharing report",
    "model": "plain typed data: specs, instances, captures, snapshots, reports; the transition table",
    "names": "the one validator of everything from outside",
    "network": "the provider contract, its providers `nat`, `user`, `passt` and `none`, and published ports",
    "requests": "one record per operation: parameters, defaults, descriptions, checks and result",
    "server": "the HTTP server: operations over HTTP and WebSockets, tokens, the API document",
    "snapshots": "snapshots, and restore in place",
    "state": "SQLite: records, journal, migrations; locks; the layout of the data directory; settings",
    "stopping": "cancellation of long work in threads",
    "timing": "durations of stages",
    "storage": "a file system with reflinks for the data directory",
    "trust": "the validator of certificates and proxies for guests",
    "vmm": "the driver contract, the registry of drivers, VMM processes, QEMU and Firecracker",
    "volumes": "volumes and their initial content",
}


@dataclass
class Package:
    """A directory of src/coppice, or a module directly in it."""

    name: str
    lines: int = 0  # written by hand
    generated: int = 0
    of_c: int = 0  # of the lines written by hand
    imports: set[str] = field(default_factory=set)
    later: set[str] = field(default_factory=set)  # in functions, or for types alone


@dataclass
class Structure:
    """All modules and packages below one source directory."""

    packages: dict[str, Package] = field(default_factory=dict)
    modules: dict[str, set[str]] = field(default_factory=dict)
    later: dict[str, set[str]] = field(default_factory=dict)
    includes: dict[str, set[str]] = field(default_factory=dict)
    too_long: dict[str, int] = field(default_factory=dict)

    def problems(self) -> list[str]:
        """Return a line for each cycle and each file that is too long."""
        graphs = {
            "packages": {package.name: package.imports | package.later for package in self.packages.values()},
            "modules": self.modules,
            "C files": self.includes,
        }
        found = [
            f"{kind} import each other: {' -> '.join(circle)}"
            for kind, graph in graphs.items()
            if (circle := cycle(graph))
        ]
        return found + [f"{path} has {lines} lines (at most {MAX_LINES})" for path, lines in self.too_long.items()]

    def ordered(self) -> list[Package]:
        """Return the packages so that each comes before those that it imports, else by name."""
        graph = {package.name: package.imports | package.later for package in self.packages.values()}
        level: dict[str, int] = {}
        for name in TopologicalSorter(graph).static_order():
            level[name] = 1 + max((level[imported] for imported in graph[name]), default=-1)
        return sorted(self.packages.values(), key=lambda package: (-level[package.name], package.name))

    def summary(self) -> str:
        """Return the sentence of docs/architecture.md about the number of lines."""
        counts = [(each.lines - each.of_c, each.of_c, each.generated) for each in self.packages.values()]
        python, c, generated = (sum(each) for each in zip(*counts, strict=True))
        return (
            f"Written by hand: {python:,} lines of Python and {c:,} of C, with comments and docstrings. Generated from\n"
            f"the request records and committed: {generated:,} lines of Python, the public methods and their blocking twins.\n"
        )

    def table(self) -> str:
        """Return the table of docs/architecture.md."""
        rows = ["| package | duty | by hand | generated | imports | imports later |", "|---|---|---:|---:|---|---|"]
        for package in self.ordered():
            cells = (package.name, DUTIES[package.name], package.lines, package.generated)
            arrows = (" ".join(sorted(arrows)) or "-" for arrows in (package.imports, package.later))
            rows.append(f"| {' | '.join(map(str, (*cells, *arrows)))} |")
        lines = sum(package.lines for package in self.packages.values())
        generated = sum(package.generated for package in self.packages.values())
        return "\n".join([*rows, f"| **all** | | {lines} | {generated} | | |"]) + "\n"


def structure(root: Path = ROOT) -> Structure:
    """Read all Python and C files of a checkout."""
    found, source = Structure(), root / "src"
    python = {module_name(path, source): path for path in sorted((source / TOP).rglob("*.py"))}
    for name, path in python.items():
        text = path.read_text()
        package = found.packages.setdefault(package_of(name), Package(package_of(name)))
        _count(found, package, path, text, source)
        at_once, later = imports_of(ast.parse(text), set(python))
        found.modules[name] = at_once - {name}
        if later - at_once - {name}:
            found.later[name] = later - at_once - {name}
        package.imports |= {package_of(imported) for imported in at_once} - {package.name}
        package.later |= {package_of(imported) for imported in later} - {package.name}
    for path in sorted([*(source / TOP).rglob("*.c"), *(source / TOP).rglob("*.h")]):
        name = path.parent.relative_to(source / TOP).as_posix()
        text = path.read_text()
        _count(found, found.packages.setdefault(name, Package(name)), path, text, source)
        included = {(path.parent / header).resolve() for header in _INCLUDE.findall(text)}
        found.includes[str(path)] = {str(header) for header in included if header.exists()}
    for package in found.packages.values():
        package.later -= package.imports
    for path in sorted(
        each for name in OTHERS for each in (root / name).rglob("*.*") if each.suffix in (".py", ".c", ".h")
    ):
        _require_short(found, path, len(path.read_text().splitlines()), root)
    return found


def _count(found: Structure, package: Package, path: Path, text: str, source: Path) -> None:
    lines = len(text.splitlines())
    if text.startswith(_GENERATED):
        package.generated += lines
    else:
        package.lines += lines
        package.of_c += lines if path.suffix != ".py" else 0
    _require_short(found, path, lines, source)


def _require_short(found: Structure, path: Path, lines: int, below: Path) -> None:
    if lines > MAX_LINES:
        found.too_long[path.relative_to(below).as_posix()] = lines


def module_name(path: Path, source: Path) -> str:
    """Return the dotted name of a module; a package's is that of its directory."""
    parts = path.relative_to(source).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def package_of(module: str) -> str:
    """Return the package that a module belongs to."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def imports_of(tree: ast.AST, modules: set[str]) -> tuple[set[str], set[str]]:
    """Return the modules that are imported with this one, and those imported later or for types
    alone.
    """
    found: tuple[set[str], set[str]] = (set(), set())
    for statement, waits in _imports(tree, waits=False):
        found[waits].update(_targets(statement, modules))
    return found


def _imports(node: ast.AST, *, waits: bool) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child, waits
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            for statement in child.body:
                yield from _imports(ast.Module([statement], []), waits=True)
            for statement in child.orelse:
                yield from _imports(ast.Module([statement], []), waits=waits)
        else:
            inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from _imports(child, waits=waits or inside)


def _targets(statement: ast.Import | ast.ImportFrom, modules: set[str]) -> Iterator[str]:
    """Yield the imported modules. `from a import b` imports a.b if that is a module, else a."""
    if isinstance(statement, ast.Import):
        yield from (alias.name for alias in statement.names if alias.name in modules)
        return
    for alias in statement.names:
        names = (f"{statement.module}.{alias.name}", str(statement.module))
        yield from [name for name in names if name in modules][:1]


def cycle(graph: dict[str, set[str]]) -> list[str]:
    """Return one cycle of a graph, or an empty list."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(reversed(error.args[1]))
    return []


def arrows(table: str) -> dict[str, tuple[list[str], list[str]]]:
    """Return the imports of each package in a table, immediate and later ones."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:-1]]
    return {row[0]: (row[4].split(), row[5].split()) for row in rows}


def lines(table: str) -> int:
    """Return the total number of lines in a table, including generated ones."""
    last = [cell.strip() for cell in table.splitlines()[-1].strip("|").split("|")]
    return int(last[2]) + int(last[3])


def page_table() -> str:
    """Return the table in the page."""
    block = _TABLE.search(PAGE.read_text())
    if block is None:
        raise SystemExit(f"{PAGE} has no table: add the two `structure` comments again")
    return block[0].split("-->\n\n", 1)[1].split("\n\n", 1)[0] + "\n"


def main() -> int:
    """Print or write the table, and the problems."""
    found = structure()
    if problems := found.problems():
        print("\n".join(problems), file=sys.stderr)  # noqa: T201
        return 1
    if "--write" in sys.argv[1:]:
        block = f"<!-- structure -->\n\n{found.table()}\n{found.summary()}\n<!-- end of structure -->\n"
        PAGE.write_text(_TABLE.sub(lambda _: block, PAGE.read_text()))
        return 0
    print(found.table())  # noqa: T201
    print(found.summary())  # noqa: T201
    print("Imported later: in a function, or for types alone")  # noqa: T201
    for name, imported in sorted(found.later.items()):
        print(f"  {name}: {' '.join(sorted(imported))}")  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
