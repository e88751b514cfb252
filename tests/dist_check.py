"""Builds wheel and sdist, installs each into a clean environment, and tries it there.

    make dist-check

The environment and all else is in a temporary folder; `python -m build` makes the wheel from the
sdist, so that nothing of the working tree can be missing from either.
"""

import shutil
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
# At the top of a wheel there may be nothing else.
PACKAGES = {"compat", "funcsgmcmc"}


def run(*command: object, cwd: Path) -> None:
    print("$", *command, flush=True)
    subprocess.run([str(each) for each in command], cwd=cwd, check=True)


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run(sys.executable, "-m", "build", "--outdir", folder / "dist", ROOT, cwd=folder)
        (wheel,) = (folder / "dist").glob("*.whl")
        (sdist,) = (folder / "dist").glob("*.tar.gz")
        top = {each.partition("/")[0] for each in zipfile.ZipFile(wheel).namelist()}
        assert {each for each in top if not each.endswith(".dist-info")} == PACKAGES, top

        venv.create(folder / "venv", with_pip=True)
        python = folder / "venv" / "bin" / "python"
        shutil.copy(ROOT / "tests" / "smoke.py", folder)
        pip = (python, "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt")
        run(*pip, f"{wheel}[diagnostics]", cwd=folder)
        run(python, "smoke.py", cwd=folder)
        run(python, "-m", "funcsgmcmc.info", cwd=folder)
        run(*pip, "--force-reinstall", "--no-deps", sdist, cwd=folder)
        run(python, "smoke.py", cwd=folder)
        print(f"{wheel.name} and {sdist.name} install and run")


if __name__ == "__main__":
    main()
