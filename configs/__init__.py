"""Shipped configs, as data: ``method/`` (compositions), ``model/`` (tuned numbers), ``data/``."""
