"""The command line: one file a command; importing a file adds its command to the application."""

from __future__ import annotations

from vmpo.cli import compare, evaluate, lists, pretrain, sample, train
from vmpo.cli.app import app, main

__all__ = ["app", "compare", "evaluate", "lists", "main", "pretrain", "sample", "train"]
