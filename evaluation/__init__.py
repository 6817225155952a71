"""Judges, checks, comparisons with intervals, the gate and the report."""
