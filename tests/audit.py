"""Licences and known vulnerabilities of what is installed beside swan; `make check` runs it.

Licences are those that the packages declare. Vulnerabilities come from pip-audit, which asks the package index: where
that cannot be asked or has no records, a line says so and nothing fails.
"""

import json
import re
import subprocess
import sys
import tempfile
from importlib.metadata import PackageMetadata, distributions
from typing import Any

PERMISSIVE = re.compile(
    r"0BSD|Apache|BSD|BSL-1\.0|CC0|CNRI|ISC|MIT|Mozilla Public License 2|MPL-2\.0|PSF|Python Software Foundation|Zlib"
)
COPYLEFT = re.compile(r"GPL|General Public License")
KNOWN = {  # other licences, each looked at
    "chardet": "LGPL; lm-eval brings it (extra lm-eval), swan does not import it",
    "torchao": "declares none; its LICENSE file is BSD-3-Clause (extra test)",
}
NVIDIA = "nvidia-"  # libraries of CUDA, which CUDA builds of torch bring along, under NVIDIA's terms


def main() -> int:
    """Print what must be looked at and a line on each subject; return 1 if anything must."""
    packages = {re.sub(r"[-_.]+", "-", d.metadata["Name"]).lower(): d.metadata for d in distributions()}
    packages.pop("swan-attention", None)
    findings = [*check_licences(packages), *check_vulnerabilities(packages)]
    print(*findings, sep="\n", end="\n" if findings else "")
    return int(bool(findings))


def check_licences(packages: dict[str, PackageMetadata]) -> list[str]:
    """Return a line for each package whose licence is neither permissive nor known."""
    known = sorted(name for name in packages if name in KNOWN or name.startswith(NVIDIA))
    licences = {name: licence(metadata) for name, metadata in packages.items() if name not in known}
    print(f"licences of {len(packages)} packages: permissive, or known: {', '.join(known) or 'none'}")
    return [f"{name}: {text or 'no licence'}" for name, text in licences.items() if not is_permissive(text)]


def licence(metadata: PackageMetadata) -> str:
    """Return what a package declares: an expression, else classifiers, else the first line of its text."""
    classifiers = [c.split(" :: ") for c in metadata.get_all("Classifier") or []]
    named = [words[-1] for words in classifiers if words[0] == "License" and words[-1] != "OSI Approved"]
    first_line = (metadata.get("License") or "").strip().partition("\n")[0]
    return metadata.get("License-Expression") or " AND ".join(named) or first_line


def is_permissive(text: str) -> bool:
    """Tell if all licences joined by AND, and of those joined by OR any, are permissive."""
    choices = [part.split(" OR ") for part in text.split(" AND ")]
    return all(any(PERMISSIVE.search(name) and not COPYLEFT.search(name) for name in names) for names in choices)


def check_vulnerabilities(packages: dict[str, PackageMetadata]) -> list[str]:
    """Return a line for each known vulnerability of a package; pip is the environment's, not ours."""
    pins = {name: metadata["Version"].split("+")[0] for name, metadata in packages.items() if name != "pip"}
    try:
        known = ask({"numpy": pins["numpy"]}) and ask(pins)  # one question before many
    except RuntimeError as error:
        print(f"vulnerabilities: not looked up, {error}")
        return []
    if not known:
        print("vulnerabilities: not looked up, the package index has no records of any")
        return []
    lines = [f"{row['name']} {row['version']}: {hole(v)}" for row in known for v in row["vulns"]]
    print(f"vulnerabilities of {len(known)} packages: {len(lines)}; no records of {len(pins) - len(known)}")
    return lines


def hole(vulnerability: dict[str, Any]) -> str:
    """Name a vulnerability, and the versions without it."""
    return f"{vulnerability['id']}, fixed in {', '.join(vulnerability['fix_versions']) or 'no version'}"


def ask(pins: dict[str, str]) -> list[dict[str, Any]]:
    """Return the rows of pip-audit for those packages that the index has records of.

    Raises:
        RuntimeError: there is no pip-audit, or it could not ask.
    """
    options = ["--no-deps", "--disable-pip", "--format=json", "--progress-spinner=off"]
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.writelines(f"{name}=={version}\n" for name, version in pins.items())
        file.flush()
        command = [sys.executable, "-m", "pip_audit", "--requirement", file.name, *options]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        return [row for row in json.loads(done.stdout)["dependencies"] if "vulns" in row]
    except json.JSONDecodeError as error:
        raise RuntimeError(done.stderr.strip().rpartition("\n")[2][:200]) from error


if __name__ == "__main__":
    sys.exit(main())
