"""A few fast tests in the oldest and newest environments that are supported.

    make test-matrix
    python tests/matrix.py oldest-tensordict       # one of them

Each environment is kept in `.matrix/`: the first time torch is downloaded for each, which may take
gigabytes. A Python that the machine lacks is left out, and said so. Prints a table for
`docs/stability.md`.
"""

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

# Name: Python, requirement of torch, requirement of tensordict. tensordict 0.15.0 needs torch 2.13.
ENVIRONMENTS = {
    "oldest-torch": ("3.11", "torch==2.11.0", "tensordict==0.15.3"),
    "oldest-tensordict": ("3.11", "torch==2.13.0", "tensordict==0.15.0"),
    "python-3.12": ("3.12", "torch", "tensordict"),
    "newest": ("3.13", "torch", "tensordict"),
}

TESTS = ["test_random.py", "test_tree.py", "test_terms.py", "test_kernel.py", "test_sampling.py"]


def python_of(version: str) -> str | None:
    """The interpreter of a version, if there is one that runs."""
    for each in (f"python{version}", *Path.home().glob(f".pyenv/versions/{version}.*/bin/python")):
        path = shutil.which(each)
        if path and subprocess.run([path, "-c", ""], capture_output=True).returncode == 0:
            return path
    return None


def make(name: str) -> Path | None:
    """The interpreter of an environment, which is made if it is not there."""
    version, *requirements = ENVIRONMENTS[name]
    folder = ROOT / ".matrix" / name
    python = folder / "bin" / "python"
    if not python.exists():
        base = python_of(version)
        if base is None:
            return None
        subprocess.run([base, "-m", "venv", folder], check=True)
        pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, *requirements, f"{ROOT}[diagnostics,test]", "pytest"], check=True)
    return python


def main(names: list[str]) -> int:
    rows, failed = [], 0
    for name in names:
        python = make(name)
        if python is None:
            rows.append(f"| {name} | Python {ENVIRONMENTS[name][0]} is not there | | | not run |")
            continue
        code = (
            "import platform, tensordict, torch;"
            "print(platform.python_version(), torch.__version__, tensordict.__version__, sep=' | ')"
        )
        said = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
        command = [python, "-m", "pytest", "-q", "-x", "-m", "not slow", "-p", "no:cacheprovider"]
        tests = [ROOT / "tests" / each for each in TESTS]
        found = subprocess.run([*command, *tests], cwd=ROOT, capture_output=True, text=True)
        print(found.stdout, found.stderr, flush=True)
        failed += found.returncode != 0
        verdict = found.stdout.strip().splitlines()[-1].strip("= ")
        rows.append(f"| {name} | {said.stdout.strip()} | {verdict} |")
    print("| environment | Python | torch | tensordict | tests |\n|---|---|---|---|---|")
    print("\n".join(rows))
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or list(ENVIRONMENTS)))
