"""Recipes a person runs from a clone: ``python -m examples.quickstart``."""

from importlib.util import find_spec

# what every recipe imports; what one of them needs besides is named where it is imported
_NEEDED = ("accelerate", "jsonargparse", "skimage", "torchmetrics", "tqdm", "yaml")
if _missing := [name for name in _NEEDED if find_spec(name) is None]:
    raise ImportError(
        f'The recipes need {", ".join(_missing)}: pip install -e ".[examples]" in a clone of restoreloss.'
    )
