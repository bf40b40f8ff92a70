"""cakeflow: knowledge editing for transformer language models."""

import lazy_loader

# what is exported stands in __init__.pyi; it is imported on first use, since torch and its kin take seconds
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

__version__ = "0.2.0"
