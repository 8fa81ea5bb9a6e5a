"""Everything that moves data: Beam stages, the dataset contract, the chain."""

__version__ = "0.1.0"
