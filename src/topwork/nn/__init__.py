"""Building blocks: each a small module made from a frozen spec."""
