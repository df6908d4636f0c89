"""Sinks, one a file: each writes the rows of logged steps to one kind of destination."""
