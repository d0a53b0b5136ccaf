"""Maps the three top-level folders to one package; everything else stands in pyproject.toml."""

from setuptools import find_packages, setup

library = find_packages(
    include=["tvm_hquant", "tvm_hquant.*"], exclude=["tvm_hquant.passes*", "tvm_hquant.target_specs*"]
)

setup(
    packages=[*library, "tvm_hquant.passes", "tvm_hquant.target_specs"],
    package_dir={
        "tvm_hquant": "tvm_hquant",
        "tvm_hquant.passes": "passes",
        "tvm_hquant.target_specs": "target_specs",
    },
)
