"""Plain language chooses the weights of a network."""

__version__ = "0.1.0"


def __getattr__(name: str):
    """`HyperLatentPipeline`, imported when it is asked for: importing the package itself stays free of torch."""
    if name in ("HyperLatentPipeline", "HyperLatentOutput"):
        from . import pipeline

        return getattr(pipeline, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), "HyperLatentPipeline", "HyperLatentOutput"]
