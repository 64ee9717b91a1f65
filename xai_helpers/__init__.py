"""Helpers of XAI Recipes: explain a vision model, and measure whether the explanation can be trusted.

Import from the modules: `from xai_helpers.cam import explain`.
"""

from importlib.metadata import version

__version__ = version("xai-helpers")
