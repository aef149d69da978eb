"""Which folders are installed: mvle, its recipes as mvle.configs, and the kernel library mvle_kernels.

Metadata is in pyproject.toml.
"""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["mvle", "mvle.*"]),
        "mvle.configs",
        *find_packages("kernels"),
    ],
    package_dir={"mvle": "mvle", "mvle.configs": "configs", "mvle_kernels": "kernels/mvle_kernels"},
    package_data={
        "mvle.configs": ["*.yaml", "*/*.yaml"],
        "mvle": ["py.typed"],
        "mvle_kernels": ["py.typed", "*.json", "baselines/*.json"],
    },
)
