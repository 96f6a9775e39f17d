"""The command ``blaq``, a module for every stage: training, comparing, reporting, exporting, benching, shipping."""

from blaq.cli import benching, comparing, exporting, reporting, shipping, training
from blaq.cli.app import app

__all__ = ["app", "benching", "comparing", "exporting", "reporting", "shipping", "training"]
