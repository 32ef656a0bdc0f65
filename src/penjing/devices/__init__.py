"""What is measured of a deployed file, and the artifact that it is part of."""
