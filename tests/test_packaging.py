"""pyproject.toml, requirements.lock and environment.yml say the same, and `import deimkit` stays light."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
ENVIRONMENT = yaml.safe_load((ROOT / "environment.yml").read_text())
MAKEFILE = (ROOT / "Makefile").read_text()
LOCK = [
    Requirement(line.partition("#")[0])
    for line in (ROOT / "requirements.lock").read_text().splitlines()
    if line.partition("#")[0].strip()
]
EXTRAS = PROJECT["project"]["optional-dependencies"]
DIRECT = [
    Requirement(text)
    for text in [
        *PROJECT["project"]["dependencies"],
        *(text for extra in EXTRAS.values() for text in extra),
        *PROJECT["build-system"]["requires"],
    ]
]
PYTHONS = [
    label.rpartition(" :: ")[2]
    for label in PROJECT["project"]["classifiers"]
    if re.fullmatch(r"Programming Language :: Python :: 3\.\d+", label)
]


def conda(name: str) -> str:
    """What environment.yml asks of one of conda's packages."""
    return next(line.removeprefix(name).strip() for line in ENVIRONMENT["dependencies"] if str(line).startswith(name))


PIP = next(entry["pip"] for entry in ENVIRONMENT["dependencies"] if isinstance(entry, dict))


@pytest.mark.parametrize("wanted", DIRECT, ids=str)
def test_every_dependency_is_locked_at_a_version_it_allows(wanted: Requirement) -> None:
    locked = [pin for pin in LOCK if canonicalize_name(pin.name) == canonicalize_name(wanted.name)]
    assert locked, "not in requirements.lock: run `make lock`"
    for pin in locked:
        (exact,) = pin.specifier
        assert wanted.specifier.contains(exact.version, prereleases=True), f"locked at {exact.version}: run `make lock`"


def test_lock_is_exact() -> None:
    assert all([spec.operator for spec in pin.specifier] == ["=="] and "*" not in str(pin.specifier) for pin in LOCK)
    assert not [str(pin) for pin in LOCK if pin.url or pin.extras]


def test_conda_installs_the_same_set_as_make() -> None:
    extras = re.search(r"^EXTRAS\s*:= (\S+)$", MAKEFILE, re.M)
    assert extras and set(extras[1].split(",")) <= set(EXTRAS)
    assert ["--constraint requirements.lock", f"--editable .[{extras[1]}]"] == PIP
    assert {"make", "git", "pip"} <= {line for line in ENVIRONMENT["dependencies"] if isinstance(line, str)}


def test_files_agree_on_python() -> None:
    oldest, newest = Version(PYTHONS[0]), Version(PYTHONS[-1])
    minors = [f"3.{minor}" for minor in range(oldest.minor, newest.minor + 1)]
    asked = SpecifierSet(PROJECT["project"]["requires-python"])
    tested = SpecifierSet(conda("python"))
    around = [f"3.{minor}" for minor in range(oldest.minor - 1, newest.minor + 2)]

    assert minors == PYTHONS
    assert [v for v in around if v in tested] == PYTHONS
    assert [v for v in around if v in asked][0] == PYTHONS[0]
    assert PROJECT["tool"]["ruff"]["target-version"] == f"py{PYTHONS[0].replace('.', '')}"
    assert PROJECT["tool"]["mypy"]["python_version"] == PYTHONS[0]
    assert f"--python-version {PYTHONS[0]} " in MAKEFILE
    assert f"({oldest.major}, {oldest.minor}) <= sys.version_info < (3, {newest.minor + 1})" in MAKEFILE


@pytest.mark.parametrize("name", ["pyproject.toml", "requirements.lock", "environment.yml"])
def test_no_addresses(name: str) -> None:
    assert not re.findall(r".*https?:.*|.*\bfile:.*|.* @ .*", (ROOT / name).read_text())


def test_versions_agree() -> None:
    import deimkit

    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert newest and newest[1] == PROJECT["project"]["version"] == deimkit.__version__


def test_license_is_apache_2() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert PROJECT["project"]["license"] == "Apache-2.0"
    assert "Version 2.0, January 2004" in text and "END OF TERMS AND CONDITIONS" in text


def test_wheel_holds_the_package_and_nothing_else(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        names = [name for name in wheel.namelist() if ".dist-info/" not in name]
        entry_points = next(wheel.read(n).decode() for n in wheel.namelist() if n.endswith("entry_points.txt"))
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "deimkit").rglob("*.py")}
    assert {"deimkit/py.typed", *sources} <= set(names)
    assert all(name.startswith("deimkit/") for name in names)
    assert "deimkit = deimkit.__main__:main" in entry_points


def test_make_help_lists_every_target() -> None:
    listed = subprocess.run(["make", "help"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    phony = re.search(r"^\.PHONY: (.*)$", MAKEFILE, re.M)
    assert phony and re.findall(r"^  make ([a-z]+)", listed, re.M) == phony[1].split()
    assert {"setup", "demo", "lab", "test", "check", "notebooks", "bench"} <= set(phony[1].split())


def test_ci_only_calls_make() -> None:
    script = ROOT / ".ci" / "run"
    commands = [line for line in script.read_text().splitlines() if line and not line.startswith("#")]
    assert script.stat().st_mode & 0o100
    assert commands == ["set -eu", 'cd "$(dirname "$0")/.."', "exec make check test"]


def test_importing_deimkit_loads_no_heavy_library() -> None:
    """What an import costs in seconds is for `make bench`; what would make it slow is known by name."""
    code = "import sys, deimkit; dir(deimkit); print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT).stdout
    heavy = {"torch", "torchvision", "numpy", "scipy", "pandas", "PIL", "cv2"}
    heavy |= {"matplotlib", "plotly", "pycocotools", "IPython"}
    assert "deimkit" in loaded.split()
    assert not heavy & set(loaded.split())
