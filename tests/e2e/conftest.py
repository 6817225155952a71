"""The fixture of a running installation, for every end-to-end test."""

from running_up import up

__all__ = ["up"]
