"""Helpers behind the companion to Hosokawa et al., "Transcoder-based Circuit Analysis".

The notebooks tell the story; these flat modules do the work, in the order data flows through them:
profile, cells, sentences, language_model, transcoder, training, validation, features, enrichment,
attribution, circuits, figures, claims, book. Importing the package itself imports none of them, so
checking whether the book is up to date stays a matter of milliseconds.
"""

__version__ = "0.1.0"


class InputError(ValueError):
    """Something the user handed in (profile, file, label, parameter) cannot be used.

    The message is one sentence for a person: what is wrong, where, and what to do about it.
    """
