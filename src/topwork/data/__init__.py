"""Rows: read, recognise, render, mask, pack."""
