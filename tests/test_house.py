"""The rules of the house: how deimkit is laid out and spoken about, checked without running any of it."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "deimkit"
SOURCES = sorted(PACKAGE.rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))

# The order of the data is the order of reading; an import may only point to the same room or to one further up.
ROOMS = [
    "errors",
    "structures",
    "boxes",
    "ranks",
    "distribution",
    "data",
    "models",
    "matching",
    "losses",
    "criterion",
    "training",
    "evaluation",
    "explore",
    "deploy",
    "recipes",
    "weights",
    "api",
    "shipping",
    "examples",
    "arguments",
    "__main__",
]

# Methods that PyTorch and Python name and describe; ours say more only where they do more.
INHERITED = {"forward", "extra_repr", "step", "zero_grad", "state_dict", "load_state_dict"}


def files(paths: list[Path]) -> pytest.MarkDecorator:
    """One test per file, named by its path from the root."""
    return pytest.mark.parametrize("path", paths, ids=[str(p.relative_to(ROOT)) for p in paths])


def tree(path: Path) -> ast.Module:
    """The syntax tree of a file."""
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


# ---------------------------------------------------------------------------------------------------- imports


def room_of(module: str) -> str:
    """The room a dotted name leads to: "deimkit.data.loader" -> "data"; "" for deimkit itself."""
    return module.split(".")[1] if "." in module else ""


def height(room: str) -> int:
    """How far down a room lies; what is no room is the public face, which draws on everything that api does."""
    return ROOMS.index(room if room in ROOMS else "api")


def at_import(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements that run when a module is imported.

    Functions run later: an import inside one is how a lower room is reached on purpose (`Detections.plot` draws with
    explore), so they are left out. `if TYPE_CHECKING:` never runs: a name there is a hint, not a dependency.
    """
    for statement in body:
        if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if isinstance(statement, ast.If) and "TYPE_CHECKING" in ast.unparse(statement.test):
            yield from at_import(statement.orelse)
            continue
        yield statement
        for part in ("body", "orelse", "finalbody"):
            yield from at_import(getattr(statement, part, []))
        for handler in getattr(statement, "handlers", []):
            yield from at_import(handler.body)


def imported(module: ast.Module, package: tuple[str, ...]) -> Iterator[tuple[int, str]]:
    """(line, room) of every import of deimkit that runs when a module of `package` is imported."""
    for statement in at_import(module.body):
        if isinstance(statement, ast.Import):
            names = [alias.name for alias in statement.names]
        elif isinstance(statement, ast.ImportFrom):
            above = package[: len(package) - statement.level + 1] if statement.level else ()
            base = ".".join([*above, *([statement.module] if statement.module else [])])
            names = [f"{base}.{alias.name}" for alias in statement.names]
        else:
            continue
        for name in names:
            if name.split(".")[0] == "deimkit":
                yield statement.lineno, room_of(name)


@files([path for path in SOURCES if path != PACKAGE / "__init__.py"])
def test_imports_point_upwards_only(path: Path) -> None:
    own = path.relative_to(PACKAGE).with_suffix("").parts[0]
    assert own in ROOMS, f"{own} is not in the list of rooms; say where it stands in ROOMS and in README.md"
    package = path.relative_to(ROOT).parts[:-1]
    below = [
        f"line {line} imports {room}" for line, room in imported(tree(path), package) if height(room) > height(own)
    ]
    assert not below, f"{own} stands above: {'; '.join(below)}"


@pytest.mark.parametrize(
    "code, rooms",
    [
        ("import deimkit.models.decoder", ["models"]),
        ("from deimkit import recipes, errors", ["recipes", "errors"]),
        ("from ..losses import MAL", ["losses"]),
        ("from .images import read_image", ["data"]),
        ("from . import images", ["data"]),
        ("try:\n    import deimkit.api\nexcept ImportError:\n    from deimkit.weights import a", ["api", "weights"]),
        ("class A:\n    from deimkit.api import b", ["api"]),
        ("def f():\n    import deimkit.api", []),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import deimkit.api", []),
        ("import torch", []),
    ],
)
def test_imports_are_seen(code: str, rooms: list[str]) -> None:
    assert [room for _, room in imported(ast.parse(code), ("deimkit", "data"))] == rooms


# --------------------------------------------------------------------------------------------------- docstrings


def speaks_for_itself(node: ast.AST) -> bool:
    """True for a method of one expression: `def width(self): return self.corners[2] - self.corners[0]`."""
    body = getattr(node, "body", [])
    return len(body) == 1 and isinstance(body[0], (ast.Return, ast.Expr)) and not isinstance(node, ast.ClassDef)


def public(body: list[ast.stmt], inside: str = "") -> Iterator[tuple[str, ast.AST]]:
    """(name, node) of the public functions, classes and methods; a property's setter speaks through its getter."""
    for node in body:
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) or node.name.startswith("_"):
            continue
        if inside and (node.name in INHERITED or speaks_for_itself(node)):
            continue
        if any(ast.unparse(mark).endswith((".setter", "overload")) for mark in node.decorator_list):
            continue
        yield f"{inside}{node.name}", node
        if isinstance(node, ast.ClassDef):
            yield from public(node.body, f"{node.name}.")


@files(SOURCES)
def test_public_names_begin_with_a_sentence(path: Path) -> None:
    silent = []
    for name, node in public(tree(path).body):
        first = (ast.get_docstring(node) or "").partition("\n")[0]
        if not first.endswith("."):
            silent.append(f"{name} (line {node.lineno})")
    assert not silent, f"no docstring whose first line is a sentence: {', '.join(silent)}"


@files(SOURCES + TESTS)
def test_files_say_what_they_are_for(path: Path) -> None:
    assert ast.get_docstring(tree(path)), "a file begins with a docstring: one module, one idea"


# ------------------------------------------------------------------------------------------------------ manners


def rudeness(module: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, what) of prints, exits and swallowed errors."""
    for node in ast.walk(module):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "print":
            yield node.lineno, "prints"
        if isinstance(node, ast.Call) and ast.unparse(node.func) in (
            "sys.exit",
            "os._exit",
            "exit",
            "quit",
            "SystemExit",
        ):
            yield node.lineno, "exits"
        if isinstance(node, ast.ExceptHandler):
            caught = ast.unparse(node.type) if node.type else ""
            silent = all(isinstance(step, (ast.Pass, ast.Continue)) for step in node.body)
            if not caught:
                yield node.lineno, "has a bare except"
            elif silent and re.search(r"\b(Base)?Exception\b", caught):
                yield node.lineno, "swallows every error"


@files(SOURCES)
def test_library_is_quiet_and_honest(path: Path) -> None:
    found = [(line, what) for line, what in rudeness(tree(path))]
    if path.name == "__main__.py":  # the command line is the one place that speaks to a terminal and has an exit code
        found = [(line, what) for line, what in found if what not in ("prints", "exits")]
    assert not found, "; ".join(f"line {line} {what}" for line, what in found)


@pytest.mark.parametrize(
    "code, what",
    [
        ("print(1)", ["prints"]),
        ("import sys\nsys.exit(1)", ["exits"]),
        ("raise SystemExit(1)", ["exits"]),
        ("try:\n    f()\nexcept:\n    g()", ["has a bare except"]),
        ("try:\n    f()\nexcept Exception:\n    pass", ["swallows every error"]),
        ("try:\n    f()\nexcept (OSError, BaseException):\n    pass", ["swallows every error"]),
        ("try:\n    f()\nexcept KeyError:\n    pass", []),
        ("try:\n    f()\nexcept Exception as e:\n    raise ValueError from e", []),
    ],
)
def test_rudeness_is_seen(code: str, what: list[str]) -> None:
    assert [w for _, w in rudeness(ast.parse(code))] == what


@files(SOURCES)
def test_nothing_is_put_off(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    marks = [i for i, line in enumerate(lines, 1) if re.search(r"#.*\b(TODO|FIXME|XXX|HACK)\b", line)]
    assert not marks, f"lines {marks}: do it, or say in CHANGELOG.md or an issue why not"


# ------------------------------------------------------------------------------------------------------- README

README = (ROOT / "README.md").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, re.M | re.S)
PROSE = re.sub(r"^```.*?^```", "", README, flags=re.M | re.S)
PYTHON = [code for language, code in BLOCKS if language == "python"]
SHELL = [line for language, code in BLOCKS if language in ("", "sh", "bash", "console") for line in code.splitlines()]


def anchor(heading: str) -> str:
    """How a heading is addressed within a page."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def test_readme_links_lead_somewhere() -> None:
    anchors = {anchor(heading) for heading in re.findall(r"^#+ (.*)$", PROSE, re.M)}
    links = re.findall(r"\]\(([^)\s]+)\)", PROSE)
    dead = [
        link
        for link in links
        if "//" not in link
        and not (link[1:] in anchors if link.startswith("#") else (ROOT / link.partition("#")[0]).exists())
    ]
    assert links and not dead


def test_readme_opens_with_the_two_commands() -> None:
    first = BLOCKS[0][1]
    assert "make demo" in first and "make test" in first and README.index("```") < 1000


def test_readme_makes_what_the_makefile_has() -> None:
    targets = set(re.findall(r"^([a-z]+):", MAKEFILE, re.M))
    # in prose a command stands between backticks; "make" is also a word
    named = re.findall(r"`make ([a-z]+)", PROSE) + re.findall(r"^make ([a-z]+)", "\n".join(SHELL), re.M)
    assert {"demo", "test"} <= set(named) <= targets


def test_readme_commands_are_understood() -> None:
    """Every `deimkit ...` line parses: the verb, its flags and its values exist."""
    from deimkit.arguments import build_parser

    commands = [shlex.split(line, comments=True) for line in SHELL if line.startswith("deimkit ")]
    for command in commands:
        try:
            build_parser().parse_args(command[1:])
        except SystemExit:
            pytest.fail(f"README.md: {shlex.join(command)} is not understood")
    assert commands


@pytest.mark.parametrize("code", PYTHON, ids=range(len(PYTHON)))
def test_readme_python_compiles_and_its_names_exist(code: str) -> None:
    import deimkit

    names = {
        node.attr
        for node in ast.walk(ast.parse(code))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "dk"
    }
    assert names <= set(dir(deimkit))


def test_readme_recipes_exist() -> None:
    import deimkit

    named = re.findall(r"""dk\.(?:train|build|load)\("(\w+)"|dk\.recipes\.(\w+)|deimkit train (\w+)""", README)
    assert named and {name for names in named for name in names if name} <= set(deimkit.recipes.names())


def test_readme_names_every_room() -> None:
    """The table for those who carry on the work lists the rooms in the order that the imports keep."""
    rows = re.findall(r"^\| `([\w/.]+)` \|", PROSE, re.M)
    listed = [name.removesuffix("/").removesuffix(".py") for name in rows]
    assert [name for name in listed if name in ROOMS] == ROOMS


# ---------------------------------------------------------------------------------------------------- notebooks

LONGEST_CELL = 24  # lines; what does not fit belongs into the package
LARGEST_OUTPUT = 2_000_000  # bytes a notebook; a picture or two, not a film


@pytest.mark.skipif(not NOTEBOOKS, reason="no notebooks yet")
@files(NOTEBOOKS)
def test_notebook_is_clean(path: Path) -> None:
    book = nbformat.read(path, as_version=4)
    nbformat.validate(book)
    text = path.read_text(encoding="utf-8")
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    long = [i for i, cell in enumerate(code) if len(cell.source.splitlines()) > LONGEST_CELL]
    errors = [out.ename for cell in code for out in cell.outputs if out.output_type == "error"]
    size = sum(len(str(out)) for cell in code for out in cell.outputs)
    local = re.findall(r"(?<![\w.])/(?:home|Users|root|tmp|work|mnt|opt)/[\w.-]+|\b[A-Z]:\\\\\w+", text)
    assert not long, f"code cells {long} are longer than {LONGEST_CELL} lines"
    assert not errors, f"outputs hold errors: {errors}"
    assert not local, f"paths of one machine: {local}"
    assert size < LARGEST_OUTPUT, f"outputs hold {size} bytes"


# ---------------------------------------------------------------------------------------------------- addresses

# Where packages come from is a matter of the machine, so no file says it. Written so that no pattern matches itself.
ADDRESSES = re.compile(
    r"py[p]i\.|[p]ythonhosted\.|[a]naconda\.(org|com)|[r]egistry\.npmjs|pytorch\.org/[w]hl|://\S+/[s]imple\b"
    r"|--(extra-)?[i]ndex-url|--[f]ind-links",
    re.I,
)


def test_no_file_names_a_package_index() -> None:
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if listing.returncode:
        pytest.skip("not a git checkout, so nothing says which files belong to deimkit")
    tracked = [ROOT / name for name in listing.stdout.splitlines() if (ROOT / name).is_file()]
    found = [
        f"{path.relative_to(ROOT)}: {match.group()}"
        for path in tracked
        if (match := ADDRESSES.search(path.read_text(encoding="utf-8", errors="ignore")))
    ]
    assert tracked and not found
