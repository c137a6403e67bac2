"""Bytes on flash: model files and how they are read. Knows nothing of arithmetic."""
