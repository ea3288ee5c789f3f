"""Block formats: how numbers become blocks of bytes. No files, no models."""

from quantlab.formats.blocks import FORMATS, BlockFormat, PackedTensor, format_named
from quantlab.formats.recipe import Recipe

__all__ = ["FORMATS", "BlockFormat", "PackedTensor", "Recipe", "format_named"]
