"""Builds sdist and wheel, looks into them, and uses the wheel where nothing else is installed: `make release-check`.

That environment has torch, einops, numpy and safetensors with what they need. tests/smoke.py runs there twice: with the
newest versions of the last three, and with the lowest that pyproject.toml allows.
"""

import argparse
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import venv
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCES = (".cu", ".cuh", ".cpp", ".h")  # of kernels, compiled where they run
SMOKE = Path(__file__).with_name("smoke.py")
FOREIGN = ("tests", "docs", "benchmarks", "examples")


def main() -> None:
    """Check a release; an exception says what is wrong with it."""
    parser = argparse.ArgumentParser(prog="python -m tests.release", description=__doc__.splitlines()[0])
    parser.add_argument("--torch", default="torch", help="what pip installs as torch, such as torch==2.13.0")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run(sys.executable, "-m", "build", "--outdir", folder, cwd=ROOT)
        (wheel,), (sdist,) = Path(folder).glob("*.whl"), Path(folder).glob("*.tar.gz")
        check(wheel.name, wheel_files(wheel))
        check(sdist.name, sdist_files(sdist))
        use(wheel, given.torch, Path(folder) / "empty")


def wheel_files(wheel: Path) -> list[str]:
    """Return the names of files in a wheel, its licence as LICENSE."""
    with zipfile.ZipFile(wheel) as file:
        return [re.sub(r"^[^/]*\.dist-info/licenses/", "", name) for name in file.namelist()]


def sdist_files(sdist: Path) -> list[str]:
    """Return the names of files in an sdist, without its folder."""
    with tarfile.open(sdist) as file:
        return [member.name.partition("/")[2] for member in file if member.isfile()]


def check(archive: str, files: list[str]) -> None:
    """Print how many files an archive has, or raise ValueError."""
    if problems := faults(files, package_files()):
        raise ValueError("\n".join([f"{archive} is not whole:", *problems]))
    kernels = sum(name.endswith(SOURCES) for name in files)
    print(f"{archive}: {len(files)} files, {kernels} of them sources of kernels, license, no tests")


def package_files() -> set[str]:
    """Return the files of the package that git knows."""
    listed = subprocess.run(["git", "ls-files", "swan"], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(listed.stdout.split())


def faults(files: list[str], package: Iterable[str]) -> list[str]:
    """Say what an archive lacks of the package and the license, and what it should not have."""
    missing = sorted({*package, "LICENSE"} - set(files))
    foreign = [name for name in files if name.split("/")[0] in FOREIGN or name.endswith(".pyc")]
    return [f"{name} is missing" for name in missing] + [f"{name} should not be there" for name in foreign]


def use(wheel: Path, torch: str, folder: Path) -> None:
    """Install a wheel into an environment of its own, and run the smoke test there."""
    venv.create(folder, with_pip=True)
    python = str(folder / ("Scripts" if sys.platform == "win32" else "bin") / "python")
    pip = [python, "-m", "pip", "-qq", "--disable-pip-version-check", "install"]
    run(*pip, torch)
    run(*pip, str(wheel))
    smoke = [python, "-I", str(SMOKE)]
    empty = {"PATH": str(Path(python).parent), "TORCH_EXTENSIONS_DIR": str(folder / "built")}  # no compiler, no kernels
    run(*smoke, cwd=folder, env=os.environ | empty)
    run(*pip, *lowest(["einops", "numpy", "safetensors"]))
    run(*smoke, cwd=folder, env=os.environ | empty)


def lowest(names: Iterable[str]) -> list[str]:
    """Return the lowest version of each package that pyproject.toml allows, as pip takes it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = [*project["dependencies"], *project["optional-dependencies"]["hf"]]
    bounds = dict(requirement.split(">=") for requirement in needed if ">=" in requirement)
    return [f"{name}=={bounds[name]}" for name in names]


def run(*command: str, cwd: Path | None = None, env: Mapping[str, str] | None = None) -> None:
    """Run a command that must succeed."""
    subprocess.run(command, cwd=cwd, env=env, check=True)


if __name__ == "__main__":
    main()
