"""Packaging: everything that may change is read from settings.ini, which nbdev reads too."""

from configparser import ConfigParser
from pathlib import Path

from setuptools import find_namespace_packages, setup

parser = ConfigParser(delimiters=["="])
parser.read(Path(__file__).parent / "settings.ini", encoding="utf-8")
settings = parser["DEFAULT"]
library = settings["lib_name"]
extras = {name: settings[f"{name}_requirements"].split() for name in ("explore", "tracking", "dev")}
extras["dev"] = [*extras["explore"], *extras["tracking"], *extras["dev"]]

setup(
    version=settings["version"],
    description=settings["description"],
    author=settings["author"],
    keywords=settings["keywords"].split(),
    classifiers=[
        "Development Status :: 3 - Alpha",
        f"Intended Audience :: {settings['audience']}",
        f"Natural Language :: {settings['language']}",
        *(f"Programming Language :: Python :: {version}" for version in settings["python_versions"].split()),
        "Typing :: Typed",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    packages=find_namespace_packages(include=[library, f"{library}.*"], exclude=["*.__pycache__", "*.__pycache__.*"]),
    package_data={"": ["*.safetensors", "*.json", "*.js", "*.css", "*.md", "py.typed"]},
    include_package_data=False,
    install_requires=settings["requirements"].split(),
    extras_require=extras,
    entry_points={"console_scripts": settings["console_scripts"].split()},
    zip_safe=False,
)
