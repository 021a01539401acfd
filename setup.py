"""Build script: one distribution, `fastpo`, with the import packages `fastpo` and `fastpo_kernels`.

`kernels/` is a source root like `src/`: it has no `__init__.py`, so nothing here is importable as
`kernels`, which is the name of another package that diffusers and transformers import.

The losses' C++ module for a CPU is optional: without a compiler all else is installed, and they run
on torch's operators. It uses nothing of torch when compiled, and only Python's stable ABI, so that
one wheel serves every version of both.
"""

from pathlib import Path

from setuptools import Extension, find_packages, setup

NATIVE = Path("kernels/fastpo_kernels/pair_loss/native")

setup(
    packages=find_packages(include=["fastpo", "fastpo.*"]) + find_packages("kernels"),
    package_dir={"fastpo": "fastpo", "fastpo_kernels": "kernels/fastpo_kernels"},
    ext_modules=[
        Extension(
            "fastpo_kernels.pair_loss.native._native",
            sources=sorted(map(str, NATIVE.glob("*.cpp"))),
            depends=sorted(map(str, NATIVE.glob("*.h"))),
            include_dirs=[str(NATIVE)],
            language="c++",
            extra_compile_args=[
                "-std=c++17",
                "-O3",
                "-fno-math-errno",
                "-fno-trapping-math",
                "-g0",
            ],
            py_limited_api=True,
            optional=True,
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
