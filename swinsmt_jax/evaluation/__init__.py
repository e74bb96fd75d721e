"""Runs a split and writes tables and pictures."""
