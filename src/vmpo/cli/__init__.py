"""The command line: one file a command; importing a file adds its command to the application."""

from __future__ import annotations

from vmpo.cli import compare, doctor, evaluate, export, lists, pretrain, prompts, sample, serve_reward, train
from vmpo.cli.app import app, main

__all__ = [
    "app",
    "compare",
    "doctor",
    "evaluate",
    "export",
    "lists",
    "main",
    "pretrain",
    "prompts",
    "sample",
    "serve_reward",
    "train",
]
