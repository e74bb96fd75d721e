"""Segment scans with a trained network: files or arrays in, labels on their grid out.

The functions that users need are `load` and `save` of the package itself.
"""
