"""Changing it: the only code that mutates a model or its optimizer."""
