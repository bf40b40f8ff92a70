"""Parts of methods for long streams of edits: solvers, terms of the target objective, and rules of the search."""

__all__: list[str] = []
