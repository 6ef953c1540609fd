"""Installs qdbev as an editable clone only: `pip install -e .`.

The stages are packages with generic names (train, export, engine, eval, ...). Copied into site-packages they would shadow, or be
shadowed by, packages of other projects, so a wheel of this project is never built.
"""

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel


class RefusedWheel(bdist_wheel):
    """The command behind `pip install .` and `pip wheel .`; an editable installation does not run it."""

    def run(self) -> None:
        """End with the command that installs the project."""
        raise SystemExit(
            "error: qdbev installs only as an editable clone: run `pip install -e .` in the clone. A copy in site-packages would put "
            "packages with the generic names train, export, engine, eval and others beside those of other projects."
        )


setup(cmdclass={"bdist_wheel": RefusedWheel})
