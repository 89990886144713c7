"""The code of this model is the Python package aki (pip install aki-mma), from which this file takes it."""

try:
    from aki.models import AkiConfig, AkiForConditionalGeneration, AkiModel, AkiProcessor
except ImportError as error:
    raise ImportError(
        f"this model needs the package aki: pip install aki-mma (on PyPI, aki alone is another project). {error}"
    ) from error

__all__ = ["AkiConfig", "AkiForConditionalGeneration", "AkiModel", "AkiProcessor"]
