"""The one place of the version: the package metadata, the C++ engine and run folders read it from here."""

__version__ = "0.1.0"
