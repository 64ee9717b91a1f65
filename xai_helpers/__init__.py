"""Helpers of XAI Recipes: explain a vision model, and measure whether the explanation can be trusted.

Import from the modules: `from xai_helpers.cam import explain`.
"""
