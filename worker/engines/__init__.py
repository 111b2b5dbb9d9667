"""Engines make pictures; ``base`` is the protocol, every other module or package is one engine."""
