"""Iterative LLM self-improvement from one command."""

__version__ = "0.1.0"
