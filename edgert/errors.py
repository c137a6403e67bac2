"""Every error that edgert raises on purpose.

    EdgertError                 catch this one to catch them all
    ├── ModelFileError          a model file is absent, unreadable, truncated, corrupt or lies about itself
    ├── UnsupportedError        the file is sound, but asks for something that edgert does not do
    ├── StorageError            what is to be kept cannot be written: the disk is full, the folder is read-only
    ├── TokenizerError          the vocabulary cannot be built, or a text or id does not fit it
    ├── TemplateError           a chat template failed, refused the messages or took too much
    ├── MemoryLimitError        the model does not fit the budget, or the machine
    ├── ContextLengthError      the prompt is longer than the context
    ├── OptionError             an option has a value that makes no sense
    ├── DeviceError             a device is absent, computes wrongly, or leaves to another what it was asked for
    ├── JobError                work given to other processes does not come back
    └── BusyError               a second answer was asked for while the same thread still reads the first

A message names the file, the key, the value found and the remedy, in one line.
"""

from __future__ import annotations


class EdgertError(Exception):
    """Base of all errors that edgert raises on purpose."""


class ModelFileError(EdgertError):
    """A model file is absent, unreadable, truncated, corrupt or lies about itself."""


class UnsupportedError(EdgertError):
    """The file is sound, but asks for something that edgert does not do."""


class StorageError(EdgertError):
    """What is to be kept cannot be written: the disk is full, the folder is read-only."""


class TokenizerError(EdgertError):
    """The vocabulary cannot be built, or a text or id does not fit it."""


class TemplateError(EdgertError):
    """A chat template failed, refused the messages or took too much time or room."""


class MemoryLimitError(EdgertError):
    """The model does not fit the budget, or the machine."""


class ContextLengthError(EdgertError):
    """The prompt is longer than the context."""


class OptionError(EdgertError, ValueError):
    """An option has a value that makes no sense."""


class DeviceError(EdgertError):
    """A device is absent, computes wrongly, or leaves to another what it was asked for."""


class JobError(EdgertError):
    """Work given to other processes does not come back: they are killed again and again, or the cluster is away."""


class BusyError(EdgertError):
    """A second answer was asked for while the same thread still reads the first."""
