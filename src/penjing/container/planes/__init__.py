"""Views: the bytes of a tensor as planes of byte symbols that an entropy coder can model.

Each view has a module of its own; ``view`` says what one is.
"""

from penjing.container.planes.bytes import BYTES
from penjing.container.planes.codebook import CODEBOOK
from penjing.container.planes.elements import ElementType, element_type, numbered
from penjing.container.planes.grid import GRID
from penjing.container.planes.integers import INTEGERS
from penjing.container.planes.masked import MASKED
from penjing.container.planes.raw import RAW
from penjing.container.planes.relative import RELATIVE
from penjing.container.planes.sparse import SPARSE
from penjing.container.planes.view import WHOLE, Content, Plane, View, entropy

VIEWS = (RAW, INTEGERS, BYTES, CODEBOOK, SPARSE, RELATIVE, MASKED, GRID)
"""All views, in the order of their numbers in the file."""

__all__ = [
    "VIEWS",
    "WHOLE",
    "Content",
    "ElementType",
    "Plane",
    "View",
    "element_type",
    "entropy",
    "numbered",
]
