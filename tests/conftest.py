"""Settings of all tests."""

from hypothesis import settings

# A first call imports libraries, and the machine may be busy: time says nothing about an example.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")
