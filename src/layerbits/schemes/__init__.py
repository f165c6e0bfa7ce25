"""Schemes: recorded scores → an assignment of candidates to groups. Imports neither torch nor mlflow."""

from layerbits.schemes.scheme import Scheme, load_scheme

__all__ = ["Scheme", "load_scheme"]
