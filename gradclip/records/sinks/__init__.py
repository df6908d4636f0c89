"""Sinks: each module writes logged steps to one kind of destination."""
