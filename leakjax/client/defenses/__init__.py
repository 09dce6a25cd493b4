"""Defenses by name: what a client does to its gradient before it is sent. Adding one adds a line to `DEFENSES`."""

from leakjax.client.defenses.registry import CUSTOM, DEFENSES, Client, Defense, Parameter, Setting, build_defense
from leakjax.client.defenses.server import Server

__all__ = ["CUSTOM", "DEFENSES", "Client", "Defense", "Parameter", "Server", "Setting", "build_defense"]
