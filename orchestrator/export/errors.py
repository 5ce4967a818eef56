"""Errors of exports and of exported models."""

from __future__ import annotations


class ExportError(ValueError):
    """A model cannot be exported, or an exported model does not compute what it should."""


class RefusedExportError(ExportError):
    """A format cannot express what was asked for: an error of the command line (exit status 2)."""


class ModelFolderError(ValueError):
    """A folder is no exported model, or a damaged one (exit status 4)."""
