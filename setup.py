"""Add the repository's folders of data to `cogvideox_sat`, which pyproject.toml cannot do."""

import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

SHIPPED = "cogvideox_sat.shipped"
# The folders with the names of the files to include.
FOLDERS = {
    "configs": ["*.yaml", "*.txt"],
    "configs/parts": ["*.yaml"],
    "configs/tiny": ["*.yaml"],
    "assets/tiny": ["*.safetensors", "README.md", "SHA256SUMS"],
    "assets/tiny/t5": ["*"],
}


class BuildFromNothing(build_py):
    """A build that first removes the results of earlier builds, such as renamed modules."""

    def run(self) -> None:
        if not self.editable_mode and Path(self.build_lib).is_dir():
            shutil.rmtree(self.build_lib)
        super().run()


packages = {f"{SHIPPED}.{folder.replace('/', '.')}": folder for folder in FOLDERS}
setup(
    # sat/ holds top-level modules and must never become a package: `import sat` is SwissArmyTransformer.
    packages=[*find_packages("sat"), *find_packages(include=["sgm*", "vae_modules*"]), *packages],
    package_dir={"": "sat", "sgm": "sgm", "vae_modules": "vae_modules", **packages},
    package_data={
        **{name: FOLDERS[folder] for name, folder in packages.items()},
        "cogvideox_sat.web": ["style.css"],
        # PEP 561: type checkers of programs that import these packages then use their annotations.
        **{name: ["py.typed"] for name in ("cogvideox_sat", "sgm", "vae_modules")},
    },
    cmdclass={"build_py": BuildFromNothing},
)
