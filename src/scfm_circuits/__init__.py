"""Helpers behind the companion to Hosokawa et al., "Transcoder-based Circuit Analysis".

The notebooks tell the story; these rooms do the work, in the order data flows through them: common,
cells, models, transcoders, features, enrichment, then circuits, interpretability and paper side by
side, report, book. Importing the package itself imports none of them, so checking whether the book
is up to date stays a matter of milliseconds.
"""

__version__ = "0.1.0"


class InputError(ValueError):
    """Something the user handed in (profile, file, label, parameter) cannot be used.

    The message is one sentence for a person: what is wrong, where, and what to do about it.
    """
