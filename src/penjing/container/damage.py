"""The error that the parts of the container raise for invalid bytes."""


class DamageError(Exception):
    """A clause that says what is wrong; ``pack`` and ``unpack`` name the file around it."""
