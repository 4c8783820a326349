"""The folder mapping, and nothing else; everything that can be said in pyproject.toml is said there.

Discovery walks all three folders, so a new sub-package can't be forgotten.
"""

from setuptools import find_packages, setup

MAPPED = {"autoprune": "autoprune", "autoprune.agents": "agents", "autoprune.search_spaces": "search_spaces"}

setup(
    package_dir=MAPPED,
    packages=[
        package
        for name, folder in MAPPED.items()
        for package in (name, *(f"{name}.{inner}" for inner in find_packages(folder)))
    ],
    package_data={"autoprune": ["py.typed"]},
)
