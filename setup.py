"""Build script: one distribution, `fastpo`, with the import packages `fastpo` and `fastpo_kernels`.

`kernels/` is a source root like `src/`: it has no `__init__.py`, so nothing here is importable as
`kernels`, which is the name of another package that diffusers and transformers import.
"""

from setuptools import find_packages, setup

setup(
    packages=find_packages(include=["fastpo", "fastpo.*"]) + find_packages("kernels"),
    package_dir={"fastpo": "fastpo", "fastpo_kernels": "kernels/fastpo_kernels"},
)
