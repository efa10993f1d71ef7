"""Plain language chooses the weights of a network."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .pipeline import HyperLatentPipeline as HyperLatentPipeline
    from .questions_to_weights import HyperLatentOutput as HyperLatentOutput

__version__ = "0.1.0"
__all__ = ["HyperLatentPipeline", "HyperLatentOutput"]


def __getattr__(name: str):
    """The names in `__all__`, imported when they are asked for: importing the package itself stays free of torch."""
    if name in __all__:
        from . import pipeline

        return getattr(pipeline, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
