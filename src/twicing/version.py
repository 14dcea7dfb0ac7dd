"""The version, in one place: read by the build, by records of results, and by `twicing env`."""

__version__ = "0.1.0"
