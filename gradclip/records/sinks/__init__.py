"""Destinations of logged steps, one a file."""
