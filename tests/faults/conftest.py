from tests.support.forks import _children, children

__all__ = ["_children", "children"]  # fixtures
