"""The fixture of a running installation, for every end-to-end test."""

from running_up import settings, up

__all__ = ["settings", "up"]
