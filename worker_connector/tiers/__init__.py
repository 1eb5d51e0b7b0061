"""Stores below the CPU tier: one interface (``base``), and what keeps each of them from harming the engine (``guarded``)."""
