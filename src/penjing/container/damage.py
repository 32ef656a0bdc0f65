"""What the parts of the container raise for bytes that cannot be right."""


class DamageError(Exception):
    """A clause that says what is wrong; ``pack`` and ``unpack`` name the file around it."""
