"""The command line: every rule of the DAG is one command that a person can also type."""

from genseg.cli.main import main

__all__ = ["main"]
