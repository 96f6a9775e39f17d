"""For all tests."""

from hypothesis import settings

settings.register_profile("blaq", deadline=None)  # nothing here is a test of time
settings.load_profile("blaq")
